"""Runs of `metamom.train` on images in a folder: every command takes them, in another process and another folder."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command import the_error
from forked import in_folder, run_forked
from PIL import Image
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, cli, compare_runs, evaluate, load, load_weights, train
from metamom.nets import Conv4, ResNet12
from metamom.tasks import Episodes, FixedTasks, ImageFolder, from_dataset
from metamom.training.directory import read_config

WAYS, SIZE = 3, 20
OWN = """
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
"""


@pytest.fixture(autouse=True)
def same_weights() -> None:
    """From one initial value in twelve, the residual network with frozen statistics diverges."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Classes of one colour each, with noise."""
    root, draws = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 4), ("test", 4)):
        for number in range(count):
            folder = root / split / f"{split}{number}"
            folder.mkdir(parents=True)
            colour = draws.uniform(40, 215, 3)
            for i in range(20):
                pixels = (colour + draws.normal(0, 12, (24, 24, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def trained(run: Path, model: nn.Module, sampler: object, **options: object) -> Path:
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, sampler, iterations=2, meta_batch=2, run_dir=run, label=None, **options)
    return run


def images(photos: Path, split: str = "train", **options: object) -> ImageFolder:
    sizes = {"ways": WAYS, "shots": 1, "queries": 2, "image_size": SIZE}
    return ImageFolder(photos, split=split, **{**sizes, "normalize": "dataset", **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos) -> Path:
    tasks = images(photos, augment=["crop", "flip"], rotations=True)
    model = Conv4(WAYS, 3, 8, image_size=SIZE, pooling="max", running_statistics=True)
    return trained(tmp_path_factory.mktemp("python") / "run", model, tasks)


@pytest.fixture
def command(metamom, tmp_path, monkeypatch) -> Callable[..., str]:
    """The output of the command, in another folder."""

    def run(*arguments: object) -> str:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            said = metamom(*arguments)
        assert said.code == 0, said.err
        return said.out

    return run


def test_evaluate_draws_test_tasks_without_augmentation(run, photos, tmp_path, metamom):
    """In a process of its own, in another folder."""
    words = ["evaluate", str(run), "--tasks", "8", "--steps", "0,1", "--json", "--per-task"]
    ((status, answered),) = run_forked(in_folder, 1, tmp_path / "said", tmp_path, *words)
    assert status == 0, answered
    answer = json.loads(answered)
    constants = images(photos).constants
    tasks = images(photos, "test", normalize=constants, rotations=True)
    expected = evaluate(load(run).learner, tasks, tasks=8, steps=(0, 1), stream="test")
    torch.testing.assert_close(torch.tensor(answer["values"]), expected.values, check_dtype=False)
    said = metamom("evaluate", run, "--tasks", "8", "--steps", "1", "--baselines", "--baseline-steps", "2")
    assert "from scratch, 2 steps" in said.out
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    again = metamom("evaluate", run, "--tasks", "8", "--steps", "0,1", "--json", "--data-root", moved)
    assert json.loads(again.out)["mean"] == answer["mean"], "the same images in another place"


def test_training_tasks_are_those_of_training(run, photos, metamom):
    tasks = images(photos, augment=["crop", "flip"], rotations=True)
    found = load(run).sampler("train")
    assert found.describe() == tasks.describe()
    assert torch.equal(found.sample(3, 2).support_x, tasks.sample(3, 2).support_x)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        said = metamom("evaluate", run, "--tasks", "2", "--steps", "0", "--split", "train")
    assert "no accuracy on new classes" in said.err


def test_bias_is_measured_on_the_training_tasks(run, command):
    arguments = ["--inner-batch", "1,2", "--tasks", "3", "--json"]
    answer = json.loads(command("bias", run, *arguments))
    assert [at["inner_batch"] for at in answer["sizes"]] == [1, 2]
    assert answer["draws"] == 3


def test_compare_takes_runs_of_both_kinds(run, photos, tmp_path, command, metamom):
    other = tmp_path / "command"
    arguments = ["--root", photos, "--ways", WAYS, "--queries", "2", "--image-size", SIZE, "--iterations", "2"]
    arguments += ["--meta-batch", "2", "--evaluate-tasks", "4", "--rotations", "train"]
    assert cli.main(["train", "images", *map(str, arguments), "--run-dir", str(other)]) == 0
    found = json.loads(command("compare", run, other, "--tasks", "4", "--steps", "1", "--json"))
    assert list(found["runs"]) == [str(run), str(other)]
    alone = json.loads(metamom("evaluate", run, "--tasks", "4", "--steps", "1", "--json").out)
    assert found["runs"][str(run)]["mean"] == alone["mean"]


def test_adapt_and_export(run, photos, tmp_path, command):
    weights = tmp_path / "weights.safetensors"
    out = tmp_path / "predictions.csv"
    support = tmp_path / "support"
    for number in range(WAYS):
        shutil.copytree(photos / "test" / f"test{number}", support / f"test{number}")
    command("adapt", run, "--support", "support", "--predict", photos / "test", "--steps", "3", "--out", out)
    learner = load(run).learner
    constants = images(photos).constants
    tasks = images(photos, "test", ways=WAYS, normalize=None)
    everything = tasks._store.read(np.arange(20 * 4))  # in the order of their names
    x = (torch.from_numpy(everything) / 255 - torch.tensor(constants.mean)[:, None, None]) / torch.tensor(
        constants.std
    )[:, None, None]
    labels = torch.arange(WAYS).repeat_interleave(20)
    expected = learner.fit_predict(x[: 20 * WAYS], labels, x, steps=3)[:, :WAYS].softmax(-1).max(-1).values
    with out.open(newline="") as file:
        found = torch.tensor([float(row["probability"]) for row in csv.DictReader(file)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    command("export", run, weights, "--tasks", "4")
    card = json.loads(weights.with_suffix(".json").read_text())
    assert card["data"]["family"] == "ImageFolder"
    assert card["evaluation"]["tasks"] == 4
    assert str(photos) not in json.dumps(card), "the card says what the weights are, not where the data was"
    model = load_weights(Conv4(WAYS, 3, 8, image_size=SIZE, pooling="max", running_statistics=True), weights)
    assert all(map(torch.equal, model.state_dict().values(), load(run).learner.model.state_dict().values()))


def test_a_model_of_the_users_own(photos, tmp_path, metamom, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_nets.py").write_text(OWN)
    made = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3))
    run = trained(tmp_path / "run", made, images(photos))
    model = ["--model", "own_nets:net"]
    assert metamom("evaluate", run, *model, "--tasks", "4", "--steps", "1").code == 0
    assert metamom("bias", run, *model, "--tasks", "3", "--inner-batch", "1", "--json").code == 0
    assert metamom("export", run, "weights.safetensors", *model).code == 0
    shutil.copytree(photos / "test", tmp_path / "support")
    shutil.rmtree(tmp_path / "support" / "test3")
    said = metamom("adapt", run, *model, "--support", "support", "--predict", photos / "test" / "test3")
    assert "adapted to 3 classes, 60 images" in said.out
    assert "--model" in the_error(metamom("adapt", run, "--support", "support", "--predict", "support"))


MODELS = {
    "conv4": lambda: Conv4(WAYS, 3, 8),
    "pooled": lambda: Conv4(WAYS, 3, 8, image_size=SIZE, pooling="max"),
    "pooled, running statistics": lambda: Conv4(
        WAYS, 3, 8, image_size=SIZE, pooling="max", running_statistics=True
    ).eval(),
    "resnet12": lambda: ResNet12(WAYS, 3, (4, 6, 8, 10)),
    "resnet12, running statistics": lambda: ResNet12(
        WAYS, 3, (4, 6, 8, 10), drop_rate=0.25, running_statistics=True
    ).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_of_metamom_are_made_again(name, photos, tmp_path):
    run = trained(tmp_path / "run", MODELS[name](), images(photos))
    loaded = load(run)
    assert str(loaded.learner.model) == read_config(run)["settings"]["model"]
    tasks = loaded.sampler("test")
    with torch.no_grad():
        again = load(run, model=MODELS[name]).learner
        ours, theirs = (evaluate(each, tasks, tasks=4, steps=(1,)) for each in (loaded.learner, again))
    assert torch.equal(ours.values, theirs.values)
    assert ours.norm == theirs.norm


@pytest.mark.parametrize(
    "make",
    [lambda tasks: FixedTasks(tasks, 4), lambda tasks: tasks],
    ids=["fixed tasks", "tasks"],
)
def test_splits_as_lists_in_one_tree(make, photos, tmp_path, metamom):
    tree = tmp_path / "tree"
    for folder in sorted(photos.glob("*/*")):
        shutil.copytree(folder, tree / folder.name)
    splits = {name: [f"{name}{i}" for i in range(4)] for name in ("train", "test")}
    (tree / "validation.txt").write_text("validation0\nvalidation1\nvalidation2\n")
    tasks = images(tree, splits={**splits, "validation": "validation.txt"})
    run = trained(tmp_path / "run", Conv4(WAYS, 3, 8), make(tasks))
    loaded = load(run)
    assert loaded.sampler("test").classes == ("test0", "test1", "test2", "test3")
    assert loaded.sampler("validation").classes == ("validation0", "validation1", "validation2")
    answer = json.loads(metamom("bias", run, "--tasks", "3", "--inner-batch", "1", "--json").out)
    assert answer["draws"] == 3


def own_augmentation(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 1 - x


def test_an_augmentation_of_the_users_own_stays_in_training(photos, tmp_path, metamom):
    run = trained(tmp_path / "run", Conv4(WAYS, 3, 8), images(photos, augment=own_augmentation))
    assert metamom("evaluate", run, "--tasks", "4", "--steps", "1").code == 0
    assert "own_augmentation" in the_error(metamom("bias", run, "--inner-batch", "1", "--tasks", "3"))


def test_tasks_that_a_run_cannot_recreate(photos, tmp_path, metamom):
    x, y = torch.rand(24, 3, SIZE, SIZE), torch.arange(24) % 4
    runs = [
        trained(tmp_path / "episodes", Conv4(WAYS, 3, 8), Episodes(x, y, ways=WAYS, shots=1, queries=2)),
        trained(
            tmp_path / "dataset",
            Conv4(WAYS, 3, 8),
            from_dataset(torch.utils.data.TensorDataset(x, y), ways=WAYS, shots=1, queries=2),
        ),
    ]
    for run in runs:
        assert "pass your sampler" in the_error(metamom("evaluate", run))
        assert "image files" in the_error(metamom("adapt", run, "--support", photos / "test", "--predict", photos))
        assert metamom("export", run, f"{run}.safetensors").code == 0
    tasks = Episodes(x, y, ways=WAYS, shots=1, queries=2)
    found = compare_runs(runs, sampler=tasks, tasks=4, steps=(1,))
    alone = load(runs[1]).learner
    expected = evaluate(alone, tasks, tasks=4, steps=(1,), stream="test")
    assert torch.equal(found.compared.evaluations[str(runs[1])].values, expected.values)
    with pytest.raises(ValueError, match="the sampler decides the tasks; got ways as well"):
        compare_runs(runs, sampler=tasks, ways=2)


def test_a_run_goes_on_with_its_images_elsewhere(run, photos, tmp_path):
    moved, copy = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(photos, moved)
    shutil.copytree(run, copy)
    tasks = images(moved, augment=["crop", "flip"], rotations=True)
    model = Conv4(WAYS, 3, 8, image_size=SIZE, pooling="max", running_statistics=True)
    trained(copy, model, tasks, resume=True)
    assert read_config(copy)["settings"]["location"] == {"root": str(moved)}
    assert read_config(run)["settings"]["location"] == {"root": str(photos)}
