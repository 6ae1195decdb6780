"""Random quadratics: tasks with a loss that is a noisy quadratic function of the model's output.

A point of a task is a noisy observation of its loss L(p) = ½(p - c)^T A (p - c) on R^d. Its input is always 1, so the
simplest model is a point w of R^d: ``torch.nn.Linear(1, d, bias=False)``. Its target is the observation, a matrix
``[d, d + 2]`` with columns (Hessian A + E, minimiser c, slope ν).

Legend: T tasks, n given tasks, P points of one task, N points of a set.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.rng import DrawCoordinates, Floats, Purpose, uniforms
from metamom.tasks.checks import check_count, check_deviation, check_dtype
from metamom.tasks.given import GivenFamily, Values, described, described_range, given
from metamom.tasks.matrices import (
    check_spectrum,
    drawn_spectra,
    drawn_vectors,
    even,
    from_spectrum,
    gaussians,
    symmetric,
)


def quadratic_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """``mean of ½ (p - c)^T H (p - c) + ν^T (p - c)`` over points: gradient ``H(p - c) + ν`` and Hessian H at each.

    Args:
        predictions: p, ``[N, d]``.
        targets: ``[N, d, d + 2]``, for each point the columns of a symmetric H, then c, then ν, as from `Quadratic`.

    Returns:
        A 0-d loss; it may be negative.

    Raises:
        ValueError: for other shapes.

    Example:
        >>> H, c, slope = torch.eye(2), torch.zeros(2, 1), torch.zeros(2, 1)
        >>> quadratic_loss(torch.tensor([[2.0, 0.0]]), torch.cat([H, c, slope], 1)[None])
        tensor(2.)
    """
    d = predictions.shape[-1]
    if targets.shape != (*predictions.shape, d + 2):
        raise ValueError(
            f"quadratic_loss needs predictions [N, d] and targets [N, d, d + 2]; got {list(predictions.shape)} and "
            f"{list(targets.shape)}. The model must predict the family's dim numbers, as "
            f"torch.nn.Linear(1, dim, bias=False) does."
        )
    hessian, center, slope = targets[..., :d], targets[..., d], targets[..., d + 1]
    delta = predictions - center
    gradient = 0.5 * (hessian @ delta[..., None])[..., 0] + slope
    return (delta * gradient).sum(-1).mean()


class Quadratic(GivenFamily):
    """Tasks ``L_i(w) = ½ (w - c_i)^T A_i (w - c_i)``, with noise in gradients and Hessians.

    At each point the gradient is ``(A_i + E)(w - c_i) + ν`` and the Hessian ``A_i + E``, with ``ν ~ N(0, s_ν² I)`` and
    a symmetric Gaussian E (GOE): entries of variance s_E² off the diagonal, 2 s_E² on it. With `quadratic_loss`, the
    model ``torch.nn.Linear(1, dim, bias=False)``, M = I - αA and δ = w - c, the exact meta-gradient of a task is
    ``A M^(2J) δ``. The usual one with J = 1, from m support points, has the bias ``(α² s_E²/m)(A + tr(A) I)δ``, which
    does not depend on ν.

    Parameters that aren't given are drawn for each task. Values are computed in float64 and then rounded to ``dtype``.

    Args:
        dim: d, >= 1.
        shots: support points a task, >= 1.
        queries: query points a task, >= 1.
        hessian: A, ``[d, d]`` for all tasks or ``[n, d, d]``, symmetric, of any eigenvalues; I by default.
        spectrum: range of the eigenvalues of random A_i: uniform, in directions uniform over all rotations.
        center: c, ``[d]`` for all tasks or ``[n, d]``; by default Gaussian, each entry with ``center_std``.
        center_std: standard deviation of the entries of drawn c_i, >= 0.
        gradient_noise: s_ν, >= 0.
        hessian_noise: s_E, >= 0.
        seed: 0 <= seed < 2^64.
        dtype: of all four tensors.

    Attributes:
        given: n, the number of tasks given; task t of a meta-batch is then number t mod n. Else ``None``.

    Returns (from `sample`):
        ``x: [T, shots or queries, 1]``, all ones; ``y: [T, shots or queries, d, d + 2]``, see `quadratic_loss`.

    Raises:
        ValueError: for an argument of the wrong shape or out of range; from `sample`, for a number of tasks that n
            doesn't divide.

    Example:
        >>> from metamom import MAML
        >>> learner = MAML(torch.nn.Linear(1, 3, bias=False), quadratic_loss, inner_lr=0.1)
        >>> grads, _ = learner.meta_gradient(Quadratic(3, gradient_noise=0.5).sample(0, 8))
        >>> grads["weight"].shape
        torch.Size([1, 3, 1])

    Reference:
        The bias is α² E[Ē A Ē]δ with Ē the mean of m matrices E; multiplied out, entry by entry, independent entries
        of the variances above give E[E A E] = s_E²(A + tr(A) I).
    """

    def __init__(
        self,
        dim: int,
        shots: int = 10,
        queries: int = 10,
        *,
        hessian: Values | None = None,
        spectrum: tuple[float, float] | None = None,
        center: Values | None = None,
        center_std: float = 1.0,
        gradient_noise: float = 0.0,
        hessian_noise: float = 0.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dim = check_count("dim", dim)
        self.shots, self.queries = check_count("shots", shots), check_count("queries", queries)
        self.center_std = check_deviation("center_std", center_std)
        self.gradient_noise = check_deviation("gradient_noise", gradient_noise)
        self.hessian_noise = check_deviation("hessian_noise", hessian_noise)
        self.hessian, self.center = given("hessian", hessian, dim, dim), given("center", center, dim)
        check_spectrum(spectrum, given=self.hessian, name="hessian")
        if self.hessian is not None:
            symmetric("hessian", self.hessian)
        self.spectrum, self.dtype = spectrum, check_dtype(dtype)
        super().__init__({"hessian": self.hessian, "center": self.center}, seed=seed)

    def parameters(self, tasks: DrawCoordinates) -> tuple[Floats, Floats]:
        """c ``[T, d]`` and A ``[T, d, d]`` of the tasks at these coordinates."""
        if self.center is None:
            center = self.center_std * drawn_vectors(self.seed, tasks, self.dim)
        else:
            center = self.of_tasks(self.center, tasks)
        if self.spectrum is not None:
            return center, from_spectrum(*drawn_spectra(self.seed, tasks, self.dim, self.spectrum))
        return center, self.of_tasks(np.eye(self.dim)[None] if self.hessian is None else self.hessian, tasks)

    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """See `TaskFamily.draw`. A task's identity is its c and A."""
        center, hessian = self.parameters(tasks)
        points, d = self.shots + self.queries, self.dim
        slopes, entries = self._noise(data, points)
        y = np.empty((len(center), points, d, d + 2))
        y[..., :d] = hessian[:, None]
        if entries is not None:
            y[..., :d] += self.hessian_noise * (entries + entries.swapaxes(-1, -2)) / math.sqrt(2)
        y[..., d] = center[:, None]
        y[..., d + 1] = 0.0 if slopes is None else self.gradient_noise * slopes
        y_all, s = torch.from_numpy(y).to(self.dtype), self.shots
        x_all = torch.ones(len(center), points, 1, dtype=self.dtype)
        return TaskBatch(x_all[:, :s], y_all[:, :s], x_all[:, s:], y_all[:, s:])

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. Large arrays are described by shape and digest."""
        return {
            "family": "Quadratic",
            "dim": self.dim,
            "shots": self.shots,
            "queries": self.queries,
            "hessian": described(self.hessian),
            "spectrum": described_range(self.spectrum),
            "center": described(self.center),
            "center_std": self.center_std,
            "gradient_noise": self.gradient_noise,
            "hessian_noise": self.hessian_noise,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _noise(self, data: DrawCoordinates, points: int) -> tuple[Floats | None, Floats | None]:
        """Standard normal slopes ``[T, P, d]`` and entries ``[T, P, d, d]``, each ``None`` without its noise."""
        d = self.dim
        first = even(points * d)  # also without noise, so that one noise does not change the other
        second = even(points * d * d) if self.hessian_noise else 0
        if not self.gradient_noise and not self.hessian_noise:
            return None, None
        u = uniforms(self.seed, data, Purpose.DATA, first + second)
        slopes = gaussians(u[:, :first], points * d).reshape(-1, points, d) if self.gradient_noise else None
        entries = gaussians(u[:, first:], points * d * d).reshape(-1, points, d, d) if self.hessian_noise else None
        return slopes, entries
