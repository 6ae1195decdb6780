"""The base of operators that keep K entries of each gradient."""

from __future__ import annotations

from abc import abstractmethod
from decimal import Decimal

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import all_finite
from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.select import INTEGERS
from metamom.common.checks import check_number


class Sparse(BiasOperator):
    """Keep K entries of each gradient, or a share of them.

    Args:
        k: number of entries to keep, >= 1; or
        ratio: share of entries to keep, 0 < ratio <= 1: ``K = max(1, round(ratio * d))``.
        per_tensor: keep K entries, or the share, of each parameter tensor's part.

    Raises:
        ValueError: unless exactly one of k and ratio is given and in range; when called, if K > d.
    """

    compresses = True

    def __init__(self, k: int | None, ratio: float | None, per_tensor: bool) -> None:
        kind = type(self).__name__
        if (k is None) == (ratio is None):
            raise ValueError(f"{kind} needs either k= or ratio=; got k={k}, ratio={ratio}.")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError(f"{kind} needs a whole number k >= 1; got k={k!r}. Pass ratio= to keep a share.")
        if ratio is not None:
            check_number(f"{kind}'s ratio", ratio)
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"{kind} needs a share 0 < ratio <= 1; got ratio={ratio}. 5 % is ratio=0.05.")
        self.k = k
        self.ratio = ratio
        self.per_tensor = per_tensor

    def kept(self, d: int) -> int:
        """K, for gradients of length d, or for a parameter tensor of d entries.

        Raises:
            ValueError: if K > d.
        """
        if self.ratio is not None:
            return max(1, round(self.ratio * d))
        assert self.k is not None
        if self.k > d:
            what = f"entries of the smallest parameter tensor; {self.spec} acts on each" * self.per_tensor
            raise ValueError(
                f"{type(self).__name__} needs 1 <= k <= {d} (the number of {what or 'parameters'}); got k={self.k}. "
                f"Pass ratio= to keep a share of {'each' if self.per_tensor else 'them'}."
            )
        return self.k

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return f"error feedback (ef21:{self.spec}), or a larger K"

    @property
    def amount(self) -> str:
        """``K`` or ``P%``, as in a SPEC."""
        if self.ratio is None:
            return str(self.k)
        # in decimal arithmetic, so that `parse` returns the same ratio: 0.07 * 100 is 7.000000000000001
        percent = Decimal(repr(self.ratio)).scaleb(2)
        return f"{percent:f}%" if percent.adjusted() > -20 else f"{percent}%"  # 1E-300% instead of 300 zeros

    @abstractmethod
    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor: ...

    def _parts(self, d: int, sizes: Sizes | None) -> list[int]:
        """See `BiasOperator`. K is checked against the smallest part first, so that an error names that part."""
        parts = super()._parts(d, sizes)
        if parts:
            self.kept(min(parts))
        return parts

    def _wire_bytes(self, d: int, element_size: int) -> int:
        """K values and K indices of 4 bytes."""
        return self.kept(d) * (element_size + 4)

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """See `BiasOperator.decode`."""
        places, entries = self._read(message, d, dtype, sizes)
        out = torch.zeros(d, dtype=dtype, device=message.device)
        out[places] = entries
        return out

    def _add(self, total: Tensor, message: Tensor, sizes: Sizes | None) -> None:
        places, entries = self._read(message, len(total), total.dtype, sizes)
        total.index_add_(0, places, entries)

    def _read(self, message: Tensor, d: int, dtype: torch.dtype, sizes: Sizes | None) -> tuple[Tensor, Tensor]:
        """Read the indices and values of a message."""
        each, least = 4 + dtype.itemsize, sum(self.kept(size) for size in self._parts(d, sizes))
        count, rest = divmod(message.numel(), each)
        if message.dtype is not torch.uint8 or message.dim() != 1 or rest or not self._sends(count, least):
            raise self._misfit(message, f"{least * each} bytes" + " or more" * self._sends(least + 1, least), d, dtype)
        indices, values = torch.split(message, [4 * count, dtype.itemsize * count])
        places, entries = indices.clone().view(torch.int32).long(), values.clone().view(dtype)
        if bool(((places < 0) | (places >= d)).any()):
            raise self._damaged(f"indices outside 0..{d - 1}", d, dtype)
        if int(torch.zeros(d, dtype=torch.bool, device=message.device).index_fill_(0, places, True).sum()) < count:
            raise self._damaged("an index twice", d, dtype)
        if not all_finite(entries):
            raise self._damaged("values that are infinite or NaN", d, dtype)
        return places, entries

    def _sends(self, count: int, kept: int) -> bool:
        """Whether a message may hold ``count`` entries if K, summed over the parts, is ``kept``."""
        return count == kept

    def _message(self, gradient: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        """The indices of the kept entries in the whole gradient, then their values."""
        out = self._pass(gradient.unsqueeze(0), at, sizes)[0]
        # entries with any bit set come first (also negative zeros); if these are fewer than K, zeros follow
        bits = out.view(INTEGERS[out.element_size()]) != 0
        least = sum(self.kept(size) for size in self._parts(len(gradient), sizes))
        kept = bits.nonzero()[:, 0]
        if len(kept) < least:
            kept = torch.cat([kept, (~bits).nonzero()[: least - len(kept), 0]])
        return torch.cat([kept.to(torch.int32).view(torch.uint8), out[kept].view(torch.uint8)])
