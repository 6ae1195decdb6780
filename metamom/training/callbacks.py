"""Callbacks: watch a training run, and stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal

from torch.optim import Optimizer

from metamom.distributed import World
from metamom.evaluation import Evaluation
from metamom.maml.learner import MAML

Status = Literal["finished", "stopped", "interrupted", "failed"]

STOP = 1  # a process's status that asks the others to stop; signals that end a run have other numbers


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run as its callbacks see it.

    Attributes:
        learner: the learner, with its current weights.
        optimizer: its optimizer.
        run_dir: the run's directory; ``None`` without one.
        settings: the settings that define the run, as JSON values.
        iterations: total number of steps.
        step: completed steps, including those before a resume.
        metrics: the last step's line of ``metrics.jsonl`` (see `metamom.training.TrainResult`), read-only. Its
            ``"step"`` counts from 0. Empty before the first step of this call.
        validation: the last validation of this call, if any.
    """

    learner: MAML
    optimizer: Optimizer
    run_dir: Path | None
    settings: Mapping[str, Any]
    iterations: int
    step: int
    metrics: Mapping[str, Any]
    validation: Evaluation | None
    _stop: Callable[[str], None] = field(repr=False)

    @property
    def loss(self) -> float | None:
        """The last step's loss."""
        return self.metrics.get("loss")

    def stop(self, reason: str) -> None:
        """End the run after this step, once its state is saved. `train` returns, and its result has the reason.

        Raises:
            TypeError: for anything but a text.
        """
        if not isinstance(reason, str) or not reason:
            raise TypeError(f"stop takes the reason, a text; got {reason!r:.80}.")
        self._stop(reason)


class Callback:
    """The base class of callbacks: override what is needed. An exception in a callback ends the run, and is raised.

    With several processes, all methods are called on process 0 only.
    """

    _may_stop = True

    @property
    def kind(self) -> type:
        """The class that names the saved state."""
        return type(self)

    def on_start(self, state: RunState) -> None:
        """Before the first step of this call, after a resumed state was loaded."""

    def on_step(self, state: RunState) -> None:
        """After each step, before its checkpoint is written."""

    def on_validation(self, state: RunState) -> None:
        """After each validation (``state.validation``), and after `on_step`."""

    def on_end(self, state: RunState, status: Status) -> None:
        """At the end, also after an error; not if `on_start` has raised one.

        Args:
            state: of the run.
            status: ``"finished"``; ``"stopped"`` by a callback; ``"interrupted"`` by a signal; or ``"failed"``.
        """

    def state_dict(self) -> dict[str, Any]:
        """What must be saved with every checkpoint: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; called before `on_start`, if the checkpoint has a state for this class."""


class Callbacks:
    """The callbacks of a run; a context manager that starts and ends them.

    Args:
        callbacks: on process 0; other processes have none.
        world: the processes of the run.

    Attributes:
        reason: why a callback stopped the run, the same on all processes; ``None`` if none did.
    """

    def __init__(self, callbacks: Iterable[Callback], world: World) -> None:
        self._callbacks = list(callbacks)
        self._world = world
        self._state: RunState | None = None
        self._asked: str | None = None
        self._ends = ExitStack()
        self._shared_steps = self._shared_validations = False
        self.reason: str | None = None

    def starting(self, **state: Any) -> Callbacks:
        """With the fields of a `RunState`, of the run before its first step."""
        self._state = RunState(**state, metrics=MappingProxyType({}), validation=None, _stop=self._ask)
        return self

    def __enter__(self) -> Callbacks:
        stopping = [each for each in self._callbacks if each._may_stop]
        on_steps = any(getattr(each.on_step, "__func__", None) is not Callback.on_step for each in stopping)
        self._shared_steps, self._shared_validations = self._world.broadcast_object(lambda: (on_steps, bool(stopping)))
        assert self._state is not None
        with ExitStack() as ends:
            with self._world.together():
                for each in self._callbacks:
                    each.on_start(self._state)
                    ends.push(self._ending(each))
            self._agree()
            self._ends = ends.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ends.__exit__(kind, error, traceback)

    def after(self, done: int, line: Mapping[str, Any], validation: Evaluation | None) -> None:
        """Call the callbacks after a step.

        Args:
            done: the completed steps.
            line: the step's metrics.
            validation: the validation after this step, if any.
        """
        assert self._state is not None
        metrics = MappingProxyType(dict(line))
        self._state = replace(self._state, step=done, metrics=metrics, validation=validation or self._state.validation)
        shared = self._world.size > 1 and (self._shared_steps or (self._shared_validations and validation is not None))
        with self._world.together() if shared else ExitStack():
            for each in self._callbacks:
                each.on_step(self._state)
            for each in self._callbacks if validation is not None else ():
                each.on_validation(self._state)
            if self._asked is not None and shared:
                self._world.status = STOP
        if self._world.size == 1:
            self.reason = self._asked
        elif shared and STOP in self._world.statuses:
            self._agree()

    def state_dict(self) -> dict[str, Any]:
        """The states of those callbacks that have one, by class."""
        states = {name: each.state_dict() for name, each in self._by_name().items()}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the states; a callback without a saved one starts afresh, and saved ones without a callback are lost."""
        for name, each in self._by_name().items():
            if name in state:
                each.load_state_dict(state[name])

    def _by_name(self) -> dict[str, Callback]:
        """Names for their states: the class, and a number for further ones of the same class."""
        found: dict[str, Callback] = {}
        for each in self._callbacks:
            name = each.kind.__qualname__
            repeated = sum(other.kind.__qualname__ == name for other in found.values())
            found[f"{name}-{repeated + 1}" if repeated else name] = each
        return found

    def _ask(self, reason: str) -> None:
        self._asked = self._asked or reason

    def _agree(self) -> None:
        """Let all processes know whether process 0 has been asked to stop, and why."""
        self.reason = self._world.broadcast_object(lambda: self._asked)

    def _ending(self, callback: Callback) -> Callable[[Any, BaseException | None, Any], None]:
        def end(kind: Any, error: BaseException | None, traceback: Any) -> None:
            assert self._state is not None
            callback.on_end(self._state, self._status(error))

        return end

    def _status(self, error: BaseException | None) -> Status:
        if error is None:
            return "finished" if self.reason is None else "stopped"
        return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
