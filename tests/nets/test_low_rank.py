"""Matrices kept as thin factors: every operation agrees with the plain tensor, and linear layers with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.nets import linear, low_rank
from metamom.nets.low_rank import LowRank, Term, parts, plain

T, OUT, IN = 3, 20, 24


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(*ranks: int, base: str | None = None, tasks: tuple[int, ...] = (T,), scaled: bool = False) -> LowRank:
    terms = tuple(Term(draw(*tasks, n, OUT, seed=n), draw(*tasks, n, IN, seed=10 + n)) for n in ranks)
    own = {"shared": draw(OUT, IN, seed=20).expand(*tasks, OUT, IN), "each": draw(*tasks, OUT, IN, seed=21)}
    scale = draw(*tasks, OUT, 1, seed=22) if scaled else None
    return LowRank(None if base is None else own[base], terms, scale)


KINDS = {
    "a gradient": lambda: factors(1),
    "two terms": lambda: factors(1, 2),
    "a shared weight": lambda: factors(1, base="shared"),
    "each task's weight": lambda: factors(1, 1, base="each"),
    "a shared weight, with a factor for each row": lambda: factors(1, base="shared", scaled=True),
    "the factors alone": lambda: factors(base="shared", scaled=True),
    "each task's weight, with factors": lambda: factors(1, base="each", scaled=True),
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda m: m + factors(1),
    "add to a tensor": lambda m: torch.add(draw(T, OUT, IN, seed=1), m, alpha=-0.1),
    "detach": lambda m: m.detach(),
    "clone": lambda m: m.clone(),
    "subtract": lambda m: m - factors(1),
}
KEPT_WITHOUT_BASE: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda m: -0.3 * m,
    "0-d": lambda m: m * torch.tensor(0.3, dtype=torch.float64),
    "of each task": lambda m: draw(T, 1, 1, seed=2) * m,
    "negative": lambda m: -m,
    "axes of tasks": lambda m: m.view(1, T, OUT, IN),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "sum over tasks": lambda m: m.sum(0),
    "sum over tasks, axis kept": lambda m: m.view(1, T, OUT, IN).sum(1, keepdim=True),
    "sum over all axes of tasks": lambda m: m.view(T, 1, OUT, IN).sum((0, 1)),
    "sum over the first of two": lambda m: m.view(T, 1, OUT, IN).sum(0),
    "sum over a row": lambda m: m.sum(-1),
    "sum over everything": lambda m: m.sum(),
    "entries times entries": lambda m: m * m,
    "a step size for each entry": lambda m: draw(T, OUT, IN, seed=3) * m,
    "broadcast": lambda m: m + draw(IN, seed=4),
    "plus a number": lambda m: m + 1,
    "product": lambda m: m @ draw(IN, 2, seed=5),
    "transpose": lambda m: m.mT,
    "one task": lambda m: m[1],
    "flat": lambda m: m.reshape(T, -1),
    "other precision": lambda m: m.float(),
    "complex": lambda m: m * 1j,
    "norm": lambda m: m.norm(),
    "stack": lambda m: torch.stack([m, m]),
    "is finite": lambda m: m.isfinite(),
    "equal": lambda m: m.eq(m),
    "too many terms": lambda m: m + factors(6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", KEPT | KEPT_WITHOUT_BASE | PLAIN)
def test_operations_agree_with_the_plain_tensor(name, kind):
    operation = (KEPT | KEPT_WITHOUT_BASE | PLAIN)[name]
    matrices = KINDS[kind]()
    found, expected = operation(KINDS[kind]()), operation(KINDS[kind]().entries())
    if name in PLAIN:
        assert not isinstance(found, LowRank)
    elif name in KEPT or matrices.base is None:
        assert isinstance(found, LowRank) == (matrices.base is None or name != "add to a tensor")
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(plain(found), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_in_place_is_kept(kind):
    matrices, expected = KINDS[kind](), KINDS[kind]().entries().clone()
    base = matrices.base
    before = None if base is None else base.clone()
    same = matrices.mul_(2)
    assert same is matrices
    matrices[0, 0].add_(1)  # through a view
    matrices.add_(1)
    expected.mul_(2)[0, 0].add_(1)
    torch.testing.assert_close(plain(matrices), expected.add_(1), rtol=1e-12, atol=1e-12)
    if base is not None:
        assert torch.equal(base, before)  # the weight itself does not change


def test_a_copy_does_not_follow_the_original():
    matrices = factors(1)
    copy = matrices.clone()
    matrices.zero_()
    assert float(copy.abs().sum()) > 0


@pytest.mark.parametrize("name", KEPT | KEPT_WITHOUT_BASE | PLAIN)
def test_derivatives_of_operations(name):
    """Through the gradient of a linear layer, as thin factors and as a plain tensor."""
    if name in ("is finite", "equal", "detach"):
        return
    operation = (KEPT | KEPT_WITHOUT_BASE | PLAIN)[name]

    def run(thin: bool) -> list[Tensor]:
        left, right = draw(T, 1, OUT, seed=30).requires_grad_(), draw(T, 1, IN, seed=31).requires_grad_()
        matrices = linear._Gradient.run(left, right) if thin else left.mT @ right
        assert isinstance(matrices, LowRank) == thin
        out = plain(operation(matrices))
        loss = (out.abs() ** 2).sum()
        first = torch.autograd.grad(loss, [left, right], create_graph=True)
        return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), [left, right])]

    for found, expected in zip(run(True), run(False), strict=True):
        assert not isinstance(found, LowRank)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_parts_and_repr():
    matrices = factors(1, 2, base="shared")
    assert len(parts(matrices)) == 5
    assert repr(matrices) == f"LowRank(shape=[{T}, {OUT}, {IN}], base=True, terms=2)"
    assert parts(matrices.entries())[0] is matrices.entries()


@pytest.mark.parametrize("operation", [torch.add, torch.sub], ids=["add", "subtract"])
def test_rows_of_one_base_add_up(operation):
    """With or without factors, on either side; two bases give plain entries."""
    first = factors(1, base="shared", scaled=True)
    weight, scale = first.base, draw(T, OUT, 1, seed=23)
    others = weight, LowRank(weight, factors(2).terms, scale), LowRank(weight, factors(2).terms)
    for other in others:
        for a, b in ((first, other), (other, first)):
            found = operation(a, b, alpha=0.3)
            assert isinstance(found, LowRank)
            read_a, read_b = (LowRank(*factors_of(x)).entries() for x in (a, b))
            torch.testing.assert_close(plain(found), operation(read_a, read_b, alpha=0.3), rtol=1e-12, atol=1e-12)
    assert not isinstance(operation(first, factors(1, base="shared", scaled=True)), LowRank)  # elsewhere in memory


def factors_of(tensor: Tensor) -> tuple[Tensor | None, tuple[Term, ...], Tensor | None]:
    base, scale, terms = low_rank.factors(tensor)
    return base, terms, scale


def test_products_with_a_factor_in_common_become_one():
    left, right = draw(T, 2, OUT, seed=1), draw(T, 2, IN, seed=2)
    total = LowRank(None, (Term(left, right),)) - LowRank(None, (Term(2 * left, right), Term(left, 3 * right)))
    assert len(total.terms) == 2
    torch.testing.assert_close(plain(total), -4 * left.mT @ right, rtol=1e-12, atol=1e-12)


# ---- products


@pytest.fixture(params=["thin", "entries"])
def share(request, monkeypatch) -> None:
    """Gradients are kept as factors of any rank, or never."""
    monkeypatch.setattr(low_rank, "SHARE", 1e9 if request.param == "thin" else 0.0)


def entrywise(x: Tensor) -> Tensor:
    """``x``, with plain gradients: gradcheck writes to what it has differentiated, which changes factors."""
    return plain(x) * torch.ones_like(plain(x))


@pytest.mark.usefixtures("share")
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("matrices", ["each", "shared"])
def test_derivatives_of_products(matrices, flipped):
    x = draw(2, 3, 4 if flipped else 5, seed=1).requires_grad_()
    weight = draw(2, 4, 5, seed=2).requires_grad_()
    cotangent = draw(2, 3, 5 if flipped else 4, seed=4).requires_grad_()
    if matrices == "shared":
        weight = weight.detach()[0].requires_grad_()

    def of_tasks(weight: Tensor) -> Tensor:
        return weight.expand(2, 4, 5) if matrices == "shared" else entrywise(weight)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return linear._Product.run(x, of_tasks(weight), flipped)

    def gradient(x: Tensor, weight: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        each = of_tasks(weight)
        found = torch.autograd.grad(linear._Product.run(x, each, flipped), [x, each], cotangent, create_graph=True)
        return tuple(map(entrywise, found))

    assert torch.autograd.gradcheck(product, (x, weight))
    assert torch.autograd.gradgradcheck(product, (x, weight))
    assert torch.autograd.gradcheck(gradient, (x, weight, cotangent))
    assert torch.autograd.gradgradcheck(gradient, (x, weight, cotangent))


@pytest.mark.usefixtures("share")
def test_derivatives_of_gradients():
    left, right = draw(2, 3, 4, seed=1).requires_grad_(), draw(2, 3, 5, seed=2).requires_grad_()

    def gradient(left: Tensor, right: Tensor) -> Tensor:
        return entrywise(linear._Gradient.run(left, right))

    assert torch.autograd.gradcheck(gradient, (left, right))
    assert torch.autograd.gradgradcheck(gradient, (left, right))


@pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 6), (2, 4, 6), (2, 0, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["contiguous", "transposed"])
@pytest.mark.parametrize("smallest", [0, 10**9])
def test_linear_agrees_with_pytorch(monkeypatch, shape, bias, order, smallest):
    monkeypatch.setattr(linear, "SMALLEST", smallest)
    monkeypatch.setattr(linear, "SMALLEST_OF_ALL", smallest)
    monkeypatch.setattr(low_rank, "SHARE", 1e9)
    x, weight, b = draw(T, *shape, seed=1), draw(T, 5, 6, seed=2).requires_grad_(), draw(T, 5, seed=3)
    if order == "transposed" and len(shape) == 3:
        x = x.transpose(1, 2)

    def model(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def one_task(x: Tensor, weight: Tensor, b: Tensor) -> Tensor:
            return of(x, weight, b if bias else None)

        return torch.func.vmap(one_task)

    def ours(*args: Tensor | None) -> Tensor:
        found = linear.linear(*args)
        return F.linear(*args) if found is None else found

    found, expected = model(ours)(x, weight, b), model(F.linear)(x, weight, b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(each.sin().sum(), weight)[0] for each in (found, expected)]
    torch.testing.assert_close(plain(grads[0]), grads[1], rtol=1e-12, atol=1e-12)


def test_a_factor_that_was_changed_in_place_is_not_used():
    left, right = draw(T, 1, OUT, seed=1), draw(T, 1, IN, seed=2)
    matrices = LowRank(None, (Term(left, right),))
    read = LowRank(None, (Term(left, right),))
    expected = read.entries().clone()
    left.zero_()
    for use in (lambda: matrices + 1, lambda: -matrices, lambda: linear._Product.run(right, matrices, False)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use()
    assert torch.equal(read.entries(), expected)
