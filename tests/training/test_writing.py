"""A file is written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from endings import assert_same, assert_same_ending, contents
from training_runs import PATIENCE, go, momentum

from metamom import (
    files,
)
from metamom.training.checkpoints import load, save

pytestmark = pytest.mark.usefixtures("global_state")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


LIMITED = """
    import resource, runpy, sys
    from pathlib import Path
    write = runpy.run_path(sys.argv[1])["write_atomically"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write(Path(sys.argv[2]), b"x" * 5000)
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_write_beyond_what_the_system_allows_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED), files.__file__, str(path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert int(done.stdout) in (errno.EFBIG, errno.ENOSPC)
    assert contents(tmp_path) == {"file": b"old"}


def test_write_to_a_folder_that_is_read_only(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(PermissionError):
            files.write_atomically(path, b"new")
    finally:
        tmp_path.chmod(0o755)
    assert contents(tmp_path) == {"file": b"old"}


def test_disk_full_during_a_run(tmp_path, monkeypatch, uninterrupted):
    real, calls = os.fsync, itertools.count()

    def full(handle: int) -> None:
        if next(calls) >= 5:  # the configuration, and the checkpoint of the start, take two each
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            go(momentum(), tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    go(momentum(), tmp_path, resume=True)
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_checkpoint_is_whole_or_not_there(tmp_path):
    save(tmp_path / "a.pt", {"step": 1, "x": torch.arange(3)})
    assert_same(load(tmp_path / "a.pt"), {"format": 1, "step": 1, "x": torch.arange(3)})
