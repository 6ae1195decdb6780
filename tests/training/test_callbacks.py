"""Callbacks: when they are called, how they stop a run, and what is saved of them."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch
from endings import assert_same_ending, newest
from forked import run_forked
from recording import WATCHED, Recorder, fail, never_better, outcome, stopping_at, watched
from training_runs import TASKS, AtStep, go, momentum

from metamom import DivergedError, cli, evaluate
from metamom.training import Callback, EarlyStopping, RunState, TensorBoard
from metamom.training.checkpoints import CheckpointError
from metamom.training.directory import read_config, read_metrics
from metamom.training.interrupts import TrainingInterrupted

pytestmark = pytest.mark.usefixtures("global_state")
VALIDATED = {"validation": TASKS, "evaluate_every": 4, "evaluate_tasks": 4}


def test_every_call(tmp_path):
    recorder = Recorder()
    result = go(momentum(), tmp_path, callbacks=recorder, **VALIDATED)
    assert recorder.names() == "s....v....v....ve"
    assert recorder.calls[0] == ("start", 0)
    assert recorder.calls[-1] == ("end", 12, "finished")
    steps = [call for call in recorder.calls if call[0] == "step"]
    assert steps == [("step", line["step"] + 1, line["step"], line["loss"]) for line in result.metrics]
    checks = [call[1:] for call in recorder.calls if call[0] == "validation"]
    assert checks == [(line["step"] + 1, line["validation"]) for line in result.metrics if "validation" in line]
    assert result.stopped is None


def test_what_a_callback_sees(tmp_path):
    seen: list[RunState] = []
    parts = momentum()
    go(parts, tmp_path, iterations=4, callbacks=[Recorder(step=seen.append, validation=seen.append)], **VALIDATED)
    state = seen[-1]
    assert (state.learner, state.optimizer, state.iterations) == (parts.learner, parts.optimizer, 4)
    assert state.run_dir == tmp_path
    assert state.settings["meta_batch"] == 8
    assert json.loads(json.dumps(state.settings)) == read_config(tmp_path)["settings"]
    assert dict(state.metrics) == read_metrics(tmp_path)[-1]
    assert state.validation is not None
    assert seen[0].validation is None
    with pytest.raises(AttributeError):
        state.step = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        state.metrics["loss"] = 0.0  # type: ignore[index]


class Watcher:
    """Has some of a callback's methods, and is none."""

    def __init__(self, at: int = 3) -> None:
        self.at, self.seen, self.loaded = at, 0, 0

    def on_step(self, state: RunState) -> None:
        self.seen += 1
        if state.step == self.at:
            state.stop("enough")

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded = state["seen"]


def test_objects_with_some_of_the_methods(tmp_path):
    alone, listed = Watcher(), Watcher(5)
    assert go(momentum(), tmp_path, callbacks=alone).stopped == "enough"
    assert alone.seen == 3
    assert go(momentum(), tmp_path, callbacks=[listed, Recorder()], resume=True).stopped == "enough"
    assert (listed.loaded, listed.seen) == (3, 2)
    assert newest(tmp_path)["callbacks"]["Watcher"] == {"seen": 2}


def test_no_callbacks_at_all(tmp_path):
    assert go(momentum(), tmp_path, iterations=2, callbacks=None).stopped is None
    assert "callbacks" not in newest(tmp_path)


def test_callbacks_change_nothing(uninterrupted, tmp_path):
    go(momentum(), tmp_path, callbacks=[Recorder(), TensorBoard()])
    whole = uninterrupted("from zero")
    assert "callbacks" not in newest(whole)
    state = newest(tmp_path)
    assert state.pop("callbacks") == {"Recorder": {"steps": 12}}
    for name, weight in newest(whole)["learner"].items():
        assert torch.equal(state["learner"][name], weight), name


def test_stopped_after_a_step(tmp_path):
    recorder = stopping_at(6)
    result = go(momentum(), tmp_path, callbacks=recorder)
    assert (len(result.metrics), result.stopped) == (6, "enough")
    assert recorder.calls[-1] == ("end", 6, "stopped")
    assert newest(tmp_path)["step"] == 6


def test_a_stopped_run_goes_on_as_if_it_had_not_been(uninterrupted, tmp_path):
    go(momentum(), tmp_path, callbacks=stopping_at(6))
    result = go(momentum(), tmp_path, resume=True)
    assert (result.resumed_from, len(result.metrics), result.stopped) == (6, 6, None)
    state = newest(tmp_path)
    assert "callbacks" not in state
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_stopped_before_the_first_step(tmp_path):
    recorder = Recorder(start=lambda state: state.stop("not today"))
    result = go(momentum(), tmp_path, callbacks=[recorder])
    assert (result.metrics, result.stopped) == ([], "not today")
    assert recorder.names() == "se"


def test_the_first_reason_counts():
    both = [Recorder(step=lambda state, name=name: state.stop(f"{name} at {state.step}")) for name in "ab"]
    assert go(momentum(), callbacks=both).stopped == "a at 1"


@pytest.mark.parametrize("reason", [None, "", 3])
def test_a_reason_is_a_text(reason):
    with pytest.raises(TypeError, match="stop takes the reason, a text; got"):
        go(momentum(), callbacks=[Recorder(step=lambda state: state.stop(reason))])


def test_an_error_in_a_callback(tmp_path):
    first, second, third = Recorder(), Recorder(step=fail), Recorder()
    with pytest.raises(LookupError, match="no callback after step 1"):
        go(momentum(), tmp_path, callbacks=[first, second, third])
    for each in (first, second, third):
        assert each.calls[-1] == ("end", 1, "failed")
    assert go(momentum(), tmp_path, resume=True).resumed_from == 0


def test_an_error_at_the_start():
    first, second, third = Recorder(), Recorder(start=fail), Recorder()
    with pytest.raises(LookupError):
        go(momentum(), callbacks=[first, second, third])
    assert first.calls[-1] == ("end", 0, "failed")
    assert (second.names(), third.names()) == ("s", "")


def test_an_error_at_the_end(tmp_path):
    first, second = Recorder(), Recorder(end=fail)
    with pytest.raises(LookupError, match="no callback after step 12"):
        go(momentum(), tmp_path, callbacks=[first, second])
    assert first.calls[-1] == ("end", 12, "failed")
    assert newest(tmp_path)["step"] == 12


def test_interrupted_and_diverged(tmp_path):
    recorder = Recorder()
    with pytest.raises(TrainingInterrupted):
        go(momentum(), callbacks=recorder, tasks=AtStep(2, lambda batch: signal.raise_signal(signal.SIGINT)))
    assert recorder.calls[-1] == ("end", 3, "interrupted")
    with pytest.raises(DivergedError):
        go(momentum(lr=1e30), callbacks=recorder)
    assert recorder.calls[-1][2] == "failed"


def test_states_are_saved_and_loaded(tmp_path):
    interrupt = AtStep(5, lambda batch: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        go(momentum(), tmp_path, callbacks=[Recorder(), Callback(), Recorder()], tasks=interrupt)
    assert newest(tmp_path)["callbacks"] == {"Recorder": {"steps": 6}, "Recorder-2": {"steps": 6}}
    fresh = Recorder(), Recorder(), Recorder()
    go(momentum(), tmp_path, callbacks=fresh, resume=True)
    assert [each.steps for each in fresh] == [12, 12, 6]


def test_a_callback_from_halfway_on(tmp_path):
    """A checkpoint of a run without callbacks, as of earlier versions."""
    go(momentum(), tmp_path, iterations=4)
    recorder = Recorder()
    go(momentum(), tmp_path, callbacks=recorder, resume=True)
    assert recorder.calls[0] == ("start", 4)
    assert recorder.steps == 8


def test_a_state_that_is_code(tmp_path):
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": RunState}

    with pytest.raises(CheckpointError, match="holds something other than tensors"):
        go(momentum(), tmp_path, callbacks=Odd())


@pytest.mark.parametrize(
    "state", [{}, {"best": 1.0}, {"best": "x", "waited": 0}, {"best": 1.0, "waited": -1}, {"best": 1.0, "waited": 0.5}]
)
def test_a_state_that_does_not_fit(state, tmp_path, monkeypatch):
    monkeypatch.setattr(EarlyStopping, "state_dict", lambda self: {"odd": 1, **state})
    go(momentum(), tmp_path, iterations=4, callbacks=EarlyStopping(3), **VALIDATED)
    monkeypatch.undo()
    parts = momentum()
    before = {name: weight.clone() for name, weight in parts.learner.state_dict().items()}
    with pytest.raises(CheckpointError, match="callbacks"):
        go(parts, tmp_path, callbacks=EarlyStopping(3), resume=True, **VALIDATED)
    assert all(torch.equal(before[name], weight) for name, weight in parts.learner.state_dict().items())


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (EarlyStopping, "callbacks are one or a list of .*; got <class"),
        ([EarlyStopping], "got the class EarlyStopping itself"),
        ([print], "got a builtin_function_or_method"),
        (3, "or objects with a method on_start, on_step, on_validation or on_end; got 3"),
        ([momentum()], "or objects with a method .*; got a Parts"),
        (torch.nn.Linear(1, 1), r"got Linear\("),  # which has a state, but no events
    ],
)
def test_no_callbacks(callbacks, message):
    with pytest.raises(TypeError, match=message):
        go(momentum(), callbacks=callbacks)


# early stopping


def stopped_by(values: list[float], metric: str, **options: Any) -> list[bool]:
    """Whether a validation with each of these means has stopped the run."""
    stopping, found = EarlyStopping(**options), []
    evaluation = evaluate(momentum().learner, TASKS, tasks=2, steps=(1,))
    for step, value in enumerate(values):
        reasons: list[str] = []
        stopping.on_validation(
            RunState(
                learner=None, optimizer=None, run_dir=None, settings={}, iterations=9, step=step, metrics={},  # type: ignore[arg-type]
                validation=evaluation._replace(mean=(value,), metric=metric), _stop=reasons.append,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        found.append(bool(reasons))
    return found


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "metric", "options", "stops"),
    [
        ([3, 2, 2, 2], "loss", {"patience": 2}, [0, 0, 0, 1]),
        ([3, 4, 2, 3, 3], "loss", {"patience": 2}, [0, 0, 0, 0, 1]),
        ([3, 2.5, 2.1, 1.9], "loss", {"patience": 2, "min_delta": 1.0}, [0, 0, 1, 0]),
        ([0.1, 0.2, 0.2], "accuracy", {"patience": 1}, [0, 0, 1]),
        ([0.2, 0.25, 0.25], "accuracy", {"patience": 2, "min_delta": 0.1}, [0, 0, 1]),
        ([NAN, NAN, 1, NAN, 0.5], "loss", {"patience": 3}, [0, 0, 0, 0, 0]),
        ([1, NAN, NAN], "loss", {"patience": 2}, [0, 0, 1]),
    ],
)
def test_patience(values, metric, options, stops):
    assert stopped_by(values, metric, **options) == [bool(stop) for stop in stops]


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1.5}, {"patience": 1, "min_delta": -1}])
def test_patience_out_of_range(options):
    with pytest.raises((ValueError, TypeError), match=r"patience|min_delta"):
        EarlyStopping(**options)


@pytest.mark.parametrize("missing", ["validation", "evaluate_every"])
def test_early_stopping_needs_validations(missing, tmp_path):
    options = {name: value for name, value in VALIDATED.items() if name != missing}
    with pytest.raises(ValueError, match="needs validations during the run: pass validation= and evaluate_every="):
        go(momentum(), tmp_path / "run", callbacks=[EarlyStopping(2)], **options)
    assert not (tmp_path / "run").exists()


def test_early_stopping_of_a_resumed_run(tmp_path):
    """It stops where an uninterrupted one does, and stays stopped."""
    options = {**VALIDATED, "evaluate_every": 2}
    assert len(go(momentum(), tmp_path / "whole", callbacks=never_better(), **options).metrics) == 6
    interrupt = AtStep(4, lambda batch: signal.raise_signal(signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        go(momentum(), tmp_path / "run", callbacks=never_better(), tasks=interrupt, **options)
    result = go(momentum(), tmp_path / "run", callbacks=never_better(), resume=True, **options)
    assert (result.resumed_from, len(result.metrics)) == (5, 1)
    assert result.stopped is not None
    assert_same_ending(tmp_path / "run", tmp_path / "whole")
    again = go(momentum(), tmp_path / "run", callbacks=never_better(), resume=True, **options)
    assert (again.metrics, again.stopped) == ([], result.stopped)
    longer = EarlyStopping(3, min_delta=1e9)
    assert len(go(momentum(), tmp_path / "run", callbacks=longer, resume=True, **options).metrics) == 2


def test_one_object_for_two_runs():
    stopping, options = never_better(), {**VALIDATED, "evaluate_every": 2}
    assert [len(go(momentum(), callbacks=stopping, **options).metrics) for _ in range(2)] == [6, 6]


def test_the_command(tmp_path, capsys):
    small = [
        "--meta-batch",
        "2",
        "--evaluate-tasks",
        "4",
        "--iterations",
        "40",
        "--lr",
        "1e-9",
        "--evaluate-every",
        "2",
    ]
    words = ["train", "sinusoid", *small, "--run-dir", str(tmp_path / "run"), "--resume"]
    # with such steps, validations differ by rounding, if at all
    assert cli.main([*words, "--patience", "1"]) == 0
    steps = len(read_metrics(tmp_path / "run"))
    assert steps < 40
    said = f"stopped after {steps} of 40 iterations, in {tmp_path / 'run'}: no better validation than "
    assert said in capsys.readouterr().out
    assert cli.main([*words, "--patience", "1"]) == 0
    assert said in capsys.readouterr().out
    assert read_config(tmp_path / "run")["settings"]["patience"] == 1
    assert cli.main(words) == 0
    assert len(read_metrics(tmp_path / "run")) == 40
    for wrong, message in (("0", "patience"), ("3", "needs validations during the run")):
        new = ["train", "sinusoid", "--patience", wrong, "--run-dir", str(tmp_path / "new")]
        assert cli.main(new) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


# several processes


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("only_first", [False, True])
def test_on_two_processes(only_first, tmp_path):
    """All stop after the same step as one process does; the callbacks of the first alone are called."""
    ended = run_forked(watched, 2, tmp_path / "two", tmp_path / "two", only_first)
    assert [status for status, _ in ended] == [0, 0], ended
    told = [[json.loads(line) for line in said.splitlines() if line.startswith("[")] for _, said in ended]
    for (name, make), first, second in zip(WATCHED.items(), *told, strict=True):
        steps, reason, losses, calls = outcome(tmp_path / "one" / name, make())
        assert first[:3] == second[:3] == [name, steps, reason]
        assert first[3] == second[3] == pytest.approx(losses, rel=1e-4)
        assert first[4] == calls
        assert set(second[4]) <= {""}
