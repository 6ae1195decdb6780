"""Top-K sparsification."""

from __future__ import annotations

from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.select import Ties, keep_largest
from metamom.bias.sparse import Sparse
from metamom.bias.spelling import Row, spelled
from metamom.common.checks import is_word


def top_k(gradient: Tensor, k: int, ties: Ties = "index") -> Tensor:
    """Keep each vector's k entries of largest magnitude, zero the others.

    Args:
        gradient: ``[..., d]``, finite.
        k: 1 <= k <= d.
        ties: which entries equal to the k-th largest to keep: the first ones in order (``"index"``), or ``"all"``.

    Returns:
        ``[..., d]`` with exactly k entries kept, or, with ``"all"``, at least k.
    """
    d = gradient.shape[-1]
    return gradient.clone() if k == d else keep_largest(gradient.reshape(-1, d), k, ties).view(gradient.shape)


@spelled(
    "topk",
    "the K largest entries, or P %",
    Row("`topk:33500`, `topk:5%`", "`TopK(k)`, `TopK(ratio=...)`", "K/d", "8K"),
    argument="K",
    number=int,
    share=True,
    options=("tensor", "all"),
)
class TopK(Sparse):
    """Keep each worker's K largest entries by magnitude, over the whole flattened gradient.

    Contractive: ``||C(g) - g||^2 <= (1 - K/d) ||g||^2``. Exactly K entries are kept, ties broken by index.

    Args:
        k: number of entries to keep, >= 1; or
        ratio: share of entries to keep, 0 < ratio <= 1: ``K = max(1, round(ratio * d))``.
        per_tensor: keep K entries, or the share, of each parameter tensor's part.
        ties: ``"all"`` keeps every entry at or above the K-th largest magnitude, like the paper's code. `wire_bytes`
            then counts K entries, a lower bound: a message (`encode`) holds all that were kept.

    Raises:
        ValueError: unless exactly one of k and ratio is given and in range; for other ties; when called, if K > d.

    Example:
        >>> import torch
        >>> TopK(k=2)(torch.tensor([3.0, -1.0, 2.0, 0.5]))
        tensor([3., 0., 2., 0.])

    Reference:
        arXiv 2403.00853, the compression application.
    """

    def __init__(
        self, k: int | None = None, *, ratio: float | None = None, per_tensor: bool = False, ties: Ties = "index"
    ) -> None:
        super().__init__(k, ratio, per_tensor)
        if not is_word(ties, ("index", "all")):
            raise ValueError(f'TopK breaks ties by "index" or keeps "all"; got ties={ties!r}.')
        self.ties = ties

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        return top_k(rows, self.kept(rows.shape[-1]), self.ties)

    def _contraction(self, d: int) -> float | None:
        return self.kept(d) / d

    @property
    def varies(self) -> bool:
        """Whether all ties are kept."""
        return self.ties == "all"

    def _sends(self, count: int, kept: int) -> bool:
        return count == kept or (self.ties == "all" and count > kept)

    @property
    def spec(self) -> str:
        """``topk:K`` or ``topk:P%``, then ``:all`` and ``:tensor`` if set."""
        return f"topk:{self.amount}" + ":all" * (self.ties == "all") + ":tensor" * self.per_tensor
