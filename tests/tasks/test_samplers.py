"""One suite for every sampler: what comes out depends on the place asked for and on nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from cases import loop_over
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import SIZE, write_class
from torch.utils.data import TensorDataset

from metamom.batch import Sampler, TaskBatch
from metamom.tasks import (
    Episodes,
    FixedTasks,
    ImageFolder,
    LinearRegression,
    Omniglot,
    PerWorker,
    Quadratic,
    Sinusoid,
    from_dataset,
)
from metamom.tasks.dataset import DatasetEpisodes
from metamom.tasks.episodic import EpisodicFamily

WAYS, SHOTS, QUERIES = 5, 2, 3
Make = Callable[[int], Sampler]


@cache
def numbered_images() -> tuple[torch.Tensor, torch.Tensor]:
    """80 classes of 9 images, every pixel another number: draws, and rotations, can be distinguished."""
    return torch.arange(720 * 16, dtype=torch.float32).reshape(720, 1, 4, 4), torch.arange(720) % 80


def episodes(seed: int) -> Episodes:
    return Episodes(*numbered_images(), ways=WAYS, shots=SHOTS, queries=QUERIES, seed=seed, rotations=True)


def dataset_episodes(seed: int) -> DatasetEpisodes:
    dataset = TensorDataset(*numbered_images())
    return from_dataset(dataset, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=seed)


def sinusoid(seed: int) -> Sinusoid:
    return Sinusoid(shots=4, queries=6, noise=0.1, seed=seed)


def linear(seed: int, **options: Any) -> LinearRegression:
    return LinearRegression(3, 4, 6, **{"noise": 0.1, **options}, seed=seed)


def linear_of_data(seed: int, **options: Any) -> LinearRegression:
    numbers = torch.arange(4000.0).reshape(1000, 4)
    return LinearRegression(3, 4, 6, data=(numbers[:, :3], numbers[:, 3]), **options, seed=seed)


def quadratic(seed: int, **options: Any) -> Quadratic:
    return Quadratic(2, 4, 6, gradient_noise=0.1, hessian_noise=0.2, **options, seed=seed)


MAKERS: dict[str, Make] = {
    "Sinusoid": sinusoid,
    "Episodes": episodes,
    "from_dataset": dataset_episodes,
    "LinearRegression": linear,
    "LinearRegression with random covariances": lambda seed: linear(seed, spectrum=(0.2, 2)),
    "LinearRegression of data": linear_of_data,
    "LinearRegression of data without replacement": lambda seed: linear_of_data(seed, replacement=False),
    "Quadratic": quadratic,
    "Quadratic with random Hessians": lambda seed: quadratic(seed, spectrum=(0.2, 2)),
    "FixedTasks of given LinearRegression": lambda seed: FixedTasks(linear(seed, theta=torch.eye(12)[:, :3]), 12),
    "PerWorker of LinearRegression": lambda seed: PerWorker([linear(seed), linear(seed, theta_std=3.0)]),
    "FixedTasks of Sinusoid": lambda seed: FixedTasks(sinusoid(seed), 12),
    "FixedTasks of Episodes": lambda seed: FixedTasks(episodes(seed), 12),
    "PerWorker of Sinusoid": lambda seed: PerWorker([sinusoid(seed), Sinusoid(4, 6, amplitude=(8, 9), seed=seed)]),
    "PerWorker of Episodes": lambda seed: PerWorker([episodes(seed)] * 3),
    "PerWorker of FixedTasks": lambda seed: PerWorker([FixedTasks(sinusoid(seed), 6), FixedTasks(sinusoid(seed), 6)]),
}


@pytest.fixture(scope="module", params=[*MAKERS, "ImageFolder", "Omniglot", "Omniglot within an alphabet"])
def make(request, tmp_path_factory) -> Make:
    """``make(seed)``: one of the samplers."""
    if request.param == "ImageFolder":
        root = tmp_path_factory.mktemp("images")
        for number in range(40):
            write_class(root / "train" / str(number), number, images=9)

        @lru_cache
        def image_folder(seed: int) -> ImageFolder:
            options = {"image_size": SIZE, "rotations": True, "augment": ["crop", "jitter"], "seed": seed}
            return ImageFolder(root, ways=WAYS, shots=SHOTS, queries=QUERIES, **options)

        return image_folder
    if not request.param.startswith("Omniglot"):
        return MAKERS[request.param]
    root = request.getfixturevalue("data_root")

    @lru_cache
    def omniglot(seed: int) -> Omniglot:
        within, sizes = "within" in request.param, {"ways": WAYS, "shots": SHOTS, "queries": QUERIES}
        return Omniglot(root, split="background", **sizes, seed=seed, within_alphabet=within)

    return omniglot


def workers(sampler: Sampler) -> int:
    return len(sampler.samplers) if isinstance(sampler, PerWorker) else 1


def is_episodic(sampler: Sampler) -> bool:
    inner = sampler.samplers[0] if isinstance(sampler, PerWorker) else sampler
    return isinstance(inner.family if isinstance(inner, FixedTasks) else inner, EpisodicFamily)


def has_fixed_tasks(sampler: Sampler) -> bool:
    return isinstance(sampler.samplers[0] if isinstance(sampler, PerWorker) else sampler, FixedTasks)


def assert_equal(a: TaskBatch, b: TaskBatch) -> None:
    for name, x, y in zip(TaskBatch._fields, a, b, strict=True):
        assert (x is None and y is None) or torch.equal(x, y), f"{name} differs"


def tasks_of(batch: TaskBatch) -> list[bytes]:
    """Every task as bytes, to count different ones."""
    return [b"".join(x.contiguous().numpy().tobytes() for x in task) for task in zip(*batch[:4], strict=True)]


def test_is_a_sampler(make):
    assert isinstance(make(0), Sampler)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_blocks_of_any_number_of_processes_make_the_whole(make, data):
    sampler = make(0)
    n = workers(sampler)
    world_size = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 6, 12) if math.lcm(w, n) <= 12]))
    num_tasks = math.lcm(world_size, n) * data.draw(st.integers(1, 12 // math.lcm(world_size, n)))
    step = data.draw(st.integers(0, 10**9))
    whole = sampler.sample(step, num_tasks)
    parts = [sampler.sample(step, num_tasks, rank=r, world_size=world_size) for r in range(world_size)]
    fields = (None if f[0] is None else torch.cat(f) for f in zip(*parts, strict=True))
    assert_equal(TaskBatch(*fields), whole)
    for part, block in zip(parts, whole.split(world_size), strict=True):
        assert_equal(part, block)


@settings(deadline=None, max_examples=10)
@given(steps=st.lists(st.integers(0, 50), min_size=2, max_size=5))
def test_the_order_of_asking_is_irrelevant(make, steps):
    sampler = make(0)
    asked = {step: sampler.sample(step, 6) for step in steps}
    for step in reversed(steps):
        assert_equal(asked[step], make(0).sample(step, 6))


def test_a_smaller_batch_begins_a_larger_one(make):
    sampler = make(0)
    if workers(sampler) > 1:
        pytest.skip("a worker's block moves with the size of the meta-batch")
    assert_equal(sampler.sample(4, 3), sampler.sample(4, 9).part(0, 3))


def test_no_task_repeats_another(make):
    seen = [
        task
        for seed in (0, 1, 2)
        for stream in ("train", "validation")
        for step in range(8)
        for task in tasks_of(make(seed).with_stream(stream).sample(step, 12))
    ]
    assert len(set(seen)) == len(seen) == 3 * 2 * 8 * 12


def test_streams_and_seeds_differ_throughout(make):
    base = make(0)
    for other in (base.with_stream("elsewhere"), make(1)):
        assert not set(tasks_of(base.sample(0, 12))) & set(tasks_of(other.sample(0, 12)))
    assert_equal(base.sample(0, 6), make(0).sample(0, 6))  # and the original is unchanged


def test_shapes_and_types(make):
    sampler = make(0)
    batch = sampler.sample(0, 6)
    support, query = (WAYS * SHOTS, WAYS * QUERIES) if is_episodic(sampler) else (4, 6)
    assert batch.num_tasks == 6
    assert batch.support_x.shape[:2] == (6, support)
    assert batch.query_x.shape[:2] == (6, query)
    assert batch.support_x.shape[2:] == batch.query_x.shape[2:]
    assert batch.support_x.dtype == batch.query_x.dtype == torch.float32
    assert batch.support_y.dtype == (torch.int64 if is_episodic(sampler) else torch.float32)
    target = () if is_episodic(sampler) else (2, 4) if isinstance(sampler, Quadratic) else (1,)
    assert batch.support_y.shape == (6, support, *target)
    assert batch.query_y.shape == (6, query, *target)
    if has_fixed_tasks(sampler):
        assert batch.task_ids.shape == (6,)
        assert batch.task_ids.dtype == torch.int64
        assert len(batch.task_ids.unique()) == 6
    else:
        assert batch.task_ids is None


def test_sets_are_ordered_shot_by_shot_and_disjoint(make):
    sampler = make(0)
    if not is_episodic(sampler):
        pytest.skip("regression")
    batch = sampler.sample(2, 12)
    for y, count in ((batch.support_y, SHOTS), (batch.query_y, QUERIES)):
        assert y.tolist() == [list(range(WAYS)) * count] * 12
    for support, query in zip(batch.support_x, batch.query_x, strict=True):
        images = torch.cat([support, query]).flatten(1)
        assert len(images.unique(dim=0)) == len(images)


BAD_PLACES = [
    ({"step": -1, "num_tasks": 6}, "step"),
    ({"step": 0, "num_tasks": 0}, "the number of tasks must be >= 1; got 0"),
    ({"step": 0, "num_tasks": 6, "world_size": 5}, "equal blocks"),
    ({"step": 0, "num_tasks": 6, "world_size": 2, "rank": 2}, "rank must be in 0..1"),
]


@loop_over(place=BAD_PLACES)
def test_bad_places(make, place):
    arguments, message = place
    with pytest.raises(ValueError, match=message):
        make(0).sample(**arguments)


def test_description_is_json(make):
    description = make(3).describe()
    assert json.loads(json.dumps(description)) == description
    assert description != make(4).describe()
