"""The ladder of binary digits: each level is one bit of every entry, the last one QSGD's random rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.multilevel import MLMC, draw_level, geometric
from metamom.bias.packing import pack, packed_bytes, unpack
from metamom.bias.spelling import Row, spelled

MOST_BITS = 30


def check_bits(bits: int) -> None:
    """Check the number of bits.

    Raises:
        ValueError: unless it is a whole number, 1 <= bits <= 30.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise ValueError(f"MLMCQSGD needs a whole number of bits, 1 <= bits <= {MOST_BITS}; got {bits!r}.")


def bit_levels(gradient: Tensor, uniform: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ladder of one vector: ``C^l(g) = max|g| sign(g) floor(2^l |g|/max|g|) / 2^l`` for l = 1..B, then QSGD.

    The largest magnitude has all B bits set. Level B + 1 is what QSGD's rounding to ``2^B`` levels adds, which brings
    the mean of the ladder's end to g.

    Args:
        gradient: ``[d]``, finite.
        uniform: ``[d]`` numbers on [0, 1), for the rounding.
        bits: B >= 1.

    Returns:
        ``(digits [L, d], units [L], scale [])`` with ``D_l = scale * units[l] * digits[l]``: digits -1, 0 and 1, units
        ``2^-l``, and the largest magnitude; float64, L = B + 1.
    """
    wide = gradient.double()
    scale = wide.abs().max()
    exact = wide.abs() / torch.where(scale > 0, scale, torch.ones_like(scale)) * 2**bits
    below = exact.floor().clamp_max(2**bits - 1)
    whole = below.to(torch.int64)
    places = torch.arange(bits - 1, -1, -1, device=gradient.device)
    set_bits = (whole >> places.unsqueeze(1)) & 1
    digits = torch.cat([set_bits.to(torch.int8), (uniform < exact - below).to(torch.int8).unsqueeze(0)])
    units = torch.tensor([2.0**-level for level in [*range(1, bits + 1), bits]], dtype=torch.float64)
    return digits * wide.sign().to(torch.int8), units.to(gradient.device), scale


@spelled(
    "mlmc:qsgd",
    "one bit of each entry, unbiased",
    Row("`mlmc:qsgd`", "`MLMCQSGD()`", "unbiased, ω from its constants", "4 + d/5"),
    options=("bits", "geometric", "tensor", "seed"),
)
class MLMCQSGD(MLMC):
    """Send one random binary digit of all entries, in units of the largest magnitude; unbiased.

    The levels are the B bits of ``|g_j| / max|g|``, and the random rounding after them (`bit_levels`). A message has
    one number, and a digit -1, 0 or 1 for each entry: it is as short as that of the sign.

    ``E ||C(g)||^2 = (sum_l ||D_l||)^2`` with adaptive probabilities, given the rounding.

    Args:
        bits: B, 1 <= bits <= 30.
        geometric: the ratio of fixed probabilities ``p_l`` proportional to ``ratio^l``, such as 0.5; ``None`` for
            adaptive ones, ``p_l`` proportional to ``||D_l||``.
        per_tensor: a ladder for each parameter tensor's part.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for bits or a ratio out of range.

    Example:
        >>> operator = MLMCQSGD(bits=2)
        >>> len(operator.encode(torch.randn(100))), operator.wire_bytes(100)
        (24, 24)

    Reference:
        docs/theory/operators.md; Zukerman, Hamoud, Levy, ICML 2025, arXiv 2507.05508, the bit-wise compressor; the
        rounding is that of Alistarh et al., "QSGD", 2017, by the largest magnitude.
    """

    compresses = True

    def __init__(
        self,
        bits: int = 8,
        *,
        geometric: float | None = None,
        per_tensor: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        check_bits(bits)
        self.bits = bits
        self._fixed(geometric)
        self.per_tensor = per_tensor
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        values, digits = self._sent(rows, at)
        out = values.unsqueeze(1) * digits.to(values.dtype)
        return self._in_range((out + 0.0).to(rows.dtype))  # a zero is sent without a sign

    def _sent(self, rows: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:
        """The message of each row: the value of a digit ``[n]``, in 32 bits or more, and the digits ``[n, d]``."""
        wide, values, digits = torch.promote_types(rows.dtype, torch.float32), [], []
        for row, uniform in zip(rows, self._uniform(at, rows, 1 + rows.shape[1]), strict=True):
            levels, units, scale = bit_levels(row, uniform[1:].to(row.device), self.bits)
            chances = self._probabilities(units * levels.to(units.dtype).square().sum(1).sqrt())
            level = draw_level(chances, float(uniform[0]))
            value = scale * (units[level] / chances[level])
            values.append(value if bool(levels[level].any()) else torch.zeros_like(value))
            digits.append(levels[level])
        return torch.stack(values).to(wide), torch.stack(digits)

    def _omega(self, d: int) -> float:
        """From ``||D_l|| <= min(1, 2^-l sqrt(d)) ||g||``, and the variance of the rounding."""
        norms = [min(1.0, 2.0**-level * math.sqrt(d)) for level in range(1, self.bits + 1)]
        norms.append(math.sqrt(min(4.0**-self.bits * d, 2.0**-self.bits * math.sqrt(d))))
        if self.geometric is None:
            return max(0.0, sum(norms) ** 2 - 1)
        chances: list[float] = geometric(self.geometric, len(norms)).tolist()
        return max(0.0, sum(norm * norm / chance for norm, chance in zip(norms, chances, strict=True)) - 1)

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """The value of a digit, in 4 bytes or more, and a digit with three values for each entry."""
        return max(4, element_size) + packed_bytes(d, 3)

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        values, digits = self._sent(part.unsqueeze(0), at)
        self._in_range((values.unsqueeze(1) * digits.to(values.dtype)).to(part.dtype))
        return torch.cat([values.view(torch.uint8), pack(digits[0].to(torch.int64) + 1, 3)])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        value, digits = message[: wide.itemsize].clone().view(wide), message[wide.itemsize :]
        return (value * (unpack(digits, d, 3) - 1).to(wide) + 0.0).to(dtype)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return "more bits"

    @property
    def spec(self) -> str:
        """``mlmc:qsgd``, then its options."""
        return ":".join(["mlmc:qsgd", *[f"bits={self.bits}"] * (self.bits != 8), *self._words])
