"""The training loop: what it writes, and that stopping it at any moment changes nothing."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from endings import assert_same, assert_same_ending, contents, newest, without_seconds
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, RMSprop
from torch.optim import lr_scheduler as schedulers

from metamom import (
    MAML,
    Clip,
    CompositeMomentum,
    DivergedError,
    LambdaBeta,
    RandK,
    TaskSampler,
    TopK,
    checkpoints,
    evaluate,
    files,
    train,
)
from metamom.bias import EF14, EF21, EF21SGDM, NonFiniteError, parse
from metamom.cli.app import main
from metamom.nets.models import SinusoidMLP
from metamom.tasks import PerWorker, Sinusoid
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.directory import read_config, read_log, read_metrics
from metamom.training.interrupts import TrainingInterrupted

PATIENCE = 120  # seconds until a process that should have done something has hung
TASKS = Sinusoid(shots=5, queries=5, seed=1)


class Parts(NamedTuple):
    """What one run is made of, besides the arguments in `options`."""

    learner: MAML
    optimizer: torch.optim.Optimizer
    schedulers: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)


def learner(hidden: int = 8, **options: Any) -> MAML:
    return MAML(SinusoidMLP((hidden,), generator=torch.Generator().manual_seed(0)), F.mse_loss, **options)


def momentum(**options: Any) -> Parts:
    made = learner()
    return Parts(made, CompositeMomentum(made.parameters(), **{"lr": 0.02, "beta": 0.3, **options}))


def adam() -> Parts:
    made = learner()
    return Parts(made, Adam(made.parameters(), lr=0.01))


def scheduled() -> Parts:
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.5)
    both = schedulers.StepLR(optimizer, 3, 0.7), LambdaBeta(optimizer, lambda k: 1 / (1 + k))
    return Parts(made, optimizer, both)


def learned_step_sizes() -> Parts:
    made = learner(inner_steps=2, learn_inner_lr=True)
    return Parts(made, CompositeMomentum(made.parameters(), lr=0.02))


def with_dropout() -> Parts:
    state = torch.get_rng_state()
    torch.manual_seed(5)
    made = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)), F.mse_loss)
    torch.set_rng_state(state)
    return Parts(made, CompositeMomentum(made.parameters(), lr=0.02))


def compressed() -> Parts:
    return momentum()._replace(options={"workers": 4, "bias": TopK(ratio=0.2)})


def fed_back(spec: str, beta: float) -> Callable[[], Parts]:
    """With an operator that carries something from step to step."""
    return lambda: momentum(beta=beta)._replace(options={"workers": 4, "bias": parse(spec)})


KINDS: dict[str, Callable[[], Parts]] = {
    "from zero": momentum,
    "from the first gradient": lambda: momentum(first_step="gradient"),
    "Adam": adam,
    "schedulers": scheduled,
    "learned inner lr": learned_step_sizes,
    "dropout": with_dropout,
    "workers and TopK": compressed,
    "RandK": fed_back("randk:20%:seed=3", 0.3),
    "EF14": fed_back("ef14:topk:5%", 0.3),
    "EF21-SGDM": fed_back("ef21-sgdm(0.2):clip:1+randk:50%", 1.0),
}


def go(parts: Parts, run_dir: Path | None = None, *, iterations: int = 12, tasks: Any = TASKS, **options: Any) -> Any:
    options = {"meta_batch": 8, "checkpoint_every": 4, **parts.options, **options}
    if run_dir is None:
        del options["checkpoint_every"]
    return train(
        parts.learner,
        parts.optimizer,
        tasks,
        iterations=iterations,
        schedulers=parts.schedulers,
        run_dir=run_dir,
        **options,
    )


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class AtStep(TaskSampler):
    """A sampler that does something when a step's tasks are asked for."""

    def __init__(self, step: int, action: Callable[[Any], Any]) -> None:
        self.step, self.action = step, action

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        batch = TASKS.sample(step, num_tasks, rank=rank, world_size=world_size)
        return self.action(batch) or batch if step == self.step else batch

    def describe(self) -> dict[str, Any]:
        return TASKS.describe()


class CrashError(Exception):
    """What no code catches."""


def crash(batch: Any) -> None:
    raise CrashError


def interrupt(batch: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Checkpoints hold the state of torch's generator: the same at the start of every test."""
    with global_seed(7):
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a run of 12 steps of a kind."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("whole") / "run"
            with global_seed(7):
                go(KINDS[kind](), path)
            made[kind] = path
        return made[kind]

    return of


# what training does and writes


def test_lowers_the_loss():
    made = learner(40)
    before = evaluate(made, TASKS, tasks=100, steps=(1,)).mean[0]
    go(Parts(made, CompositeMomentum(made.parameters(), lr=0.03, beta=0.1)), iterations=150)
    assert evaluate(made, TASKS, tasks=100, steps=(1,)).mean[0] < 0.9 * before


@pytest.mark.parametrize("aggregate", ["median", "trimmed:0.25", "geomedian"])
def test_a_robust_mean_of_the_workers(aggregate):
    made, other = learner(), learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    for step in range(4):
        optimizer.zero_grad()
        made.backward(TASKS.sample(step, 8), workers=4, bias=Clip(1.0), aggregate=aggregate)
        optimizer.step()
    parts = Parts(other, CompositeMomentum(other.parameters(), lr=0.02, beta=0.3))
    go(parts, iterations=4, workers=4, bias=Clip(1.0), aggregate=aggregate)
    plain = momentum()
    go(plain, iterations=4, workers=4, bias=Clip(1.0))
    for p, q, r in zip(made.parameters(), other.parameters(), plain.learner.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_is_the_loop_written_out(beta):
    parts = momentum(beta=beta)
    result = go(parts, iterations=5, workers=2, bias=TopK(k=9))
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=beta)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss, _ = made.backward(TASKS.sample(step, 8), workers=2, bias=TopK(k=9))
        optimizer.step()
        losses.append(float(loss))
    assert_same(dict(parts.learner.state_dict()), dict(made.state_dict()))
    assert [line["loss"] for line in result.metrics] == losses


def test_metrics_lines(tmp_path):
    parts = compressed()
    result = go(parts, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics == read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(12))
    d = sum(p.numel() for p in parts.learner.parameters())
    for line in lines:
        assert {"step", "loss", "accuracy", "seconds", "world_size", "wire_bytes"} <= line.keys()
        assert line["accuracy"] is None  # a regression
        assert line["world_size"] == 1
        assert line["wire_bytes"] == 4 * 8 * round(0.2 * d)
        assert 0 < line["bias_error"] < 1
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(lines))


def test_configuration_says_how_to_run_it_again(tmp_path):
    go(compressed(), tmp_path)
    config = read_config(tmp_path)
    settings = config["settings"]
    assert settings["bias"] == "topk:20%"
    assert settings["workers"] == 4
    assert settings["meta_batch"] == 8
    assert settings["optimizer"]["groups"][0]["lr"] == 0.02
    assert settings["sampler"] == TASKS.describe()
    assert config["length"]["iterations"] == 12
    assert config["environment"]["torch"] == torch.__version__
    assert {"metamom", "python", "numpy", "platform", "processor", "threads", "gpus"} <= config["environment"].keys()


def test_newest_checkpoints_are_kept(tmp_path):
    go(momentum(), tmp_path, checkpoint_every=2, keep_checkpoints=2)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 12]
    assert not list(tmp_path.rglob("*.tmp"))


def spoil(batch: Any) -> Any:
    return batch._replace(query_y=batch.query_y + 8)


def test_best_checkpoint_is_the_best_by_validation(tmp_path):
    parts = momentum(lr=0.02, beta=1.0)
    result = go(parts, tmp_path, tasks=AtStep(8, spoil), validation=TASKS, evaluate_every=2, evaluate_tasks=20)
    measured = {line["step"] + 1: line["validation"] for line in result.metrics if "validation" in line}
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    best = min(measured, key=measured.__getitem__)
    assert best < 12, "the set-up should spoil the end of the run"
    state = load(Checkpoints(tmp_path / "checkpoints").best)
    assert state["step"] == best
    again = learner()
    again.load_state_dict(state["learner"])
    checked = evaluate(again, TASKS, tasks=20, steps=(1,), stream="validation")
    assert checked.mean[0] == measured[best]
    line = result.metrics[best - 1]
    assert line["validation_halfwidth"] == checked.halfwidth[0]
    assert result.validation is not None
    assert result.validation.mean[0] == measured[12]


def test_a_validation_that_is_no_number_is_not_the_best(tmp_path):
    class FirstIsNaN:
        asked = 0

        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
            self.asked += 1
            batch = TASKS.sample(step, num_tasks, rank=rank, world_size=world_size)
            # so far away that adapted weights overflow, and predictions are inf - inf
            return batch._replace(support_y=batch.support_y * 1e37) if self.asked == 1 else batch

    result = go(momentum(), tmp_path, validation=FirstIsNaN(), evaluate_every=6, evaluate_tasks=20)
    assert [math.isnan(line["validation"]) for line in result.metrics if "validation" in line] == [True, False]
    assert load(Checkpoints(tmp_path / "checkpoints").best)["step"] == 12


@pytest.mark.parametrize("kind", ["from zero", "dropout"])
def test_validation_does_not_change_the_training(kind):
    runs = []
    for options in ({}, {"validation": TASKS, "evaluate_every": 3, "evaluate_tasks": 10}):
        parts = KINDS[kind]()
        with global_seed(7):
            go(parts, **options)
        runs.append({**parts.learner.state_dict()})
    assert_same(*runs)


def test_global_generators_are_untouched(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    parts = momentum()
    go(parts, tmp_path, validation=TASKS, evaluate_tasks=10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    go(momentum(), iterations=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nothing_is_shown_where_there_is_no_terminal(capsys, tmp_path):
    go(momentum(), tmp_path, validation=TASKS, evaluate_tasks=10)
    assert capsys.readouterr() == ("", "")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    go(momentum(), tmp_path, iterations=4, tensorboard=True)
    files_written = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files_written) == 1
    assert b"grad_norm" in files_written[0].read_bytes()


# interrupted and resumed


@pytest.mark.parametrize("action", [interrupt, crash])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_ends_as_an_uninterrupted_one(kind, action, uninterrupted, tmp_path):
    with pytest.raises((TrainingInterrupted, CrashError)):
        go(KINDS[kind](), tmp_path / "run", tasks=AtStep(6, action))
    done = 7 if action is interrupt else 4
    assert newest(tmp_path / "run")["step"] == done
    with global_seed(99):
        result = go(KINDS[kind](), tmp_path / "run", resume=True)
    assert result.resumed_from == done
    assert len(result.metrics) == 12 - done
    assert_same_ending(tmp_path / "run", uninterrupted(kind))


def test_interruption_says_what_was_kept(tmp_path, capfd):
    with pytest.raises(TrainingInterrupted, match=r"stopped after step 3 of 12; saved in .*run; resume") as caught:
        go(momentum(), tmp_path / "run", tasks=AtStep(2, interrupt))
    assert "the step at hand is finished first; interrupt again to stop at once" in capfd.readouterr().err
    assert caught.value.signal_number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        go(momentum(), tasks=AtStep(2, interrupt))


def test_interrupted_again_and_again(uninterrupted, tmp_path):
    for step in (0, 1, 5, 9):
        with pytest.raises(TrainingInterrupted):
            go(scheduled(), tmp_path, tasks=AtStep(step, interrupt), resume=True)
    go(scheduled(), tmp_path, resume=True)
    assert_same_ending(tmp_path, uninterrupted("schedulers"))


def test_more_iterations_on_resume(uninterrupted, tmp_path):
    go(momentum(), tmp_path, iterations=6)
    assert go(momentum(), tmp_path, resume=True).resumed_from == 6
    assert_same_ending(tmp_path, uninterrupted("from zero"))
    assert read_config(tmp_path)["length"]["iterations"] == 12
    result = go(momentum(), tmp_path, resume=True)  # nothing left to do
    assert (result.metrics, result.validation, result.resumed_from) == ([], None, 12)
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_resume_on_an_empty_directory_starts_afresh(uninterrupted, tmp_path):
    (tmp_path / "run").mkdir()
    assert go(momentum(), tmp_path / "run", resume=True).resumed_from == 0
    assert_same_ending(tmp_path / "run", uninterrupted("from zero"))


@pytest.mark.parametrize("kind", ["RandK", "EF14", "EF21-SGDM"])
def test_what_operators_carry_is_part_of_a_run(kind, uninterrupted, tmp_path):
    """In every checkpoint, and refused without it; a fresh run begins without what an old one left."""
    parts = KINDS[kind]()
    go(parts, tmp_path / "one")
    assert_same_ending(tmp_path / "one", uninterrupted(kind))
    operator = parts.options["bias"]
    assert_same(newest(tmp_path / "one")["bias"], operator.state_dict())
    assert operator.state_dict() != KINDS[kind]().options["bias"].state_dict()
    used = KINDS[kind]()
    go(used._replace(options={**used.options, "bias": operator}), tmp_path / "again")  # the same object once more
    assert_same_ending(tmp_path / "again", uninterrupted(kind))
    go(KINDS[kind](), tmp_path / "forgetful", iterations=8)
    path = Checkpoints(tmp_path / "forgetful" / "checkpoints").path(8)
    state = load(path)
    fresh = KINDS[kind]().options["bias"].state_dict()
    assert state["bias"] != fresh
    save(path, {**state, "bias": fresh})
    with pytest.raises(CheckpointError, match=r"bias: '(calls|workers)' should "):
        go(KINDS[kind](), tmp_path / "forgetful", resume=True)


def test_operators_that_carry_nothing_are_not_saved(uninterrupted):
    assert "bias" not in newest(uninterrupted("workers and TopK"))


def test_state_of_another_operator(tmp_path):
    """Under settings of one's own, which tell no operators apart."""
    one, other = (momentum()._replace(options={"settings": {"name": "mine"}, "bias": b}) for b in (None, EF14(TopK(3))))
    go(one, tmp_path / "none", iterations=4)
    with pytest.raises(CheckpointError, match="there is no bias in"):
        go(other, tmp_path / "none", resume=True)
    go(other, tmp_path / "ef14", iterations=4)
    with pytest.raises(CheckpointError, match="ef21:topk:3 keeps estimate of each worker; got error"):
        go(one._replace(options={**one.options, "bias": EF21(TopK(3))}), tmp_path / "ef14", resume=True)


def test_best_so_far_is_remembered(tmp_path):
    options = {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 20}
    parts = momentum(lr=0.02, beta=1.0)
    go(parts, tmp_path, iterations=8, **options)
    best = load(Checkpoints(tmp_path / "checkpoints").best)
    go(momentum(lr=0.02, beta=1.0), tmp_path, tasks=AtStep(8, spoil), resume=True, **options)
    assert_same(load(Checkpoints(tmp_path / "checkpoints").best), best)


def test_crash_between_the_best_and_the_newest_checkpoint(tmp_path, monkeypatch):
    options = {
        "validation": TASKS,
        "evaluate_every": 4,
        "evaluate_tasks": 20,
        "tasks": AtStep(4, spoil),
        "iterations": 8,
    }
    real, writes = checkpoints.save, itertools.count()

    def dying(path: Path, state: dict[str, Any]) -> None:
        if state["step"] == 4 and next(writes) == 1:
            raise CrashError
        real(path, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", dying)
        with pytest.raises(CrashError):
            go(momentum(beta=1.0), tmp_path, **options)
    go(momentum(beta=1.0), tmp_path, resume=True, **options)
    measured = {line["step"] + 1: line["validation"] for line in read_metrics(tmp_path) if "validation" in line}
    assert min(measured, key=measured.__getitem__) == 4, "the set-up should spoil the rest of the run"
    assert load(Checkpoints(tmp_path / "checkpoints").best)["step"] == 4


def test_last_metrics_line_cut_short(uninterrupted, tmp_path):
    go(momentum(), tmp_path, iterations=8)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for kept in (1, 30, len(whole) // 8 - 3):
        (tmp_path / "metrics.jsonl").write_bytes(whole + whole[:kept])
        go(momentum(), tmp_path, iterations=8, resume=True)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-1])  # only the end of the line is missing
    go(momentum(), tmp_path, resume=True)
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_a_hole_in_the_metrics_is_told_and_what_can_be_read_is_kept(uninterrupted, tmp_path):
    go(momentum(), tmp_path, iterations=8)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\0\xff\n", lines[3], b"[" * 5000 + b"\n", *lines[5:]]))
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 is no JSON object with a step"):
        read_metrics(tmp_path)
    with pytest.warns(UserWarning, match="metrics") as told:
        go(momentum(), tmp_path, resume=True)
    assert [re.sub(r".*metrics\.jsonl ", "", str(each.message)) for each in told] == [
        "was damaged in line 3, 5: all that can be read is kept, and a copy of the damaged file is "
        "metrics.jsonl.damaged.",
        "has no metrics of step 2, 4.",
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    whole = without_seconds(read_metrics(uninterrupted("from zero")))
    assert without_seconds(read_metrics(tmp_path)) == [line for line in whole if line["step"] not in (2, 4)]
    assert_same(newest(tmp_path)["learner"], newest(uninterrupted("from zero"))["learner"])


def test_metrics_lost_at_the_end_are_told(tmp_path):
    """Those of steps that a checkpoint is behind, so that they are not done again."""
    go(momentum(), tmp_path, iterations=8)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:3]) + lines[3][:10]
    (tmp_path / "metrics.jsonl").write_bytes(cut)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl") as told:
        go(momentum(), tmp_path, resume=True)
    assert [re.sub(r".*metrics\.jsonl ", "", str(each.message)) for each in told] == [
        "was cut short in line 4, of a step that will not be done again: a copy of the file as it was is "
        "metrics.jsonl.damaged.",
        "has no metrics of step 3 to 7.",
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == cut
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 8, 9, 10, 11]


def test_a_line_cut_short_beyond_the_end_is_kept(tmp_path):
    """The run goes back to step 4 and ends before the step that the line is of."""
    go(momentum(), tmp_path, iterations=8)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:6]) + lines[6][:10]
    (tmp_path / "metrics.jsonl").write_bytes(cut)
    Checkpoints(tmp_path / "checkpoints").path(8).unlink()
    with pytest.warns(UserWarning, match=r"was cut short in line 7, .*metrics\.jsonl\.damaged\.$"):
        go(momentum(), tmp_path, iterations=6, resume=True)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == cut
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_metrics_file_that_is_missing_or_empty_is_told(tmp_path):
    go(momentum(), tmp_path, iterations=8)
    path = tmp_path / "metrics.jsonl"
    path.unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has no metrics of step 0 to 7\.$"):
        go(momentum(), tmp_path, iterations=10, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [8, 9]
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has no metrics of step 0 to 9\.$"):
        go(momentum(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([0, 1, 2, 93, 4], [0, 1, 2, 4]),
        ([0, 1, 2, 1, 4], [0, 1, 2, 4]),
        ([0, 1, 2, 2, 3], [0, 1, 2, 3]),
        ([3, 0, 1, 2], [0, 1, 2]),
        ([], []),
    ],
)
def test_metrics_out_of_order_are_damaged(steps, kept, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    log = read_log(tmp_path)
    assert [line["step"] for line in log.lines] == kept
    assert len(log.damaged) == len(steps) - len(kept)


# damaged checkpoints


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A run stopped after 8 of its steps, with checkpoints after 0, 4 and 8; its path has "format" in it."""
    path = tmp_path_factory.mktemp("another-format") / "run"
    with global_seed(7):
        go(momentum(), path, iterations=8)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_resume_behind_a_checkpoint_cut_short(kept, started, uninterrupted, tmp_path):
    run = tmp_path / "another-format"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data))])
    with pytest.warns(UserWarning, match=r"step-00000008\.pt is cut short or damaged .* Going back to the one before"):
        result = go(momentum(), run, resume=True)
    assert result.resumed_from == 4
    assert_same_ending(run, uninterrupted("from zero"))


def test_resume_behind_a_checkpoint_with_a_flipped_bit(started, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    data = bytearray(checkpoint.read_bytes())
    weight = load(checkpoint)["learner"]["model.0.weight"].numpy().tobytes()
    data[data.index(weight) + 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.warns(UserWarning, match="wrong checksum"):
        assert go(momentum(), run, resume=True).resumed_from == 4
    assert_same_ending(run, uninterrupted("from zero"))


def test_no_damage_goes_unnoticed(started, tmp_path):
    """A cut is always seen; a flipped bit is either seen or in a place that carries nothing."""
    data = (started / "checkpoints" / "step-00000004.pt").read_bytes()
    whole = load(started / "checkpoints" / "step-00000004.pt")
    damaged = tmp_path / "damaged.pt"
    for kept in range(0, len(data), 173):
        damaged.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=r"damaged\.pt is cut short or damaged"):
            load(damaged)
    seen = 0
    draw = random.Random(0)
    for place in draw.sample(range(len(data)), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        try:
            state = load(damaged)
        except CheckpointError:
            seen += 1
        else:
            assert_same(state, whole)
    assert seen > 100


def test_all_checkpoints_damaged(started, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    before = contents(run)
    with (
        pytest.warns(UserWarning, match="Going back"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints can be used: .*start a new run"),
    ):
        go(momentum(), run, resume=True)
    assert contents(run) == before


def test_checkpoint_of_another_format(started, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    torch.save({**load(checkpoint), "format": 99}, checkpoint)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"step-00000008\.pt has format 99; this version of metamom reads format"):
        go(momentum(), run, resume=True)
    assert contents(run) == before  # config.json, which names the version that wrote it, among them
    torch.save([1, 2], checkpoint)
    with pytest.raises(CheckpointError, match="has format None"):
        load(checkpoint)


def test_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*none\.pt"):
        load(tmp_path / "none.pt")


def test_damaged_later_checkpoints_do_not_displace_the_good_one(tmp_path):
    for keep, step in ((3, 4), (3, 8), (3, 12), (1, 5)):
        Checkpoints(tmp_path, keep).save(step, {})
    assert Checkpoints(tmp_path).steps() == [5, 8, 12]


@pytest.mark.parametrize("number", [np.float64(0.02), np.float32(0.02)])
def test_numbers_of_numpy_can_be_resumed(number, tmp_path):
    """``lr`` from ``np.linspace``: such numbers in a checkpoint could not be read without running code."""
    settings = {"lr": float(number)}
    go(momentum(lr=number), tmp_path, iterations=4, settings=settings)
    go(momentum(lr=number), tmp_path, settings=settings, resume=True)
    whole = momentum(lr=number)
    go(whole)
    assert_same(newest(tmp_path)["learner"], whole.learner.state_dict())


def test_a_state_that_could_not_be_read_again_is_refused_at_the_start(tmp_path):
    class Odd(schedulers.StepLR):
        def state_dict(self):
            return {**super().state_dict(), "folder": Path("x")}

    parts = momentum()
    parts = parts._replace(schedulers=(Odd(parts.optimizer, 3),))
    with pytest.raises(CheckpointError, match=r"Unsupported .*[pP]ath.* Keep it out of the state_dict"):
        go(parts, tmp_path)
    assert not read_metrics(tmp_path)


LR_SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 12),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda k: 1 / (1 + k)),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_schedulers_of_torch_can_be_resumed(name, tmp_path):
    def parts() -> Parts:
        made = momentum()
        return made._replace(schedulers=(LR_SCHEDULERS[name](made.optimizer),))

    go(parts(), tmp_path / "whole")
    with pytest.raises(CrashError):
        go(parts(), tmp_path / "run", tasks=AtStep(6, crash))
    go(parts(), tmp_path / "run", resume=True)
    assert_same_ending(tmp_path / "run", tmp_path / "whole")


# whose directory it is


def test_directory_with_a_run_is_refused_and_left_alone(started):
    before = contents(started)
    with pytest.raises(ValueError, match=r"holds a run already .*resume it \(--resume, or resume=True\)"):
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


def test_checkpoint_of_another_model(tmp_path):
    go(momentum(), tmp_path, iterations=4, settings={"name": "mine"})
    before = contents(tmp_path / "checkpoints")
    made = learner(9)
    with pytest.raises(CheckpointError, match=r"are of another model or optimizer: .*size mismatch"):
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
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "holding"  # or the process has died, and the pipe is at its end
        before = contents(tmp_path)
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing to the run directory"):
                go(momentum(), tmp_path, resume=resume)
        assert contents(tmp_path) == before
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert go(momentum(), tmp_path, iterations=2).resumed_from == 0


# divergence


@pytest.mark.parametrize(
    ("action", "what"),
    [
        (lambda batch: batch._replace(query_y=batch.query_y + 1e30), "the loss"),
        (lambda batch: batch._replace(support_y=batch.support_y * 1e37), "the loss"),
    ],
)
def test_loss_that_is_not_finite(action, what, tmp_path):
    with pytest.raises(DivergedError, match=rf"{what} is not finite at step 6\. Try a smaller lr, .*Clip") as caught:
        go(momentum(), tmp_path, tasks=AtStep(6, action))
    assert caught.value.step == 6
    state = newest(tmp_path)
    assert state["step"] == 4
    assert all(w.isfinite().all() for w in state["learner"].values())
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(6))
    assert go(momentum(), tmp_path, resume=True).resumed_from == 4  # with better tasks


def test_gradient_that_is_not_finite():
    """The loss, sqrt at 0, is finite and its slope is not."""
    made = MAML(
        SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)),
        lambda predictions, y: (predictions * 0).abs().sqrt().sum(),
        estimator="first-order",
    )
    with pytest.raises(DivergedError, match="is not finite at step 0"):
        go(Parts(made, SGD(made.parameters(), lr=0.1)))


@pytest.mark.parametrize("bias", [TopK(3), RandK(3), EF21(TopK(3)), lambda g: g])
def test_gradient_that_an_operator_refuses(bias):
    """The step is named, and why."""
    made = MAML(
        SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)),
        lambda predictions, y: (predictions * 0).abs().sqrt().sum(),
        estimator="first-order",
    )
    with pytest.raises(DivergedError, match="a worker's gradient is not finite at step 0") as caught:
        go(Parts(made, SGD(made.parameters(), lr=0.1)), workers=2, bias=bias)
    assert caught.value.step == 0
    assert isinstance(caught.value.__cause__, NonFiniteError)


def test_step_size_that_diverges(tmp_path):
    with pytest.raises(DivergedError) as caught:
        go(momentum(lr=1e12), tmp_path)
    assert 0 < caught.value.step < 12
    assert all(w.isfinite().all() for w in newest(tmp_path)["learner"].values())


def test_weight_that_is_not_finite_is_never_saved(tmp_path):
    class Overflowing(SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data[0] = math.inf

    made = learner()
    with pytest.raises(DivergedError, match="a weight is not finite"):
        go(Parts(made, Overflowing(made.parameters(), lr=0.01)), tmp_path, checkpoint_every=1)
    assert newest(tmp_path)["step"] == 0
    assert all(w.isfinite().all() for w in newest(tmp_path)["learner"].values())


# arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1; got 0"),
        ({"meta_batch": 0}, "meta_batch must be >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1"),
        ({"keep_checkpoints": 0}, "newest checkpoint must be kept"),
        ({"evaluate_every": 0}, "evaluate_every must be >= 1"),
        ({"evaluate_tasks": 1}, "at least 2 tasks"),
        ({"workers": 3}, "must divide the meta-batch of 8 tasks; got 3"),
        ({"workers": 0}, "must divide the meta-batch"),
        ({"bias": TopK(k=10**6)}, "the number of parameters"),
        ({"bias": TopK(k=2, per_tensor=True)}, r"1 <= k <= 1 "),
        ({"bias": EF21(TopK(k=10**6))}, "the number of parameters"),
        ({"aggregate": "mode"}, "aggregate must be mean, median, geomedian or trimmed:SHARE"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(momentum(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "has"),
    [
        (lambda p: CompositeMomentum(p, lr=0.02, beta=0.3), r"CompositeMomentum with \{'beta': 0\.3\}"),
        (lambda p: SGD(p, lr=0.02, momentum=0.9), r"SGD with \{'momentum': 0\.9\}"),
        (lambda p: RMSprop(p, lr=0.02, momentum=0.5), "RMSprop with"),
        (lambda p: Adam(p, lr=0.02), "Adam with .*betas"),
        (
            lambda p: CompositeMomentum([{"params": [q], "beta": b} for q, b in zip(p, (1, 1, 1, 0.5))], lr=1),  # noqa: B905
            r"with \{'beta': 0\.5\}",
        ),
    ],
)
def test_momentum_is_on_the_workers_or_on_the_server(make, has, tmp_path):
    made = learner()
    with pytest.raises(ValueError, match=rf"ef21-sgdm\(0\.1\):topk:3 carries the momentum .*\(beta=1\).*{has}"):
        go(Parts(made, make(made.parameters())), tmp_path / "run", workers=2, bias=EF21SGDM(TopK(3)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [lambda p: CompositeMomentum(p, lr=0.02, beta=1), lambda p: SGD(p, lr=0.02)])
def test_workers_momentum_with_a_server_that_has_none(make):
    made = learner()
    assert len(go(Parts(made, make(made.parameters())), iterations=2, workers=2, bias=EF21SGDM(TopK(3))).metrics) == 2
    with_both = learner()  # others leave the server's momentum to the user
    go(Parts(with_both, Adam(with_both.parameters())), iterations=1, workers=2, bias=EF21(TopK(3)))


@pytest.mark.parametrize("option", ["resume", "tensorboard"])
def test_what_needs_a_directory(option):
    with pytest.raises(ValueError, match="need a run_dir"):
        go(momentum(), **{option: True})


# writing files


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


LIMITED = """
    import resource, runpy, sys
    from pathlib import Path
    write = runpy.run_path(sys.argv[1])["write_atomically"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write(Path(sys.argv[2]), b"x" * 5000)
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_write_beyond_what_the_system_allows_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), files.__file__, str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert int(done.stdout) in (errno.EFBIG, errno.ENOSPC)
    assert contents(tmp_path) == {"file": b"old"}


def test_write_to_a_folder_that_is_read_only(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(PermissionError):
            files.write_atomically(path, b"new")
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == {"file": b"old"}


def test_disk_full_during_a_run(tmp_path, monkeypatch, uninterrupted):
    real, calls = os.fsync, itertools.count()

    def full(handle: int) -> None:
        if next(calls) >= 5:  # the configuration, and the checkpoint of the start, take two each
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            go(momentum(), tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    go(momentum(), tmp_path, resume=True)
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_checkpoint_is_whole_or_not_there(tmp_path):
    save(tmp_path / "a.pt", {"step": 1, "x": torch.arange(3)})
    assert_same(load(tmp_path / "a.pt"), {"format": 1, "step": 1, "x": torch.arange(3)})


# real processes, real signals


FLAGS = ["--meta-batch", "4", "--shots", "5", "--checkpoint-every", "5", "--evaluate-tasks", "4", "--bias", "topk:10%"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_to_a_real_process(number, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "metamom", "train", "sinusoid", "--iterations", "1000000"),
            *("--run-dir", str(run), *FLAGS),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    try:
        until = time.monotonic() + PATIENCE
        while process.poll() is None and time.monotonic() < until:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") > 12:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait(timeout=PATIENCE)
    done = newest(run)["step"]
    logged = len(read_metrics(run))
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert done % 5 == 0
        assert logged >= done
    else:
        assert process.returncode == 128 + number
        assert f"metamom: stopped after step {done} of 1000000; saved in {run}; resume to go on." in said
        assert "Traceback" not in said
        assert logged == done
    total = str(logged + 7)
    torch.set_rng_state(newest(run)["rng"]["cpu"])  # that process's generator, from which nothing was drawn
    assert main(["train", "sinusoid", "--iterations", total, "--run-dir", str(run), *FLAGS, "--resume"]) == 0
    assert main(["train", "sinusoid", "--iterations", total, "--run-dir", str(whole), *FLAGS]) == 0
    assert f"trained for {total} iterations" in capsys.readouterr().out
    assert_same_ending(run, whole)


def test_a_family_for_each_worker_wants_as_many_workers():
    families = PerWorker([Sinusoid(amplitude=(0.1, 1.0)), Sinusoid(amplitude=(4.0, 5.0))])
    learner = MAML(SinusoidMLP((4,)), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="for each of 2 workers: pass workers=2; got 4"):
        train(learner, optimizer, families, iterations=1, meta_batch=8, workers=4)
    train(learner, optimizer, families, iterations=1, meta_batch=8, workers=2)
