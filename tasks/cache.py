"""Compute arrays once and keep them in the per-user cache.

A file starts with a checksum over its key and contents, followed by an ``.npz`` archive. The checksum detects damage,
files of another origin and files under a wrong name. It is not a signature, so anyone who can write to the cache could
forge one. So nothing is unpickled, unlike in joblib.Memory and diskcache.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
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

from metamom.common.files import cache_folder, write_atomically
from metamom.common.reading import regular_file

Arrays = dict[str, NDArray[Any]]

HEAD = struct.Struct(">32sQ")  # SHA-256 of the key, the length and the archive; length of the archive in bytes
CHUNK = 1 << 20  # bytes


def cached(label: str, key: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
    """Return the result of ``make``, from the cache if possible.

    If several processes ask at once, one calls ``make`` and the others wait. A file gets its final name only when it is
    complete and on disk. A file that is damaged, or has another key, is recomputed. If the cache is not writable, this
    only gives a warning.

    Args:
        label: prefix of the file's name.
        key: everything that the arrays depend on, as JSON values.
        make: computes the arrays; none of them may need pickling.
    """
    identity = json.dumps({"label": label, **key}, sort_keys=True).encode()
    path = cache_folder() / f"{label}-{hashlib.sha256(identity).hexdigest()[:24]}.npz"
    if (arrays := _load(path, identity)) is not None:
        return arrays
    with _locked(path) as writable:
        if (arrays := _load(path, identity)) is None:  # another process may have made it while this one waited
            arrays = make()
            if writable:
                _store(path, identity, arrays)
    return arrays


def _load(path: Path, identity: bytes) -> Arrays | None:
    """Load the arrays; ``None`` if they are missing or the checksum is wrong. It is checked before parsing."""
    try:
        with regular_file(path) as file:
            head = file.read(HEAD.size)
            if len(head) < HEAD.size:
                return None
            checksum, length = HEAD.unpack(head)
            if os.fstat(file.fileno()).st_size != HEAD.size + length:
                return None
            found = _begun(identity, length)
            while chunk := file.read(CHUNK):
                found.update(chunk)
            if found.digest() != checksum:
                return None
            file.seek(HEAD.size)
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error, NotImplementedError):
        return None  # unreadable, or a forged checksum


def _begun(identity: bytes, length: int) -> hashlib._Hash:
    return hashlib.sha256(b"%d %b %d " % (len(identity), identity, length))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of ``path``; yields False if locking is not possible."""
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


def _store(path: Path, identity: bytes, arrays: Arrays) -> None:
    """Write under a temporary name first. The caller holds the lock, so older unfinished files are abandoned."""
    try:
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        archive = buffer.getvalue()
        checksum = _begun(identity, len(archive))
        checksum.update(archive)
        write_atomically(path, HEAD.pack(checksum.digest(), len(archive)) + archive)
    except OSError as error:
        _warn(path, error)


def _warn(path: Path, error: Exception) -> None:
    warnings.warn(
        f"can't write the cache {path.parent} ({error}); decoding in memory in every run. Set $METAMOM_CACHE to a "
        "folder that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )
