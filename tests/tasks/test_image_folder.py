"""Folders of image files: layouts, sampling, the cache, and bad data."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from endings import contents
from forked import run_forked, run_script, script
from image_files import SIZE, pixels, write_class, write_splits
from PIL import Image

from metamom.rng import DrawCoordinates
from metamom.tasks import Episodes, FixedTasks, ImageFolder, image_store
from metamom.tasks.image_files import split_lists
from metamom.tasks.locate import DataError, DataNotFoundError

SMALL = {"ways": 3, "shots": 1, "queries": 2, "image_size": SIZE}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path) -> Path:
    return write_splits(tmp_path / "data", train=5, validation=3, test=4)


def forbidden(*_: object) -> None:
    pytest.fail("decoded again")


def as_episodes(classes: range, images: int = 4, **options: object) -> Episodes:
    """The same images in memory."""
    numbers = [100 * c + i for c in classes for i in range(images)]
    x = torch.from_numpy(np.stack([pixels(n).transpose(2, 0, 1) for n in numbers]))
    labels = torch.tensor([n // 100 for n in numbers])
    return Episodes(x, labels, ways=3, shots=1, queries=2, **options)


# Layouts


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_folder_for_each_split(root, name):
    (root / "validation").rename(root / name)
    for split, classes in (
        ("train", range(5)),
        ("validation", range(5, 8)),
        ("val", range(5, 8)),
        ("test", range(8, 12)),
    ):
        tasks = ImageFolder(root, split=split, seed=3, **SMALL)
        assert tasks.classes == tuple(f"class{c:02}" for c in classes)
        assert tasks.num_classes == len(classes)
        assert tasks.stream == tasks.split == ("validation" if split == "val" else split)
        batch, expected = tasks.sample(4, 6), as_episodes(classes, seed=3).with_stream(tasks.stream).sample(4, 6)
        assert all(torch.equal(x, y) for x, y in zip(batch[:4], expected[:4], strict=True))


@pytest.mark.parametrize("kind", ["classes", "csv", "bare csv", "images", "text"])
def test_one_tree_with_splits(kind, tmp_path):
    root = tmp_path / "tree"
    names = [f"class{c:02}" for c in range(6)]
    for c, name in enumerate(names):
        write_class(root / name, c)
    splits: dict[str, object] = {"train": names[2:], "test": names[:2]}
    if kind == "text":
        for split, members in splits.items():
            (root / f"{split}.txt").write_text("\n".join(members) + "\n")
        splits = {split: f"{split}.txt" for split in splits}
    elif kind != "classes":
        if kind == "images":
            for name in names:
                for i in range(4):
                    (root / "images").mkdir(exist_ok=True)
                    (root / name / f"{i}.png").rename(root / "images" / f"{name}-{i}.png")
        file = "{0}-{1}.png" if kind == "images" else "{1}.png" if kind == "bare csv" else "{0}/{1}.png"
        for split, members in splits.items():
            lines = [f"{file.format(name, i)},{name}" for name in members for i in range(4)]
            (root / f"{split}.csv").write_text("\n".join((["filename,label"] if kind != "bare csv" else []) + lines))
        splits = {split: root / f"{split}.csv" for split in splits}
    tasks = ImageFolder(root, split="train", splits=splits, **SMALL)
    assert tasks.classes == tuple(names[2:])
    batch, expected = tasks.sample(0, 4), as_episodes(range(2, 6)).sample(0, 4)
    assert torch.equal(batch.query_x, expected.query_x)
    assert ImageFolder(root, split="test", splits=splits, **SMALL | {"ways": 2}).classes == tuple(names[:2])


def test_folders_in_a_class_links_and_what_file_managers_leave(root, tmp_path):
    train = root / "train"
    (train / "class00" / "images").mkdir()
    (train / "class00" / "0.png").rename(train / "class00" / "images" / "0.png")
    (train / "class01" / "2.png").rename(tmp_path / "elsewhere.png")
    (train / "class01" / "2.png").symlink_to(tmp_path / "elsewhere.png")
    (train / "class02").rename(tmp_path / "linked")
    (train / "class02").symlink_to(tmp_path / "linked")
    (train / "class02" / "loop").symlink_to(tmp_path / "linked")
    for junk in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt", ".hidden.png"):
        (train / "class03" / junk).write_bytes(b"junk")
    (train / ".cache").mkdir()
    (train / "__MACOSX").mkdir()
    (train / "readme.md").write_text("text")
    tasks = ImageFolder(root, **SMALL)
    assert tasks.classes == tuple(f"class{c:02}" for c in range(5))
    assert len(tasks._rows) == 20


def test_the_data_is_not_changed(root):
    before = contents(root)
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o555)
    try:
        ImageFolder(root, **SMALL).sample(0, 2)
    finally:
        for folder, _, _ in os.walk(root):
            os.chmod(folder, 0o755)
    assert contents(root) == before


# Sampling


@pytest.mark.parametrize("rotations", [False, True, "all"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_rotations_are_those_of_episodes(rotations, split, root):
    tasks = ImageFolder(root, split=split, rotations=rotations, **SMALL)
    rotated = rotations == "all" or (rotations and split == "train")
    classes = range(5) if split == "train" else range(8, 12)
    assert tasks.num_classes == len(classes) * (4 if rotated else 1)
    expected = as_episodes(classes, rotations=bool(rotated)).with_stream(split).sample(1, 32)
    batch = tasks.sample(1, 32)
    assert torch.equal(batch.support_x, expected.support_x)
    assert torch.equal(batch.query_x, expected.query_x)


def test_any_number_of_processes_and_fixed_tasks(root):
    tasks = ImageFolder(root, augment=["crop", "resized-crop", "flip", "jitter"], rotations=True, **SMALL)
    whole = tasks.sample(5, 8)
    for rank in range(4):
        part = tasks.sample(5, 8, rank=rank, world_size=4)
        assert torch.equal(part.query_x, whole.query_x[2 * rank : 2 * rank + 2])
    plain = ImageFolder(root, rotations=True, **SMALL).sample(5, 8)
    assert whole.query_x.shape == plain.query_x.shape
    assert not torch.equal(whole.query_x, plain.query_x)
    assert 0 <= float(whole.query_x.min()) <= float(whole.query_x.max()) <= 1
    fixed = FixedTasks(tasks, 6)
    assert fixed.sample(0, 3).task_ids.shape == (3,)
    assert tasks.with_stream("other")._store is tasks._store


def test_copies_and_pickles_read_the_same_cache(root):
    tasks = ImageFolder(root, **SMALL)
    expected = tasks.sample(2, 3).query_x
    for other in (copy.deepcopy(tasks), pickle.loads(pickle.dumps(tasks))):
        assert torch.equal(other.sample(2, 3).query_x, expected)
    code = f"import pickle, pathlib; t = pickle.loads(pathlib.Path({str(root.parent / 'p')!r}).read_bytes())\n"
    code += "print(float(t.sample(2, 3).query_x.double().sum()))"
    (root.parent / "p").write_bytes(pickle.dumps(tasks))
    assert float(run_script(code, root.parent / "said")) == float(expected.double().sum())


def test_normalisation(root):
    plain = ImageFolder(root, **SMALL)
    assert plain.constants is None
    x = as_episodes(range(5))._images.double() / 255
    mean, std = plain.mean_and_std()
    torch.testing.assert_close(torch.tensor(mean), x.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), x.std((0, 2, 3), correction=0).float())
    for split in ("train", "test"):
        tasks = ImageFolder(root, split=split, normalize="dataset", **SMALL)
        assert tasks.constants == (mean, std)
        assert tasks.describe()["normalize"] == {"mean": list(mean), "std": list(std)}
        given = ImageFolder(root, split=split, normalize=([0.5] * 3, [0.25] * 3), **SMALL)
        raw = ImageFolder(root, split=split, **SMALL).sample(0, 2).query_x
        torch.testing.assert_close(given.sample(0, 2).query_x, (raw - 0.5) / 0.25)
        m, s = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
        torch.testing.assert_close(tasks.sample(0, 2).query_x, (raw - m) / s)


def test_grey(root):
    tasks = ImageFolder(root, channels=1, **SMALL)
    assert tasks.sample(0, 2).query_x.shape == (2, 6, 1, SIZE, SIZE)
    assert len(tasks.mean_and_std()[0]) == 1


def test_the_text_says_what_is_there(root):
    assert re.search(
        r"ImageFolder\('.*data', split='train', ways=3, .*: 20 images of 5 classes", repr(ImageFolder(root, **SMALL))
    )


# The cache


def test_decoded_once_and_again_when_a_file_changes(root, cache, monkeypatch):
    before = ImageFolder(root, **SMALL).describe()
    with monkeypatch.context() as patch:
        patch.setattr(image_store.decode, "decode", forbidden)
        assert ImageFolder(root, ways=2, seed=9, image_size=SIZE).sample(0, 1)
    Image.fromarray(pixels(999)).save(root / "train" / "class00" / "0.png")
    assert ImageFolder(root, **SMALL).describe()["data_sha256"] != before["data_sha256"]
    assert len(list(cache.glob("*.u8"))) == 1  # the older one is removed
    ImageFolder(root, **SMALL | {"image_size": SIZE + 1})
    assert len(list(cache.glob("*.u8"))) == 2


def test_a_running_sampler_survives_a_change(root):
    tasks = ImageFolder(root, **SMALL)
    expected = tasks.sample(0, 8).query_x
    Image.fromarray(pixels(999)).save(root / "train" / "class00" / "0.png")
    ImageFolder(root, **SMALL)
    assert torch.equal(tasks.sample(0, 8).query_x, expected)


def test_the_description_does_not_depend_on_the_place(root, tmp_path):
    one = ImageFolder(root, **SMALL).describe()
    moved = tmp_path / "moved"
    root.rename(moved)
    os.utime(moved / "train" / "class00" / "0.png")
    assert ImageFolder(moved, **SMALL).describe() == one == json.loads(json.dumps(one))
    (moved / "train" / "class00").rename(moved / "train" / "class99")
    assert ImageFolder(moved, **SMALL).describe() != one


@pytest.mark.parametrize("damage", ["empty", "half", "one byte", "other record"])
def test_a_damaged_cache_is_made_again(damage, root, cache):
    expected = ImageFolder(root, **SMALL).sample(0, 4).query_x
    (file,) = cache.glob("*.u8")
    data = file.read_bytes()
    changed = {
        "empty": b"",
        "half": data[: len(data) // 2],
        "one byte": data[:-1],
        "other record": data[:-99] + bytes(99),
    }
    file.write_bytes(changed[damage])
    assert torch.equal(ImageFolder(root, **SMALL).sample(0, 4).query_x, expected)


def test_a_cache_that_is_cut_in_use(root, cache):
    tasks = ImageFolder(root, **SMALL)
    (file,) = cache.glob("*.u8")
    os.truncate(file, 10)
    with pytest.raises(DataError, match="was cut while in use"):
        tasks.sample(0, 1)


def test_processes_that_start_together(root, cache, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        f"import os\nos.environ['METAMOM_CACHE'] = {str(cache)!r}\nfrom metamom.tasks import ImageFolder\n"
        f"t = ImageFolder({str(root)!r}, ways=3, queries=2, image_size={SIZE})\n"
        "print(float(t.sample(0, 4).query_x.double().sum()), t.describe()['data_sha256'])"
    )
    ended = run_forked(script, 3, tmp_path / "said", path)
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert len({said for _, said in ended}) == 1
    assert len(list(cache.glob("*.u8"))) == 1
    assert not list(cache.glob("*.tmp"))


def test_no_room_in_the_cache(root, cache, monkeypatch):
    monkeypatch.setattr(image_store.decode, "decode", forbidden)
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=8639))
    with pytest.raises(DataError, match=r"20 images of 3 x 12 x 12 bytes need 0\.00 GB in the cache.*METAMOM_CACHE"):
        ImageFolder(root, **SMALL)
    assert not list(cache.glob("*.u8"))
    monkeypatch.undo()
    monkeypatch.setenv("METAMOM_CACHE", str(cache))
    monkeypatch.setattr(image_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=8640))
    ImageFolder(root, **SMALL)


def test_a_cache_below_a_file(root, cache):
    cache.write_text("a file")
    with pytest.raises(DataError, match=r"can't write decoded images to the cache .*METAMOM_CACHE"):
        ImageFolder(root, **SMALL)


# Bad data


def test_broken_files_are_named_or_skipped(root, cache, monkeypatch):
    train = root / "train"
    (train / "class01" / "0.png").write_bytes(b"")
    (train / "class02" / "1.png").write_bytes(b"not an image")
    with pytest.raises(
        DataError, match=r"class01/0.png is empty \(0 bytes\)\. 1 other of 20 files is broken too\..*on_broken='skip'"
    ):
        ImageFolder(root, **SMALL)
    assert not list(cache.glob("*.u8"))
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"skipped 2 of 20 images .*class01/0.png is empty"):
            tasks = ImageFolder(root, on_broken="skip", **SMALL)
        assert tasks.skipped == ("train/class01/0.png", "train/class02/1.png")
        monkeypatch.setattr(image_store.decode, "decode", forbidden)
    with pytest.raises(DataError, match=r"class01/0\.png is empty"):
        ImageFolder(root, **SMALL)  # from the cache
    good = [n for n in (100 * c + i for c in range(5) for i in range(4)) if n not in (100, 201)]
    x = torch.from_numpy(np.stack([pixels(n).transpose(2, 0, 1) for n in good]))
    expected = Episodes(x, [n // 100 for n in good], ways=3, shots=1, queries=2).sample(0, 16)
    assert torch.equal(tasks.sample(0, 16).query_x, expected.query_x)
    mean, _ = tasks.mean_and_std()
    torch.testing.assert_close(torch.tensor(mean), (x.double() / 255).mean((0, 2, 3)).float())


def test_a_class_that_is_skipped_as_a_whole(root):
    for file in (root / "train" / "class01").iterdir():
        file.write_bytes(b"x")
    with (
        pytest.warns(RuntimeWarning, match="skipped 4"),
        pytest.raises(ValueError, match="every image of the class 'class01'"),
    ):
        ImageFolder(root, on_broken="skip", **SMALL)


def test_nothing_that_can_be_read(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 2 images"):
        ImageFolder(tmp_path, on_broken="skip", **SMALL)


def remove_class(root: Path) -> None:
    for file in (root / "train" / "class02").iterdir():
        file.unlink()


def leave_one(root: Path) -> None:
    for i in (1, 2, 3):
        (root / "train" / "class02" / f"{i}.png").unlink()


def two_folders(root: Path) -> None:
    write_class(root / "val" / "x", 77)


def loose(root: Path) -> None:
    (root / "train").rename(root / "classes")
    (root / "train").mkdir()
    Image.fromarray(pixels(1)).save(root / "train" / "0.png")


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (
            lambda root: write_class(root / "test" / "class00", 0),
            {},
            DataError,
            "class 'class00' is in two splits, 'train'",
        ),
        (remove_class, {}, DataError, "class 'class02' of the split 'train' in .* has no images"),
        (leave_one, {}, ValueError, r"1 \+ 2 images of each class; class 'class02' has 1\."),
        (
            two_folders,
            {"split": "validation"},
            DataError,
            "several folders for the split 'validation': validation, val",
        ),
        (loose, {}, DataError, "has no class folders but 1 image; wanted"),
        (
            None,
            {"split": "novel"},
            DataNotFoundError,
            "has no folder 'novel' for the split; it has test, train, validation",
        ),
        (None, {"split": 3}, TypeError, "split must be a name"),
        (None, {"root": "/no/such/folder"}, DataNotFoundError, "/no/such/folder does not exist; root must be a folder"),
        (None, {"root": 3}, TypeError, "root must be the path of a folder; got 3"),
        (None, {"image_size": 0}, ValueError, "image_size must be >= 1"),
        (
            None,
            {"image_size": 100_000},
            ValueError,
            "at most 1,024 pixels a side; got 100000: one .* 114,441 MiB, and the limit is 12 MiB",
        ),
        (None, {"channels": 4}, ValueError, "channels must be 3"),
        (None, {"rotations": "no"}, ValueError, "rotations must be"),
        (None, {"on_broken": "ignore"}, ValueError, "on_broken must be one of raise, skip"),
        (None, {"augment": "crop,flipp"}, ValueError, "augment knows .*; got 'flipp'; did you mean flip?"),
        (None, {"augment": 3}, TypeError, "augment must be names"),
        (None, {"normalize": ([0.5], [0.5])}, ValueError, "3 means and standard deviations; got 1 and 1"),
        (None, {"normalize": ([0.5] * 3, [0, 1, 1])}, ValueError, "standard deviations above 0"),
        (None, {"normalize": "imagenet"}, TypeError, "normalize must be"),
        (None, {"ways": 6}, ValueError, "ways=6 different classes; the data has 5"),
        (None, {"splits": ["train"]}, TypeError, "splits must map"),
        (None, {"splits": {"test": ["a"]}}, DataError, "splits has no split 'train'; it has 'test'"),
        (None, {"splits": {"train": ["trian"]}}, DataNotFoundError, "no class 'trian'; did you mean train"),
        (None, {"splits": {"train": ["a"], "test": ["a"]}}, DataError, "'a' is in two splits"),
        (None, {"splits": {"train": []}}, DataError, "has no classes"),
        (None, {"splits": {"train": "missing.csv"}}, DataNotFoundError, "no list missing.csv"),
        (None, {"splits": {"train": 3}}, TypeError, "must be a list of class names"),
    ],
)
def test_bad_folders_and_arguments(change, arguments, error, message, root):
    if change is not None:
        change(root)
    arguments = {"root": root} | SMALL | arguments
    with pytest.raises(error, match=message):
        ImageFolder(arguments.pop("root"), **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("filename,label\n0.png\n", r"line 2 of .* is '0.png'; wanted filename,label"),
        (
            "filename,label\nnone.png,class00\n",
            r"no file none.png of the class 'class00'; looked there and in class00/",
        ),
        (
            "0.png,class00\nx.png,class00\ny.png,class00\n",
            "no file x.png of the class 'class00'; .* Of the split 'train', 2 listed files are missing",
        ),
        (
            "0.png,class00\n0.png,class00\n",
            "file class00/0.png in .* is listed twice as the class 'class00' of the split",
        ),
        ("0.png,class00\nclass00/0.png,class00\n", "file class00/0.png in .* is listed twice as the class 'class00'"),
        (
            "0.png,class00\n./class00/0.png,class01\n",
            "file class00/0.png in .* is listed as the class 'class00' of the split 'train' and as the class 'class01'",
        ),
        (b"\xff\xfe\x00,", "can't be read"),
    ],
)
def test_bad_lists(text, message, root):
    (root / "list.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message):
        ImageFolder(root / "train", splits={"train": root / "list.csv"}, **SMALL)


def test_one_file_in_the_lists_of_two_splits(root):
    tree = root / "train"
    (tree / "train.csv").write_text("".join(f"{i}.png,class00\n{i}.png,class01\n{i}.png,class02\n" for i in range(4)))
    (tree / "test.csv").write_text("class02/3.png,owls\n")
    splits = split_lists(tree)
    assert splits == {"train": tree / "train.csv", "test": tree / "test.csv"}
    message = (
        r"the file class02/3\.png in .* is listed as the class 'class02' of the split 'train' and as the class "
        r"'owls' of the split 'test'\. Keep one"
    )
    with pytest.raises(DataError, match=message):
        ImageFolder(tree, splits=splits, **SMALL)
    (tree / "test.csv").write_text("not-here.png,owls\n")  # of another split: found out when it is used
    assert ImageFolder(tree, splits=splits, **SMALL).num_classes == 3
    with pytest.raises(DataNotFoundError, match=r"no file not-here\.png of the class 'owls'"):
        ImageFolder(tree, split="test", splits=splits, **SMALL)


def test_an_interrupted_decoding_leaves_nothing(root, cache, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_store.decode, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImageFolder(root, **SMALL)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_draws_of_every_platform(root):
    tasks = ImageFolder(root, rotations=True, **SMALL)
    index, turns = tasks._chosen(*[DrawCoordinates("train", 0, np.arange(2))] * 2)
    assert index.tolist() == [[18, 5, 2, 17, 6, 0, 19, 7, 3], [1, 3, 8, 2, 2, 11, 0, 1, 10]]
    assert turns.tolist() == [[0, 3, 2] * 3, [3, 2, 2] * 3]


def test_no_warning_without_reason(root):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(root, **SMALL).sample(0, 2)
