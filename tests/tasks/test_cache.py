"""The cache of decoded data: whole files only, one maker among processes, and no crash where it can't be written."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from forked import run_forked, script
from fuzzing import bounded, campaign, damaged
from irregular import IRREGULAR, put_in_place

from metamom.common.files import cache_folder
from metamom.tasks.cache import HEAD, cached

MAKER = """
import os, sys, time
os.environ["METAMOM_CACHE"] = {cache!r}
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


def makers(tmp_path, number: int = 1, then: str = "") -> list[tuple[int, str]]:
    """Processes that make it at the same time: the exit status and output of each."""
    path = tmp_path / "maker.py"
    path.write_text(MAKER.format(log=str(tmp_path / "log"), cache=str(tmp_path / "cache"), then=then))
    return run_forked(script, number, tmp_path / "said", path)


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
    assert cached("test", {}, lambda: pytest.fail("not repaired"))["x"].sum() == 499500


def assert_made_again() -> None:
    calls = []
    with bounded(20, 256):
        made = cached("test", {}, lambda: calls.append(1) or numbers())
    assert {name: array.tolist() for name, array in made.items()} == {name: x.tolist() for name, x in numbers().items()}
    assert calls == [1]
    assert cached("test", {}, lambda: pytest.fail("not repaired"))["x"].tolist() == list(range(1000))


CRAFTED = {
    "other numbers": {"x": np.arange(1000)[::-1], "names": np.array(["a", "bc"])},
    "another type": {"x": np.arange(1000.0), "names": np.array(["a", "bc"])},
    "another shape": {"x": np.arange(1000)[None], "names": np.array(["a", "bc"])},
    "one too few": {"x": np.arange(1000)},
    "none": {},
    "pickled": {"x": np.array([print], dtype=object)},
}


@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("what", CRAFTED)
def test_a_file_of_another_origin_is_made_again(folder, what, headed):
    """Also with the head of the true file before it."""
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    head = file.read_bytes()[: HEAD.size] if headed else b""
    np.savez(file, **CRAFTED[what])
    file.write_bytes(head + file.read_bytes())
    assert_made_again()


def test_a_file_of_another_key_is_made_again(folder):
    """A cache that somebody has renamed is whole, but of other data."""
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    cached("test", {"other": 1}, lambda: {"x": np.zeros(1000), "names": np.array(["c"])})
    (other,) = {*folder.glob("*.npz")} - {file}
    os.replace(other, file)
    assert_made_again()


@pytest.mark.parametrize("kind", [kind for kind in IRREGULAR if kind != "a folder"])
def test_only_a_regular_file_is_read(folder, kind):
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    put_in_place(kind, file)
    assert_made_again()
    assert file.is_file()
    assert not file.is_symlink()


def test_a_folder_in_its_place_stays(folder):
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    put_in_place("a folder", file)
    with pytest.warns(RuntimeWarning, match="can't write the cache"):
        assert cached("test", {}, numbers)["x"].sum() == 499500


def test_a_link_to_a_file_is_followed(folder, tmp_path):
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    os.replace(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert cached("test", {}, lambda: pytest.fail("not read"))["x"].sum() == 499500


@campaign(60, 1000)
def test_damage_of_any_kind_is_repaired(folder, seeds):
    cached("test", {}, numbers)
    (file,) = folder.glob("*.npz")
    whole = file.read_bytes()
    for seed in seeds:
        broken = damaged(whole, random.Random(seed))
        if broken == whole:
            continue
        file.write_bytes(broken)
        assert_made_again()
        assert file.read_bytes() == whole, f"seed {seed}"


def test_a_failing_maker_leaves_nothing(folder):
    def fail():
        raise ValueError("bad archive")

    with pytest.raises(ValueError, match="bad archive"):
        cached("test", {}, fail)
    assert not list(folder.glob("*.npz"))
    assert cached("test", {}, numbers)["x"].sum() == 499500


def test_one_of_many_processes_makes_it(tmp_path):
    assert makers(tmp_path, 3) == [(0, "499500\n")] * 3
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_process_that_dies_in_the_middle(tmp_path, folder):
    assert makers(tmp_path, then="os._exit(9)") == [(9, "")]
    unfinished = folder / "unfinished"
    unfinished.write_bytes(b"half")
    digest = next(folder.glob("*.lock")).name.removesuffix(".lock")
    os.replace(unfinished, folder / f".{digest}.abc.tmp")
    assert makers(tmp_path) == [(0, "499500\n")]
    assert not list(folder.glob("*.tmp"))
    assert len(list(folder.glob("*.npz"))) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="can't write the cache") as warned:
        assert cached("test", {}, numbers)["x"].sum() == 499500
    assert len(warned) == 1


@pytest.mark.parametrize("named", ["~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_named(monkeypatch, named):
    monkeypatch.setenv("METAMOM_CACHE", named)
    with pytest.raises(ValueError, match=r"\$METAMOM_CACHE is .*that user's home folder is unknown"):
        cached("test", {}, numbers)


def test_a_disk_that_is_full(folder, monkeypatch):
    def full(file, **_):
        file.write(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert cached("test", {}, numbers)["x"].sum() == 499500
    assert [path.suffix for path in folder.iterdir()] in ([".lock"], [])
