"""One place for each kind of thing: what is added in one file is found everywhere (CONTRIBUTING.md, "To add ...")."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from forked import run_forked
from longer_options import LongerOptions, differ_in_rest, train_longer
from problems import assert_close, mlp, randomised, regression_batch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, cli, train
from metamom.bias import BiasOperator, parse, spelling
from metamom.bias.coordinates import Coordinates
from metamom.bias.spec import spec_help, spellings
from metamom.cli import flags
from metamom.cli.app import parsed, parser
from metamom.common.flag_types import long_count
from metamom.common.options import Flag, declared, option
from metamom.diagnostics.sources import estimator_parts
from metamom.experiments import recipes, saved
from metamom.experiments.families import FAMILIES
from metamom.experiments.families.family import (
    ACCURACY,
    MEAN_SQUARED_ERROR,
    BiasPlan,
    Classes,
    ComparisonPlan,
    Defaults,
    Family,
    of_split,
)
from metamom.experiments.recipes import Recipe
from metamom.maml import estimators
from metamom.maml.estimators import ESTIMATORS, Record, memoryless_estimators
from metamom.tasks import Episodes, LinearRegression
from metamom.training import loop
from metamom.training.directory import read_config
from metamom.training.options import Options

CHECKOUT = Path(__file__).parents[1]
CHOOSE = (CHECKOUT / "docs" / "choose.md").read_text(encoding="utf-8")
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


def test_the_page_on_choosing_has_the_table_of_operators():
    assert spelling.operator_table() in CHOOSE


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
    total = {}
    for name in ("half-order", "first-order"):  # the sources of a bias add up to it
        parts = estimator_parts(MAML(model, F.mse_loss, estimator=name), batch, 1, torch.zeros(()))
        total[name] = torch.stack([*parts.values()]).sum(0)
    torch.testing.assert_close(2 * total["half-order"], total["first-order"])
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
    assert "  --rest N                  iterations to wait (default: 7)" in capsys.readouterr().out
    assert "rest" not in parsed(parser(), ["compare", "sinusoid"])
    for value in ([], ["--rest", "3"]):
        run = tmp_path / "-".join(["run", *value])
        assert cli.main([*SMALL, *value, "--run-dir", str(run)]) == 0
        assert read_config(run)["length"]["rest"] == (3 if value else 7)
        again = parsed(parser(), ["train", "sinusoid", "--config", str(run / "config.json")])
        assert again.rest == (3 if value else 7)
        assert parsed(parser(), ["compare", "sinusoid", "--config", str(run / "config.json")]).iterations == 2
    capsys.readouterr()
    assert cli.main([*SMALL, "--rest", "0", "--run-dir", str(tmp_path / "refused")]) == 2
    assert "error: --rest must be >= 1; got 0." in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.xdist_group("processes")
def test_processes_compare_an_option_of_a_run(tmp_path):
    for status, said in run_forked(differ_in_rest, 2, tmp_path):
        assert status == 0, said
        assert "the processes differ in rest: 3 on process 0, 4 on process 1" in said


@dataclass(frozen=True)
class LongerRecipe(Recipe):
    """A recipe with one more option, declared as those of `RecipeOptions`."""

    pause: int = option(0, later=True, flag=Flag("optimizer", "iterations to pause", type=long_count, metavar="N"))


def test_an_option_of_a_recipe(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flags, "RecipeOptions", LongerRecipe)
    for module in (recipes, saved):
        monkeypatch.setattr(module, "Recipe", LongerRecipe)
    monkeypatch.setenv("COLUMNS", "100")
    for command in ("train", "compare"):
        with pytest.raises(SystemExit):
            cli.main([command, "omniglot", "--help"])
        assert "  --pause N                 iterations to pause (default: 0)" in capsys.readouterr().out
    run = tmp_path / "run"
    assert cli.main([*SMALL, "--pause", "3", "--run-dir", str(run)]) == 0
    settings = read_config(run)["settings"]
    assert settings["pause"] == 3
    assert parsed(parser(), ["train", "sinusoid", "--config", str(run / "config.json")]).pause == 3
    assert cli.main([*SMALL, "--pause", "4", "--run-dir", str(run), "--resume"]) == 2
    assert "pause is 3 there and 4 here" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--tasks", "4"]) == 0
    assert LongerRecipe.from_settings({name: value for name, value in settings.items() if name != "pause"}).pause == 0


LINES = Family(
    name="made-up",
    title="lines through the origin",
    help="on lines that were made up",
    defaults=Defaults(shots=6, queries=3, inner_lr=0.05, lr=0.02, meta_batch=4),
    iterations=7,
    metric=MEAN_SQUARED_ERROR._replace(name="squared distance", digits=2),
    comparison=ComparisonPlan(lrs=(0.04, 0.08), target=0.25),
    tasks=lambda wanted: of_split(
        LinearRegression(1, wanted.shots, wanted.queries, seed=wanted.seed, dtype=wanted.dtype), wanted.split, "lines"
    ),
    model=lambda ways, generator: randomised(nn.Linear(1, 1, bias=False)),
    loss=lambda: F.mse_loss,
    bias=BiasPlan((1, 3), pool=12, tasks=30, pairs=2, reason="which are straight"),
    curve=lambda tasks: (torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5)),
    train_examples=("metamom train made-up --shots 3", "metamom train made-up --lr 0.1"),
    compare_examples=("metamom compare made-up --seeds 2", "metamom compare made-up --lrs 0.1"),
)


def help_of(capsys, *command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_family_in_the_help(monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "made-up", LINES)
    for command in ("train", "compare"):
        assert "made-up on lines that were made up" in help_of(capsys, command)
    said = help_of(capsys, "train", "made-up")
    assert "--ways" not in said
    for shown in (
        "support points a task, in each inner batch (default: 6)",
        "(default: 0.05)",
        "metamom train made-up ",
    ):
        assert shown in said
    assert "total number, including those before a resume (default: 7)" in said
    said = help_of(capsys, "compare", "made-up")
    assert "(default: 0.04,0.08)" in said
    assert "validation error to count iterations to (default: 0.25)" in said
    said = help_of(capsys, "bias")
    assert "RUN|sinusoid|omniglot|images|made-up" in said
    assert "; for made-up, which are straight, 1,3)" in said
    assert "300; for omniglot 60; for images 60; for made-up 30" in said


def test_a_family_in_the_commands(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(FAMILIES, "made-up", LINES)
    run, compared = tmp_path / "run", tmp_path / "compared"
    assert cli.main(["train", "made-up", "--evaluate-tasks", "4", "--run-dir", str(run)]) == 0
    assert "trained for 7 iterations" in capsys.readouterr().out
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["task"], settings["shots"], settings["meta_batch"], settings["ways"]) == ("made-up", 6, 4, None)
    assert cli.main(["evaluate", str(run), "--tasks", "4", "--steps", "1"]) == 0
    assert capsys.readouterr().out.startswith("made-up 6-shot, split test, 4 tasks, trained for 7 iterations\n")
    assert cli.main(["evaluate", str(run), "--split", "background"]) == 2
    assert "lines have the splits train, validation and test; got 'background'" in capsys.readouterr().err
    for what in ("made-up", str(run)):
        assert cli.main(["bias", what, "--json"]) == 0
        assert [at["inner_batch"] for at in json.loads(capsys.readouterr().out)["sizes"]] == [1, 3]
    arguments = ["--seeds", "1", "--lrs", "0.04", "--evaluate-tasks", "4", "--tasks", "4", "--steps", "0,1"]
    assert cli.main(["compare", "made-up", *arguments, "--run-dir", str(compared)]) == 0
    report = (compared / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# Composite momentum and plain meta-SGD on lines through the origin\n")
    assert "7 iterations of 4 tasks (6 shots, 3 queries), 1 inner step of 0.05" in report
    assert "## Squared distance on test tasks" in report
    assert "until validation squared distance is at most 0.25" in report
    assert (compared / "figures" / "adaptation.png").exists()


def test_a_family_with_classes(monkeypatch, tmp_path, capsys):
    """Colours, each a constant image, with a split that shares them with training."""
    images, labels = torch.arange(8.0).repeat_interleave(4)[:, None] / 8, torch.arange(8).repeat_interleave(4)
    family = replace(
        LINES,
        title="Colours",
        defaults=LINES.defaults._replace(shots=1, queries=2, ways=3),
        metric=ACCURACY,
        tasks=lambda wanted: Episodes(
            images, labels, ways=wanted.ways, shots=wanted.shots, queries=wanted.queries, seed=wanted.seed
        ),
        model=lambda ways, generator: randomised(nn.Linear(1, ways)),
        loss=lambda: F.cross_entropy,
        classes=Classes("colours", seen_in=("train",)),
        curve=None,
    )
    monkeypatch.setitem(FAMILIES, "made-up", family)
    assert "classes a task (default: 3)" in help_of(capsys, "train", "made-up")
    assert "validation accuracy to count iterations to" in help_of(capsys, "compare", "made-up")
    run, compared = tmp_path / "run", tmp_path / "compared"
    assert cli.main(["train", "made-up", "--ways", "4", "--evaluate-tasks", "4", "--run-dir", str(run)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["evaluate", str(run), "--tasks", "4", "--split", "train"]) == 0
    out, err = capsys.readouterr()
    assert "made-up 4-way 1-shot, split train, 4 tasks" in out
    assert "train shares colours with it: this is no accuracy on new colours. Use validation or test." in err
    arguments = ["--seeds", "1", "--lrs", "0.04", "--evaluate-tasks", "4", "--tasks", "4", "--steps", "1"]
    assert cli.main(["compare", "made-up", *arguments, "--run-dir", str(compared)]) == 0
    report = (compared / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# Composite momentum and plain meta-SGD on Colours, 3-way 1-shot\n")
    assert "until validation accuracy is at least 25.0 %" in report
    assert not (compared / "figures" / "adaptation.png").exists()


def test_a_family_has_classes_and_ways_or_neither():
    with pytest.raises(ValueError, match="a family with classes has default ways"):
        replace(LINES, classes=Classes("colours", seen_in=("train",)))


def test_every_module_of_a_family_is_found():
    folder = CHECKOUT / "experiments" / "families"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "family"}
    assert modules == set(FAMILIES)


def test_commands_do_not_ask_for_a_family_by_name():
    """What depends on the task is read from its record."""
    names = "|".join(FAMILIES)
    asked = re.compile(rf"""task\w*\b *(==|!=|in|not in) *[\[({{]?"({names})"|"({names})": """)
    paths = [*(CHECKOUT / "metamom" / "cli").glob("*.py"), *(CHECKOUT / "experiments").glob("*.py")]
    found = [path.name for path in paths if asked.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_contributing_names_the_places():
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| to add | change |")[2].partition("\n\n")[0]
    rows = {cells[1].strip(): cells[2] for line in table.splitlines()[2:] if (cells := line.split("|"))}
    assert {"a bias operator", "an estimator", "a task family", "an experiment"} <= set(rows)
    for what, change in rows.items():
        places = re.findall(r"`((?:metamom|experiments|tasks)/[\w/.]*)`", change)
        assert places, what
        assert all((CHECKOUT / place).exists() for place in places), places
