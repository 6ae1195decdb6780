"""The paper's experiments: against the authors' files, and against plain loops over nodes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paper_runs import FASHION, SMALL, made, small_mlp
from torch import nn
from torch.nn import functional as F

from metamom.bias import Clip, Identity, Normalize, TopK, parse
from metamom.experiments.paper import nodes, published
from metamom.experiments.paper.run import reproduce
from metamom.experiments.paper.training import Training
from metamom.tasks.images import LabelledImages


def small_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))


NORMED = replace(FASHION, model=small_normed)


def plain_loop(experiment, train, test, n, lr, beta, operator, seed, epochs):
    """The protocol as one would write it down: a loop over nodes, SGD with dampening, the global generator."""
    torch.manual_seed(seed)
    model = experiment.model().to(train.images.dtype)
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=1 - beta, dampening=1 - beta)
    per = len(train.labels) // n

    def batches(data):
        if experiment.flips:  # a DataLoader draws a seed for its workers, RandomHorizontalFlip a number for each image
            torch.empty((), dtype=torch.int64).random_()
        for first in range(0, len(data.labels), per):
            x = data.images[first : first + per].unsqueeze(1).expand(-1, experiment.channels, -1, -1)
            if experiment.flips:
                x = torch.stack([image.flip(-1) if torch.rand(1) < 0.5 else image for image in x])
            yield x, data.labels[first : first + per]

    rows = []
    for _ in range(epochs):
        model.train()
        total, loss_sum, hits = torch.zeros(sum(sizes), dtype=train.images.dtype), 0.0, 0
        for x, y in batches(train):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            total += operator(gradient, sizes=sizes)
            loss_sum += loss.item() * len(y)
            hits += int((logits.argmax(1) == y).sum())
        for p, g in zip(parameters, (total / n).split(sizes), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()
        model.eval()
        test_loss, test_hits = 0.0, 0
        with torch.no_grad():
            for x, y in batches(test):
                logits = model(x)
                test_loss += F.cross_entropy(logits, y).item() * len(y)
                test_hits += int((logits.argmax(1) == y).sum())
        count, tested = len(train.labels), len(test.labels)
        rows.append((loss_sum / count, hits / count, test_loss / tested, test_hits / tested))
    return rows, model


@pytest.fixture
def global_generator():
    """A test that seeds torch's generator leaves it as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.usefixtures("global_generator")
@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("operator", [Identity(), TopK(20), Clip(0.1), Normalize(per_tensor=True)], ids=repr)
@pytest.mark.parametrize("beta", [1.0, 0.2])
@pytest.mark.parametrize("experiment", [SMALL, NORMED], ids=["together", "in order"])
def test_as_the_plain_loop(experiment, beta, operator, chunk):
    train, test = made(30, 1), made(14, 2)
    rows, model = plain_loop(experiment, train, test, 6, 0.3, beta, operator, seed=5, epochs=4)
    ours = Training(experiment, train, test, nodes=6, lr=0.3, beta=beta, bias=operator, seed=5, chunk=chunk)
    for epoch, row in enumerate(rows):
        assert ours.epoch() == pytest.approx(row, abs=1e-10), f"epoch {epoch}"  # float64: sums in another order
    for name, value in model.state_dict().items():  # weights, and running statistics node after node
        assert torch.allclose(ours.model.state_dict()[name].double(), value.double(), atol=1e-10, rtol=0), name


def test_gradients_together_are_those_in_order():
    torch.set_grad_enabled(True)
    model = small_mlp().double()
    data = made(20, 3)
    x, y = data.images.view(5, 4, 1, 3, 4), data.labels.view(5, 4)
    sizes = [p.numel() for p in model.parameters()]
    fast, slow = torch.full((2, 5, sum(sizes)), torch.nan, dtype=torch.float64)
    seen = nodes.gradients_together(model, x, y, fast), nodes.gradients_in_order(model, x, y, slow)
    for name, a, b in zip(dict(model.named_parameters()), fast.split(sizes, 1), slow.split(sizes, 1), strict=True):
        assert torch.allclose(a, b, atol=1e-13, rtol=0), f"{name}: {(a - b).abs().max()}"
    assert torch.allclose(seen[0].loss, seen[1].loss, atol=1e-13, rtol=0)
    assert torch.equal(seen[0].hits, seen[1].hits)


def test_the_weights_of_a_seed_without_touching_the_global_generator():
    before = torch.get_rng_state()
    model, draws = SMALL.initial(7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = small_mlp()
        following = torch.rand(3)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(torch.rand(3, generator=draws), following)


def test_random_operators_and_error_feedback_by_worker():
    train, test = made(24, 1), made(6, 2)
    for spec in ("randk:20", "qsgd:4", "ef21:topk:5%", "ef14:topk:20", "ef21:randk:20"):
        whole, parts = (
            Training(SMALL, train, test, nodes=6, lr=0.1, beta=0.5, bias=parse(spec), seed=0, chunk=chunk)
            for chunk in (6, 2)
        )
        for _ in range(3):
            assert parts.epoch() == pytest.approx(whole.epoch(), abs=1e-10), spec


def test_resnet18_mechanics():
    """The real model on a few images: three channels, running statistics in training mode."""
    generator = torch.Generator().manual_seed(0)
    data = [LabelledImages(torch.randn(8, 28, 28, generator=generator), torch.arange(8)) for _ in range(2)]
    ours = Training(FASHION, *data, nodes=2, lr=0.1, beta=0.1, bias=TopK(ratio=0.01), seed=0)
    assert ours.parameters == 11_181_642
    assert ours.operator.kept(ours.parameters) == 111_816
    assert ours.chunk == 1
    first = ours.epoch()
    assert 2 < first.train_loss < 4
    assert int(ours.model.state_dict()["bn1.num_batches_tracked"]) == 2
    assert not ours.model.training


# -- the authors' results -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def paper(data_root) -> Path:
    folder = data_root.parent / "reference" / "paper"
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference" / "paper"
    for there in (folder, beside):
        if (there / "mnist_runs").is_dir():
            return there
    pytest.skip(f"none of the authors' results in {folder} or {beside}")


def names() -> list[str]:
    operators = ("", "_TopK_33500", "_ClipNorm_1.0", "_Norm")
    rules = ("SGD_lr_0.5", "SGDM_lr_0.5_beta_0.1")
    return [f"{rule}{operator}_seed_{seed}" for rule in rules for operator in operators for seed in (0, 1)]


@pytest.mark.parametrize(
    ("name", "epochs"),
    [
        ("SGDM_lr_0.5_beta_0.1_TopK_33500_seed_0", 2),
        # SGD amplifies rounding
        *(pytest.param(name, 10 if "SGDM" in name else 5, marks=pytest.mark.slow) for name in names()),
    ],
)
def test_mnist_follows_the_authors(name, epochs, paper, data_root, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    file = paper / "mnist_runs" / f"MNIST_A_512512_penalty_0.0_e_200_N_100_{name}.csv"
    (folder / file.name).symlink_to(file)
    (theirs,) = published.authors_curves(folder)
    setting = theirs.setting
    rows = reproduce(
        "mnist",
        run_dir=tmp_path / "run",
        nodes=setting.nodes,
        lr=setting.lr,
        beta=setting.beta,
        bias=setting.bias,
        seed=theirs.seed,
        epochs=epochs,
        root=data_root,
    )
    for epoch, (ours, authors) in enumerate(zip(rows, theirs.rows, strict=False)):
        assert ours.train_loss == pytest.approx(authors.train_loss, abs=1e-4), f"train_loss, epoch {epoch}"
        assert ours.test_loss == pytest.approx(authors.test_loss, abs=1e-3), f"test_loss, epoch {epoch}"
        assert ours.train_acc == pytest.approx(authors.train_acc, abs=1e-3), f"train_acc, epoch {epoch}"
        assert ours.test_acc == pytest.approx(authors.test_acc, abs=2e-3), f"test_acc, epoch {epoch}"


@pytest.mark.slow
def test_fashion_begins_as_the_authors(paper, data_root, tmp_path):
    """One epoch (minutes): seed 0 within four standard deviations of the mean over the authors' seeds 0 to 4."""
    name = "FashionMNIST_A_ResNet18_penalty_0.0_e_300_N_100_SGD_lr_0.5_ClipNorm_1.0.csv"
    with (paper / "fashion_summary" / name).open(newline="") as file:
        theirs = next(csv.DictReader(file))
    (ours,) = reproduce("fashion", run_dir=tmp_path, lr=0.5, beta=1.0, bias="clip:1", seed=0, epochs=1, root=data_root)
    print(ours, theirs)
    for column, value in ours._asdict().items():
        mean, std = float(theirs[f"{column}_mean"]), float(theirs[f"{column}_std"])
        assert abs(value - mean) <= 4 * std, f"{column} is {value}; theirs {mean} with a standard deviation of {std}"
