"""Public reports about episodes: wrong numbers of classes and images are clear errors, right ones are exact.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch
from tiny_omniglot import SIDE, TINY, in_place_of_omniglot, members, pixels, write_zip
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, pad
from metamom.tasks import Episodes, ImageFolder, Omniglot


def episodes(classes: int, each: int, **options: int) -> Episodes:
    """Each image is the number of its class, and its own number."""
    labels = torch.arange(classes).repeat_interleave(each)
    images = torch.stack([labels.double(), torch.arange(len(labels)).double()], 1)
    return Episodes(images, labels, **options)


@pytest.mark.parametrize(
    ("each", "ways", "said"),
    [
        pytest.param(40, 5, "ways=5 different classes; the data has 2", id="easyfsl 44"),
        pytest.param(14, 2, r"5 \+ 10 images of each class; class 0 has 14", id="easyfsl 68"),
    ],
)
def test_too_few_classes_or_images(each, ways, said):
    """easyfsl 44, 68: "Sample larger than population or is negative", which does not say what is too few."""
    with pytest.raises(ValueError, match=said):
        episodes(2, each, ways=ways, shots=5, queries=10)


def test_just_enough_classes_and_images():
    """easyfsl 68: two ways of five shots and ten queries need fifteen images of each of two classes, and no more."""
    batch = episodes(2, 15, ways=2, shots=5, queries=10).sample(0, 3)
    assert batch.support_x.shape[:2] == (3, 10)
    assert batch.query_x.shape[:2] == (3, 20)
    for task in range(3):
        images = torch.cat([batch.support_x[task], batch.query_x[task]])[:, 1]
        assert sorted(images.tolist()) == list(range(30))


def test_a_folder_without_images(tmp_path):
    """easyfsl 44, 64: a data set of one's own with the wrong folder was empty, and failed when it was sampled."""
    (tmp_path / "train" / "rose").mkdir(parents=True)
    with pytest.raises(ValueError, match="no image"):
        ImageFolder(tmp_path, split="train", ways=2, shots=1, queries=1)


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_as_many_ways_as_asked(ways):
    """learn2learn 131: n=2 gave one sample with its label, one fewer than asked; n=1 an IndexError."""
    batch = episodes(5, 4, ways=ways, shots=1, queries=2).sample(0, 20)
    for x, y, per_class in ((batch.support_x, batch.support_y, 1), (batch.query_x, batch.query_y, 2)):
        for task in range(20):
            assert y[task].bincount().tolist() == [per_class] * ways
            pairs = {(a.item(), b.item()) for a, b in zip(x[task, :, 0], y[task], strict=True)}
            assert len(pairs) == len({a for a, _ in pairs}) == ways  # a label is one class, and a class one label
    with pytest.raises(ValueError, match="ways must be >= 2"):
        episodes(5, 4, ways=1, shots=1, queries=1)


def test_classes_with_different_numbers_of_queries():
    """easyfsl 63: does each class need as many queries? No: loss and gradient are those of the points there are."""
    draws = torch.Generator().manual_seed(0)

    def points(labels: list[int]) -> tuple[Tensor, Tensor]:
        return torch.randn(len(labels), 4, generator=draws, dtype=torch.float64), torch.tensor(labels)

    tasks = [(*points([0, 1, 2]), *points(queries)) for queries in ([0, 0, 0, 1, 2], [2, 1], [1, 1, 1, 0])]
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    found = MAML(model, F.cross_entropy, inner_lr=0.1).meta_gradient(pad(tasks))
    weights = list(model.parameters())
    losses = []
    for x, y, query_x, query_y in tasks:
        inner = torch.autograd.grad(F.cross_entropy(F.linear(x, *weights), y), weights, create_graph=True)
        adapted = [w - 0.1 * g for w, g in zip(weights, inner, strict=True)]
        losses.append(F.cross_entropy(F.linear(query_x, *adapted), query_y))
    torch.testing.assert_close(found.losses, torch.stack(losses))
    wanted = torch.autograd.grad(torch.stack(losses).mean(), weights)
    for (grad,), other in zip(found.grads.values(), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)


KEPT = [pixels(c, d).astype("float32") for c in range(TINY.characters) for d in range(TINY.drawings)]  # strokes are 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A data root of two alphabets, whose characters every split has."""
    in_place_of_omniglot(monkeypatch, tmp_path / "cache")
    write_zip(tmp_path / "omniglot" / "images_background.zip", members())
    return tmp_path


def test_every_split_has_the_same_pixels(small):
    """MatchingNetworks 4: images were normalised in training, and not in validation and test."""
    drawings = {tuple(drawing.flatten().tolist()) for drawing in map(torch.from_numpy, KEPT)}
    for split in ("train", "validation", "test", "background"):
        batch = Omniglot(small, split=split, ways=3, queries=3, image_size=SIDE, rotations=False).sample(0, 8)
        seen = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
        assert {tuple(image.flatten().tolist()) for image in seen} <= drawings


def test_tasks_within_an_alphabet(small):
    """MatchingNetworks 4: classes from one alphabet are harder to tell apart; the split alone decided on it."""
    whole, part = (
        Omniglot(small, split="test", ways=3, queries=3, image_size=SIDE, alphabets=names)
        for names in (None, ["Beta_(b)"])
    )
    assert {name.split("/")[1] for name in whole.characters} == {"Alpha", "Beta_(b)"}
    assert {name.split("/")[1] for name in part.characters} == {"Beta_(b)"}
    drawings = {tuple(image.flatten().tolist()) for image in part._images}
    for tasks, within in ((part, True), (whole, False)):
        batch = tasks.sample(0, 8)
        found = [tuple(image.flatten().tolist()) in drawings for image in batch.support_x.mul(255).byte().flatten(0, 1)]
        assert all(found) == within
