"""Natural compression: each entry is rounded to a power of two, and its sign and exponent are sent."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.packing import pack, packed_bytes, unpack
from metamom.bias.rounding import Rounding
from metamom.bias.select import INTEGERS
from metamom.bias.spelling import Row, spelled

_MANTISSA = {4: 23, 8: 52}  # bits of the fraction in float32 and float64
_EXPONENT = {4: 8, 8: 11}  # bits of the exponent


def exponents(gradient: Tensor, uniform: Tensor | None) -> Tensor:
    """The exponent fields of the powers of two to which entries are rounded; 0 stands for zero.

    ``|t| = 2^e (1 + f)`` goes up to ``2^(e + 1)`` with probability f, so that the mean is ``|t|``. Below the smallest
    normal number u, ``|t| = f u`` goes to u with probability f, and otherwise to zero.

    Args:
        gradient: ``[...]``, finite float32 or float64.
        uniform: ``[...]`` numbers on [0, 1); ``None`` rounds to the nearest power of two, upwards for ties.

    Returns:
        ``[...]`` int64, from 0 to ``2^b - 1`` for exponents of b bits; the largest one means infinity.

    Example:
        >>> exponents(torch.tensor([1.0, 1.25, -1.5, 0.0]), None).tolist()
        [127, 127, 128, 0]
    """
    bits = _MANTISSA[gradient.element_size()]
    whole = gradient.abs().view(INTEGERS[gradient.element_size()]).to(torch.int64)
    fraction = (whole & (2**bits - 1)).double() * 2.0**-bits
    up: Tensor = fraction >= 0.5 if uniform is None else uniform < fraction
    return (whole >> bits) + up


def powers_of_two(negative: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point numbers from their signs and exponent fields.

    Args:
        negative: ``[...]`` booleans.
        exponent: ``[...]`` int64, as from `exponents`.
        dtype: float32 or float64.
    """
    magnitude = (exponent << _MANTISSA[dtype.itemsize]).to(INTEGERS[dtype.itemsize]).view(dtype)
    return torch.where(negative, -magnitude, magnitude)


@spelled(
    "natural",
    "each entry to a power of two",
    Row("`natural`", "`Natural()`", "unbiased, ω = 1/8", "9d/8"),
    Row("`natural:nearest`", "`Natural(nearest=True)`", "8/9", "9d/8"),
    options=("nearest", "seed"),
)
class Natural(Rounding):
    """Round each entry at random to one of the two powers of two around it; unbiased.

    ``E ||C(g) - g||^2 <= 1/8 ||g||^2``, with equality if all entries are 4/3 times a power of two. Rounded to the
    nearest power instead, it is contractive: ``||C(g) - g||^2 <= 1/9 ||g||^2``. A message has the sign and the exponent
    of each entry: 9 bits in float32 and in 16-bit dtypes, 12 in float64.

    Below the smallest normal number u (1.2e-38 in float32 and bfloat16) entries become zero or u, still unbiased, but
    with an error up to u/2. Entries whose upper power is beyond the dtype's range may raise an error.

    Args:
        nearest: round to the nearest power of two instead, upwards from the middle; biased, and without draws.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for a seed out of range, and for a generator with ``nearest``, which has no draws.

    Example:
        >>> Natural(nearest=True)(torch.tensor([3.5, -1.25, 0.7, 0.0]))
        tensor([ 4.0000, -1.0000,  0.5000,  0.0000])

    Reference:
        docs/theory/operators.md; Horváth, Ho, Horváth, Sahu, Canini, Richtárik, "Natural Compression for Distributed
        Deep Learning", 2019, arXiv 1905.10988, theorem 1.
    """

    compresses = True

    def __init__(self, *, nearest: bool = False, seed: int = 0, generator: torch.Generator | None = None) -> None:
        self.nearest = nearest
        self._seeded_to_round(seed, generator)

    @property
    def draws(self) -> bool:
        """Whether it rounds at random."""
        return not self.nearest

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        out = powers_of_two(wide.signbit(), self._exponents(wide, at), wide.dtype)
        return self._in_range(out.to(rows.dtype))

    def _exponents(self, wide: Tensor, at: Coordinates) -> Tensor:
        uniform = None if self.nearest else self._uniforms(at, len(wide), wide.shape[1], wide.device)
        return exponents(wide, uniform)

    def _omega(self, d: int) -> float | None:
        return None if self.nearest else 1 / 8

    def _contraction(self, d: int) -> float | None:
        return 8 / 9 if self.nearest else super()._contraction(d)

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """The low 8 bits of each exponent, then the signs with the exponent's other bits."""
        return d + packed_bytes(d, _high_base(max(4, element_size)))

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        exponent = self._exponents(wide.unsqueeze(0), at)[0]
        negative = wide.signbit()
        self._in_range(powers_of_two(negative, exponent, wide.dtype).to(part.dtype).unsqueeze(0))
        high = (exponent >> 8) * 2 + negative
        return torch.cat([(exponent & 255).to(torch.uint8), pack(high, _high_base(wide.element_size()))])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        high = unpack(message[d:], d, _high_base(wide.itemsize))
        exponent = message[:d].to(torch.int64) + ((high >> 1) << 8)
        return powers_of_two((high & 1).bool(), exponent, wide).to(dtype)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return f"error feedback (ef21:{self.spec}), or natural, which is unbiased" if self.nearest else super().remedy

    @property
    def spec(self) -> str:
        """``natural``, then ``:nearest`` and ``:seed=N`` if set."""
        return ":".join(["natural", *["nearest"] * self.nearest, *self._seed_word])


def _high_base(size: int) -> int:
    """How many values the sign and the high bits of an exponent have together, for numbers of this many bytes."""
    return 1 << (1 + _EXPONENT[size] - 8)
