"""The long Omniglot run, a few iterations of it on the real data."""

from __future__ import annotations

import sys

import pytest
import torch

from metamom.experiments import omniglot_accuracy
from metamom.training.directory import read_metrics


@pytest.fixture
def command(monkeypatch, data_root):
    """The command, with the traced graphs run as they are and little to test."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    monkeypatch.setattr(omniglot_accuracy, "TEST_TASKS", 10)

    def call(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["omniglot_accuracy", "--data-root", str(data_root), *map(str, words)])
        omniglot_accuracy.main()

    return call


@pytest.mark.slow
def test_methods_start_alike_and_leave_a_report(command, tmp_path, capsys):
    command("--iterations", 2, "--run-dir", tmp_path)
    first = {method: read_metrics(tmp_path / method)[0]["loss"] for method in omniglot_accuracy.METHODS}
    assert len(first) == 3
    assert len(set(first.values())) == 1
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert all(text.count(f"| {label} |") == 1 for label in omniglot_accuracy.LABELS.values())
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000
    before = {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")}
    command("--iterations", 2, "--run-dir", tmp_path, "--methods", "adam")
    assert {path: path.read_bytes() for path in tmp_path.rglob("metrics.jsonl")} == before


@pytest.mark.parametrize("words", [("--methods", "lion"), ("--iterations", 0)])
def test_wrong_flags(words, command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*words, "--run-dir", tmp_path / "run")
    assert str(words[1]) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
