"""Parameters on two processes: FSDP2, tensor parallelism, ZeRO, and torch.distributed's checkpoints."""

from __future__ import annotations

from processes import SUPPORT, torchrun


def test_steps_on_two_processes_are_those_of_one():
    done = torchrun([str(SUPPORT / "sharded_steps.py")], 2)
    assert done.stdout.count("OK") == 2, done.stderr
