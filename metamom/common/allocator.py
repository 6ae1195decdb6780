"""Memory: keep freed memory in the process, and recognise out-of-memory errors."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from functools import cache

import torch

# glibc's codes for mallopt, and sizes. Each allocation above M_MMAP_THRESHOLD is a separate mapping, which returns to
# the system when freed. The end of the heap returns to the system when more than M_TRIM_THRESHOLD of it is free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = -1  # of M_TRIM_THRESHOLD: do not trim
_GIBIBYTE = 2**30
_LARGEST_THAT_ADAPTS = 2**25 - 2**16  # bytes, a little less than glibc's own limit of 32 MiB
_LARGEST_OF_OLD_GLIBC = 2**25
# Settings of the user that fix the thresholds: environment variables, and the same as tunables of glibc.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = tuple(f"glibc.malloc.{name}" for name in ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad"))


def out_of_memory(error: BaseException) -> str | None:
    """Describe an out-of-memory error in one line; ``None`` for any other error.

    On a CPU, torch raises a plain RuntimeError.
    """
    _, said_by_torch, why = str(error).partition("DefaultCPUAllocator: ")
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not said_by_torch:
        return None
    return " ".join((why or str(error)).split()).removesuffix(".") or "an allocation failed"


@cache
def reuse_freed_memory() -> bool:
    """Let glibc adapt to tensors of many megabytes before the first of them, once in a process.

    glibc raises both of its thresholds when a large allocation is freed: then later ones of that size come from the
    heap, and twice as much may stay free at its end. With the thresholds that a few megabytes lead to, the end of the
    heap returns to the system several times in each meta-gradient, and comes back in page faults. Freeing 32 MiB, the
    most that glibc adapts to, avoids them; nothing is written to that memory. Up to 64 MiB stay in the process.

    Set a threshold to keep glibc as it is, such as ``MALLOC_TRIM_THRESHOLD_=131072`` in the environment that Python
    starts in (see `set_by_user`). Thresholds that the process has set by ``mallopt`` stay too.

    Returns:
        Whether it was tried: on Linux with glibc, if the environment does not set thresholds.
    """
    if not has_glibc() or set_by_user(os.environ):
        return False
    torch.empty(_LARGEST_THAT_ADAPTS, dtype=torch.uint8, device="cpu")
    return True


def has_glibc() -> bool:
    """Whether the process runs on Linux with glibc, where large allocations have these thresholds."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (OSError, ValueError):  # another C library
        return False


def set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether an environment sets a threshold of glibc's allocator, so that glibc does not adapt them.

    Args:
        environment: the variables. ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_MMAP_MAX_``,
            ``MALLOC_TOP_PAD_`` and the tunables of the same names in ``GLIBC_TUNABLES`` count, with any value.

    Example:
        >>> set_by_user({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.trim_threshold=131072"})
        True
        >>> set_by_user({"MALLOC_ARENA_MAX": "2"})
        False

    Reference:
        mallopt(3); the GNU C Library manual, "Memory Allocation Tunables".
    """
    tunables = {each.partition("=")[0] for each in environment.get("GLIBC_TUNABLES", "").split(":")}
    return any(environment.get(name) for name in _VARIABLES) or not tunables.isdisjoint(_TUNABLES)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next allocations.

    A training step allocates and frees the same tens of megabytes again and again. By default glibc returns each large
    tensor's pages to the system and gets zeroed ones for the next. This causes thousands of page faults in each
    meta-gradient of Conv4 over 16 tasks, and takes 6 % of its time or more (docs/performance/tried.md). The cost of
    keeping memory is that the process stays at its largest size: the end of the heap is never returned, since a chunk
    of large tasks frees more than a gibibyte at once, and half of an evaluation's time went into getting it back.

    As `reuse_freed_memory` does, it leaves thresholds alone that the environment sets.

    Returns:
        Whether it took effect: on Linux with glibc, if the environment does not set thresholds.
    """
    if not has_glibc() or set_by_user(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mapped = mallopt(_MMAP_THRESHOLD, _GIBIBYTE) or mallopt(_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
    return bool(mapped and mallopt(_TRIM_THRESHOLD, _NEVER))
