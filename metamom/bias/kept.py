"""Operators that keep tensors of each worker from call to call: their state, its checks and copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates
from metamom.bias.state import Kept, State


class KeepsWorkers(BiasOperator):
    """An operator that keeps tensors ``[d]`` of each worker, with those of an operator inside it in one `State`."""

    _workers: dict[int, dict[str, Tensor]]

    def _kept(self, state: State, rows: Tensor, place: Coordinates) -> list[Kept]:
        """What is kept of the workers at this place; nothing before a worker's first gradient."""
        found = [state.workers.get(worker, {}) for worker in place.workers]
        for kept in found:
            for tensor in kept.values():
                if tensor.shape != rows.shape[1:]:
                    raise ValueError(
                        f"{self.spec} keeps {len(tensor)} entries of each worker; got gradients of {rows.shape[1]}. "
                        "Use an operator of its own for each run, or reset() it."
                    )
        return found

    def _workers_after(
        self, state: State, kept: Mapping[str, Tensor | Sequence[Tensor]], place: Coordinates
    ) -> dict[int, Kept]:
        """What is kept of all workers, given the new tensors of those at this place: n tensors ``[d]`` by name."""
        moved = {
            worker: {**state.workers.get(worker, {}), **{name: kept[name][row] for name in kept}}
            for row, worker in enumerate(place.workers)
        }
        return {**state.workers, **moved}

    def current_state(self) -> State:
        """See `BiasOperator.current_state`."""
        return replace(super().current_state(), workers=self._workers)

    def store(self, state: State) -> None:
        """See `BiasOperator.store`. A worker's tensors keep their memory: new ones would fragment it."""
        super().store(state)
        self._workers = stored_workers(self._workers, state.workers)

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self._workers = {}

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


def stored(before: Tensor | None, tensor: Tensor) -> Tensor:
    """Copy a tensor, into the memory of the one before it if it fits."""
    if before is tensor:
        return tensor
    fits = before is not None and (before.shape, before.device, before.dtype) == (
        tensor.shape,
        tensor.device,
        tensor.dtype,
    )
    return before.copy_(tensor) if before is not None and fits else tensor.clone()


def stored_workers(before: Mapping[int, Kept], after: Mapping[int, Kept]) -> dict[int, dict[str, Tensor]]:
    """Copy the workers' tensors, into the memory of those before them where they fit."""
    return {
        worker: {name: stored(before.get(worker, {}).get(name), tensor) for name, tensor in kept.items()}
        for worker, kept in after.items()
    }


def check_workers(spec: str, workers: Any, names: Sequence[str]) -> None:
    """Check what an operator keeps of each worker, from a checkpoint.

    Raises:
        ValueError: for anything but tensors ``[d]`` of these names for each worker.
    """
    if not isinstance(workers, dict):
        raise ValueError(f"{spec} keeps a dict of workers; got {workers!r:.80}.")
    for worker, kept in workers.items():
        if not isinstance(kept, dict) or set(kept) != set(names):
            got = ", ".join(map(str, kept)) if isinstance(kept, dict) else type(kept).__name__
            raise ValueError(f"{spec} keeps {', '.join(names)} of each worker; got {got}.")
        if type(worker) is not int or worker < 0:
            raise ValueError(f"{spec} numbers the workers by whole numbers >= 0; got {worker!r:.80}.")
        for name, tensor in kept.items():
            if not isinstance(tensor, Tensor) or tensor.dim() != 1 or not tensor.is_floating_point():
                raise ValueError(f"{spec} keeps {name} [d] of worker {worker}; got {tensor!r:.80}.")
