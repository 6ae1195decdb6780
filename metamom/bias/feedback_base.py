"""The base of error feedback: tensors that each worker keeps from step to step, around an operator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates, Sizes, check_gradient
from metamom.bias.function import inner_operator
from metamom.bias.kept import KeepsWorkers, check_workers, stored_workers
from metamom.bias.state import EMPTY, Kept, State

Rows = dict[str, Tensor]  # the tensors [n, d] of a transition's workers, by name


class ErrorFeedback(KeepsWorkers):
    """The base of EF14, EF21, EF21-SGDM and Clip21: an operator, and tensors ``[d]`` that each worker keeps.

    A worker's state starts at zero, and each gradient of that worker updates it. It is part of a run: `train` saves it
    in every checkpoint. The theory requires a contractive operator (Top-K, Rand-K unscaled, Sign).

    Args:
        operator: C, or its SPEC, on whole gradients or layer by layer.

    Raises:
        TypeError: for anything but an operator, and for one with error feedback.
        ValueError: when called with gradients of a different length than before.

    Attributes:
        state: the workers' tensors by name, ``[n, d]`` in the order of the workers; empty before the first call.
    """

    def __init__(self, operator: BiasOperator | str) -> None:
        self.operator = inner_operator(operator, "error feedback goes around an operator without it", starts=True)
        self._workers: dict[int, dict[str, Tensor]] = {}

    @property
    def state(self) -> dict[str, Tensor]:
        """The workers' tensors by name."""
        kept = [self._workers[worker] for worker in sorted(self._workers)]
        # some workers have been updated since a checkpoint was loaded; the others still have the loaded tensors
        return {name: torch.stack([state[name].to(kept[0][name]) for state in kept]) for name in self.names if kept}

    @abstractmethod
    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        """The recurrence up to the operator: its input ``[n, d]``, and the tensors that `_after` needs.

        The tensors ``kept`` are copies, which the recurrence may change in place.
        """

    @abstractmethod
    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        """The recurrence after it has ``sent = C(wanted)``: what the server receives, and the next tensors."""

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        wanted, kept = self._before(rows, self._rows_of(state, rows, place))
        sent, state = self.operator.transition(wanted, state, place, sizes)
        out, kept = self._after(wanted, sent, kept)
        return out, replace(state, workers=self._next(state, kept, place))

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`: the messages encode the operator's input, including the feedback."""
        wanted, kept = self._before(rows, self._rows_of(state, rows, place))
        check_gradient(wanted)
        messages, state = self.operator.transition_send(wanted, state, place, sizes)
        d, dtype = wanted.shape[1], wanted.dtype
        sent = torch.stack([self.operator.decode(message, d, dtype, sizes=sizes) for message in messages])
        _, kept = self._after(wanted, sent, kept)
        return messages, replace(state, workers=self._next(state, kept, place))

    def transition_receive(
        self,
        messages: Sequence[Tensor],
        state: State,
        d: int,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        *,
        each: bool = False,
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition_receive`: the decoded messages of the operator, which has no state for them."""
        decoded, _ = self.operator.transition_receive(messages, EMPTY, d, dtype, sizes, each=each)
        return decoded, state

    def _rows_of(self, state: State, rows: Tensor, place: Coordinates) -> Rows:
        """Copy the tensors ``[n, d]`` of the workers at this place, zero for a worker's first gradient."""
        found = self._kept(state, rows, place)
        if not any(found):
            return {name: torch.zeros_like(rows) for name in self.names}
        zero = torch.zeros_like(rows[0])
        return {name: torch.stack([kept.get(name, zero).to(rows) for kept in found]) for name in self.names}

    def _next(self, state: State, kept: Rows, place: Coordinates) -> dict[int, Kept]:
        """The next state of all workers, given the new tensors ``[n, d]`` of those at this place."""
        for tensor in kept.values():  # if these are finite, so is what the server receives
            self._in_range(tensor)
        return self._workers_after(state, kept, place)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """See `BiasOperator.kept_names`: the feedback's, and its operator's."""
        return (*self.names, *self.operator.kept_names)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        raise AssertionError("transitions go around the operator, which applies itself")

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return self.operator._generators

    @property
    def compresses(self) -> bool:  # type: ignore[override]
        """Whether the operator does."""
        return self.operator.compresses

    @property
    def varies(self) -> bool:
        """Whether the operator's messages do."""
        return self.operator.varies

    @property
    def separable(self) -> bool:
        """Whether the operator is. Each worker has its own state."""
        return self.operator.separable

    @property
    def draw_step(self) -> int:
        return self.operator.draw_step

    def advance(self) -> None:
        self.operator.advance()

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The operator's. The state never leaves the worker."""
        return self.operator.wire_bytes(d, element_size, sizes)

    def encode(self, gradient: Tensor, *, step: int = 0, worker: int = 0, sizes: Sizes | None = None) -> Tensor:
        """Not supported: a message depends on the state, which a call updates."""
        raise ValueError(f"{self.spec} has a state: encode what its operator {self.operator.spec} is given.")

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self.operator.reset()

    def state_dict(self) -> dict[str, Any]:
        """Each worker's tensors and the operator's own state. Not copied; the next call updates the tensors."""
        return {"workers": dict(self._workers), "operator": self.operator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BiasOperator`.

        Raises:
            ValueError: for anything but a state of such an operator.
        """
        if not {"workers", "operator"} <= set(state):
            raise ValueError(
                f"{self.spec} resumes from its own state_dict(): 'workers', the {', '.join(self.names)} of each, "
                f"and 'operator', the state of {self.operator.spec}; got {', '.join(map(repr, state)) or 'nothing'}."
            )
        if not isinstance(state["workers"], dict) or not isinstance(state["operator"], dict):
            raise ValueError(f"{self.spec} keeps a dict of workers and one of its operator; got {state!r:.80}.")
        check_workers(self.spec, state["workers"], self.kept_names)
        self.operator.load_state_dict(state["operator"])
        self._workers = stored_workers({}, state["workers"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator!r})"
