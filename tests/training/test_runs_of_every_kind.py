"""Runs with every kind of optimizer, schedule and operator resume, and refuse states they cannot have written."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directory_runs import TASKS, edited, go, in_group, learner, refused
from endings import assert_same, newest
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, Adagrad, Adam, AdamW, NAdam, RMSprop, Rprop
from torch.optim import lr_scheduler as schedules
from torch.optim.lr_scheduler import StepLR

from metamom import MAML, Clip, Compose, CompositeMomentum, LambdaBeta, TopK, train
from metamom.bias import EF14, EF21, Block8, Natural, PowerSGD, RandK
from metamom.experiments.recipes import Recipe
from metamom.nets.models import SinusoidMLP
from metamom.training.checkpoints import Checkpoints, load, save
from metamom.training.restore import load_parts


def test_an_optimizer_without_a_state_goes_on(tmp_path):
    """SGD has none, and ours none before its first step."""
    recipe = Recipe("sinusoid", optimizer="sgd")
    for done in (2, 3):
        made = recipe.learner()
        options: dict[str, Any] = {"meta_batch": 2, "run_dir": tmp_path, "resume": True}
        train(made, recipe.make_optimizer(made), TASKS, iterations=done, **options)
    fresh = CompositeMomentum(learner().parameters(), lr=0.02)
    load_parts({"optimizer": fresh}, {"optimizer": fresh.state_dict()}, "RUN")


KINDS: dict[str, dict[str, Any]] = {
    "adam": {"optimizer": lambda p: Adam(p, lr=0.01)},
    "adamw": {"optimizer": lambda p: AdamW(p, lr=0.01)},
    "amsgrad": {"optimizer": lambda p: Adam(p, lr=0.01, amsgrad=True)},
    "rmsprop": {"optimizer": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5)},
    "sgd": {"optimizer": lambda p: SGD(p, lr=0.01, momentum=0.5)},
    "nadam": {"optimizer": lambda p: NAdam(p, lr=0.01)},
    "adagrad": {"optimizer": lambda p: Adagrad(p, lr=0.01)},
    "rprop": {"optimizer": lambda p: Rprop(p, lr=0.01)},
    "adafactor": {"optimizer": lambda p: Adafactor(p, lr=0.01)},
    "normalized": {"optimizer": lambda p: CompositeMomentum(p, lr=0.01, normalize=True)},
    "sgd, StepLR": {"optimizer": lambda p: SGD(p, lr=0.01), "schedule": lambda o: StepLR(o, 3, 0.5)},
    "CyclicLR": {
        "optimizer": lambda p: SGD(p, lr=0.01, momentum=0.5),
        "schedule": lambda o: schedules.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    },
    "OneCycleLR": {"optimizer": lambda p: Adam(p, lr=0.01), "schedule": lambda o: schedules.OneCycleLR(o, 0.1, 8)},
    "restarts": {"schedule": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3)},
    "SequentialLR": {
        "schedule": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], [3])
    },
    "ChainedScheduler": {
        "schedule": lambda o: schedules.ChainedScheduler([schedules.StepLR(o, 2), schedules.ExponentialLR(o, 0.9)], o)
    },
    "LambdaBeta": {"schedule": lambda o: LambdaBeta(o, lambda k: 1 / (1 + k))},
    "ef14": {"bias": lambda: EF14(TopK(3)), "workers": 2},
    "ef21": {"bias": lambda: EF21(TopK(3)), "workers": 2},
    "randk": {"bias": lambda: EF14(Compose(Clip(1.0), RandK(3))), "workers": 2},
    "block8": {"bias": lambda: EF21(Block8(16)), "workers": 2},
    "natural": {"bias": Natural, "workers": 2},
    "powersgd": {"bias": lambda: PowerSGD(1), "workers": 2},
    "ef14 of powersgd": {"bias": lambda: EF14(PowerSGD(1)), "workers": 2},
    "validated": {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 4},
}


def go_on(kind: str, run_dir: Path, iterations: int = 6) -> None:
    """Begin or resume a run of this kind, each time with new parts."""
    options = {"meta_batch": 2, "checkpoint_every": 2, **KINDS[kind]}
    made = learner()
    optimizer = options.pop("optimizer", lambda p: CompositeMomentum(p, lr=0.02, beta=0.3))(made.parameters())
    steps = [options.pop("schedule")(optimizer)] if "schedule" in options else []
    if "bias" in options:
        options["bias"] = options["bias"]()
    train(made, optimizer, TASKS, iterations=iterations, run_dir=run_dir, resume=True, schedulers=steps, **options)


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of 4 steps of each kind."""
    folder = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def run(kind: str) -> Path:
        go_on(kind, folder / kind, 4)
        return Path(folder / kind)

    return run


def at(*places: Any, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Put a value at a place in nested containers; a function makes it of the one that is there."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner: Any = state
        for place in places[:-1]:
            inner = inner[place]
        inner[places[-1]] = value(inner[places[-1]]) if callable(value) else value
        return state

    return change


def lost(*places: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Leave out an entry."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner: Any = state
        for place in places[:-1]:
            inner = inner[place]
        del inner[places[-1]]
        return state

    return change


STATE, GROUP, SCHEDULE = ("optimizer", "state"), ("optimizer", "param_groups", 0), ("scheduler0",)


OF_KIND: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("adam", lost(*STATE, 1), "'state' has no entry 1, but after the first step there is exp_avg, exp_avg_sq, step of"),
    (
        "adam",
        at(*STATE, 0, "exp_avg", value=None),
        r"state\[0\]\.exp_avg should be a tensor of shape \(4, 1\); got None",
    ),
    ("adam", at(*STATE, 0, "exp_avg_sq", value=None), r"state\[0\]\.exp_avg_sq should be a tensor of shape \(4, 1\)"),
    ("adam", at(*STATE, 0, "exp_avg_sq", value=torch.neg), r"state\[0\]\.exp_avg_sq holds an entry below zero"),
    ("adam", at(*STATE, 0, "exp_avg", value=lambda x: x * math.inf), r"state\[0\]\.exp_avg is not finite"),
    (
        "adam",
        at(*STATE, 0, "step", value=-1),
        r"state\[0\]\.step should be a whole number >= 4, the steps done; got -1",
    ),
    (
        "adam",
        at(*STATE, 0, "step", value=torch.tensor(4.5)),
        r"state\[0\]\.step should be a whole number >= 4, .*; got 4\.5",
    ),
    ("adam", at(*STATE, 0, "step", value=torch.tensor(0.0)), r"state\[0\]\.step should be .*; got 0\.0"),
    ("adam", at(*GROUP, "amsgrad", value=True), r"param_groups\[0\]\.amsgrad should be False, as .*; got True"),
    ("adam", at(*GROUP, "capturable", value=True), r"param_groups\[0\]\.capturable should be False, .*; got True"),
    (
        "adam",
        at(*GROUP, "foreach", value=torch.zeros(3)),
        r"param_groups\[0\]\.foreach should be None, .*got a tensor of sh",
    ),
    (
        "adam",
        at(*GROUP, "eps", value=2**70),
        r"param_groups\[0\]\.eps should be 1e-08, since no schedule changes it; got 11805",
    ),
    ("adam", at(*GROUP, "weight_decay", value=2**70), r"param_groups\[0\]\.weight_decay should be 0\.0, .*; got 11805"),
    (
        "adam",
        at(*GROUP, "betas", value=(0.5, 0.9)),
        r"param_groups\[0\]\.betas should be \(0\.9, 0\.999\), .*; got a tuple",
    ),
    ("adam", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False, .*; got True"),
    (
        "adamw",
        at(*GROUP, "decoupled_weight_decay", value=False),
        r"decoupled_weight_decay should be True, .*; got False",
    ),
    ("amsgrad", lost(*STATE, 0, "max_exp_avg_sq"), r"state\[0\] has no max_exp_avg_sq"),
    (
        "amsgrad",
        lost(*GROUP, "amsgrad"),
        r"param_groups\[0\]\.amsgrad should be True, as in this optimizer; got False",
    ),
    ("rmsprop", lost(*STATE, 0, "grad_avg"), r"state\[0\] has no grad_avg"),
    ("rmsprop", lost(*STATE, 0, "momentum_buffer"), r"state\[0\] has no momentum_buffer"),
    ("nadam", lost(*STATE, 1), "'state' has no entry 1, but after the first step there is a state of each parameter"),
    ("nadam", at(*STATE, value={}), "'state' is empty, but after the first step it has a state of each"),
    ("adagrad", at(*STATE, 0, "sum", value=None), r"state\[0\]\.sum should be a tensor or a number; got None"),
    ("rprop", at(*STATE, 0, "prev", value=lambda x: x * math.nan), r"state\[0\]\.prev is not finite"),
    ("adafactor", at(*STATE, 0, "step", value=-1), r"state\[0\]\.step should be a whole number >= 4, .*; got -1"),
    ("adafactor", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False, .*; got True"),
    ("sgd", at(*STATE, value={}), "'state' is empty, but after the first step it has momentum_buffer of each"),
    ("sgd", lost(*STATE, 1), "'state' has no entry 1, but after the first step there is momentum_buffer of each"),
    (
        "sgd",
        at(*STATE, 1, "momentum_buffer", value=None),
        r"state\[1\]\.momentum_buffer should be a tensor .*; got None",
    ),
    *(
        ("sgd", at(*GROUP, name, value=value), rf"param_groups\[0\]\.{name} should be .*; got {value}")
        for name in ("momentum", "dampening", "weight_decay")
        for value in (-1, 2**70)
    ),
    (
        "sgd",
        at(*GROUP, "lr", value=2**70),
        r"param_groups\[0\]\.lr should be 0\.01, since no schedule changes it; got 11805",
    ),
    ("normalized", lost(*GROUP, "normalize"), r"\.normalize should be True, as in this optimizer; got False"),
    ("sgd, StepLR", at(*GROUP, "lr", value=2**70), r"param_groups\[0\]\.lr should be a number below 2\^63; got 11805"),
    (
        "sgd, StepLR",
        at(*GROUP, "lr", value=0.25),
        r"param_groups\[0\]\.lr should be 0\.005, as StepLR set it; got 0\.25",
    ),
    ("sgd, StepLR", at(*GROUP, "momentum", value=0.9), r"param_groups\[0\]\.momentum should be 0\.0"),
    ("sgd, StepLR", at(*SCHEDULE, "gamma", value=-1), r"scheduler0: its state\.gamma should be 0\.5, as .*; got -1"),
    ("sgd, StepLR", at(*SCHEDULE, "step_size", value=2), r"scheduler0: its state\.step_size should be 3, as .*; got 2"),
    (
        "sgd, StepLR",
        at(*SCHEDULE, "base_lrs", value=[-1]),
        r"its state\.base_lrs should be \[0\.01\], as .*; got a list",
    ),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=-1), r"last_epoch should be a whole number >= 4, .*; got -1"),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=3), r"last_epoch should be a whole number >= 4, .*; got 3"),
    ("sgd, StepLR", at(*SCHEDULE, "last_epoch", value=4.5), r"last_epoch should be a whole number >= 4, .*; got 4\.5"),
    ("CyclicLR", at(*GROUP, "dampening", value=0.5), r"param_groups\[0\]\.dampening should be 0\.0"),
    ("CyclicLR", at(*SCHEDULE, "base_momentums", value=[-1]), r"base_momentums should be \[0\.8\]"),
    ("OneCycleLR", at(*SCHEDULE, "total_steps", value=9), r"total_steps should be 8, as in this schedule; got 9"),
    ("restarts", at(*SCHEDULE, "T_cur", value=-1), r"T_cur should be a number >= 0; got -1"),
    ("restarts", at(*SCHEDULE, "T_i", value=0), r"T_i should be a number >= 3; got 0"),
    ("SequentialLR", at(*SCHEDULE, "_schedulers", 1, "gamma", value=-1), r"_schedulers\[1\]\.gamma should be 0\.9"),
    ("SequentialLR", at(*SCHEDULE, "_milestones", value=[4]), r"_milestones should be \[3\], as .*; got a list"),
    (
        "ChainedScheduler",
        at(*SCHEDULE, "_schedulers", 0, "step_size", value=3),
        r"_schedulers\[0\]\.step_size should be 2",
    ),
    ("LambdaBeta", at(*SCHEDULE, "base_betas", value=[0.9]), r"base_betas should be \[0\.3\], as .*; got a list"),
    (
        "LambdaBeta",
        at(*SCHEDULE, "last_step", value=3),
        r"last_step should be a whole number >= 4, the steps done; got 3",
    ),
    ("LambdaBeta", at(*GROUP, "maximize", value=True), r"param_groups\[0\]\.maximize should be False"),
    (
        "ef14",
        lost("bias", "workers", 1),
        r"bias: 'workers' should hold the error of each of 2 workers, 0 to 1; got those of 0$",
    ),
    (
        "ef14",
        at("bias", "workers", value=lambda w: {**w, 2: w[0]}),
        r"of each of 2 workers, 0 to 1; got those of 0, 1, 2",
    ),
    (
        "ef14",
        at("bias", "workers", 0, "error", value=lambda x: x * math.nan),
        r"workers\.0\.error is not finite in all",
    ),
    ("ef21", at("bias", "workers", value={}), "the estimate of each of 2 workers, 0 to 1; got those of none"),
    ("ef21", lost("bias", "workers", 0), "the estimate of each of 2 workers, 0 to 1; got those of 1"),
    ("powersgd", lost("bias", "workers", 1), "the start of each of 2 workers, 0 to 1; got those of 0"),
    ("powersgd", at("bias", "calls", value=3), "'calls' should be 4, one for each step; got 3"),
    (
        "ef14 of powersgd",
        at("bias", "workers", 0, value=lambda kept: {"error": kept["error"]}),
        "keeps error, start of each worker; got error",
    ),
    ("randk", at("bias", "operator", "1", "calls", value=3), "'calls' should be 4, one for each step; got 3"),
    (
        "validated",
        at("best", value=None),
        r"the best validation as 'best', for metrics\.jsonl has validations before step 4",
    ),
    ("validated", at("best", value=math.nan), "the best validation, or None, as 'best'; got nan"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"), OF_KIND, ids=[f"{number} {row[0]}" for number, row in enumerate(OF_KIND)]
)
def test_checkpoints_that_would_change_the_run(kind, change, message, of_kind, tmp_path):
    """Contents of the right type which no run of these parts can have written."""
    run = Path(shutil.copytree(of_kind(kind), tmp_path / "run"))
    edited(run, change)
    refused(run, message, lambda: go_on(kind, run))


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_kind_go_on(kind, of_kind, tmp_path):
    """As without the interruption, bit for bit."""
    run = Path(shutil.copytree(of_kind(kind), tmp_path / "run"))
    go_on(kind, run)
    go_on(kind, tmp_path / "whole")
    for part in newest(tmp_path / "whole").keys() - {"seconds", "rng"}:
        assert_same(newest(run)[part], newest(tmp_path / "whole")[part])


def test_a_validation_that_came_later_has_no_best_yet(run):
    """The checkpoint of a run without one holds ``None``."""
    assert newest(run)["best"] is None
    go(run, resume=True, iterations=5, validation=TASKS, evaluate_tasks=4)
    assert isinstance(newest(run)["best"], float)


def test_frozen_parameters_have_no_state(tmp_path):
    for iterations in (4, 6):
        made = learner()
        next(iter(made.parameters())).requires_grad_(False)
        go(tmp_path, made, iterations=iterations, resume=True)
    assert sorted(newest(tmp_path)["optimizer"]["state"]) == [1, 2, 3]


def test_unused_parameters_have_a_state(tmp_path):
    """Their gradient is zero."""

    class Spare(SinusoidMLP):
        def __init__(self) -> None:
            super().__init__((4,), generator=torch.Generator().manual_seed(0))
            self.spare = nn.Parameter(torch.ones(2))

    for iterations in (4, 6):
        go(tmp_path, MAML(Spare(), F.mse_loss), iterations=iterations, resume=True)
    assert len(newest(tmp_path)["optimizer"]["state"]) == 5


class Halving:
    """A schedule of somebody's, which moves what it likes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["beta"] /= 2
            group["weight_decay"] += 0.01

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None


def test_schedules_of_ones_own_may_move_every_number(tmp_path):
    go(tmp_path, schedulers=[Halving])
    go(tmp_path, schedulers=[Halving], iterations=6, resume=True)
    assert newest(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == pytest.approx(0.06)
    path = Checkpoints(tmp_path / "checkpoints").path(6)
    save(path, in_group(normalize=True)(load(path)))
    message = "normalize should be False"
    refused(tmp_path, message, lambda: go(tmp_path, schedulers=[Halving], iterations=8, resume=True))
