"""Where workers on a graph end, of which each task's mean gradient is affine: momentum with averaging, and tracking.

With tracking (`metamom.decentral`), weights that stay have ``y = W y`` and ``x = W (x - lr y)``. So y is equal on all
workers, its mean is zero, hence y = 0 and x is equal on all workers. The mean of the y_i is that of the m_i, so the
mean of the biased gradients at x is zero: `fixed_points.bias_floor` has x and its floor, the same as with a server.

If the bias is constant, ``g_i = grad f_i + b_i``, the squared gradient norm there is ``||mean b||^2``: no floor if the
b_i sum to zero, however much workers differ. If it is relative, ``g_i = (I + D_i) grad f_i``, the floor is that of
``mean (D_i grad f_i)``: zero if all D_i are equal or all workers have the same optimum, and otherwise not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metamom.theory.fixed_points import AffineMean


def untracked_points(means: Sequence[AffineMean], thetas: Tensor, mixing: Tensor, lr: float) -> Tensor:
    """The fixed point of momentum with averaging but without tracking: ``x_i = sum_j W_ij (x_j - lr g_j(x_j))``.

    It is the same for every beta. It depends on lr, unless the graph is complete, or every worker's gradient is zero at
    the same point.

    Args:
        means: the mean gradients of the n workers, biased or not.
        thetas: their optima, ``[n, d]``.
        mixing: W, ``[n, n]``, rows and columns of which sum to one.
        lr: the step size, > 0.

    Returns:
        The weights of each worker, ``[n, d]`` float64.

    Raises:
        ValueError: if the numbers of means, optima and rows differ, or for an lr out of range.
        torch.linalg.LinAlgError: if there is no unique fixed point.

    Example:
        >>> eye, zero = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        >>> mixing = torch.full((2, 2), 0.5, dtype=torch.float64)
        >>> untracked_points([AffineMean(eye, zero)] * 2, torch.tensor([[0.0], [1.0]]), mixing, 0.1)
        tensor([[0.5000],
                [0.5000]], dtype=torch.float64)

    Reference: this module's docstring; Yuan, Ling, Yin (2016), on the convergence of decentralized gradient descent.
    """
    n = len(means)
    if n == 0 or thetas.dim() != 2 or len(thetas) != n or mixing.shape != (n, n):
        raise ValueError(
            f"{n} workers need optima [{n}, d] and a mixing matrix [{n}, {n}]; got shapes {tuple(thetas.shape)} and "
            f"{tuple(mixing.shape)}."
        )
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be > 0 and finite; got {lr!r}.")
    d = thetas.shape[1]
    weights, optima = mixing.double(), thetas.double()
    gains = torch.block_diag(*[mean.gain.double() for mean in means])  # type: ignore[no-untyped-call]
    pulls = torch.stack([m.gain.double() @ o - m.offset.double() for m, o in zip(means, optima, strict=True)])
    whole = torch.kron(weights, torch.eye(d, dtype=torch.float64))
    left = torch.eye(n * d, dtype=torch.float64) - whole + lr * whole @ gains
    points: Tensor = torch.linalg.solve(left, lr * (weights @ pulls).flatten())
    return points.view(n, d)
