"""Robust alternatives to the mean, which a few bad workers cannot move far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metamom.bias.norms import scaled_norm
from metamom.common.choices import Aggregate as Aggregate
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import counted, real, shown

# Limits of Weiszfeld's iteration for the geometric median, and its tolerance: the step relative to the spread.
ITERATIONS = 1000  # starting close to a vector is slow: seven points in four dimensions needed 200
EVERY = 4  # steps between two extrapolations
TOLERANCE = 1e-9


def robust_mean(vectors: Tensor, how: Aggregate = "mean") -> Tensor:
    """Combine n vectors into one.

    Args:
        vectors: ``[n, d]``.
        how: ``"mean"``; ``"median"``, entrywise, the mean of the middle two if n is even; ``"trimmed:0.1"``, the
            entrywise mean without the ``floor(0.1 n)`` smallest and as many largest values; ``"geomedian"``, the point
            with the smallest sum of distances to the n vectors.

    Returns:
        ``[d]``.

    Raises:
        ValueError: for another spelling.

    Example:
        >>> robust_mean(torch.tensor([[1.0], [2.0], [90.0]]), "median")
        tensor([2.])

    Reference:
        Yin, Chen, Ramchandran, Bartlett, "Byzantine-robust distributed learning", 2018 (median, trimmed mean);
        Weiszfeld, 1937, and Vardi, Zhang, 2000 (geometric median). docs/theory/sources.md bounds their bias.
    """
    share = check_aggregate(how)
    if how == "mean":
        return vectors.mean(0)
    if how == "geomedian":
        return geometric_median(vectors)
    n = len(vectors)
    cut = (n - 1) // 2 if how == "median" else _trimmed(share, n)
    return vectors.sort(dim=0).values[cut : n - cut].mean(0)


def check_aggregate(how: Aggregate, workers: int | None = None) -> float:
    """Check ``how``, and return the share that it trims on each side; 0 if it does not trim.

    Args:
        how: ``"mean"``, ``"median"``, ``"trimmed:SHARE"`` or ``"geomedian"``.
        workers: n, to check that at least one of them is trimmed.

    Raises:
        TypeError: for anything but a string.
        ValueError: for an unknown ``how``, or a share that trims no worker.
    """
    if not isinstance(how, str):
        raise TypeError(f"aggregate is a name, mean, median, geomedian or trimmed:SHARE; got {how!r}.")
    name, colon, share = how.partition(":")
    if how in ("mean", "median", "geomedian"):
        return 0.0
    try:
        value = real(share)
    except ValueError:
        value = math.nan
    if name != "trimmed" or not colon or not 0 < value < 0.5:
        raise ValueError(
            "aggregate must be mean, median, geomedian or trimmed:SHARE with 0 < SHARE < 0.5; got "
            f"{shown(how)}{did_you_mean([name], ('mean', 'median', 'geomedian', 'trimmed')) or '.'}"
        )
    if workers is not None and _trimmed(value, workers) == 0:
        raise ValueError(
            f"{how} of {counted(workers, 'worker')} leaves out none of them and is the mean: take a larger share, or "
            "more workers."
        )
    return value


def _trimmed(share: float, n: int) -> int:
    """How many of n values are trimmed on each side."""
    return math.floor(share * n * (1 + 1e-12))  # 0.29 * 100 is 28.999999999999996


def geometric_median(vectors: Tensor) -> Tensor:
    """``argmin_y sum_i ||x_i - y||`` of ``[n, d]``, by Weiszfeld's iteration with Vardi and Zhang's step at a vector.

    Reference:
        Vardi, Zhang, "The multivariate L1-median and associated data depth", 2000.
    """
    x = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    # a start and a scale that one far outlier cannot move, unlike the mean and the mean distance
    y = robust_mean(x, "median")
    near = max(TOLERANCE, torch.finfo(x.dtype).eps) * _distances(x - y).median()
    before: Tensor | None = None
    for number in range(ITERATIONS):
        step = _step(x - y, near)
        leap = _leap(x, y, before, step) if number % EVERY == 0 and before is not None else step
        y, before = y + leap, step if leap is step else None
        if bool(torch.linalg.vector_norm(step) <= near):
            break
    # convergence to one of the vectors is slow: return the nearest vector if it is the median itself
    nearest = x[_distances(x - y).argmin()]
    return (y if bool(_step(x - nearest, near).any()) else nearest).to(vectors.dtype)


def _leap(x: Tensor, y: Tensor, before: Tensor, step: Tensor) -> Tensor:
    """Extrapolate all further steps from the rate at which steps shrink, if that gets closer; else take the step.

    Along a valley the iteration is slow: with two pairs of vectors far apart, each step is 0.999 of the last.
    """
    shrinking = float((before @ step) / (before @ before).clamp_min(torch.finfo(step.dtype).tiny))
    if not 0 < shrinking < 1:
        return step
    leap = step / (1 - shrinking)
    nearer = _distances(x - (y + leap)).sum() < _distances(x - (y + step)).sum()
    return leap if bool(nearer) else step


def _step(away: Tensor, near: Tensor) -> Tensor:
    """The step from a point, given its differences ``[n, d]`` to each vector; zero at the geometric median."""
    distances = _distances(away)
    here = distances <= near
    weights = torch.where(here, 0, 1 / distances.clamp_min(torch.finfo(away.dtype).tiny))
    total = weights.sum()
    if not bool(total > 0):
        return torch.zeros_like(away[0])  # all vectors coincide
    pull = weights @ away
    step = pull / total
    if bool(here.any()):  # at a vector: it resists the step by its multiplicity
        strength = torch.linalg.vector_norm(pull)
        step = step * (1 - here.sum() / strength).clamp_min(0) if bool(strength > 0) else 0 * step
    return step


def _distances(away: Tensor) -> Tensor:
    """Norms ``[n]`` of ``[n, d]``."""
    _, scale, norm = scaled_norm(away)
    return (scale * norm).squeeze(-1)
