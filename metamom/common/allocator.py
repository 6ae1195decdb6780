"""Memory: what is freed stays with the process, and what cannot be had is told from other errors."""

from __future__ import annotations

import ctypes
import sys

import torch

# glibc's numbers for mallopt, and sizes: above M_MMAP_THRESHOLD each allocation is a mapping of its own, that goes
# back to the system when it is freed; the end of the heap goes back when more than M_TRIM_THRESHOLD of it is free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_GIBIBYTE = 2**30
_LARGEST_OF_OLD_GLIBC = 2**25


def out_of_memory(error: BaseException) -> str | None:
    """What could not be had, in one line, if that is what stopped a computation; ``None`` for any other error.

    On a CPU torch raises a plain RuntimeError.
    """
    _, said_by_torch, why = str(error).partition("DefaultCPUAllocator: ")
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not said_by_torch:
        return None
    return " ".join((why or str(error)).split()).removesuffix(".") or "an allocation failed"


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations.

    A training step allocates and frees the same tens of megabytes again and again. By default glibc hands each large
    tensor's pages back to the system and gets zeroed ones for the next: thousands of page faults in each meta-gradient
    of Conv4 over 16 tasks, and 6 % of its time or more (docs/performance.md). The price is that the process stays as
    large as it ever was.

    Returns:
        Whether it took effect: it does on Linux with glibc, and nowhere else.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, _GIBIBYTE))
