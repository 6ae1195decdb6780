"""Linear regression with random design, a family with a closed form for the meta-gradient and its bias.

Legend: T tasks, n given tasks, P points of one task, N points of a finite data set, d = dim features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.checks import check_flag
from metamom.rng import DrawCoordinates, Floats, Purpose, choose, uniforms
from metamom.tasks.checks import check_count, check_deviation, check_dtype
from metamom.tasks.given import GivenFamily, Values, as_numpy, described, described_range, given
from metamom.tasks.matrices import (
    check_spectrum,
    drawn_spectra,
    drawn_vectors,
    even,
    from_spectrum,
    gaussians,
    products,
    square_root,
)


def half_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """``½ mean (prediction - target)²``, a loss without a factor of 2 in its gradient and Hessian.

    The closed forms of linear regression hold for this loss. `torch.nn.functional.mse_loss` is twice as large: for it,
    evaluate every formula at 2α instead of α, and multiply by 2.

    Args:
        predictions: any shape, of finite numbers.
        targets: the same shape.

    Returns:
        A 0-d loss.

    Raises:
        ValueError: for different shapes.

    Example:
        >>> half_squared_error(torch.tensor([[3.0]]), torch.tensor([[1.0]]))
        tensor(2.)
    """
    if predictions.shape != targets.shape:
        raise ValueError(
            f"half_squared_error needs predictions and targets of one shape; got {list(predictions.shape)} and "
            f"{list(targets.shape)}. Targets of linear regression are [N, 1], as torch.nn.Linear(d, 1) predicts."
        )
    return 0.5 * (predictions - targets).square().mean()


class LinearRegression(GivenFamily):
    """Tasks ``y = φ^T θ_i + noise`` with Gaussian features ``φ ~ N(0, Σ_i)``, or with the points of a data set.

    With `half_squared_error`, the model ``torch.nn.Linear(dim, 1, bias=False)`` and δ = w - θ, the exact meta-gradient
    of a task is ``(I - αΣ) Σ (I - αΣ) δ``, and the usual one, from m support points, has the bias
    ``(α²/m)(Σ³ + tr(Σ²)Σ) δ``.

    Parameters that aren't given are drawn for each task. Points of a task are independent, and so are support and query
    sets. Values are computed in float64 and then rounded to ``dtype``.

    Args:
        dim: d, number of features, >= 1.
        shots: support points a task, >= 1.
        queries: query points a task, >= 1.
        covariance: Σ, ``[d, d]`` for all tasks or ``[n, d, d]``, symmetric and positive semidefinite; I by default.
        spectrum: range of the eigenvalues of random Σ_i: uniform, in directions uniform over all rotations.
        theta: θ, ``[d]`` for all tasks or ``[n, d]``; by default Gaussian, each entry with ``theta_std``.
        theta_std: standard deviation of the entries of drawn θ_i, >= 0.
        noise: standard deviation of Gaussian noise on y, >= 0.
        data: ``(features [N, d], labels [N])`` to draw points from, or ``([n, N, d], [n, N])``, a set for each task.
        replacement: draw a data set's points with replacement within a support or query set. Without replacement the
            two sets are still independent, and ``shots=N`` takes every point once, but halves of a set are dependent.
        seed: 0 <= seed < 2^64.
        dtype: of all four tensors.

    Attributes:
        given: n, the number of tasks given; task t of a meta-batch is then number t mod n. Else ``None``.

    Returns (from `sample`):
        ``x: [T, shots or queries, d]``, ``y: [T, shots or queries, 1]``.

    Raises:
        ValueError: for an argument of the wrong shape or out of range, for distributions together with data, or more
            points without replacement than exist; from `sample`, for a number of tasks that n doesn't divide.

    Example:
        >>> two = LinearRegression(2, 5, covariance=[np.eye(2), np.eye(2) / 4], theta=[[1, 0], [0, 1]])
        >>> two.sample(0, 2).support_x.shape
        torch.Size([2, 5, 2])

    Reference:
        The bias is α²(E[ŜΣŜ] - Σ³)δ with Ŝ the mean of m products φφ^T, and of Gaussian ones
        E[φφ^T Σ φφ^T] = 2Σ³ + tr(Σ²)Σ (Isserlis, "On a formula for the product-moment coefficient", 1918).
    """

    def __init__(
        self,
        dim: int,
        shots: int,
        queries: int = 10,
        *,
        covariance: Values | None = None,
        spectrum: tuple[float, float] | None = None,
        theta: Values | None = None,
        theta_std: float = 1.0,
        noise: float = 0.0,
        data: tuple[Values, Values] | None = None,
        replacement: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dim = check_count("dim", dim)
        self.shots, self.queries = check_count("shots", shots), check_count("queries", queries)
        self.theta_std, self.noise = check_deviation("theta_std", theta_std), check_deviation("noise", noise)
        self.covariance, self.theta = given("covariance", covariance, dim, dim), given("theta", theta, dim)
        check_spectrum(spectrum, given=self.covariance, name="covariance")
        self.spectrum = spectrum
        self.features: Floats | None = None
        self.labels: Floats | None = None
        if data is not None:
            self.features, self.labels = _data_set(data, dim)
        elif not replacement:
            raise ValueError("replacement=False needs a data set; pass data=(features, labels) with it.")
        self.replacement, self.dtype = check_flag("replacement", replacement), check_dtype(dtype)
        arrays = {"covariance": self.covariance, "theta": self.theta, "data": self.features}
        super().__init__(arrays, seed=seed)
        if self.features is not None:
            self._check_data(self.features.shape[1])
        self._root = None if self.covariance is None else square_root("covariance", self.covariance)

    def parameters(self, tasks: DrawCoordinates) -> tuple[Floats, Floats]:
        """θ ``[T, d]`` and Σ ``[T, d, d]`` of the tasks at these coordinates.

        For a data set they are the least squares solution of minimum norm and the mean of φφ^T.
        """
        if self.features is not None and self.labels is not None:
            x, y = self.of_tasks(self.features, tasks), self.of_tasks(self.labels, tasks)
            sigma = x.swapaxes(1, 2) @ x / x.shape[1]
            return (np.linalg.pinv(x) @ y[..., None])[..., 0], sigma
        if self.spectrum is not None:
            return self._thetas(tasks), from_spectrum(*drawn_spectra(self.seed, tasks, self.dim, self.spectrum))
        sigma = np.eye(self.dim)[None] if self.covariance is None else self.covariance
        return self._thetas(tasks), self.of_tasks(sigma, tasks)

    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """See `TaskFamily.draw`. A task's identity is its θ and Σ, or its data set."""
        x, y = self._points(tasks, data) if self.features is None else self._points_of_data(tasks, data)
        x_all, y_all = (torch.from_numpy(values).to(self.dtype) for values in (x, y[..., None]))
        s = self.shots
        return TaskBatch(x_all[:, :s], y_all[:, :s], x_all[:, s:], y_all[:, s:])

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. Large arrays are described by shape and digest."""
        return {
            "family": "LinearRegression",
            "dim": self.dim,
            "shots": self.shots,
            "queries": self.queries,
            "covariance": described(self.covariance),
            "spectrum": described_range(self.spectrum),
            "theta": described(self.theta),
            "theta_std": self.theta_std,
            "noise": self.noise,
            "data": None if self.features is None else [described(self.features), described(self.labels)],
            "replacement": self.replacement,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _thetas(self, tasks: DrawCoordinates) -> Floats:
        if self.theta is not None:
            return self.of_tasks(self.theta, tasks)
        return self.theta_std * drawn_vectors(self.seed, tasks, self.dim)

    def _points(self, tasks: DrawCoordinates, data: DrawCoordinates) -> tuple[Floats, Floats]:
        """Gaussian features ``[T, P, d]`` and labels ``[T, P]``."""
        points = self.shots + self.queries
        entries = points * self.dim
        # Draw noise after the features, so that adding noise does not change any point.
        u = uniforms(self.seed, data, Purpose.DATA, even(entries) + (even(points) if self.noise else 0))
        x = gaussians(u[:, : even(entries)], entries).reshape(-1, points, self.dim)
        if self.spectrum is not None:
            eigenvalues, vectors = drawn_spectra(self.seed, tasks, self.dim, self.spectrum)
            x = x @ from_spectrum(np.sqrt(eigenvalues), vectors)
        elif self._root is not None:
            x = x @ self.of_tasks(self._root, tasks)
        y = products(x, self._thetas(tasks))
        if self.noise:
            y = y + self.noise * gaussians(u[:, even(entries) :], points)
        return x, y

    def _points_of_data(self, tasks: DrawCoordinates, data: DrawCoordinates) -> tuple[Floats, Floats]:
        """Features ``[T, P, d]`` and labels ``[T, P]`` from the data set."""
        assert self.features is not None
        assert self.labels is not None
        size = self.features.shape[1]
        u = uniforms(self.seed, data, Purpose.DATA, self.shots + self.queries)
        if self.replacement:
            rows = (u * size).astype(np.int64)
        else:
            rows = np.concatenate([choose(part, size) for part in (u[:, : self.shots], u[:, self.shots :])], axis=1)
        which = (tasks.indices % len(self.features))[:, None]
        return self.features[which, rows], self.labels[which, rows]

    def _check_data(self, size: int) -> None:
        beside = {
            "covariance": self.covariance is not None,
            "spectrum": self.spectrum is not None,
            "theta": self.theta is not None,
            "noise": self.noise != 0,
        }
        if any(beside.values()):
            names = ", ".join(name for name, there in beside.items() if there)
            raise ValueError(f"points and labels come from data, or from a distribution; got data and {names}.")
        most = max(self.shots, self.queries)
        if not self.replacement and most > size:
            raise ValueError(
                f"without replacement a set has at most the data's N={size} points; got {most}. Use fewer shots or "
                f"queries, or replacement=True."
            )


def _data_set(data: tuple[Values, Values], dim: int) -> tuple[Floats, Floats]:
    """Features ``[1 or n, N, d]`` and labels ``[1 or n, N]``, as float64 copies."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise TypeError(f"data must be a pair, (features, labels); got {data!r:.80}.")
    features, labels = (np.array(as_numpy(values), dtype=np.float64) for values in data)
    if features.ndim not in (2, 3) or features.shape[-1] != dim or labels.shape != features.shape[:-1]:
        raise ValueError(
            f"data must be features [N, {dim}] and labels [N], or [n, N, {dim}] and [n, N] for n tasks; got "
            f"{list(features.shape)} and {list(labels.shape)}."
        )
    if not features.size:
        raise ValueError(f"data must have points; got features {list(features.shape)}.")
    x, y = given("features", features, *features.shape[-2:]), given("labels", labels, *labels.shape[-1:])
    assert x is not None
    assert y is not None
    return x, y
