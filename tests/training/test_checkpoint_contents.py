"""Checkpoints with the wrong contents are refused, and every file stays as it was."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directory_runs import TASKS, edited, go, in_group, learner, refused
from endings import assert_same
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

from metamom import CompositeMomentum, TopK, cli, train
from metamom.bias import EF14, EF21
from metamom.experiments.recipes import Recipe
from metamom.training.checkpoints import CheckpointError
from metamom.training.restore import load_parts


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, name: value}


def in_state(value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state["optimizer"]["state"][0] = value
        return state

    return change


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no step": (without("step"), "should hold a whole number >= 0 as 'step'; got None"),
    "no seconds": (without("seconds"), "a number >= 0 as 'seconds'; got None"),
    "no best": (without("best"), "there is no 'best' in .*: the best validation so far, or None"),
    "no rng": (without("rng"), "the states of torch's generators as 'rng', .*; got None"),
    "no learner": (without("learner"), "there is no learner in the checkpoints"),
    "step of text": (with_("step", "4"), "'step'; got '4'"),
    "step below zero": (with_("step", -1), "'step'; got -1"),
    "step beyond all": (with_("step", 2**70), "holds another step than its name says: a number of many digits"),
    "another step": (with_("step", 3), r"step-00000004\.pt holds another step than its name says: 3\."),
    "weights NaN": (
        lambda s: {**s, "learner": {k: v * math.nan for k, v in s["learner"].items()}},
        "learner: .* is not finite in all of its entries",
    ),
    **{
        f"weights of {dtype}": (
            lambda s, dtype=dtype: {**s, "learner": {k: v.to(dtype) for k, v in s["learner"].items()}},
            f"learner: .* should be of torch.float32; got a tensor of {dtype}",
        )
        for dtype in (torch.bool, torch.int64, torch.complex64)
    },
    "momentum NaN": (in_state({"momentum": torch.full((4, 1), math.nan)}), r"state\[0\]\.momentum is not finite"),
    "momentum of int64": (
        in_state({"momentum": torch.zeros(4, 1, dtype=torch.int64)}),
        r"state\[0\]\.momentum should be of torch\.float32; got a tensor of torch\.int64",
    ),
    "momentum lost": (
        lambda s: {**s, "optimizer": {**s["optimizer"], "state": {}}},
        "'state' is empty, but after the first step it has momentum of each parameter",
    ),
    "one momentum lost": (
        lambda s: (s["optimizer"]["state"].pop(2), s)[1],
        "'state' has no entry 2, but after the first step there is momentum of each parameter",
    ),
    "momentum None": (
        in_state({"momentum": None}),
        r"state\[0\]\.momentum should be a tensor of shape \(4, 1\); got None",
    ),
    "maximize": (
        in_group(maximize=True),
        r"param_groups\[0\]\.maximize should be False, as in this optimizer; got T",
    ),
    "normalize": (in_group(normalize=True), r"param_groups\[0\]\.normalize should be False, .*; got True"),
    "another beta": (
        in_group(beta=0.4),
        r"param_groups\[0\]\.beta should be 0\.3, since no schedule changes it; got 0\.4",
    ),
    "another first step": (in_group(first_step="gradient"), r"param_groups\[0\]\.first_step should be 'zero'"),
    "weight decay beyond all": (in_group(weight_decay=2**70), r"param_groups\[0\]\.weight_decay should be 0\.0"),
    "weight decay beyond a float": (in_group(weight_decay=10**400), r"weight_decay should be a number; got a whole"),
    "foreach a tensor": (in_group(foreach=torch.zeros(3)), r"param_groups\[0\]\.foreach should be None"),
    "parameters in another order": (in_group(params=[1, 0, 2, 3]), r"param_groups\[0\]\.params should number"),
    "lr below zero": (in_group(lr=-0.5), r"param_groups\[0\]\.lr should be a number >= 0; got -0\.5"),
    "another lr": (in_group(lr=0.5), r"param_groups\[0\]\.lr should be 0\.02, since no schedule changes it; got 0\.5"),
    "more seconds than a float has": (
        with_("seconds", 10**400),
        "'seconds'; got a whole number of 1,329 bits",
    ),
    "seconds NaN": (with_("seconds", float("nan")), "'seconds'; got nan"),
    "best NaN": (with_("best", math.nan), "should hold the best validation, or None, as 'best'; got nan"),
    "best of text": (with_("best", "x"), "'best'; got 'x'"),
    "rng a list": (with_("rng", [1]), "should hold the states of torch's generators as 'rng', .*; got a list"),
    "rng short": (
        with_("rng", {"cpu": torch.zeros(3, dtype=torch.uint8), "cuda": []}),
        "no states of generators",
    ),
    "rng of GPUs": (
        with_("rng", {"cpu": torch.get_rng_state(), "cuda": ["x"]}),
        "no states of generators",
    ),
    "learner a list": (with_("learner", [1]), "learner: its state should be a dict"),
    "learner of numbers": (with_("learner", {1: 2}), "learner: "),
    "learner of text": (with_("learner", {"model.0.weight": "x"}), "learner: "),
    "optimizer None": (with_("optimizer", None), "optimizer: its state should be a dict"),
    "optimizer's state a list": (with_("optimizer", {"state": [], "param_groups": []}), "'state' should be a dict"),
    "no group": (with_("optimizer", {"state": {}, "param_groups": []}), "wanted 1 param_groups; got 0"),
    "lr of text": (in_group(lr="x"), r"param_groups\[0\]\.lr should be a number; got 'x'"),
    "lr NaN": (in_group(lr=float("nan")), r"param_groups\[0\]\.lr should be a number; got nan"),
    "beta out of range": (in_group(beta=7.0), "beta"),
    "parameters twice": (in_group(params=[0, 0, 0, 0]), "'params' should be whole numbers that differ"),
    "no momentum": (in_state({}), r"state\[0\] has no momentum"),
    "momentum of text": (in_state({"momentum": "x"}), r"state\[0\]\.momentum should be a tensor of shape \(4, 1\)"),
    "momentum of another shape": (in_state({"momentum": torch.zeros(3)}), r"got a tensor of shape \(3,\)"),
    "state of nobody": (
        lambda s: {**s, "optimizer": {**s["optimizer"], "state": {9: {"momentum": torch.zeros(1)}}}},
        "an entry 9, which belongs to no parameter",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_checkpoints_with_the_wrong_contents(what, run):
    """One error that names the field; the files, the learner, the optimizer and the generators are as they were."""
    change, message = WRONG[what]
    edited(run, change)
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    groups, generator = optimizer.state_dict(), torch.get_rng_state()
    refused(
        run,
        message,
        lambda: train(made, optimizer, TASKS, iterations=6, meta_batch=2, checkpoint_every=2, run_dir=run, resume=True),
    )
    assert_same(dict(made.state_dict()), before)
    assert optimizer.state_dict() == groups
    assert torch.equal(torch.get_rng_state(), generator)


def test_evaluation_of_checkpoints_with_the_wrong_contents(commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    edited(run, lambda s: {**s, "learner": {k: v * math.nan for k, v in s["learner"].items()}})
    assert cli.main(["evaluate", str(run), "--tasks", "4", "--checkpoint", "newest"]) == 2
    assert "is not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"workers": [], "operator": {}}, "a dict of workers"),
        ({"workers": {"a": {"error": torch.zeros(13)}}, "operator": {}}, "numbers the workers by whole numbers"),
        ({"workers": {0: {"error": "x"}}, "operator": {}}, r"keeps error \[d\] of worker 0; got 'x'"),
        ({"workers": {0: {"error": torch.zeros(3)}}, "operator": {}}, "should be a tensor of 13 entries; got a tensor"),
        ({"workers": {0: [1]}, "operator": {}}, "keeps error of each worker; got list"),
        ({"workers": {}, "operator": 3}, "a dict of workers and one of its operator"),
        ([], "bias: its state should be a dict"),
        (None, "bias: its state should be a dict"),
    ],
)
def test_states_of_operators_of_the_wrong_type(state, message, tmp_path):
    options: dict[str, Any] = {"bias": EF14(TopK(3)), "workers": 2}
    go(tmp_path, **options)
    edited(tmp_path, with_("bias", state))
    refused(tmp_path, message, lambda: go(tmp_path, resume=True, iterations=6, **{**options, "bias": EF14(TopK(3))}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "step": 3}, None),  # a scheduler's method of that name
        (lambda s: {**s, "last_epoch": "x"}, r"last_epoch should be a number; got 'x'"),
        (lambda s: {k: v for k, v in s.items() if k != "last_epoch"}, "has no last_epoch"),
        (lambda s: {**s, "base_lrs": [0.1, 0.2]}, "base_lrs should be 1 entries"),
        (lambda s: [s], "should be a dict; got a list"),
    ],
)
def test_states_of_schedules_of_the_wrong_type(change, message, tmp_path):
    schedulers = [lambda o: StepLR(o, 3, 0.5)]
    go(tmp_path, schedulers=schedulers)
    edited(tmp_path, lambda state: {**state, "scheduler0": change(state["scheduler0"])})
    message = message or "holds step, which StepLR does not save"
    refused(tmp_path, message, lambda: go(tmp_path, schedulers=schedulers, resume=True, iterations=6))


def test_parts_are_loaded_all_or_none():
    """The second does not fit; the first is as it was, in place."""
    made, other = learner(), learner()
    made_optimizer = Adam(made.parameters(), lr=0.1)
    for parameter in other.parameters():
        parameter.data.add_(1.0)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    places = [parameter.data_ptr() for parameter in made.parameters()]
    state = {"learner": other.state_dict(), "optimizer": {"state": {0: {"step": "x"}}, "param_groups": []}}
    with pytest.raises(CheckpointError, match="RUN belong to another model or optimizer: optimizer: wanted 1 param"):
        load_parts({"learner": made, "optimizer": made_optimizer}, state, "RUN")
    assert_same(dict(made.state_dict()), before)
    assert [parameter.data_ptr() for parameter in made.parameters()] == places


def test_states_that_fit_are_taken():
    """Of every optimizer of a recipe, and of tensors as step sizes."""
    for name in ("momentum", "sgd", "adam", "rmsprop"):
        recipe = Recipe("sinusoid", optimizer=name)
        made = recipe.learner()
        optimizer = recipe.make_optimizer(made)
        made.backward(TASKS.sample(0, 2))
        optimizer.step()
        again = recipe.make_optimizer(other := recipe.learner())
        load_parts({"o": again, "l": other}, {"o": optimizer.state_dict(), "l": made.state_dict()}, "RUN")
        assert_same(again.state_dict(), optimizer.state_dict())


def test_ef21_keeps_a_tensor_of_the_server():
    operator = EF21(TopK(3))
    with pytest.raises(ValueError, match="keeps a tensor as 'received'"):
        operator.load_state_dict({"workers": {}, "operator": {}, "received": 3})
