"""Callbacks that note what they are called with, and runs of them on several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_runs import TASKS, go, momentum

from metamom.distributed import start
from metamom.training import Callback, EarlyStopping, RunState


class Recorder(Callback):
    """Notes every call, and does something at some of them.

    Args:
        **actions: by the name of the method, what to do with the state.
    """

    def __init__(self, **actions: Callable[[RunState], Any]) -> None:
        self.actions = actions
        self.calls: list[tuple[Any, ...]] = []
        self.steps = 0

    def on_start(self, state: RunState) -> None:
        self._note("start", state)

    def on_step(self, state: RunState) -> None:
        self.steps += 1
        self._note("step", state, state.metrics["step"], state.loss)

    def on_validation(self, state: RunState) -> None:
        assert state.validation is not None
        self._note("validation", state, state.validation.mean[0])

    def on_end(self, state: RunState, status: str) -> None:
        self._note("end", state, status)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def _note(self, name: str, state: RunState, *more: Any) -> None:
        self.calls.append((name, state.step, *more))
        if name in self.actions:
            self.actions[name](state)

    def names(self) -> str:
        """The calls as letters: s for start, . for a step, v for a validation, e for the end."""
        letters = {"start": "s", "step": ".", "validation": "v", "end": "e"}
        return "".join(letters[name] for name, *_ in self.calls)


def stopping_at(step: int) -> Recorder:
    return Recorder(step=lambda state: state.stop("enough") if state.step == step else None)


def fail(state: RunState) -> None:
    raise LookupError(f"no callback after step {state.step}")


def never_better() -> EarlyStopping:
    """Stops at the third validation, since a loss never falls by so much."""
    return EarlyStopping(2, min_delta=1e9)


WATCHED: dict[str, Callable[[], list[Callback]]] = {
    "stopped at a step": lambda: [stopping_at(5)],
    "stopped at the start": lambda: [Recorder(start=lambda state: state.stop("enough"))],
    "stopped at the end": lambda: [stopping_at(12)],
    "early": lambda: [never_better()],
    "failed": lambda: [Recorder(validation=fail)],
    "failed at the start": lambda: [Recorder(start=fail)],
    "failed at the end": lambda: [Recorder(end=fail)],
    "nothing": lambda: [Recorder()],
}


def watched(folder: Path, only_first: bool = False) -> None:
    """One run after the other with the same processes; what each ends with is printed as JSON."""
    with start(timeout=60) as world:
        for name, make in WATCHED.items():
            callbacks = [] if only_first and not world.first else make()
            print(json.dumps([name, *outcome(folder / name, callbacks, world=world)]))


def outcome(folder: Path, callbacks: list[Callback], **options: Any) -> tuple[Any, ...]:
    """The steps, reason or error, losses, and on process 0 the calls of a run."""
    more = {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 4, "workers": 2, **options}
    try:
        result = go(momentum(), folder, callbacks=callbacks, **more)
        ended = (len(result.metrics), result.stopped, [line["loss"] for line in result.metrics])
    except LookupError as error:
        ended = (0, str(error), [])
    return *ended, [each.names() for each in callbacks if isinstance(each, Recorder)]
