"""Parameters on two processes: FSDP2, tensor parallelism, ZeRO, and torch.distributed's checkpoints."""

from __future__ import annotations

import subprocess
import sys

from processes import SUPPORT, environment, torchrun


def test_steps_on_two_processes_are_those_of_one(tmp_path):
    """And one process goes on with what two have stored."""
    command = [str(SUPPORT / "sharded_steps.py"), str(tmp_path)]
    done = torchrun(command, 2)
    assert done.stdout.count("OK") == 2, done.stderr
    alone = subprocess.run(
        [sys.executable, *command], env=environment(), text=True, capture_output=True, timeout=120, check=False
    )
    assert alone.stdout == "OK\n", alone.stderr
