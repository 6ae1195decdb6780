"""The base of operators that search for what they send, and start at what each worker found at its last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.bias.feedback_base import check_workers, stored_workers
from metamom.bias.state import Kept, State

START = "start"


class Warm(Draws):
    """A random operator that keeps a start of its search for each worker, a tensor ``[d]``, unless it is ``fresh``.

    The start is part of a worker's tensors in a `State`. Error feedback around the operator owns it with its own.
    """

    fresh: bool
    _workers: Mapping[int, Kept]

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
        found = [{} if self.fresh else state.workers.get(worker, {}) for worker in place.workers]
        for kept in found:
            if START in kept and kept[START].shape != rows.shape[1:]:
                raise ValueError(
                    f"{self.spec} keeps {len(kept[START])} entries of each worker; got gradients of {rows.shape[1]}. "
                    "Use an operator of its own for each run, or reset() it."
                )
        return [kept[START].to(rows) if START in kept else torch.zeros_like(rows[0]) for kept in found]

    def _after(self, state: State, starts: Sequence[Tensor], place: Coordinates) -> State:
        """The state with the next starts."""
        if self.fresh:
            return state
        moved = {
            worker: {**state.workers.get(worker, {}), START: start}
            for worker, start in zip(place.workers, starts, strict=True)
        }
        return replace(state, workers={**state.workers, **moved})

    def current_state(self) -> State:
        """See `BiasOperator.current_state`."""
        return replace(super().current_state(), workers=self._workers)

    def store(self, state: State) -> None:
        """See `BiasOperator.store`."""
        super().store(state)
        self._workers = stored_workers(self._workers, state.workers)

    def reset(self) -> None:
        """Restart with the draws of the first call."""
        super().reset()
        self._workers = {}

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and each worker's start ``[d]``. Not copied; the next call updates the tensors."""
        return {**super().state_dict(), **({} if self.fresh else {"workers": dict(self._workers)})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Draws.load_state_dict`."""
        workers = state.get("workers", {})
        check_workers(self.spec, workers, self.names)
        super().load_state_dict(state)
        self._workers = stored_workers({}, workers)

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """See `BiasOperator.shard`."""
        self._workers = {worker: kept for worker, kept in self._workers.items() if worker in set(workers)}

    @staticmethod
    def gather(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `BiasOperator.gather`: the workers of all processes, in order."""
        if "workers" not in states[0]:
            return states[0]
        workers = {worker: kept for state in states for worker, kept in state["workers"].items()}
        return {**states[0], "workers": dict(sorted(workers.items()))}
