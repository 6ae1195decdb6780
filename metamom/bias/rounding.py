"""The base of operators that round each entry, to the nearest code or at random, and roundings to a code book.

Legend: a code book ``0 = c_0 < c_1 < ... < c_m = 1`` of magnitudes, in units of the largest magnitude of a vector.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from metamom.bias.draws import Draws


def nearest_code(magnitude: Tensor, codes: Tensor) -> Tensor:
    """The number of the nearest code, the lower one for ties.

    Args:
        magnitude: ``[...]`` in [0, 1], float64.
        codes: ``[m + 1]``, increasing from 0 to 1, float64.

    Returns:
        ``[...]`` int64.

    Example:
        >>> nearest_code(torch.tensor([0.1, 0.25, 0.8]).double(), torch.tensor([0.0, 0.5, 1.0]).double()).tolist()
        [0, 0, 2]
    """
    return torch.searchsorted((codes[1:] + codes[:-1]) / 2, magnitude.contiguous())


def random_code(magnitude: Tensor, codes: Tensor, uniform: Tensor) -> Tensor:
    """The number of one of the two codes around each magnitude, drawn such that the mean is the magnitude.

    Args:
        magnitude: ``[...]`` in [0, 1], float64.
        codes: ``[m + 1]``, increasing from 0 to 1, float64.
        uniform: ``[...]`` numbers on [0, 1).

    Returns:
        ``[...]`` int64.
    """
    below = torch.searchsorted(codes, magnitude.contiguous(), right=True) - 1
    below = below.clamp_max(len(codes) - 2)  # a magnitude of 1 is the end of the last gap
    low, high = codes[below], codes[below + 1]
    return below + (uniform < (magnitude - low) / (high - low))


def even_code(magnitude: Tensor, count: int, uniform: Tensor | None = None) -> Tensor:
    """`nearest_code`, or with ``uniform`` `random_code`, for the codes ``i / count``, without a search.

    Args:
        magnitude: ``[...]`` in [0, 1], float64.
        count: number of the last code, >= 1.
        uniform: ``[...]`` numbers on [0, 1).

    Returns:
        ``[...]`` int64.
    """
    exact = magnitude * count
    if uniform is None:
        return (exact - 0.5).ceil().clamp_min_(0).to(torch.int64)
    below = exact.floor()
    return (below + (uniform < exact - below)).to(torch.int64)


class Rounding(Draws):
    """An operator that rounds at random, or, if `draws` is false, without draws and without a state."""

    @property
    @abstractmethod
    def draws(self) -> bool:
        """Whether it rounds at random."""

    def _seeded_to_round(self, seed: int, generator: torch.Generator | None) -> None:
        """Take the draws' seed and generator, which only random rounding has."""
        self._seeded(seed, generator)
        if not self.draws and generator is not None:
            raise ValueError(
                f"{type(self).__name__} rounds to the nearest number here, without draws: leave out generator=, "
                "or let it round at random."
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, if it rounds at random."""
        return super().state_dict() if self.draws else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Draws.load_state_dict`."""
        if self.draws:
            super().load_state_dict(state)
        elif state:
            raise ValueError(f"{self.spec} carries no state; got {', '.join(map(repr, state))}.")

    def advance(self) -> None:
        if self.draws:
            super().advance()
