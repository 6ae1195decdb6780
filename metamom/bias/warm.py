"""The base of operators that search for what they send, and start at what each worker found at its last step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.bias.kept import KeepsWorkers, check_workers, stored_workers
from metamom.bias.state import Kept, State

START = "start"


class Warm(KeepsWorkers, Draws):
    """A random operator that keeps a start of its search for each worker, a tensor ``[d]``, unless it is ``fresh``.

    The start is part of a worker's tensors in a `State`. Error feedback around the operator owns it with its own.
    """

    fresh: bool

    def _seeded_to_search(self, fresh: bool, seed: int) -> None:
        self._seeded(seed, None)
        self.fresh = fresh
        self.names = () if fresh else (START,)
        self._workers = {}

    @property
    def keeps_start(self) -> bool:
        """See `BiasOperator.keeps_start`."""
        return not self.fresh

    def _starts(self, state: State, rows: Tensor, place: Coordinates) -> list[Tensor]:
        """The starts ``[d]`` of the workers at this place; zero before a worker's first step."""
        found: Sequence[Kept] = [{}] * len(rows) if self.fresh else self._kept(state, rows, place)
        return [kept[START].to(rows) if START in kept else torch.zeros_like(rows[0]) for kept in found]

    def _after(self, state: State, starts: Sequence[Tensor], place: Coordinates) -> State:
        """The state with the next starts."""
        if self.fresh:
            return state
        return replace(state, workers=self._workers_after(state, {START: starts}, place))

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and each worker's start ``[d]``. Not copied; the next call updates the tensors."""
        return {**super().state_dict(), **({} if self.fresh else {"workers": dict(self._workers)})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Draws.load_state_dict`."""
        workers = state.get("workers", {})
        check_workers(self.spec, workers, self.names)
        super().load_state_dict(state)
        self._workers = stored_workers({}, workers)
