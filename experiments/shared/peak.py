"""A process's peak memory, which is a computation's own if the process did nothing else."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from metamom.common.allocator import keep_freed_memory


def peak_mib() -> float:
    """The largest resident set of this process so far, in MiB.

    psutil 7.2 reports the peak on Windows only; elsewhere it has the current resident set.
    """
    status = Path("/proc/self/status")
    if status.exists():  # Linux: there ru_maxrss begins at that of the process which started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def alone(function: Callable[..., list[float]], *args: Any) -> list[float]:
    """Call the function in a new process that keeps its freed memory, and return its value."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=keep_freed_memory) as pool:
        return pool.submit(function, *args).result()
