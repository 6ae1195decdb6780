"""A run directory belongs to one run and one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from endings import assert_same_ending, contents
from forked import started_script
from training_runs import AtStep, CrashError, Parts, adam, crash, go, learner, momentum, scheduled

from metamom import (
    CompositeMomentum,
    TopK,
)
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import CheckpointError
from metamom.training.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("global_state")


def test_directory_with_a_run_is_refused_and_left_alone(started):
    before = contents(started)
    with pytest.raises(ValueError, match=r"already holds a run .*resume it \(--resume, or resume=True\)"):
        go(momentum(), started)
    assert contents(started) == before


DIFFERENCES: dict[str, tuple[Callable[[], Parts], dict[str, Any], str]] = {
    "lr": (lambda: momentum(lr=0.5), {}, r"optimizer\.groups\[0\]\.lr is 0\.02 there and 0\.5 here"),
    "beta": (lambda: momentum(beta=1.0), {}, r"beta is 0\.3 there and 1\.0 here"),
    "optimizer": (adam, {}, r"optimizer\.kind is 'CompositeMomentum' there and 'Adam' here"),
    "meta-batch": (momentum, {"meta_batch": 4}, "meta_batch is 8 there and 4 here"),
    "bias": (momentum, {"bias": TopK(k=3)}, "bias is 'none' there and 'topk:3' here"),
    "aggregate": (momentum, {"aggregate": "median"}, "aggregate is 'mean' there and 'median' here"),
    "tasks": (momentum, {"tasks": Sinusoid(5, 5, seed=2)}, r"sampler\.seed is 1 there and 2 here"),
    "model": (
        lambda: Parts(made := learner(9), CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)),
        {},
        "model is 'SinusoidMLP.*there and",
    ),
    "learner": (
        lambda: Parts(made := learner(inner_lr=0.1), CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)),
        {},
        r"learner\.inner_lr\.fixed.* is 0\.01 there and 0\.1 here",
    ),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_resume_with_other_settings_names_them(what, started):
    parts, options, message = DIFFERENCES[what]
    before = contents(started)
    with pytest.raises(ValueError, match=message):
        go(parts(), started, resume=True, **options)
    assert contents(started) == before


@pytest.mark.parametrize("place", ["top", "sampler", "validation"])
def test_resume_with_other_data(place, tmp_path):
    """What follows from the data, such as the images' mean, is not named; another difference is."""

    def settings(digest: str, mean: float, seed: int = 0) -> dict[str, Any]:
        if place == "top":
            return {"data_sha256": {"train": digest}, "constants": [[mean]], "seed": seed}
        return {place: {"data_sha256": digest, "images": mean, "normalize": {"mean": [mean]}}, "seed": seed}

    with RunDirectory(tmp_path, settings("a", 1.0)) as run:
        run.write_config()
        run.log({"step": 0})
    digest = "data_sha256.train" if place == "top" else f"{place}.data_sha256"
    changed = (
        rf"the data of the run in .* have changed since it began \({digest}\): a resumed run must have the same files"
    )
    with pytest.raises(ValueError, match=changed):
        RunDirectory(tmp_path, settings("b", 2.0), resume=True)
    with pytest.raises(
        ValueError, match=r"other settings: .*sha256.* is 'a' there and 'b' here; .*seed is 0 there and 1"
    ):
        RunDirectory(tmp_path, settings("b", 2.0, seed=1), resume=True)
    RunDirectory(tmp_path, settings("a", 1.0), resume=True).close()


def test_checkpoint_of_another_model(tmp_path):
    go(momentum(), tmp_path, iterations=4, settings={"name": "mine"})
    before = contents(tmp_path / "checkpoints")
    made = learner(9)
    with pytest.raises(CheckpointError, match=r"belong to another model or optimizer: .*size mismatch"):
        go(
            Parts(made, CompositeMomentum(made.parameters(), lr=0.02)),
            tmp_path,
            settings={"name": "mine"},
            resume=True,
        )
    with pytest.raises(CheckpointError, match="there is no scheduler0, scheduler1 in"):
        go(scheduled(), tmp_path, settings={"name": "mine"}, resume=True)
    assert contents(tmp_path / "checkpoints") == before


def test_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"the run.s configuration cannot be read\. .*config\.json"):
        go(momentum(), tmp_path)
    assert contents(tmp_path) == {"config.json": b'{"mine": 1}'}
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; a run needs a directory"):
        go(momentum(), file)
    assert file.read_text() == "mine"


def test_start_that_came_to_nothing_may_be_repeated(tmp_path, uninterrupted):
    with pytest.raises(CrashError):
        go(momentum(lr=9.0), tmp_path, tasks=AtStep(0, crash))
    go(momentum(), tmp_path)  # with other settings
    assert_same_ending(tmp_path, uninterrupted("from zero"))


HOLDER = """
    import sys, time
    from metamom.training.directory import RunDirectory
    with RunDirectory(sys.argv[1], {}):
        print("holding", flush=True)
        time.sleep(600)
"""


def test_directory_in_use_is_refused_until_its_process_dies(tmp_path):
    run = tmp_path / "run"
    with started_script(HOLDER, tmp_path / "said", str(run)) as holder:
        holder.until_it_says("holding")
        before = contents(run)
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing to the run directory"):
                go(momentum(), run, resume=resume)
        assert contents(run) == before
    assert go(momentum(), run, iterations=2).resumed_from == 0


@pytest.mark.parametrize("many", [2, 10, 11, 30])
def test_many_differences_are_counted(many, tmp_path):
    """A run of another kind differs in almost all settings; the error lists ten of them."""
    with RunDirectory(tmp_path, dict.fromkeys(map(str, range(many)), 0)) as run:
        run.write_config()
        run.log({"step": 0})
    with pytest.raises(ValueError, match="was made with other settings: 0 is 0 there") as error:
        RunDirectory(tmp_path, dict.fromkeys(map(str, range(many)), 1), resume=True)
    assert str(error.value).count("there and") == min(many, 10)
    assert (f"; and {many - 10} more. Resume it" in str(error.value)) == (many > 10)
