"""Checkpoints that would take far more memory than their file are refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from directory_runs import go, refused

from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save


def zipped(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_bombs_are_refused_before_memory_is_taken(run):
    newest_one = Checkpoints(run / "checkpoints").path(4)
    good = newest_one.read_bytes()
    for other in (run / "checkpoints").iterdir():
        if other != newest_one:
            other.unlink()
    with zipfile.ZipFile(newest_one) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    heavy = next(name for name in records if "/data/" in name)

    def lies(name: str, size: int) -> None:
        """The archive's directory says that a record has another size."""
        newest_one.write_bytes(good)
        data = bytearray(good)
        place = data.rindex(name.encode()) - 46
        assert data[place : place + 4] == b"PK\1\2"
        data[place + 20 : place + 28] = 2 * size.to_bytes(4, "little")
        newest_one.write_bytes(data)

    def nested() -> None:
        deep: Any = 0
        for _ in range(150):
            deep = [deep]
        torch.save({"format": 1, "deep": deep}, newest_one)

    def repeated() -> None:
        often: Any = [0]
        for _ in range(64):
            often = [often, often]
        torch.save({"format": 1, "often": often}, newest_one)

    bombs: dict[str, Callable[[], None]] = {
        "compressed": lambda: zipped(newest_one, {**records, heavy: bytes(2**25)}, zipfile.ZIP_DEFLATED),
        "larger than its file": lambda: lies(heavy, 2**31),
        "expanded": lambda: torch.save({"format": 1, "x": torch.zeros(1).expand(2**40)}, newest_one),
        "nested": nested,
        "repeated": repeated,
        "sparse": lambda: torch.save({"format": 1, "x": torch.eye(3).to_sparse()}, newest_one),
        "nowhere": lambda: torch.save({"format": 1, "x": torch.empty(2**50, device="meta")}, newest_one),
        "before it": lambda: newest_one.write_bytes(b"junk" + good),
    }
    for what, make in bombs.items():
        make()
        refused(run, r"step-00000004\.pt is cut short or damaged", lambda: go(run, resume=True, iterations=6))
        with pytest.raises(CheckpointError):
            load(newest_one)
        assert newest_one.exists(), what
    newest_one.unlink()
    os.mkfifo(newest_one)
    with pytest.raises(CheckpointError, match="it is not a file"):
        go(run, resume=True, iterations=6)


def test_a_state_that_would_be_refused_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(CheckpointError, match="could not be read again: it holds a tensor of layout"):
        save(tmp_path / "x.pt", {"x": torch.eye(3).to_sparse()})
    assert not (tmp_path / "x.pt").exists()
