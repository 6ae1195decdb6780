"""A run that version 0.1 wrote, with error feedback and validations, goes on and can be evaluated.

It is 4 steps of ``metamom train sinusoid --iterations 4 --meta-batch 4 --workers 2 --bias ef21:topk:5%
--checkpoint-every 4 --evaluate-every 2 --evaluate-tasks 4``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import SUPPORT

from metamom import cli
from metamom.training.checkpoints import Checkpoints
from metamom.training.directory import read_config, read_metrics

FLAGS = ["--meta-batch", "4", "--workers", "2", "--bias", "ef21:topk:5%"]
FLAGS += ["--checkpoint-every", "4", "--evaluate-every", "2", "--evaluate-tasks", "4"]


@pytest.fixture
def earlier(tmp_path) -> Path:
    return Path(shutil.copytree(SUPPORT / "run_of_0_1", tmp_path / "earlier"))


def train(run: Path, iterations: int, *more: str) -> None:
    command = ["train", "sinusoid", "--iterations", str(iterations), *FLAGS, "--run-dir", str(run), *more]
    assert cli.main(command) == 0


def test_it_goes_on_as_a_run_of_this_version(earlier, tmp_path):
    """From the same seed; another torch or processor may round otherwise."""
    train(earlier, 8, "--resume")
    train(tmp_path / "now", 8)
    resumed, whole = (Checkpoints(run / "checkpoints").load_newest() for run in (earlier, tmp_path / "now"))
    assert resumed is not None
    assert whole is not None
    for name, weight in whole["learner"].items():
        torch.testing.assert_close(resumed["learner"][name], weight, rtol=1e-4, atol=1e-6, msg=name)
    ours, theirs = (read_metrics(run) for run in (earlier, tmp_path / "now"))
    assert [line["step"] for line in ours] == list(range(8))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.keys() == b.keys()
        assert a.get("validation", 0.0) == pytest.approx(b.get("validation", 0.0), rel=1e-4)
        assert a["wire_bytes"] == b["wire_bytes"]
    starts = [entry["length"]["iterations"] for entry in read_config(earlier)["history"]]
    assert starts == [4, 8]


def test_it_can_be_evaluated(earlier, tmp_path, capsys):
    train(tmp_path / "now", 4)
    found = []
    for run in (earlier, tmp_path / "now"):
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), "--tasks", "20", "--checkpoint", "newest", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["steps"] == found[1]["steps"] == [0, 1, 5, 10]
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], rel=1e-4)


def test_other_settings_are_still_refused(earlier, capsys):
    command = ["train", "sinusoid", "--iterations", "8", *FLAGS, "--lr", "0.5", "--run-dir", str(earlier), "--resume"]
    assert cli.main(command) == 2
    assert "lr is 0.03 there and 0.5 here" in capsys.readouterr().err
