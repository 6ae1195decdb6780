"""Features of the sets that one adaptation uses in several inner steps.

The first step runs the whole model and keeps the input of its head (`metamom.maml.heads`). The other steps run the head
alone. If the rest of the model is trained, its gradient reaches it through the features, once for all steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class _Kept(NamedTuple):
    """The features of one call's sets, and what they were computed with."""

    state: Hashable
    head: str
    features: tuple[Tensor, ...]


class Features:
    """Keeps the features of sets while the weights outside the head stay the same.

    Args:
        sets: those that the model will be called on; only the ones that occur more than once are kept.
        graph: whether the features are differentiable in the weights of the model.
    """

    def __init__(self, sets: Iterable[Tensor], *, graph: bool) -> None:
        sets = list(sets)
        counts = Counter(map(id, sets))
        self._graph = graph
        self._reused = {id(x): x for x in sets if counts[id(x)] > 1}  # alive, so that no other tensor gets its id
        self._kept: dict[tuple[int, ...], _Kept] = {}

    def reuses(self, sets: Sequence[Tensor]) -> bool:
        """Whether a call on these sets is one of several."""
        return all(id(x) in self._reused for x in sets)

    def keep(self, sets: Sequence[Tensor], state: Hashable, head: str, features: Sequence[Tensor]) -> None:
        """Keep the features of ``sets``.

        Args:
            sets: what the model was called on.
            state: everything else that the features depend on.
            head: the name of the module that takes them.
            features: one tensor ``[T, ...]`` for each set.
        """
        found = tuple(f if self._graph else f.detach() for f in features)
        self._kept[tuple(map(id, sets))] = _Kept(state, head, found)

    def recall(self, sets: Sequence[Tensor], state: Hashable) -> tuple[str, tuple[Tensor, ...]] | None:
        """The name of the head and the features of ``sets``, if they were kept in the same state."""
        kept = self._kept.get(tuple(map(id, sets)))
        return None if kept is None or kept.state != state else (kept.head, kept.features)


_SHARED: ContextVar[Features | None] = ContextVar("shared", default=None)


@contextmanager
def shared_between_predictions(*sets: Tensor) -> Iterator[None]:
    """Compute the features of these sets once for all calls of `metamom.MAML.predict` in this thread."""
    token = _SHARED.set(Features([*sets, *sets], graph=False))
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared() -> Features | None:
    """The features that predictions share, if they do."""
    return _SHARED.get()
