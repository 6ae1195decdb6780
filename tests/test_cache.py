"""The cache of decoded data: whole files only, one maker among processes, and no crash where it can't be written."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from metamom.files import cache_folder
from metamom.tasks.cache import cached

MAKER = """
import os, sys, time
import numpy as np
from metamom.tasks.cache import cached

def make():
    with open({log!r}, "a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    {then}
    return {{"x": np.arange(1000)}}

print(int(cached("test", {{"k": 1}}, make)["x"].sum()))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(tmp_path, then: str = "") -> subprocess.Popen:
    code = MAKER.format(log=str(tmp_path / "log"), then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, int]:
    return process.communicate(timeout=60)[0], process.returncode


def numbers():
    return {"x": np.arange(1000), "names": np.array(["a", "bc"])}


def test_made_once(folder):
    calls = []
    for _ in range(3):
        arrays = cached("test", {"k": 1}, lambda: calls.append(1) or numbers())
        assert arrays["x"].sum() == 499500
        assert arrays["names"].tolist() == ["a", "bc"]
    assert len(calls) == 1
    cached("test", {"k": 2}, lambda: calls.append(1) or numbers())
    assert len(calls) == 2
    assert cache_folder() == folder


@pytest.mark.parametrize("damage", ["empty", "half", "flipped", "other"])
def test_a_damaged_file_is_made_again(folder, damage):
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "flipped": data, "other": b"x" * 100}[damage])
    calls = []
    assert cached("test", {}, lambda: calls.append(1) or numbers())["x"].sum() == 499500
    assert calls == [1]
    assert cached("test", {}, lambda: pytest.fail("not mended"))["x"].sum() == 499500


def test_a_failing_maker_leaves_nothing(folder):
    def fail():
        raise ValueError("bad archive")

    with pytest.raises(ValueError, match="bad archive"):
        cached("test", {}, fail)
    assert not list(folder.glob("*.npz"))
    assert cached("test", {}, numbers)["x"].sum() == 499500


def test_one_of_many_processes_makes_it(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    assert [finish(process) for process in processes] == [("499500\n", 0)] * 3
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_process_that_dies_in_the_middle(tmp_path, folder):
    assert finish(start(tmp_path, then="os._exit(9)")) == ("", 9)
    unfinished = folder / "unfinished"
    unfinished.write_bytes(b"half")
    digest = next(folder.glob("*.lock")).name.removesuffix(".lock")
    os.replace(unfinished, folder / f".{digest}.abc.tmp")
    assert finish(start(tmp_path)) == ("499500\n", 0)
    assert not list(folder.glob("*.tmp"))
    assert len(list(folder.glob("*.npz"))) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="can't write the cache") as warned:
        assert cached("test", {}, numbers)["x"].sum() == 499500
    assert len(warned) == 1


def test_a_disk_that_is_full(folder, monkeypatch):
    def full(file, **_):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert cached("test", {}, numbers)["x"].sum() == 499500
    assert [path.suffix for path in folder.iterdir()] in ([".lock"], [])
