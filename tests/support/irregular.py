"""What may lie in a file's place: links to nothing or to themselves, pipes, sockets, devices, folders."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

IRREGULAR = {
    "a link to nothing": lambda path: path.symlink_to(path.with_name("no such file")),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": lambda path: _bind(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


def put_in_place(kind: str, path: Path) -> None:
    """Remove the file at ``path`` and put something of this kind there."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    IRREGULAR[kind](path)


def _bind(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")  # an address has room for about 100 characters
        os.rename(f"{short}/s", path)
