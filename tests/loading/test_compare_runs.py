"""`compare_runs`: runs that were trained in different ways, on the very same tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import write_splits
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, cli, compare_runs, evaluate, load, train
from metamom.nets import Conv4, SinusoidMLP
from metamom.tasks import FixedTasks, ImageFolder, LinearRegression, Omniglot, Sinusoid

WAYS, SIZE = 2, 16
FEW = {"tasks": 4, "steps": (0, 1)}
SMALL = ["--ways", "2", "--queries", "2", "--image-size", "16", "--iterations", "1", "--meta-batch", "1"]
SMALL += ["--evaluate-tasks", "2"]
COMMAND = {  # what differs from the first, and makes no difference to the tasks of a test
    "first": [],
    "trained otherwise": ["--augment", "crop,flip", "--rotations", "train", "--standardize", "none", "--seed", "3",
                          "--optimizer", "adam", "--estimator", "independent"],
    "larger and grey": ["--image-size", "20", "--channels", "1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_splits(tmp_path_factory.mktemp("photos") / "photos", train=3, validation=3, test=4)


def of_command(photos: Path, run: Path, *flags: str) -> Path:
    assert cli.main(["train", "images", "--root", str(photos), *SMALL, *flags, "--run-dir", str(run)]) == 0
    return run


def of_python(run: Path, model: torch.nn.Module, sampler: object, meta_batch: int = 2) -> Path:
    learner = MAML(model, F.cross_entropy if isinstance(model, Conv4) else F.mse_loss, inner_lr=0.1)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, sampler, iterations=1, meta_batch=meta_batch, run_dir=run, label=None)
    return run


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = {name: of_command(photos, folder / name, *flags) for name, flags in COMMAND.items()}
    sizes = {"ways": WAYS, "shots": 1, "queries": 2, "image_size": SIZE, "seed": 8}
    tasks = ImageFolder(photos, augment="flip", rotations=True, normalize=((0.5,) * 3, (0.3,) * 3), **sizes)
    model = Conv4(WAYS, 3, 8, image_size=SIZE, pooling="max")
    return found | {"python": of_python(folder / "python", model, tasks)}


@pytest.mark.parametrize("name", [*list(COMMAND)[1:], "python"])
def test_what_does_not_decide_the_tasks_may_differ(name, runs):
    first, other = runs["first"], runs[name]
    found = compare_runs([first, other], **FEW)
    samplers = [load(run).sampler("test", seed=0) for run in (first, other)]
    for run, sampler in zip((first, other), samplers, strict=True):  # each as it was trained
        alone = evaluate(load(run).learner, sampler, **FEW)
        assert torch.equal(found.compared.evaluations[str(run)].values, alone.values)
    batches = [sampler.sample(0, FEW["tasks"]) for sampler in samplers]
    drawn = [[*batch.support_x.flatten(0, 1), *batch.query_x.flatten(0, 1)] for batch in batches]
    for sampler, images in zip(samplers, drawn, strict=True):
        constants = sampler.constants or ([0.0], [1.0])
        mean, std = (torch.tensor(each)[:, None, None] for each in constants)
        images[:] = [x * std + mean for x in images]
    if name == "larger and grey":  # noise: an image is like no other but itself
        assert samplers[1].sample(0, 1).query_x.shape[2:] == (1, 20, 20)
        large = F.interpolate(torch.stack(drawn[0]).mean(1, keepdim=True), 20, mode="bicubic")
        alike = torch.corrcoef(torch.cat([large, torch.stack(drawn[1])]).flatten(1))[: len(large), len(large) :]
        assert alike.diagonal().min() > 0.8
    else:
        torch.testing.assert_close(*map(torch.stack, drawn), atol=1e-6, rtol=0)


def error(*runs: Path, **options: object) -> str:
    with pytest.raises(ValueError, match="was trained on other tasks than") as caught:
        compare_runs(runs, **FEW, **options)
    return str(caught.value)


def test_what_differs_is_said_in_full(runs, photos, tmp_path):
    first = runs["first"]
    two = of_command(photos, tmp_path / "two", "--shots", "2", "--queries", "1")
    start = f"{two} was trained on other tasks than {first}: "
    expected = start + "shots 2 for 1, queries 1 for 2. Choose the same for all: shots=1, queries=2."
    assert error(first, two) == expected
    assert len(compare_runs([first, two], shots=1, queries=2, **FEW).runs) == 2
    three = of_command(photos, tmp_path / "three", "--ways", "3")
    assert error(first, three).endswith(": ways 3 for 2. A learner distinguishes as many classes as it was trained "
                                        "on: compare runs of the same ways.")  # fmt: skip
    assert ": augment " in error(first, runs["trained otherwise"], split="train")
    others = write_splits(tmp_path / "others", train=3, validation=3, test=2)
    elsewhere = of_command(others, tmp_path / "elsewhere")
    expected = f": other data, {others} (8 images) for {photos} (16 images). Name one folder for all: root=DIR."
    assert error(first, elsewhere).endswith(expected)
    assert len(compare_runs([first, elsewhere], root=others, **FEW).runs) == 2


def test_tasks_of_other_families(tmp_path, runs):
    sine = of_python(tmp_path / "sine", SinusoidMLP(), Sinusoid(5, 5))
    noisy = of_python(tmp_path / "noisy", SinusoidMLP(), Sinusoid(5, 5, noise=0.1, seed=2))
    double = of_python(tmp_path / "double", SinusoidMLP(), Sinusoid(5, 5, dtype=torch.float64))
    linear = of_python(tmp_path / "linear", SinusoidMLP(), LinearRegression(1, 5))
    assert error(sine, noisy).endswith(
        ": noise 0.1 for 0.0. Choose one sampler for all, in Python: metamom.compare_runs(RUNS, sampler=...)."
    )
    assert ": family 'LinearRegression' for 'Sinusoid'. Choose one sampler" in error(sine, linear)
    found = compare_runs([sine, double], **FEW).compared.evaluations
    expected = evaluate(load(double).learner, Sinusoid(5, 5), **FEW)
    torch.testing.assert_close(found[str(double)].values, expected.values, check_dtype=False)
    thetas = (torch.arange(300.0).reshape(300, 1) + shift for shift in (0, 1))
    long = [
        of_python(tmp_path / f"long{i}", SinusoidMLP(), LinearRegression(1, 5, theta=theta), 300)
        for i, theta in enumerate(thetas)
    ]
    assert error(*long).endswith(
        f"{long[1]} was trained on other tasks than {long[0]}: other values of theta. Choose one sampler for all, in "
        "Python: metamom.compare_runs(RUNS, sampler=...)."
    )


def test_identity_of_tasks(data_root):
    """Samplers of one identity draw the same images."""
    train, test = ([Omniglot(data_root, split=split, rotations=turns) for turns in (True, False)] for split in
                   ("train", "test"))  # fmt: skip
    assert train[0].task_identity() != train[1].task_identity()
    assert test[0].task_identity() == test[1].task_identity()
    assert torch.equal(test[0].sample(0, 3).query_x, test[1].sample(0, 3).query_x)
    assert FixedTasks(test[0], 4).task_identity() == FixedTasks(test[1], 4).task_identity()
    assert FixedTasks(test[0], 4).task_identity() != FixedTasks(test[0], 5).task_identity()
