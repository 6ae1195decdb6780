"""What a run's directory keeps, what a resume is refused for, and that a refusal changes nothing."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from endings import assert_same, contents, newest
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, RMSprop, Rprop
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import StepLR

from metamom import MAML, Clip, Compose, CompositeMomentum, LambdaBeta, TopK, cli, files, train
from metamom.bias import EF14, EF21, RandK
from metamom.experiments.recipes import Recipe
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.contents import Contents
from metamom.training.directory import RunDirectory, read_config, read_metrics
from metamom.training.plan import describe
from metamom.training.restore import load_parts

TASKS = Sinusoid(shots=4, queries=4, seed=1)
FLAGS = ["--meta-batch", "2", "--shots", "4", "--queries", "4", "--evaluate-tasks", "4", "--checkpoint-every", "2"]


def learner(loss: Any = F.mse_loss, **options: Any) -> MAML:
    return MAML(SinusoidMLP((4,), generator=torch.Generator().manual_seed(0)), loss, **options)


def go(run_dir: Path | None, made: MAML | None = None, *, iterations: int = 4, **options: Any) -> Any:
    made = learner() if made is None else made
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    steps = [make(optimizer) for make in options.pop("schedulers", ())]
    options = {"meta_batch": 2, "checkpoint_every": 2, **options}
    return train(made, optimizer, TASKS, iterations=iterations, run_dir=run_dir, schedulers=steps, **options)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps by `train`."""
    path = tmp_path_factory.mktemp("ended") / "run"
    go(path)
    return path


@pytest.fixture
def run(ended: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(ended, tmp_path / "run"))


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps by the command."""
    path = tmp_path_factory.mktemp("commanded") / "run"
    assert cli.main(["train", "sinusoid", *FLAGS, "--iterations", "4", "--run-dir", str(path)]) == 0
    return path


def refused(run_dir: Path, match: str, call: Callable[[], Any]) -> None:
    """A ValueError, and every file as it was."""
    before = contents(run_dir) if run_dir.exists() else None
    with pytest.raises(ValueError, match=match):
        call()
    assert (contents(run_dir) if run_dir.exists() else None) == before


# length, and what may differ


def test_fewer_iterations_than_are_done(run, commanded, capsys):
    refused(
        run,
        r"has done 4 iterations, more than the 3 asked for in all\. Pass iterations \(--iterations\) above 4 to go on",
        lambda: go(run, iterations=3, resume=True),
    )
    before = contents(commanded)
    wanted = ["train", "sinusoid", *FLAGS, "--iterations", "3", "--run-dir", str(commanded), "--resume"]
    assert cli.main(wanted) == 2
    assert "error: the run in" in capsys.readouterr().err
    assert contents(commanded) == before


def test_a_run_goes_on_in_smaller_chunks_and_elsewhere(commanded, tmp_path):
    """With the weights of a run that was never interrupted, up to the rounding of another order of sums."""
    run, whole = Path(shutil.copytree(commanded, tmp_path / "run")), tmp_path / "whole"
    more = ["--iterations", "8", "--device", "cpu:0", "--chunk-size", "1"]
    assert cli.main(["train", "sinusoid", *FLAGS, *more, "--run-dir", str(run), "--resume"]) == 0
    assert cli.main(["train", "sinusoid", *FLAGS, "--iterations", "8", "--run-dir", str(whole)]) == 0
    assert read_config(run)["settings"]["chunk_size"] == 1
    assert [entry["settings"] for entry in read_config(run)["history"]] == [
        {"chunk_size": None, "compile": False, "device": "cpu"},
        {"chunk_size": 1, "compile": False, "device": "cpu:0"},
    ]
    for name, weight in newest(whole)["learner"].items():
        torch.testing.assert_close(newest(run)["learner"][name], weight, msg=name)


def test_a_comparison_goes_on_in_smaller_chunks(tmp_path):
    compare = ["compare", "sinusoid", *FLAGS[:-2], "--seeds", "1", "--lrs", "0.01", "--iterations", "4", "--tasks", "4"]
    compare += ["--evaluate-every", "2", "--steps", "1", "--run-dir", str(tmp_path)]
    assert cli.main(compare) == 0
    (tmp_path / "runs" / "beta1-zero_lr0.01_seed0" / "outcome.json").unlink()
    assert cli.main([*compare, "--resume", "--chunk-size", "1"]) == 0
    assert cli.main([*compare, "--resume", "--inner-lr", "0.02"]) == 2


def test_what_may_differ_is_one_list():
    """Every option of a learner decides a run, by `describe`, or is marked in the recipe as one that does not."""
    options = set(inspect.signature(MAML).parameters) - {"model", "loss_fn"}
    made = learner()
    described = describe(made, Adam(made.parameters()), TASKS, meta_batch=2, workers=1, bias=None)
    decides = {*described, *described["learner"], "learn_inner_lr", "tracking"}  # with inner_lr, where it is tracked
    assert options - decides == set(Recipe.free()) - {"device"}
    assert {"loss", "dtype", "schedulers", "bias", "aggregate"} < set(described)
    assert set(Recipe.free()) < {field.name for field in fields(Recipe)}


def huber(predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.huber_loss(predictions, y)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (F.mse_loss, F.l1_loss, "loss.name is 'mse_loss' there and 'l1_loss' here"),
        (nn.MSELoss(), nn.MSELoss(reduction="sum"), "loss.reduction is 'mean' there and 'sum' here"),
        (functools.partial(F.huber_loss, delta=1.0), functools.partial(F.huber_loss, delta=2.0), "loss.delta is 1.0"),
        (huber, nn.HuberLoss(), r"loss.name is 'huber' there and 'HuberLoss\(\)' here"),
    ],
)
def test_another_loss(there, here, message, tmp_path):
    go(tmp_path, learner(there))
    refused(tmp_path, message, lambda: go(tmp_path, learner(here), resume=True))
    go(tmp_path, learner(there), resume=True)


class Power:
    def __init__(self, p: int) -> None:
        self.p = p

    def __call__(self, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (predictions - y).abs().pow(self.p).mean()


class Around(nn.Module):
    """A loss with a child and a buffer."""

    def __init__(self, scale: float = 1.0, delta: float = 1.0) -> None:
        super().__init__()
        self.child = nn.HuberLoss(delta=delta)
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scale.mean() * self.child(predictions, y)


def power_of(p: int) -> Any:
    def loss(predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (predictions - y).abs().pow(p).mean()

    return loss


def with_default(p: int) -> Any:
    return lambda predictions, y, p=p: (predictions - y).abs().pow(p).mean()


def weighted(weight: float) -> Any:
    return functools.partial(weigh, torch.tensor([weight]))


def weigh(weight: torch.Tensor, predictions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (weight * (predictions - y).square()).mean()


OTHER_CONTENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "a child": (Around, lambda: Around(delta=3.0), r"contents\.loss\.child\.delta is 1\.0 there and 3\.0 here"),
    "a buffer": (Around, lambda: Around(2.0), r"contents\.loss\.scale is 'torch.float32 of shape \(1,\), "),
    "an attribute": (lambda: Power(2), lambda: Power(3), r"contents\.loss\.p is 2 there and 3 here"),
    "a closure": (lambda: power_of(2), lambda: power_of(3), r"contents\.loss\.closure\.p is 2 there and 3 here"),
    "a default": (lambda: with_default(2), lambda: with_default(3), r"contents\.loss\.defaults\.p is 2 there and 3"),
    "a tensor of a partial function": (lambda: weighted(1.0), lambda: weighted(2.0), r"contents\.loss\.0 is 'torch"),
    "code": (
        lambda: lambda predictions, y: (predictions - y).abs().mean(),
        lambda: lambda predictions, y: (predictions - y).square().mean(),
        r"code\[0\] is ",
    ),
    "a constant": (
        lambda: lambda predictions, y: (2.0 * (predictions - y)).abs().mean(),
        lambda: lambda predictions, y: (3.0 * (predictions - y)).abs().mean(),
        r"code\[0\] is ",
    ),
}


@pytest.mark.parametrize("what", OTHER_CONTENTS)
def test_another_loss_of_the_same_name(what, tmp_path):
    there, here, message = OTHER_CONTENTS[what]
    go(tmp_path, learner(there()), iterations=2)
    refused(tmp_path, message, lambda: go(tmp_path, learner(here()), resume=True))
    go(tmp_path, learner(there()), resume=True)


def test_weights_of_classes_are_compared():
    """They are a module's buffer, which its name does not show."""
    one, same, other = (nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (2.0, 2.0, 3.0))
    assert Contents(one).values == Contents(same).values != Contents(other).values


def test_a_lambda_of_the_same_code_is_the_same(tmp_path):
    def elsewhere() -> Any:
        return lambda predictions, y: (predictions - y).square().mean()

    go(tmp_path, learner(lambda predictions, y: (predictions - y).square().mean()), iterations=2)
    go(tmp_path, learner(elsewhere()), resume=True)


def test_a_trained_loss_is_the_same_and_one_that_holds_itself_ends():
    """What training moves does not decide a run."""
    module = nn.PReLU()
    before = Contents(module).values
    with torch.no_grad():
        module.weight.add_(1.0)
    assert Contents(module).values == before
    power = Power(2)
    power.me = power  # type: ignore[attr-defined]
    assert Contents(power).values == [{"kind": "Power", "p": 2, "me": "itself"}]


def test_code_is_compared_within_one_version_of_python(tmp_path):
    go(tmp_path, learner(power_of(2)), iterations=2)
    config = read_config(tmp_path)
    config["settings"]["code"], config["environment"]["python"] = ["of another", None], "3.1.4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    go(tmp_path, learner(power_of(2)), resume=True)


def test_another_function_as_bias(tmp_path):
    def scaled(factor: float) -> Any:
        return lambda gradient: factor * gradient

    go(tmp_path, bias=scaled(0.5), iterations=2)
    message = r"contents\.bias\[0\]\.closure\.factor is 0\.5 there"
    refused(tmp_path, message, lambda: go(tmp_path, bias=scaled(0.7), resume=True))
    message = r"code\[1\] is "
    refused(tmp_path, message, lambda: go(tmp_path, bias=lambda gradient: gradient.sign(), resume=True))
    go(tmp_path, bias=scaled(0.5), resume=True)


def test_another_precision(run):
    refused(run, "autocast is None there", lambda: go(run, learner(autocast=torch.bfloat16), resume=True))
    refused(run, "dtype is 'torch.float32' there", lambda: go(run, learner().to(torch.float64), resume=True))


def test_another_schedule(tmp_path):
    """Its old settings would win in silence: they are in its state."""
    go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.5)])
    refused(
        tmp_path,
        r"schedulers\[0\]\.gamma is 0\.5 there and 0\.7 here",
        lambda: go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.7)], resume=True),
    )
    refused(tmp_path, "schedulers is", lambda: go(tmp_path, resume=True))
    other = [lambda o: LambdaBeta(o, lambda k: 1.0)]
    refused(tmp_path, "schedulers.*kind is", lambda: go(tmp_path, schedulers=other, resume=True))
    go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.5)], resume=True, iterations=5)


def test_validation_may_begin_and_end_but_not_change(run):
    """What the best checkpoint is the best of must stay."""
    go(run, resume=True, iterations=5, validation=TASKS, evaluate_tasks=4)
    other = Sinusoid(shots=4, queries=4, seed=2)
    refused(run, r"validation\.seed is 1 there and 2", lambda: go(run, resume=True, iterations=6, validation=other))
    go(run, resume=True, iterations=6)


def test_tracking_may_differ_and_is_recorded(commanded, tmp_path):
    """It changes no weight (test_diagnostics); a run may go on with it, as with more validations."""
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    assert "track_bias" not in read_config(run)["length"]
    command = ["train", "sinusoid", *FLAGS, "--iterations", "5", "--run-dir", str(run), "--resume"]
    assert cli.main([*command, "--track-bias", "every=4"]) == 0
    assert read_config(run)["length"]["track_bias"][0] == 4


def test_settings_of_ones_own_that_may_differ(tmp_path):
    go(tmp_path, settings={"name": "mine", "host": "a"}, free=["host"])
    go(tmp_path, settings={"name": "mine", "host": "b"}, free=["host"], resume=True)
    refused(tmp_path, "host is 'b' there", lambda: go(tmp_path, settings={"name": "mine", "host": "a"}, resume=True))


def test_a_record_that_knew_no_such_setting(run):
    config = read_config(run)
    for name in ("loss", "dtype", "schedulers", "contents", "code"):
        del config["settings"][name]
    del config["history"]  # as a version wrote that knew none of them
    (run / "config.json").write_text(json.dumps(config))
    go(run, resume=True, iterations=5)
    assert "loss" in read_config(run)["settings"]
    assert [entry["length"]["iterations"] for entry in read_config(run)["history"]] == [4, 5]


def test_every_start_is_remembered(run, monkeypatch):
    for iterations, word in ((5, "again"), (6, "and again")):
        monkeypatch.setattr(sys, "argv", ["metamom", word])
        go(run, resume=True, iterations=iterations)
    config = read_config(run)
    assert [entry["length"]["iterations"] for entry in config["history"]] == [4, 5, 6]
    assert [entry["environment"]["command"] for entry in config["history"]][1:] == [
        ["metamom", "again"],
        ["metamom", "and again"],
    ]
    assert all({"torch", "metamom", "python"} <= entry["environment"].keys() for entry in config["history"])
    assert config["environment"] == config["history"][-1]["environment"]


def test_metrics_of_steps_that_will_not_be_done_again_are_kept(run):
    """The newest checkpoint is damaged, and the run is to end before where it was."""
    before = (run / "metrics.jsonl").read_bytes()
    Checkpoints(run / "checkpoints").path(4).write_bytes(b"damaged")
    held = "held metrics of step 3, which this run goes back behind"
    with pytest.warns(UserWarning, match="Going back to the one before"), pytest.warns(UserWarning, match=held):
        go(run, resume=True, iterations=3)
    assert (run / "metrics.jsonl.longer").read_bytes() == before
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]


# refused before anything is written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": Compose(TopK(10**6), Clip(1.0))}, r"TopK needs 1 <= k <= "),
        ({"bias": Compose(Clip(1.0), RandK(10**6), TopK(3))}, r"RandK needs 1 <= k <= "),
        ({"bias": EF14(Compose(TopK(10**6), Clip(1.0)))}, r"TopK needs 1 <= k <= "),
        ({"workers": 2, "aggregate": "trimmed:0.1"}, "leaves out none"),
    ],
)
def test_an_operator_is_refused_before_the_directory_is_made(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_no_tensorboard(resume, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    place = run if resume else tmp_path / "none"
    refused(place, "needs TensorBoard: pip install", lambda: go(place, resume=resume, iterations=6, tensorboard=True))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--device", "cuda:99"], ["--device", "toaster"], ["--bias", "topk:1000000+clip:1"], ["--inner-steps", "0"],
        ["--adapt", "nothing"], ["--track-bias", "every=2", "--shots", "1", "--queries", "0"], ["--lr", "-1"],
        ["--estimator", "moml"], ["--schedule", "cosine:0"], ["--evaluate-tasks", "1"], ["--checkpoint-every", "0"],
    ],
)  # fmt: skip
def test_bad_flags_make_no_directory(wrong, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", "sinusoid", "--iterations", "1", "--run-dir", str(run), *wrong]) == 2
    assert "metamom: error: " in capsys.readouterr().err
    assert not run.exists()


def test_what_a_killed_process_has_left_goes_once_the_run_goes_on(run):
    half = run / "checkpoints" / ".step-00000004.pt.abc.tmp"
    half.write_bytes(b"half")
    refused(run, "more than the 1 asked for", lambda: go(run, iterations=1, resume=True))
    assert half.exists()
    go(run, iterations=5, resume=True)
    assert not half.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664), (0o022, 0o644)])
def test_modes_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "file", b"")
        go(tmp_path / "run", iterations=2)
    finally:
        os.umask(before)
    made = [tmp_path / "file", *(path for path in (tmp_path / "run").rglob("*") if path.is_file())]
    assert {path.name for path in made} >= {"config.json", "metrics.jsonl", "step-00000002.pt"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {mode}
    folders = [tmp_path / "run", tmp_path / "run" / "checkpoints"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}


# records of the wrong type


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("settings", [], r"config\.json: settings should be an object|settings should be"),
        ("length", 3, "length should be"),
        ("environment", None, "environment should be"),
        ("history", {"a": 1}, "history should be"),
        ("history", [1], r"history\.0 should be"),
    ],
)
def test_parts_of_a_configuration_of_the_wrong_type(name, value, message, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, name: value}))
    refused(run, message, lambda: go(run, resume=True))


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"settings": ' * 10**5, "\0", "", "null", '"\\ud800"', "{" + " " * 10**6]
)
def test_a_configuration_that_is_no_json(text, run):
    (run / "config.json").write_text(text)
    refused(run, r"the run.s configuration cannot be read\. .*config\.json", lambda: go(run, resume=True))


def folder(place: Path) -> None:
    place.mkdir()


def self_link(place: Path) -> None:
    place.symlink_to(place)


def dangling(place: Path) -> None:
    place.symlink_to("nowhere")


def device(place: Path) -> None:
    place.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [folder, self_link, dangling, device, os.mkfifo], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [".lock", "config.json", "metrics.jsonl"])
def test_files_that_are_none(name, make, run):
    (run / name).unlink(missing_ok=True)
    make(run / name)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ValueError, match=rf"{name} is .*, where a run keeps a file of its own\. Move it away"):
        go(run, resume=True)
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "0.1", "lr should be a valid number; got '0.1'"),
        ("shots", 1.5, "shots should be a valid integer; got 1.5"),
        ("workers", True, "workers should be a valid integer; got True"),
        ("adapt", ["0", 1], "adapt.1 should be a valid string"),
        ("chunk_size", "all", "chunk_size should be a valid integer or 'auto'|chunk_size should be"),
        ("estimator", "exactly", "estimator must be one of exact, independent"),
        ("task", None, "task should be 'sinusoid' or 'omniglot'"),
        ("fixed_tasks", 2**40, "fixed_tasks must be at most 2,147,483,647"),
        ("beta", 7.0, None),  # of the optimizer, which evaluation does not make
    ],
)
def test_settings_of_the_wrong_type(name, value, message, commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    config = read_config(run)
    config["settings"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    status = cli.main(["evaluate", str(run), "--tasks", "4"])
    said = capsys.readouterr().err
    if message is None:
        assert status == 0
    else:
        assert status == 2
        assert any(each in said for each in message.split("|")), said
        bias = ["bias", str(run), "--tasks", "3", "--inner-batch", "1", "--out", str(tmp_path / "bias")]
        assert cli.main(bias) == 2
        assert not (tmp_path / "bias").exists()
    resume = ["train", "sinusoid", *FLAGS, "--iterations", "5", "--run-dir", str(run), "--resume"]
    if name not in Recipe.free():
        assert cli.main(resume) == 2
        assert f"{name} is {value!r} there and" in capsys.readouterr().err or name == "adapt"
    assert contents(run) == before


# checkpoints with the wrong contents


def edited(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Save the newest checkpoint again with other contents."""
    path = Checkpoints(run_dir / "checkpoints").path(4)
    save(path, change(load(path)))


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, name: value}


def in_group(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"]["param_groups"][0].update(values)
        return state

    return change


def in_state(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"]["state"][0] = value
        return state

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no step": (without("step"), "should hold a whole number >= 0 as 'step'; got None"),
    "no seconds": (without("seconds"), "a number >= 0 as 'seconds'; got None"),
    "no best": (without("best"), "there is no 'best' in .*: the best validation so far, or None"),
    "no rng": (without("rng"), "the states of torch's generators as 'rng', .*; got None"),
    "no learner": (without("learner"), "there is no learner in the checkpoints"),
    "step of text": (with_("step", "4"), "'step'; got '4'"),
    "step below zero": (with_("step", -1), "'step'; got -1"),
    "step beyond all": (with_("step", 2**70), "of another step than its name says: it holds a number of many digits"),
    "another step": (with_("step", 3), r"step-00000004\.pt is of another step than its name says: it holds 3\."),
    "weights NaN": (
        lambda s: {**s, "learner": {k: v * math.nan for k, v in s["learner"].items()}},
        "learner: .* is not finite in all of its entries",
    ),
    **{
        f"weights of {dtype}": (
            lambda s, dtype=dtype: {**s, "learner": {k: v.to(dtype) for k, v in s["learner"].items()}},
            f"learner: .* should be of torch.float32; got a tensor of {dtype}",
        )
        for dtype in (torch.bool, torch.int64, torch.complex64)
    },
    "momentum NaN": (in_state({"momentum": torch.full((4, 1), math.nan)}), r"state\[0\]\.momentum is not finite"),
    "momentum of int64": (
        in_state({"momentum": torch.zeros(4, 1, dtype=torch.int64)}),
        r"state\[0\]\.momentum should be of torch\.float32; got a tensor of torch\.int64",
    ),
    "momentum lost": (
        lambda s: {**s, "optimizer": {**s["optimizer"], "state": {}}},
        "'state' holds nothing, but after its first step there is momentum of each parameter",
    ),
    "one momentum lost": (
        lambda s: (s["optimizer"]["state"].pop(2), s)[1],
        "'state' has no entry 2, but after its first step there is momentum of each parameter",
    ),
    "momentum None": (
        in_state({"momentum": None}),
        r"state\[0\]\.momentum should be a tensor of shape \(4, 1\); got None",
    ),
    "maximize": (
        in_group(maximize=True),
        r"param_groups\[0\]\.maximize should be False, as the optimizer is made; got T",
    ),
    "normalize": (in_group(normalize=True), r"param_groups\[0\]\.normalize should be False, .*; got True"),
    "another beta": (in_group(beta=0.4), r"param_groups\[0\]\.beta should be 0\.3, for no schedule moved it; got 0\.4"),
    "another first step": (in_group(first_step="gradient"), r"param_groups\[0\]\.first_step should be 'zero'"),
    "weight decay beyond all": (in_group(weight_decay=2**70), r"param_groups\[0\]\.weight_decay should be 0\.0"),
    "weight decay beyond a float": (in_group(weight_decay=10**400), r"weight_decay should be a number; got a whole"),
    "foreach a tensor": (in_group(foreach=torch.zeros(3)), r"param_groups\[0\]\.foreach should be None"),
    "parameters in another order": (in_group(params=[1, 0, 2, 3]), r"param_groups\[0\]\.params should number"),
    "lr below zero": (in_group(lr=-0.5), r"param_groups\[0\]\.lr should be a number >= 0; got -0\.5"),
    "another lr": (in_group(lr=0.5), r"param_groups\[0\]\.lr should be 0\.02, for no schedule moved it; got 0\.5"),
    "more seconds than a float has": (
        with_("seconds", 10**400),
        "'seconds'; got a whole number of 1,329 bits",
    ),
    "seconds NaN": (with_("seconds", float("nan")), "'seconds'; got nan"),
    "best NaN": (with_("best", math.nan), "should hold the best validation, or None, as 'best'; got nan"),
    "best of text": (with_("best", "x"), "'best'; got 'x'"),
    "rng a list": (with_("rng", [1]), "should hold the states of torch's generators as 'rng', .*; got a list"),
    "rng short": (
        with_("rng", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}),
        "no states of generators",
    ),
    "rng of GPUs": (
        with_("rng", {"cpu": torch.get_rng_state(), "cuda": ["x"]}),
        "no states of generators",
    ),
    "learner a list": (with_("learner", [1]), "learner: its state should be a dict"),
    "learner of numbers": (with_("learner", {1: 2}), "learner: "),
    "learner of text": (with_("learner", {"model.0.weight": "x"}), "learner: "),
    "optimizer None": (with_("optimizer", None), "optimizer: its state should be a dict"),
    "optimizer's state a list": (with_("optimizer", {"state": [], "param_groups": []}), "'state' should be a dict"),
    "no group": (with_("optimizer", {"state": {}, "param_groups": []}), "wanted 1 param_groups; got 0"),
    "lr of text": (in_group(lr="x"), r"param_groups\[0\]\.lr should be a number; got 'x'"),
    "lr NaN": (in_group(lr=float("nan")), r"param_groups\[0\]\.lr should be a number; got nan"),
    "beta out of range": (in_group(beta=7.0), "beta"),
    "parameters twice": (in_group(params=[0, 0, 0, 0]), "'params' should be whole numbers that differ"),
    "no momentum": (in_state({}), r"state\[0\] has no momentum"),
    "momentum of text": (in_state({"momentum": "x"}), r"state\[0\]\.momentum should be a tensor of shape \(4, 1\)"),
    "momentum of another shape": (in_state({"momentum": torch.zeros(3)}), r"got a tensor of shape \(3,\)"),
    "state of nobody": (
        lambda s: {**s, "optimizer": {**s["optimizer"], "state": {9: {"momentum": torch.zeros(1)}}}},
        "an entry 9, which is no parameter's",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_checkpoints_with_the_wrong_contents(what, run):
    """One error that names the field; the files, the learner, the optimizer and the generators are as they were."""
    change, message = WRONG[what]
    edited(run, change)
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    groups, generator = optimizer.state_dict(), torch.get_rng_state()
    refused(
        run,
        message,
        lambda: train(made, optimizer, TASKS, iterations=6, meta_batch=2, checkpoint_every=2, run_dir=run, resume=True),
    )
    assert_same(dict(made.state_dict()), before)
    assert optimizer.state_dict() == groups
    assert torch.equal(torch.get_rng_state(), generator)


def test_evaluation_of_checkpoints_with_the_wrong_contents(commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    edited(run, lambda s: {**s, "learner": {k: v * math.nan for k, v in s["learner"].items()}})
    assert cli.main(["evaluate", str(run), "--tasks", "4", "--checkpoint", "newest"]) == 2
    assert "is not finite" in capsys.readouterr().err


def test_an_optimizer_without_a_state_goes_on(tmp_path):
    """SGD has none, and ours none before its first step."""
    recipe = Recipe("sinusoid", optimizer="sgd")
    for done in (2, 3):
        made = recipe.learner()
        options: dict[str, Any] = {"meta_batch": 2, "run_dir": tmp_path, "resume": True}
        train(made, recipe.make_optimizer(made), TASKS, iterations=done, **options)
    fresh = CompositeMomentum(learner().parameters(), lr=0.02)
    load_parts({"optimizer": fresh}, {"optimizer": fresh.state_dict()}, "RUN")


KINDS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": lambda p: Adam(p, lr=0.01)},
    "adamw": {"optimizer": lambda p: AdamW(p, lr=0.01)},
    "amsgrad": {"optimizer": lambda p: Adam(p, lr=0.01, amsgrad=True)},
    "rmsprop": {"optimizer": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5)},
    "sgd": {"optimizer": lambda p: SGD(p, lr=0.01, momentum=0.5)},
    "nadam": {"optimizer": lambda p: NAdam(p, lr=0.01)},
    "adagrad": {"optimizer": lambda p: Adagrad(p, lr=0.01)},
    "rprop": {"optimizer": lambda p: Rprop(p, lr=0.01)},
    "adafactor": {"optimizer": lambda p: Adafactor(p, lr=0.01)},
    "normalized": {"optimizer": lambda p: CompositeMomentum(p, lr=0.01, normalize=True)},
    "sgd, StepLR": {"optimizer": lambda p: SGD(p, lr=0.01), "schedule": lambda o: StepLR(o, 3, 0.5)},
    "CyclicLR": {
        "optimizer": lambda p: SGD(p, lr=0.01, momentum=0.5),
        "schedule": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    },
    "OneCycleLR": {"optimizer": lambda p: Adam(p, lr=0.01), "schedule": lambda o: schedules.OneCycleLR(o, 0.1, 8)},
    "restarts": {"schedule": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3)},
    "SequentialLR": {
        "schedule": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], [3])
    },
    "ChainedScheduler": {
        "schedule": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.ExponentialLR(o, 0.9)], o)
    },
    "LambdaBeta": {"schedule": lambda o: LambdaBeta(o, lambda k: 1 / (1 + k))},
    "ef14": {"bias": lambda: EF14(TopK(3)), "workers": 2},
    "ef21": {"bias": lambda: EF21(TopK(3)), "workers": 2},
    "randk": {"bias": lambda: EF14(Compose(Clip(1.0), RandK(3))), "workers": 2},
    "validated": {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 4},
}


def go_on(kind: str, run_dir: Path, iterations: int = 6) -> None:
    """Begin or resume a run of this kind, each time with new parts."""
    options = {"meta_batch": 2, "checkpoint_every": 2, **KINDS[kind]}
    made = learner()
    optimizer = options.pop("optimizer", lambda p: CompositeMomentum(p, lr=0.02, beta=0.3))(made.parameters())
    steps = [options.pop("schedule")(optimizer)] if "schedule" in options else []
    if "bias" in options:
        options["bias"] = options["bias"]()
    train(made, optimizer, TASKS, iterations=iterations, run_dir=run_dir, resume=True, schedulers=steps, **options)


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of 4 steps of each kind."""
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def run(kind: str) -> Path:
        go_on(kind, folder / kind, 4)
        return Path(folder / kind)

    return run


def at(*places: Any, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Put a value at a place in nested containers; a function makes it of the one that is there."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner: Any = state
        for place in places[:-1]:
            inner = inner[place]
        inner[places[-1]] = value(inner[places[-1]]) if callable(value) else value
        return state

    return change


def lost(*places: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Leave out an entry."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner: Any = state
        for place in places[:-1]:
            inner = inner[place]
        del inner[places[-1]]
        return state

    return change


STATE, GROUP, SCHEDULE = ("optimizer", "state"), ("optimizer", "param_groups", 0), ("scheduler0",)
OF_KIND: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("adam", lost(*STATE, 1), "'state' has no entry 1, but after its first step there is exp_avg, exp_avg_sq, step of"),
    (
        "adam",
        at(*STATE, 0, "exp_avg", value=None),
        r"state\[0\]\.exp_avg should be a tensor of shape \(4, 1\); got None",
    ),
    ("adam", at(*STATE, 0, "exp_avg_sq", value=None), r"state\[0\]\.exp_avg_sq should be a tensor of shape \(4, 1\)"),
    ("adam", at(*STATE, 0, "exp_avg_sq", value=torch.neg), r"state\[0\]\.exp_avg_sq holds an entry below zero"),
    ("adam", at(*STATE, 0, "exp_avg", value=lambda x: x * math.inf), r"state\[0\]\.exp_avg is not finite"),
    (
        "adam",
        at(*STATE, 0, "step", value=-1),
        r"state\[0\]\.step should be a whole number >= 4, the steps done; got -1",
    ),
    (
        "adam",
        at(*STATE, 0, "step", value=torch.tensor(4.5)),
        r"state\[0\]\.step should be a whole number >= 4, .*; got 4\.5",
    ),
    ("adam", at(*STATE, 0, "step", value=torch.tensor(0.0)), r"state\[0\]\.step should be .*; got 0\.0"),
    ("adam", at(*GROUP, "amsgrad", value=True), r"param_groups\[0\]\.amsgrad should be False, as .*; got True"),
    ("adam", at(*GROUP, "capturable", value=True), r"param_groups\[0\]\.capturable should be False, .*; got True"),
    (
        "adam",
        at(*GROUP, "foreach", value=torch.zeros(3)),
        r"param_groups\[0\]\.foreach should be None, .*got a tensor of sh",
    ),
    (
        "adam",
        at(*GROUP, "eps", value=2**70),
        r"param_groups\[0\]\.eps should be 1e-08, for no schedule moved it; got 11805",
    ),
    ("adam", at(*GROUP, "weight_decay", value=2**70), r"param_groups\[0\]\.weight_decay should be 0\.0, .*; got 11805"),
    (
        "adam",
        at(*GROUP, "betas", value=(0.5, 0.9)),
        r"param_groups\[0\]\.betas should be \(0\.9, 0\.999\), .*; got a tuple",
    ),
    ("adam", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False, .*; got True"),
    (
        "adamw",
        at(*GROUP, "decoupled_weight_decay", value=False),
        r"decoupled_weight_decay should be True, .*; got False",
    ),
    ("amsgrad", lost(*STATE, 0, "max_exp_avg_sq"), r"state\[0\] has no max_exp_avg_sq"),
    (
        "amsgrad",
        lost(*GROUP, "amsgrad"),
        r"param_groups\[0\]\.amsgrad should be True, as the optimizer is made; got False",
    ),
    ("rmsprop", lost(*STATE, 0, "grad_avg"), r"state\[0\] has no grad_avg"),
    ("rmsprop", lost(*STATE, 0, "momentum_buffer"), r"state\[0\] has no momentum_buffer"),
    ("nadam", lost(*STATE, 1), "'state' has no entry 1, but after its first step there is a state of each parameter"),
    ("nadam", at(*STATE, value={}), "'state' holds nothing, but after its first step there is a state of each"),
    ("adagrad", at(*STATE, 0, "sum", value=None), r"state\[0\]\.sum should be a tensor or a number; got None"),
    ("rprop", at(*STATE, 0, "prev", value=lambda x: x * math.nan), r"state\[0\]\.prev is not finite"),
    ("adafactor", at(*STATE, 0, "step", value=-1), r"state\[0\]\.step should be a whole number >= 4, .*; got -1"),
    ("adafactor", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False, .*; got True"),
    ("sgd", at(*STATE, value={}), "'state' holds nothing, but after its first step there is momentum_buffer of each"),
    ("sgd", lost(*STATE, 1), "'state' has no entry 1, but after its first step there is momentum_buffer of each"),
    (
        "sgd",
        at(*STATE, 1, "momentum_buffer", value=None),
        r"state\[1\]\.momentum_buffer should be a tensor .*; got None",
    ),
    *(
        ("sgd", at(*GROUP, name, value=value), rf"param_groups\[0\]\.{name} should be .*; got {value}")
        for name in ("momentum", "dampening", "weight_decay")
        for value in (-1, 2**70)
    ),
    (
        "sgd",
        at(*GROUP, "lr", value=2**70),
        r"param_groups\[0\]\.lr should be 0\.01, for no schedule moved it; got 11805",
    ),
    ("normalized", lost(*GROUP, "normalize"), r"\.normalize should be True, as the optimizer is made; got False"),
    ("sgd, StepLR", at(*GROUP, "lr", value=2**70), r"param_groups\[0\]\.lr should be a number below 2\^63; got 11805"),
    (
        "sgd, StepLR",
        at(*GROUP, "lr", value=0.25),
        r"param_groups\[0\]\.lr should be 0\.005, which StepLR left; got 0\.25",
    ),
    ("sgd, StepLR", at(*GROUP, "momentum", value=0.9), r"param_groups\[0\]\.momentum should be 0\.0"),
    ("sgd, StepLR", at(*SCHEDULE, "gamma", value=-1), r"scheduler0: its state\.gamma should be 0\.5, as .*; got -1"),
    ("sgd, StepLR", at(*SCHEDULE, "step_size", value=2), r"scheduler0: its state\.step_size should be 3, as .*; got 2"),
    (
        "sgd, StepLR",
        at(*SCHEDULE, "base_lrs", value=[-1]),
        r"its state\.base_lrs should be \[0\.01\], as .*; got a list",
    ),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=-1), r"last_epoch should be a whole number >= 4, .*; got -1"),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=3), r"last_epoch should be a whole number >= 4, .*; got 3"),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=4.5), r"last_epoch should be a whole number >= 4, .*; got 4\.5"),
    ("CyclicLR", at(*GROUP, "dampening", value=0.5), r"param_groups\[0\]\.dampening should be 0\.0"),
    ("CyclicLR", at(*SCHEDULE, "base_momentums", value=[-1]), r"base_momentums should be \[0\.8\]"),
    ("OneCycleLR", at(*SCHEDULE, "total_steps", value=9), r"total_steps should be 8, as the schedule is made; got 9"),
    ("restarts", at(*SCHEDULE, "T_cur", value=-1), r"T_cur should be a number >= 0; got -1"),
    ("restarts", at(*SCHEDULE, "T_i", value=0), r"T_i should be a number >= 3; got 0"),
    ("SequentialLR", at(*SCHEDULE, "_schedulers", 1, "gamma", value=-1), r"_schedulers\[1\]\.gamma should be 0\.9"),
    ("SequentialLR", at(*SCHEDULE, "_milestones", value=[4]), r"_milestones should be \[3\], as .*; got a list"),
    (
        "ChainedScheduler",
        at(*SCHEDULE, "_schedulers", 0, "step_size", value=3),
        r"_schedulers\[0\]\.step_size should be 2",
    ),
    ("LambdaBeta", at(*SCHEDULE, "base_betas", value=[0.9]), r"base_betas should be \[0\.3\], as .*; got a list"),
    (
        "LambdaBeta",
        at(*SCHEDULE, "last_step", value=3),
        r"last_step should be a whole number >= 4, the steps done; got 3",
    ),
    ("LambdaBeta", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False"),
    (
        "ef14",
        lost("bias", "workers", 1),
        r"bias: 'workers' should hold the error of each of 2 workers, 0 to 1; got those of 0$",
    ),
    (
        "ef14",
        at("bias", "workers", value=lambda w: {**w, 2: w[0]}),
        r"of each of 2 workers, 0 to 1; got those of 0, 1, 2",
    ),
    (
        "ef14",
        at("bias", "workers", 0, "error", value=lambda x: x * math.nan),
        r"workers\.0\.error is not finite in all",
    ),
    ("ef21", at("bias", "workers", value={}), "the estimate of each of 2 workers, 0 to 1; got those of none"),
    ("ef21", lost("bias", "workers", 0), "the estimate of each of 2 workers, 0 to 1; got those of 1"),
    ("randk", at("bias", "operator", "1", "calls", value=3), "'calls' should be 4, one for each step; got 3"),
    (
        "validated",
        at("best", value=None),
        r"the best validation as 'best', for metrics\.jsonl has validations before step 4",
    ),
    ("validated", at("best", value=math.nan), "the best validation, or None, as 'best'; got nan"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"), OF_KIND, ids=[f"{number} {row[0]}" for number, row in enumerate(OF_KIND)]
)
def test_checkpoints_that_would_change_the_run(kind, change, message, of_kind, tmp_path):
    """Contents of the right type which no run of these parts can have written."""
    run = Path(shutil.copytree(of_kind(kind), tmp_path / "run"))
    edited(run, change)
    refused(run, message, lambda: go_on(kind, run))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_go_on(kind, of_kind, tmp_path):
    """As without the interruption, bit for bit."""
    run = Path(shutil.copytree(of_kind(kind), tmp_path / "run"))
    go_on(kind, run)
    go_on(kind, tmp_path / "whole")
    for part in newest(tmp_path / "whole").keys() - {"seconds", "rng"}:
        assert_same(newest(run)[part], newest(tmp_path / "whole")[part])


def test_a_validation_that_came_later_has_no_best_yet(run):
    """The checkpoint of a run without one holds ``None``."""
    assert newest(run)["best"] is None
    go(run, resume=True, iterations=5, validation=TASKS, evaluate_tasks=4)
    assert isinstance(newest(run)["best"], float)


def test_frozen_parameters_have_no_state(tmp_path):
    for iterations in (4, 6):
        made = learner()
        next(iter(made.parameters())).requires_grad_(False)
        go(tmp_path, made, iterations=iterations, resume=True)
    assert sorted(newest(tmp_path)["optimizer"]["state"]) == [1, 2, 3]


def test_unused_parameters_have_a_state(tmp_path):
    """Their gradient is zero."""

    class Spare(SinusoidMLP):
        def __init__(self) -> None:
            super().__init__((4,), generator=torch.Generator().manual_seed(0))
            self.spare = nn.Parameter(torch.ones(2))

    for iterations in (4, 6):
        go(tmp_path, MAML(Spare(), F.mse_loss), iterations=iterations, resume=True)
    assert len(newest(tmp_path)["optimizer"]["state"]) == 5


class Halving:
    """A schedule of somebody's, which moves what it likes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["beta"] /= 2
            group["weight_decay"] += 0.01

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_schedules_of_ones_own_may_move_every_number(tmp_path):
    go(tmp_path, schedulers=[Halving])
    go(tmp_path, schedulers=[Halving], iterations=6, resume=True)
    assert newest(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == pytest.approx(0.06)
    path = Checkpoints(tmp_path / "checkpoints").path(6)
    save(path, in_group(normalize=True)(load(path)))
    message = "normalize should be False"
    refused(tmp_path, message, lambda: go(tmp_path, schedulers=[Halving], iterations=8, resume=True))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"workers": [], "operator": {}}, "a dict of workers"),
        ({"workers": {"a": {"error": torch.zeros(13)}}, "operator": {}}, "numbers the workers by whole numbers"),
        ({"workers": {0: {"error": "x"}}, "operator": {}}, r"keeps error \[d\] of worker 0; got 'x'"),
        ({"workers": {0: {"error": torch.zeros(3)}}, "operator": {}}, "should be a tensor of 13 entries; got a tensor"),
        ({"workers": {0: [1]}, "operator": {}}, "keeps error of each worker; got list"),
        ({"workers": {}, "operator": 3}, "a dict of workers and one of its operator"),
        ([], "bias: its state should be a dict"),
        (None, "bias: its state should be a dict"),
    ],
)
def test_states_of_operators_of_the_wrong_type(state, message, tmp_path):
    options: dict[str, Any] = {"bias": EF14(TopK(3)), "workers": 2}
    go(tmp_path, **options)
    edited(tmp_path, with_("bias", state))
    refused(tmp_path, message, lambda: go(tmp_path, resume=True, iterations=6, **{**options, "bias": EF14(TopK(3))}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "step": 3}, None),  # a scheduler's method of that name
        (lambda s: {**s, "last_epoch": "x"}, r"last_epoch should be a number; got 'x'"),
        (lambda s: {k: v for k, v in s.items() if k != "last_epoch"}, "has no last_epoch"),
        (lambda s: {**s, "base_lrs": [0.1, 0.2]}, "base_lrs should be 1 entries"),
        (lambda s: [s], "should be a dict; got a list"),
    ],
)
def test_states_of_schedules_of_the_wrong_type(change, message, tmp_path):
    schedulers = [lambda o: StepLR(o, 3, 0.5)]
    go(tmp_path, schedulers=schedulers)
    edited(tmp_path, lambda state: {**state, "scheduler0": change(state["scheduler0"])})
    message = message or "holds step, which no StepLR saves"
    refused(tmp_path, message, lambda: go(tmp_path, schedulers=schedulers, resume=True, iterations=6))


def test_parts_are_loaded_all_or_none():
    """The second does not fit; the first is as it was, in place."""
    made, other = learner(), learner()
    made_optimizer = Adam(made.parameters(), lr=0.1)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    places = [parameter.data_ptr() for parameter in made.parameters()]
    state = {"learner": other.state_dict(), "optimizer": {"state": {0: {"step": "x"}}, "param_groups": []}}
    with pytest.raises(CheckpointError, match="RUN are of another model or optimizer: optimizer: wanted 1 param"):
        load_parts({"learner": made, "optimizer": made_optimizer}, state, "RUN")
    assert_same(dict(made.state_dict()), before)
    assert [parameter.data_ptr() for parameter in made.parameters()] == places


def test_states_that_fit_are_taken():
    """Of every optimizer of a recipe, and of tensors as step sizes."""
    for name in ("momentum", "sgd", "adam", "rmsprop"):
        recipe = Recipe("sinusoid", optimizer=name)
        made = recipe.learner()
        optimizer = recipe.make_optimizer(made)
        made.backward(TASKS.sample(0, 2))
        optimizer.step()
        again = recipe.make_optimizer(other := recipe.learner())
        load_parts({"o": again, "l": other}, {"o": optimizer.state_dict(), "l": made.state_dict()}, "RUN")
        assert_same(again.state_dict(), optimizer.state_dict())


# bombs


def zipped(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_bombs_are_refused_before_memory_is_taken(run):
    newest_one = Checkpoints(run / "checkpoints").path(4)
    good = newest_one.read_bytes()
    for other in (run / "checkpoints").iterdir():
        if other != newest_one:
            other.unlink()
    with zipfile.ZipFile(newest_one) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    heavy = next(name for name in records if "/data/" in name)

    def lies(name: str, size: int) -> None:
        """The archive's directory says that a record has another size."""
        newest_one.write_bytes(good)
        data = bytearray(good)
        place = data.rindex(name.encode()) - 46
        assert data[place : place + 4] == b"PK\1\2"
        data[place + 20 : place + 28] = 2 * size.to_bytes(4, "little")
        newest_one.write_bytes(data)

    def nested() -> None:
        deep: Any = 0
        for _ in range(150):
            deep = [deep]
        torch.save({"format": 1, "deep": deep}, newest_one)

    def repeated() -> None:
        often: Any = [0]
        for _ in range(64):
            often = [often, often]
        torch.save({"format": 1, "often": often}, newest_one)

    bombs: dict[str, Callable[[], None]] = {
        "compressed": lambda: zipped(newest_one, {**records, heavy: bytes(2**25)}, zipfile.ZIP_DEFLATED),
        "larger than its file": lambda: lies(heavy, 2**31),
        "expanded": lambda: torch.save({"format": 1, "x": torch.zeros(1).expand(2**40)}, newest_one),
        "nested": nested,
        "repeated": repeated,
        "sparse": lambda: torch.save({"format": 1, "x": torch.eye(3).to_sparse()}, newest_one),
        "nowhere": lambda: torch.save({"format": 1, "x": torch.empty(2**50, device="meta")}, newest_one),
        "before it": lambda: newest_one.write_bytes(b"junk" + good),
    }
    for what, make in bombs.items():
        make()
        refused(run, r"step-00000004\.pt is cut short or damaged", lambda: go(run, resume=True, iterations=6))
        with pytest.raises(CheckpointError):
            load(newest_one)
        assert newest_one.exists(), what
    newest_one.unlink()
    os.mkfifo(newest_one)
    with pytest.raises(CheckpointError, match="it is not a file"):
        go(run, resume=True, iterations=6)


def test_a_state_that_would_be_refused_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(CheckpointError, match="could not be read again: it holds a tensor of layout"):
        save(tmp_path / "x.pt", {"x": torch.eye(3).to_sparse()})
    assert not (tmp_path / "x.pt").exists()


def test_lock_without_a_run(tmp_path):
    with RunDirectory(tmp_path, {}) as directory:
        directory.write_config()
    assert read_config(tmp_path)["history"][0]["environment"]["torch"] == torch.__version__


def test_ef21_keeps_a_tensor_of_the_server():
    operator = EF21(TopK(3))
    with pytest.raises(ValueError, match="keeps a tensor as 'received'"):
        operator.load_state_dict({"workers": {}, "operator": {}, "received": 3})


def test_a_file_in_place_of_the_report_is_told_before_the_bias_is_measured(commanded, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("metamom.experiments.bias_report.measure", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["bias", str(commanded), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; the report needs a directory" in capsys.readouterr().err


def test_a_setting_that_an_earlier_record_lacks_is_not_changed_in_silence(commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    config = read_config(run)
    del config["settings"]["aggregate"], config["settings"]["tracking"]
    (run / "config.json").write_text(json.dumps(config))
    command = ["train", "sinusoid", *FLAGS, "--workers", "1", "--iterations", "5", "--run-dir", str(run), "--resume"]
    assert cli.main([*command, "--aggregate", "median"]) == 2
    assert "aggregate is None there and 'median' here" in capsys.readouterr().err
