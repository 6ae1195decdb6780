"""8-bit blockwise quantisation: a scale for each block of entries, and a byte for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from metamom.bias.constants import nearest_loss, random_omega
from metamom.bias.coordinates import Coordinates
from metamom.bias.rounding import Rounding, even_code, nearest_code, random_code
from metamom.bias.spelling import Row, spelled

LARGEST = 127  # of the numbers of a code; a byte holds -127..127


@cache
def linear_codes() -> tuple[float, ...]:
    """The 128 magnitudes ``i / 127``."""
    return tuple(i / LARGEST for i in range(LARGEST + 1))


@cache
def dynamic_codes() -> tuple[float, ...]:
    """128 magnitudes with 2^i in the decade up to ``10^(i - 6)``, i = 0..6, evenly spaced in each, and zero.

    They are the dynamic tree's, at the upper end of each of its intervals, so that the largest magnitude is exact.

    Example:
        >>> codes = dynamic_codes()
        >>> len(codes), codes[:2], codes[-1]
        (128, (0.0, 1e-06), 1.0)
    """
    codes = [0.0]
    for i in range(7):
        codes += [10.0 ** (i - 6) * (0.1 + 0.9 * j / 2**i) for j in range(1, 2**i)] + [10.0 ** (i - 6)]
    return tuple(codes)


@spelled(
    "block8",
    "8 bits an entry, scaled in blocks",
    Row("`block8`", "`Block8()`", "254²/(254² + 2047)", "4⌈d/2048⌉ + d"),
    Row("`block8:block=256:dynamic`", "`Block8(256, dynamic=True)`", "from its constants", "4⌈d/256⌉ + d"),
    Row("`block8:random`", "`Block8(random=True)`", "unbiased, ω = (√(1 + 2047/127²) − 1)/2", "4⌈d/2048⌉ + d"),
    options=("block", "dynamic", "random", "tensor", "seed"),
)
class Block8(Rounding):
    """Cut the gradient into blocks; send each block's largest magnitude, and each entry as a signed 8-bit code of it.

    A large entry costs precision only within its block. Rounded to the nearest code it is contractive: with b entries
    a block and linear codes ``||C(g) - g||^2 <= (b - 1) / (254^2 + b - 1) ||g||^2``. Rounded at random it is unbiased,
    with ``omega = (sqrt(1 + (b - 1) / 127^2) - 1) / 2``. Both are attained; those of other codes are in `contraction`
    and `constants`.

    Args:
        block: b >= 1, entries of a block; the last one has what is left.
        dynamic: codes with seven decades, finer near zero, instead of evenly spaced ones.
        random: round at random to one of the two codes around an entry.
        per_tensor: start a new block with each parameter tensor.
        seed: seed of the workers' counter-based draws, with ``random``.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for arguments out of range, and for a generator without ``random``.

    Example:
        >>> Block8(block=2)(torch.tensor([1.0, 0.3, 100.0, 30.0]))
        tensor([  1.0000,   0.2992, 100.0000,  29.9213])

    Reference:
        docs/theory/operators.md; Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
        Quantization", ICLR 2022, arXiv 2110.02861.
    """

    compresses = True

    def __init__(
        self,
        block: int = 2048,
        *,
        dynamic: bool = False,
        random: bool = False,
        per_tensor: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"Block8 needs a whole number of entries in a block, block >= 1; got {block!r}.")
        self.block = block
        self.dynamic = dynamic
        self.random = random
        self.per_tensor = per_tensor
        self._seeded_to_round(seed, generator)

    @property
    def draws(self) -> bool:
        """Whether it rounds at random."""
        return self.random

    @property
    def codes(self) -> Sequence[float]:
        """The 128 magnitudes of the codes, from 0 to 1."""
        return dynamic_codes() if self.dynamic else linear_codes()

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return self._values(*self._sent(rows, at))[:, : rows.shape[1]]

    def _sent(self, rows: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:
        """The scales ``[n, blocks, 1]``, in the rows' dtype, and the codes' numbers ``[n, blocks, b]``, -127..127."""
        n, d = rows.shape
        blocks = self._in_blocks(rows)
        scale = blocks.abs().amax(-1, keepdim=True)
        wide = blocks.double()
        magnitude = torch.where(scale > 0, wide.abs() / scale.double(), 0)
        numbers = self._rounded(
            magnitude, self._in_blocks(self._uniforms(at, n, d, rows.device)) if self.random else None
        )
        return scale, torch.where(wide < 0, -numbers, numbers)

    def _rounded(self, magnitude: Tensor, uniform: Tensor | None) -> Tensor:
        """The numbers of the codes for magnitudes in [0, 1]."""
        if not self.dynamic:
            return even_code(magnitude, LARGEST, uniform)
        codes = torch.tensor(self.codes, dtype=torch.float64, device=magnitude.device)
        return nearest_code(magnitude, codes) if uniform is None else random_code(magnitude, codes, uniform)

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """``[n, d]`` as ``[n, blocks, b]``, with zeros at the end."""
        b = min(self.block, rows.shape[1])
        return nn.functional.pad(rows, (0, -rows.shape[1] % b)).view(len(rows), -1, b)

    def _values(self, scale: Tensor, numbers: Tensor) -> Tensor:
        """``C(g) [n, blocks * b]`` from what is sent."""
        wide = torch.promote_types(scale.dtype, torch.float32)
        codes = torch.tensor(self.codes, dtype=wide, device=scale.device)
        magnitude = scale.to(wide) * codes[numbers.abs()]
        return torch.where(numbers < 0, -magnitude, magnitude).to(scale.dtype).flatten(1)

    def _omega(self, d: int) -> float | None:
        return random_omega(self.codes, min(d, self.block)) if self.random else None

    def _contraction(self, d: int) -> float | None:
        return super()._contraction(d) if self.random else 1 - nearest_loss(self.codes, min(d, self.block))

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """A scale for each block, and a byte for each entry."""
        return -(-d // self.block) * element_size + d

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        scale, numbers = self._sent(part.unsqueeze(0), at)
        entries = numbers.flatten()[: len(part)] + LARGEST
        return torch.cat([scale.flatten().view(torch.uint8), entries.to(torch.uint8)])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        head = len(message) - d
        scale = message[:head].clone().view(dtype).view(1, -1, 1)
        numbers = message[head:].to(torch.int64) - LARGEST
        if bool((numbers > LARGEST).any()):
            raise self._damaged(f"codes beyond {LARGEST}", d, dtype)
        return self._values(scale, self._in_blocks(numbers.unsqueeze(0)))[0, :d]

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return super().remedy if self.random else f"error feedback (ef21:{self.spec}), or smaller blocks"

    @property
    def spec(self) -> str:
        """``block8``, then its options."""
        block = [] if self.block == 2048 else [f"block={self.block}"]
        chosen = {"dynamic": self.dynamic, "random": self.random, "tensor": self.per_tensor}
        return ":".join(["block8", *block, *(word for word, on in chosen.items() if on), *self._seed_word])
