"""Episodes: which classes and images, scaling, rotations, augmentation, speed, bad data."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom.rng import DrawCoordinates, Purpose, choose, uniforms
from metamom.tasks import Episodes


def numbered(labels: torch.Tensor, **arguments) -> Episodes:
    """Episodes whose images are their own index."""
    return Episodes(torch.arange(len(labels), dtype=torch.float64), labels, **arguments)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_images_belong_to_the_labels(data):
    """Any labels in any order, classes of any size: a slow loop over the same choices gives the same images."""
    sizes = data.draw(st.lists(st.integers(3, 9), min_size=3, max_size=7))
    names = data.draw(st.lists(st.integers(-(10**6), 10**6), min_size=len(sizes), max_size=len(sizes), unique=True))
    labels = data.draw(st.permutations([name for name, size in zip(names, sizes, strict=True) for _ in range(size)]))
    ways = data.draw(st.integers(2, len(sizes)))
    tasks = numbered(torch.tensor(labels), ways=ways, shots=1, queries=2, seed=data.draw(st.integers(0, 99)))
    batch = tasks.sample(5, 4)
    assert tasks.num_classes == len(sizes)

    place = DrawCoordinates("train", 5, np.arange(4))
    classes = choose(uniforms(tasks.seed, place, Purpose.TASK, ways), len(sizes))
    u = uniforms(tasks.seed, place, Purpose.DATA, ways * 3).reshape(4, ways, 3)
    for t in range(4):
        shown = np.zeros((3, ways))
        for w in range(ways):
            members = [i for i, label in enumerate(labels) if label == sorted(names)[classes[t, w]]]
            shown[:, w] = [members[j] for j in choose(u[t, w][None], len(members))[0]]
        assert batch.support_x[t].tolist() == shown[:1].ravel().tolist()
        assert batch.query_x[t].tolist() == shown[1:].ravel().tolist()


def test_the_draws_of_every_platform():
    batch = numbered(torch.arange(600) % 60, ways=5, shots=1, queries=1).sample(0, 2)
    assert batch.support_x.tolist() == [[312, 408, 328, 320, 553], [165, 211, 276, 138, 260]]
    assert batch.query_x.tolist() == [[132, 288, 568, 380, 433], [285, 571, 156, 558, 200]]


def test_classes_and_images_are_drawn_evenly():
    batch = numbered(torch.arange(40) % 8, ways=2, shots=1, queries=1).sample(0, 4000)
    for x in (batch.support_x, batch.query_x):
        counts = torch.bincount(x.flatten().long(), minlength=40).double()
        assert ((counts - 200) ** 2 / 200).sum() < 72.1  # chi-square, 99.9 % point, 39 degrees


def test_uint8_is_scaled_and_floats_are_kept():
    images, labels = torch.arange(0, 250, 10, dtype=torch.uint8).reshape(25, 1), torch.arange(25) % 5
    scaled = Episodes(images, labels, ways=5, shots=2, queries=3).sample(0, 1)
    assert scaled.support_x.dtype == torch.float32
    everything = torch.cat([scaled.support_x, scaled.query_x], 1).flatten()
    assert torch.equal(everything.sort().values, images.flatten().float() / 255)
    kept = Episodes(images.double() - 7, labels, ways=5, shots=2, queries=3).sample(0, 1)
    assert kept.query_x.dtype == torch.float64
    assert torch.equal((kept.query_x + 7).float() / 255, scaled.query_x)


def test_arrays_and_lists_are_taken():
    images = np.arange(12, dtype=np.uint8)
    from_arrays = Episodes(images, np.arange(12, dtype=np.int16) % 3, ways=3, shots=1, queries=1)
    from_lists = Episodes(torch.from_numpy(images), [i % 3 for i in range(12)], ways=3, shots=1, queries=1)
    assert torch.equal(from_arrays.sample(0, 4).query_x, from_lists.sample(0, 4).query_x)


def test_rotated_classes_are_new_classes():
    images = torch.rand(3 * 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    tasks = Episodes(images, torch.tensor([7, 7, 5, 5, 9, 9]), ways=12, shots=1, queries=1, rotations=True)
    assert tasks.num_classes == 12
    batch = tasks.sample(0, 3)
    classes = choose(uniforms(0, DrawCoordinates("train", 0, np.arange(3)), Purpose.TASK, 12), 12)
    for t in range(3):
        for w, number in enumerate(classes[t]):
            of_class = images[torch.tensor([[2, 3], [0, 1], [4, 5]][number % 3])]  # labels in order: 5, 7, 9
            turned = np.rot90(of_class.numpy(), number // 3, axes=(-2, -1))
            shown = torch.stack([batch.support_x[t, w], batch.query_x[t, w]]).numpy()
            assert np.array_equal(shown, turned) or np.array_equal(shown, turned[::-1])


def test_augmentation_by_counter():
    def shift(images, generator):
        return images + torch.rand(images.shape, generator=generator)

    labels = torch.arange(40) % 8
    plain = numbered(labels, ways=4, shots=1, queries=2)
    tasks = numbered(labels, ways=4, shots=1, queries=2, augment=shift)
    batch = tasks.sample(3, 4)
    assert torch.equal(batch.support_x.floor(), plain.sample(3, 4).support_x)
    added = torch.cat([batch.support_x, batch.query_x], 1) % 1
    assert len(added.unique()) == added.numel()
    again = tasks.sample(3, 4, rank=1, world_size=2)
    assert torch.equal(again.query_x, batch.query_x[2:])
    assert "shift" in tasks.describe()["augment"]


def test_augmentation_must_keep_the_shape():
    tasks = numbered(torch.arange(40) % 8, ways=4, shots=1, queries=2, augment=lambda images, _: images[:3])
    with pytest.raises(ValueError, match=r"shape it was given, \(12,\); got \(\(3,\)"):
        tasks.sample(0, 1)


def test_streams_share_the_images_and_pickles_draw_the_same():
    tasks = numbered(torch.arange(40) % 8, ways=4, shots=1, queries=2)
    assert tasks.with_stream("test")._images is tasks._images
    assert torch.equal(pickle.loads(pickle.dumps(tasks)).sample(2, 3).query_x, tasks.sample(2, 3).query_x)


def test_description_tells_data_apart():
    labels = torch.arange(40) % 8
    one, same, other = (
        numbered(y, ways=4, shots=1, queries=2).describe() for y in (labels, labels.clone(), labels.flip(0))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ways": 9}, ValueError, "ways=9 different classes; the data has 8"),
        ({"ways": 0}, ValueError, "ways must be >= 2"),
        ({"ways": 1}, ValueError, "ways must be >= 2, since one class leaves nothing to distinguish; got 1"),
        ({"shots": 1.5}, TypeError, "shots must be an integer"),
        ({"shots": 3, "queries": 3}, ValueError, r"shots \+ queries = 3 \+ 3 images of each class; class 0 has 5"),
        ({"labels": torch.arange(39)}, ValueError, r"images \[40, 1, 4, 5\] and labels \[39\]"),
        ({"labels": torch.rand(40)}, TypeError, "labels must be integers"),
        ({"labels": torch.ones(40, dtype=torch.bool)}, TypeError, "labels must be integers"),
        ({"images": torch.arange(40)}, TypeError, "images must be uint8"),
        ({"images": torch.zeros(0, 3), "labels": torch.zeros(0, dtype=torch.long)}, ValueError, "N >= 1"),
        ({"rotations": True}, ValueError, "square images"),
        ({"seed": "0"}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_arguments(change, error, message):
    good = {"images": torch.zeros(40, 1, 4, 5), "labels": torch.arange(40) % 8, "ways": 5, "shots": 1, "queries": 1}
    Episodes(**good)
    with pytest.raises(error, match=message):
        Episodes(**good | change)


@pytest.mark.parametrize("floating", [False, True])
def test_mean_and_standard_deviation(floating):
    images = torch.randint(0, 256, (600, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.double() + 1000 if floating else images
    tasks = Episodes(images, torch.arange(600) % 6, ways=5, shots=1, queries=1)
    x = images if floating else images.double() / 255
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in tasks.mean_and_std())
    torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(std, x.std((0, 2, 3), correction=0), rtol=1e-6, atol=0)
    assert tasks.mean_and_std() is tasks.mean_and_std()


def test_only_images_have_channels():
    with pytest.raises(ValueError, match=r"images \[C, H, W\] alone; these items are \[\]"):
        numbered(torch.arange(40) % 8, ways=4, shots=1, queries=2).mean_and_std()
