"""The benchmark of hooks in DDP: every hook steps, and its bytes are those by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from forked import run_forked
from processes import environment

from metamom.bias import parse
from metamom.experiments.ddp import __main__ as command
from metamom.experiments.ddp import step

WIDTH = 16
ENTRIES = 784 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 10 + 10
AGREEMENT = 2 * 24  # of two processes
KEPT = round(0.01 * ENTRIES)
LOW_RANK = (784 + 16) + 2 * (16 + 16) + (16 + 10) + 3 * 16 + 10  # a column and a row of each matrix, and the biases


def test_every_hook_is_timed_and_counted(tmp_path):
    plan, found = tmp_path / "plan.json", tmp_path / "found.json"
    plan.write_text(json.dumps({"width": WIDTH, "rounds": 2}))
    ended = run_forked(step.main, 2, tmp_path / "said", [str(plan), str(found)])
    assert [status for status, _ in ended] == [0, 0], ended
    measured = json.loads(found.read_text())
    assert measured["parameters"] == ENTRIES
    assert [*measured["hooks"]] == [*step.HOOKS]
    sent = {name: hook["sent_bytes"] for name, hook in measured["hooks"].items()}
    assert {name: each[0] for name, each in sent.items()} == {
        "no hook": 2 * 4 * ENTRIES,
        "`fp16_compress_hook`": 2 * 2 * ENTRIES,
        "`powerSGD_hook`, rank 1": 2 * 4 * LOW_RANK,
        "ours: `None`": 2 * 4 * ENTRIES + AGREEMENT,
        "`dtype=torch.float16`": 2 * 2 * ENTRIES + AGREEMENT,
        "`clip:1`": 2 * 4 * ENTRIES + AGREEMENT,
        "`topk:1%`": 2 * 8 * KEPT + AGREEMENT,
        "`ef21:topk:1%`": 2 * 8 * KEPT + AGREEMENT,
        '`ef21:topk:1%`, `"bucket"`': 2 * 8 * KEPT + AGREEMENT,
        "`randk:1%`": 2 * 8 * KEPT + AGREEMENT,
        "`sign`": 2 * parse("sign").wire_bytes(ENTRIES) + AGREEMENT,
    }
    assert all(each == [each[0]] * 2 for each in sent.values())
    lines = command.table(measured["hooks"])
    assert len(lines) == 2 + len(step.HOOKS)
    assert lines[2].startswith("| no hook | ")
    assert lines[3].endswith(" | 50.00% |")


@pytest.mark.slow
def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "metamom.experiments.ddp", "--rounds", "1", "--width", "16", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["parameters"], found["processes"], found["rounds"]) == (ENTRIES, 2, 1)
    assert [*found["hooks"]] == [*step.HOOKS]


def test_a_benchmark_needs_two_processes(capsys):
    with pytest.raises(SystemExit):
        command.main(["--processes", "1"])
    assert "--processes" in capsys.readouterr().err
