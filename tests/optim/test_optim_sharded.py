"""Parameters on two processes: FSDP2, tensor parallelism, ZeRO, and torch.distributed's checkpoints."""

from __future__ import annotations

from forked import run_forked, script
from processes import SUPPORT


def test_steps_on_two_processes_are_those_of_one(tmp_path):
    ended = run_forked(script, 2, tmp_path, SUPPORT / "sharded_steps.py")
    assert [(status, "OK" in said) for status, said in ended] == [(0, True)] * 2, ended
