"""Random operators: Rand-K and QSGD."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.checks import check_setting
from metamom.bias.constants import Constants
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.draws import Draws
from metamom.bias.norms import scaled_norm
from metamom.bias.packing import pack, packed_bytes, unpack
from metamom.bias.sparse import Sparse
from metamom.bias.spelling import Row, spelled
from metamom.rng import Purpose, subset


def rand_k(gradient: Tensor, indices: Tensor) -> Tensor:
    """Keep each vector's entries ``indices [..., k]``, zero the others; ``[..., d]``."""
    return torch.zeros_like(gradient).scatter_(-1, indices, gradient.gather(-1, indices))


@spelled(
    "randk",
    "K entries at random, or P %",
    Row("`randk:1%`", "`RandK(ratio=...)`", "K/d, in the mean", "8K"),
    Row("`randk:1%:scaled`", "`RandK(ratio=..., scaled=True)`", "unbiased, ω = d/K − 1", "8K"),
    argument="K",
    number=int,
    share=True,
    options=("tensor", "scaled", "shared", "seed"),
)
class RandK(Sparse, Draws):
    """Keep K random entries of each worker's gradient, all sets of K equally likely.

    Contractive in the mean: ``E ||C(g) - g||^2 = (1 - K/d) ||g||^2``. Scaled by d/K it is unbiased instead:
    ``E C(g) = g``, with ``E ||C(g) - g||^2 = (d/K - 1) ||g||^2``.

    Args:
        k: number of entries to keep, >= 1; or
        ratio: share of entries to keep, 0 < ratio <= 1: ``K = max(1, round(ratio * d))``.
        scaled: multiply the kept entries by d/K.
        shared: use one set for all workers, instead of one for each.
        per_tensor: keep K entries, or the share, of each parameter tensor's part.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: unless exactly one of k and ratio is given and in range; when called, if K > d.

    Reference:
        docs/theory/operators.md.
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        ratio: float | None = None,
        scaled: bool = False,
        shared: bool = False,
        per_tensor: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(k, ratio, per_tensor)
        self.scaled = scaled
        self.shared = shared
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        n, d = rows.shape
        k = self.kept(d)
        out = rand_k(rows, self._indices(n, d, k, at).to(rows.device))
        return self._in_range(out * (d / k)) if self.scaled else out

    def _indices(self, n: int, d: int, k: int, at: Coordinates) -> Tensor:
        if self.generator is not None:
            generator = at.generators[self.generator]
            keys = torch.rand(1 if self.shared else n, d, generator=generator, device=generator.device)
            chosen = keys.topk(k, dim=-1).indices
        else:
            places = self._places(at._replace(workers=[0]) if self.shared else at)
            chosen = torch.from_numpy(subset(self.seed, places, Purpose.BIAS, k, d))
        return chosen.expand(n, k)

    def _contraction(self, d: int) -> float | None:
        if not self.scaled:
            return self.kept(d) / d
        alpha = 2 - d / self.kept(d)
        return alpha if alpha > 0 else None

    def constants(
        self, d: int, *, workers: int = 1, zeta2: float = 0.0, bound: float | None = None, sizes: Sizes | None = None
    ) -> Constants:
        """Exact for independent sets; layer by layer, the largest over the layers. See `BiasOperator.constants`."""
        check_setting(d, workers, zeta2, bound)
        shares = [self.kept(size) / size for size in self._parts(d, sizes)]
        p = min(shares)
        if self.scaled:
            omega = (1 / p - 1) / (1 if self.shared else workers)
            return Constants(0.0, 0.0, omega, 0.0 if self.shared else omega * zeta2)
        if self.shared:
            return Constants(1 - p, 0.0, 0.0, 0.0)
        variance = max(share * (1 - share) for share in shares) / workers
        return Constants((1 - p) ** 2, 0.0, variance, variance * zeta2)

    @property
    def spec(self) -> str:
        """``randk:K`` or ``randk:P%``, then ``:scaled``, ``:shared`` and ``:tensor`` if set."""
        chosen = {"scaled": self.scaled, "shared": self.shared, "tensor": self.per_tensor}
        return ":".join([f"randk:{self.amount}", *(word for word, on in chosen.items() if on), *self._seed_word])


def quantize(gradient: Tensor, uniform: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round each vector randomly to s levels of its norm, such that the mean is exact.

    Args:
        gradient: ``[..., d]``, finite.
        uniform: ``[..., d]`` numbers on [0, 1).
        levels: s >= 1.

    Returns:
        ``(norm [..., 1], whole numbers [..., d] from -s to s)`` with ``C(g) = norm * whole / s``; at least in 32 bits.
    """
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    scaled, scale, norm = scaled_norm(wide)
    exact = scaled.abs() / norm.clamp_min(torch.finfo(wide.dtype).tiny) * levels
    below = exact.floor()
    whole = below + (uniform < exact - below)
    # a zero is sent without a sign
    return norm * scale, whole.clamp_max(levels) * scaled.sign() + 0.0


@spelled(
    "qsgd",
    "rounded at random to LEVELS levels",
    Row("`qsgd:16`", "`QSGD(16)`", "unbiased, ω ≤ min(d/s², √d/s)", "4 + d"),
    argument="LEVELS",
    number=int,
    options=("tensor", "seed"),
)
class QSGD(Draws):
    """Send each gradient's norm, and each entry rounded randomly to one of s levels of the norm; unbiased.

    ``E ||C(g) - g||^2 <= min(d / s^2, sqrt(d) / s) ||g||^2``.

    Args:
        levels: s >= 1.
        per_tensor: use a norm for each parameter tensor.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: for levels out of range.

    Reference:
        docs/theory/operators.md; Alistarh et al., "QSGD", 2017.
    """

    compresses = True

    def __init__(
        self, levels: int, *, per_tensor: bool = False, seed: int = 0, generator: torch.Generator | None = None
    ) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels < 2**30:
            raise ValueError(f"QSGD needs a whole number of levels, 1 <= levels < 2^30; got {levels!r}.")
        self.levels = levels
        self.per_tensor = per_tensor
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        norm, whole = self._quantized(rows, at)
        out = norm * (whole / self.levels)
        if _fits(norm, rows.dtype):  # and so does C(g), which is not longer
            return out.to(rows.dtype)
        _, scale, length = scaled_norm(rows.to(norm.dtype))  # C(g) may fit even if the norm does not
        out = torch.where(norm.isfinite(), out, length * (whole / self.levels) * scale)
        return self._in_range(out.to(rows.dtype))

    def _quantized(self, rows: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:
        return quantize(rows, self._uniforms(at, len(rows), rows.shape[1], rows.device), self.levels)

    def _omega(self, d: int) -> float:
        return float(min(d / self.levels**2, d**0.5 / self.levels))

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """The norm, in 4 bytes or more, and a digit with 2 s + 1 values for each entry."""
        return max(4, element_size) + packed_bytes(d, 2 * self.levels + 1)

    def _encode(self, part: Tensor, at: Coordinates) -> Tensor:
        norm, whole = self._quantized(part.unsqueeze(0), at)
        if not _fits(norm, part.dtype):
            self._in_range(norm)  # the norm is sent
            self._in_range((norm * (whole / self.levels)).to(part.dtype))
        digits = whole[0].to(torch.int64) + self.levels
        return torch.cat([norm[0].view(torch.uint8), pack(digits, 2 * self.levels + 1)])

    def _decode(self, message: Tensor, d: int, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        norm, digits = message[: wide.itemsize].clone().view(wide), message[wide.itemsize :]
        whole = (unpack(digits, d, 2 * self.levels + 1) - self.levels).to(wide)
        return (norm * (whole / self.levels)).to(dtype)

    @property
    def spec(self) -> str:
        """``qsgd:LEVELS``, then ``:tensor`` if set."""
        return ":".join([f"qsgd:{self.levels}" + ":tensor" * self.per_tensor, *self._seed_word])


def _fits(norm: Tensor, dtype: torch.dtype) -> bool:
    """Whether these norms are in the range of a dtype."""
    return bool((norm <= torch.finfo(dtype).max).all())
