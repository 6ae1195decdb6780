"""The leaderboard: its fast paths against the library's slow ones, its laws, and a small run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from metamom import MAML, CompositeMomentum, TaskBatch
from metamom.bias import MLMCQSGD, MLMCTopK
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import parse
from metamom.experiments.leaderboard import __main__ as command
from metamom.experiments.leaderboard import cell, laws, report, results, suite
from metamom.experiments.leaderboard.batched import ManyQSGD, ManyTopK, means, operator_for
from metamom.experiments.leaderboard.cell import best, interval, to_target
from metamom.experiments.leaderboard.methods import METHODS, Setup
from metamom.experiments.leaderboard.problems import Attacked, Noisy, sign_flip
from metamom.experiments.leaderboard.regressions import Regressions
from metamom.experiments.leaderboard.rules import RULES
from metamom.experiments.leaderboard.running import Record, run
from metamom.experiments.leaderboard.sinusoids import HIDDEN, Sinusoids
from metamom.experiments.leaderboard.suite import PROBLEMS, Plan
from metamom.server.robust import robust_mean
from metamom.tasks.linear import half_squared_error
from metamom.theory import stationary, variant_step, variant_weight

F64 = torch.float64
TOPK = Noisy("small", "small", "topk:1%", spread=0.3, curves=0.3)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("fast", "slow"), [(ManyTopK, MLMCTopK), (ManyQSGD, MLMCQSGD)], ids=["mlmc:topk", "mlmc:qsgd"])
@pytest.mark.parametrize("geometric", [None, 0.7])
def test_many_rows_at_once_are_the_rows(fast, slow, geometric):
    """With the same numbers, d not a multiple of K, and a row of zeros."""
    rows = draws(12, 11)
    rows[3] = 0
    arguments = {"geometric": geometric, **({"k": 3} if slow is MLMCTopK else {"bits": 4})}
    outs = []
    for kind in (fast, slow):
        generator = torch.Generator().manual_seed(5)
        operator = kind(**arguments, generator=generator)
        at = Coordinates(0, range(12), generators={generator: torch.Generator().manual_seed(7)})
        outs.append(operator._apply(rows, at))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("how", ["mean", "median", "trimmed:0.2", "geomedian"])
def test_means_of_many_runs_are_each_runs(how):
    vectors = draws(3, 2, 5, 7)
    vectors[0, 0, 4] = 1e3
    vectors[1, 1] = vectors[1, 1, :1]
    slow = torch.stack([robust_mean(each, how) for each in vectors.view(6, 5, 7)]).view(3, 2, 7)
    torch.testing.assert_close(means(vectors, how), slow, rtol=1e-5, atol=1e-6)


def slow_run(problem, setup, lr, seed, steps):
    """One run in a plain loop: the library's operator, aggregate and optimizer."""
    x, sample = torch.nn.Parameter(problem.start.clone()), torch.Generator().manual_seed(seed)
    optimizer = CompositeMomentum([x], lr=lr, beta=setup.beta, normalize=setup.normalize)
    operator, errors = parse(setup.spec), []
    for k in range(steps):
        errors.append(float(problem.error(x.detach().view(1, 1, -1))))
        rows = problem.messages(x.detach().view(1, 1, -1), problem.draw([sample]))[0, 0]
        x.grad = robust_mean(operator(rows, step=k), setup.aggregate)
        optimizer.step()
    return errors


@pytest.mark.parametrize(
    "name",
    ["momentum", "EF21 + normalised momentum", "EF21-SGD2M", "EF14", "Clip21-SGD2M", "median of EF21-SGDM"],
)
def test_runs_are_those_of_the_library(name):
    """Whatever other step sizes and seeds run at the same time."""
    setup = next(m for m in METHODS if m.name == name).on("topk:5", False)
    record = run(TOPK, setup, [0.02, 0.1], [3, 8], 25)
    for row, lr in enumerate([0.02, 0.1]):
        for column, seed in enumerate([3, 8]):
            expected = torch.tensor(slow_run(TOPK, setup, lr, seed, 25), dtype=F64)
            torch.testing.assert_close(record.errors[:-1, row, column], expected, rtol=1e-10, atol=0)
    assert record.bytes.tolist() == [k * parse(setup.spec).wire_bytes(100) for k in range(26)]


@pytest.mark.parametrize("variant", ["igt", "storm"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["beta", "powers"])
def test_momenta_that_follow_the_weights_are_the_optimizers(variant, scheduled):
    setup = Setup("none", 0.3, True, "mean", f"{variant}-powers" if scheduled else variant)
    record = run(TOPK, setup, [0.1], [3], 12)
    x, sample = torch.nn.Parameter(TOPK.start.clone()), torch.Generator().manual_seed(3)
    optimizer = CompositeMomentum([x], lr=0.1, beta=0.3, normalize=True, variant=variant)
    for k in range(12):
        expected = TOPK.error(x.detach().view(1, 1, -1))[0, 0]
        torch.testing.assert_close(record.errors[k, 0, 0], expected, rtol=1e-10, atol=0)
        noise = TOPK.draw([sample])
        if scheduled:
            optimizer.param_groups[0]["beta"] = variant_weight(variant, k + 1)
            optimizer.param_groups[0]["lr"] = variant_step(variant, k + 1, 0.1)

        def closure(noise=noise):
            x.grad = TOPK.gradients(x.detach().view(1, 1, -1), noise)[0, 0].mean(0)

        optimizer.step(closure)
    gradients = 12 if variant == "igt" else 23
    assert int(record.bytes[-1]) == gradients * 400


def test_a_run_that_diverges_is_infinite_and_harms_no_other():
    setup = METHODS[0].on("none", False)
    record = run(TOPK, setup, [0.1, 1e4], [0], 12)
    alone = run(TOPK, setup, [0.1], [0], 12)
    assert torch.equal(record.errors[:, :1], alone.errors)
    assert math.isinf(float(record.errors[-1, 1, 0]))


def test_meta_gradients_of_regressions_are_mamls():
    problem = Regressions()
    x = problem.start + 0.1 * draws(100)
    points = problem.draw([torch.Generator().manual_seed(1)])
    model = torch.nn.Linear(100, 1, bias=False, dtype=F64)
    model.weight.data = x.view(1, -1).clone()
    phi = points[0]
    y = torch.einsum("npd,nd->np", phi, problem.thetas).unsqueeze(-1)
    m = problem.m
    batch = TaskBatch(phi[:, :m], y[:, :m], phi[:, m:], y[:, m:])
    grads, _ = MAML(model, half_squared_error, inner_lr=problem.alpha).meta_gradient(batch, workers=5)
    mine = problem.gradients(x.view(1, 1, -1), points)[0, 0]
    torch.testing.assert_close(mine, grads["weight"][:, 0], rtol=1e-10, atol=1e-12)


def test_meta_gradients_of_sinusoids_are_mamls():
    problem = Sinusoids()
    tanh = torch.nn.Tanh
    model = torch.nn.Sequential(
        torch.nn.Linear(1, HIDDEN), tanh(), torch.nn.Linear(HIDDEN, HIDDEN), tanh(), torch.nn.Linear(HIDDEN, 1)
    )
    torch.nn.utils.vector_to_parameters(problem.start.clone(), model.parameters())
    sample = problem.draw([torch.Generator().manual_seed(1)])
    batch = TaskBatch(*(each[0].flatten(0, 1) for each in sample))
    grads, _ = MAML(model, torch.nn.functional.mse_loss, inner_lr=problem.alpha).meta_gradient(batch, workers=5)
    mine = problem.gradients(problem.start.view(1, 1, -1), sample)[0, 0]
    theirs = torch.cat([grads[name].flatten(1) for name, _ in model.named_parameters()], 1)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    population = TaskBatch(*(each.flatten(0, 1) for each in problem.all_points))
    losses = MAML(model, torch.nn.functional.mse_loss, inner_lr=problem.alpha).losses(population)
    torch.testing.assert_close(problem.error(problem.start.view(1, 1, -1))[0, 0], losses.mean(), rtol=1e-5, atol=0)


def test_the_floor_of_regressions_is_where_the_mean_gradient_is_zero():
    """The mean over 4,000 draws of the biased gradient vanishes there, that of the true objective does not."""
    problem = Regressions()
    end = problem.floor().end
    assert float(problem.error(end.view(1, 1, -1))) == pytest.approx(laws.composite_floor(problem), rel=1e-9)
    samples = problem.draw([torch.Generator().manual_seed(seed) for seed in range(400)])
    drawn = problem.gradients(end.expand(1, 400, -1), samples)[0].mean(1)  # [seeds, d]
    z = drawn.mean(0) / (drawn.std(0) / math.sqrt(400))
    assert float(z.square().mean()) < 1.6  # 1 in the mean, over 100 entries
    assert laws.composite_floor(problem) > 1e-4


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 0.5), (0.1, 2.0)])
def test_the_law_is_exact(beta, gamma):
    quiet = Noisy("quiet", "", "none", spread=0.3, curves=0.3, noise=0.0)
    setup = Setup("none", beta, False, "mean", "momentum")
    record = run(quiet, setup, [gamma], [0], 30)
    law = laws.expected_error(quiet, beta, gamma, 30)
    torch.testing.assert_close(law, record.errors[:, 0, 0], rtol=1e-9, atol=1e-15)
    noisy = Noisy("noisy", "", "none", spread=0.3, curves=0.3)
    f = noisy.honest
    limit = stationary(f.curvature, noisy.noise**2 / 5, 0.0, beta, gamma).grad_sq / float(f.curvature.square().sum())
    assert float(laws.expected_error(noisy, beta, gamma, 4000)[-1]) == pytest.approx(limit, rel=1e-6)


def test_the_sign_flip():
    rows = draws(2, 5, 3)
    out = sign_flip(rows, 2, 5.0)
    assert torch.equal(out[:, :3], rows[:, :3])
    assert torch.equal(out[:, 3:], -5 * rows[:, 3:])
    assert sign_flip(rows, 0, 5.0) is rows


def test_every_method_runs_on_every_problem():
    assert len({method.name for method in METHODS}) == len(METHODS)
    for problem in PROBLEMS.values():
        for method in METHODS:
            setup = method.on(problem.operator, problem.clips)
            assert setup.rule in RULES
            operator_for(setup.spec, torch.Generator())
    assert len({setup.slug for _, setup in results.cells()}) == len({setup for _, setup in results.cells()})


def test_questions_of_a_cell():
    errors = torch.tensor([[1.0, 1.0], [0.5, 0.01], [0.2, 0.3]], dtype=F64).unsqueeze(1)  # [E, G = 1, S = 2]
    record = Record(torch.tensor([0, 10, 20]), torch.tensor([0, 80, 160]), errors)
    plan = Plan(last=0.4)
    assert cell.after_steps(record, plan).tolist() == [[0.2, 0.3]]
    assert cell.after_bytes(record, plan, 100).tolist() == [[0.5, 0.01]]
    assert to_target(record, 0.3, record.steps).tolist() == [[20.0, 10.0]]
    assert to_target(record, 0.3, record.bytes).tolist() == [[160.0, 80.0]]
    assert to_target(record, 0.1, record.steps).tolist() == [[math.inf, 10.0]]
    inf = math.inf
    assert best(torch.tensor([[inf, 1.0], [3.0, 3.0]])) == 1
    assert best(torch.tensor([[inf, inf], [3.0, inf]])) == 1
    assert best(torch.tensor([[inf, inf]])) is None
    assert interval([1.0, 3.0])["halfwidth"] == pytest.approx(12.7062, abs=1e-4)
    assert interval([1.0, inf]) == {"seeds": 2, "finite": 1, "mean": None, "halfwidth": None}


@pytest.fixture
def small(monkeypatch):
    problems = {each.name: each for each in (TOPK, Attacked("attack", "attack", "topk:1%"), Regressions())}
    chosen = [METHODS[0], METHODS[3], METHODS[8], next(m for m in METHODS if m.kind == "robust")]
    for module in (suite, results, report, report.picture.__globals__):
        for name, value in (("PROBLEMS", problems), ("METHODS", chosen)):
            if isinstance(module, dict):
                monkeypatch.setitem(module, name, value)
            elif hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(command, "QUICK", Plan(lrs=(0.05, 0.2), steps=6, search_seeds=2, seeds=2))


def test_a_run_is_resumed_and_reported(small, tmp_path, capsys):
    out = tmp_path / "board"
    command.main(["--quick", "--out", str(out)])
    text = capsys.readouterr().out
    assert "12 of 12 cells are finished" in text
    assert (out / "figures" / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.read_text() for path in out.glob("cells/*/*.json")}
    assert len(before) == len(json.loads((out / "leaderboard.json").read_text())) == 12
    gone = sorted(before)[0]
    gone.unlink()
    with pytest.raises(SystemExit):
        command.main(["--quick", "--out", str(out)])
    assert "pass --resume" in capsys.readouterr().err
    command.main(["--quick", "--out", str(out), "--resume"])
    again = {path: path.read_text() for path in out.glob("cells/*/*.json")}
    first, second = (json.loads(each[gone]) for each in (before, again))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}  # the same numbers again
    assert all(again[path] == text for path, text in before.items() if path != gone)
    with pytest.raises(ValueError, match="measured with other settings"):
        command.main(["--quick", "--seeds", "3", "--out", str(out), "--resume"])


@pytest.mark.parametrize("flags", [["--seeds", "1"], ["--processes", "0"]])
def test_flags_out_of_range(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), *flags])
    assert "or more" in capsys.readouterr().err


def test_a_damaged_cell_is_named(small, tmp_path):
    problem, setup = next(results.cells())
    path = results.path_of(tmp_path, problem, setup)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        results.kept(tmp_path, problem, setup, Plan())


def test_numbers_are_rounded_by_their_intervals():
    assert report.number(0.3421, 0.031) == "0.34 ± 0.03"
    assert report.number(34.21, 2.1) == "34 ± 2"
    assert report.number(7.0, 0.0) == "7"


def test_a_report_needs_finished_cells(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--report-only", "--out", str(tmp_path / "none")])
    assert "holds no leaderboard yet: run without --report-only first" in capsys.readouterr().err
