"""The shapes of the parameter tensors, where operators otherwise take their numbers of entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


class Layout(tuple[int, ...]):
    """The numbers of entries of the parameter tensors, as ``sizes=`` takes them, with the tensors' shapes.

    Args:
        shapes: of the tensors, in the order in which a flattened gradient holds them.

    Attributes:
        shapes: the same, as tuples.

    Example:
        >>> import torch
        >>> layout = Layout(p.shape for p in torch.nn.Linear(3, 2).parameters())
        >>> layout, layout.shapes
        ((6, 2), ((2, 3), (2,)))
    """

    shapes: tuple[tuple[int, ...], ...]

    def __new__(cls, shapes: Iterable[Sequence[int]]) -> Layout:
        kept = tuple(tuple(shape) for shape in shapes)
        made = super().__new__(cls, (math.prod(shape) for shape in kept))
        made.shapes = kept
        return made

    def __getnewargs__(self) -> tuple[tuple[tuple[int, ...], ...]]:
        return (self.shapes,)
