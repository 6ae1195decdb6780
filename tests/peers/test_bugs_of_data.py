"""Public reports about episodes: wrong numbers of classes and images are clear errors, right ones are exact.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch

from metamom.tasks import Episodes, ImageFolder


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
