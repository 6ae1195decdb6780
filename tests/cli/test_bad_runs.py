"""Run directories that the command refuses, and leaves as they are."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from command import SMALL, the_error
from endings import contents

from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_config, read_metrics


def test_directory_with_a_run(metamom, trained):
    before = contents(trained)
    message = the_error(metamom("train", "sinusoid", "--run-dir", trained, *SMALL))
    assert f"{trained} already holds a run" in message
    assert "--resume" in message
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.5"], r"lr is 0\.03 there and 0\.5 here"),
        (["--beta", "1"], r"beta is 0\.1 there and 1\.0 here"),
        (["--seed", "1", "--bias", "clip:1"], "bias is 'none' there and 'clip:1' here; seed is 0 there and 1 here"),
    ],
)
def test_resume_with_other_settings(flags, message, metamom, trained):
    before = contents(trained)
    said = metamom("train", "sinusoid", "--run-dir", trained, *SMALL, *flags, "--resume")
    assert re.search(message, the_error(said))
    assert contents(trained) == before


def test_resume_as_another_task(metamom, trained, data_root):
    said = metamom("train", "omniglot", "--run-dir", trained, "--resume", "--data-root", data_root)
    assert "task is 'sinusoid' there and 'omniglot' here" in the_error(said)


def test_run_of_another_model(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        state = load(file)
        state["learner"] = {name: w[:3] for name, w in state["learner"].items()}
        torch.save(state, file)
    before = contents(run)
    for command in (["evaluate", run], ["train", "sinusoid", "--run-dir", run, *SMALL, "--resume", "--iterations", 9]):
        message = the_error(metamom(*command))
        assert str(run) in message
        assert "to another model" in message
        assert contents(run) == before


def test_checkpoint_cut_short(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1000])
    before = contents(run)
    assert "best.pt is cut short or damaged" in the_error(metamom("evaluate", run))
    assert contents(run) == before


@pytest.mark.filterwarnings("default")
def test_newest_checkpoint_cut_short(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = Checkpoints(run / "checkpoints").path(6)
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = metamom(
        "train", "sinusoid", "--run-dir", run, *SMALL, "--checkpoint-every", 3, "--iterations", 6, "--resume"
    )
    assert said.code == 0
    assert said.err.startswith("metamom: warning: checkpoint ")
    assert "Going back to the one before.\n" in said.err
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(trained)]


def test_checkpoint_of_another_version(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        torch.save({**load(file), "format": 99}, file)
    before = contents(run)
    for command in (["evaluate", run], ["train", "sinusoid", "--run-dir", run, *SMALL, "--resume", "--iterations", 9]):
        assert "has format 99; this version of metamom reads format 1" in the_error(metamom(*command))
        assert contents(run) == before


def test_run_of_another_version(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = read_config(run)
    config["settings"]["flavour"] = "sweet"
    (run / "config.json").write_text(json.dumps(config))
    assert "its settings differ in flavour" in the_error(metamom("evaluate", run))
    del config["settings"]["flavour"], config["settings"]["tracking"]  # as a version wrote that knew no tracking
    (run / "config.json").write_text(json.dumps(config))
    assert metamom("evaluate", run, "--json").out == metamom("evaluate", trained, "--json").out != ""
    (run / "config.json").write_text("{")
    assert "the run's configuration cannot be read" in the_error(metamom("evaluate", run))
    del config["settings"]["shots"]
    (run / "config.json").write_text(json.dumps(config))
    assert f"the settings of the run in {run} lack shots, which every version" in the_error(metamom("evaluate", run))


def test_file_in_place_of_a_directory(metamom, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = metamom("train", "sinusoid", "--run-dir", tmp_path / "file", *SMALL, "--iterations", "1")
    assert "is a file; a run needs a directory" in the_error(said)
    assert (tmp_path / "file").read_text() == "mine"


def test_divergence_has_an_exit_code_of_its_own(metamom, tmp_path):
    said = metamom("train", "sinusoid", "--run-dir", tmp_path / "run", *SMALL, "--lr", "1e9", "--iterations", "20")
    assert said.code == 1
    assert re.fullmatch(r"metamom: diverged: the \w+ is not finite at step \d+\. Try a smaller lr, .*\n", said.err)
