"""Real processes on loopback, started by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = Path(__file__).resolve().parents[2]


def with_support() -> dict[str, str]:
    """This process's environment, with these modules importable."""
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def environment(**more: str) -> dict[str, str]:
    """Of a process: one thread, this checkout, nothing of a torchrun around us."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **more}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def torchrun(
    command: Sequence[str], size: int, *options: str, timeout: float = 180.0, **more: str
) -> subprocess.CompletedProcess[str]:
    """``torchrun OPTIONS COMMAND`` on a free port, to its end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port"]
    return subprocess.run(
        [*launcher, str(free_port()), *options, *command],
        env=environment(**more),
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
