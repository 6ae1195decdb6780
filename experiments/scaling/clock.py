"""Seconds of a step by part: a world and operators that time their own calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.state import State
from metamom.distributed import World


class Clock:
    """Seconds so far by part; a part inside another counts towards the outer one."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._running = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time this part."""
        if self._running:
            yield
            return
        self._running, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self._running = False
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The seconds since the last call."""
        spent, self.spent = self.spent, {}
        return spent


class TimedWorld(World):
    """A world that times its exchanges and, separately, its agreements, in which the fastest wait for all."""

    clock: Clock

    def agree(self, error: Exception | None = None) -> None:
        """See `World`."""
        with self.clock.part("wait"):
            super().agree(error)

    def _call(self, what: str, collective: Callable[[], Any]) -> Any:
        with self.clock.part("exchange"):
            return super()._call(what, collective)


class TimedOperator(BiasOperator):
    """Wrap an operator, to time the encoding and decoding of its messages."""

    def __init__(self, operator: BiasOperator, clock: Clock) -> None:
        self.operator = operator
        self.compresses, self.names = operator.compresses, operator.names
        self.carries_momentum = operator.carries_momentum
        self._clock = clock

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        with self._clock.part("encode"):
            return self.operator.transition(rows, state, place, sizes)

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`."""
        with self._clock.part("encode"):
            return self.operator.transition_send(rows, state, place, sizes)

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
        with self._clock.part("decode"):
            return self.operator.transition_receive(messages, state, d, dtype, sizes, each=each)

    def current_state(self) -> State:
        """The operator's."""
        return self.operator.current_state()

    def store(self, state: State) -> None:
        """Store the operator's."""
        self.operator.store(state)

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The operator's."""
        return self.operator.wire_bytes(d, element_size, sizes)

    @property
    def draw_step(self) -> int:
        return self.operator.draw_step

    def advance(self) -> None:
        self.operator.advance()

    @property
    def varies(self) -> bool:
        """The operator's."""
        return self.operator.varies

    @property
    def separable(self) -> bool:
        """The operator's."""
        return self.operator.separable

    @property
    def spec(self) -> str:
        """The operator's."""
        return self.operator.spec

    def _apply(self, rows: Tensor, place: Coordinates) -> Tensor:
        raise AssertionError("calls go to the operator")
