"""Progress where there is no terminal: lines on standard error, and no silence for hours."""

from __future__ import annotations

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from training_runs import TASKS, go, momentum

from metamom import cli
from metamom.common import log_lines
from metamom.common.log_lines import LogLines, duration


def timed(**options):
    """Lines, and a clock to turn."""
    clock = SimpleNamespace(now=100.0)
    return LogLines("run", 1000, "it", clock=lambda: clock.now, **options), clock


def test_a_line_every_30_seconds(capsys):
    lines, clock = timed()
    for step in range(200):
        clock.now += 1.0 if step else 20.0  # the first compiles
        lines.stepped(step + 1, {"loss": f"{step}"})
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "run: 11/1000 it, loss 10, 1 it/s, 16:29 left"
    assert [int(line.split()[1].split("/")[0]) for line in said] == [11, 41, 71, 101, 131, 161, 191]


def test_a_slow_first_step(capsys):
    lines, clock = timed()
    clock.now += 60
    lines.stepped(501, {}, now=False)
    assert capsys.readouterr().err == "run: 501/1000 it, 0.0167 it/s, 8:19:00 left\n"


def test_speed_from_the_start(capsys):
    lines, clock = timed(since=0)
    clock.now += 10
    lines.stepped(1, {}, now=True)
    clock.now += 0.5
    lines.stepped(1000, {}, now=True)
    assert capsys.readouterr().err == "run: 1/1000 it, 0.1 it/s, 2:46:30 left\nrun: 1000/1000 it, 95.2 it/s\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3599.7, "1:00:00"), (90061, "25:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_of_a_run(capsys):
    go(momentum(), validation=TASKS, evaluate_every=5, evaluate_tasks=4)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(", ")[0] for line in err.splitlines()] == [f"train: {n}/12 it" for n in (5, 10, 12)]
    assert all(re.search(r", loss \d\S+, validation \d\S+ ± \d\S+, \d\S* it/s", line) for line in err.splitlines())


def test_without_validations(capsys, monkeypatch):
    monkeypatch.setattr(log_lines, "EVERY", 0.0)
    go(momentum(), iterations=3, label="mine")
    err = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[0] for line in err] == [f"mine: {n}/3 it" for n in (1, 2, 3)]


def test_no_progress(capsys):
    go(momentum(), validation=TASKS, evaluate_tasks=4, label=None)
    assert capsys.readouterr().err == ""


def test_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    go(momentum(), validation=TASKS, evaluate_tasks=4)
    err = capsys.readouterr().err
    assert "12/12 [" in err
    assert " it, " not in err


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_of_the_runs_of_a_comparison(jobs, capfd, tmp_path):
    """A line for each run that ends, and none for its validations."""
    small = ["--iterations", "4", "--evaluate-every", "2", "--evaluate-tasks", "4", "--tasks", "4", "--meta-batch", "2"]
    words = ["compare", "sinusoid", "--seeds", "1", "--lrs", "0.03", "--jobs", jobs, *small]
    assert cli.main([*words, "--run-dir", str(tmp_path)]) == 0
    err = capfd.readouterr().err.splitlines()
    err = [line for line in err if not line.startswith("compare: 0/2 runs, 2 running")]  # after 30 s of imports
    assert [line.split(", ")[0] for line in err] == [f"compare: {n}/2 runs" for n in (1, 2)]
    if jobs == "1":
        assert [line.split(", ")[1] for line in err] == [f"beta{beta}-zero_lr0.03_seed0 finished" for beta in (1, 0.1)]


def test_of_a_comparison_every_30_seconds(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(log_lines, "EVERY", 0.0)
    small = ["--iterations", "2", "--evaluate-tasks", "4", "--tasks", "4", "--meta-batch", "2"]
    words = ["compare", "sinusoid", "--seeds", "1", "--lrs", "0.03", "--betas", "0.1", *small]
    assert cli.main([*words, "--run-dir", str(tmp_path)]) == 0
    err = capsys.readouterr().err.splitlines()
    name = "beta0.1-zero_lr0.03_seed0"
    assert [line.split(", ")[:2] for line in err] == [
        ["compare: 0/1 runs", f"{name} at 1/2 it"],
        ["compare: 0/1 runs", f"{name} at 2/2 it"],
        ["compare: 1/1 runs", f"{name} finished"],
    ]


def test_of_a_comparison_in_a_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    small = ["--iterations", "2", "--evaluate-tasks", "4", "--tasks", "4", "--meta-batch", "2"]
    words = ["compare", "sinusoid", "--seeds", "1", "--lrs", "0.03", *small]
    assert cli.main([*words, "--run-dir", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert "2/2 [" in err
    assert set(re.findall(r"(\w+): +\d+%", err)) == {"compare"}, "one bar"


def test_of_evaluations(capsys, commanded, monkeypatch):
    """Standard output has the result only."""
    monkeypatch.setattr(log_lines, "EVERY", 0.0)
    assert cli.main(["evaluate", str(commanded), "--tasks", "150", "--steps", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tasks"] == 150
    assert [line.split(",")[0] for line in err.splitlines()] == [f"evaluate: {n}/150 tasks" for n in (50, 100)]
    monkeypatch.setattr(log_lines, "EVERY", 30.0)
    assert cli.main(["evaluate", str(commanded), "--tasks", "150", "--steps", "1", "--json"]) == 0
    assert capsys.readouterr() == (out, "")


def test_of_the_evaluations_of_a_comparison(capsys, commanded, tmp_path, monkeypatch):
    monkeypatch.setattr(log_lines, "EVERY", 0.0)
    small = ["--iterations", "1", "--evaluate-tasks", "100", "--tasks", "150", "--meta-batch", "2"]
    words = ["compare", "sinusoid", "--seeds", "1", "--lrs", "0.03", "--betas", "0.1", *small]
    assert cli.main([*words, "--run-dir", str(tmp_path / "new")]) == 0
    name = "beta0.1-zero_lr0.03_seed0"
    assert [line.split(", ")[1] for line in capsys.readouterr().err.splitlines()] == [
        f"{name} evaluated on 50/100 tasks",
        f"{name} at 1/1 it",
        f"{name} evaluated on 50/150 tasks",
        f"{name} evaluated on 100/150 tasks",
        f"{name} finished",
    ]
    other = shutil.copytree(commanded, tmp_path / "other")
    assert cli.main(["compare", str(commanded), str(other), "--tasks", "100", "--steps", "1"]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["evaluate: 50/100 tasks"] * 2
