"""Per-user folders, and atomic writes: a reader sees the old file or the new one, never a part.

The atomic write is written here, since the library for it (atomicwrites) is no longer maintained.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_dir


def cache_folder() -> Path:
    """``$METAMOM_CACHE``, else the per-user cache folder.

    Raises:
        ValueError: if ``$METAMOM_CACHE`` is not a valid path.
    """
    named = os.environ.get("METAMOM_CACHE")
    return named_folder(named, "$METAMOM_CACHE") if named else Path(user_cache_dir("metamom", appauthor=False))


def named_folder(named: str | os.PathLike[str], origin: str) -> Path:
    """Resolve a folder's path, with ``~`` for a home folder.

    Args:
        named: the path that the user gave.
        origin: where the user gave it, for the error.

    Raises:
        TypeError: if it is not a path.
        ValueError: if it contains a null character, or starts with ``~`` and the name of an unknown user.
    """
    if not isinstance(named, str | os.PathLike):
        raise TypeError(f"{origin} must be the path of a folder; got {named!r}.")
    path = Path(named)
    if "\0" in str(path):
        raise ValueError(f"{origin} must be the path of a folder; {str(path)!r} contains a null character.")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{origin} is {path}, but that user's home folder is unknown. Write out the whole path."
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder to write to; then flush it to disk and rename it to ``path``.

    A crash at any moment leaves the old file, and at worst a stray ``*.tmp`` file. The new file's mode follows the
    umask.

    Raises:
        OSError: if the folder is not writable or the disk is full; ``path`` does not change then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.touch(0o666, exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders; the rename is durable anyway
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
