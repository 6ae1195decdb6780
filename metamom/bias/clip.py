"""Clipping: by the Euclidean norm, and entry by entry."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_setting
from metamom.bias.constants import Constants
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.norms import scaled_norm
from metamom.bias.spelling import Row, spelled
from metamom.common.numbers import short


def clip(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale each vector to a norm of at most ``max_norm``: ``C(g) = g min(1, tau / ||g||)``.

    A vector within the bound does not change, bit for bit.

    Args:
        gradient: ``[..., d]``, finite.
        max_norm: tau > 0.

    Returns:
        ``[..., d]``.
    """
    scaled, scale, norm = scaled_norm(gradient)
    return torch.where(norm > max_norm / scale, scaled * (max_norm / norm), gradient)


@spelled(
    "clip",
    "norm at most TAU",
    Row("`clip:1.0`", "`Clip(1.0)`", "only for bounded gradients", "4d"),
    argument="TAU",
    number=float,
    options=("tensor",),
)
class Clip(BiasOperator):
    """Clip each worker's gradient to norm tau. Biased, and contractive only if norms are bounded.

    Args:
        max_norm: tau > 0, finite.
        per_tensor: clip each parameter tensor's part separately.

    Raises:
        ValueError: if tau is not a positive finite number.

    Example:
        >>> Clip(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])

    Reference:
        arXiv 2403.00853, the clipping application; ``||C(g) - g|| = (||g|| - tau)_+``.
    """

    def __init__(self, max_norm: float, *, per_tensor: bool = False) -> None:
        self.max_norm = _positive("Clip needs a norm tau", max_norm)
        self.per_tensor = per_tensor

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return clip(rows, self.max_norm)

    def constants(
        self, d: int, *, workers: int = 1, zeta2: float = 0.0, bound: float | None = None, sizes: Sizes | None = None
    ) -> Constants:
        """The relative form: ``c = (1 - tau/G)_+``, ``B = c^2``, ``b^2 = c^2 zeta^2``; see `BiasOperator.constants`."""
        check_setting(d, workers, zeta2, bound)
        if bound is None or self.per_tensor:
            raise ValueError(f"{self.spec} has constants only as a whole, and where ||grad f_i|| <= G: pass bound=G.")
        c2 = (1 - self.max_norm / bound) ** 2 if bound > self.max_norm else 0.0
        return Constants(c2, c2 * zeta2, 0.0, 0.0)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return f"a larger tau, or Clip21 (clip21:{short(self.max_norm)})"

    @property
    def spec(self) -> str:
        """``clip:TAU`` or ``clip:TAU:tensor``."""
        return f"clip:{short(self.max_norm)}" + ":tensor" * self.per_tensor


@spelled(
    "clipvalue",
    "each entry within -C and C",
    Row("`clipvalue:0.01`", "`ClipValue(0.01)`", "none", "4d"),
    argument="C",
    number=float,
)
class ClipValue(BiasOperator):
    """Clip each entry to ``[-c, c]``.

    Args:
        max_value: c > 0, finite.

    Raises:
        ValueError: if c is not a positive finite number.

    Example:
        >>> ClipValue(0.5)(torch.tensor([0.25, -3.0]))
        tensor([ 0.2500, -0.5000])
    """

    def __init__(self, max_value: float) -> None:
        self.max_value = _positive("ClipValue needs a bound c", max_value)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        # a bound that the dtype cannot hold clips nothing
        return rows if self.max_value > torch.finfo(rows.dtype).max else rows.clamp(-self.max_value, self.max_value)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return "a larger bound C"

    @property
    def spec(self) -> str:
        """``clipvalue:C``."""
        return f"clipvalue:{short(self.max_value)}"


def _positive(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what}, a number; got {value!r}.")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{what} > 0 and finite; got {value}.")
    return number
