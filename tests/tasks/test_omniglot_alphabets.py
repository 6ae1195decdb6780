"""Omniglot within one alphabet: random tasks, and the published runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_omniglot import NAMES, SIDE, in_place_of_omniglot, members, write_zip
from torch import Tensor
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, evaluate, train
from metamom.experiments.python_tasks import known_sampler
from metamom.experiments.recipes import Recipe
from metamom.nets import Conv4
from metamom.rng import DrawCoordinates
from metamom.tasks import FixedTasks, Omniglot, OmniglotRuns, omniglot
from metamom.tasks.omniglot_runs import published_runs
from metamom.tasks.omniglot_splits import split_characters
from metamom.training.directory import read_config

SMALL = {"split": "background", "image_size": SIDE, "within_alphabet": True}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A data root with three characters of each of two alphabets, in a cache of its own."""
    in_place_of_omniglot(monkeypatch, tmp_path / "cache")
    write_zip(tmp_path / "root" / "omniglot" / "images_background.zip", members())
    return tmp_path / "root"


def classes_of(tasks: Omniglot, count: int) -> tuple[Tensor, Tensor]:
    """The character and the rotation of each class of tasks of step 0, ``[count, ways]``, found by their images."""
    every = tasks._images.view(tasks.num_classes, -1, *tasks._images.shape[1:]).float() / 255
    x = tasks.sample(0, count).support_x[:, : tasks.ways]
    same = (x[:, :, None, None] == every).flatten(4).all(-1)  # [count, ways, classes, drawings]
    found = same.any(-1).long()
    assert bool((found.sum(-1) == 1).all())
    number = found.argmax(-1)
    return number % len(tasks.characters), number // len(tasks.characters)


@pytest.mark.parametrize("rotations", [True, False])
def test_tasks_stay_within_one_alphabet_and_one_rotation(tiny, rotations):
    tasks = Omniglot(tiny, **SMALL, ways=2, rotations=rotations)
    characters, turns = classes_of(tasks, 960)
    assert bool((turns == turns[:, :1]).all())
    assert bool((characters // 3 == characters[:, :1] // 3).all())
    assert bool((characters[:, 0] != characters[:, 1]).all())
    # 2 alphabets x rotations, then 3 x 2 ordered pairs: every kind of task is as likely
    kinds = (turns[:, 0] * 2 + characters[:, 0] // 3) * 9 + characters[:, 0] % 3 * 3 + characters[:, 1] % 3
    counts = kinds.unique(return_counts=True)[1].double()
    wanted = (4 if rotations else 1) * 12
    assert len(counts) == wanted
    statistic = float((counts - 960 / wanted).square().sum() / (960 / wanted))
    assert statistic < (wanted - 1) + 4 * (2 * (wanted - 1)) ** 0.5  # of a chi-square distribution


def test_a_slow_twin_draws_the_same_classes(tiny):
    """The first number picks alphabet and rotation, the others the characters, as `choose` does."""
    tasks = Omniglot(tiny, **SMALL, ways=3)
    places = DrawCoordinates("background", 5, np.arange(20, dtype=np.int64))
    u = omniglot.uniforms(0, places, omniglot.Purpose.TASK, 4)
    for row, numbers in zip(tasks._classes(places).tolist(), u.tolist(), strict=True):
        drawn = int(numbers[0] * 8)
        turn, alphabet = drawn // 2, drawn % 2
        left, chosen = [0, 1, 2], []
        for j, number in enumerate(numbers[1:]):
            at = j + int(number * (3 - j))
            left[j], left[at] = left[at], left[j]
            chosen.append(left[j])
        assert row == [turn * 6 + alphabet * 3 + character for character in chosen]


def test_small_alphabets_are_left_out(tiny, monkeypatch):
    monkeypatch.setattr(omniglot, "split_characters", lambda split: NAMES[:-1])
    tasks = Omniglot(tiny, **SMALL, ways=3)
    assert tasks.drawn_alphabets == ("Alpha",)
    assert Omniglot(tiny, **SMALL, ways=2).drawn_alphabets == ("Alpha", "Beta_(b)")
    assert set(classes_of(tasks, 12)[0].flatten().tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="needs one with ways=4 characters; those of the split 'background' have at"):
        Omniglot(tiny, **SMALL, ways=4)
    with pytest.raises(TypeError, match="within_alphabet must be"):
        Omniglot(tiny, **SMALL | {"within_alphabet": "yes"}, ways=2)


def test_ranks_streams_and_fixed_tasks(tiny):
    tasks = Omniglot(tiny, **SMALL, ways=2)
    whole = tasks.sample(3, 8)
    for rank in range(4):
        assert torch.equal(tasks.sample(3, 8, rank=rank, world_size=4).query_x, whole.query_x[2 * rank : 2 * rank + 2])
    assert not torch.equal(tasks.with_stream("other").sample(3, 8).query_x, whole.query_x)
    fixed = FixedTasks(tasks, 8).sample(0, 8)
    assert fixed.support_x.shape == whole.support_x.shape


def test_descriptions_of_others_stay_as_they_were(tiny):
    """Runs of earlier versions go on."""
    options = SMALL | {"within_alphabet": False}
    assert "within_alphabet" not in Omniglot(tiny, **options, ways=2).describe()
    assert Omniglot(tiny, **SMALL, ways=2).describe()["within_alphabet"] is True
    assert Recipe("omniglot").settings()["within_alphabet"] is None


def test_a_run_of_train_makes_its_tasks_again(tiny, tmp_path):
    tasks = Omniglot(tiny, **SMALL, ways=2)
    learner = MAML(Conv4(2, hidden=2), F.cross_entropy)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1)
    train(learner, optimizer, tasks, iterations=1, meta_batch=2, run_dir=tmp_path / "run")
    settings = read_config(tmp_path / "run")["settings"]
    again = known_sampler(settings, "background", root=str(tiny))
    assert again is not None
    assert again.describe() == tasks.describe()
    assert "within_alphabet" not in known_sampler(settings, "test", root=str(tiny), within_alphabet=False).describe()


def test_the_real_alphabets(data_root):
    """The numbers in the docstring."""
    sizes = {(split, ways): 0 for split in ("test", "background", "evaluation") for ways in (5, 20)}
    for split, ways in sizes:
        sizes[split, ways] = len(omniglot.Alphabets.of(split_characters(split), ways).names)
    expected = {("test", 5): 40, ("test", 20): 0, ("background", 5): 30, ("background", 20): 26}
    assert sizes == expected | {("evaluation", 5): 20, ("evaluation", 20): 20}
    tasks = Omniglot(data_root, split="evaluation", ways=20, within_alphabet=True)
    assert len(tasks.drawn_alphabets) == 20
    recipe = Recipe("omniglot", ways=20, within_alphabet=True)
    with pytest.warns(UserWarning, match="no alphabet has 20 of the 100 characters of the validation split"):
        validation = recipe.sampler("validation", root=str(data_root))
    assert not validation.within_alphabet  # type: ignore[union-attr]


# The published runs


def test_the_list_of_runs():
    runs = published_runs()
    assert len(runs) == 20
    evaluation = set(split_characters("evaluation"))
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        assert first.characters == second.characters
        assert len(set(first.characters)) == 20
        assert set(first.characters) <= evaluation
        assert {name.split("/")[1] for name in first.characters} == {first.alphabet}
        assert len({*first.drawers, *second.drawers}) == 4  # of different people
    assert len({run.alphabet for run in runs}) == 10
    assert all(1 <= drawer <= 20 for run in runs for drawer in run.drawers)


def test_runs_hold_the_listed_drawings(data_root):
    batch, runs = OmniglotRuns(data_root).sample(7, 20), published_runs()
    for number in (0, 6, 13, 19):
        run = runs[number]
        every = Omniglot(data_root, split="evaluation", alphabets=[run.alphabet], rotations=False)
        rows = [every.characters.index(name) for name in run.characters]
        images = every._images.view(len(every.characters), 20, 1, 28, 28)[rows].float() / 255
        assert torch.equal(batch.support_x[number], images[:, run.drawers[0] - 1])
        assert torch.equal(batch.query_x[number], images[:, run.drawers[1] - 1])
        assert batch.support_y[number].tolist() == batch.query_y[number].tolist() == list(range(20))
    mine = OmniglotRuns(data_root).sample(0, 20, rank=1, world_size=2)
    assert torch.equal(mine.query_x, batch.query_x[10:])
    with pytest.raises(ValueError, match="there are 20 published runs; got a batch with task 21"):
        OmniglotRuns(data_root).sample(0, 21)


def test_a_learner_is_evaluated_on_the_runs(data_root):
    learner = MAML(Conv4(20, hidden=2, generator=torch.Generator().manual_seed(0)), F.cross_entropy, inner_lr=0.4)
    found = evaluate(learner, OmniglotRuns(data_root), tasks=20, steps=(1,))
    assert found.values.shape == (1, 20)
    assert 0.05 < found.mean[0] < 0.6


@pytest.mark.slow
def test_the_published_baseline_has_its_published_error(data_root):
    """The publishers' demonstration: by the modified Hausdorff distance of ink, 38.8 % error over the 20 runs."""
    batch, wrong = OmniglotRuns(data_root, image_size=105).sample(0, 20), 0
    for support, query in zip(batch.support_x, batch.query_x, strict=True):
        inks = [[_ink(image) for image in images] for images in (support, query)]
        for label, ink in enumerate(inks[1]):
            distances = [_modified_hausdorff(ink, other) for other in inks[0]]
            wrong += distances.index(min(distances)) != label
    assert wrong / 400 == pytest.approx(0.388, abs=0.001)


def _ink(image: Tensor) -> Tensor:
    places = (image[0] > 0.5).nonzero().double()
    return places - places.mean(0)


def _modified_hausdorff(a: Tensor, b: Tensor) -> float:
    distances = torch.cdist(a, b)
    return max(float(distances.min(1).values.mean()), float(distances.min(0).values.mean()))
