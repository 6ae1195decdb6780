"""TernGrad: each entry becomes -1, 0 or 1 times the largest magnitude, at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.bias.constants import random_omega
from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.bias.norms import scaled_norm
from metamom.bias.packing import pack, packed_bytes, unpack
from metamom.bias.spelling import Row, spelled
from metamom.common.checks import check_number
from metamom.common.numbers import short


def ternary(gradient: Tensor, uniform: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """Round each entry to -s, 0 or s, with s the vector's largest magnitude, such that the mean is exact.

    Args:
        gradient: ``[..., d]``, finite.
        uniform: ``[..., d]`` numbers on [0, 1).
        clip: first limit magnitudes to ``clip`` times their root mean square; then the mean is the clipped gradient.

    Returns:
        ``(s [..., 1], digits [..., d])``, with ``C(g) = s * digits``: digits -1, 0, 1 (int8), and s as the gradient.
    """
    scaled, scale, norm = scaled_norm(gradient.double())
    limit = torch.ones_like(norm)
    if clip is not None:
        limit = (clip / math.sqrt(gradient.shape[-1]) * norm).clamp_max(1)
    chance = torch.where(limit > 0, scaled.abs() / limit, 0)
    digits = torch.where(uniform < chance, scaled.sign(), 0).to(torch.int8)
    return torch.where(norm > 0, scale * limit, 0).to(gradient.dtype), digits


@spelled(
    "terngrad",
    "-1, 0 or 1 times the largest",
    Row("`terngrad`", "`TernGrad()`", "unbiased, ω = (√d − 1)/2", "4 + d/5"),
    Row(
        "`terngrad:clip=2.5:tensor`",
        "`TernGrad(clip=2.5, per_tensor=True)`",
        "unbiased for what clipping leaves",
        "4 + d/5",
    ),
    options=("clip", "tensor", "seed"),
)
class TernGrad(Draws):
    """Send s, the largest magnitude, and for each entry 0 or its sign, with probability ``|g_j| / s``; unbiased.

    ``E ||C(g)||^2 = s ||g||_1 <= (1 + omega) ||g||^2`` with ``omega = (sqrt(d) - 1) / 2``, which a gradient with one
    large entry and all others ``1 / (sqrt(d) + 1)`` of it attains. A message takes 1.6 bits an entry.

    Clipping makes s smaller: entries beyond c times the root mean square r of the vector come down to it. Then
    ``E ||C(g)||^2 <= c ||g||^2`` for any d, but the mean is the clipped gradient. No contraction is known.

    Args:
        clip: c > 0, 2.5 in the paper; ``None`` does not clip. The paper's standard deviation is taken around zero here,
            so that a vector of equal entries stays.
        per_tensor: a scale for each parameter tensor, as in the paper.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> TernGrad()(torch.tensor([2.0, 0.0, -2.0]))
        tensor([ 2.,  0., -2.])

    Reference:
        docs/theory/operators.md; Wen, Xu, Yan, Wu, Wang, Chen, Li, "TernGrad: Ternary Gradients to Reduce Communication
        in Distributed Deep Learning", NeurIPS 2017, arXiv 1705.07878.
    """

    compresses = True

    def __init__(
        self,
        *,
        clip: float | None = None,
        per_tensor: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if clip is not None:
            check_number("TernGrad's clip", clip)
            if not 0 < clip < math.inf:
                raise ValueError(f"TernGrad needs clip > 0 and finite, or None not to clip; got {clip}.")
        self.clip = None if clip is None else float(clip)
        self.per_tensor = per_tensor
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        scale, digits = self._sent(rows, at)
        return scale * digits.to(rows.dtype)

    def _sent(self, rows: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:
        return ternary(rows, self._uniforms(at, len(rows), rows.shape[1], rows.device), self.clip)

    def _omega(self, d: int) -> float | None:
        return random_omega([0.0, 1.0], d) if self.clip is None else None

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """One number, and a base-3 digit for each entry."""
        return element_size + packed_bytes(d, 3)

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        scale, digits = self._sent(part.unsqueeze(0), at)
        return torch.cat([scale[0].view(torch.uint8), pack(digits[0].to(torch.int64) + 1, 3)])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        scale = message[: dtype.itemsize].clone().view(dtype)
        return scale * (unpack(message[dtype.itemsize :], d, 3) - 1).to(dtype)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return super().remedy if self.clip is None else "a larger clip, or terngrad without it, which is unbiased"

    @property
    def spec(self) -> str:
        """``terngrad``, then ``:clip=C``, ``:tensor`` and ``:seed=N`` if set."""
        clip = [] if self.clip is None else [f"clip={short(self.clip)}"]
        return ":".join(["terngrad", *clip, *["tensor"] * self.per_tensor, *self._seed_word])
