"""The ladder of Top-K compressors: each level is the next K entries by magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.multilevel import MLMC, draw_level, geometric
from metamom.bias.sparse import Sparse
from metamom.bias.spelling import Row, spelled


def top_k_levels(gradient: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ladder ``C^l = Top-(l K)`` of one vector: its entries by falling magnitude, K a level.

    Args:
        gradient: ``[d]``, finite.
        k: K, 1 <= k <= d.

    Returns:
        ``(order [d], norms [L])``: the indices by falling magnitude, those of equals in order, of which level l has
        ``order[l K : (l+1) K]``; and the norms of the differences, in float64 and units of the largest magnitude.
    """
    magnitude, order = gradient.abs().sort(descending=True, stable=True)
    wide = magnitude.double() / magnitude[0].double().clamp_min(torch.finfo(torch.float64).tiny)
    padded = torch.nn.functional.pad(wide, (0, -len(wide) % k))
    return order, torch.linalg.vector_norm(padded.view(-1, k), dim=1)


@spelled(
    "mlmc:topk",
    "K entries of a random level, unbiased",
    Row("`mlmc:topk:1%`", "`MLMCTopK(ratio=...)`", "unbiased, ω ≤ ⌈d/K⌉ − 1", "8K"),
    Row("`mlmc:topk:1%:geometric=0.9`", "`MLMCTopK(ratio=..., geometric=0.9)`", "unbiased, ω from its constants", "8K"),
    argument="K",
    number=int,
    share=True,
    options=("geometric", "tensor", "seed"),
)
class MLMCTopK(Sparse, MLMC):
    """Send K entries of each worker's gradient, of one random level of its Top-K ladder; unbiased.

    Level l has the entries with places ``(l-1) K + 1`` to ``l K`` by magnitude, the last level what is left. Level l is
    sent with probability ``p_l``, divided by it. With adaptive ``p_l`` proportional to the norm ``||D_l||`` of its
    entries, ``E ||C(g)||^2 = (sum_l ||D_l||)^2``. With d/K levels that is at most ``d/K ||g||^2``, as for Rand-K times
    d/K (at equal magnitudes), and near ``||g||^2`` if few entries have most of the norm. K = 1 is importance sampling:
    entry j with probability ``|g_j| / ||g||_1``, which arrives as ``sign(g_j) ||g||_1``.

    Args:
        k: number of entries of a level, >= 1; or
        ratio: their share, 0 < ratio <= 1: ``K = max(1, round(ratio * d))``.
        geometric: the ratio of fixed probabilities ``p_l`` proportional to ``ratio^l``; ``None`` for adaptive ones.
        per_tensor: a ladder for each parameter tensor's part.
        seed: seed of the workers' counter-based draws.
        generator: draw from this generator instead, in the order of calls; its state is saved with a run.

    Raises:
        ValueError: unless exactly one of k and ratio is given and in range; for a ratio of probabilities out of range;
            when called, if K > d, or if a probability is too small for float64.

    Example:
        >>> operator = MLMCTopK(k=1)
        >>> g = torch.tensor([3.0, -1.0, 0.0, 0.0])
        >>> sorted({tuple(operator(g, step=step).tolist()) for step in range(20)})
        [(0.0, -4.0, 0.0, 0.0), (4.0, 0.0, 0.0, 0.0)]

    Reference:
        docs/theory/operators.md; Zukerman, Hamoud, Levy, ICML 2025, arXiv 2507.05508.
    """

    def __init__(
        self,
        k: int | None = None,
        *,
        ratio: float | None = None,
        geometric: float | None = None,
        per_tensor: bool = False,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(k, ratio, per_tensor)
        self._fixed(geometric)
        self._seeded(seed, generator)

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        k, out = self.kept(rows.shape[1]), torch.zeros_like(rows)
        # one row after another: the order of a sum, and so the level, must not depend on the other workers
        for row, sent, uniform in zip(rows, out, self._uniform(at, rows, 1)[:, 0].tolist(), strict=True):
            order, norms = top_k_levels(row, k)
            chances = self._probabilities(norms)
            level = draw_level(chances, uniform)
            kept = order[level * k : (level + 1) * k]
            sent[kept] = (row[kept].double() / chances[level]).to(row.dtype)
        return self._in_range(out)

    def _omega(self, d: int) -> float:
        """The second moment is largest where all magnitudes are equal."""
        k = self.kept(d)
        sizes = torch.tensor([min(k, d - start) for start in range(0, d, k)], dtype=torch.float64)
        if self.geometric is None:
            return max(0.0, float(sizes.sqrt().sum().square()) / d - 1)
        return max(0.0, float((sizes / geometric(self.geometric, len(sizes))).sum()) / d - 1)

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return "a larger K"

    @property
    def spec(self) -> str:
        """``mlmc:topk:K`` or ``mlmc:topk:P%``, then its options."""
        return ":".join([f"mlmc:topk:{self.amount}", *self._words])
