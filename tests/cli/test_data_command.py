"""`metamom data check`, and archives that are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import the_error
from endings import contents
from image_files import write_splits
from tiny_omniglot import TINY, members, pixels, png, write_zip

from metamom.tasks import fetch


@pytest.fixture
def tiny_root(tmp_path, monkeypatch) -> Path:
    """A root with small archives, and the command believing that Omniglot is that small."""
    for part in ("background", "evaluation"):
        monkeypatch.setitem(fetch.PUBLISHED, part, TINY)
        write_zip(tmp_path / "root" / "omniglot" / f"images_{part}.zip", members(part))
    return tmp_path / "root"


def test_data_check_of_sound_archives(metamom, tiny_root):
    said = metamom("data", "check", "omniglot", "--root", tiny_root)
    assert said.code == 0
    assert said.out.count("6 characters, 24 drawings, all sound") == 2


@pytest.mark.parametrize("kept", [0, 10, 1000, -1, -30])
def test_truncated_archive(kept, metamom, tiny_root):
    archive = tiny_root / "omniglot" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:kept])
    before = contents(tiny_root)
    message = the_error(metamom("data", "check", "omniglot", "--root", tiny_root))
    assert str(archive) in message
    assert "not a complete zip archive" in message
    assert contents(tiny_root) == before


def test_drawing_of_the_wrong_size(metamom, tiny_root):
    wrong = members("evaluation")
    name = sorted(wrong)[5]
    wrong[name] = png(pixels(0, 0, 14))
    archive = write_zip(tiny_root / "omniglot" / "images_evaluation.zip", wrong)
    message = the_error(metamom("data", "check", "omniglot", "--root", tiny_root))
    assert str(archive) in message
    assert f"{name} of 14x14 pixels instead of 12x12" in message


@pytest.mark.slow
def test_data_check_of_the_real_data(metamom, data_root):
    said = metamom("data", "check", "omniglot", "--root", data_root)
    assert (said.code, said.err) == (0, "")
    background, evaluation = said.out.splitlines()
    assert "images_background.zip: 964 characters, 19,280 drawings, all sound" in background
    assert "images_evaluation.zip: 659 characters, 13,180 drawings, all sound" in evaluation


def test_truncated_real_archive_in_training(metamom, data_root, tmp_path):
    folder = tmp_path / "root" / "omniglot"
    folder.mkdir(parents=True)
    for archive in (data_root / "omniglot").glob("*.zip"):
        (folder / archive.name).write_bytes(archive.read_bytes()[:100_000])
    said = metamom("train", "omniglot", "--data-root", tmp_path / "root", "--run-dir", tmp_path / "run")
    assert "images_background.zip" in the_error(said)
    assert not (tmp_path / "run").exists()


def test_data_check_of_images(metamom, tmp_path):
    root = write_splits(tmp_path / "images", train=2, test=1)
    said = metamom("data", "check", "images", "--root", root)
    assert (said.code, said.err) == (0, "")
    assert "train: 2 classes, 8 images; per class 4 to 4, median 4" in said.out
    (root / "test" / "class02" / "0.png").write_bytes(b"")
    said = metamom("data", "check", "images", "--root", root)
    assert said.code == 1
    assert "broken: test/class02/0.png is empty (0 bytes)" in said.out
    shutil.copytree(root / "train" / "class00", root / "test" / "class00")
    said = metamom("data", "check", "images", "--root", root)
    problems = said.out[said.out.index("2 problems:\n") :].splitlines()[1:]
    assert (said.code, said.err, len(problems)) == (1, "", 2)
    assert "test: 2 classes, 7 images" in said.out
    assert problems[0].startswith("  the class 'class00' is in two splits, 'train' and 'test'.")
    answer = metamom("data", "check", "images", "--root", root, "--json")
    assert answer.code == 1
    assert [f"  {each}" for each in json.loads(answer.out)["problems"]] == problems


def test_data_check_of_images_in_lists(metamom, tmp_path):
    """The lists are those that `metamom train images --splits` takes."""
    root = write_splits(tmp_path / "images", all=4) / "all"
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("class00\nclass01\n")
    (lists / "val.csv").write_text("filename,label\n" + "".join(f"class02/{i}.png,class02\n" for i in range(4)))
    arguments = ["data", "check", "images", "--root", root, "--splits", lists]
    said = metamom(*arguments)
    assert (said.code, said.err) == (0, "")
    assert "train: 2 classes, 8 images" in said.out
    assert "validation: 1 class, 4 images" in said.out
    assert "test: missing; `metamom evaluate` needs it" in said.out
    answer = json.loads(metamom(*arguments, "--json").out)
    assert answer["sound"] is True
    assert answer["missing"] == ["test"]
    assert answer["splits"]["validation"]["images"] == {"class02": 4}
    (lists / "test.txt").write_text("class03\nclass01\n")
    said = metamom(*arguments)
    assert said.code == 1
    assert "1 problem:\n  the class 'class01' is in two splits, 'train' and 'test'" in said.out
    (lists / "test.txt").unlink()
    for i in (1, 2, 3):
        (root / "class00" / f"{i}.png").unlink()
    said = metamom(*arguments, "--json")
    assert said.code == 1
    assert json.loads(said.out)["splits"]["train"]["sound"] is False
    assert "--splits must be a folder with train.csv" in the_error(metamom(*arguments, "--splits", tmp_path))
    assert "belong to `metamom data check images`" in the_error(metamom("data", "check", "omniglot", "--json"))


@pytest.mark.parametrize("arguments", [["check", "images"], ["fetch", "images", "--root", "."]])
def test_images_of_ones_own_are_checked_in_a_folder(metamom, arguments):
    assert "metamom data check images --root DIR" in the_error(metamom("data", *arguments))


def test_data_check_of_no_images(metamom, tmp_path):
    assert "has no images in class folders" in the_error(metamom("data", "check", "images", "--root", tmp_path))
