"""Real processes on loopback: started as torchrun starts them, or by torchrun itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


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


@contextmanager
def processes(command: Sequence[str], size: int, **more: str) -> Iterator[list[subprocess.Popen[str]]]:
    """``python COMMAND`` on ``size`` processes that find each other, without torchrun's agent; killed on leaving."""
    port = str(free_port())
    started = []
    try:
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **more)
            started.append(
                subprocess.Popen(
                    [sys.executable, *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def run_processes(
    command: Sequence[str], size: int, *, timeout: float = 120.0, **more: str
) -> list[tuple[int, str, str]]:
    """Run them to their end: exit status, stdout and stderr of each."""
    with processes(command, size, **more) as started:
        said = [process.communicate(timeout=timeout) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


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
