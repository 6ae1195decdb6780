"""Stopping a run at any moment and resuming it changes nothing."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endings import assert_same, assert_same_ending, newest
from torch.optim import lr_scheduler as schedulers
from training_runs import KINDS, TASKS, AtStep, CrashError, Parts, crash, global_seed, go, momentum, scheduled, spoil

from metamom import (
    TopK,
    checkpoints,
)
from metamom.bias import EF14, EF21
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.directory import read_config, read_metrics
from metamom.training.interrupts import TrainingInterrupted

pytestmark = pytest.mark.usefixtures("global_state")


def interrupt(batch: Any) -> None:
    signal.raise_signal(signal.SIGINT)


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
    assert "finishing the current step first; interrupt again to stop at once" in capfd.readouterr().err
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
