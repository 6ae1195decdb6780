"""`metamom.theory`'s closed forms for MAML: reference values, enumeration of every batch, Monte-Carlo, fixed points."""

from itertools import combinations, product
from math import sqrt

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from metamom.theory import bias_bound, bias_bound_steps, mean_square_bound, quadratic, regression, wishart
from metamom.theory.designs import Gaussian, Points, Waves
from metamom.theory.fixed_points import bias_floor, fixed_point

F64 = torch.float64
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def vector(*numbers):
    return torch.tensor(numbers, dtype=F64)


def close(computed, wanted, **tolerance):
    torch.testing.assert_close(computed, torch.as_tensor(wanted, dtype=F64), **(TIGHT | tolerance))


# Gaussian inputs: Sigma = I, d = 3, m = 5

DELTA = vector(1, -2, 0.5)
ROUND = Gaussian(torch.eye(3))
ROUND_MEANS = {
    "population": (lambda a: regression.population(ROUND, a).gain[0, 0], 0.81, 0.25),
    "coupled": (lambda a: regression.coupled(ROUND, a, 5).gain[0, 0], 0.818, 0.45),
    "first order": (lambda a: regression.first_order(ROUND, a).gain[0, 0], 0.9, 0.5),
    "full reuse": (lambda a: wishart.full_reuse(a, 3, 5), 0.6828, 0.27),
    "population, J=2": (lambda a: regression.population(ROUND, a, 2).gain[0, 0], 0.6561, 0.0625),
    "fresh, J=2": (lambda a: regression.fresh_batches(ROUND, a, 5, 2).gain[0, 0], 0.669124, 0.2025),
    "same, J=1": (lambda a: wishart.same_batch(a, 3, 5), 0.818, 0.45),
    "same, J=2": (lambda a: wishart.same_batch(a, 3, 5, 2), 0.6920952, 0.3195),
    "same, J=3": (lambda a: wishart.same_batch(a, 3, 5, 3), 0.6004016976, 0.283325),
}


@pytest.mark.parametrize("name", ROUND_MEANS)
def test_round_gaussian_means(name):
    mean, small, large = ROUND_MEANS[name]
    assert [float(mean(0.1)), float(mean(0.5))] == pytest.approx([small, large], rel=1e-13)


def test_wishart_moments():
    values = [wishart.moment(k, 3, 5) for k in range(7)]
    assert values == pytest.approx([1, 1, 1.8, 4.28, 12.152, 39.5024, 143.8416], rel=1e-15)
    with pytest.raises(ValueError, match="k = 0 to 6; got k=7"):
        wishart.moment(7, 3, 5)


@pytest.mark.parametrize("m", [1, 3, 8])
def test_wishart_moments_in_one_dimension(m):
    """There S is chi-squared / m, whose k-th moment is (m)(m+2)...(m+2k-2) / m^k."""
    wanted = 1.0
    for k in range(1, 7):
        wanted *= (m + 2 * k - 2) / m
        assert wishart.moment(k, 1, m) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("d", [2, 3, 5])
def test_wishart_moments_of_one_sample(d):
    """There S = phi phi^T, so tr S^k = ||phi||^{2k}, with mean d (d+2) ... (d+2k-2)."""
    wanted = 1.0
    for k in range(1, 7):
        wanted *= d + 2 * k - 2
        assert d * wishart.moment(k, d, 1) == pytest.approx(wanted, rel=1e-14)


def test_variances():
    coupled = wishart.variance_coupled(0.1, 3, 5.25, 0.25, m=5, m_out=7)
    independent = wishart.variance_independent(0.1, 3, 5.25, 0.25, m_in=5, m_h=5, m_out=7)
    assert (coupled, independent) == pytest.approx((2.2426555714285694, 2.16531900), rel=1e-14)
    assert 1.5 * regression.coupled(Gaussian(torch.eye(1)), 0.3, 4).gain.item() == pytest.approx(0.8025, rel=1e-14)
    assert wishart.variance_coupled(0.3, 1, 2.25, 0.25, m=4, m_out=3) == pytest.approx(0.704358333333333, rel=1e-14)


def maml_gradients(phi, residual, phi_out, residual_out, delta, alpha, phi_h=None):
    """(I - alpha S_h) grad L_out(delta - alpha grad L_in(delta)) of batches [R, m, d]; theta = 0."""

    def loss_gradient(x, noise, point):
        return torch.einsum("rmd,rm->rd", x, torch.einsum("rmd,rd->rm", x, point) - noise) / x.shape[1]

    start = delta.expand(len(phi), -1)
    outer = loss_gradient(phi_out, residual_out, start - alpha * loss_gradient(phi, residual, start))
    phi_h = phi if phi_h is None else phi_h
    hessian = torch.einsum("rmd,rm->rd", phi_h, torch.einsum("rmd,rd->rm", phi_h, outer)) / phi_h.shape[1]
    return outer - alpha * hessian


@pytest.mark.parametrize("kind", ["coupled", "independent"])
def test_mean_and_variance_by_sampling(kind):
    """120,000 draws; mean within 5 standard errors, variance within 2 % (heavy tails: products of six Gaussians)."""
    generator = torch.Generator().manual_seed(3)

    def batch(m):
        phi = torch.randn(120_000, m, 3, generator=generator, dtype=F64)
        return phi, 0.5 * torch.randn(120_000, m, generator=generator, dtype=F64)

    hessian = batch(5)[0] if kind == "independent" else None
    g = maml_gradients(*batch(5), *batch(7), DELTA, 0.1, hessian)
    mean = (regression.population(ROUND, 0.1) if hessian is not None else regression.coupled(ROUND, 0.1, 5)).at(DELTA)
    z = (g.mean(0) - mean) / (g.std(0) / sqrt(len(g)))
    assert z.abs().max() < 5
    exact = {
        "coupled": wishart.variance_coupled(0.1, 3, 5.25, 0.25, m=5, m_out=7),
        "independent": wishart.variance_independent(0.1, 3, 5.25, 0.25, m_in=5, m_h=5, m_out=7),
    }[kind]
    assert g.var(0).sum().item() == pytest.approx(exact, rel=0.02)


def test_tilted_gaussian_means():
    design = Gaussian(torch.tensor([[1.5, 0.3, 0], [0.3, 0.7, 0.2], [0, 0.2, 0.4]], dtype=F64))
    close(regression.population(design, 0.4).at(DELTA), [0.28944, -0.6352, -0.00896])
    close(regression.coupled(design, 0.4, 2).at(DELTA), [0.63168, -0.8936, -0.076])
    close(regression.first_order(design, 0.4).at(DELTA), [0.48, -0.812, -0.088])
    close(regression.fresh_batches(design, 0.4, 2, 2).at(DELTA), [0.44441856, -0.729749248, 0.017522176])
    close(regression.fresh_batches(design, 0.4, 2, 1).gain, regression.coupled(design, 0.4, 2).gain)


# Sinusoids, misspecification, other losses


def test_sinusoids():
    design = Waves(-5, 5)
    S = design.covariance
    close(S, torch.diag(vector(0.5272010555444685, 0.4727989444555315)))
    close(design.fourth(S), torch.diag(vector(0.2714511025120109, 0.2300286923334556)))
    close((design.fourth(S) - S @ S @ S).diagonal(), [0.12492033872866665, 0.12433976384860006])
    delta = vector(0.3, -0.2) - 2 * torch.stack([torch.cos(vector(0.7)), torch.sin(vector(0.7))])[:, 0]
    close(regression.population(design, 0.4).at(delta), [-0.40369703722492695, -0.4627219604611011])
    close(regression.coupled(design, 0.4, 10).at(delta), [-0.40615483864253504, -0.4656831077085598])


def test_sinusoids_over_any_interval():
    """Against the mean over a fine grid, where sin and cos are correlated."""
    x = torch.linspace(-1, 2, 600_001, dtype=F64)
    grid = Points(torch.stack([x.sin(), x.cos()], -1))
    Q = torch.tensor([[1.0, 0.4], [0.4, -0.3]], dtype=F64)
    close(Waves(-1, 2).covariance, grid.covariance, rtol=1e-5, atol=1e-5)
    close(Waves(-1, 2).fourth(Q), grid.fourth(Q), rtol=1e-5, atol=1e-5)


def test_a_full_period_of_sinusoids():
    design = Waves(0, 2 * torch.pi)
    close(design.covariance, torch.eye(2) / 2)
    close(design.fourth(design.covariance), torch.eye(2) / 4)


def test_misspecified_model():
    """phi ~ N(0, 1), y = (phi^3 - 3 phi) / 2, whose best fit is 0: c = E[phi^3 y] = 3."""
    mean = regression.coupled(Gaussian(torch.eye(1)), 0.3, 4, skew=vector(3.0))
    close(mean.offset, [-0.0675])
    close(mean.at(vector(0.8)), [0.3605])
    close(regression.population(Gaussian(torch.eye(1)), 0.3).at(vector(0.8)), [0.392])


def test_mean_squared_error_without_the_half():
    """`torch.nn.MSELoss` at alpha is twice our loss at 2 alpha: by enumerating two points."""
    phi, y, w = torch.tensor([[1.0], [2.0]], dtype=F64), vector(1, 0), vector(0.7)
    grads = []
    for i in range(2):
        v = w.clone().requires_grad_()
        inner = (phi[i] @ v - y[i]).square()
        (step,) = torch.autograd.grad(inner, v, create_graph=True)
        outer = torch.nn.functional.mse_loss(phi @ (v - 0.1 * step), y)
        grads.append(torch.autograd.grad(outer, v)[0])
    points = Points(phi)
    mean = regression.coupled(points, 0.2, 1, skew=points.skew(y))
    close(2 * mean.at(w - points.best(y)), torch.stack(grads).mean(0))


def test_quartic_task():
    gradient, bias = quadratic.quartic(1, 0.5, w=1.3, alpha=0.2, noise_var=0.64, m=5)
    assert gradient == pytest.approx(0.32121200037905545, rel=1e-13)
    assert bias == pytest.approx(0.001845871872, rel=1e-12)
    assert gradient + bias == pytest.approx(0.3230578722510554, rel=1e-13)


LOG_COSH = {1: 0.37539770588, 4: 0.41723132338, 16: 0.43030304354}


@pytest.mark.parametrize("m", LOG_COSH)
def test_bias_bound_on_log_cosh(m):
    """L(w) = log cosh w, N(0, 1) gradient noise, w = 1, alpha = 1/2, independent batches; by quadrature."""
    x, weights = map(torch.from_numpy, hermegauss(60))
    w, alpha = vector(1.0), 0.5
    u = w - alpha * torch.tanh(w)
    factor = 1 - alpha / torch.cosh(w) ** 2
    population = float(factor * torch.tanh(u))
    mean = float(factor * (weights * torch.tanh(u + alpha / sqrt(m) * x)).sum() / weights.sum())
    assert population == pytest.approx(0.43495958561, abs=1e-11)
    assert mean == pytest.approx(LOG_COSH[m], abs=1e-10)
    bound = bias_bound(L=1, rho=4 / (3 * sqrt(3)), alpha=alpha, sigma_g=1, m=m)
    assert bound == pytest.approx({1: 0.1443, 4: 0.03608, 16: 0.00902}[m], abs=5e-5)
    assert abs(mean - population) <= bound
    assert abs(mean - population) <= bias_bound(L=1, rho=float("inf"), alpha=alpha, sigma_g=1, m=m)
    outer = abs(float(torch.tanh(u)))
    assert abs(mean - population) <= bias_bound_steps(1, 4 / (3 * sqrt(3)), alpha, 1, m, steps=1, outer_grad=outer)


# Four data points: every batch

PHI = torch.tensor([[1, 0], [1, 1], [0, 2], [-1, 1]], dtype=F64)
Y = vector(1, 0, 2, 1)
W, ALPHA = vector(0.5, -0.5), 0.1
DATA = Points(PHI)


def enumerated(m, estimator, replacement=True):
    """All meta-gradients [R, d], each as likely as any other, outer batch all of the data."""
    batches = list(product(range(4), repeat=m) if replacement else combinations(range(4), m))

    def loss(w, rows):
        return ((PHI[rows] @ w - Y[rows]) ** 2).mean() / 2

    grads = []
    for batch in batches:
        w = W.clone().requires_grad_()
        rows = list(batch)
        (step,) = torch.autograd.grad(loss(w, rows), w, create_graph=True)
        u = w - ALPHA * (step if estimator != "first order" else step.detach())
        grads.append(torch.autograd.grad(loss(u, range(4)), w)[0])
    return torch.stack(grads)


ENUMERATED = {
    (1, True): (0.3290625, -1.50125),
    (2, True): (0.3249609375, -1.473125),
    (3, True): (0.32359375, -1.46375),
    (1, False): (0.3290625, -1.50125),
    (2, False): (0.32359375, -1.46375),
    (3, False): (0.3217708333333333, -1.45125),
}


@pytest.mark.parametrize(("m", "replacement"), ENUMERATED)
def test_closed_form_is_the_mean_of_all_batches(m, replacement):
    delta = W - DATA.best(Y)
    points = None if replacement else 4
    mean = regression.coupled(DATA, ALPHA, m, skew=DATA.skew(Y), points=points).at(delta)
    close(mean, ENUMERATED[m, replacement])
    close(enumerated(m, "coupled", replacement).mean(0), mean)
    close(enumerated(m, "first order", replacement).mean(0), regression.first_order(DATA, ALPHA).at(delta))


def test_moments_of_the_data():
    close(DATA.covariance, torch.diag(vector(0.75, 1.5)))
    close(DATA.best(Y), [0, 5 / 6])
    close(DATA.fourth(DATA.covariance), torch.diag(vector(1.3125, 7.125)))
    close(DATA.skew(Y), [-0.375, 0.625])
    close(regression.population(DATA, ALPHA).at(W - DATA.best(Y)), [0.320859375, -1.445])
    close(regression.population(DATA, ALPHA, 2).at(W - DATA.best(Y)), [0.274535302734375, -1.0440125])


@pytest.mark.parametrize(
    ("m", "measured", "wanted"), [(1, 4.855089849853515, 7.460020849609376), (2, 2.305785711669921, 3.730010424804688)]
)
def test_mean_square_bound_on_the_data(m, measured, wanted):
    """Every pair of inner and outer batches of m, with replacement."""
    delta = W - DATA.best(Y)
    rows = torch.tensor(list(product(range(4), repeat=m)))
    pairs = torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(rows)))
    inner, outer = rows[pairs[:, 0]], rows[pairs[:, 1]]
    residual = Y - PHI @ DATA.best(Y)
    g = maml_gradients(PHI[inner], residual[inner], PHI[outer], residual[outer], delta, ALPHA)
    error = (g - regression.population(DATA, ALPHA).at(delta)).square().sum(-1).mean()
    close(error, measured)
    bound = mean_square_bound(m_in=m, m_h=m, m_out=m, **error_constants())
    assert error <= bound
    assert bound == pytest.approx(wanted, rel=0.3)  # the reference bounds the noise after the step in another way


def error_constants():
    """L, Lambda and variances of the four points, whose Hessians are phi phi^T."""
    S, delta = DATA.covariance, W - DATA.best(Y)
    hessians = torch.einsum("ni,nj->nij", PHI, PHI)
    grads = PHI * (PHI @ W - Y).unsqueeze(-1)
    single = [torch.eye(2, dtype=F64) - ALPHA * h for h in hessians]
    after = W - ALPHA * grads  # inner steps on one point, the most spread
    spread = []
    for w in after:
        each = PHI * (PHI @ w - Y).unsqueeze(-1)
        spread.append((each - each.mean(0)).square().sum(-1).mean())
    return {
        "L": float(torch.linalg.eigvalsh(S).max()),
        "alpha": ALPHA,
        "Lambda": max(float(torch.linalg.matrix_norm(s, 2)) ** 2 for s in single),
        "sigma_g2": float((grads - grads.mean(0)).square().sum(-1).mean()),
        "sigma_h2": float(torch.linalg.matrix_norm(((hessians - S) @ (hessians - S)).mean(0), 2)),
        "outer_grad_sq": float((S @ (delta - ALPHA * S @ delta)).square().sum()),
        "sigma_out2": float(torch.stack(spread).mean()),
    }


def test_coupling_bound_on_the_data():
    constants = error_constants()
    bias = regression.coupled(DATA, ALPHA, 1, skew=DATA.skew(Y)).at(W - DATA.best(Y)) - vector(0.320859375, -1.445)
    close(bias.norm(), 0.05684499766703895, rtol=1e-10)
    args = {"sigma_g": sqrt(constants["sigma_g2"]), "sigma_h": sqrt(constants["sigma_h2"]), "m": 1}
    bound = bias_bound(L=constants["L"], rho=0, alpha=ALPHA, **args)
    assert bound == pytest.approx(0.06544394667385213, rel=1e-12)


# Quadratic tasks


def test_quadratic_means_by_autograd():
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    delta = vector(0.4, -1.0)
    for steps in (1, 2, 3):
        w = delta.clone().requires_grad_()
        u = w
        for _ in range(steps):
            u = u - 0.3 * A @ u
        (grad,) = torch.autograd.grad(u @ A @ u / 2, w)
        close(quadratic.population(A, 0.3, steps).at(delta), grad)
        close(quadratic.first_order(A, 0.3, steps).at(delta), (A @ u).detach())


def test_hessian_noise_by_sampling():
    """Symmetric Gaussian E, in Hessian and gradient of the inner step: mean of M_E (A u + nu_out) within 5 errors."""
    generator = torch.Generator().manual_seed(0)
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    delta, alpha, s, m = vector(0.4, -1.0), 0.3, 0.6, 2
    raw = torch.randn(200_000, m, 2, 2, generator=generator, dtype=F64)
    E = (s * (raw + raw.transpose(-1, -2)) / sqrt(2)).mean(1)
    u = delta - alpha * ((A + E) @ delta)
    g = (u @ A) - alpha * torch.einsum("rij,rj->ri", A + E, u @ A)
    z = (g.mean(0) - quadratic.coupled(A, alpha, s**2, m).at(delta)) / (g.std(0) / sqrt(len(g)))
    assert z.abs().max() < 5


def test_additive_noise_by_exact_propagation():
    """g is linear in the noises; its covariance is that of the linear map."""
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    M = torch.eye(2, dtype=F64) - 0.3 * A
    maps = [(-0.3 * M @ A, 4), (M, 5)]  # noise of the inner step, of the outer gradient
    wanted = sum(0.7 / m * (J @ J.T).trace() for J, m in maps)
    assert quadratic.variance_additive(A, 0.3, 0.7, m_in=4, m_out=5) == pytest.approx(float(wanted), rel=1e-14)


# Tasks that differ

DESIGNS = [Gaussian(torch.eye(2)), Gaussian(torch.eye(2) / 4)]
THETAS = torch.eye(2, dtype=F64)
EXACT = [regression.population(design, 0.5) for design in DESIGNS]
OPTIMUM = (0.5663716814159292, 0.4336283185840708)

ENDS = {
    1: ((0.83116883, 0.16883117), 1e-8, 0.006830831506156182),
    2: ((0.7600950118764845, 0.23990498812351543), 1e-13, 0.0036560389526125426),
    5: ((0.6736842105263158, 0.3263157894736842), 1e-13, 0.0011218836565096944),
    10: ((0.6279245283018868, 0.37207547169811317), 1e-13, 0.00036909932360270595),
    50: ((0.58032506, 0.41967494), 1e-8, 1.896732015621691e-05),
}


@pytest.mark.parametrize("m", ENDS)
def test_fixed_points(m):
    end, digits, wanted = ENDS[m]
    floor = bias_floor(EXACT, [regression.coupled(design, 0.5, m) for design in DESIGNS], THETAS)
    close(floor.optimum, OPTIMUM, rtol=1e-14)
    close(floor.end, end, rtol=0, atol=digits)
    assert floor.floor == pytest.approx(wanted, rel=1e-12)
    assert floor.zeta2 == pytest.approx(0.02350418983475605, rel=1e-13)
    assert floor.floor <= floor.bound


@pytest.mark.parametrize(
    ("m", "wanted"), [(2, 0.00036909932360270595), (5, 7.104951537213316e-05), (10, 1.896732015621691e-05)]
)
def test_tracking_takes_its_share_of_the_bias(m, wanted):
    biased = [regression.coupled(design, 0.5, m, share=0.2) for design in DESIGNS]
    assert bias_floor(EXACT, biased, THETAS).floor == pytest.approx(wanted, rel=1e-11)


def test_first_order_fixed_point():
    floor = bias_floor(EXACT, [regression.first_order(design, 0.5) for design in DESIGNS], THETAS)
    close(floor.end, [0.6956521739130435, 0.30434782608695654])
    assert floor.floor == pytest.approx(0.0016282195179584122, rel=1e-13)
    quadratic_end = fixed_point([quadratic.first_order(d.covariance, 0.5) for d in DESIGNS], THETAS)
    close(quadratic_end, floor.end)


def test_tasks_alike_have_no_floor():
    biased = [regression.coupled(ROUND, 0.5, 1) for _ in range(2)]
    exact = [regression.population(ROUND, 0.5)] * 2
    floor = bias_floor(exact, biased, torch.tensor([[1.0, 2, 3], [0, 0, 1]]))
    assert floor.floor < 1e-28
    assert floor.kappa > 1  # and yet the general bound promises nothing
    assert floor.bound == float("inf")


def test_fixed_point_is_where_momentum_ends():
    means = [regression.coupled(design, 0.5, 2) for design in DESIGNS]
    for beta in (1.0, 0.3, 0.05):
        w, v = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
        for _ in range(1500):
            g = torch.stack([mean.at(w - theta) for mean, theta in zip(means, THETAS, strict=True)]).mean(0)
            v = (1 - beta) * v + beta * g
            w = w - 0.5 * v
        close(w, ENDS[2][0], rtol=1e-12)


BAD = [
    (lambda: regression.coupled(ROUND, 0.1, 5, points=4), "m <= points=4"),
    (lambda: regression.coupled(ROUND, 0.1, 0), "m must be a whole number"),
    (lambda: fixed_point(EXACT, THETAS[:1]), r"thetas \[2, d\]; got shape \(1, 2\)"),
    (lambda: bias_floor(EXACT, EXACT[:1], THETAS), "each task needs an exact and a biased mean; got 2 and 1"),
    (lambda: Gaussian(torch.tensor([[1.0, 2], [0, 1]])), "symmetric"),
    (lambda: Points(torch.ones(3)), r"points \[N, d\]"),
    (lambda: Waves(1, 1), "low < high"),
    (lambda: quadratic.population(torch.tensor([[1.0, 2], [0, 1]]), 0.1), "symmetric"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_ranges(call, message):
    with pytest.raises(ValueError, match=message):
        call()
