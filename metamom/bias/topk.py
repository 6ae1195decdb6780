"""Top-K sparsification."""

from __future__ import annotations

import math
from decimal import Decimal

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator


def top_k(gradient: Tensor, k: int) -> Tensor:
    """Keep each vector's k entries of largest magnitude, zero the others; of equal ones, the first in order.

    NaN counts as infinitely large: it is kept, so that whoever checks that gradients are finite still sees it.

    Args:
        gradient: ``[..., d]``.
        k: 1 <= k <= d.

    Returns:
        ``[..., d]`` with exactly k entries kept.
    """
    if k == gradient.shape[-1]:
        return gradient.clone()
    magnitude = gradient.abs().nan_to_num_(nan=math.inf, posinf=math.inf)
    threshold = magnitude.topk(k, dim=-1, sorted=True).values[..., -1:]
    above = magnitude > threshold
    level = magnitude == threshold
    room = k - above.sum(-1, keepdim=True)
    return torch.where(above | (level & (level.cumsum(-1) <= room)), gradient, 0)


class TopK(BiasOperator):
    """Keep each worker's K largest entries by magnitude, over the whole flattened gradient.

    Contractive: ``||C(g) - g||^2 <= (1 - K/d) ||g||^2``. Exactly K entries are kept, ties broken by index.

    Args:
        k: number of entries to keep, >= 1; or
        ratio: share of entries to keep, 0 < ratio <= 1: ``K = max(1, round(ratio * d))``.

    Raises:
        ValueError: unless exactly one of the two is given and in range; when called, if K > d.

    Example:
        >>> TopK(k=2)(torch.tensor([3.0, -1.0, 2.0, 0.5]))
        tensor([3., 0., 2., 0.])

    Reference:
        arXiv 2403.00853, the compression application.
    """

    def __init__(self, k: int | None = None, *, ratio: float | None = None) -> None:
        if (k is None) == (ratio is None):
            raise ValueError(f"TopK needs either k= or ratio=; got k={k}, ratio={ratio}.")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"TopK needs a whole number k >= 1; got k={k!r}. Pass ratio= to keep a share.")
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"TopK needs a share 0 < ratio <= 1; got ratio={ratio}. 5 % is ratio=0.05.")
        self.k = k
        self.ratio = ratio

    def kept(self, d: int) -> int:
        """K, for gradients of length d.

        Raises:
            ValueError: if K > d.
        """
        if self.ratio is not None:
            return max(1, round(self.ratio * d))
        assert self.k is not None
        if self.k > d:
            raise ValueError(
                f"TopK needs 1 <= k <= {d} (the number of parameters); got k={self.k}. "
                "Pass ratio= to keep a share of them."
            )
        return self.k

    def __call__(self, gradient: Tensor) -> Tensor:
        """See `BiasOperator`."""
        return top_k(gradient, self.kept(gradient.shape[-1]))

    @property
    def spec(self) -> str:
        """``topk:K`` or ``topk:P%``."""
        if self.ratio is None:
            return f"topk:{self.k}"
        # in decimals, so that `parse` finds the very same ratio again: 0.07 * 100 is 7.000000000000001
        return f"topk:{Decimal(repr(self.ratio)).scaleb(2):f}%"

    def wire_bytes(self, d: int, element_size: int = 4) -> int:
        """K values and K indices of 4 bytes; see `BiasOperator`."""
        return self.kept(d) * (element_size + 4)
