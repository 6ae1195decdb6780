"""PowerSGD: each matrix of a gradient as a product of two thin ones, by one step of a power iteration.

Legend: a matrix ``M [a, b]`` with ``k = min(a, b)``; its factors ``P [a, r]``, with orthonormal columns, and
``Q [b, r]``; ``C(M) = P Q^T``. One worker sends L numbers: P and Q of each matrix, and the other tensors as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates, Sizes
from metamom.bias.layout import Layout
from metamom.bias.noise import gaussian
from metamom.bias.spelling import Row, spelled
from metamom.bias.state import State, after_draws, with_generators
from metamom.bias.warm import Warm
from metamom.common.checks import check_whole


def power_step(matrix: Tensor, start: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """One step of the power iteration: ``P`` spans the columns of ``M start``, and ``Q = M^T P``.

    ``P Q^T`` is M projected onto these columns.

    Args:
        matrix: ``[a, b]``.
        start: ``[b, r]``, r <= a.
        dtype: round P to it before Q follows; the matrix's by default.

    Returns:
        ``(P [a, r], Q [b, r])``; the columns of P are orthonormal, also where those of ``M start`` are not independent.

    Example:
        >>> p, q = power_step(torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.ones(2, 1))  # a matrix of rank 1
        >>> p @ q.T
        tensor([[1.0000, 2.0000],
                [2.0000, 4.0000]])
    """
    p = torch.linalg.qr(matrix @ start).Q.to(dtype or matrix.dtype)
    return p, matrix.T @ p.to(matrix.dtype)


@spelled(
    "powersgd",
    "matrices of rank RANK",
    Row("`ef14:powersgd:2`", "`EF14(PowerSGD(2))`", "a projection, better from step to step", "4r(a + b) a matrix"),
    Row("`powersgd:2:fresh`", "`PowerSGD(2, fresh=True)`", "r/min(a, b), in the mean", "4r(a + b) a matrix"),
    argument="RANK",
    number=int,
    options=("fresh", "seed"),
)
class PowerSGD(Warm):
    """Send each matrix of a worker's gradient as two factors of rank r; other tensors as they are.

    A tensor of two dimensions or more is the matrix ``[first dimension, all others]``. It is sent as it is if factors
    would not be shorter. ``C(M) = P P^T M`` is a projection, so ``||C(M) - M|| <= ||M||``, and exact for matrices of
    rank r or less. Each worker starts from its last step's Q, which on the same matrix makes the error smaller from
    step to step. There is no contraction for all gradients then: use it with error feedback. If columns of Q are drawn
    at each step (``fresh``), or for the first time, it is contractive in the mean with ``r / min(a, b)``.

    Each worker has factors of its own, which the server multiplies before it averages. PowerSGD's authors average P,
    and then Q, over all workers, with the same Q for all: the workers' mean has rank r there, up to n r here. With one
    worker both are the same.

    Args:
        rank: r >= 1.
        fresh: draw Q at each step instead of keeping it.
        seed: seed of the workers' counter-based draws.

    Raises:
        ValueError: for arguments out of range; when called, without the shapes, see `Layout`.

    Example:
        >>> from metamom.bias import Layout
        >>> g = torch.outer(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.5])).flatten()
        >>> operator, sizes = PowerSGD(1), Layout([(3, 3)])
        >>> bool(torch.allclose(operator(g, sizes=sizes), g)), operator.wire_bytes(9, sizes=sizes)
        (True, 24)

    Reference:
        docs/theory/operators.md; Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
        Distributed Optimization", NeurIPS 2019, arXiv 1905.13727, algorithm 1.
    """

    compresses = True

    def __init__(self, rank: int, *, fresh: bool = False, seed: int = 0) -> None:
        check_whole("PowerSGD's rank", rank, 1)
        self.rank = rank
        self._seeded_to_search(fresh, seed)

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        layout = self._layout(rows.shape[1], sizes)
        sent, state = self._next(rows, state, place, layout)
        return self._values(sent, layout), state

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`."""
        layout = self._layout(rows.shape[1], sizes)
        sent, state = self._next(rows, state, place, layout)
        self._values(sent, layout)  # checks that they are in the dtype's range
        return [numbers.view(torch.uint8) for numbers in sent], state

    def _next(self, rows: Tensor, state: State, place: Coordinates, layout: Layout) -> tuple[Tensor, State]:
        """What the workers send ``[n, L]``, and the next state."""
        place = with_generators(place, self._generators, state)
        before = self._starts(state, rows, place)
        sent, starts = self._factored(rows, before, place, layout)
        return sent, self._after(after_draws(state, place), starts, place)

    def _factored(
        self, rows: Tensor, before: Sequence[Tensor], at: Coordinates, layout: Layout
    ) -> tuple[Tensor, list[Tensor]]:
        """What the workers send ``[n, L]``, and what they keep for the next step, each ``[d]``."""
        sent, starts = [], []
        for row, old, worker in zip(rows, before, at.workers, strict=True):  # one by one: the same on any process
            numbers, start = [], torch.zeros_like(old)
            for tensor, (part, shape) in enumerate(self._pieces(layout)):
                entries = row[part]
                if shape is not None:
                    held = slice(part.start, part.start + shape[1] * self.rank)
                    alone = at._replace(workers=[worker], tensor=tensor)
                    entries, start[held] = self._factors(entries.view(shape), old[held], alone)
                numbers.append(entries)
            sent.append(torch.cat(numbers))
            starts.append(start)
        return torch.stack(sent), starts

    def _factors(self, matrix: Tensor, held: Tensor, at: Coordinates) -> tuple[Tensor, Tensor]:
        """P and Q in a row ``[(a + b) r]``, and the next start ``[b r]``, whose columns are zero where Q's vanish."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        scale = matrix.abs().max().to(wide)
        if not float(scale):
            return matrix.new_zeros(self._length(matrix.shape)), held
        scaled = matrix.to(wide, copy=True) / scale  # so that no product overflows
        p, q = power_step(scaled, self._drawn(held.view(-1, self.rank).to(wide), at), matrix.dtype)
        norms = torch.linalg.vector_norm(q, dim=0)
        # a direction that is rounding alone would differ between processors: it is drawn again at the next step
        kept = norms > torch.finfo(matrix.dtype).eps ** 0.75 * torch.linalg.vector_norm(scaled)
        numbers = torch.cat([p.flatten(), (q * scale).to(matrix.dtype).flatten()])
        return numbers, torch.where(kept, q / norms, 0).to(matrix.dtype).flatten()

    def _drawn(self, start: Tensor, at: Coordinates) -> Tensor:
        """The start ``[b, r]``, with columns that are zero drawn from the normal distribution."""
        empty = ~start.any(0)
        if not bool(empty.any()):
            return start
        count = start.numel()
        normal = gaussian(self._uniforms(at, 1, count + count % 2, start.device), count)
        return torch.where(empty, normal.view(start.shape).to(start.dtype), start)

    def _values(self, sent: Tensor, layout: Layout) -> Tensor:
        """``C(g) [n, d]`` from what is sent ``[n, L]``."""
        self._in_range(sent)
        return self._in_range(torch.stack([self._expanded(numbers, layout) for numbers in sent]))

    def _expanded(self, numbers: Tensor, layout: Layout) -> Tensor:
        """``[d]`` from ``[L]``; products entry by entry, so that worker and server round alike."""
        wide, place, parts = torch.promote_types(numbers.dtype, torch.float32), 0, []
        for part, shape in self._pieces(layout):
            length = part.stop - part.start if shape is None else self._length(shape)
            entries, place = numbers[place : place + length], place + length
            if shape is not None:
                p, q = torch.split(entries.to(wide), [shape[0] * self.rank, shape[1] * self.rank])
                columns = zip(p.view(-1, self.rank).T, q.view(-1, self.rank).T, strict=True)
                entries = sum((torch.outer(*pair) for pair in columns), entries.new_zeros(shape, dtype=wide)).flatten()
            parts.append(entries.to(numbers.dtype))
        return torch.cat(parts)

    def _pieces(self, layout: Layout) -> Iterator[tuple[slice, tuple[int, int] | None]]:
        """The tensors' places in a gradient, and their shapes as matrices if factors are sent instead."""
        place = 0
        for size, shape in zip(layout, layout.shapes, strict=True):
            matrix = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else None
            shorter = matrix is not None and self._length(matrix) < size
            yield slice(place, place + size), matrix if shorter else None
            place += size

    def _length(self, shape: Sequence[int]) -> int:
        """How many numbers the factors of a matrix are."""
        return self.rank * (shape[0] + shape[1])

    def _layout(self, d: int, sizes: Sizes | None) -> Layout:
        if not isinstance(sizes, Layout):
            raise ValueError(
                f"{self.spec} acts on matrices: pass sizes=metamom.bias.Layout(p.shape for p in parameters), the "
                f"shapes of the parameter tensors; got {'none' if sizes is None else f'sizes={list(sizes)}'}."
            )
        if sum(sizes) != d:
            raise ValueError(f"sizes must add up to the gradient's {d} entries; got {list(sizes)}.")
        return sizes

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        raise AssertionError("an operator on matrices acts on whole gradients, with their layout")

    def _pass(self, rows: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        layout = self._layout(rows.shape[1], sizes)
        return self._values(self._factored(rows, torch.zeros_like(rows).unbind(), at, layout)[0], layout)

    def _message(self, gradient: Tensor, at: Coordinates, sizes: Sizes | None) -> Tensor:
        layout, row = self._layout(len(gradient), sizes), gradient.unsqueeze(0)
        sent = self._factored(row, [torch.zeros_like(gradient)], at, layout)[0]
        self._values(sent, layout)
        return sent[0].view(torch.uint8)

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """``r (a + b)`` numbers for each matrix, and the other tensors' entries."""
        pieces = self._pieces(self._layout(d, sizes))
        return element_size * sum(p.stop - p.start if shape is None else self._length(shape) for p, shape in pieces)

    def decode(self, message: Tensor, d: int, dtype: torch.dtype, *, sizes: Sizes | None = None) -> Tensor:
        """See `BiasOperator.decode`."""
        layout, length = self._layout(d, sizes), self.wire_bytes(d, dtype.itemsize, sizes)
        if message.dtype is not torch.uint8 or message.shape != (length,):
            raise self._misfit(message, f"{length} bytes", d, dtype)
        out = self._expanded(message.clone().view(dtype), layout)
        if not bool(out.isfinite().all()):
            raise self._damaged("values that are infinite or NaN", d, dtype)
        return out

    def contraction(self, d: int, sizes: Sizes | None = None) -> float | None:
        """``r / min(a, b)`` in the mean, for the matrix with the least, if Q is drawn at each step; else ``None``."""
        pieces = self._pieces(self._layout(d, sizes))
        shares = [self.rank / min(shape) for _, shape in pieces if shape is not None]
        return min([1.0, *shares]) if self.fresh or not shares else None

    @property
    def remedy(self) -> str:
        """See `BiasOperator.remedy`."""
        return f"error feedback (ef14:{self.spec}), or a larger rank"

    @property
    def spec(self) -> str:
        """``powersgd:RANK``, then ``:fresh`` and ``:seed=N`` if set."""
        return ":".join([f"powersgd:{self.rank}", *["fresh"] * self.fresh, *self._seed_word])
