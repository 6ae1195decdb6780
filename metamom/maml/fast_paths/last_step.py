"""Compute a meta-gradient in the same way as the one before, without repeating its checks.

Legend: T tasks, Q query points, n workers, d entries of all meta-parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from metamom.batch import TaskBatch
from metamom.maml.chunk_results import with_chunk
from metamom.maml.fast_paths.fingerprint import Fingerprint
from metamom.maml.task_weights import Params

Run = Callable[[TaskBatch], tuple[Tensor, ...]]
"""From a batch to its query losses, predictions and gradients, see `metamom.maml.chunk_gradient`."""


class _Known(NamedTuple):
    fingerprint: Fingerprint
    weights: Params
    run: Run


class Again(NamedTuple):
    """A meta-gradient that was computed in the same way as the one before.

    Attributes:
        weights: the meta-parameters by name.
        rows: the workers' flattened meta-gradients ``[n, d]``.
        losses: of the queries, ``[T]``.
        predictions: of the queries, ``[T, Q, ...]``.
    """

    weights: Params
    rows: Tensor
    losses: Tensor
    predictions: Tensor


class LastStep:
    """Remembers how the last meta-gradient was computed, for the next one if nothing but values has changed.

    Args:
        fingerprint: of a batch on a number of workers, with the learner as it is.
    """

    def __init__(self, fingerprint: Callable[[TaskBatch, int], Fingerprint | None]) -> None:
        self._fingerprint = fingerprint
        self._known: _Known | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Forget it in a copy: a graph is tied to this process, and the weights to the learner that is copied."""
        return {**self.__dict__, "_known": None}

    def forget(self, weights: Params, batch: TaskBatch, workers: int) -> Callable[[Run], None]:
        """Forget the last meta-gradient, and return a function that stores how the next one was computed."""
        self._known = None
        now = self._fingerprint(batch, workers)
        own = set() if now is None else {id(tensor) for tensor in now.tensors}

        def remember(run: Run) -> None:
            # a graph returns one gradient for all weights only if they are contiguous
            if now is not None and all(id(w) in own and w.is_contiguous() for w in weights.values()):
                self._known = _Known(now, weights, run)

        return remember

    def again(self, batch: TaskBatch, workers: int) -> Again | None:
        """The meta-gradient of a batch, computed as the last one was; ``None`` if more than values has changed."""
        known = self._known
        if known is None:
            return None
        now = self._fingerprint(batch, workers)
        if now is None or now.key != known.fingerprint.key:
            return None
        losses, predictions, *grads = known.run(batch)
        return Again(known.weights, with_chunk(None, grads), losses, predictions)
