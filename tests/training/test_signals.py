"""Signals to a real process."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from endings import assert_same_ending, newest
from forked import forked, without_ranks
from training_runs import PATIENCE

from metamom.cli.app import main
from metamom.training.directory import read_metrics

pytestmark = pytest.mark.usefixtures("global_state")


FLAGS = ["--meta-batch", "4", "--shots", "5", "--checkpoint-every", "5", "--evaluate-tasks", "4", "--bias", "topk:10%"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signal_to_a_real_process(number, tmp_path, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ["train", "sinusoid", "--iterations", "1000000", "--run-dir", str(run), *FLAGS]
    with forked(without_ranks, 1, tmp_path / "said", *words) as (started,):
        until = time.monotonic() + PATIENCE
        while started.process.is_alive() and time.monotonic() < until:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") > 12:
                break
            time.sleep(0.02)
        os.kill(started.pid, number)
        status, said = started.ended()
    done = newest(run)["step"]
    logged = len(read_metrics(run))
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
        assert done % 5 == 0
        assert logged >= done
    else:
        assert status == 128 + number
        assert f"metamom: stopped after step {done} of 1000000; saved in {run}; resume to go on." in said
        assert "Traceback" not in said
        assert logged == done
    total = str(logged + 7)
    torch.set_rng_state(newest(run)["rng"]["cpu"])  # that process's generator, from which nothing was drawn
    assert main(["train", "sinusoid", "--iterations", total, "--run-dir", str(run), *FLAGS, "--resume"]) == 0
    assert main(["train", "sinusoid", "--iterations", total, "--run-dir", str(whole), *FLAGS]) == 0
    assert f"trained for {total} iterations" in capsys.readouterr().out
    assert_same_ending(run, whole)
