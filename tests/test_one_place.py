"""One place for each kind of thing: what is added in one file is found everywhere (CONTRIBUTING.md, "To add ...")."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
import torch
from forked import run_forked
from longer_options import LongerOptions, differ_in_patience, train_longer
from problems import assert_close, mlp, randomised, regression_batch
from torch import Tensor
from torch.nn import functional as F

from metamom import MAML, cli, train
from metamom.bias import BiasOperator, parse, spelling
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import spec_help, spellings
from metamom.cli import flags
from metamom.cli.app import parsed, parser
from metamom.common.flag_types import long_count
from metamom.common.options import Flag, declared, option
from metamom.experiments import recipes, saved
from metamom.experiments.recipes import Recipe
from metamom.maml import estimators
from metamom.maml.estimators import ESTIMATORS, Record, memoryless_estimators
from metamom.training import loop
from metamom.training.directory import read_config
from metamom.training.options import Options

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SMALL = ["train", "sinusoid", "--iterations", "2", "--meta-batch", "2", "--evaluate-tasks", "4"]


@pytest.fixture
def halving() -> Iterator[type[BiasOperator]]:
    """An operator, in the way of those in `metamom.bias`."""
    spelling.load_all()

    @spelling.spelled(
        "halving",
        "half of it, TIMES times",
        spelling.Row("`halving:2`", "`Halving(2)`", "1 − (1 − 2⁻ᵗ)²", "4d"),
        argument="TIMES",
        number=int,
    )
    class Halving(BiasOperator):
        def __init__(self, times: int) -> None:
            self.times = times

        def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
            return rows * 0.5**self.times

        @property
        def spec(self) -> str:
            return f"halving:{self.times}"

    yield Halving
    del spelling.SPELLINGS["halving"]


def test_an_operator(halving, capsys):
    assert parse("halving:2") == halving(2)
    assert "halving:TIMES" in spellings()
    assert "  halving:TIMES        half of it, TIMES times" in spec_help()
    assert "| `halving:2` | `Halving(2)` |" in spelling.operator_table()
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--help"])
    assert "halving:TIMES" in capsys.readouterr().out
    batch, learner = regression_batch(tasks=2), MAML(randomised(mlp()), F.mse_loss)
    learner.backward(batch, bias="clip:1e9+halving:1")
    expected = learner.meta_gradient(batch).grads
    assert_close({n: 2 * p.grad for n, p in learner.model.named_parameters()}, {n: g[0] for n, g in expected.items()})


def test_the_readme_has_the_table_of_operators():
    assert spelling.operator_table() in README


def test_an_estimator(monkeypatch, tmp_path, capsys):
    """Half the first-order gradient: by a weight of a half."""
    term = estimators._Term(0.5, (estimators._Adaptation((0,), (0,)),))
    record = Record((term,), "half of first-order", derivatives="none", biased=True)
    monkeypatch.setitem(ESTIMATORS, "half-order", record)
    assert "half-order" in memoryless_estimators()
    batch, model = regression_batch(tasks=2), randomised(mlp())
    half, first = (
        MAML(model, F.mse_loss, estimator=name).meta_gradient(batch).grads for name in ("half-order", "first-order")
    )
    assert_close({name: 2 * g for name, g in half.items()}, first)
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--help"])
    assert "half-order" in capsys.readouterr().out
    run = ["train", "sinusoid", "--iterations", "2", "--estimator", "half-order", "--run-dir", str(tmp_path / "run")]
    assert cli.main(run) == 0
    assert cli.main(["evaluate", str(tmp_path / "run"), "--tasks", "4"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--estimator", "no-order"])
    assert "half-order" in capsys.readouterr().err
    assert torch.isfinite(next(model.parameters())).all()


def test_the_keywords_of_train_are_its_options():
    """Besides the processes, which a run may change."""
    keywords = inspect.signature(train).parameters
    empty = inspect.Parameter.empty
    given = {name: MISSING if each.default is empty else each.default for name, each in keywords.items()}
    for name in ("learner", "optimizer", "sampler", "world"):
        del given[name]
    assert given == {each.name: each.default for each in declared(Options)}
    assert all(keywords[each.name].annotation == each.type for each in fields(Options))
    assert all(f"\n        {name}: " in (train.__doc__ or "") for name in given)


def test_an_option_of_a_run(monkeypatch, tmp_path, capsys):
    """`LongerOptions` has one more; what differs in ``train_longer`` is only that it takes the keyword."""
    monkeypatch.setattr(flags, "Options", LongerOptions)
    monkeypatch.setattr(loop, "train", train_longer)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main(["train", "sinusoid", "--help"])
    assert "  --patience N              iterations to wait (default: 7)" in capsys.readouterr().out
    assert "patience" not in parsed(parser(), ["compare", "sinusoid"])
    for value in ([], ["--patience", "3"]):
        run = tmp_path / "-".join(["run", *value])
        assert cli.main([*SMALL, *value, "--run-dir", str(run)]) == 0
        assert read_config(run)["length"]["patience"] == (3 if value else 7)
        again = parsed(parser(), ["train", "sinusoid", "--config", str(run / "config.json")])
        assert again.patience == (3 if value else 7)
        assert parsed(parser(), ["compare", "sinusoid", "--config", str(run / "config.json")]).iterations == 2
    capsys.readouterr()
    assert cli.main([*SMALL, "--patience", "0", "--run-dir", str(tmp_path / "refused")]) == 2
    assert "error: patience must be >= 1; got 0." in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.xdist_group("processes")
def test_processes_compare_an_option_of_a_run(tmp_path):
    for status, said in run_forked(differ_in_patience, 2, tmp_path):
        assert status == 0, said
        assert "the processes differ in patience: 3 on process 0, 4 on process 1" in said


@dataclass(frozen=True)
class LongerRecipe(Recipe):
    """A recipe with one more option, declared as those of `RecipeOptions`."""

    warmup: int = option(0, later=True, flag=Flag("optimizer", "iterations to warm up", type=long_count, metavar="N"))


def test_an_option_of_a_recipe(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flags, "RecipeOptions", LongerRecipe)
    for module in (recipes, saved):
        monkeypatch.setattr(module, "Recipe", LongerRecipe)
    monkeypatch.setenv("COLUMNS", "100")
    for command in ("train", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "omniglot", "--help"])
        assert "  --warmup N                iterations to warm up (default: 0)" in capsys.readouterr().out
    run = tmp_path / "run"
    assert cli.main([*SMALL, "--warmup", "3", "--run-dir", str(run)]) == 0
    settings = read_config(run)["settings"]
    assert settings["warmup"] == 3
    assert parsed(parser(), ["train", "sinusoid", "--config", str(run / "config.json")]).warmup == 3
    assert cli.main([*SMALL, "--warmup", "4", "--run-dir", str(run), "--resume"]) == 2
    assert "warmup is 3 there and 4 here" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--tasks", "4"]) == 0
    assert LongerRecipe.from_settings({name: value for name, value in settings.items() if name != "warmup"}).warmup == 0
