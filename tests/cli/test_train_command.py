"""`metamom train`: what it prints, and what it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from command import SMALL, the_error
from endings import contents
from training_runs import PATIENCE

from metamom import TaskBatch
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_config, read_metrics

EVERY_FLAG = {
    "--inner-lr": "0.02", "--inner-steps": "2", "--first-step": "gradient", "--adapt": "2,4",
    "--learn-inner-lr": "tensor", "--estimator": "first-order", "--chunk-size": "2", "--dtype": "float64",
    "--inner-batches": "fresh", "--multi-step": "3",
    "--device": "cpu", "--workers": "2", "--bias": "topk:5%", "--aggregate": "median",
    "--attack": "ipm:1", "--optimizer": "momentum", "--fixed-tasks": "8", "--order": "reshuffle",
    "--lr": "0.0001", "--beta": "0.5", "--seed": "3", "--iterations": "4", "--meta-batch": "4",
    "--checkpoint-every": "2", "--shots": "4", "--queries": "3", "--evaluate-every": "2", "--evaluate-tasks": "5",
    "--patience": "9", "--optimizer-args": "foreach=false", "--weight-decay": "0.001", "--clip-grad": "0.5",
    "--schedule": "constant", "--warmup": "2", "--inner-lr-lr": "0.00005", "--inner-optimizer": "momentum:.50",
    "--local-steps": "2", "--local-lr": "0.001", "--down-bias": "topk:20%", "--beta-schedule": "power:4/7",
}  # fmt: skip


def test_train_with_every_flag(metamom, tmp_path):
    run = tmp_path / "run"
    flags = [word for flag in EVERY_FLAG.items() for word in flag]
    said = metamom("train", "sinusoid", *flags, "--normalize", "--run-dir", run, "--resume", "--tensorboard")
    assert said.code == 0, said
    validated, ended = said.err.splitlines()
    assert re.fullmatch(r"train sinusoid: 2/4 it, loss \S+, validation \S+ ± \S+, \S+ it/s, 0:\d\d left", validated)
    assert re.fullmatch(r"train sinusoid: 4/4 it, loss \S+, validation \S+ ± \S+, \S+ it/s", ended)
    assert f"trained for 4 iterations, in {run}" in said.out
    assert "validation loss after 2 step(s): " in said.out
    config = read_config(run)
    assert config["settings"] == {
        "task": "sinusoid", "ways": None, "shots": 4, "queries": 3, "inner_lr": 0.02, "inner_steps": 2,
        "estimator": "first-order", "inner_batches": "fresh", "tracking": None,
        "multi_step": 3, "first_order_until": None, "step_norms": None, "learner_kind": None,
        "head": None, "proximal": None, "inner_optimizer": "momentum:0.5", "positive_inner_lr": None,
        "init": None, "init_except": None,
        "learn_inner_lr": "tensor", "adapt": ["2", "4"], "chunk_size": 2, "compile": False, "norm": None,
        "optimizer": "momentum", "lr": 0.0001, "beta": 0.5, "first_step": "gradient", "normalize": True,
        "optimizer_args": "foreach=false", "weight_decay": 0.001, "clip_grad": 0.5,
        "schedule": "constant", "warmup": 2, "inner_lr_lr": 0.00005, "variant": None, "beta_schedule": "power:4/7",
        "meta_batch": 4, "workers": 2,
        "bias": "topk:5%", "aggregate": "median", "attack": "ipm:1", "participation": None, "worker_weights": None,
        "local_steps": 2, "local_lr": 0.001, "down_bias": "topk:20%", "fixed_tasks": 8, "order": "reshuffle",
        "seed": 3, "patience": 9, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    assert config["length"] == {
        "iterations": 4, "checkpoint_every": 2, "evaluate_every": 2, "evaluate_tasks": 5,
        "processes": 1, "server": "replicated",
    }  # fmt: skip
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert ["validation" in line for line in lines] == [False, True, False, True]
    state = load(Checkpoints(run / "checkpoints").path(4))
    assert state["learner"]["model.0.weight"].dtype == torch.float64
    assert {"step_sizes.alpha:2:weight", "step_sizes.alpha:4:bias"} <= state["learner"].keys()
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["beta"], group["first_step"], group["normalize"]) == (
        0.0001,
        0.5 * 5 ** (-4 / 7),
        "gradient",
        True,
    )
    assert (group["foreach"], group["weight_decay"]) == (False, 0.001)
    assert all(0 < line["clip_factor"] <= 1 for line in lines)
    assert [line["wire_bytes_down"] > 0 for line in lines] == [False, True, True, True]
    assert list((run / "tensorboard").iterdir())
    again = metamom("train", "sinusoid", *flags, "--normalize", "--run-dir", run, "--resume", "--tensorboard")
    assert again.code == 0
    assert f"{run} is trained for 4 iterations already" in again.out


def test_estimators_with_inner_batches_of_their_own(metamom, tmp_path, monkeypatch):
    """--shots is one inner batch: training tasks have as many as the estimator takes, others one."""
    seen = []
    sample = Sinusoid.sample

    def noting(self: Sinusoid, step: int, num_tasks: int, **where: int) -> TaskBatch:
        batch = sample(self, step, num_tasks, **where)
        seen.append((self.stream, batch.support_x.shape[1]))
        return batch

    monkeypatch.setattr(Sinusoid, "sample", noting)
    run = tmp_path / "run"
    flags = ["--shots", 5, "--meta-batch", 4, "--evaluate-tasks", 4, "--run-dir", run]
    train = ["train", "sinusoid", *flags, "--iterations"]
    assert metamom(*train, 3, "--estimator", "independent").code == 0
    assert dict(seen) == {"train": 10, "validation": 5}
    seen.clear()
    assert metamom("evaluate", run, "--tasks", 4).code == 0
    assert set(seen) == {("test", 5)}
    seen.clear()
    assert metamom("evaluate", run, "--tasks", 4, "--split", "train").code == 0
    assert set(seen) == {("train", 5)}
    before = contents(run)
    for other in (["--estimator", "cross-fit"], [], ["--estimator", "independent", "--inner-batches", "fresh"]):
        said = the_error(metamom(*train, 6, *other, "--resume"))
        assert ("inner_batches" if "fresh" in other else "estimator") in said
        assert contents(run) == before
    assert metamom(*train, 6, "--estimator", "independent", "--resume").code == 0
    assert len(read_metrics(run)) == 6


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("rmsprop", "RMSprop")])
def test_other_optimizers(name, kind, metamom, tmp_path):
    run = tmp_path / "run"
    said = metamom("train", "sinusoid", "--optimizer", name, "--iterations", 2, "--run-dir", run, *SMALL)
    assert said.code == 0
    settings = read_config(run)["settings"]
    assert (settings["optimizer"], settings["lr"]) == (name, 0.03 if kind == "SGD" else 0.001)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bias", "randk:5%:scaled"],
        ["--bias", "clip:1+topk:5%:tensor"],
        ["--bias", "qsgd:16+sign"],
        ["--bias", "ef14:normalize"],
        ["--bias", "ef21-sgdm(0.1):topk:1%", "--beta", "1"],
        ["--bias", "clip21:1", "--aggregate", "geomedian"],
        ["--aggregate", "median"],
        ["--fixed-tasks", "8", "--order", "reshuffle"],
        ["--fixed-tasks", "8", "--order", "replacement"],
    ],
    ids=" ".join,
)
def test_sources_of_bias_and_going_on(flags, metamom, tmp_path):
    """Trained in one go and in two, to the same weights; evaluated by what the directory says."""
    ends = []
    for name, legs in (("one", [4]), ("two", [3, 4])):
        run = tmp_path / name
        for iterations in legs:
            arguments = ("--workers", 4, *flags, "--iterations", iterations, "--run-dir", run, "--resume")
            assert metamom("train", "sinusoid", *arguments, *SMALL).code == 0
        ends.append(load(Checkpoints(run / "checkpoints").path(4))["learner"])
        assert all(line["bias_error"] > 0 or "--fixed-tasks" in flags for line in read_metrics(run))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert metamom("evaluate", tmp_path / "one", "--tasks", 4).code == 0


def test_cosine_schedule_goes_on_where_it_stood(metamom, tmp_path):
    ends = []
    for name, legs in (("one", [4]), ("two", [2, 4])):
        run = tmp_path / name
        for iterations in legs:
            flags = ("--lr", "0.01", "--schedule", "cosine:4", "--iterations", iterations, "--run-dir", run, "--resume")
            assert metamom("train", "sinusoid", *flags, *SMALL).code == 0
            lr = load(Checkpoints(run / "checkpoints").path(iterations))["optimizer"]["param_groups"][0]["lr"]
            assert lr == pytest.approx(0.005 if iterations == 2 else 0, abs=1e-8)
        ends.append(load(Checkpoints(run / "checkpoints").path(4))["learner"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_what_only_changes_how_it_is_computed(metamom, tmp_path):
    losses = []
    for number, flags in enumerate(([], ["--compile", "auto", "--chunk-size", "auto"], ["--dtype", "bfloat16"])):
        run = tmp_path / str(number)
        assert metamom("train", "sinusoid", "--iterations", 3, "--run-dir", run, *SMALL, *flags).code == 0
        losses.append([line["loss"] for line in read_metrics(run)])
        assert metamom("evaluate", run, "--tasks", 4).code == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] != losses[0]


def test_the_seed_decides_everything(metamom, tmp_path):
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        run = tmp_path / str(number)
        assert metamom("train", "sinusoid", "--seed", seed, "--iterations", 3, "--run-dir", run, *SMALL).code == 0
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == losses[1]
    assert not set(losses[0]) & set(losses[2])


def test_run_directory_of_its_own(metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = metamom("train", "sinusoid", "--iterations", 1, *SMALL)
    assert said.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"sinusoid-\d{8}-\d{6}", run.name)
    assert f"metamom evaluate runs/{run.name}" in said.out
    assert metamom("evaluate", f"runs/{run.name}", "--tasks", 4).code == 0


def test_module_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "metamom", "train", "sinusoid", "--iterations", "1", "--run-dir", "run", *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained for 1 iteration" in done.stdout
    assert re.fullmatch(r"train sinusoid: 1/1 it, .*\n", done.stderr)  # lines, since there is no terminal for a bar
    assert (tmp_path / "run" / "config.json").exists()


def test_a_published_recipe_sets_the_defaults(metamom, tmp_path):
    """MAML++: its parts are options of the run, shares of its iterations; flags that are given stay as they are."""
    said = metamom(
        "train", "sinusoid", "--recipe", "maml++", "--iterations", "6", "--lr", "0.01", "--meta-batch", "2",
        "--shots", "3", "--queries", "2", "--evaluate-tasks", "5", "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert said.code == 0, said
    settings = read_config(tmp_path / "run")["settings"]
    expected = {
        "learn_inner_lr": "tensor-step", "inner_steps": 5, "multi_step": 0, "first_order_until": None,
        "optimizer": "adam",
        "schedule": "cosine:6", "lr": 0.01, "meta_batch": 2, "shots": 3, "step_norms": None, "positive_inner_lr": True,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected


def test_an_unknown_recipe(metamom):
    said = metamom("train", "sinusoid", "--recipe", "maml+")
    assert said.code == 2
    assert "did you mean maml" in said.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--beta", "0.5"], "--optimizer adam"),
        (["--learner", "reptile"], "--learn-inner-lr tensor-step"),
        (["--local-steps", "2"], "--meta-batch 25"),
    ],
)
def test_an_error_about_what_a_recipe_sets_names_it(metamom, flags, named):
    said = metamom("train", "sinusoid", "--recipe", "maml++", "--iterations", "2", *flags)
    assert said.code == 2
    assert f"--recipe maml++ sets {named}: give {named.split()[0]} to choose another value." in said.err


def test_an_error_about_something_else_does_not_name_the_recipe(metamom):
    said = metamom(
        "train", "sinusoid", "--recipe", "maml++", "--iterations", "2", "--beta", "0.5", "--optimizer", "sgd"
    )
    assert "got --optimizer sgd." in said.err
    assert "--recipe maml++ sets" not in said.err
