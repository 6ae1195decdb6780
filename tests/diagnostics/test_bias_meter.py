"""The bias meter against closed forms, against direct computations, and as a command."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzzing import bounded
from oracles import linear_learner, point_learner
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, TopK, cli, nets, train
from metamom.bias import EF21
from metamom.common.intervals import Jackknife, squared_norm, total_variance
from metamom.diagnostics import TrackBias, measure
from metamom.diagnostics.power_law import fit_slope
from metamom.experiments.families import FAMILIES
from metamom.maml.estimators import ESTIMATORS, memoryless_estimators
from metamom.rng import DrawCoordinates
from metamom.tasks import Episodes, FixedTasks, LinearRegression, Quadratic, Sinusoid
from metamom.tasks.population import Population
from metamom.theory.designs import Gaussian
from metamom.theory.regression import coupled, first_order, population
from metamom.training.directory import read_metrics

ALPHA = 0.4
SIGMA = torch.tensor([[1.5, 0.3, 0], [0.3, 0.7, 0.2], [0, 0.2, 0.4]], dtype=torch.float64)
DELTA = torch.tensor([1, -2, 0.5], dtype=torch.float64)


def regression(shots: int = 40, seed: int = 0, **options) -> LinearRegression:
    """One task with θ = 0, so that δ is the weights."""
    options = {"covariance": SIGMA, "theta": [0, 0, 0], "noise": 0.3} | options
    return LinearRegression(3, shots, 7, seed=seed, dtype=torch.float64, **options)


def measured(estimator: str, family: LinearRegression, **options):
    learner = linear_learner(DELTA, ALPHA, estimator=estimator)
    options = {"inner_batches": (2, 10), "draws": 60} | options
    return measure(learner, family, population=Population(family), **options)


def true_bias(estimator: str, m: int) -> torch.Tensor:
    design = Gaussian(SIGMA)
    means = {"exact": coupled(design, ALPHA, m), "first-order": first_order(design, ALPHA)}
    exact = population(design, ALPHA)
    return means.get(estimator, exact).at(DELTA) - exact.at(DELTA)


# the statistics


def test_squared_norms_and_variances_are_those_of_pairs_of_different_draws():
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1

    def by_pairs(rows):
        return sum(float(a @ b) for a, b in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1))

    for statistic, slow in ((squared_norm, by_pairs), (total_variance, lambda rows: float(rows.var(0).sum()))):
        fast = statistic(rows)
        assert fast.value == pytest.approx(slow(rows), rel=1e-12)
        without = [slow(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(7)]
        assert fast.without.tolist() == pytest.approx(without, rel=1e-12)


def test_intervals_of_what_cannot_be_negative_are_not():
    """One draw far from the others has a variance as uncertain as it is large: the normal interval reaches below 0."""
    rows = torch.tensor([[10.0], [0.0], [0.0], [0.0]])
    found = total_variance(rows).interval()
    assert found.value == 25.0
    assert found.low == 0.0  # 25 - 1.96 · 25
    assert found.high == pytest.approx(25 + 1.959964 * 25, rel=1e-6)
    around_zero = squared_norm(torch.tensor([[3.0], [1.0], [-1.0], [-3.5]]))
    assert around_zero.value < 0  # an estimate without bias of a square that is zero
    assert around_zero.interval().low == 0.0
    assert around_zero.interval().covers_zero
    surely_below = Jackknife(-1.0, torch.tensor([-1.0, -1.0, -1.0]), least=0.0)
    assert surely_below.interval() == (-1.0, 0.0, 0.0)
    assert Jackknife(-1.0, torch.tensor([-1.0, -1.0, -1.0])).interval() == (-1.0, -1.0, -1.0)  # of a slope, say


def test_a_mean_of_zero_has_no_squared_norm():
    """The plug-in estimate would be d/R = 1 each time."""
    rows = torch.randn(400, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [squared_norm(each).interval() for each in rows]
    values = torch.tensor([interval.value for interval in found])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert np.mean([interval.covers_zero for interval in found]) > 0.93


@pytest.mark.parametrize(("rate", "names"), [(-1.0, ("1/m",)), (-0.5, ("1/√m",)), (-0.75, ())])
def test_the_slope_of_a_power_is_its_exponent(rate, names):
    wiggle = 1 + 1e-3 * torch.linspace(-1, 1, 9, dtype=torch.float64)
    curve = {m: Jackknife(m ** (2 * rate), m ** (2 * rate) * wiggle.roll(m)) for m in (1, 2, 5, 10)}
    slope = fit_slope(curve)
    assert slope.exponent.value == pytest.approx(rate, abs=1e-12)
    assert slope.scale == pytest.approx(1)
    assert slope.consistent == names
    assert f"m^{rate:.2f}" in slope.words


def test_no_slope_is_seen_of_no_bias():
    zero = Jackknife(0.0, torch.linspace(-1, 1, 9, dtype=torch.float64))
    assert fit_slope({1: zero, 2: zero}) is None


# populations


def test_a_population_has_the_exact_gradient():
    family = regression()
    grads = linear_learner(DELTA, ALPHA).meta_gradient(Population(family).sample(0, 1)).grads["weight"]
    torch.testing.assert_close(grads.flatten(), population(Gaussian(SIGMA), ALPHA).at(DELTA), rtol=0, atol=1e-12)


def test_a_population_of_a_data_set_is_the_data_set():
    x, y = torch.eye(2), torch.tensor([1.0, 2.0])
    batch = Population(LinearRegression(2, 1, data=(x, y))).sample(3, 2)
    assert torch.equal(batch.query_x, x.expand(2, 2, 2))
    assert torch.equal(batch.query_y[..., 0], y.expand(2, 2))


def test_a_population_of_quadratics_has_no_noise():
    family = Quadratic(2, center=[1, -1], hessian=np.diag([1.0, 0.5]), gradient_noise=1.0, dtype=torch.float64)
    w = torch.tensor([2.0, 2.0], dtype=torch.float64)
    grads = point_learner(w, 0.3).meta_gradient(Population(family).sample(0, 1)).grads["weight"].flatten()
    hessian = torch.tensor([1, 0.5], dtype=torch.float64)
    delta = w - torch.tensor([1, -1], dtype=torch.float64)
    torch.testing.assert_close(grads, hessian * (1 - 0.3 * hessian) ** 2 * delta, rtol=0, atol=1e-12)


def test_a_population_is_of_the_same_tasks_in_every_stream():
    family = LinearRegression(2, 4, spectrum=(0.5, 1), dtype=torch.float64).with_stream("other")
    theta, _ = family.parameters(DrawCoordinates("other", 3, np.arange(5)))
    whole = Population(LinearRegression(2, 4, spectrum=(0.5, 1), dtype=torch.float64)).with_stream("other").sample(3, 5)
    expected = (whole.support_x @ torch.from_numpy(theta)[..., None]).numpy()
    np.testing.assert_allclose(whole.support_y.numpy(), expected, atol=1e-12)


def test_a_population_of_sinusoids_is_not_known():
    with pytest.raises(TypeError, match=r"LinearRegression and Quadratic tasks; got Sinusoid"):
        Population(Sinusoid())


# the meter against the closed forms


@pytest.mark.parametrize("estimator", ["exact", "independent", "first-order"])
def test_the_interval_covers_the_exact_bias(estimator):
    found = measured(estimator, regression())
    for at in found.sizes:
        wanted = true_bias(estimator, at.inner_batch)
        assert at.bias.squared.low <= float(wanted @ wanted) <= at.bias.squared.high
        assert at.bias.excludes_zero == (estimator != "independent")
    assert found.reference == "population"
    assert found.correction is None
    true = population(Gaussian(SIGMA), ALPHA).at(DELTA)
    assert found.gradient.value == pytest.approx(float(true.norm()), rel=1e-9)


def test_intervals_cover_as_often_as_they_say():
    covered = {"exact": 0, "independent": 0}
    seeds = 20
    for estimator, seed in itertools.product(covered, range(seeds)):
        at = measured(estimator, regression(seed=seed, shots=20), inner_batches=(5,), draws=40).sizes[0]
        wanted = true_bias(estimator, 5)
        covered[estimator] += at.bias.squared.low <= float(wanted @ wanted) <= at.bias.squared.high
    assert min(covered.values()) >= 0.8 * seeds, covered


def test_the_bias_of_several_tasks_is_that_of_their_mean():
    thetas = torch.tensor([[0.0, 0, 0], [1, 1, 1]], dtype=torch.float64)
    found = measured("exact", regression(theta=thetas), inner_batches=(2,), tasks_per_worker=2, draws=60)
    gain = coupled(Gaussian(SIGMA), ALPHA, 2).gain - population(Gaussian(SIGMA), ALPHA).gain
    wanted = gain @ (DELTA - thetas.mean(0))
    assert found.sizes[0].bias.squared.low <= float(wanted @ wanted) <= found.sizes[0].bias.squared.high
    assert float((found.sizes[0].bias.mean - wanted).norm()) < 0.25 * float(wanted.norm())


@pytest.mark.parametrize(("estimator", "wanted"), [("exact", 2.2426555714285694), ("independent", 2.16531900)])
def test_the_variance_is_the_exact_one(estimator, wanted):
    family = LinearRegression(3, 10, 7, theta=[0, 0, 0], noise=0.5, dtype=torch.float64)
    found = measure(linear_learner(DELTA, 0.1, estimator=estimator), family, inner_batches=(5,), draws=3000)
    assert found.sizes[0].variance.value == pytest.approx(wanted, rel=0.1)
    assert found.sizes[0].variance.low < wanted < found.sizes[0].variance.high


def test_the_slope_of_linear_regression_is_that_of_1_over_m():
    found = measured("exact", regression(), inner_batches=(1, 2, 5, 10))
    slope = found.slopes["bias"]
    assert slope.exponent.low <= -1 <= slope.exponent.high
    assert slope.consistent == ("1/m",)
    assert found.slopes["curvature"] is None, "there is none to see"


@pytest.mark.parametrize("estimator", memoryless_estimators())
@pytest.mark.parametrize("inner_batches", ["same", "fresh"])
@pytest.mark.filterwarnings("ignore:the proximal problem was not solved", "ignore:conjugate gradients")
def test_the_parts_add_up(estimator, inner_batches):
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    steps = 1 if ESTIMATORS[estimator].proximal else 2
    options = (
        {"proximal": "9,iterations=3,cg_iterations=3,tolerance=1e-9"}
        if ESTIMATORS[estimator].proximal
        else {"inner_lr": 0.1}
    )
    learner = MAML(net, F.mse_loss, inner_steps=steps, estimator=estimator, inner_batches=inner_batches, **options)
    family = Sinusoid(16, 5, dtype=torch.float64)
    found = measure(learner, family, inner_batches=(1, 4), draws=5, tasks_per_worker=2, bias=TopK(ratio=0.3))
    for at in found.sizes:
        assert {"curvature", "operator"} <= set(at.sources)
        total = torch.stack([part.mean for part in at.sources.values()]).sum(0)
        torch.testing.assert_close(total, at.bias.mean, rtol=0, atol=1e-12)
    assert ("coupling" in found.sizes[0].sources) == (estimator in ("exact", "first-order", "richardson"))


def test_a_hessian_free_estimator_of_a_smooth_model_lacks_little():
    net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    learner = MAML(net, F.mse_loss, inner_lr=0.1, estimator="hessian-free")
    parts = measure(learner, Sinusoid(16, 5, dtype=torch.float64), inner_batches=(2,), draws=5).sizes[0].sources
    assert set(parts) == {"curvature", "hessian"}
    assert float(parts["hessian"].mean.norm()) < 1e-4 * float(parts["curvature"].mean.norm())


def test_the_bias_of_an_operator_is_the_mean_of_what_it_does_to_messages():
    learner = MAML(nets.SinusoidMLP((8,), generator=torch.Generator().manual_seed(0)).double(), F.mse_loss)
    family, operator = Sinusoid(12, 6, dtype=torch.float64), TopK(ratio=0.1)
    found = measure(learner, family, inner_batches=(3,), bias=operator, draws=6, tasks_per_worker=4, queries=5)
    moved = []
    for step in range(6):
        x, y, query_x, query_y = family.with_stream("bias").sample(step, 4)[:4]
        batch = TaskBatch(x[:, :3], y[:, :3], query_x[:, :5], query_y[:, :5])
        g = torch.cat([each.flatten() for each in learner.meta_gradient(batch).grads.values()])
        moved.append(operator(g) - g)
    part = found.sizes[0].sources["operator"]
    torch.testing.assert_close(part.mean, torch.stack(moved).mean(0), rtol=0, atol=1e-12)
    assert part.squared.value == pytest.approx(squared_norm(torch.stack(moved)).value, rel=1e-9)
    assert found.bias == "topk:10%"


def test_a_pool_has_a_reference_without_the_first_order_of_its_own_bias():
    """Of a quartic loss the curvature's share is α²/m times a constant; extrapolated, none of it is left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    learner = MAML(net, F.mse_loss, inner_lr=0.2, estimator="cross-fit")
    found = measure(learner, Sinusoid(64, 20, dtype=torch.float64), inner_batches=(4, 8, 16), draws=100)
    assert found.reference == "pool"
    assert found.correction.value < 0.2 * found.sizes[0].bias.norm.value
    assert "1/m" in found.slopes["bias"].consistent


def test_fixed_tasks_are_measured_too():
    family = FixedTasks(Sinusoid(8, 4), 3)
    found = measure(MAML(nets.SinusoidMLP((4,)), F.mse_loss), family, inner_batches=(1,), draws=4, tasks_per_worker=2)
    assert found.sizes[0].bias.mean.isfinite().all()


def test_classes_are_cut_by_shots():
    images = torch.rand(80, 3, generator=torch.Generator().manual_seed(0))
    family = Episodes(images, torch.arange(80) % 4, ways=2, shots=8, queries=2)
    found = measure(MAML(nn.Linear(3, 2), F.cross_entropy), family, inner_batches=(1, 4), draws=4, queries=1)
    assert found.pool == 8
    with pytest.raises(ValueError, match=r"two inner batches of 10 points do not fit in a pool of 16"):
        measure(MAML(nn.Linear(3, 2), F.cross_entropy), family, inner_batches=(5,), draws=4)


# it leaves everything as it was


def test_the_same_again_and_nothing_is_moved():
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    learner = MAML(net, F.mse_loss, learn_inner_lr="scalar")
    before, state = {k: v.clone() for k, v in learner.state_dict().items()}, torch.get_rng_state()
    first, second = (measure(learner, Sinusoid(8, 4), inner_batches=(1, 2), draws=5) for _ in range(2))
    for one, other in zip(first.sizes, second.sizes, strict=True):
        assert torch.equal(one.bias.mean, other.bias.mean)
        assert one.variance == other.variance
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())
    assert net.training


def test_tracking_does_not_move_a_run(tmp_path):
    def run(track_bias, folder):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.1)
        learner = MAML(net, F.mse_loss)
        optimizer = CompositeMomentum(learner.parameters(), lr=0.05)
        arguments = {"iterations": 5, "meta_batch": 4, "workers": 2, "bias": TopK(ratio=0.5)}
        result = train(learner, optimizer, Sinusoid(), **arguments, track_bias=track_bias, run_dir=tmp_path / folder)
        return [p.clone() for p in learner.parameters()], result.metrics

    plan = TrackBias(2, Sinusoid(40, 10), 10, draws=4, tasks_per_worker=2)
    (with_it, metrics), (without, plain) = run(plan, "with"), run(None, "without")
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert [line["loss"] for line in metrics] == [line["loss"] for line in plain]
    assert [line["step"] for line in metrics if "measured_bias" in line] == [0, 2, 4]
    kept = read_metrics(tmp_path / "with")[2]["measured_bias"]
    assert set(kept) == {"norm", "low", "high", "gradient", "variance"}
    assert 0 <= kept["low"] <= kept["norm"] <= kept["high"]
    assert "measured_bias" not in read_metrics(tmp_path / "without")[2]


# refusals

BAD = {
    "no sizes": ({"inner_batches": ()}, r"one or more different numbers of shots >= 1; got \(\)"),
    "a size of 0": ({"inner_batches": (0, 1)}, r"got \(0, 1\)"),
    "a size twice": ({"inner_batches": (2, 2)}, "different numbers of shots"),
    "a large size": ({"inner_batches": (5,)}, "two inner batches of 5 points do not fit in a pool of 8.*more shots"),
    "few draws": ({"draws": 2}, "at least 3 draws; got draws=2"),
    "no tasks": ({"tasks_per_worker": 0}, "tasks_per_worker must be >= 1; got 0"),
    "no queries": ({"queries": 0}, "queries must be >= 1; got 0"),
    "many queries": ({"queries": 9}, "queries=9 shots are more than the 4"),
    "confidence": ({"confidence": 95}, r"confidence must be in \(0, 1\); got 95. 95 % is 0.95"),
    "a start": ({"bias": "powersgd:1"}, "powersgd:1 starts at what its last step found.*Measure powersgd:1:fresh"),
    "error feedback": ({"bias": EF21(TopK(ratio=0.1))}, "has error feedback.*Measure the operator inside"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(options, message):
    options = {"inner_batches": (1,), "draws": 4} | options
    with pytest.raises(ValueError, match=message):
        measure(MAML(nn.Linear(1, 1), F.mse_loss), Sinusoid(8, 4), **options)


def test_too_few_draws_or_a_small_pool_are_refused():
    with pytest.raises(ValueError, match=r"with R >= 3; got shape \[2, 4\]"):
        squared_norm(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"quarters of at least one shot; got 3 support points"):
        measure(MAML(nn.Linear(1, 1), F.mse_loss), Sinusoid(3, 4), inner_batches=(1,), draws=4)


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_adam_inside_has_nothing_to_be_measured_against(estimator):
    learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_optimizer="adam", estimator=estimator)
    with pytest.raises(ValueError, match=r"against estimator 'cross-fit'.*got 'adam'. Measure a learner with one of"):
        measure(learner, Sinusoid(8, 4), inner_batches=(1,), draws=4)
    learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_optimizer="momentum:0.9", estimator=estimator)
    assert measure(learner, Sinusoid(8, 4), inner_batches=(1,), draws=4).estimator == estimator


def test_tracking_is_checked_before_the_run():
    learner = MAML(nn.Linear(1, 1), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05)
    for plan, message in (
        (TrackBias(0, Sinusoid(8), 1), "every N >= 1 steps; got every=0"),
        (TrackBias(1, Sinusoid(8), 5), "do not fit in a pool of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            train(learner, optimizer, Sinusoid(), iterations=1, meta_batch=2, track_bias=plan)


# the command


def test_the_command_on_tasks(tmp_path, capsys, monkeypatch):
    family = FAMILIES["sinusoid"]
    monkeypatch.setitem(FAMILIES, "sinusoid", replace(family, bias=family.bias._replace(pool=24, pairs=2)))
    out = tmp_path / "out"
    arguments = ["--inner-batch", "1,2", "--tasks", "16", "--estimator", "first-order", "--bias", "topk:10%"]
    assert cli.main(["bias", "sinusoid", *arguments, "--inner-lr", "0.05", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines() if not line.startswith("report: ")) <= 100
    for name in ("bias", "curvature", "coupling", "hessian", "operator", "variance"):
        assert said.count(f" {name} ") >= 2, name
    assert "first-order, operator topk:10%; 12 draws of 8 tasks" in said
    assert "bias without the operator's: " in said
    assert (out / "figures" / "bias.png").stat().st_size > 5000
    page = (out / "bias.md").read_text()
    assert "![bias over the inner batch size](figures/bias.png)" in page
    assert "| 2 | operator |" in page


def test_the_command_on_a_run_says_json_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--meta-batch", "4", "--shots", "5", "--evaluate-tasks", "4", "--run-dir", "run"]
    assert cli.main(["train", "sinusoid", "--iterations", "3", "--track-bias", "every=2", *small]) == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "measured_bias" in line] == [0, 2]
    capsys.readouterr()
    assert (
        cli.main(["bias", "run", "--json", "--inner-batch", "1,2", "--tasks", "4", "--estimator", "independent"]) == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["estimator"] == "independent"
    assert [at["inner_batch"] for at in answer["sizes"]] == [1, 2]
    bias = answer["sizes"][0]["bias"]
    assert 0 <= bias["low"] <= bias["value"] <= bias["high"]
    assert bias["excludes_zero"] == (bias["low"] > 0)
    assert math.isfinite(answer["sizes"][0]["variance"]["value"])
    assert not (tmp_path / "run" / "bias.md").exists()
    assert cli.main(["bias", "run", "--inner-batch", "1", "--tasks", "4"]) == 0
    assert (tmp_path / "run" / "bias.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["sinusoid", "--inner-batch", "0"], "numbers of shots >= 1"),
        (["sinusoid", "--tasks", "2"], "at least 3 tasks; got --tasks 2"),
        (["sinusoid", "--bias", "ef21:topk:5%"], "has error feedback"),
        (["run", "--inner-lr", "0.1"], "--inner-lr belongs to the learner that the run trained"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    assert cli.main(["bias", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err


def test_too_little_memory_is_reported(capsys):
    with bounded(60, 512):
        assert cli.main(["bias", "sinusoid", "--inner-batch", "100000"]) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_it_is_printed_as_a_small_table():
    found = measured("exact", regression(), draws=4)
    lines = repr(found).splitlines()
    assert lines[0] == "   m  bias      95 % interval"
    norm = found.sizes[1].bias.norm
    assert lines[2] == f"  10  {norm.value:<8.3g}  {norm.low:.3g} to {norm.high:.3g}"
    assert len(lines) == 4


def test_the_bias_of_proximal_estimators_in_linear_regression():
    """With a population, the reference is the proximal objective's gradient; perturbing adds O(nu^2)."""
    learner = MAML(nn.Linear(2, 1, bias=False).double(), F.mse_loss, estimator="perturbed", proximal="1,nu=1e-2")
    found = measure(learner, LinearRegression(2, 16, 8, dtype=torch.float64), inner_batches=(2, 4), draws=4)
    for at in found.sizes:
        assert set(at.sources) == {"curvature", "perturbation"}
        assert float(at.sources["perturbation"].mean.norm()) < 1e-2 * float(at.sources["curvature"].mean.norm())
