"""Rows times numbers, and weight norm: values and derivatives against PyTorch's own in a loop, and numerically."""

from __future__ import annotations

import pytest
import torch
from derivatives import derivatives, draw
from torch import Tensor

from metamom.maml.under_vmap.functions_by_task import FunctionsByTask
from metamom.nets import linear, low_rank, rows
from metamom.nets.low_rank import LowRank, Term, plain

T, OUT, IN = 2, 4, 5


@pytest.fixture(params=["parts", "entries"], autouse=True)
def kept(request, monkeypatch) -> str:
    """Matrices of any size are kept in parts, or none."""
    monkeypatch.setattr(linear, "SMALLEST", 0 if request.param == "parts" else 2**40)
    monkeypatch.setattr(linear, "SMALLEST_OF_ALL", 0)
    monkeypatch.setattr(low_rank, "SHARE", 1e9)
    return request.param


def batched(v: Tensor, g: Tensor, dim: int) -> Tensor:
    with FunctionsByTask() as functions:
        found = torch.func.vmap(lambda v, g: torch._weight_norm(v, g, dim))(v, g)
    assert functions.seen
    return plain(found)


def composed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    axes = [i + 1 for i in range(v.dim() - 1) if i != dim]
    return g * v / v.square().sum(axes, keepdim=True).sqrt()


def lengths(v: Tensor, dim: int) -> Tensor:
    shape = [n if i == dim else 1 for i, n in enumerate(v.shape[1:])]
    return draw(T, *shape, seed=2)


@pytest.mark.parametrize(
    ("shape", "dim"), [((4, 5), 0), ((4, 5), 1), ((3, 2, 2, 3), 0), ((3, 2, 2), 2), ((1, 5), 0), ((4, 1), 0)], ids=str
)
def test_weight_norm_is_that_of_a_loop(shape, dim):
    v = draw(T, *shape, seed=1)

    def looped(v: Tensor, g: Tensor) -> Tensor:
        return torch.stack([torch._weight_norm(*own, dim) for own in zip(v, g, strict=True)])

    ours, theirs = (derivatives(run, [v, lengths(v, dim)]) for run in (lambda v, g: batched(v, g, dim), looped))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda said, i=i: f"derivative {i}: {said}")


@pytest.mark.parametrize("adapted", ["v", "g"])
def test_a_direction_or_a_length_that_all_tasks_share(adapted):
    v, g = draw(OUT, IN, seed=1), draw(OUT, 1, seed=2)
    each = draw(T, *(v if adapted == "v" else g).shape, seed=3)

    def one(own: Tensor) -> Tensor:
        return torch._weight_norm(*((own, g) if adapted == "v" else (v, own)), 0)

    with FunctionsByTask():
        found = torch.func.vmap(one)(each)
    torch.testing.assert_close(plain(found), torch.stack([one(own) for own in each]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 2)], ids=str)
def test_a_version_of_pytorch_with_right_second_derivatives_is_followed(monkeypatch, shape):
    monkeypatch.setattr(rows, "norms_are_constant", lambda: False)
    v = draw(T, *shape, seed=1)
    given = [v.requires_grad_(), lengths(v, 0).requires_grad_()]
    assert torch.autograd.gradcheck(lambda v, g: batched(v, g, 0), given)
    assert torch.autograd.gradgradcheck(lambda v, g: batched(v, g, 0), given)
    for a, b in zip(
        *(derivatives(lambda v, g, run=run: run(v, g, 0), given) for run in (batched, composed)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_second_derivatives_of_this_version_of_pytorch():
    """Those of v / |v| in one entry, ``-3 v1 |v|^-3 + 3 v1^3 |v|^-5`` at (3, 4), unless the norms are left out."""
    v = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(torch._weight_norm(v, torch.ones(1, 1).double(), 0)[0, 0], v, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 0], v)
    true = -9 / 5**3 + 81 / 5**5
    assert (abs(second[0, 0].item() - true) > 1e-3) == rows.norms_are_constant()


def weight() -> Tensor:
    return draw(OUT, IN, seed=5).expand(T, OUT, IN)


def term(rank: int) -> Term:
    return Term(draw(T, rank, OUT, seed=6 + rank), draw(T, rank, IN, seed=16 + rank))


MATRICES = {
    "shared": weight,
    "plain": lambda: draw(T, OUT, IN, seed=6),
    "product": lambda: LowRank(None, (term(2),)),
    "sum": lambda: LowRank(weight(), (term(2), term(1))),
    "scaled": lambda: LowRank(weight(), (), draw(T, OUT, 1, seed=11)),
    "scaled sum": lambda: LowRank(weight(), (term(1),), draw(T, OUT, 1, seed=11)),
}


@pytest.mark.parametrize("a", MATRICES)
@pytest.mark.parametrize("b", MATRICES)
def test_row_dots(a, b):
    first, second = MATRICES[a](), MATRICES[b]()
    expected = (plain(MATRICES[a]()) * plain(MATRICES[b]())).sum(-1, keepdim=True)
    torch.testing.assert_close(rows.row_dots(first, second), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        rows.row_dots(first, first), (plain(MATRICES[a]()) ** 2).sum(-1, keepdim=True), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", MATRICES)
def test_scaled_rows(name, kept):
    factor = draw(T, OUT, 1, seed=12)
    found = rows.scale_rows(MATRICES[name](), factor)
    thin = name != "plain" and (name != "shared" or kept == "parts")
    assert (isinstance(found, LowRank) and found.is_thin()) == thin
    torch.testing.assert_close(plain(found), plain(MATRICES[name]()) * factor, rtol=1e-12, atol=1e-12)


def test_derivatives_of_rows_numerically():
    """Through the gradient of a linear layer, whose rows are scaled and multiplied with each other."""
    left, right = draw(T, 1, OUT, seed=1).requires_grad_(), draw(T, 1, IN, seed=2).requires_grad_()
    weight, factor = draw(OUT, IN, seed=3).requires_grad_(), draw(T, OUT, 1, seed=4).requires_grad_()

    def dots(left: Tensor, right: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        gradient = linear._Gradient.run(left, right)
        moved = rows.scale_rows(weight.expand(T, OUT, IN), factor) - gradient
        return rows.row_dots(rows.scale_rows(moved, factor), gradient) + rows.row_dots(moved, moved)

    assert torch.autograd.gradcheck(dots, (left, right, weight, factor))
    assert torch.autograd.gradgradcheck(dots, (left, right, weight, factor))
