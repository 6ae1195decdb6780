"""Arguments of the wrong kind: an error that says so, and not one of Python's from deep inside."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metamom
from metamom import (
    DASHA,
    DIANA,
    EF14,
    EF21,
    EF21SGD2M,
    EF21SGDM,
    MAML,
    MARINA,
    MLMCQSGD,
    QSGD,
    BiasedAccumulator,
    Block8,
    Clip,
    Clip21,
    Clip21SGD2M,
    ClipValue,
    CompositeMomentum,
    GaussianNoise,
    MLMCTopK,
    Natural,
    PowerSGD,
    RandK,
    TernGrad,
    TopK,
    evaluate,
    train,
)
from metamom.diagnostics import TrackBias, measure
from metamom.distributed import World
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, FixedTasks, LinearRegression, PerWorker, Sinusoid
from metamom.tasks.images import labelled_images
from metamom.tasks.omniglot_splits import split_characters

ODD = {
    "text": "x",
    "digits": "1",
    "None": None,
    "a list": [],
    "a pair": (1, 2),
    "a dict": {},
    "an object": object(),
    "a tensor": torch.ones(3),
    "an array": np.ones(3),
    "NaN": math.nan,
    "below zero": -1,
}
MODEL = nn.Linear(1, 1)
LEARNER = MAML(MODEL, F.mse_loss)
OPTIMIZER = CompositeMomentum(LEARNER.parameters(), lr=0.1)
TASKS = Sinusoid(shots=10, queries=4)


def tracked(**fields: Any) -> None:
    """Train with a `TrackBias`, which itself takes anything."""
    plan = TrackBias(**{"every": 1, "pools": TASKS, "inner_batch": 1, "draws": 3, **fields})
    train(LEARNER, OPTIMIZER, TASKS, iterations=1, meta_batch=4, track_bias=plan)


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "TopK": (TopK, {}, "k ratio"),
    "TopK of one": (TopK, {"k": 1}, "ties"),
    "RandK": (RandK, {}, "k ratio"),
    "Clip": (Clip, {}, "max_norm"),
    "ClipValue": (ClipValue, {}, "max_value"),
    "Clip21": (Clip21, {}, "max_norm"),
    "QSGD": (QSGD, {"levels": 4}, "levels seed"),
    "MLMCTopK": (MLMCTopK, {}, "k ratio"),
    "MLMCTopK of one": (MLMCTopK, {"k": 1}, "geometric seed"),
    "MLMCQSGD": (MLMCQSGD, {}, "bits geometric seed"),
    "Natural": (Natural, {}, "seed"),
    "TernGrad": (TernGrad, {}, "clip seed"),
    "Block8": (Block8, {}, "block"),
    "Block8 at random": (Block8, {"random": True}, "seed"),
    "PowerSGD": (PowerSGD, {"rank": 2}, "rank seed"),
    "EF14": (EF14, {}, "operator"),
    "EF21": (EF21, {}, "operator"),
    "EF21SGDM": (EF21SGDM, {"operator": TopK(1)}, "operator eta"),
    "EF21SGD2M": (EF21SGD2M, {"operator": TopK(1)}, "operator eta"),
    "Clip21SGD2M": (Clip21SGD2M, {"max_norm": 1.0}, "max_norm eta server noise seed"),
    "GaussianNoise": (GaussianNoise, {"sigma": 1.0}, "sigma seed"),
    "DIANA": (DIANA, {"operator": TopK(1)}, "operator alpha"),
    "MARINA": (MARINA, {"operator": TopK(1)}, "operator p"),
    "DASHA": (DASHA, {"operator": TopK(1)}, "operator a eta"),
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
    "evaluate": (
        evaluate,
        {"learner": LEARNER, "sampler": Sinusoid(), "tasks": 4},
        "learner sampler tasks steps confidence stream world",
    ),
    "World": (World, {}, "server"),
    "train": (
        train,
        {"learner": LEARNER, "optimizer": OPTIMIZER, "sampler": TASKS, "iterations": 1, "meta_batch": 4},
        "learner optimizer sampler iterations meta_batch workers bias aggregate clip_grad schedulers validation "
        "evaluate_every evaluate_tasks run_dir resume checkpoint_every keep_checkpoints settings free callbacks "
        "tensorboard track_bias world label",
    ),
    "TrackBias": (tracked, {}, "every pools inner_batch draws tasks_per_worker queries"),
    "measure": (
        measure,
        {"learner": LEARNER, "sampler": TASKS, "inner_batches": (1,), "draws": 3},
        "learner sampler inner_batches bias population draws tasks_per_worker queries most_pairs confidence",
    ),
    "PerWorker": (PerWorker, {}, "samplers"),
    "Sinusoid": (Sinusoid, {}, "shots queries amplitude noise seed"),
    "LinearRegression": (LinearRegression, {"dim": 2, "shots": 3}, "dim shots data seed"),
    "labelled_images": (labelled_images, {"dataset": "mnist", "part": "train"}, "dataset part"),
    "split": (split_characters, {}, "split"),
    "Episodes": (
        Episodes,
        {"images": torch.zeros(8, 1, 3, 3), "labels": torch.arange(8) % 2, "ways": 2, "shots": 1, "queries": 1},
        "images labels ways shots queries seed",
    ),
    "FixedTasks": (FixedTasks, {"sampler": Sinusoid(), "n": 4}, "sampler n fresh_data order"),
    "SinusoidMLP": (SinusoidMLP, {}, "hidden"),
    "Conv4": (Conv4, {"ways": 5}, "ways channels hidden"),
}
OURS = [Path(package.__file__).resolve().parent for package in (metamom, metamom.tasks)]
CASES = [(call, name) for call, (_, _, names) in CALLS.items() for name in names.split()]
FINE = {  # where one of them is what it may be
    ("MLMCTopK of one", "geometric"): {"None"},
    ("MLMCQSGD", "geometric"): {"None"},
    ("TernGrad", "clip"): {"None"},
    ("BiasedAccumulator", "bias"): {"None"},
    ("BiasedAccumulator", "world"): {"None"},
    ("evaluate", "world"): {"None"},
    ("evaluate", "steps"): {"a pair"},
    ("evaluate", "stream"): {"text", "digits"},
    ("train", "bias"): {"None"},
    ("train", "clip_grad"): {"None"},
    ("train", "schedulers"): {"a list", "a dict"},
    ("train", "validation"): {"None"},
    ("train", "evaluate_every"): {"None"},
    ("train", "run_dir"): {"text", "digits", "None"},
    ("train", "settings"): {"None", "a dict"},
    ("train", "free"): {"a list", "a dict"},
    ("train", "callbacks"): {"a list", "a dict", "None"},
    ("train", "track_bias"): {"None"},
    ("train", "world"): {"None"},
    ("train", "label"): {"text", "digits", "None"},
    ("TrackBias", "queries"): {"None"},
    ("measure", "inner_batches"): {"a pair"},
    ("measure", "bias"): {"None"},
    ("measure", "population"): {"None"},
    ("measure", "queries"): {"None"},
    ("measure", "most_pairs"): {"None"},
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
