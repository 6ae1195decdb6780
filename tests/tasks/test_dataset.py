"""Episodes from data sets of PyTorch: labels without reading, items of every kind, draws as in `Episodes`."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset, random_split

from metamom.interop.imports import import_torchvision
from metamom.tasks import Episodes, FixedTasks, from_dataset
from metamom.tasks.dataset import as_tensor

SMALL = {"ways": 3, "shots": 1, "queries": 2}


def images(count: int = 40) -> torch.Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def labels(count: int = 40) -> torch.Tensor:
    return torch.arange(count) * 7 % 8


class Items(Dataset):
    """Items that count how often they are read."""

    def __init__(self, x: list, y: list, **attributes: object) -> None:
        self.x, self.y, self.reads = x, y, 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> object:
        self.reads += 1
        return self.x[i], self.y[i]


def same(one: object, other: object) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.sample(3, 4)[:4], other.sample(3, 4)[:4], strict=True))


def expected(x: torch.Tensor, y: torch.Tensor) -> Episodes:
    return Episodes(x, y, **SMALL)


def test_draws_as_episodes_do():
    tasks = from_dataset(TensorDataset(images(), labels()), **SMALL)
    assert same(tasks, expected(images(), labels()))
    assert tasks.classes == tuple("01234567")
    assert tasks.num_classes == 8
    assert tasks.sample(0, 2).query_x.shape == (2, 6, 1, 4, 4)
    other = from_dataset(TensorDataset(images(), labels()), stream="test", **SMALL)
    assert other.stream == "test"
    assert same(other, expected(images(), labels()).with_stream("test"))
    whole = tasks.sample(4, 4)
    assert torch.equal(tasks.sample(4, 4, rank=1, world_size=2).query_x, whole.query_x[2:])
    assert FixedTasks(tasks, 5).sample(0, 5).num_tasks == 5
    assert same(pickle.loads(pickle.dumps(tasks)), tasks)
    assert "from_dataset(TensorDataset, ways=3, shots=1, queries=2, seed=0): 40 items of 8 classes" in repr(tasks)


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["targets", "labels", "_labels", "samples"])
def test_labels_that_a_data_set_keeps(name, make):
    y = labels().tolist()
    kept = [(f"{i}.png", label) for i, label in enumerate(y)] if name == "samples" else make(y)
    dataset = Items(list(images()), y, **{name: kept})
    tasks = from_dataset(dataset, **SMALL)
    assert dataset.reads < 20
    assert same(tasks, expected(images(), labels()))


def test_labels_are_read_where_a_data_set_keeps_none():
    dataset = Items(list(images()), labels().tolist())
    assert same(from_dataset(dataset, **SMALL), expected(images(), labels()))
    assert dataset.reads >= 40


@pytest.mark.parametrize("wrong", [[1] * 40, [0] * 39, "text", torch.rand(40), [None] * 40, 3, labels()[:, None]])
def test_an_attribute_with_other_contents_is_ignored(wrong):
    dataset = Items(list(images()), labels().tolist(), labels=wrong)
    assert same(from_dataset(dataset, **SMALL), expected(images(), labels()))


def test_target_transform():
    def move(label: int) -> int:
        return label % 4

    class Transformed(Items):
        target_transform = staticmethod(move)

        def __getitem__(self, i: int) -> object:
            x, y = super().__getitem__(i)
            return x, move(y)

    dataset = Transformed(list(images()), labels().tolist(), targets=labels(), classes=[*"abcdefgh"])
    tasks = from_dataset(dataset, **SMALL)
    assert dataset.reads < 20
    assert tasks.classes == tuple("0123")
    assert same(tasks, expected(images(), labels() % 4))


def test_subsets_and_concatenations():
    dataset = Items(list(images()), labels().tolist(), targets=labels(), classes=[*"abcdefgh"])
    index = [i for i in range(39, -1, -1) if int(labels()[i]) != 3]
    subset = Subset(dataset, index)
    tasks = from_dataset(subset, **SMALL)
    assert dataset.reads < 20
    assert tasks.classes == (*"abc", *"efgh")
    assert same(tasks, expected(images()[index], labels()[index]))
    dataset.reads = 0
    both = ConcatDataset([subset, TensorDataset(images(), labels())])
    tasks = from_dataset(both, **SMALL)
    assert dataset.reads < 40
    assert same(tasks, expected(torch.cat([images()[index], images()]), torch.cat([labels()[index], labels()])))
    half, _ = random_split(TensorDataset(images(), labels()), [32, 8], torch.Generator().manual_seed(1))
    assert from_dataset(half, ways=3).num_classes == 8


@pytest.mark.parametrize("given", [[f"class {i % 5}" for i in range(40)], torch.arange(40) % 5, np.arange(40) % 5])
def test_labels_of_the_caller(given):
    dataset = Items(list(images()), [None] * 40)
    tasks = from_dataset(dataset, labels=given, **SMALL)
    assert tasks.num_classes == 5
    assert same(tasks, expected(images(), torch.arange(40) % 5))


def test_dicts():
    items = [{"img": x, "fine_label": int(y), "other": 0} for x, y in zip(images(), labels(), strict=True)]
    assert same(from_dataset(items, **SMALL), expected(images(), labels()))
    odd = [{"a": item["img"], "b": item["fine_label"]} for item in items]
    assert same(from_dataset(odd, keys=("a", "b"), **SMALL), expected(images(), labels()))
    with pytest.raises(TypeError, match=r"items have the keys 'a', 'b'; say which .*keys="):
        from_dataset(odd, **SMALL)


@pytest.mark.parametrize(
    ("x", "shape", "value"),
    [
        (Image.new("RGB", (5, 3), (255, 0, 51)), (3, 3, 5), [1, 0, 0.2]),
        (Image.new("L", (5, 3), 51), (1, 3, 5), [0.2]),
        (Image.new("1", (5, 3), 1), (1, 3, 5), [1]),
        (Image.new("P", (5, 3)), (3, 3, 5), [0, 0, 0]),
        (Image.new("RGBA", (5, 3), (255, 0, 51, 7)), (3, 3, 5), [1, 0, 0.2]),
        (Image.fromarray(np.full((3, 5), 65535, np.uint16)), (1, 3, 5), [1]),
        (np.full((3, 5, 3), 51, np.uint8), (3, 3, 5), [0.2] * 3),
        (np.full((3, 5), 51, np.uint8), (1, 3, 5), [0.2]),
        (np.full((3, 5), 7.0), (3, 5), [7, 7, 7]),
        (torch.full((2, 3), 51, dtype=torch.uint8), (2, 3), [0.2, 0.2]),
        (torch.full((2,), 5.0), (2,), [5, 5]),
        ([1.0, 2.0], (2,), [1, 2]),
    ],
)
def test_kinds_of_items(x, shape, value):
    tensor = as_tensor(x)
    assert tensor.shape == shape
    assert tensor.is_floating_point()
    torch.testing.assert_close(tensor.flatten(1)[:, 0] if tensor.dim() > 1 else tensor, torch.tensor(value).to(tensor))


def test_transform_augmentation_and_normalisation():
    pictures = [Image.fromarray(np.uint8(np.random.default_rng(i).integers(0, 256, (9, 9, 3)))) for i in range(40)]
    dataset = list(zip(pictures, labels().tolist(), strict=True))
    plain = from_dataset(dataset, **SMALL)
    smaller = from_dataset(dataset, transform=lambda image: image.resize((4, 4)), **SMALL)
    assert smaller.sample(0, 2).query_x.shape == (2, 6, 3, 4, 4)
    mean, std = plain.mean_and_std()
    x = torch.stack([as_tensor(image) for image in pictures]).double()
    torch.testing.assert_close(torch.tensor(mean), x.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std), x.std((0, 2, 3), correction=0).float())
    normal = from_dataset(dataset, normalize=(mean, std), **SMALL)
    m, s = (torch.tensor(each).view(3, 1, 1) for each in (mean, std))
    torch.testing.assert_close(normal.sample(0, 2).query_x, (plain.sample(0, 2).query_x - m) / s)
    augmented = from_dataset(dataset, augment=["crop", "flip"], **SMALL)
    assert not torch.equal(augmented.sample(0, 2).query_x, plain.sample(0, 2).query_x)
    assert torch.equal(augmented.sample(0, 2).query_x, augmented.sample(0, 2).query_x)


def test_the_description_identifies_the_data():
    one, same_data, other_labels, other_images = (
        from_dataset(TensorDataset(x, y), **SMALL).describe()
        for x, y in (
            (images(), labels()),
            (images().clone(), labels()),
            (images(), labels().flip(0)),
            (images() + 1, labels()),
        )
    )
    assert one == same_data == json.loads(json.dumps(one))
    assert one != other_labels
    assert one != other_images


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Random(Items):
    def __getitem__(self, i: int) -> object:
        return self.x[i] + torch.rand(()), self.y[i]


def ragged() -> list:
    return [(torch.rand(1, 4 + i % 2), i % 8) for i in range(40)]


@pytest.mark.parametrize(
    ("dataset", "arguments", "error", "message"),
    [
        (Stream(), {}, TypeError, "needs a map-style data set.*got a Stream.*list"),
        (iter([]), {}, TypeError, "needs a map-style data set"),
        (
            {"train": 1, "test": 2},
            {},
            TypeError,
            r"got a dict of 'train', 'test'. Pass one of them: dataset\['train'\]",
        ),
        ([], {}, ValueError, "the data set is empty"),
        ([1, 2], {}, TypeError, r"items \(x, label\).*gave an int"),
        ([(1.0, 0.5)], {}, TypeError, r"whole numbers or text, one class each; got 0.5"),
        ([(1.0, torch.zeros(3))], {}, TypeError, r"got a tensor of shape \[3\]"),
        ([(1.0, 1), (1.0, "a")], {}, TypeError, "all whole numbers or all text"),
        ([("text", i % 4) for i in range(40)], {}, TypeError, "item 0 of the data set is a str; .*transform="),
        (
            [(torch.ones(2, dtype=torch.long), i % 4) for i in range(40)],
            {},
            TypeError,
            "item 0 .* tensor of torch.int64",
        ),
        (TensorDataset(images(), labels()), {"labels": [1, 2]}, ValueError, "each of the 40 items .*; got 2"),
        (TensorDataset(images(), labels()), {"labels": "abc"}, TypeError, "labels must be a list"),
        (TensorDataset(images(), labels()), {"labels": 3}, TypeError, "labels must be a list"),
        (TensorDataset(images(), labels()), {"transform": 3}, TypeError, "transform must be a function"),
        (TensorDataset(images(), labels()), {"augment": "no"}, ValueError, "augment knows"),
        (TensorDataset(images(), labels()), {"normalize": 3}, TypeError, "normalize must be"),
        (TensorDataset(images(), labels()), {"ways": 9}, ValueError, "ways=9 different classes; the data has 8"),
        (TensorDataset(images(), labels()), {"shots": 9}, ValueError, "class '0' has 5"),
        (Random(list(images()), labels().tolist()), {}, ValueError, "item 0 .* another each time .*augment="),
    ],
)
def test_bad_data_sets(dataset, arguments, error, message):
    with pytest.raises(error, match=message):
        from_dataset(dataset, **SMALL | arguments)


def test_items_of_different_shapes():
    with pytest.raises(ValueError, match=r"one shape and type; item \d+ is \[1, \d\].*transform="):
        from_dataset(ragged(), **SMALL).sample(0, 8)


# Other libraries


def test_torchvision_fake_data():
    datasets = import_torchvision().datasets
    tasks = from_dataset(datasets.FakeData(40, (3, 8, 8), 4), **SMALL)
    assert tasks.num_classes == 4
    assert tasks.sample(0, 2).query_x.shape == (2, 6, 3, 8, 8)


@pytest.mark.parametrize(("name", "folder"), [("MNIST", "mnist"), ("FashionMNIST", "fashion_mnist")])
def test_torchvision_real_data(name, folder, data_root, tmp_path):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    for file in (data_root / folder).iterdir():
        if file.suffix == ".gz":
            (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            (raw / file.name).symlink_to(file)
    dataset = getattr(import_torchvision().datasets, name)(tmp_path, train=False)
    tasks = from_dataset(dataset, **SMALL)
    assert tasks.num_classes == 10
    assert same(tasks, expected(dataset.data[:, None], dataset.targets))
    if name == "FashionMNIST":
        assert tasks.classes[:2] == ("T-shirt/top", "Trouser")


def test_torchvision_image_folder(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (i * 10, 0, 0)).save(tmp_path / name / f"{i}.png")
    tasks = from_dataset(import_torchvision().datasets.ImageFolder(str(tmp_path)), **SMALL)
    assert tasks.classes == ("cat", "dog", "owl")


HUGGING_FACE = """
import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from metamom.tasks import from_dataset
pictures = [Pillow.fromarray(np.full((6, 6, 3), i, np.uint8)) for i in range(40)]
features = Features({"image": Image(), "label": ClassLabel(names=[*"abcdefgh"])})
data = Dataset.from_dict({"image": pictures, "label": [i % 8 for i in range(40)]}, features=features)
tasks = from_dataset(data, ways=3, shots=1, queries=2)
assert tasks.classes == tuple("abcdefgh"), tasks.classes
batch = tasks.sample(0, 8)
assert batch.query_x.shape == (8, 6, 3, 6, 6)
values = (batch.query_x[:, :, 0, 0, 0] * 255).round().long()
assert (values[:, :3] % 8 == values[:, 3:] % 8).all()
assert from_dataset(data.with_format("torch"), ways=3).sample(0, 8).query_x.shape == (8, 3, 3, 6, 6)
calls = []
def transform(rows):
    calls.append(len(rows["image"]))
    return {"pixel_values": [np.asarray(i, dtype=np.float32) for i in rows["image"]], "label": rows["label"]}
tasks = from_dataset(data.with_transform(transform), ways=3)
assert sum(calls) < 40, calls
assert tasks.sample(0, 2).query_x.shape == (2, 3, 6, 6, 3)
assert from_dataset(data.select(range(16)), ways=3).num_classes == 8
try:
    from_dataset(data.to_iterable_dataset(), ways=3)
except TypeError as error:
    assert "map-style" in str(error)
else:
    raise AssertionError
print("done")
"""


def test_hugging_face(tmp_path):
    """In a process of its own: the library takes seconds to import, and starts threads."""
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("the library `datasets` is not installed: pip install datasets")
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.stdout.strip() == "done", done.stderr


class LikeHuggingFace:
    """What `from_dataset` uses of a Hugging Face data set, without the library."""

    features = {"image": None, "label": type("ClassLabel", (), {"names": [*"abcdefgh"]})()}  # noqa: RUF012

    def __init__(self) -> None:
        self.decoded = 0

    def __len__(self) -> int:
        return 40

    def with_format(self, kind: None) -> LikeHuggingFace:
        return self

    def __getitem__(self, key: int | str) -> object:
        if isinstance(key, str):
            return labels().tolist()
        self.decoded += 1
        return {"image": images()[key], "label": int(labels()[key])}

    def __getitems__(self, keys: list[int]) -> list[object]:
        return [self[key] for key in keys]


def test_columns_of_labels():
    dataset = LikeHuggingFace()
    tasks = from_dataset(dataset, **SMALL)
    assert dataset.decoded < 20
    assert tasks.classes == tuple("abcdefgh")
    assert same(tasks, expected(images(), labels()))
