"""The callbacks of docs/howto/watch.md work as written, with the real packages where they are installed."""

from __future__ import annotations

import csv
import importlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "watch.md"
SETUP, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
OF = {re.findall(r"callbacks=\[?(\w+)", block)[0]: block for block in BLOCKS}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder to run in; other people's packages may warn."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield tmp_path


def run(name: str) -> dict[str, Any]:
    """Run a block of the page after its first; the names that it defines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(SETUP, str(PAGE), "exec"), names)
    exec(compile(OF[name], str(PAGE), "exec"), names)
    return names


def need(package: str) -> Any:
    """Import a package, or skip the test."""
    try:
        return importlib.import_module(package)
    except ImportError:
        pytest.skip(f"{package} is not installed: pip install {package}")


def test_every_block_has_a_test():
    assert set(OF) == {"TimeLimit", "EarlyStopping", "CSV", "WandB", "MLflow", "Pruning"}


def test_a_time_limit():
    names = run("TimeLimit")
    assert names["result"].stopped is None
    again = {name: names[name] for name in ("learner", "optimizer")}
    result = names["train"](**again, sampler=names["tasks"], callbacks=names["TimeLimit"](-1), **names["options"])
    assert result.stopped == "the time is up after 1 of 20 iterations"


def test_shipped(folder):
    need("tensorboard")
    assert len(run("EarlyStopping")["result"].metrics) % 5 == 0
    assert list((folder / "board").glob("events.out.tfevents.*"))


def test_csv(folder):
    run("CSV")
    rows = list(csv.reader((folder / "metrics.csv").open()))
    assert [int(row[0]) for row in rows] == list(range(1, 21))
    assert [row[2] != "" for row in rows] == [step % 5 == 0 for step in range(1, 21)]


def test_wandb(folder, monkeypatch):
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("WandB")
    (log,) = folder.glob("wandb/offline-run-*/*.wandb")
    text = log.read_bytes()
    assert b"validation_halfwidth" in text
    assert b"meta_batch" in text


def test_mlflow(folder, monkeypatch):
    mlflow = need("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    run("MLflow")
    (found,) = mlflow.search_runs(output_format="list")
    assert found.info.status == "FINISHED"
    losses = mlflow.MlflowClient().get_metric_history(found.info.run_id, "loss")
    assert [each.step for each in losses] == list(range(1, 21))
    settings = mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/settings.json")
    assert settings["meta_batch"] == 4
    assert json.dumps(settings)


def test_optuna():
    need("optuna")
    trials = run("Pruning")["study"].trials
    assert len(trials) == 6
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    for trial in trials:
        reported = list(trial.intermediate_values)
        assert reported == [5, 10, 15, 20][: len(reported)]
        assert trial.state.name == "PRUNED" or len(reported) == 4
