"""Arguments of the wrong kind: our own error, wherever they are given, and not Python's or torch's."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metamom
from metamom import (
    EF14,
    EF21,
    EF21SGDM,
    MAML,
    QSGD,
    BiasedAccumulator,
    Clip,
    Clip21,
    ClipValue,
    CompositeMomentum,
    RandK,
    TopK,
    evaluate,
)
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, FixedTasks, LinearRegression, Sinusoid

ODD = {
    "text": "x",
    "digits": "1",
    "None": None,
    "a list": [],
    "a pair": (1, 2),
    "a dict": {},
    "an object": object(),
    "a tensor": torch.ones(3),
    "NaN": math.nan,
    "below zero": -1,
}
MODEL = nn.Linear(1, 1)
LEARNER = MAML(MODEL, F.mse_loss)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "TopK": (TopK, {}, "k ratio"),
    "RandK": (RandK, {}, "k ratio"),
    "Clip": (Clip, {}, "max_norm"),
    "ClipValue": (ClipValue, {}, "max_value"),
    "Clip21": (Clip21, {}, "max_norm"),
    "QSGD": (QSGD, {"levels": 4}, "levels seed"),
    "EF14": (EF14, {}, "operator"),
    "EF21": (EF21, {}, "operator"),
    "EF21SGDM": (EF21SGDM, {"operator": TopK(1)}, "operator eta"),
    "CompositeMomentum": (
        CompositeMomentum,
        {"params": list(MODEL.parameters()), "lr": 0.1},
        "params lr beta weight_decay first_step",
    ),
    "MAML": (
        MAML,
        {"model": MODEL, "loss_fn": F.mse_loss},
        "model loss_fn inner_lr inner_steps estimator inner_batches",
    ),
    "BiasedAccumulator": (BiasedAccumulator, {"params": list(MODEL.parameters())}, "params bias world"),
    "evaluate": (evaluate, {"learner": LEARNER, "sampler": Sinusoid(), "tasks": 4}, "learner sampler tasks world"),
    "Sinusoid": (Sinusoid, {}, "shots queries amplitude noise seed"),
    "LinearRegression": (LinearRegression, {"dim": 2, "shots": 3}, "dim shots data seed"),
    "Episodes": (
        Episodes,
        {"images": torch.zeros(8, 1, 3, 3), "labels": torch.arange(8) % 2, "ways": 2, "shots": 1, "queries": 1},
        "images labels ways shots queries seed",
    ),
    "FixedTasks": (FixedTasks, {"sampler": Sinusoid(), "n": 4}, "sampler n"),
    "SinusoidMLP": (SinusoidMLP, {}, "hidden"),
    "Conv4": (Conv4, {"ways": 5}, "ways channels hidden"),
}
OURS = [Path(package.__file__).resolve().parent for package in (metamom, metamom.tasks, torch.optim)]
CASES = [(call, name) for call, (_, _, names) in CALLS.items() for name in names.split()]
FINE = {  # where one of them is what it may be
    ("BiasedAccumulator", "bias"): {"None"},
    ("BiasedAccumulator", "world"): {"None"},
    ("evaluate", "world"): {"None"},
    ("Sinusoid", "amplitude"): {"a pair"},
    ("LinearRegression", "data"): {"None"},
    ("SinusoidMLP", "hidden"): {"a pair"},
}


@pytest.mark.parametrize(("call", "name"), CASES)
def test_arguments_of_the_wrong_kind(call, name):
    make, others, _ = CALLS[call]
    for kind, value in ODD.items():
        if kind in FINE.get((call, name), ()):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            make(**{**others, name: value})
        raised = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert any(Path(raised.filename).resolve().is_relative_to(place) for place in OURS), f"{kind}: {caught.value}"
        assert "raise" in str(raised.line), f"{kind}: {caught.value}"


def test_a_model_is_no_list_of_parameters():
    with pytest.raises(TypeError, match=r"wanted parameters, such as model\.parameters\(\); got Linear"):
        CompositeMomentum(MODEL, lr=0.1)
