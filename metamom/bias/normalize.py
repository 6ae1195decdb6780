"""Operators that keep only a gradient's direction, or its signs and mean magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.coordinates import Coordinates
from metamom.bias.norms import scaled_norm
from metamom.bias.packing import pack, packed_bytes, unpack
from metamom.bias.spelling import Row, spelled


def normalize(gradient: Tensor) -> Tensor:
    """``g / ||g||`` of each vector ``[..., d]``; zero stays zero."""
    scaled, _, norm = scaled_norm(gradient)
    return torch.where(norm > 0, scaled / norm, 0)


@spelled("normalize", "divided by its norm", Row("`normalize`", "`Normalize()`", "none", "4d"), options=("tensor",))
class Normalize(BiasOperator):
    """Divide each worker's gradient by its norm; not contractive.

    Args:
        per_tensor: divide each parameter tensor's part by its own norm, as the paper's code does.

    Example:
        >>> Normalize()(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    def __init__(self, *, per_tensor: bool = False) -> None:
        self.per_tensor = per_tensor

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return normalize(rows)

    @property
    def spec(self) -> str:
        """``normalize`` or ``normalize:tensor``."""
        return "normalize" + ":tensor" * self.per_tensor


def scaled_sign(gradient: Tensor) -> Tensor:
    """``(||g||_1 / d) sign(g)`` of each vector ``[..., d]``; the sign of zero is zero."""
    return gradient.sign() * _mean_magnitude(gradient)


@spelled("sign", "signs times the mean magnitude", Row("`sign`", "`Sign()`", "≥ 1/d", "4 + d/5"), options=("tensor",))
class Sign(BiasOperator):
    """Send signs and one number, the mean magnitude: ``C(g) = (||g||_1 / d) sign(g)``.

    Contractive with ``alpha_c >= 1/d``: ``||C(g) - g||^2 <= ||g||^2 - ||g||_1^2 / d``, with equality if no entry is
    zero.

    Args:
        per_tensor: send one mean magnitude for each parameter tensor.

    Example:
        >>> Sign()(torch.tensor([3.0, -1.0, 2.0, 0.5]))
        tensor([ 1.6250, -1.6250,  1.6250,  1.6250])

    Reference:
        docs/theory/operators.md; Karimireddy et al., "Error feedback fixes SignSGD", 2019.
    """

    compresses = True

    def __init__(self, *, per_tensor: bool = False) -> None:
        self.per_tensor = per_tensor

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return scaled_sign(rows)

    def _contraction(self, d: int) -> float | None:
        return 1 / d

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """One number, and a base-3 digit for each entry."""
        return element_size + packed_bytes(d, 3)

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        digits = part.sign().to(torch.int64) + 1
        return torch.cat([_mean_magnitude(part).view(torch.uint8), pack(digits, 3)])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        magnitude, digits = message[: dtype.itemsize].clone().view(dtype), unpack(message[dtype.itemsize :], d, 3)
        return (digits - 1).to(dtype) * magnitude

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return f"error feedback (ef21:{self.spec})"

    @property
    def spec(self) -> str:
        """``sign`` or ``sign:tensor``."""
        return "sign" + ":tensor" * self.per_tensor


def _mean_magnitude(gradient: Tensor) -> Tensor:
    """``||g||_1 / d``, ``[..., 1]``, summed in at least 32 bits, also if the sum itself would overflow."""
    wide = gradient.abs().to(torch.promote_types(gradient.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    if not bool(mean.isfinite().all()):
        largest = wide.amax(-1, keepdim=True)
        share = (wide / largest).mean(-1, keepdim=True).clamp_max(1)  # rounding may exceed 1
        mean = torch.where(mean.isfinite(), mean, largest * share)
    return mean.to(gradient.dtype)
