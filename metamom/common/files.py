"""Where files are kept for a user, and writing them so that a reader sees the old one or the new one, never a part."""

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
        ValueError: if ``$METAMOM_CACHE`` can't be a folder's path.
    """
    named = os.environ.get("METAMOM_CACHE")
    return named_folder(named, "$METAMOM_CACHE") if named else Path(user_cache_dir("metamom", appauthor=False))


def named_folder(named: str | os.PathLike[str], origin: str) -> Path:
    """The folder of a name, ``~`` being a home folder.

    Args:
        named: as the user gave it.
        origin: where, for the error.

    Raises:
        TypeError: if it is no path.
        ValueError: if it has a null character, or begins with ``~`` and the name of an unknown user.
    """
    if not isinstance(named, str | os.PathLike):
        raise TypeError(f"{origin} must be the path of a folder; got {named!r}.")
    path = Path(named)
    if "\0" in str(path):
        raise ValueError(f"{origin} must be the path of a folder; {str(path)!r} has a null character in it.")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{origin} is {path}, and there is no such user's home folder. Write the path out.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; then flush it to the disk, and rename it over ``path``.

    A crash at any moment leaves what was there before, and at worst a stray ``*.tmp`` file. The file's mode is that of
    any new file: the umask decides.

    Raises:
        OSError: if the folder cannot be written to or the disk is full; ``path`` is then as it was.
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
    if os.name == "nt":  # folders cannot be opened there; the rename is durable without it
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
