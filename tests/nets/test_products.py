"""Products in a traced graph: the same numbers from fewer and larger ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor
from cases import loop_over
from problems import generator, regression_batch, relative_error
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from metamom import MAML
from metamom.nets.products import join_products, sum_products

Rewriting = Callable[[torch.fx.GraphModule], int]


# one product for two


def factors(rows: int, columns: int, inners: tuple[int, int], tasks: tuple[int, int] = (2, 2)) -> list[Tensor]:
    sizes = [s for T, k in zip(tasks, inners, strict=True) for s in ((T, rows, k), (T, k, columns))]
    return [torch.randn(s, generator=generator(i), dtype=torch.float64) for i, s in enumerate(sizes)]


def products_in(graph: torch.fx.GraphModule, kind: str = "bmm") -> int:
    return sum(node.target is getattr(torch.ops.aten, kind).default for node in graph.graph.nodes)


def check(rewrite: Rewriting, function: Callable[..., Any], args: list[Tensor], changes: int, products: int) -> None:
    """So many changes leave so many batched products and the same numbers."""
    graph = make_fx(function)(*args)
    assert rewrite(graph) == changes
    assert products_in(graph) == products
    torch.testing.assert_close(graph(*args), function(*args), rtol=1e-12, atol=1e-12)


SMALL_INNER = factors(40, 50, (3, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d),
        lambda a, b, c, d: a @ b + c @ d,
        lambda a, b, c, d: (torch.bmm(a, b).view(80, 50) + torch.bmm(c, d).view(80, 50)) * 2,
        lambda a, b, c, d: torch.bmm(a, b).view(2, 40, 5, 10) + torch.bmm(c, d).view(2, 40, 5, 10),
        lambda a, b, c, d: torch.bmm(torch.sin(a), b) + torch.bmm(torch.sin(c) * 2, d),
    ],
    ids=["bmm", "matmul", "flattened", "as images", "of other results"],
)
def test_a_sum_of_two_products_becomes_one(function):
    check(join_products, function, SMALL_INNER, changes=1, products=1)


def test_every_pair_is_joined():
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (torch.bmm(a, b) + torch.bmm(c, d)) * (torch.bmm(2 * a, b) + torch.bmm(c, 3 * d))

    check(join_products, function, SMALL_INNER, changes=2, products=2)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c, d: (torch.bmm(a, b) + torch.bmm(c, d), torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: (p + torch.bmm(c, d), 2 * p))(torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: (torch.bmm(c, d) + p.view(2, 40, 50), p.sum()))(torch.bmm(a, b)),
        lambda a, b, c, d: (lambda p: p + p)(torch.bmm(a, b)),
        lambda a, b, c, d: torch.add(torch.bmm(a, b), torch.bmm(c, d), alpha=2),
        lambda a, b, c, d: torch.bmm(a, b) - torch.bmm(c, d),
        lambda a, b, c, d: torch.bmm(a, b) + 1,
        lambda a, b, c, d: torch.sin(torch.bmm(a, b)) + torch.bmm(c, d),
    ],
    ids=["control", "used twice", "used twice before a view", "added to itself", "alpha", "minus", "+ 1", "sin"],
)
def test_other_sums_stay_as_they_are(function, request):
    graph = make_fx(function)(*SMALL_INNER)
    joined = int("control" in request.node.name)  # the same pair, where the product of the second use is its own
    check(join_products, function, SMALL_INNER, joined, products_in(graph) - joined)


@pytest.mark.parametrize(("rows", "columns", "inners"), [(4, 50, (3, 4)), (40, 50, (30, 4)), (1, 1, (1, 1))])
def test_products_of_large_inner_dimension_stay_two(rows, columns, inners):
    """They cost more than writing their result: copying the factors would gain nothing."""
    function = lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d)  # noqa: E731
    check(join_products, function, factors(rows, columns, inners), changes=0, products=2)


def test_a_sum_that_broadcasts_stays_as_it_is():
    """Every pair of rows, as additive attention has them: the terms' entries do not meet one to one."""

    def every_pair(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return torch.bmm(a, b).view(2, 40, 1, 50) + torch.bmm(c, d).view(2, 1, 40, 50)

    check(join_products, every_pair, SMALL_INNER, changes=0, products=2)
    one_for_all = factors(40, 50, (3, 4), tasks=(2, 1))
    check(join_products, lambda a, b, c, d: torch.bmm(a, b) + torch.bmm(c, d), one_for_all, changes=0, products=2)


def test_three_products_become_one():
    """The result of a first joining takes part in a second."""
    args = [*SMALL_INNER, *factors(40, 50, (2, 2))[:2]]
    check(join_products, lambda a, b, c, d, e, f: a @ b + c @ d + e @ f, args, changes=2, products=1)


# the sum over tasks


def summed(each: Tensor, workers: int = 1) -> Tensor:
    """Over each worker's tasks, as the derivative of giving tasks their weights has it."""
    return each.view(workers, each.shape[0] // workers, *each.shape[1:]).sum([1], keepdim=True).squeeze(1)


def matrices(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# of 6 tasks, as a linear layer's weight gradient is made: inputs [T, N, K] and derivatives of outputs [T, N, M]
X, D = matrices(6, 5, 3), matrices(6, 5, 4, seed=1)


@pytest.mark.parametrize(
    ("function", "sums", "left"),
    [
        (lambda x, d, n: summed(x.mT @ d, n), 1, 0),
        (lambda x, d, n: summed(d.mT @ x, n), 1, 0),
        (lambda x, d, n: summed((x.mT @ d).mT, n), 1, 0),
        (lambda x, d, n: summed((x.mT @ d).mT, n).view(n, 12), 1, 0),
        (lambda x, d, n: summed((x.mT @ d).view(6, 3, 2, 2).permute(0, 3, 1, 2), n), 1, 0),
        (lambda x, d, n: summed((x.mT @ d).view(6, 1, 3, 4).squeeze(1), n), 1, 0),
        (lambda x, d, n: summed(x.mT @ d + (d.mT @ torch.sin(x)).mT, n), 2, 0),
        (lambda x, d, n: summed((x.mT @ d + 2 * x.mT @ torch.cos(d)) + x[:, :3, :1] * d[:, :1, :4], n), 2, 0),
        (lambda x, d, n: (lambda p: (summed(p + x.mT @ torch.sin(d), n), p.square()))(x.mT @ d), 1, 1),
    ],
    ids=[
        "x^T d",
        "d^T x",
        "transposed",
        "transposed and flattened",
        "as a kernel",
        "squeezed",
        "two",
        "two and more",
        "one of them used",
    ],
)
@loop_over(workers=(1, 2, 3))
def test_the_sum_of_the_tasks_products_is_one_product(function, sums, left, workers):
    args = [X, D]
    check(sum_products, lambda x, d: function(x, d, workers), args, changes=sums, products=left + sums * (workers > 1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, d: summed(x.mT @ d, 6),
        lambda x, d: (lambda p: (summed(p), p.sum()))(x.mT @ d),
        lambda x, d: summed(torch.sin(x.mT @ d)),
        lambda x, d: (x.mT @ d).sum(0),
        lambda x, d: (x.mT @ d).view(1, 6, 3, 4).sum([2], keepdim=True),
        lambda x, d: summed((x.mT @ d).transpose(0, 2).contiguous()),
        lambda x, d: summed((x.mT @ d).permute(2, 0, 1).contiguous()),
        lambda x, d: summed(x.mT @ d[:, :, :1]),
        lambda x, d: summed((x[:3].mT @ d[:3]).view(6, 2, 3)),
        lambda x, d: summed(torch.add(x.mT @ d, x.mT @ d, alpha=3)),
        lambda x, d: summed(x.mT @ d + x[:1, :3, :1]),
        lambda x, d: summed(x.transpose(0, 1).contiguous().transpose(0, 1).mT @ d),
    ],
    ids=[
        "one task each",
        "used twice",
        "sin",
        "sum without a view",
        "another axis",
        "tasks transposed",
        "tasks permuted",
        "a vector",
        "tasks cut in two",
        "alpha",
        "broadcast",
        "tasks not below each other",
    ],
)
def test_other_sums_over_tasks_stay_as_they_are(function):
    products = products_in(make_fx(function)(X, D))
    check(sum_products, function, [X, D], changes=0, products=products)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_meta_gradient_has_few_batches_of_products(workers, monkeypatch):
    """Five are each task's own; the sum over tasks of the last is one product for each worker."""
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graphs.append(graph) or graph)
    model, batch = nn.Linear(3, 2, bias=False).double(), regression_batch(dim=3)
    batch = batch._replace(support_y=batch.support_y.expand(-1, -1, 2), query_y=batch.query_y.expand(-1, -1, 2))
    learner, plain = (MAML(model, F.mse_loss, inner_lr=0.1, compile=on) for on in (True, False))
    assert relative_error(*(each.meta_gradient(batch, workers).grads for each in (learner, plain))) < 1e-12
    assert products_in(graphs[0]) == 5 + (workers > 1)
    assert products_in(graphs[0], "mm") == (workers == 1)
