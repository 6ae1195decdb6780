"""Any of torch's optimizers by name, with its options, and schedules of the step size."""

from __future__ import annotations

import inspect
import json
import math
import re
import signal
from typing import Any

import pytest
import torch
from endings import assert_same_ending
from forked import metamom, run_forked
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from metamom import CompositeMomentum, TaskSampler, cli
from metamom.experiments.defaults import OPTIMIZERS, STEP_SIZES, WEIGHT_DECAYS
from metamom.experiments.optimizers import optimizers, parse_arguments
from metamom.experiments.recipes import Recipe
from metamom.experiments.schedules import parse_schedule
from metamom.training.checkpoints import Checkpoints
from metamom.training.directory import read_config, read_metrics

SMALL = ["--meta-batch", "2", "--shots", "5", "--evaluate-tasks", "4"]
USABLE = [name for name in OPTIMIZERS if name in optimizers() and name != "muon"]  # Muon takes matrices alone


def test_the_table_has_torchs_defaults():
    """One that only a later version of torch has takes its own default, and belongs into the table."""
    for name, kind in optimizers().items():
        if name not in ("momentum", "lbfgs", "sparseadam"):
            assert name in OPTIMIZERS, name
            own = inspect.signature(kind).parameters
            assert name in ("sgd", "rmsprop") or own["lr"].default == STEP_SIZES[name], name
            if "weight_decay" in own:
                assert own["weight_decay"].default == WEIGHT_DECAYS.get(name, 0), name


def made(**settings: Any) -> torch.optim.Optimizer:
    recipe = Recipe("sinusoid", **settings)
    return recipe.make_optimizer(recipe.learner())


@pytest.mark.parametrize("name", USABLE)
def test_every_optimizer_of_torch(name, tmp_path, capsys):
    """Trains from the command, and goes on as if it had not stopped."""
    words = ["train", "sinusoid", "--optimizer", name, *SMALL, "--evaluate-every", "2"]
    for run, lengths in (("whole", "4"), ("parts", "2"), ("parts", "4")):
        assert cli.main([*words, "--iterations", lengths, "--run-dir", str(tmp_path / run), "--resume"]) == 0
    assert_same_ending(tmp_path / "parts", tmp_path / "whole")
    weights = read_metrics(tmp_path / "whole")
    assert weights[0]["loss"] != weights[-1]["loss"]
    assert read_config(tmp_path / "whole")["settings"]["lr"] == STEP_SIZES.get(name, 0.03)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("adam", "betas=0.8,0.99", {"betas": (0.8, 0.99)}),
        ("adam", "betas=(0.8, 0.99), eps=1e-6,amsgrad=true", {"betas": (0.8, 0.99), "eps": 1e-6, "amsgrad": True}),
        ("nadam", "decoupled-weight-decay=True", {"decoupled_weight_decay": True}),
        ("sgd", "momentum=0.9,nesterov=true", {"momentum": 0.9, "nesterov": True}),
        ("adafactor", "eps=none,0.01,foreach=none", {"eps": (None, 0.01), "foreach": None}),
        ("rprop", "etas=0.4,1.3", {"etas": (0.4, 1.3)}),
        ("momentum", "maximize=false", {"maximize": False}),
        ("lbfgs", "line_search_fn=strong_wolfe,max_iter=3", {"line_search_fn": "strong_wolfe", "max_iter": 3}),
        ("adam", None, {}),
    ],
)
def test_arguments(name, text, found):
    parsed = parse_arguments(name, text)
    assert parsed == found
    assert all(type(parsed[key]) is type(value) for key, value in found.items())


def test_they_reach_the_optimizer():
    group = made(optimizer="adamw", optimizer_args="betas=0.8,0.99", weight_decay=0.2, lr=0.5).param_groups[0]
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.99), 0.2, 0.5)
    momentum = made(weight_decay=0.2, optimizer_args="foreach=true")
    assert isinstance(momentum, CompositeMomentum)
    assert (momentum.param_groups[0]["weight_decay"], momentum.param_groups[0]["foreach"]) == (0.2, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamv"}, r"must be one of momentum, .*adamw.*; got 'adamv'; did you mean adam"),
        ({"optimizer": "x"}, "must be one of momentum, .*; got 'x'[.]"),
        ({"optimizer": "adam", "optimizer_args": "betaz=1"}, r"adam has no 'betaz'; its options are betas, .* did you"),
        ({"optimizer": "adam", "optimizer_args": "differentiable=true"}, "adam has no 'differentiable'"),
        ({"optimizer": "adam", "optimizer_args": "lr=1"}, "lr has a flag of its own, --lr[.]"),
        ({"optimizer": "adam", "optimizer_args": "weight_decay=1"}, "a flag of its own, --weight-decay[.]"),
        ({"optimizer_args": "first-step=zero"}, "a flag of its own, --first-step[.]"),
        ({"optimizer": "adam", "optimizer_args": "beta=1"}, "adam has no 'beta'; .*did you mean betas"),
        (
            {"optimizer": "adam", "optimizer_args": "betas=0.9"},
            "betas of adam should be 2 numbers, such as 0.9,0.999; ",
        ),
        ({"optimizer": "adam", "optimizer_args": "betas=0.9,none"}, "betas of adam should be 2 numbers"),
        ({"optimizer": "adam", "optimizer_args": "eps=big"}, "eps of adam should be a number; got 'big'[.]"),
        ({"optimizer": "adam", "optimizer_args": "eps=true"}, "eps of adam should be a number; got 'true'[.]"),
        ({"optimizer": "adam", "optimizer_args": "eps=1,2"}, "eps of adam should be a number; got '1,2'[.]"),
        ({"optimizer": "adam", "optimizer_args": "eps=nan"}, "eps of adam should be a number"),
        ({"optimizer": "adam", "optimizer_args": "amsgrad=1"}, "amsgrad of adam should be true or false; got '1'[.]"),
        ({"optimizer": "adam", "optimizer_args": "amsgrad=none"}, "amsgrad of adam should be true or false"),
        ({"optimizer": "lbfgs", "optimizer_args": "max_iter=2.5"}, "max_iter of lbfgs should be a whole number"),
        ({"optimizer": "adam", "optimizer_args": "eps"}, "wanted name=value,name=value, such as betas=0.9,0.99"),
        ({"optimizer": "adam", "optimizer_args": "eps=1,eps=2"}, "wanted name=value,name=value"),
        ({"optimizer": "adam", "optimizer_args": ""}, "wanted name=value,name=value"),
        ({"optimizer": "adam", "optimizer_args": "betas=2,3"}, "the optimizer adam refuses its options: .*beta"),
        ({"optimizer": "sgd", "optimizer_args": "nesterov=true"}, "sgd refuses its options: Nesterov momentum"),
        ({"optimizer": "adam", "weight_decay": -1.0}, "weight_decay must be >= 0 and finite; got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0 and finite; got nan"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "rprop has no weight decay; got 0.1"),
        (
            {"learn_inner_lr": True, "inner_lr_lr": 0.0},
            "inner_lr_lr is a step size and must be > 0 and finite; got 0.0",
        ),
        ({"inner_lr_lr": 0.1}, "inner_lr_lr is the outer step size of learned inner step sizes: choose which"),
        ({"warmup": -1}, "warmup must be >= 0; got -1"),
        ({"patience": 0}, "patience.* must be >= 1; got 0"),
        ({"schedule": "plateau:1"}, r"FACTOR must be in \(0, 1\); got 1.0"),
        ({"schedule": "plateau:0.5,-1"}, "PATIENCE must be >= 0; got -1"),
        ({"schedule": "plateau:"}, "wanted a number"),
        ({"schedule": "constant:3"}, "the schedule is constant, or cosine:N .*; got 'constant:3'"),
        ({"schedule": "cosine:"}, "the schedule is constant, or cosine:N"),
    ],
)
def test_bad_options(settings, message):
    with pytest.raises(ValueError, match=message):
        made(**settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer lbfgs", "LBFGS.step wants a closure"),
        ("--optimizer sparseadam", "SparseAdam takes only sparse gradients, and meta-gradients are dense"),
        ("--optimizer muon", "the optimizer muon refuses its options: .*2D parameters"),
        ("--optimizer adam --optimizer-args fused=true,foreach=true", "adam refuses its options: .*foreach"),
        ("--optimizer adam --beta 0.5", "--beta, --first-step and --normalize belong to --optimizer momentum"),
        ("--clip-grad 0", "--clip-grad is the largest norm of the gradient, finite and > 0"),
        ("--schedule plateau", "advances at each validation: pass --evaluate-every N"),
        ("--schedule cosine --warmup 9 --iterations 9", "the warm-up, which takes 9 of the 9 iterations"),
        ("--optimizer adm", "did you mean adam"),
    ],
)
def test_one_line_for_bad_flags(words, message, tmp_path, capsys):
    if "muon" in words and "muon" not in optimizers():
        message = "must be one of"
    assert cli.main(["train", "sinusoid", *words.split(), "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("metamom: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "run").exists()


def test_defaults_are_not_recorded():
    """So that runs of earlier versions, which had none of these options, go on."""
    names = ("optimizer_args", "weight_decay", "clip_grad", "warmup", "patience", "variant", "beta_schedule")
    recipe = Recipe("sinusoid", weight_decay=0.0, warmup=0, beta_schedule="constant")
    assert {name: recipe.settings()[name] for name in names} == dict.fromkeys(names)
    assert Recipe("sinusoid", optimizer="adamw", weight_decay=0.01).weight_decay is None
    assert Recipe("sinusoid", optimizer="adamw", weight_decay=0.0).weight_decay == 0
    assert Recipe("sinusoid", optimizer="rprop", weight_decay=0.0).weight_decay is None
    earlier = {name: value for name, value in recipe.settings().items() if name not in names}
    assert Recipe.from_settings(earlier) == recipe


# schedules


def rates(schedule: str, warmup: int | None, iterations: int, lr: float = 0.5) -> list[float]:
    """The step sizes of a run's iterations."""
    recipe = Recipe("sinusoid", lr=lr, schedule=schedule, warmup=warmup).over(iterations)
    optimizer = recipe.make_optimizer(recipe.learner())
    schedulers, seen = recipe.schedulers(optimizer), []
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    for _ in range(iterations):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for each in schedulers:
            if not isinstance(each, ReduceLROnPlateau):
                each.step()
    return seen


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_warm_up(schedule):
    assert rates(schedule, 4, 6) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    for warmup in (None, 0, 1):
        assert rates(schedule, warmup, 3) == [0.5] * 3


def test_a_cosine_over_all_iterations():
    """From γ to (nearly) 0, after the warm-up."""
    expected = [0.5 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates("cosine", None, 8) == pytest.approx(expected)
    assert rates("cosine", 2, 10) == pytest.approx([0.25, 0.5, *expected])
    assert rates("cosine:8", None, 8) == rates("cosine", None, 8)
    assert Recipe("sinusoid", schedule="cosine", warmup=2).over(10).schedule == "cosine:8"
    recipe = Recipe("sinusoid", schedule="cosine")
    optimizer = recipe.make_optimizer(recipe.learner())
    with pytest.raises(ValueError, match="a cosine over all iterations needs their number"):
        recipe.schedulers(optimizer)


@pytest.mark.parametrize(
    ("text", "factor", "patience"), [("plateau", 0.1, 10), ("plateau:0.5", 0.5, 10), ("plateau:0.5,3", 0.5, 3)]
)
def test_plateaus(text, factor, patience):
    assert parse_schedule(text)[2:4] == (factor, patience)
    recipe = Recipe("sinusoid", schedule=text, warmup=3)
    warm, plateau = recipe.schedulers(recipe.make_optimizer(recipe.learner()))
    assert isinstance(warm, LinearLR)
    assert isinstance(plateau, ReduceLROnPlateau)
    assert (plateau.factor, plateau.patience, plateau.mode) == (factor, patience, "min")


@pytest.mark.parametrize("learn", ["scalar", "tensor", "tensor-step", "entry"])
def test_a_step_size_of_the_inner_step_sizes(learn):
    """Adam's first step moves each number by its group's γ; the schedule halves both in the third."""
    settings = {"lr": 0.01, "inner_lr_lr": 0.0002, "schedule": "cosine:4", "inner_steps": 2}
    settings |= {"optimizer": "adam", "optimizer_args": "eps=1e-100"}
    recipe = Recipe("sinusoid", dtype="float64", learn_inner_lr=learn, **settings)
    learner = recipe.learner()
    optimizer = recipe.make_optimizer(learner)
    schedulers = recipe.schedulers(optimizer)
    before = {name: w.detach().clone() for name, w in learner.meta_parameters().items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    learner.backward(recipe.sampler().sample(0, 8))
    optimizer.step()
    for name, w in learner.meta_parameters().items():
        step = 0.0002 if name.startswith("inner_lr") else 0.01
        moved = (w.detach() - before[name])[w.grad != 0].abs()
        torch.testing.assert_close(moved, torch.full_like(moved, step), rtol=1e-6, atol=0)
    for _ in range(2):
        schedulers[0].step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.0001])


EVERYTHING = {
    "cosine": ["--schedule", "cosine", "--warmup", "3"],
    "plateau": ["--schedule", "plateau:0.5,0", "--warmup", "3"],
    "AdamW": ["--optimizer", "adamw", "--optimizer-args", "betas=0.8,0.9", "--weight-decay", "0.1", "--warmup", "2"],
    "momentum": ["--weight-decay", "0.1", "--clip-grad", "0.5"],
    "inner step sizes": ["--learn-inner-lr", "tensor", "--inner-lr-lr", "1e-4", "--schedule", "cosine"],
}


class Interrupting(TaskSampler):
    """Tasks of a recipe, and a signal at some of the steps."""

    def __init__(self, tasks: Any, steps: set[int]) -> None:
        self.tasks, self.steps = tasks, steps

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        if step in self.steps:
            self.steps.remove(step)
            signal.raise_signal(signal.SIGINT)
        return self.tasks.sample(step, num_tasks, rank=rank, world_size=world_size)


@pytest.mark.parametrize("name", EVERYTHING)
def test_resumed_run_ends_as_an_uninterrupted_one(name, tmp_path, capsys, monkeypatch):
    words = ["train", "sinusoid", *SMALL, *EVERYTHING[name], "--iterations", "9", "--evaluate-every", "2"]
    assert cli.main([*words, "--run-dir", str(tmp_path / "whole")]) == 0
    parts, signals, sampler = [*words, "--run-dir", str(tmp_path / "parts"), "--resume"], {1, 4, 7}, Recipe.sampler

    def interrupting(recipe, split="train", **options):
        tasks = sampler(recipe, split, **options)
        return Interrupting(tasks, signals) if split == "train" else tasks

    monkeypatch.setattr(Recipe, "sampler", interrupting)
    assert [cli.main(parts) for _ in range(4)] == [130, 130, 130, 0]
    assert_same_ending(tmp_path / "parts", tmp_path / "whole")
    again = ["train", "sinusoid", "--config", str(tmp_path / "whole" / "config.json")]
    assert cli.main([*again, "--run-dir", str(tmp_path / "again")]) == 0
    assert_same_ending(tmp_path / "again", tmp_path / "whole")
    if name == "cosine":
        capsys.readouterr()
        assert cli.main([*parts, "--iterations", "12"]) == 2
        assert "schedule is 'cosine:6' there and 'cosine:9' here" in capsys.readouterr().err


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", EVERYTHING)
def test_on_two_processes(name, tmp_path):
    words = ["train", "sinusoid", *SMALL, *EVERYTHING[name], "--iterations", "6", "--evaluate-every", "2"]
    words += ["--workers", "2", "--dtype", "float64"]
    assert cli.main([*words, "--run-dir", str(tmp_path / "one")]) == 0
    for status, said in run_forked(metamom, 2, tmp_path, *words, "--run-dir", str(tmp_path / "two")):
        assert status == 0, said
    one, two = (Checkpoints(tmp_path / run / "checkpoints").load_newest() for run in ("one", "two"))
    pairs = [(one["learner"], two["learner"]), (one["optimizer"]["state"], two["optimizer"]["state"])]
    for a, b in pairs:  # products of one task and of two at once are rounded differently
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert two["optimizer"]["param_groups"] == one["optimizer"]["param_groups"]


def test_a_comparison_with_them(tmp_path):
    small = ["--iterations", "4", "--evaluate-every", "2", "--tasks", "4", "--seeds", "1", "--lrs", "0.03"]
    more = ["--clip-grad", "0.5", "--weight-decay", "0.1", "--schedule", "cosine", "--warmup", "1"]
    words = ["compare", "sinusoid", *small, *SMALL, *more, "--run-dir", str(tmp_path)]
    assert cli.main(words) == 0
    base = read_config(tmp_path)["settings"]["base"]
    assert [base[name] for name in ("clip_grad", "weight_decay", "schedule", "warmup")] == [0.5, 0.1, "cosine:3", 1]
    for run in (tmp_path / "runs").iterdir():
        assert all("clip_factor" in line for line in read_metrics(run))
    assert cli.main([*words, "--resume"]) == 0


def test_a_comparison_without_them(tmp_path):
    """One of an earlier version goes on."""
    small = ["--iterations", "2", "--evaluate-every", "2", "--tasks", "4", "--seeds", "1", "--lrs", "0.03"]
    words = ["compare", "sinusoid", *small, *SMALL, "--run-dir", str(tmp_path), "--resume"]
    assert cli.main(words) == 0
    config = read_config(tmp_path)
    for name in ("optimizer_args", "weight_decay", "clip_grad", "warmup", "patience"):
        del config["settings"]["base"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(words) == 0
