"""Resuming: how long a run may become, and which settings may differ."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from directory_runs import FLAGS, TASKS, go, learner, refused
from endings import contents, newest
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

from metamom import MAML, LambdaBeta, cli
from metamom.experiments.recipes import Recipe
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import Checkpoints
from metamom.training.directory import read_config, read_metrics
from metamom.training.plan import describe


def test_fewer_iterations_than_are_done(run, commanded, capsys):
    refused(
        run,
        r"has done 4 iterations, more than the total of 3\. Pass iterations \(--iterations\) above 4 to go on",
        lambda: go(run, iterations=3, resume=True),
    )
    before = contents(commanded)
    wanted = ["train", "sinusoid", *FLAGS, "--iterations", "3", "--run-dir", str(commanded), "--resume"]
    assert cli.main(wanted) == 2
    assert "error: the run in" in capsys.readouterr().err
    assert contents(commanded) == before


def test_a_run_goes_on_in_smaller_chunks_and_elsewhere(commanded, tmp_path):
    """With the weights of a run that was never interrupted, up to the rounding of another order of sums."""
    run, whole = Path(shutil.copytree(commanded, tmp_path / "run")), tmp_path / "whole"
    more = ["--iterations", "8", "--device", "cpu:0", "--chunk-size", "1"]
    assert cli.main(["train", "sinusoid", *FLAGS, *more, "--run-dir", str(run), "--resume"]) == 0
    assert cli.main(["train", "sinusoid", *FLAGS, "--iterations", "8", "--run-dir", str(whole)]) == 0
    assert read_config(run)["settings"]["chunk_size"] == 1
    assert [entry["settings"] for entry in read_config(run)["history"]] == [
        {"chunk_size": "auto", "compile": False, "patience": None, "device": "cpu"},
        {"chunk_size": 1, "compile": False, "patience": None, "device": "cpu:0"},
    ]
    for name, weight in newest(whole)["learner"].items():
        torch.testing.assert_close(newest(run)["learner"][name], weight, msg=name)


def test_a_comparison_goes_on_in_smaller_chunks(tmp_path):
    compare = ["compare", "sinusoid", *FLAGS[:-2], "--seeds", "1", "--lrs", "0.01", "--iterations", "4", "--tasks", "4"]
    compare += ["--evaluate-every", "2", "--steps", "1", "--run-dir", str(tmp_path)]
    assert cli.main(compare) == 0
    (tmp_path / "runs" / "beta1-zero_lr0.01_seed0" / "outcome.json").unlink()
    assert cli.main([*compare, "--resume", "--chunk-size", "1"]) == 0
    assert cli.main([*compare, "--resume", "--inner-lr", "0.02"]) == 2


def test_what_may_differ_is_one_list():
    """Every option of a learner decides a run, by `describe`, or is marked in the recipe as one that does not."""
    options = set(inspect.signature(MAML).parameters) - {"model", "loss_fn"}
    made = learner()
    described = describe(made, Adam(made.parameters()), TASKS, meta_batch=2, workers=1, bias=None)
    decides = {
        *described,
        *described["learner"],
        "learn_inner_lr",
        "tracking",
        "proximal",
        "multi_step",
        "first_order_until",
        "step_norms",
        "inner_optimizer",
        "positive_inner_lr",
        "norm",
    }  # those described if they are set
    of_places = {"device", "patience", "root", "splits", "model_folder"}
    assert options - decides - {"vectorize"} == set(Recipe.free()) - of_places
    assert {"loss", "dtype", "schedulers", "bias", "aggregate"} < set(described)
    assert set(Recipe.free()) < {field.name for field in fields(Recipe)}


def test_another_precision(run):
    refused(run, "autocast is None there", lambda: go(run, learner(autocast=torch.bfloat16), resume=True))
    refused(run, "dtype is 'torch.float32' there", lambda: go(run, learner().to(torch.float64), resume=True))


def test_another_schedule(tmp_path):
    """Its old settings would win in silence: they are in its state."""
    go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.5)])
    refused(
        tmp_path,
        r"schedulers\[0\]\.gamma is 0\.5 there and 0\.7 here",
        lambda: go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.7)], resume=True),
    )
    refused(tmp_path, "schedulers is", lambda: go(tmp_path, resume=True))
    other = [lambda o: LambdaBeta(o, lambda k: 1.0)]
    refused(tmp_path, "schedulers.*kind is", lambda: go(tmp_path, schedulers=other, resume=True))
    go(tmp_path, schedulers=[lambda o: StepLR(o, 3, 0.5)], resume=True, iterations=5)


def test_validation_may_begin_and_end_but_not_change(run):
    """What the best checkpoint is the best of must stay."""
    go(run, resume=True, iterations=5, validation=TASKS, evaluate_tasks=4)
    other = Sinusoid(shots=4, queries=4, seed=2)
    refused(run, r"validation\.seed is 1 there and 2", lambda: go(run, resume=True, iterations=6, validation=other))
    go(run, resume=True, iterations=6)


def test_tracking_may_differ_and_is_recorded(commanded, tmp_path):
    """It changes no weight (test_diagnostics); a run may go on with it, as with more validations."""
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    assert "track_bias" not in read_config(run)["length"]
    command = ["train", "sinusoid", *FLAGS, "--iterations", "5", "--run-dir", str(run), "--resume"]
    assert cli.main([*command, "--track-bias", "every=4"]) == 0
    assert read_config(run)["length"]["track_bias"][0] == 4


def test_settings_of_ones_own_that_may_differ(tmp_path):
    go(tmp_path, settings={"name": "mine", "host": "a"}, free=["host"])
    go(tmp_path, settings={"name": "mine", "host": "b"}, free=["host"], resume=True)
    refused(tmp_path, "host is 'b' there", lambda: go(tmp_path, settings={"name": "mine", "host": "a"}, resume=True))


def test_a_record_that_knew_no_such_setting(run):
    config = read_config(run)
    for name in ("loss", "dtype", "schedulers", "contents", "code"):
        del config["settings"][name]
    del config["history"]  # as a version wrote that knew none of them
    (run / "config.json").write_text(json.dumps(config))
    go(run, resume=True, iterations=5)
    assert "loss" in read_config(run)["settings"]
    assert [entry["length"]["iterations"] for entry in read_config(run)["history"]] == [4, 5]


def test_every_start_is_remembered(run, monkeypatch):
    for iterations, word in ((5, "again"), (6, "and again")):
        monkeypatch.setattr(sys, "argv", ["metamom", word])
        go(run, resume=True, iterations=iterations)
    config = read_config(run)
    assert [entry["length"]["iterations"] for entry in config["history"]] == [4, 5, 6]
    assert [entry["environment"]["command"] for entry in config["history"]][1:] == [
        ["metamom", "again"],
        ["metamom", "and again"],
    ]
    assert all({"torch", "metamom", "python"} <= entry["environment"].keys() for entry in config["history"])
    assert config["environment"] == config["history"][-1]["environment"]


def test_metrics_of_steps_that_will_not_be_done_again_are_kept(run):
    """The newest checkpoint is damaged, and the run is to end before where it was."""
    before = (run / "metrics.jsonl").read_bytes()
    Checkpoints(run / "checkpoints").path(4).write_bytes(b"damaged")
    held = "held metrics of step 3, after the checkpoint, that this run will not repeat"
    with pytest.warns(UserWarning, match="Going back to the one before"), pytest.warns(UserWarning, match=held):
        go(run, resume=True, iterations=3)
    assert (run / "metrics.jsonl.longer").read_bytes() == before
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
