"""One step: its slow twin, in fractions, what it keeps exactly, and where it ends."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom import CompositeMomentum
from metamom.decentral import complete, decentralized_step, initial_state, metropolis, ring, torus
from metamom.decentral.step import outgoing
from metamom.theory.decentral import untracked_points
from metamom.theory.fixed_points import AffineMean, bias_floor

Row = list[Fraction]


def path_of(n: int) -> list[list[Fraction]]:
    """Metropolis weights of a path, in fractions: 1/3 for neighbours, 1/2 between two alone."""
    share = Fraction(1, 3) if n > 2 else Fraction(1, 2)
    rows = [[share if abs(i - j) == 1 else Fraction(0) for j in range(n)] for i in range(n)]
    for i in range(n):
        rows[i][i] = 1 - sum(rows[i])
    return rows


def by_hand(start: Row, grads: list[Row], weights: list[Row], lr: Fraction, beta: Fraction) -> list[tuple[Row, ...]]:
    """The recurrence for one number per worker, y first: a plain loop, exact. Returns x, m and y after each step."""
    n = len(start)
    x, m, y = list(start), [Fraction(0)] * n, [Fraction(0)] * n
    states = []
    for grad in grads:
        new = [(1 - beta) * m[i] + beta * grad[i] for i in range(n)]
        y = [sum(weights[i][j] * y[j] for j in range(n)) + new[i] - m[i] for i in range(n)]
        m = new
        x = [sum(weights[i][j] * (x[j] - lr * y[j]) for j in range(n)) for i in range(n)]
        states.append((x, m, y))
    return states


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_a_plain_loop_in_fractions(n, seed):
    """The mean of y is that of m, exactly, in every step; and floating point follows to 1e-12."""
    generator = torch.Generator().manual_seed(seed)
    steps, lr, beta, weights = 6, Fraction(1, 8), Fraction(1, 4), path_of(n)
    numbers = torch.randint(-64, 65, (steps + 1, n), generator=generator)
    start, *grads = [[Fraction(int(value), 16) for value in row] for row in numbers]
    x = numbers[0].double()[:, None] / 16
    state, mixing = initial_state(x), torch.tensor([[float(w) for w in row] for row in weights], dtype=torch.float64)
    torch.testing.assert_close(mixing, metropolis(mixing > 0))
    for k, (xs, ms, ys) in enumerate(by_hand(start, grads, weights, lr, beta)):
        assert sum(ys) == sum(ms)
        x, state = decentralized_step(
            x, numbers[k + 1].double()[:, None] / 16, state, mixing, lr=float(lr), beta=float(beta)
        )
        mixed = [float(sum(w * y for w, y in zip(row, ys, strict=True))) for row in weights]
        for got, wanted in ((x, xs), (state.momentum, ms), (state.tracker, mixed)):
            assert got[:, 0].tolist() == pytest.approx([float(value) for value in wanted], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mixing", [ring(6), torus(2, 3), complete(6)])
def test_means(mixing):
    """The mean weights move by the mean momentum, that of the trackers is the same, whatever the gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
    state = initial_state(x)
    for _ in range(20):
        grads = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64)
        before = x.mean(0)
        messages, _ = outgoing(x, grads, state, lr=0.1, beta=0.3, tracking=True)
        x, state = decentralized_step(x, grads, state, mixing, lr=0.1, beta=0.3)
        mean = state.momentum.mean(0)
        for got in (messages[:, 1].mean(0), state.tracker.mean(0)):
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(x.mean(0), before - 0.1 * mean, rtol=0, atol=1e-14)


def test_dyadic_numbers_on_a_complete_graph_keep_the_mean_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(4, 5, dtype=torch.float64)
    state = initial_state(x)
    for _ in range(8):
        grads = torch.randint(-8, 9, (4, 5), generator=generator).double()
        x, state = decentralized_step(x, grads, state, complete(4), lr=0.5, beta=0.5)
        assert torch.equal(state.tracker.sum(0), state.momentum.sum(0))


@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_on_a_complete_graph_it_is_composite_momentum(beta, tracking):
    curvatures, minima, _ = quadratics()
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = CompositeMomentum([w], lr=0.2, beta=beta)
    x = torch.zeros(6, 3, dtype=torch.float64)
    state = initial_state(x)
    for _ in range(50):
        w.grad = (curvatures * (w.detach() - minima)).mean(0)
        optimizer.step()
        x, state = decentralized_step(
            x, curvatures * (x - minima), state, complete(6), lr=0.2, beta=beta, tracking=tracking
        )
        torch.testing.assert_close(x, w.detach().expand(6, 3), rtol=1e-12, atol=1e-12)


def quadratics() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Curvatures, minima and constant errors of the gradients of six workers in three dimensions."""
    generator = torch.Generator().manual_seed(3)
    curvatures = 0.5 + torch.rand(6, 3, generator=generator, dtype=torch.float64)
    return curvatures, *torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)


def affine(curvatures: torch.Tensor, offsets: torch.Tensor) -> list[AffineMean]:
    return [AffineMean(torch.diag(a), b) for a, b in zip(curvatures, offsets, strict=True)]


def end_of(mixing: torch.Tensor, gains: torch.Tensor, offsets: torch.Tensor, *, tracking: bool) -> torch.Tensor:
    """Where gradients ``gains (x - minima) + offsets`` lead, after many steps."""
    minima = quadratics()[1]
    x = torch.zeros(6, 3, dtype=torch.float64)
    state = initial_state(x)
    for _ in range(400):
        x, state = decentralized_step(
            x, gains * (x - minima) + offsets, state, mixing, lr=0.15, beta=0.4, tracking=tracking
        )
    return x


@pytest.mark.parametrize("mixing", [ring(6), torus(2, 3)])
@pytest.mark.parametrize("case", ["no bias", "constant, sum zero", "constant", "relative"])
def test_the_fixed_point_of_tracking_is_that_of_a_server(mixing, case):
    """Consensus, where the mean biased gradient is zero: of constants, ||grad f||^2 there is that of their mean."""
    curvatures, minima, offsets = quadratics()
    if case in ("no bias", "relative"):
        offsets = torch.zeros_like(offsets)
    if case == "constant, sum zero":
        offsets = offsets - offsets.mean(0)
    gains = curvatures.clone()
    if case == "relative":
        gains = gains * (1 + torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)[:, None])
    law = bias_floor(affine(curvatures, torch.zeros_like(offsets)), affine(gains, offsets), minima)
    x = end_of(mixing, gains, offsets, tracking=True)
    torch.testing.assert_close(x, law.end.expand(6, 3), rtol=0, atol=1e-12)
    gradient = (curvatures * (x.mean(0) - minima)).mean(0)
    assert float(gradient.square().sum()) == pytest.approx(law.floor, abs=1e-12)
    if case != "relative":
        assert law.floor == pytest.approx(float(offsets.mean(0).square().sum()), abs=1e-15)
    else:
        assert law.floor > 1e-3


@pytest.mark.parametrize("mixing", [ring(6), torus(2, 3)])
def test_without_tracking_the_fixed_point_depends_on_lr_and_the_graph(mixing):
    curvatures, minima, offsets = quadratics()
    x = end_of(mixing, curvatures, offsets, tracking=False)
    truth = untracked_points(affine(curvatures, offsets), minima, mixing, 0.15)
    torch.testing.assert_close(x, truth, rtol=0, atol=1e-12)
    assert float((x - x.mean(0)).norm()) > 0.1


def test_each_worker_may_have_its_own_lr_and_beta():
    x = torch.zeros(2, 1, dtype=torch.float64)
    grads = torch.ones_like(x)
    lr, beta = torch.tensor([[0.1], [0.3]], dtype=torch.float64), torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    x, state = decentralized_step(x, grads, initial_state(x), complete(2), lr=lr, beta=beta)
    assert x.flatten().tolist() == pytest.approx([-(0.1 * 0.5 + 0.3) / 2] * 2)
    assert state.momentum.flatten().tolist() == [0.5, 1.0]


def test_with_beta_one_the_past_is_discarded():
    x = torch.zeros(2, 1)
    state = initial_state(x)._replace(momentum=torch.full((2, 1), float("inf")))
    _, momentum = outgoing(x, torch.ones(2, 1), state, lr=0.1, beta=1.0, tracking=False)
    assert momentum.tolist() == [[1.0], [1.0]]


def test_errors():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="have a row for each of the 4 workers"):
        decentralized_step(x, x, initial_state(x), ring(4), lr=0.1, beta=0.5)
    with pytest.raises(ValueError, match=r"x and grads have a row .* \(3, 2\) and \(3, 1\)"):
        decentralized_step(x, x[:, :1], initial_state(x), ring(3), lr=0.1, beta=0.5)
    with pytest.raises(ValueError, match="beta is the weight of the new gradient"):
        decentralized_step(x, x, initial_state(x), ring(3), lr=0.1, beta=0.0)
