"""When momentum beats SGD: the exact trajectory, the search on it, the rule, and the report."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from metamom.experiments.paper.protocol import PROTOCOLS
from metamom.experiments.quadratics import Quadratics as Workers
from metamom.experiments.quadratics import descend
from metamom.experiments.shared.tuning import tune
from metamom.experiments.when import law, mnist, relative, rule, search, sinusoids
from metamom.experiments.when import map as quadratics
from metamom.experiments.when.report import WhenMomentumWins, report
from metamom.experiments.when.transient import moments, turning_limit
from metamom.tasks.images import LabelledImages
from metamom.theory import stable_limit, stationary

LAM = torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64)
LAW = law.LawCheck(designs=4, runs=60, steps=400, last=100, looks=(1, 5, 20))
RULE = rule.WhenRule(spectra=8, each=16, conditions=(3.0, 100.0), targets=(1e-3, 0.2), rooms=(1.0, 1000.0))
FEW = rule.WhenRule(spectra=2, each=4, dimension=4, conditions=(3.0, 10.0), targets=(1e-2, 0.2), rooms=(10.0, 1000.0))


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "lr"), [(1.0, 0.5), (1.0, 1.8), (0.5, 2.0), (0.2, 3.0), (0.1, 0.4)])
def test_the_course_ends_at_the_stationary_law(beta, lr):
    noise, bias = torch.tensor([0.3, 1.0, 2.0]).double(), torch.tensor([0.5, -0.1, 0.2]).double()
    *_, last = islice(moments(lr * LAM, number(beta)), 1200)
    exact = stationary(LAM, noise, bias, beta, lr)
    start = torch.ones(3).double()
    mean = (start + bias) * last.left - bias
    assert float((mean.square() + noise * last.variance).sum()) == pytest.approx(exact.grad_sq, rel=1e-9)
    deviation = (start + bias) * (last.momentum - last.left) + bias
    assert float((deviation.square() + noise * last.deviation).sum()) == pytest.approx(exact.deviation_sq, rel=1e-9)


@pytest.mark.parametrize(("beta", "lr"), [(1.0, 1.5), (0.3, 3.0), (0.05, 0.7)])
def test_without_noise_the_course_is_the_optimizer_s(beta, lr):
    bias = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
    problem = Workers(LAM.repeat(2, 1), torch.zeros(2, 3, dtype=torch.float64))
    ran = descend(problem, torch.ones(3).double(), lr=lr, beta=beta, steps=60, bias=law.Shift(bias))
    for k, now in enumerate(islice(moments(lr * LAM, number(beta)), 60)):
        mean = (LAM + bias) * now.left - bias
        assert float(mean.square().sum()) == pytest.approx(float(ran.grad_sq[k]), rel=1e-10, abs=1e-12)
        deviation = (LAM + bias) * (now.momentum - now.left) + bias
        assert float(deviation.square().sum()) == pytest.approx(float(ran.deviation_sq[k]), rel=1e-10, abs=1e-12)


def test_many_runs_follow_the_law_and_the_steps_and_order():
    """Within five standard errors, all 20 of them."""
    for point in law.points(LAW):
        for value in (point.grad_sq, point.deviation_sq, *point.trajectory):
            assert value.z < 5
            assert value.error < 0.2 * value.exact  # or the line above says nothing


@pytest.mark.parametrize("beta", [1.0, 0.4, 0.1])
@pytest.mark.parametrize("B", [0.0, 0.05, 0.5])
def test_a_turning_bias_against_matrices(beta, B):
    """Mean and covariance of (u, v) in the plane, written as a 4 x 4 linear map."""
    c, turn = 0.3 * turning_limit(B, beta) if B else 0.5, math.sqrt(B)
    eye, h = torch.eye(2).double(), torch.tensor([[1.0, -turn], [turn, 1.0]], dtype=torch.float64)
    step = torch.cat(
        [torch.cat([eye - c * beta * h, -c * (1 - beta) * eye], 1), torch.cat([beta * h, (1 - beta) * eye], 1)]
    )
    into = torch.cat([-c * beta * eye, beta * eye])  # the noise, half of whose variance is in each entry
    mean, covariance = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), torch.zeros(4, 4).double()
    for now in islice(moments(number(c), number(beta), turn), 80):
        assert abs(complex(now.left) - complex(mean[0], mean[1])) < 1e-12
        assert float(now.variance) == pytest.approx(float(covariance[:2, :2].trace()), rel=1e-10, abs=1e-14)
        before = torch.cat([torch.cat([eye, torch.zeros(2, 2).double()], 1), step[2:]])  # (u_k, v_k)
        noise = torch.cat([torch.zeros(2, 2).double(), beta * eye])
        both = before @ covariance @ before.T + noise @ noise.T / 2
        difference = both[2:, 2:] - both[2:, :2] - both[:2, 2:] + both[:2, :2]
        assert float(now.deviation) == pytest.approx(float(difference.trace()), rel=1e-10, abs=1e-14)
        mean, covariance = step @ mean, step @ covariance @ step.T + into @ into.T / 2


@pytest.mark.parametrize("B", [0.01, 0.3])
def test_the_limit_under_a_turning_bias(B):
    for beta in (1.0, 0.5, 0.1, 0.02):
        limit, h = turning_limit(B, beta), complex(1, math.sqrt(B))
        for share, stable in ((0.999, True), (1.001, False)):
            c = share * limit
            polynomial = torch.tensor(
                [[2 - beta - beta * c * h, -(1 - beta)], [1.0, 0.0]], dtype=torch.complex128
            )  # its companion matrix
            assert (float(torch.linalg.eigvals(polynomial).abs().max()) < 1) == stable
        assert turning_limit(0.0, beta) == pytest.approx(stable_limit(1.0, beta))
    best = 2 * math.sqrt(B) / (1 + math.sqrt(B))
    assert turning_limit(B, best) == pytest.approx(1 / math.sqrt(B))
    assert turning_limit(B, best) > max(turning_limit(B, 0.99 * best), turning_limit(B, 1.01 * best))


def test_steps_of_the_search_are_those_of_the_optimizer():
    axes = rule.spectrum(10.0, 5, start=2.0)
    one = search.Quadratics(*(torch.tensor([value], dtype=torch.float64) for value in (1e-2, 0.0, 0.0)))
    steps = search.search(axes, one, lrs=(0.5, 1.5), betas=(1.0, 0.3))
    problem = Workers(axes.curvatures[None], torch.zeros(1, 5, dtype=torch.float64))
    start = torch.ones(5).double() / axes.curvatures.norm()
    for i, lr in enumerate((0.5, 1.5)):
        for j, beta in enumerate((1.0, 0.3)):
            bias = law.Shift(torch.zeros(5).double())
            trajectory = descend(problem, start, lr=lr, beta=beta, steps=100, bias=bias).grad_sq[:, 0]
            assert float(trajectory[0]) == pytest.approx(1.0)
            assert float(steps[0, i, j]) == relative.stays_below(trajectory, 1e-2)
    found = search.best(steps, (0.5, 1.5), (1.0, 0.3))
    assert float(found.sgd.steps) == float(steps[0, :, 0].min())
    assert (float(found.sgd.beta), float(found.momentum.beta)) == (1.0, 0.3)


def test_the_rule_is_right_on_a_small_map():
    cases = rule.cases(RULE)
    everything = rule.flat(cases)
    stated = rule.Rule(1.6, 16.0)
    assert len(everything.room) == RULE.spectra * RULE.each
    assert rule.accuracy(stated, everything) > 0.8
    wins = float((everything.speedup >= rule.WINS).double().mean())
    assert 0.1 < wins < 0.6  # or a constant answer would be as good
    assert rule.accuracy(rule.fit(everything), everything) >= rule.accuracy(stated, everything)
    for case in cases[:2]:  # R says which step noise leaves: it is as n and as what bias leaves of the target
        more = case.quadratics._replace(noise=case.quadratics.noise / 4)
        torch.testing.assert_close(more.room(case.spectrum), 4 * case.room)


def test_a_constant_bias_decides_for_neither():
    """At room to spare and a target well above b^2, speed-up is the same without bias and with b^2 = eps/2."""
    axes = rule.spectrum(100.0, 8)
    both = search.Quadratics(*torch.tensor([[1e-2, 2e-2], [0.0, 1e-2], [1e-7, 1e-7]], dtype=torch.float64))
    case = rule.case(axes, both)
    assert float(case.length[0]) == float(case.length[1])
    assert float(case.found.speedup[0]) > 1.5
    assert float(case.found.speedup[0] / case.found.speedup[1]) == pytest.approx(1, abs=0.2)


def test_a_turning_bias_undoes_the_gain():
    config = relative.RelativeBias(dimension=6, turns=(0.0, 0.03, 0.6), target=1e-3)
    none, little, much = relative.turned(config)
    assert float(none.found.speedup) > 2.5
    assert float(little.found.speedup) < min(little.bound, float(none.found.speedup))
    assert float(much.found.speedup) < 1.04


def test_tuning_finds_the_best_of_both_sides_and_stops_early():
    asked = []

    def run(lr: float, beta: float, seed: int, cap: int) -> float:
        asked.append((lr, beta, seed))
        steps = 100 * beta + 50 * abs(math.log2(lr / (1 / beta))) + seed
        return steps if steps <= cap else math.inf

    lrs = tuple(2.0**power for power in range(-4, 6))
    tuned = tune(run, lrs, (1.0, 0.25), first=1.0, seeds=(0,), again=(1, 2), cap=1000)
    assert (tuned.sgd.best.lr, tuned.momentum.best.lr, tuned.momentum.best.beta) == (1.0, 4.0, 0.25)
    assert (tuned.sgd.again, tuned.momentum.again) == ([101, 102], [26, 27])
    assert tuned.speedup == pytest.approx(101.5 / 26.5)
    assert len(asked) < 2 * len(lrs)
    assert (lrs[0], 1.0, 0) not in asked


def test_sinusoids_count_iterations():
    config = sinusoids.SinusoidSearch(compile=False, validation=20, every=2)
    bench = sinusoids.Bench(config)
    bench.start(0)
    hopeless, easy = replace(config, target=1e-9), replace(config, target=1e9)
    for config, steps in ((hopeless, math.inf), (easy, 2)):
        bench.config = config
        assert bench.run(4, "none", 0.01, 0.5, 0, 4) == steps
    assert bench.run(4, "topk:5%", 1e30, 1.0, 0, 30) == math.inf  # it diverges
    bench.start(0)
    problem = bench.measure(tasks=10, iterations=3)
    assert problem.smoothness > 0
    assert problem.room(2.0, 8) == pytest.approx(16 * problem.room(1.0, 1))


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))


def separable(count: int, seed: int) -> LabelledImages:
    """Ten classes, a pixel each that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = 0.1 * torch.randn(count, 12, generator=generator)
    images[torch.arange(count), labels] += 3
    return LabelledImages(images.view(count, 3, 4), labels)


@pytest.fixture
def bench(monkeypatch) -> mnist.Bench:
    """Small data in MNIST's place."""
    made = mnist.Bench.__new__(mnist.Bench)
    made.config = mnist.CompressedMnist(
        operators=("none",), lrs=(0.5, 1.0), betas=(1.0, 0.3), epochs=60,
    )  # fmt: skip
    made.kind = replace(PROTOCOLS["mnist"], model=small_mlp)
    made.train, made.test = separable(1000, 0), separable(200, 1)
    monkeypatch.setattr(mnist, "Bench", lambda config: made)
    return made


def test_mnist_counts_steps(bench):
    full = bench.full("none", 1.0, 0.3, 0, 60)
    assert 1 < full < 60
    assert bench.full("topk:50:all", 1.0, 0.3, 0, 60) >= full
    assert bench.full("none", 1.0, 0.3, 0, 1) == math.inf
    assert bench.full("none", 1e30, 1.0, 0, 10) == math.inf  # it diverges


def test_the_report_is_written_part_by_part(tmp_path, bench):
    configs = WhenMomentumWins(
        map=quadratics.QuadraticMap(
            law=replace(LAW, designs=1, runs=3, steps=60, last=10),
            rule=FEW,
            relative=relative.RelativeBias(
                dimension=4, condition=5.0, turns=(0.0, 0.3), target=1e-2, rooms=(100.0,), lrs=(0.95,),
                betas=(1.0, 0.5), steps=20, runs=2,
            ),
            conditions=(5.0,), dimension=4, target=0.05, shares=(0.0, 0.5), rooms=(10.0, 100.0), workers=(64, 128),
        ),
        sinusoids=sinusoids.SinusoidSearch(
            cases=(("none", 4), ("topk:5%", 4)), lrs=(0.01,), first=0.01, betas=(1.0, 0.3), target=100.0, every=1,
            cap=3, validation=5, again=(1,), compile=False,
        ),
        mnist=bench.config,
    )  # fmt: skip
    assert "The rule:" not in report(tmp_path, ["mnist"], configs).read_text(encoding="utf-8")
    text = report(tmp_path, ["map", "sinusoids"], configs).read_text(encoding="utf-8")
    assert text.index("**The rule:**") < text.index("**Where it fails:**") < text.index(quadratics.TITLE)
    for title in (sinusoids.TITLE, mnist.TITLE, "| topk:5% | 4 |"):
        assert title in text
    assert "| nan" not in text
    for name in ("map", "bias", "sinusoids", "mnist"):
        assert f"(figures/when-{name}.png)" in text
        assert (tmp_path / "figures" / f"when-{name}.png").read_bytes().startswith(b"\x89PNG")
