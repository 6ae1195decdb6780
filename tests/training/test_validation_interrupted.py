"""A validation can be stopped between its blocks of tasks, or killed; the run is resumed without losing a step."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endings import assert_same_ending, contents
from forked import forked, without_ranks
from processes import REPOSITORY, SUPPORT, torchrun
from torch.optim import lr_scheduler
from training_runs import PATIENCE, TASKS, CrashError, Parts, global_seed, momentum, with_dropout
from training_runs import go as go_for

from metamom import cli, load
from metamom.common import log_lines
from metamom.common.watching import watched
from metamom.training import Callback, EarlyStopping
from metamom.training.checkpoints import CheckpointError, save
from metamom.training.checkpoints import load as read
from metamom.training.directory import read_config, read_metrics
from metamom.training.interrupts import TrainingInterrupted

pytestmark = pytest.mark.usefixtures("global_state")

VALIDATED = {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 100, "checkpoint_every": 5}


def plain() -> Parts:
    """The step size halves at each validation but the first; the run stops early where validations get worse."""
    made = momentum()
    plateau = lr_scheduler.ReduceLROnPlateau(made.optimizer, factor=0.5, patience=0, threshold=0.9)
    return made._replace(schedulers=(plateau,), options={"callbacks": EarlyStopping(2), **VALIDATED})


def random() -> Parts:
    return with_dropout()._replace(options=VALIDATED)


def go(parts: Parts, run_dir: Path | None = None, *, iterations: int = 6, **options: Any) -> Any:
    return go_for(parts, run_dir, iterations=iterations, **options)


class At:
    """Does something within the n-th validation, counted from 1, after its first block of 50 tasks."""

    def __init__(self, number: int, action: Callable[[], Any]) -> None:
        self.number, self.action, self.seen = number, action, 0

    def __call__(self, done: int, tasks: int) -> None:
        assert (done, tasks) == (50, 100)
        self.seen += 1
        if self.seen == self.number:
            self.action()


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def crash() -> None:
    raise CrashError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    paths = {make.__name__: tmp_path_factory.mktemp("whole") / make.__name__ for make in (plain, random)}
    for make in (plain, random):
        with global_seed(7):
            go(make(), paths[make.__name__])
    return paths


@pytest.mark.parametrize("make", [plain, random])
@pytest.mark.parametrize("action", [interrupt, crash])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_resumed_run_ends_as_an_uninterrupted_one(number, action, make, whole, tmp_path):
    with pytest.raises((TrainingInterrupted, CrashError)), watched(None, At(number, action)):
        go(make(), tmp_path)
    assert len(read_metrics(tmp_path)) == 2 * number - 1, "the validated step is not logged yet"
    assert read_config(tmp_path)["history"][-1]["ended"]["step"] == 2 * number
    with global_seed(99):
        result = go(make(), tmp_path, resume=True)
    assert result.resumed_from == 2 * number - 1
    assert len(result.metrics) == 6 - result.resumed_from
    assert result.validation.values.shape == (1, 100)
    assert_same_ending(tmp_path, whole[make.__name__])
    assert set(contents(tmp_path)) == set(contents(whole[make.__name__]))


def test_interrupted_again_and_again(whole, tmp_path):
    for _ in range(2):
        for number in (1, 2):  # the first again, once it is resumed
            with pytest.raises(TrainingInterrupted), watched(None, At(number, interrupt)):
                go(plain(), tmp_path, resume=True)
    go(plain(), tmp_path, resume=True)
    assert_same_ending(tmp_path, whole["plain"])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (2, "stopped in the validation after 50 of 100 tasks, after step 4 of 6; saved in RUN; resume to go on."),
        (3, "stopped in the validation after 50 of 100 tasks, after step 6 of 6; saved in RUN; resume to validate."),
    ],
)
def test_what_is_said(number, said, tmp_path):
    with pytest.raises(TrainingInterrupted) as caught, watched(None, At(number, interrupt)):
        go(plain(), tmp_path)
    assert str(caught.value) == said.replace("RUN", str(tmp_path))
    assert caught.value.signal_number == signal.SIGINT
    unsaved = pytest.raises(TrainingInterrupted, match=r"after step \d of 6; nothing was saved without a run_dir\.$")
    with unsaved, watched(None, At(number, interrupt)):
        go(plain(), checkpoint_every=500)


def test_the_command_that_continues(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["train", "sinusoid", "--meta-batch", "2", "--iterations", "1", "--evaluate-tasks", "100"]
    with watched(None, At(1, interrupt)):
        assert cli.main(words) == 130
    said = capsys.readouterr().out
    (run,) = Path("runs").iterdir()
    assert said == f"continue: metamom {' '.join(words)} --run-dir {run} --resume\n"
    with watched(None, At(1, interrupt)):
        assert cli.main(said.split()[2:]) == 130
    assert capsys.readouterr().out == said
    assert cli.main(said.split()[2:]) == 0
    assert capsys.readouterr().out.startswith("trained for 1 iteration,")


def test_after_the_last_step_nothing_is_left(tmp_path):
    class Interrupt(Callback):
        def on_step(self, state):
            if state.step == state.iterations:
                interrupt()

    with pytest.raises(TrainingInterrupted, match=r"stopped after step 3 of 3; saved in .*; training is complete\.$"):
        go(momentum(), tmp_path, iterations=3, callbacks=Interrupt())


class Crash(Callback):
    """After the metrics of a step are logged, and before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation(self, state) -> None:
        if state.step == self.step:
            raise CrashError


@pytest.mark.parametrize("step", [2, 4, 6])
def test_killed_between_the_metrics_and_the_checkpoint(step, whole, tmp_path):
    callbacks = [EarlyStopping(2), Crash(step)]
    with pytest.raises(CrashError):
        go(plain(), tmp_path, callbacks=callbacks)
    assert "validation" in read_metrics(tmp_path)[step - 1]
    go(plain(), tmp_path, resume=True)
    assert_same_ending(tmp_path, whole["plain"])


def test_other_plans_on_resume(tmp_path):
    """Whether there is a validation after the last step is as in a run that had these plans from the start."""
    with pytest.raises(TrainingInterrupted), watched(None, At(1, interrupt)):
        go(random(), tmp_path / "run", evaluate_every=None)
    assert load(tmp_path / "run", "newest", lambda: random().learner.model).step == 6
    with pytest.raises(ValueError, match="already holds a run"):
        go(random(), tmp_path / "run", evaluate_every=None)
    shutil.copytree(tmp_path / "run", tmp_path / "damaged")
    go(random(), tmp_path / "run", evaluate_every=None, iterations=8, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "validation" in line] == [7]
    file = tmp_path / "damaged" / "checkpoints" / "step-00000006.unvalidated.pt"
    state = read(file)
    save(file, {**state, "unvalidated": {"step": 3}})
    with pytest.raises(CheckpointError, match="should hold the metrics of step 5, or nothing, as 'unvalidated'"):
        go(random(), tmp_path / "damaged", resume=True)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"unvalidated.pt is cut short or damaged .* Going back to the one before"):
        assert go(random(), tmp_path / "damaged", resume=True).resumed_from == 5


def test_log_lines(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(log_lines, "EVERY", 0.0)
    go(momentum(), iterations=2, validation=TASKS, evaluate_tasks=150)
    said = [line.split(", ") for line in capsys.readouterr().err.splitlines()]
    assert [line[0] for line in said] == ["train: 1/2 it", "train", "train", "train: 2/2 it"]
    assert [line[1] for line in said[1:3]] == [f"validating: {n}/150 tasks" for n in (50, 100)]
    assert all(re.fullmatch(r"\d\S* tasks/s", line[2]) for line in said[1:3])
    go(momentum(), iterations=2, validation=TASKS, evaluate_tasks=150, label=None)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGKILL))],
)
def test_signal_to_a_real_process(number, tmp_path):
    run = tmp_path / "run"
    words = ["train", "sinusoid", "--iterations", "2", "--run-dir", str(run), "--evaluate-tasks", "1000000"]
    saved = run / "checkpoints" / "step-00000002.unvalidated.pt"
    with forked(without_ranks, 1, tmp_path / "said", *words) as (started,):
        until = time.monotonic() + PATIENCE
        while started.process.is_alive() and time.monotonic() < until and not saved.exists():
            time.sleep(0.02)
        os.kill(started.pid, number)
        status, said = started.ended()
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    assert read(saved)["step"] == 2
    if number != signal.SIGKILL:
        assert re.search(r"stopped in the validation after \d+ of 1000000 tasks, after step 2 of 2; saved in", said)


SCRIPT = """
import signal, sys
from training_runs import TASKS, go, momentum
from metamom.common.watching import watched
from metamom.distributed import start
from metamom.training.interrupts import TrainingInterrupted

with start(timeout=60) as world:
    def watch(done, tasks):
        sys.stdout.write(f"watch {world.rank} {done}\\n")
        if world.rank == 1 and done == 150 and sys.argv[2] == "stop":
            signal.raise_signal(signal.SIGTERM)
    try:
        with watched(None, watch):
            go(momentum(), sys.argv[1], iterations=4, meta_batch=6, validation=TASKS, evaluate_tasks=350, world=world,
               resume=True)
    except TrainingInterrupted as error:
        sys.stdout.write(f"stopped {world.rank} {error}\\n")
"""


@pytest.mark.slow
def test_a_signal_to_one_of_several_processes(tmp_path):
    """7 blocks of 50 tasks for 3 processes: all stop after the first three, and two have none in the last round."""
    script, run = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SCRIPT)

    def started(how: str) -> list[str]:
        ended = torchrun([str(script), str(run), how], 3, PYTHONPATH=os.pathsep.join([str(REPOSITORY), str(SUPPORT)]))
        assert ended.returncode == 0, ended.stderr
        return sorted(ended.stdout.splitlines())

    left = f"stopped in the validation after 150 of 350 tasks, after step 4 of 4; saved in {run}; resume to validate."
    assert started("stop") == [*(f"stopped {n} {left}" for n in range(3)), *(f"watch {n} 150" for n in range(3))]
    assert len(read_metrics(run)) == 3
    assert started("go on") == [f"watch {n} {done}" for n in range(3) for done in (150, 300)]
    go(momentum(), tmp_path / "whole", iterations=4, meta_batch=6, validation=TASKS, evaluate_tasks=350)
    ends = [read_metrics(path)[-1]["validation"] for path in (run, tmp_path / "whole")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
