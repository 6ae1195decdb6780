"""What `check_images` finds in a folder."""

from __future__ import annotations

import numpy as np
import pytest
from endings import contents
from image_files import pixels, write_class, write_splits
from PIL import Image

from metamom.tasks import ImageFolder, check_images
from metamom.tasks.image_files import split_lists
from metamom.tasks.locate import DataError, DataNotFoundError


def test_splits(tmp_path):
    root = write_splits(tmp_path / "data", train=3, val=2)
    Image.fromarray(pixels(0, 20, 30)).save(root / "train" / "class00" / "large.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(root / "train" / "class01" / "grey.png")
    (root / "train" / "class01" / "0.png").write_bytes(b"")
    before = contents(root)
    found = check_images(root)
    assert contents(root) == before
    assert list(found.splits) == ["train", "validation"]
    train = found.splits["train"]
    assert train.images == {"class00": 5, "class01": 4, "class02": 4}
    assert train.sizes == {(12, 12): 11, (30, 20): 1, (9, 9): 1}
    assert train.modes == {"RGB": 12, "L": 1}
    assert [(each.path, each.fault) for each in train.broken] == [("train/class01/0.png", "is empty (0 bytes)")]
    assert not found.sound
    assert found.splits["validation"].broken == []
    assert str(found).splitlines()[1:] == [
        "  train: 3 classes, 13 images; per class 4 to 5, median 4",
        "    pixels: 12x12 (11 images); width 9 to 30, height 9 to 20",
        "    modes: RGB (12), L (1)",
        "    few: class01 has 4 images, so shots + queries must be at most 4",
        "    broken: train/class01/0.png is empty (0 bytes)",
        "  validation: 2 classes, 8 images; per class 4 to 4, median 4",
        "    pixels: 12x12 (8 images)",
        "    modes: RGB (8)",
        "    few: class03 has 4 images, so shots + queries must be at most 4",
        "  test: missing; `metamom evaluate` needs it",
    ]


def test_one_tree(tmp_path):
    for c in range(3):
        write_class(tmp_path / f"class{c}", c)
    (tmp_path / "empty").mkdir()
    found = check_images(tmp_path)
    assert list(found.splits) == ["all classes"]
    assert found.splits["all classes"].images == {"class0": 4, "class1": 4, "class2": 4, "empty": 0}
    assert not found.sound
    assert "empty: empty has no images" in str(found)
    of_splits = check_images(tmp_path, splits={"train": ["class0"], "test": ["class2", "class1"]})
    assert {name: list(split.images) for name, split in of_splits.splits.items()} == {
        "train": ["class0"],
        "test": ["class1", "class2"],
    }
    assert of_splits.sound


def test_classes_of_one_image_and_splits_that_are_missing(tmp_path):
    write_class(tmp_path / "train" / "one", 0, images=1)
    write_class(tmp_path / "train" / "many", 1, images=16)
    found = check_images(tmp_path)
    assert not found.sound
    assert found.missing == ["validation", "test"]
    assert found.splits["train"].single == ["one"]
    lines = str(found).splitlines()
    assert "    too few: one has 1 image; a task needs a shot and a query" in lines
    assert "  validation: missing; `metamom train images` needs it to choose the best checkpoint" in lines
    write_class(tmp_path / "train" / "one", 2, images=16)
    found = check_images(tmp_path)
    assert found.sound
    assert "few" not in str(found)
    assert found.as_json() == {
        "root": str(tmp_path),
        "splits": {
            "train": {
                "images": {"many": 16, "one": 16},
                "sizes": [{"width": 12, "height": 12, "images": 32}],
                "modes": {"RGB": 32},
                "broken": [],
                "sound": True,
            }
        },
        "missing": ["validation", "test"],
        "problems": [],
        "sound": True,
    }


def test_many_broken_files(tmp_path):
    write_class(tmp_path / "a", 0)
    for i in range(30):
        (tmp_path / "a" / f"x{i}.png").write_bytes(b"x")
    assert str(check_images(tmp_path)).count("broken: a/x") == 20
    assert str(check_images(tmp_path)).endswith("broken: 10 others")


def test_bad_folders(tmp_path):
    with pytest.raises(DataNotFoundError, match="does not exist"):
        check_images(tmp_path / "none")
    with pytest.raises(DataError, match="has no images in class folders"):
        check_images(tmp_path)


IN_TWO = "Few-shot learners are tested on classes that training has not seen: keep it in one of them."


def test_everything_wrong_with_folders_is_listed(tmp_path):
    for split, names in {"train": "abc", "test": "cad", "val": "ef"}.items():
        for number, name in enumerate(names):
            write_class(tmp_path / split / name, number, images=1 if name == "d" else 3)
    (tmp_path / "valid").mkdir()
    (tmp_path / "train" / "b" / "0.png").write_bytes(b"")
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "b" / ".0.png").write_bytes(b"")
    (tmp_path / "train" / "none").mkdir()
    found = check_images(tmp_path)
    assert found.problems == [
        f"{tmp_path} has several folders for the split 'validation': val, valid. Keep one.",
        f"the class 'a' is in two splits, 'train' and 'test'. {IN_TWO}",
        f"the class 'c' is in two splits, 'train' and 'test'. {IN_TWO}",
        "train: the class 'none' has no images",
        "train: train/b/0.png is empty (0 bytes)",
        "test: the class 'd' has 1 image; a task needs a shot and a query",
    ]
    assert not found.sound
    assert found.as_json()["problems"] == found.problems
    assert found.splits["train"].images == {"a": 3, "b": 2, "c": 3, "none": 0}
    assert found.splits["test"].images == {"a": 3, "c": 3, "d": 1}
    assert found.splits["validation"].images == {"e": 3, "f": 3}


def test_everything_wrong_with_lists_is_listed(tmp_path):
    root = write_splits(tmp_path / "data", train=2)  # as one tree
    for name, lines in {
        "train": "filename,label\n0.png,class00\n1.png,class00\nclass00/0.png,other\n2.png,gone\n3.png,gone",
        "test": "filename,label\nclass00/1.png,class00\nclass01/2.png,class01\nclass01/2.png,class01",
        "validation": "class01\nclass02",
    }.items():
        (tmp_path / f"{name}.csv").write_text(lines)
    splits = {name: tmp_path / f"{name}.csv" for name in ("train", "validation", "test")}
    found = check_images(root / "train", splits={**splits, "more": tmp_path / "more.csv"})
    of_train = f"in {root / 'train'} is listed as the class 'class00' of the split 'train' and as the class"
    assert list(found.faults) == [
        f"there is no list {tmp_path / 'more.csv'} of a split, nor {tmp_path / 'more.csv'}.",
        f"the class 'class00' is in two splits, 'train' and 'test'. {IN_TWO}",
        f"the class 'class01' is in two splits, 'validation' and 'test'. {IN_TWO}",
        f"the file class00/0.png {of_train} 'other' of the split 'train'. Keep one of the lines.",
        f"the file class00/1.png {of_train} 'class00' of the split 'test'. Keep one of the lines.",
        f"the file class01/2.png in {root / 'train'} is listed twice as the class 'class01' of the split 'test'. Keep "
        "one of the lines.",
        f"{root / 'train'} has no file 2.png of the class 'gone'; looked there and in gone/ and images/. Of the split "
        "'train', 2 listed files are missing.",
        f"{root / 'train'} has no class 'class02'; did you mean class01?",
        f"the split 'more' of {root / 'train'} has no classes. Give it some, or name another split.",
    ]
    assert found.splits["train"].images == {"class00": 2, "gone": 0, "other": 1}
    assert found.splits["validation"].images == {"class01": 4, "class02": 0}
    with pytest.raises(DataError, match="in two splits"):  # which training refuses
        ImageFolder(root / "train", splits=splits, ways=2)


@pytest.mark.parametrize(("broken", "left"), [(1, 3), (3, 1)])
def test_classes_with_too_few_images_left(broken, left, tmp_path):
    """The error says that it is broken files which are missing."""
    root = write_splits(tmp_path / "data", train=3)
    for n in range(broken):
        (root / "train" / "class01" / f"{n}.png").write_bytes(b"")
    them = "1 broken image that is" if broken == 1 else f"{broken} broken images that are"
    few = rf"shots \+ queries = 2 \+ 2 images of each class; class 'class01', without {them} skipped, has {left}\."
    with pytest.warns(RuntimeWarning, match=f"skipped {broken} of"), pytest.raises(ValueError, match=few):
        ImageFolder(root, ways=2, shots=2, queries=2, image_size=12, on_broken="skip")
    with pytest.raises(ValueError, match=r"2 \+ 3 images of each class; class 'class00' has 4\."):
        ImageFolder(write_splits(tmp_path / "sound", train=3), ways=2, shots=2, queries=3, image_size=12)


def test_folders_with_other_names_than_splits(tmp_path):
    for number, split in enumerate(("Train", "testing")):
        write_class(tmp_path / split / "a", number)
    found = check_images(tmp_path)
    wanted = "Train, testing look like splits, not like classes: splits are folders named train, validation and test."
    assert found.problems == [wanted]
    assert "no splits: training needs --splits, or folders train, validation and test of classes" in str(found)


def test_lists_in_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"must be a folder with train\.csv or train\.txt .*has neither"):
        split_lists(tmp_path)
    for name in ("train.csv", "val.txt"):
        (tmp_path / name).touch()
    assert split_lists(tmp_path) == {"train": tmp_path / "train.csv", "validation": tmp_path / "val.txt"}
    (tmp_path / "train.txt").touch()
    with pytest.raises(DataError, match=r"several lists of the split 'train': train\.csv, train\.txt\. Keep one"):
        split_lists(tmp_path)
