"""Arrays that are made once and kept in the per-user cache."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from metamom.files import cache_folder, write_atomically

Arrays = dict[str, NDArray[Any]]


def cached(label: str, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """What ``make`` returns, from the cache if it is there.

    Of several processes that ask at once, one calls ``make`` and the others wait. A file appears under its name only
    when it is whole and on the disk; a damaged one is made again. A cache that can't be written costs a warning.

    Args:
        label: begins the file's name.
        key: everything that the arrays depend on, as JSON values.
        make: makes the arrays; none of them may need pickling.
    """
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:24]
    path = cache_folder() / f"{label}-{digest}.npz"
    if (arrays := _load(path)) is not None:
        return arrays
    with _locked(path) as writable:
        if (arrays := _load(path)) is None:  # another process may have made it while this one waited
            arrays = make()
            if writable:
                _store(path, arrays)
    return arrays


def _load(path: Path) -> Arrays | None:
    try:
        # Opened here, because np.load leaves a file open that it can't read; it checks the CRC of each array.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError):
        return None  # not there, or damaged


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock of ``path``; yields False where there can't be one."""
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        _warn(path, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _store(path: Path, arrays: Arrays) -> None:
    """Writes under another name first. The caller holds the lock, so older unfinished files are nobody's."""
    try:
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(
        f"can't write the cache {path.parent} ({error}); decoding in memory, again in every run. "
        f"Set $METAMOM_CACHE to a folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )
