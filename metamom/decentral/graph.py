"""Who exchanges with whom, and with which weights: mixing matrices and their spectral gaps.

Legend: n workers; ``W [n, n]`` float64, where ``W[i, j]`` is the weight with which worker i takes what j sends. Rows
and columns sum to one, so mixing leaves the workers' mean where it is.
"""

from __future__ import annotations

from math import cos, pi

import torch
from torch import Tensor

from metamom.common.checks import check_whole

MOST_WORKERS = 4096
TOLERANCE = 1e-9  # of sums of rows and columns, and of the gap


def metropolis(adjacency: Tensor) -> Tensor:
    """Metropolis weights: ``W_ij = 1 / (1 + max(deg_i, deg_j))`` for neighbours, and the rest on the diagonal.

    Each worker needs to know its neighbours' degrees only. W is symmetric, and its rows and columns sum to one.

    Args:
        adjacency: ``[n, n]``, symmetric; entry i, j is true or non-zero if i and j exchange messages. The diagonal is
            ignored.

    Returns:
        W, ``[n, n]`` float64.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: if it is not square or not symmetric, or if the graph is in several parts.

    Example:
        >>> metropolis(torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]])).mul(3).round()
        tensor([[2., 1., 0.],
                [1., 1., 1.],
                [0., 1., 2.]], dtype=torch.float64)

    Reference:
        Xiao, Boyd, Lall (2005), a scheme for robust distributed sensor fusion, section 4.
    """
    linked = _square("the adjacency", adjacency).bool().clone()
    if not torch.equal(linked, linked.T):
        raise ValueError("the adjacency must be symmetric: if i sends to j, j sends to i. Use a | a.T.")
    linked.fill_diagonal_(False)
    if not _in_one_part(linked):
        raise ValueError(
            "the graph is in several parts, which would never agree: add edges until every worker can be reached."
        )
    degree = linked.sum(1).double()
    weights = torch.where(linked, 1 / (1 + torch.maximum(degree[:, None], degree)), 0.0)
    weights.diagonal().copy_(1 - weights.sum(1))
    return weights


def ring(n: int) -> Tensor:
    """The mixing matrix of a ring: for n >= 3, weight 1/3 for each neighbour and for the worker itself.

    Args:
        n: number of workers, 1 <= n <= 4096. Two are a pair, with weights 1/2.

    Returns:
        W, ``[n, n]`` float64.

    Raises:
        TypeError, ValueError: for another n.

    Example:
        >>> ring(4).mul(3).round()
        tensor([[1., 1., 0., 1.],
                [1., 1., 1., 0.],
                [0., 1., 1., 1.],
                [1., 0., 1., 1.]], dtype=torch.float64)
    """
    return torus(1, n)


def torus(rows: int, columns: int) -> Tensor:
    """The mixing matrix of a grid with its ends joined: 1/5 for four neighbours and for the worker itself.

    Worker ``r * columns + c`` is at row r and column c. A side of two has one neighbour instead of two, a side of one
    has none, and the weights are ``1 / (1 + neighbours)``.

    Args:
        rows: >= 1.
        columns: >= 1; ``rows * columns`` is at most 4096.

    Returns:
        W, ``[n, n]`` float64, with ``n = rows * columns``.

    Raises:
        TypeError, ValueError: for other sides.

    Example:
        >>> int((torus(3, 3)[0] > 0).sum())
        5
    """
    n = _workers(rows, columns)
    at = torch.arange(n).view(rows, columns)
    linked = torch.zeros(n, n, dtype=torch.bool)
    for side in (0, 1):
        linked[at, at.roll(1, side)] = linked[at.roll(1, side), at] = True
    return metropolis(linked)


def complete(n: int) -> Tensor:
    """The mixing matrix of a graph in which all exchange with all: ``1/n`` everywhere, as with a server.

    Args:
        n: number of workers, 1 <= n <= 4096.

    Returns:
        W, ``[n, n]`` float64.

    Raises:
        TypeError, ValueError: for another n.

    Example:
        >>> complete(2)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """
    n = _workers(1, n)
    return torch.full((n, n), 1 / n, dtype=torch.float64)


def spectral_gap(mixing: Tensor) -> float:
    """``1 - ||W - J||``, where J averages: one step of mixing shrinks all differences by at least ``1 - gap``.

    Of a symmetric W it is one minus the second largest absolute eigenvalue. 1 means that one step averages exactly.

    Args:
        mixing: W, ``[n, n]``, rows and columns of which sum to one.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: if it is not square, or if a sum is not one.

    Example:
        >>> round(spectral_gap(ring(6)), 12)
        0.333333333333
    """
    weights = check_sums(mixing)
    return 1 - float(torch.linalg.matrix_norm(weights - 1 / len(weights), 2))


def ring_gap(n: int) -> float:
    """The spectral gap of `ring`: ``1 - (1/3 + 2/3 cos(2 pi / n))`` for n >= 3, about ``13 / n^2``; else 1.

    Raises:
        TypeError, ValueError: for n below 1 or above 4096.

    Example:
        >>> round(ring_gap(6), 12)
        0.333333333333
    """
    return torus_gap(1, n)


def torus_gap(rows: int, columns: int) -> float:
    """The spectral gap of `torus`: ``2/5 (1 - cos(2 pi / s))`` for sides >= 3, the longer of which is s.

    The eigenvalues are ``(1 + deg_r cos(2 pi a / r) + deg_c cos(2 pi b / c)) / (1 + deg_r + deg_c)``, where a side of
    1, 2 or more gives each worker 0, 1 or 2 neighbours.

    Raises:
        TypeError, ValueError: for sides below 1, or more than 4096 workers.

    Example:
        >>> round(torus_gap(4, 4), 12)
        0.4
    """
    _workers(rows, columns)
    degrees = [min(side, 3) - 1 for side in (rows, columns)]
    waves = [
        [degree * cos(2 * pi * k / side) for k in range(side)]
        for degree, side in zip(degrees, (rows, columns), strict=True)
    ]
    values = [(1 + up + along) / (1 + sum(degrees)) for up in waves[0] for along in waves[1]]
    return 1 - max((abs(value) for value in values[1:]), default=0.0)


def check_mixing(mixing: Tensor) -> Tensor:
    """Check a mixing matrix, and return it in float64.

    Weights may be negative, and W need not be symmetric: worker i receives from j where ``W[i, j]`` is not zero.

    Args:
        mixing: W, ``[n, n]``.

    Raises:
        TypeError: for anything but a tensor.
        ValueError: if it is not square, if a row or a column does not sum to one (to 1e-9), or if mixing would never
            bring all workers together.
    """
    weights = check_sums(mixing)
    gap = spectral_gap(weights)
    if not gap > TOLERANCE:
        raise ValueError(
            f"this mixing matrix never brings all workers together: its spectral gap is {gap:.3g}, and must be > 0. "
            "The graph may be in several parts, or no worker may keep a share of its own; metropolis(adjacency) makes "
            "weights that do."
        )
    return weights


def neighbours(mixing: Tensor) -> list[list[int]]:
    """For each worker, in order, the others from which it receives."""
    return [[j for j in row.nonzero().flatten().tolist() if j != i] for i, row in enumerate(mixing)]


def _square(name: str, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor [n, n]; got {type(matrix).__name__}.")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not 1 <= len(matrix) <= MOST_WORKERS:
        raise ValueError(f"{name} must be [n, n] with 1 <= n <= {MOST_WORKERS}; got shape {tuple(matrix.shape)}.")
    return matrix.detach().cpu()


def check_sums(mixing: Tensor) -> Tensor:
    """The matrix in float64. Raises an error for anything but a square tensor with sums of one."""
    weights = _square("the mixing matrix", mixing).double()
    for number, side in enumerate(("column", "row")):
        off = (weights.sum(number) - 1).abs()
        if not bool((off <= TOLERANCE).all()):  # NaN too
            first = int((~(off <= TOLERANCE)).nonzero()[0])
            raise ValueError(
                f"rows and columns of a mixing matrix sum to one, or the mean of the workers would drift; {side} "
                f"{first} sums to {float(weights.sum(number)[first]):.12g}. metropolis(adjacency) makes such weights."
            )
    return weights


def _in_one_part(linked: Tensor) -> bool:
    reached = torch.zeros(len(linked), dtype=torch.bool)
    reached[0] = True
    while True:
        more = reached | linked[reached].any(0)
        if torch.equal(more, reached):
            return bool(reached.all())
        reached = more


def _workers(rows: int, columns: int) -> int:
    """Their number on a grid, checked."""
    names = ("the number of workers",) if rows == 1 and type(rows) is int else ("rows", "columns")
    sides = (columns,) if len(names) == 1 else (rows, columns)
    for name, side in zip(names, sides, strict=True):
        check_whole(name, side, 1, MOST_WORKERS)
    return check_whole("the number of workers", rows * columns, 1, MOST_WORKERS)
