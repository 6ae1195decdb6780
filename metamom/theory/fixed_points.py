"""The fixed point of momentum if each task's mean meta-gradient is affine in the weights: exact, for every beta.

Legend: n tasks in d dimensions, means ``E[g_i(w)] = G_i (w - theta_i) + o_i`` (`regression`, `quadratic`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamom.common.numbers import counted, plural


class AffineMean(NamedTuple):
    """The mean of a meta-gradient as a function of ``delta = w - theta``, where theta is the task's optimum.

    Attributes:
        gain: ``[d, d]``.
        offset: ``[d]``.
    """

    gain: Tensor
    offset: Tensor

    def at(self, delta: Tensor) -> Tensor:
        """``gain delta + offset``: ``[..., d] -> [..., d]``."""
        return delta.to(self.gain.dtype) @ self.gain.T + self.offset


def linear(gain: Tensor) -> AffineMean:
    """A mean with gain ``[d, d]`` and without an offset."""
    return AffineMean(gain, torch.zeros(len(gain), dtype=gain.dtype))


class Floor(NamedTuple):
    """The effect of a biased estimator on a mean over tasks.

    Attributes:
        optimum: w*, the point where the gradient of f is zero, ``[d]``.
        end: the point where the mean estimate is zero, ``[d]``; the limit of ``E[w_k]`` for any beta and stable gamma.
        floor: ``||grad f(end)||^2``.
        bias_sq: squared bias at w*.
        kappa: ``||R Q^{-1}||``: the bias is at most ``kappa ||grad f(w)|| + sqrt(bias_sq)``.
        zeta2: ``1/n sum ||grad f_i(w*)||^2``, heterogeneity at the optimum.
    """

    optimum: Tensor
    end: Tensor
    floor: float
    bias_sq: float
    kappa: float
    zeta2: float

    @property
    def bound(self) -> float:
        """Theorem 1A's bound on the floor, ``bias_sq / (1 - kappa)^2``; infinite for kappa >= 1."""
        return self.bias_sq / (1 - self.kappa) ** 2 if self.kappa < 1 else float("inf")


def fixed_point(means: Sequence[AffineMean], thetas: Tensor) -> Tensor:
    """The point where the mean over the tasks' means is zero.

    ``w = (mean G_i)^{-1} mean (G_i theta_i - o_i)``.

    Args:
        means: the means of the n tasks.
        thetas: their optima, ``[n, d]``.

    Returns:
        w, ``[d]``, float64.

    Raises:
        ValueError: if the numbers of means and optima differ.
        torch.linalg.LinAlgError: if the mean gain is singular.

    Example:
        >>> eye, zero = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> fixed_point([AffineMean(eye, zero), AffineMean(3 * eye, zero)], torch.tensor([[0.0], [1.0]]))
        tensor([0.7500], dtype=torch.float64)

    Reference: docs/theory/maml.md, "Fixed points of tasks that differ".
    """
    gain, pull = _mean(means, thetas)
    end: Tensor = torch.linalg.solve(gain, pull)
    return end


def bias_floor(exact: Sequence[AffineMean], biased: Sequence[AffineMean], thetas: Tensor) -> Floor:
    """The optimum, the point where a biased estimator ends instead, and the remaining gradient there.

    The mean estimate is affine in w, and so is the recursion of the mean weights. They converge to ``end`` for every
    beta and every stable gamma, with or without noise. To see it, average iterates or many runs.

    Args:
        exact: the tasks' gradients, n of them (`regression.population`, `quadratic.population`).
        biased: the means of the estimator, n of them.
        thetas: the tasks' optima, ``[n, d]``.

    Raises:
        ValueError: if the numbers of tasks differ.
        torch.linalg.LinAlgError: if a mean gain is singular.

    Example:
        >>> eye, zero = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> truth = [AffineMean(eye, zero), AffineMean(eye, zero)]
        >>> floor = bias_floor(truth, [truth[0], AffineMean(3 * eye, zero)], torch.tensor([[0.0], [1.0]]))
        >>> floor.end, floor.floor
        (tensor([0.7500], dtype=torch.float64), 0.0625)

    Reference: docs/theory/maml.md, "Fixed points of tasks that differ".
    """
    if len(exact) != len(biased):
        raise ValueError(f"each task needs an exact and a biased mean; got {len(exact)} and {len(biased)}.")
    gain, pull = _mean(exact, thetas)
    optimum = torch.linalg.solve(gain, pull)
    end = fixed_point(biased, thetas)
    biased_gain, biased_pull = _mean(biased, thetas)
    bias = biased_gain @ optimum - biased_pull  # the gradient is zero at the optimum
    relative = torch.linalg.solve(gain, biased_gain - gain, left=False)  # R Q^{-1}
    each = [mean.at(optimum - theta) for mean, theta in zip(exact, thetas.to(gain.dtype), strict=True)]
    return Floor(
        optimum=optimum,
        end=end,
        floor=float((gain @ end - pull).square().sum()),
        bias_sq=float(bias.square().sum()),
        kappa=float(torch.linalg.matrix_norm(relative, 2)),
        zeta2=float(torch.stack(each).square().sum(-1).mean()),
    )


def _mean(means: Sequence[AffineMean], thetas: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and pull of the tasks' mean, ``gain w - pull``."""
    if len(means) == 0 or thetas.dim() != 2 or len(means) != len(thetas):
        needs = f"{counted(len(means), 'task')} {plural(len(means), 'needs', 'need')}"
        raise ValueError(f"{needs} optima thetas [{len(means)}, d]; got shape {tuple(thetas.shape)}.")
    thetas = thetas.to(means[0].gain.dtype)
    pulls = [mean.gain @ theta - mean.offset for mean, theta in zip(means, thetas, strict=True)]
    return torch.stack([mean.gain for mean in means]).mean(0), torch.stack(pulls).mean(0)
