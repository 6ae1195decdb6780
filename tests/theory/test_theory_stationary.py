"""The stationary law: reference values, Lyapunov equation, the real optimizer; swings; what a loss history tells."""

from math import inf, nan, sqrt

import pytest
import torch
from cases import loop_over
from scipy.linalg import solve_discrete_lyapunov

from metamom import CompositeMomentum
from metamom.theory import critical_beta, diagnose, max_step, stable_limit, stationary, swinging_step

F64 = torch.float64
LAW = stationary([1, 0.25], [0.3, 0.7], [0.1, -0.2], 0.2, 0.5)


def test_reference_values():
    wanted = 0.1711988011988012, 0.2116833166833167, 0.11260739260739261, 0.2568731268731269
    assert LAW[2:] == pytest.approx(wanted, rel=1e-15)
    torch.testing.assert_close(LAW.mean, torch.tensor([-0.1, 0.8], dtype=F64))
    assert stationary(2.0, 0.1, 0.0, 1, 0.1).mean.shape == (1,)
    assert torch.equal(stationary(torch.tensor([1.0, 1.0]), 0.3, 0.1, 0.2, 0.5).variance, LAW.variance[0].expand(2))


@loop_over(beta=(0.02, 0.1, 0.5, 0.9, 1.0), lam=(0.01, 1.0, 30.0), part=(0.001, 0.1, 0.5, 0.95))
def test_lyapunov_equation(beta, lam, part):
    """State (x_k, gamma v_{k-1}) = F state + G xi, covariance P = F P F^T + sigma2 G G^T."""
    gamma, sigma2, bias = part * stable_limit(lam, beta), 0.7, 0.3
    step = gamma * beta * lam
    F = torch.tensor([[1 - step, beta - 1], [step, 1 - beta]], dtype=F64)
    G = gamma * beta * torch.tensor([[-1.0], [1.0]], dtype=F64)
    P = torch.from_numpy(solve_discrete_lyapunov(F.numpy(), (sigma2 * G @ G.T).numpy(), method="direct"))
    e = (1 - beta) * torch.tensor([-lam, 1 / gamma], dtype=F64)  # v_k - grad = e . state + beta xi + constant
    law = stationary(lam, sigma2, bias, beta, gamma)
    wanted = {
        "variance": P[0, 0],
        "grad_sq": bias**2 + lam**2 * P[0, 0],
        "gap": bias**2 / lam / 2 + lam * P[0, 0] / 2,
        "v_sq": P[1, 1] / gamma**2,
        "deviation_sq": bias**2 + e @ P @ e + beta**2 * sigma2,
    }
    for name, value in wanted.items():
        assert float(getattr(law, name)) == pytest.approx(float(value), rel=1e-10), name


def test_the_optimizer_ends_there():
    """5,000 chains of `CompositeMomentum`: all six numbers within 5 standard errors."""
    lam, bias = torch.tensor([1, 0.25], dtype=F64), torch.tensor([0.1, -0.2], dtype=F64)
    spread = torch.tensor([0.3, 0.7], dtype=F64).sqrt()
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.Parameter(LAW.mean.repeat(5_000, 1))
    optimizer = CompositeMomentum([x], lr=0.5, beta=0.2)
    for _ in range(150):  # the past is forgotten as 0.894^k
        gradient = lam * x.detach()
        x.grad = gradient + bias + spread * torch.randn(x.shape, generator=generator, dtype=F64)
        optimizer.step()
    v = optimizer.state[x]["momentum"]
    x = x.detach()
    measured = {
        "mean": x,
        "variance": (x - LAW.mean) ** 2,
        "grad_sq": (lam * x).square().sum(-1),
        "gap": (lam * x**2).sum(-1) / 2,
        "v_sq": v.square().sum(-1),
        "deviation_sq": (v - gradient).square().sum(-1),
    }
    for name, each in measured.items():
        z = (each.mean(0) - getattr(LAW, name)) / (each.std(0) / sqrt(len(each)))
        assert z.abs().max() < 5, name


def test_what_beta_changes():
    """At a fixed step the deviation falls with beta and the gradient's noise hardly moves; the bias stays."""
    laws = [stationary(1.0, 1.0, 0.3, beta, 0.01) for beta in (1, 0.5, 0.1, 0.05)]
    deviations = [law.deviation_sq for law in laws]
    assert deviations == sorted(deviations, reverse=True)
    assert deviations[0] > 10 * (deviations[-1] - 0.09)
    assert [law.grad_sq for law in laws] == pytest.approx([0.09 + 0.005] * 4, rel=1e-3)


BAD = [
    ((1, 1, 0, 0.1, 38.1), r"2\(2-beta\)/\(beta lam\) = 38; got gamma=38.1"),
    (([1, 2], [1, 2, 3], 0, 0.1, 0.1), "vectors of one length"),
    ((torch.ones(2, 2), 1, 0, 0.1, 0.1), "vectors of one length"),
    ((0, 1, 0, 0.1, 0.1), "lam must be > 0"),
    ((1, -1, 0, 0.1, 0.1), "sigma2 must be >= 0"),
    ((1, 1, nan, 0.1, 0.1), "bias must be finite"),
    ((1, 1, 0, 1.1, 0.1), "beta must be in"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_ranges(args, message):
    with pytest.raises(ValueError, match=message):
        stationary(*args)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.02])
def test_the_limit_is_where_momentum_stops_being_stable(beta):
    for part, stable in ((0.99, True), (1.01, False)):
        gamma = part * stable_limit(2.0, beta)
        F = torch.tensor([[1 - gamma * beta * 2, -gamma * (1 - beta)], [beta * 2, 1 - beta]], dtype=F64)
        assert (float(torch.linalg.eigvals(F).abs().max()) < 1) == stable
    ratio = 2 * (2 - beta) ** 2 / beta**2
    assert stable_limit(2.0, beta) == pytest.approx(ratio * max_step(2.0, beta))
    with pytest.raises(ValueError, match="lam_max"):
        stable_limit(0, beta)


@pytest.mark.parametrize("step", [0.01, 0.2, 0.7])
def test_critical_beta(step):
    """Above it the roots are real, below it complex, with the period that `swinging_step` inverts."""

    def roots(beta):
        trace = 2 - beta - beta * step
        return torch.linalg.eigvals(torch.tensor([[trace, beta - 1], [1.0, 0.0]], dtype=F64))

    critical = critical_beta(step)
    assert roots(critical * 1.0001).imag.abs().max() == 0
    swinging = roots(critical * 0.7)
    period = 2 * torch.pi / float(swinging.angle().abs().max())
    assert swinging_step(critical * 0.7, period) == pytest.approx(step, rel=1e-9)
    assert swinging.abs().tolist() == pytest.approx([sqrt(1 - 0.7 * critical)] * 2)


# Diagnosis from a loss history


def run(gamma, beta, *, lam=1.0, sigma=0.0, bias=0.0, least=0.0, steps=400, x0=3.0, seed=0, d=20, loss_noise=0.0):
    """Losses of a run on d equal axes, mean squares of gradients and momentum over its second half."""
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.full((d,), x0 / sqrt(d), dtype=F64), torch.zeros(d, dtype=F64)
    losses, g_sq, v_sq = [], [], []
    for _ in range(steps):
        error = bias / sqrt(d) + sigma / sqrt(d) * torch.randn(d, generator=generator, dtype=F64)
        seen = loss_noise * float(torch.randn(1, generator=generator))
        losses.append(float(lam * x.square().sum()) / 2 + least + seen)
        g = lam * x + error
        v = (1 - beta) * v + beta * g
        x = x - gamma * v
        g_sq.append(float(g.square().sum()))
        v_sq.append(float(v.square().sum()))
    half = steps // 2
    return losses, {"grad_sq": sum(g_sq[half:]) / half, "v_sq": sum(v_sq[half:]) / half}


def test_divergence_is_gamma():
    losses, squares = run(1.05 * stable_limit(1.0, 0.3), 0.3, steps=60)
    diagnosis = diagnose(losses, 0.3, 10.0, **squares)
    assert (diagnosis.state, diagnosis.cause) == ("diverging", "gamma")
    assert diagnose([1.0, 2.0, inf], 0.3).cause == "gamma" == diagnose([nan] * 3, 0.1).cause


def test_a_long_memory_is_beta():
    """gamma lam = 0.3 at beta = 0.01 swings; the loss with half the period of the weights."""
    losses, _ = run(0.3, 0.01, steps=500)
    diagnosis = diagnose(losses, 0.01, 0.3)
    assert (diagnosis.state, diagnosis.cause) == ("oscillating", "beta")
    assert swinging_step(0.01, 2 * diagnosis.period) == pytest.approx(0.3, rel=0.2)
    assert "stops this at the same gamma" in str(diagnosis)
    losses, _ = run(0.3, critical_beta(0.3), steps=500)
    assert diagnose(losses, critical_beta(0.3), 0.3).state != "oscillating"


def test_swings_that_no_beta_stops_are_gamma():
    losses, _ = run(8.0, 0.02, steps=400)
    diagnosis = diagnose(losses, 0.02, 8.0)
    assert (diagnosis.state, diagnosis.cause) == ("oscillating", "gamma")
    assert diagnosis.period is not None
    ripple = [1 + 0.2 * (-1) ** k for k in range(100)]
    assert diagnose(ripple, 1.0).cause == "gamma"


def test_descent_needs_no_cure():
    losses, squares = run(0.002, 0.1, steps=400)
    diagnosis = diagnose(losses, 0.1, 0.002, **squares)
    assert (diagnosis.state, diagnosis.cause) == ("descending", "none")


def test_a_step_too_short_is_gamma():
    losses, squares = run(2e-6, 0.1, steps=400, sigma=0.1)
    diagnosis = diagnose(losses, 0.1, 2e-6, **squares)
    assert (diagnosis.state, diagnosis.cause) == ("stalled", "gamma")
    assert "raise gamma" in str(diagnosis)


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_a_noise_floor_is_gamma(beta):
    losses, squares = run(0.1, beta, sigma=3.0, steps=2000)
    diagnosis = diagnose(losses, beta, 0.1, **squares)
    assert (diagnosis.state, diagnosis.cause) == ("stalled", "gamma")
    assert "lower gamma" in str(diagnosis)


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_a_bias_floor_is_bias(beta):
    losses, squares = run(0.05, beta, sigma=0.3, bias=1.5, steps=2000)
    diagnosis = diagnose(losses, beta, 0.05, **squares, biased=True)
    assert (diagnosis.state, diagnosis.cause) == ("stalled", "bias")
    for biased in (None, False):  # nothing in the run tells it from the minimum of a loss that is not zero
        other = diagnose(losses, beta, 0.05, **squares, biased=biased)
        assert (other.state, other.cause) == ("stalled", "unknown")
        assert ("the best that this model can do" in str(other)) == (biased is None)


def test_plain_sgd_needs_the_variance():
    losses, squares = run(0.1, 1.0, sigma=3.0, steps=2000)
    assert diagnose(losses, 1.0, 0.1, **squares).cause == "unknown"
    assert "sigma2" in str(diagnose(losses, 1.0, 0.1, **squares))
    assert diagnose(losses, 1.0, 0.1, sigma2=9.0).cause == "gamma"


def test_steps_that_keep_a_direction_in_vain_are_bias():
    diagnosis = diagnose([5.0 + 0.01 * (k % 2) for k in range(200)], 0.1, 0.1, grad_sq=1.0, v_sq=0.9)
    assert (diagnosis.state, diagnosis.cause) == ("stalled", "bias")
    assert "does not point downhill" in str(diagnosis)


def test_losses_alone():
    flat = [1.0 + 1e-4 * ((7 * k) % 5) for k in range(100)]
    assert diagnose(flat, 0.1).cause == "unknown"
    assert "pass gamma, grad_sq and v_sq" in str(diagnose(flat, 0.1))
    assert diagnose(flat, 0.1, biased=True).cause == "bias"
    assert diagnose(flat[:10], 0.1).state == "short"
    assert diagnose(torch.tensor(flat), 0.1).state == "stalled"
    with pytest.raises(ValueError, match="20 steps or more; got 5"):
        diagnose(flat, 0.1, window=5)


def test_noise_is_seldom_taken_for_more():
    """White and correlated noise around a constant: taken for a trend or a swing in at most 5 of 100 histories."""
    generator = torch.Generator().manual_seed(0)
    for memory in (0.0, 0.9):
        named = 0
        for _ in range(100):
            noise, level = torch.randn(300, generator=generator, dtype=F64), 0.0
            losses = []
            for xi in noise.tolist():
                level = memory * level + xi
                losses.append(10 + level)
            named += diagnose(losses, 0.1).state not in ("stalled", "short")
        assert named <= 5, memory


def test_a_change_that_may_be_chance_is_not_called_a_stall():
    """A fall of half the loss under noise that hides it from Kendall's test."""
    generator = torch.Generator().manual_seed(1)
    losses = torch.linspace(1.3, 0.7, 200, dtype=F64) + 3 * torch.randn(200, generator=generator, dtype=F64)
    diagnosis = diagnose(losses, 0.1, 0.1, grad_sq=1.0, v_sq=0.06, window=200)
    assert diagnosis.state == "short"
    assert "too noisy" in str(diagnosis)
