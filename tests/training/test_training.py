"""The training loop: what it does, what it writes, and which arguments it refuses."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
from typing import Any

import numpy as np
import pytest
import torch
from endings import assert_same
from torch.nn import functional as F
from torch.optim import SGD, Adam, RMSprop
from training_runs import KINDS, TASKS, AtStep, Parts, compressed, global_seed, go, learner, momentum, spoil

from metamom import (
    MAML,
    Clip,
    CompositeMomentum,
    TopK,
    evaluate,
    train,
)
from metamom.bias import EF21, EF21SGDM
from metamom.nets.models import SinusoidMLP
from metamom.tasks import PerWorker, Sinusoid
from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_config, read_metrics

pytestmark = pytest.mark.usefixtures("global_state")


def test_lowers_the_loss():
    made = learner(40)
    before = evaluate(made, TASKS, tasks=100, steps=(1,)).mean[0]
    go(Parts(made, CompositeMomentum(made.parameters(), lr=0.03, beta=0.1)), iterations=150)
    assert evaluate(made, TASKS, tasks=100, steps=(1,)).mean[0] < 0.9 * before


@pytest.mark.parametrize("aggregate", ["median", "trimmed:0.25", "geomedian"])
def test_a_robust_mean_of_the_workers(aggregate):
    made, other = learner(), learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    for step in range(4):
        optimizer.zero_grad()
        made.backward(TASKS.sample(step, 8), workers=4, bias=Clip(1.0), aggregate=aggregate)
        optimizer.step()
    parts = Parts(other, CompositeMomentum(other.parameters(), lr=0.02, beta=0.3))
    go(parts, iterations=4, workers=4, bias=Clip(1.0), aggregate=aggregate)
    plain = momentum()
    go(plain, iterations=4, workers=4, bias=Clip(1.0))
    for p, q, r in zip(made.parameters(), other.parameters(), plain.learner.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, r)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_is_the_loop_written_out(beta):
    parts = momentum(beta=beta)
    result = go(parts, iterations=5, workers=2, bias=TopK(k=9))
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=beta)
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        loss, _ = made.backward(TASKS.sample(step, 8), workers=2, bias=TopK(k=9))
        optimizer.step()
        losses.append(float(loss))
    assert_same(dict(parts.learner.state_dict()), dict(made.state_dict()))
    assert [line["loss"] for line in result.metrics] == losses


def test_metrics_lines(tmp_path):
    parts = compressed()
    result = go(parts, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics == read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(12))
    d = sum(p.numel() for p in parts.learner.parameters())
    for line in lines:
        assert {"step", "loss", "accuracy", "seconds", "world_size", "wire_bytes"} <= line.keys()
        assert line["accuracy"] is None  # a regression
        assert line["world_size"] == 1
        assert line["wire_bytes"] == 4 * 8 * round(0.2 * d)
        assert 0 < line["bias_error"] < 1
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(lines))


def test_the_result_is_printed_in_one_line(tmp_path):
    options = {"validation": TASKS, "evaluate_every": 2, "evaluate_tasks": 4, "run_dir": tmp_path / "run"}
    result = go(momentum(), iterations=5, **options)
    values = [line["validation"] for line in result.metrics if "validation" in line]
    assert len(values) == 3
    shown = (result.metrics[-1]["loss"], values[-1], min(values))
    loss, last, best = (f"{value:.6g}" for value in shown)
    where = f"run_dir={str(tmp_path / 'run')!r}"
    text = repr(result)
    assert text == f"TrainResult(steps=5, loss={loss}, validation_loss={last}, best={best}, {where})"
    again = go(momentum(), iterations=6, resume=True, **options)
    assert repr(again).startswith("TrainResult(steps=6, resumed_from=5, loss=")
    assert (
        repr(go(momentum(), iterations=6, resume=True, **options)) == f"TrainResult(steps=6, resumed_from=6, {where})"
    )


def test_configuration_says_how_to_run_it_again(tmp_path):
    go(compressed(), tmp_path)
    config = read_config(tmp_path)
    settings = config["settings"]
    assert settings["bias"] == "topk:20%"
    assert settings["workers"] == 4
    assert settings["meta_batch"] == 8
    assert settings["optimizer"]["groups"][0]["lr"] == 0.02
    assert settings["sampler"] == TASKS.describe()
    assert config["length"]["iterations"] == 12
    assert config["environment"]["torch"] == torch.__version__
    assert {"metamom", "python", "numpy", "platform", "processor", "threads", "gpus"} <= config["environment"].keys()


def test_newest_checkpoints_are_kept(tmp_path):
    go(momentum(), tmp_path, checkpoint_every=2, keep_checkpoints=2)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [10, 12]
    assert not list(tmp_path.rglob("*.tmp"))


def test_best_checkpoint_is_the_best_by_validation(tmp_path):
    parts = momentum(lr=0.02, beta=1.0)
    result = go(parts, tmp_path, tasks=AtStep(8, spoil), validation=TASKS, evaluate_every=2, evaluate_tasks=20)
    measured = {line["step"] + 1: line["validation"] for line in result.metrics if "validation" in line}
    assert list(measured) == [2, 4, 6, 8, 10, 12]
    best = min(measured, key=measured.__getitem__)
    assert best < 12, "the set-up should spoil the end of the run"
    state = load(Checkpoints(tmp_path / "checkpoints").best)
    assert state["step"] == best
    again = learner()
    again.load_state_dict(state["learner"])
    checked = evaluate(again, TASKS, tasks=20, steps=(1,), stream="validation")
    assert checked.mean[0] == measured[best]
    line = result.metrics[best - 1]
    assert line["validation_halfwidth"] == checked.halfwidth[0]
    assert result.validation is not None
    assert result.validation.mean[0] == measured[12]


def test_a_validation_that_is_no_number_is_not_the_best(tmp_path):
    class FirstIsNaN:
        asked = 0

        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
            self.asked += 1
            batch = TASKS.sample(step, num_tasks, rank=rank, world_size=world_size)
            # so far away that adapted weights overflow, and predictions are inf - inf
            return batch._replace(support_y=batch.support_y * 1e37) if self.asked == 1 else batch

    result = go(momentum(), tmp_path, validation=FirstIsNaN(), evaluate_every=6, evaluate_tasks=20)
    assert [math.isnan(line["validation"]) for line in result.metrics if "validation" in line] == [True, False]
    assert load(Checkpoints(tmp_path / "checkpoints").best)["step"] == 12


@pytest.mark.parametrize("kind", ["from zero", "dropout"])
def test_validation_does_not_change_the_training(kind):
    runs = []
    for options in ({}, {"validation": TASKS, "evaluate_every": 3, "evaluate_tasks": 10}):
        parts = KINDS[kind]()
        with global_seed(7):
            go(parts, **options)
        runs.append({**parts.learner.state_dict()})
    assert_same(*runs)


def test_global_generators_are_untouched(tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    parts = momentum()
    go(parts, tmp_path, validation=TASKS, evaluate_tasks=10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


def test_signal_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    go(momentum(), iterations=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    go(momentum(), tmp_path, iterations=4, tensorboard=True)
    files_written = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files_written) == 1
    assert b"grad_norm" in files_written[0].read_bytes()


# arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1; got 0"),
        ({"meta_batch": 0}, "meta_batch must be >= 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1"),
        ({"keep_checkpoints": 0}, "newest checkpoint must be kept"),
        ({"evaluate_every": 0}, "evaluate_every must be >= 1"),
        ({"evaluate_tasks": 1}, "at least 2 tasks"),
        ({"workers": 3}, "must divide the meta-batch of 8 tasks; got 3"),
        ({"workers": 0}, "must divide the meta-batch"),
        ({"bias": TopK(k=10**6)}, "the number of parameters"),
        ({"bias": TopK(k=2, per_tensor=True)}, r"1 <= k <= 1 "),
        ({"bias": EF21(TopK(k=10**6))}, "the number of parameters"),
        ({"aggregate": "mode"}, "aggregate must be mean, median, geomedian or trimmed:SHARE"),
    ],
)
def test_bad_arguments(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(momentum(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "has"),
    [
        (lambda p: CompositeMomentum(p, lr=0.02, beta=0.3), r"CompositeMomentum with \{'beta': 0\.3\}"),
        (lambda p: SGD(p, lr=0.02, momentum=0.9), r"SGD with \{'momentum': 0\.9\}"),
        (lambda p: RMSprop(p, lr=0.02, momentum=0.5), "RMSprop with"),
        (lambda p: Adam(p, lr=0.02), "Adam with .*betas"),
        (
            lambda p: CompositeMomentum([{"params": [q], "beta": b} for q, b in zip(p, (1, 1, 1, 0.5))], lr=1),  # noqa: B905
            r"with \{'beta': 0\.5\}",
        ),
    ],
)
def test_momentum_is_on_the_workers_or_on_the_server(make, has, tmp_path):
    made = learner()
    with pytest.raises(ValueError, match=rf"ef21-sgdm\(0\.1\):topk:3 carries the momentum .*\(beta=1\).*{has}"):
        go(Parts(made, make(made.parameters())), tmp_path / "run", workers=2, bias=EF21SGDM(TopK(3)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", [lambda p: CompositeMomentum(p, lr=0.02, beta=1), lambda p: SGD(p, lr=0.02)])
def test_workers_momentum_with_a_server_that_has_none(make):
    made = learner()
    assert len(go(Parts(made, make(made.parameters())), iterations=2, workers=2, bias=EF21SGDM(TopK(3))).metrics) == 2
    with_both = learner()  # others leave the server's momentum to the user
    go(Parts(with_both, Adam(with_both.parameters())), iterations=1, workers=2, bias=EF21(TopK(3)))


@pytest.mark.parametrize("option", ["resume", "tensorboard"])
def test_what_needs_a_directory(option):
    with pytest.raises(ValueError, match="need a run_dir"):
        go(momentum(), **{option: True})


def test_a_family_for_each_worker_wants_as_many_workers():
    families = PerWorker([Sinusoid(amplitude=(0.1, 1.0)), Sinusoid(amplitude=(4.0, 5.0))])
    learner = MAML(SinusoidMLP((4,)), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="for each of 2 workers: pass workers=2; got 4"):
        train(learner, optimizer, families, iterations=1, meta_batch=8, workers=4)
    train(learner, optimizer, families, iterations=1, meta_batch=8, workers=2)
