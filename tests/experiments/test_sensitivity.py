"""The grids of `metamom.experiments.sensitivity`: what a field runs, what is kept, what the report says."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from fuzzing import bounded, campaign, damaged, odd_json
from torch.optim import RMSprop

from metamom import MAML, CompositeMomentum, evaluate
from metamom.bias import parse
from metamom.experiments.sensitivity import report
from metamom.experiments.sensitivity.grid import Field, Outcome, Trainer, _read, fields, search
from metamom.experiments.sensitivity.methods import METHODS, methods_at
from metamom.experiments.sensitivity.settings import SETTINGS, Setting
from metamom.tasks import LinearRegression, half_squared_error

NAME = "lines"


def lines_learner(seed, compiled=False):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    torch.nn.init.normal_(model.weight, generator=generator)
    return MAML(model, half_squared_error, inner_lr=0.1)


def lines(seed, root):
    family = LinearRegression(3, 10, 10, seed=seed, dtype=torch.float64)
    return family, family.with_stream("validation")


LINES = Setting(
    title="linear regression", learner=lines_learner, tasks=lines, iterations=6, evaluate_every=2, validation_tasks=8,
    target=0.5, levels=("none", "topk:1"), methods=("momentum", "adam", "ef14", "ef21-sgdm"), lr_count=3,
    betas=(1.0, 0.2), seeds=2, meta_batch=4, workers=2,
)  # fmt: skip


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setitem(SETTINGS, NAME, LINES)
    return LINES


def test_fields_are_whole_grids_without_error_feedback_where_there_is_no_operator(setting):
    found = list(fields(NAME))
    # 3 step sizes, 2 betas, 2 seeds; two methods without bias, four with it
    assert len(found) == len(set(found)) == 3 * 2 * 2 * (2 + 4)
    assert {field.method for field in found if field.level == "none"} == {"momentum", "adam"}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_grids_of_the_settings(name):
    chosen = SETTINGS[name]
    assert 1.0 in chosen.betas, "plain SGD is the momentum grid's column of beta = 1"
    assert chosen.levels[0] == "none"
    assert chosen.meta_batch % chosen.workers == 0
    assert chosen.iterations % chosen.evaluate_every == 0, "the last error is that of the last weights"
    sizes = {len(method.grid(chosen.lr_scale, chosen.lr_count)) for method in METHODS.values()}
    assert sizes == {chosen.lr_count}, "every method gets a grid of the same size"


def test_error_feedback_is_spelled_around_the_level():
    spelled = {key: method.bias("topk:1%", 0.1) for key, method in methods_at(METHODS, "topk:1%").items()}
    assert spelled["ef14"] == "ef14:topk:1%"
    assert spelled["ef21"] == "ef21:topk:1%"
    assert spelled["ef21-sgdm"] == "ef21-sgdm(0.1):topk:1%"
    assert spelled["momentum"] == spelled["adam"] == "topk:1%"


def test_rmsprop_with_momentum_is_an_average_of_scaled_gradients():
    """v <- (1 - beta) v + beta g / sqrt(s), w <- w - gamma v."""
    gamma, beta = 0.1, 0.3
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = METHODS["rmsprop"].optimizer([w], gamma, beta)
    assert isinstance(optimizer, RMSprop)
    expected, v, s = w.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for k in range(5):
        g = torch.tensor([0.5 + k, -1.0], dtype=torch.float64)
        w.grad = g.clone()
        optimizer.step()
        s = 0.99 * s + 0.01 * g**2
        v = (1 - beta) * v + beta * g / (s.sqrt() + 1e-8)
        expected -= gamma * v
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("level", "method", "spec"), [("none", "momentum", "none"), ("topk:1", "ef14", "ef14:topk:1")])
def test_a_run_is_the_plain_loop(setting, level, method, spec):
    ended = Trainer(setting).run(Field(NAME, level, method, 0.1, 0.2, 1))
    learner, (training, validation) = lines_learner(1), lines(1, None)
    optimizer, operator = CompositeMomentum(learner.parameters(), lr=0.1, beta=0.2), parse(spec)
    errors = []
    for k in range(setting.iterations):
        optimizer.zero_grad()
        learner.backward(training.sample(k, 4), workers=2, bias=operator)
        optimizer.step()
        if k % 2 == 1:
            errors.append(evaluate(learner, validation, tasks=8, steps=(1,), stream="validation").mean[0])
    assert ended.errors[1:] == tuple(errors)
    assert len(ended.errors) == 4
    assert not ended.diverged


def test_steps_to_a_target():
    outcome = Outcome((3.0, 2.0, 2.5, 1.0), False)
    assert [outcome.steps_to(target, 10) for target in (3.0, 2.2, 1.0, 0.5)] == [0, 10, 30, math.inf]


def test_a_run_after_another_begins_where_the_first_did(setting):
    field = Field(NAME, "topk:1", "ef21-sgdm", 0.1, 0.2, 0)
    trainer = Trainer(setting)
    first = trainer.run(field)
    trainer.run(Field(NAME, "none", "adam", 0.01, 1.0, 1))
    assert trainer.run(field) == first


@pytest.mark.parametrize("lr", [30.0, 1e200])
def test_diverged(setting, lr):
    """Worse than it began, or not finite."""
    ended = Trainer(replace(setting, iterations=20)).run(Field(NAME, "none", "momentum", lr, 1.0, 0))
    assert ended.diverged
    assert all(math.isfinite(error) for error in ended.errors)


def test_search_keeps_every_outcome_and_goes_on(setting, tmp_path, monkeypatch):
    path = tmp_path / "outcomes" / "lines.json"
    run, done = Trainer.run, []

    def interrupted(self, field):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(field)
        return run(self, field)

    monkeypatch.setattr(Trainer, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(NAME, path)
    kept = json.loads(path.read_text())["runs"]
    assert [Field(**{key: line[key] for key in Field._fields}) for line in kept] == done

    def rest(self, field):
        assert field not in done, "run twice"
        return run(self, field)

    monkeypatch.setattr(Trainer, "run", rest)
    outcomes = search(NAME, path)
    assert list(outcomes) == list(fields(NAME))
    monkeypatch.setattr(Trainer, "run", lambda self, field: pytest.fail("all is known"))
    assert search(NAME, path) == outcomes

    before = path.read_bytes()
    monkeypatch.setitem(SETTINGS, NAME, replace(setting, iterations=8))
    with pytest.raises(ValueError, match=r"runs of another plan: wanted .*8.*; got .*6"):
        search(NAME, path)
    assert path.read_bytes() == before


@campaign(60, 600)
def test_a_damaged_file_of_outcomes_is_refused(tmp_path, seeds):
    """In one error that names it; or read, where what is odd is not asked for."""
    path, plan = tmp_path / "lines.json", {"iterations": 6, "workers": 1}
    run = Field(NAME, "none", "momentum", 0.5, 1.0, 0)._asdict() | {"errors": [1.0, 0.5], "diverged": False}
    whole = {"plan": plan, "runs": [run]}
    for seed in seeds:
        rng = random.Random(seed)
        path.write_bytes(
            json.dumps(odd_json(whole, rng)).encode() if seed % 3 else damaged(json.dumps(whole).encode(), rng)
        )
        with bounded(20, 256):
            try:
                known = _read(path, plan)
            except ValueError as error:
                known, said = {}, str(error)
                assert said.startswith(str(path)), f"seed {seed}: {said}"
        for field, outcome in known.items():
            assert isinstance(field.lr, float)
            assert all(isinstance(error, float) for error in outcome.errors)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": {}, "runs": [{"setting": 3}]}', "[" * 10**5, "\0"])
def test_damaged_outcomes_are_reported_and_kept(text, setting, tmp_path):
    path = tmp_path / "lines.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"lines\.json: "):
        search(NAME, path)
    assert path.read_text() == text


def outcomes_of(make):
    return {field: make(field) for field in fields(NAME)}


def test_seeds_put_together(setting):
    """A run that diverges never arrives, whatever it passed on its way, and its field has no error."""
    given = {0: Outcome((2.0, 0.6, 0.5), False), 1: Outcome((2.0,), True)}
    seen = report.grid_of(outcomes_of(lambda field: given[field.seed]), NAME, "none", "adam")
    assert (seen.steps == math.inf).all()
    assert (seen.error == math.inf).all()
    assert (seen.diverged == 0.5).all()
    given = {0: Outcome((2.0, 0.6, 0.4), True), 1: Outcome((2.0, 0.6, 0.4), False)}  # there, and then away
    seen = report.grid_of(outcomes_of(lambda field: given[field.seed]), NAME, "none", "adam")
    assert (seen.steps == math.inf).all()
    seen = report.grid_of(outcomes_of(lambda field: Outcome((2.0, 0.25 * field.seed), False)), NAME, "none", "adam")
    assert (seen.steps == 2).all()
    assert (seen.error == 0.125).all()
    assert (seen.diverged == 0).all()


def test_table_has_sgd_apart_and_every_figure_is_drawn(setting, tmp_path):
    def made(field):
        good = field.beta < 1 or field.method != "momentum"
        return Outcome((1.0, 0.1 * field.lr), False) if good else Outcome((1.0,), True)

    outcomes = outcomes_of(made)
    table = report.table(outcomes, NAME).splitlines()
    lowest = METHODS["momentum"].grid(1.0, 3)[0]
    assert "| none | SGD | never | never | 100% | 0% |" in table
    assert f"| none | momentum | 2 ({lowest:g}, 0.2) | {0.1 * lowest:.3g} ({lowest:g}, 0.2) | 0% | 100% |" in table
    assert sum(line.startswith("| topk:1 |") for line in table) == 5
    for level in setting.levels:
        report.figure(outcomes, NAME, level, tmp_path / f"{level}.png")
        assert (tmp_path / f"{level}.png").stat().st_size > 10_000


def test_unknown_setting_of_the_command(monkeypatch, capsys):
    from metamom.experiments.sensitivity.__main__ import main

    monkeypatch.setattr("sys.argv", ["sensitivity", "--only", "sinusoid,poetry"])
    with pytest.raises(SystemExit):
        main()
    assert "--only: poetry not among sinusoid" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mlp", "anil", "fashion"])
def test_a_step_of_the_real_settings(name, data_root):
    """One iteration of each on the real data, by the same code, but not compiled: that takes a minute."""
    chosen = replace(
        SETTINGS[name], iterations=1, evaluate_every=1, validation_tasks=2, meta_batch=2, workers=2, compiled=False
    )
    field = Field(name, "topk:1%", "momentum", METHODS["momentum"].grid(1.0, 3)[0], 0.1, 0)
    trainer = Trainer(chosen, str(data_root))
    assert len(trainer.run(field).errors) == 2
