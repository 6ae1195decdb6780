"""Runs with estimators that adapt by a proximal problem: trained, resumed, loaded, evaluated and measured."""

from __future__ import annotations

import json

import pytest
from command import the_error
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, load, train
from metamom.maml import Proximal
from metamom.tasks import Sinusoid
from metamom.training.directory import read_config


@pytest.mark.filterwarnings("ignore:the proximal problem was not solved", "ignore:conjugate gradients")
def test_a_proximal_estimator(metamom, tmp_path):
    """Its strength is a setting of the run, which goes on, is loaded and is measured with it."""
    run = tmp_path / "run"
    words = [
        "train",
        "sinusoid",
        "--meta-batch",
        2,
        "--evaluate-tasks",
        2,
        "--estimator",
        "perturbed",
        "--run-dir",
        run,
    ]
    words += ["--proximal", "9.0,iterations=2,cg_iterations=1", "--iterations"]
    assert metamom(*words, 2).code == 0
    assert read_config(run)["settings"]["proximal"] == "9,iterations=2,cg_iterations=1"
    loaded = load(run).learner
    assert (loaded.estimator, loaded.proximal) == ("perturbed", Proximal(9.0, iterations=2, cg_iterations=1))
    assert metamom(*words, 3, "--resume").code == 0
    assert "proximal" in the_error(metamom(*words, 4, "--proximal", "8", "--resume"))
    assert metamom("evaluate", run, "--tasks", 2, "--steps", "0,1").code == 0
    said = metamom("bias", run, "--tasks", 3, "--inner-batch", "2", "--estimator", "implicit", "--queries", 5, "--json")
    assert json.loads(said.out)["estimator"] == "implicit"
    assert "got --proximal 9 with estimator 'exact'" in the_error(
        metamom("train", "sinusoid", "--proximal", 9, "--run-dir", tmp_path / "a")
    )


def test_a_python_run_keeps_the_strength(tmp_path):
    learner = MAML(nn.Linear(1, 1), F.mse_loss, estimator="implicit", proximal=Proximal(30.0, cg_tolerance=0.1))
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, Sinusoid(), iterations=1, meta_batch=2, run_dir=tmp_path / "run")
    assert load(tmp_path / "run", model=nn.Linear(1, 1)).learner.proximal == learner.proximal
