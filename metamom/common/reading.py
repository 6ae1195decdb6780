"""Read untrusted files safely: regular files only, and never more than the expected size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotAFileError(OSError):
    """The path is not a regular file; the message says what it is."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__(errno.EINVAL, f"is {kind}, not a file", str(path))


def what_is_there(path: Path) -> str:
    """``"a file"``, ``"a folder"``, ``"a link to nothing"``, ``"nothing"``, ...; links are followed, nothing is opened.

    Raises:
        OSError: if the path cannot be examined.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else "nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link to itself"
        raise
    return "a file" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "something else")


@contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, or a link to one, for reading.

    Reading a named pipe waits for its writer, and reading a device may never end, so these are not even opened.

    Raises:
        NotAFileError: if it is anything else.
        OSError: if it does not exist or cannot be read.
    """
    kind = what_is_there(path)
    if kind not in ("a file", "nothing"):
        raise NotAFileError(kind, path)
    with open(path, "rb", opener=_without_waiting) as file:
        yield file


def read_regular_file(path: Path, limit: int) -> bytes:
    """Read a regular file.

    Args:
        path: of the file.
        limit: largest allowed size in bytes; at most one byte more is read.

    Raises:
        NotAFileError: if it is not a regular file.
        OSError: if it cannot be read or is larger.
    """
    with regular_file(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", str(path))
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # in case a pipe replaces the file right now
