"""Operators as objects that keep their state between calls, around pure transitions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates, Sizes, check_gradient, numbers, place_of
from metamom.bias.state import EMPTY, State


class Stateful(ABC):
    """The calls that read an operator's state, make a transition and store the next state."""

    _deferred = False
    _pending: State | None = None  # the state after a deferred call

    @property
    @abstractmethod
    def spec(self) -> str:
        """This operator's SPEC on the command line."""

    @abstractmethod
    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""

    @abstractmethod
    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`."""

    @abstractmethod
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
        """See `BiasOperator.transition_receive`."""

    def __call__(
        self,
        gradient: Tensor,
        *,
        step: int | None = None,
        workers: Sequence[int] | None = None,
        sizes: Sizes | None = None,
    ) -> Tensor:
        """Apply C to each gradient.

        Args:
            gradient: ``[..., d]``, one gradient for each worker.
            step: seeds random operators, together with the worker; the number of earlier calls by default.
            workers: the workers' numbers, >= 0 and distinct; 0, 1, ... by default. They seed random operators, and
                error feedback keeps a state for each.
            sizes: the numbers of entries of the parameter tensors, which layer-wise operators need; a `Layout` has
                their shapes too, which PowerSGD needs.

        Returns:
            ``[..., d]``, a new tensor or the same one.

        Raises:
            NonFiniteError: for an infinite or NaN entry, or if C(g) is beyond the range of the gradients' dtype.
            TypeError: for entries that are not floating-point numbers.
            ValueError: for workers that do not match the rows, for sizes that are missing or do not add up to d; and as
                the operator says. The operator's state does not change then.
        """
        check_gradient(gradient)
        rows = gradient.reshape(-1, gradient.shape[-1])
        place = Coordinates(self.draw_step if step is None else step, numbers(workers, len(rows)))
        out, state = self.transition(rows, self.current_state(), place, sizes)
        self._passed(state)
        if step is None:
            self.advance()
        return gradient if out is rows else out.view(gradient.shape)

    def encode(self, gradient: Tensor, *, step: int = 0, worker: int = 0, sizes: Sizes | None = None) -> Tensor:
        """Encode one worker's message, which it sends instead of ``C(g)``.

        Args:
            gradient: ``[d]``.
            step: as for a call.
            worker: the worker's number.
            sizes: as for a call.

        Returns:
            ``[wire_bytes]`` uint8.
        """
        check_gradient(gradient)
        if gradient.dim() != 1:
            raise ValueError(f"encode takes one worker's gradient [d]; got shape {tuple(gradient.shape)}.")
        place = Coordinates(step, [worker])
        messages, state = self.transition_send(gradient.unsqueeze(0), self.current_state(), place, sizes)
        self._passed(state)
        return messages[0]

    def send(self, gradients: Tensor, *, step: int, workers: Sequence[int], sizes: Sizes | None = None) -> list[Tensor]:
        """Encode workers' messages. Like a call, it updates the workers' state.

        Args:
            gradients: ``[n, d]``.
            step: as for a call.
            workers: the workers' numbers.
            sizes: as for a call.

        Returns:
            n messages, each ``[bytes]`` uint8.

        Raises:
            NonFiniteError: as a call.
        """
        messages, state = self.transition_send(
            gradients, self.current_state(), place_of(gradients, step, workers), sizes
        )
        self._passed(state)
        return messages

    def receive(
        self, messages: Sequence[Tensor], d: int, dtype: torch.dtype, *, sizes: Sizes | None = None, each: bool = False
    ) -> Tensor:
        """Decode the workers' messages: their sum, or each one.

        Args:
            messages: of all workers, in order.
            d: length of the gradients.
            dtype: of the gradients.
            sizes: as for a call.
            each: return each worker's ``[n, d]`` instead of their sum ``[d]``.

        Raises:
            ValueError: for messages that no gradients encode to.
        """
        before = self.current_state()
        out, state = self.transition_receive(messages, before, d, dtype, sizes, each=each)
        if state is not before:
            self.store(state)
            if self._pending is not None:  # the workers' next states still wait, the server's is stored
                self._pending = replace(self._pending, server=state.server)
        return out

    def current_state(self) -> State:
        """The state from earlier calls, as a value. Its tensors are not copied: `store` may write into them."""
        generators = self._generators
        return State(generators={each: each.get_state() for each in generators}) if generators else EMPTY

    def store(self, state: State) -> None:
        """Continue from this state, which a transition returned. Tensors are copied."""
        for generator, drawn in state.generators.items():
            generator.set_state(drawn)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """Inside this context, calls do not update the state; `commit` applies the last one's update later.

        Transitions do the same without the operator: `transition` returns the next state, and `store` applies it.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def commit(self) -> None:
        """Apply the state update of the last deferred call."""
        state, self._pending = self._pending, None
        if state is not None:
            self.store(state)

    def reset(self) -> None:
        """Discard the state from earlier calls."""
        self._pending = None

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """Keep one process's part of a loaded state of all workers, and what the server needs.

        Args:
            workers: the workers of this process.
            each: as for `receive`.
        """
        return  # most operators have no state

    @staticmethod
    def gather(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Combine the processes' `state_dict`s, process 0 first, into one state of all workers."""
        return states[0]  # for most operators, all processes have the same state

    def deal(self, workers: Sequence[int], *, each: bool = False) -> None:
        """`shard` under its name in version 0.1."""
        self.shard(workers, each=each)

    def merged(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`gather` under its name in version 0.1."""
        return self.gather(states)

    def state_dict(self) -> dict[str, Any]:
        """The state from earlier calls, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if state:
            raise ValueError(f"{self.spec} carries no state; got {', '.join(state)}.")

    @property
    def draw_step(self) -> int:
        """The number of earlier calls, for operators that use it to draw."""
        return 0

    def advance(self) -> None:
        """Count a successful call."""
        return  # most operators do not count calls

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        """The ``generator=`` of all operators inside, from which a transition draws."""
        return ()

    def _passed(self, state: State) -> None:
        """Store the state after a call, or keep it for `commit`."""
        if self._deferred:
            self._pending = state
        else:
            self.store(state)
