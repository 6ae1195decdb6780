"""Parameters on two processes: FSDP2, tensor parallelism, ZeRO, and torch.distributed's checkpoints."""

from __future__ import annotations

from forked import run_forked, script
from processes import SUPPORT


def test_steps_on_two_processes_are_those_of_one(tmp_path):
    """And one process goes on with what two have stored."""
    for size in (2, 1):
        ended = run_forked(script, size, tmp_path / f"said-{size}", SUPPORT / "sharded_steps.py", str(tmp_path))
        assert [(status, said.endswith("OK\n")) for status, said in ended] == [(0, True)] * size, ended
