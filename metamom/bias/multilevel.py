"""Multilevel Monte Carlo (MLMC) compression: one random level of a ladder of compressors, which makes it unbiased.

Legend: a ladder ``C^0 = 0, C^1, ..., C^L = id``, the differences ``D_l = C^l(g) - C^{l-1}(g)``, which add up to g, and
the probabilities ``p_l`` of the levels l = 1..L. In code, levels are numbered from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates
from metamom.bias.draws import Draws
from metamom.common.checks import check_number
from metamom.common.numbers import short


def adaptive(norms: Tensor) -> Tensor:
    """The probabilities ``p_l = ||D_l|| / sum_m ||D_m||`` of the smallest second moment, ``(sum_l ||D_l||)^2``.

    Args:
        norms: ``[L]``, the differences' norms, >= 0.

    Returns:
        ``[L]``, which adds up to 1; uniform if all norms are zero.
    """
    total = norms.sum()
    return norms / total if float(total) > 0 else torch.full_like(norms, 1 / len(norms))


def geometric(ratio: float, levels: int) -> Tensor:
    """The probabilities ``p_l`` proportional to ``ratio^l``, whatever the gradient is.

    Args:
        ratio: 0 < ratio <= 1; 1 is uniform.
        levels: L >= 1.

    Returns:
        ``[L]`` float64, which adds up to 1.

    Raises:
        ValueError: if the last probability is too small for float64, since that level would never be sent.
    """
    powers = torch.full((levels,), ratio, dtype=torch.float64).pow(torch.arange(levels, dtype=torch.float64))
    if float(powers[-1]) == 0:
        raise ValueError(
            f"geometric={ratio:g} gives the last of {levels} levels the probability 0 in float64, so that the message "
            "is not unbiased: take a ratio nearer to 1, fewer levels, or adaptive probabilities."
        )
    return powers / powers.sum()


def second_moment(norms: Tensor, probabilities: Tensor) -> float:
    """``E ||C(g)||^2 = sum_l ||D_l||^2 / p_l``, over the levels whose difference is not zero.

    Args:
        norms: ``[L]``, the differences' norms.
        probabilities: ``[L]``.

    Example:
        >>> norms = torch.tensor([3.0, 1.0])
        >>> second_moment(norms, adaptive(norms)), second_moment(norms, geometric(1.0, 2))
        (16.0, 20.0)
    """
    sent = norms > 0
    return float((norms[sent].square() / probabilities[sent]).sum())


def draw_level(probabilities: Tensor, uniform: float) -> int:
    """The level, numbered from 0, that a uniform number on [0, 1) chooses. It never chooses a probability of 0."""
    cumulated = probabilities.double().cumsum(0)
    level = int((cumulated <= uniform * float(cumulated[-1])).sum())
    return min(level, int(probabilities.nonzero()[-1]))


class MLMC(Draws):
    """The base of `MLMCTopK` and `MLMCQSGD`: send ``D_l / p_l`` for one random level l of a ladder; unbiased.

    Args:
        geometric: the ratio of fixed probabilities ``p_l`` proportional to ``ratio^l``; ``None`` for adaptive ones,
            ``p_l`` proportional to ``||D_l||``. A message has the factor ``1/p_l`` in its values, so that neither level
            nor probability takes bytes.

    Raises:
        ValueError: for a ratio that is not in (0, 1]; when called, see `geometric`.

    Reference:
        Zukerman, Hamoud, Levy, "Beyond Communication Overhead: A Multilevel Monte Carlo Approach for Mitigating
        Compression Bias in Distributed Learning", ICML 2025, arXiv 2507.05508.
    """

    geometric: float | None

    def _fixed(self, ratio: float | None) -> None:
        if ratio is not None:
            check_number(f"{type(self).__name__}'s geometric", ratio)
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(
                f"{type(self).__name__} needs the ratio of the levels' probabilities, 0 < geometric <= 1, or None for "
                f"adaptive ones; got {ratio}."
            )
        self.geometric = None if ratio is None else float(ratio)

    def _probabilities(self, norms: Tensor) -> Tensor:
        """``[L]``, for the norms of the differences."""
        return adaptive(norms) if self.geometric is None else geometric(self.geometric, len(norms)).to(norms.device)

    def _uniform(self, at: Coordinates, rows: Tensor, count: int) -> Tensor:
        """Numbers ``[n, count]`` on [0, 1), on the CPU, for the rows ``[n, d]``."""
        return self._uniforms(at, len(rows), count, rows.device).cpu()

    @property
    def _words(self) -> list[str]:
        """The options in a SPEC."""
        chosen = [] if self.geometric is None else [f"geometric={short(self.geometric)}"]
        return [*chosen, *["tensor"] * self.per_tensor, *self._seed_word]
