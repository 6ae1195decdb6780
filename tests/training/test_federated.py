"""Runs with absent workers, unequal weights, local steps and a compressed message to the workers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from training_runs import KINDS, TASKS, Parts, go, learner, momentum

from metamom import MAML, CompositeMomentum, cli
from metamom.bias import parse
from metamom.experiments.recipes import Recipe
from metamom.server import DownBias, Participation
from metamom.tasks import FixedTasks
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.directory import read_config, read_metrics

OPTIONS: dict[str, Any] = {
    "participation": 0.5,
    "local_steps": 2,
    "down_bias": "topk:20%",
    "worker_weights": [1, 2, 3, 4],
}


def test_a_run_is_the_loop_with_backward():
    """With local steps of the optimizer's scheduled step size."""
    run, mine = momentum(), learner()
    optimizer = CompositeMomentum(mine.parameters(), lr=0.02, beta=0.3)
    halved = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (run.optimizer, optimizer)]
    result = go(run._replace(schedulers=(halved[0],)), iterations=5, workers=4, bias=parse("ef21:topk:5%"), **OPTIONS)
    bias, participation, down = parse("ef21:topk:5%"), Participation(0.5), DownBias("topk:20%")
    objects = {"bias": bias, "participation": participation, "down_bias": down}
    for step in range(5):
        optimizer.zero_grad()
        lr = optimizer.param_groups[0]["lr"]
        _, metrics = mine.backward(TASKS.sample(step, 8), workers=4, **{**OPTIONS, **objects}, local_lr=lr)
        assert result.metrics[step]["wire_bytes_down"] == metrics["wire_bytes_down"]
        optimizer.step()
        halved[1].step()
    for p, q in zip(run.learner.parameters(), mine.parameters(), strict=True):
        assert torch.equal(p, q)


def test_defaults_are_the_plain_run_bit_for_bit(tmp_path):
    plain, other = momentum(), momentum()
    go(plain, tmp_path / "plain", workers=4)
    options = {"participation": 1.0, "local_steps": 1, "down_bias": "none", "worker_weights": None}
    go(other, tmp_path / "other", workers=4, **options)
    for p, q in zip(plain.learner.parameters(), other.learner.parameters(), strict=True):
        assert torch.equal(p, q)
    assert set(OPTIONS) & set(read_config(tmp_path / "plain")["settings"]) == set()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"participation": 0.25}, r"participation\.share is 0\.5 there and 0\.25 here"),
        ({"participation": Participation(0.5, seed=1)}, r"participation\.seed is 0 there and 1 here"),
        ({"local_steps": 1}, "local_steps is"),
        ({"down_bias": "sign"}, "down_bias is 'topk:20%' there and 'sign' here"),
        ({"worker_weights": [1, 2, 3, 5]}, "worker_weights"),
    ],
)
def test_a_resumed_run_has_the_same(change, difference, tmp_path):
    go(momentum(), tmp_path, workers=4, iterations=4, **OPTIONS)
    with pytest.raises(ValueError, match=difference):
        go(momentum(), tmp_path, workers=4, iterations=6, resume=True, **{**OPTIONS, **change})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("participation", "steps", 3),
        ("participation", "steps", "4"),
        ("down_bias", "messages", 4),
        ("down_bias", "seen", torch.zeros(3)),
        ("down_bias", "seen", None),
    ],
)
def test_a_checkpoint_that_does_not_fit(part, name, value, tmp_path):
    go(momentum(), tmp_path, workers=4, iterations=4, **OPTIONS)
    for path in (tmp_path / "checkpoints").iterdir():
        state = load(path)
        state[part][name] = value
        save(path, {key: entry for key, entry in state.items() if key != "format"})
    with pytest.raises(CheckpointError, match=rf"{part}: .*'?{name}"):
        go(momentum(), tmp_path, workers=4, iterations=6, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 3}, r"each of 4 workers takes 3 local steps .* multiple of 12; got 8 tasks"),
        ({"local_lr": -1.0}, "local_lr is the step size of local steps, finite and > 0"),
        ({"participation": 2}, "participation is the share of workers"),
        ({"participation": 0.5, "bias": "diana(0.1):randk:5%"}, "needs all workers in every step"),
        ({"worker_weights": [1, 2, 3]}, "worker_weights are 4 positive, finite numbers"),
        ({"worker_weights": [1, 2, 3, 4], "aggregate": "median"}, "worker_weights need aggregate='mean'"),
        ({"down_bias": "topk:100000"}, "100000"),
    ],
)
def test_refused_before_the_run_starts(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(momentum(), tmp_path / "run", workers=4, **options)
    assert not (tmp_path / "run").exists()


def test_groups_of_different_step_sizes():
    made = learner()
    first, *others = made.parameters()
    optimizer = CompositeMomentum([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}], lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer's step size, but its groups have \[0\.1, 0\.2\]"):
        go(Parts(made, optimizer), workers=4, local_steps=2)
    go(Parts(made, optimizer), workers=4, local_steps=2, local_lr=0.1, iterations=1)


def test_an_estimator_that_remembers_weights():
    made = MAML(learner().model, learner().loss_fn, estimator="scsc")
    parts = Parts(made, CompositeMomentum(made.parameters(), lr=0.1))
    tasks = FixedTasks(type(TASKS)(shots=4), 16)
    with pytest.raises(ValueError, match="estimator 'scsc' remembers the server's weights at a task's last visit"):
        go(parts, workers=4, local_steps=2, tasks=tasks)
    go(parts, workers=4, local_steps=1, participation=0.5, tasks=tasks, iterations=2)


def test_a_recipe_that_changes_nothing_is_a_run_of_an_earlier_version():
    plain = Recipe(task="sinusoid", workers=2)
    same = Recipe(task="sinusoid", workers=2, participation=1.0, local_steps=1, down_bias="none")
    assert plain == same
    assert plain.federation()["down_bias"] is None
    with pytest.raises(ValueError, match=r"pass local_steps > 1 \(--local-steps\); got 0\.1"):
        Recipe(task="sinusoid", local_lr=0.1)
    with pytest.raises(ValueError, match="a multiple of 6"):
        Recipe(task="sinusoid", workers=2, local_steps=3, meta_batch=8)
    seeded = Recipe(task="sinusoid", workers=4, participation=0.5, seed=7).federation()["participation"]
    assert (seeded.share, seeded.seed) == (0.5, 7)


def test_the_command_resumes_bit_for_bit(tmp_path, capsys):
    flags = "train sinusoid --meta-batch 8 --shots 3 --queries 3 --workers 4 --bias ef21:topk:5% --evaluate-tasks 4 "
    flags += "--participation 0.5 --local-steps 2 --down-bias randk:20% --worker-weights 1,2,3,4 --checkpoint-every 3"
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert cli.main([*flags.split(), "--iterations", "6", "--run-dir", str(whole)]) == 0
    assert cli.main([*flags.split(), "--iterations", "3", "--run-dir", str(half)]) == 0
    assert cli.main([*flags.split(), "--iterations", "6", "--run-dir", str(half), "--resume"]) == 0
    ends = [load(Checkpoints(run / "checkpoints").path(6)) for run in (whole, half)]
    for name, weight in ends[0]["learner"].items():
        assert torch.equal(weight, ends[1]["learner"][name]), name
    assert torch.equal(ends[0]["down_bias"]["seen"], ends[1]["down_bias"]["seen"])
    assert [line["wire_bytes_down"] > 0 for line in read_metrics(half)] == [False, *[True] * 5]
    again = ["train", "sinusoid", "--config", str(whole / "config.json"), "--run-dir", str(tmp_path / "again")]
    assert cli.main(again) == 0
    settings = [json.loads((tmp_path / name / "config.json").read_text())["settings"] for name in ("whole", "again")]
    assert settings[0] == settings[1]
    assert settings[0]["worker_weights"] == [1.0, 2.0, 3.0, 4.0]
    assert "federated" in KINDS
    capsys.readouterr()
