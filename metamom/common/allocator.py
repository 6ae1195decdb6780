"""Memory: keep freed memory in the process, and recognise out-of-memory errors."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import torch

# glibc's codes for mallopt, and sizes. Each allocation above M_MMAP_THRESHOLD is a separate mapping, which returns to
# the system when freed. The end of the heap returns to the system when more than M_TRIM_THRESHOLD of it is free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_GIBIBYTE = 2**30
_LARGEST_THAT_ADAPTS = 2**25 - 2**16  # bytes, a little less than glibc's own limit of 32 MiB
_LARGEST_OF_OLD_GLIBC = 2**25


def out_of_memory(error: BaseException) -> str | None:
    """Describe an out-of-memory error in one line; ``None`` for any other error.

    On a CPU, torch raises a plain RuntimeError.
    """
    _, said_by_torch, why = str(error).partition("DefaultCPUAllocator: ")
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not said_by_torch:
        return None
    return " ".join((why or str(error)).split()).removesuffix(".") or "an allocation failed"


@cache
def reuse_freed_memory() -> None:
    """Let glibc adapt to tensors of many megabytes before the first of them, once in a process.

    glibc raises both of its thresholds when a large allocation is freed: then later ones of that size come from the
    heap, and twice as much may stay free at its end. With the thresholds that a few megabytes lead to, the end of the
    heap returns to the system several times in each meta-gradient, and comes back in page faults. Freeing 32 MiB, the
    most that glibc adapts to, avoids them; nothing is written to that memory. Up to 64 MiB stay in the process. It has
    no effect if the process has set thresholds itself, nor with other allocators.
    """
    torch.empty(_LARGEST_THAT_ADAPTS, dtype=torch.uint8, device="cpu")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next allocations.

    A training step allocates and frees the same tens of megabytes again and again. By default glibc returns each large
    tensor's pages to the system and gets zeroed ones for the next. This causes thousands of page faults in each
    meta-gradient of Conv4 over 16 tasks, and takes 6 % of its time or more (docs/performance/tried.md). The cost of
    keeping memory is that the process stays at its largest size.

    Returns:
        Whether it took effect, which is only the case on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, _GIBIBYTE))
