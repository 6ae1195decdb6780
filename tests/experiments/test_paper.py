"""The paper's experiments: against the authors' files, and against plain loops over nodes."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from endings import contents
from processes import with_support
from torch import nn
from torch.nn import functional as F

from metamom.bias import QSGD, Clip, Identity, Normalize, RandK, TopK, parse
from metamom.experiments.paper import memory, nodes, protocol, published, run
from metamom.experiments.paper import table as tables
from metamom.experiments.paper.published import Curve, Setting
from metamom.experiments.paper.training import Row, Training
from metamom.tasks.images import LabelledImages
from metamom.training import checkpoints
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.interrupts import TrainingInterrupted
from metamom.training.progress import DivergedError

reproduce, table = run.reproduce, tables.table
MNIST, FASHION = protocol.PROTOCOLS["mnist"], protocol.PROTOCOLS["fashion"]


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 10))


def small_normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))


def made(count: int, seed: int, dtype: torch.dtype = torch.float64) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 4, generator=generator, dtype=dtype)
    return LabelledImages(images, torch.randint(10, (count,), generator=generator))


SMALL = replace(MNIST, model=small_mlp)
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


QUICK = ("SGDM_lr_0.5_beta_0.1_TopK_33500_seed_0",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[] if name in QUICK else pytest.mark.slow,
        )
        for name in names()
    ],
)
def test_mnist_follows_the_authors(name, paper, data_root, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    file = paper / "mnist_runs" / f"MNIST_A_512512_penalty_0.0_e_200_N_100_{name}.csv"
    (folder / file.name).symlink_to(file)
    (theirs,) = published.authors_curves(folder)
    setting = theirs.setting
    epochs = 5 if setting.beta == 1 else 10  # SGD amplifies rounding
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


# -- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """`reproduce("mnist")` on a small problem."""

    class Small(protocol.Protocol):
        def data(self, part, root):
            return made(24, 1, torch.float32) if part == "train" else made(10, 2, torch.float32)

    fields = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    monkeypatch.setitem(protocol.PROTOCOLS, "mnist", Small(**fields))
    monkeypatch.setattr(run, "SAVE_AFTER", 0.0)


def read(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


KEYS = {"nodes": 6, "lr": 0.1, "beta": 0.5, "bias": "topk:20", "epochs": 6}


@pytest.mark.usefixtures("small")
def test_a_run_and_its_files(tmp_path):
    rows = reproduce("mnist", run_dir=tmp_path, **KEYS)
    head, *lines = read(tmp_path)
    assert head == ["", "train_loss", "train_acc", "test_loss", "test_acc"]
    assert [line[0] for line in lines] == [str(epoch) for epoch in range(6)]
    assert [tuple(map(float, line[1:])) for line in lines] == rows
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["bias"] == "topk:20"
    assert config["settings"]["nodes"] == 6
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "loss", "accuracy", "seconds", "world_size", "wire_bytes"} <= set(line) for line in logged)
    assert logged[0]["wire_bytes"] == 6 * 20 * 8
    with pytest.raises(ValueError, match="holds a run already"):
        reproduce("mnist", run_dir=tmp_path, **KEYS)
    with pytest.raises(ValueError, match=r"lr is 0\.1 there and 0\.2 here"):
        reproduce("mnist", run_dir=tmp_path, resume=True, **{**KEYS, "lr": 0.2})
    assert reproduce("mnist", run_dir=tmp_path, resume=True, **KEYS) == rows


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", ["topk:20", "ef21:topk:20", "randk:20"])
def test_interrupted_and_resumed_as_if_never(bias, tmp_path, monkeypatch):
    keys = {**KEYS, "bias": bias}
    whole = reproduce("mnist", run_dir=tmp_path / "whole", **keys)
    epoch = Training.epoch

    def interrupted(self):
        row = epoch(self)
        if self.epochs == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr(Training, "epoch", interrupted)
    with pytest.raises(TrainingInterrupted, match="stopped after epoch 3 of 6"):
        reproduce("mnist", run_dir=tmp_path / "parts", **keys)
    assert len(read(tmp_path / "parts")) == 1 + 3
    monkeypatch.setattr(Training, "epoch", epoch)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # a crash in the middle of a line
        file.write('{"step": 3, "lo')
    assert reproduce("mnist", run_dir=tmp_path / "parts", resume=True, **keys) == whole
    assert read(tmp_path / "parts") == read(tmp_path / "whole")


KILLED = """
import os, signal
from test_paper import KEYS, SMALL, made
from metamom.experiments.paper import protocol, run
class Small(protocol.Protocol):
    def data(self, part, root):
        return made(24, 1, __import__("torch").float32) if part == "train" else made(10, 2, __import__("torch").float32)
protocol.PROTOCOLS["mnist"] = Small(**{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})
run.SAVE_AFTER = %r
log = run.RunDirectory.log
def killed(self, line):
    log(self, line)
    if line["step"] == %d:
        os.kill(os.getpid(), signal.SIGKILL)
run.RunDirectory.log = killed
run.reproduce("mnist", run_dir=%r, **KEYS)
"""


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("save_after", "at"), [(1e9, 0), (1e9, 3), (0.0, 2)])
def test_killed_and_resumed_as_if_never(save_after, at, tmp_path):
    """Behind the start's checkpoint alone, too: those epochs are done again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = reproduce("mnist", run_dir=whole, **KEYS)
    code = KILLED % (save_after, at, str(parts))
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=with_support(), capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    (parts / "checkpoints" / ".step-00000003.pt.x1.tmp").write_bytes(b"half of a checkpoint")
    assert reproduce("mnist", run_dir=parts, resume=True, **KEYS) == expected
    assert read(parts) == read(whole)
    assert not list((parts / "checkpoints").glob(".*"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bias", ["ef14:topk:20", "ef21:randk:20"])
def test_a_resumed_run_may_take_other_chunks(bias, tmp_path):
    """States belong to the nodes, not to the chunks."""
    keys = {**KEYS, "bias": bias}
    whole = reproduce("mnist", run_dir=tmp_path / "whole", **keys)
    reproduce("mnist", run_dir=tmp_path / "parts", **{**keys, "epochs": 3, "chunk": 4})
    rows = reproduce("mnist", run_dir=tmp_path / "parts", resume=True, **{**keys, "chunk": 1})
    for ours, expected in zip(rows, whole, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", [RandK, QSGD])
def test_a_run_that_draws_by_a_generator_goes_on(kind, tmp_path):
    keys = {**KEYS, "run_dir": tmp_path / "parts"}
    whole = reproduce("mnist", **{**keys, "run_dir": tmp_path / "whole", "bias": kind(20, generator=seeded(3))})
    reproduce("mnist", **{**keys, "epochs": 3, "bias": kind(20, generator=seeded(3))})
    with pytest.raises(ValueError, match="drew by a generator when it was saved"):
        reproduce("mnist", resume=True, **{**keys, "bias": kind(20)})
    assert reproduce("mnist", resume=True, **{**keys, "bias": kind(20, generator=seeded(4))}) == whole


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.usefixtures("small")
def test_wrong_arguments(tmp_path):
    for keys, message in (
        ({"nodes": 7}, "must divide the 24 images; got nodes=7"),
        ({"nodes": 0}, "got nodes=0"),
        ({"chunk": 0}, "chunk is the number of nodes"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"beta": 0.0}, "beta is the weight"),
        ({"lr": -1.0}, "lr is the step size"),
        ({"bias": "topk:700000"}, "700000"),
        ({"bias": "top:1"}, "top:1"),
        ({"bias": "ef21-sgdm(0.1):topk:20"}, "carries the momentum on the workers.*--beta 1"),
    ):
        with pytest.raises(ValueError, match=message):
            reproduce("mnist", run_dir=tmp_path / "run", **{**KEYS, **keys})
        assert not (tmp_path / "run").exists(), keys
    with pytest.raises(ValueError, match="mnist and fashion; got 'cifar'"):
        reproduce("cifar", run_dir=tmp_path / "run")


@pytest.mark.usefixtures("small")
def test_fewer_epochs_than_are_done(tmp_path):
    reproduce("mnist", run_dir=tmp_path, **KEYS)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"has done 6 epochs, more than the 4 asked for in all\. Pass epochs"):
        reproduce("mnist", run_dir=tmp_path, resume=True, **{**KEYS, "epochs": 4})
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small")
def test_metrics_lost_in_one_file_are_found_in_the_other(tmp_path):
    rows = reproduce("mnist", run_dir=tmp_path, **KEYS)
    log, copy = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"\0\xff\n", *lines[3:]]))
    with pytest.warns(UserWarning, match="metrics") as told:
        assert reproduce("mnist", run_dir=tmp_path, resume=True, **KEYS) == rows
    assert [str(each.message).partition("jsonl ")[2] for each in told] == [
        "was damaged in line 3: all that can be read is kept, and a copy of the damaged file is metrics.jsonl.damaged.",
        "has no metrics of step 2.",
    ]
    copy.write_text("".join(line for line in copy.read_text().splitlines(keepends=True) if not line.startswith("2,")))
    with pytest.warns(UserWarning, match="has no metrics of step 2"):
        found = reproduce("mnist", run_dir=tmp_path, resume=True, **KEYS)
    assert found[:2] + found[3:] == rows[:2] + rows[3:]
    assert all(math.isnan(value) for value in found[2])
    with pytest.raises(ValueError, match=r"metrics\.csv has no metrics of epoch 2"):
        published.our_curves(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("nodes", "6", r"settings: nodes should be a valid integer; got '6'"),
        ("lr", None, "settings: lr should be a valid number; got None"),
        ("parameters", [1], "settings: parameters should be"),
        ("bias", "topk:-1", "bias operator 'topk:-1'"),
        ("dataset", "cifar", "settings: dataset should be 'mnist' or 'fashion'"),
    ],
)
def test_settings_of_the_wrong_type_in_the_table(place, value, message, tmp_path):
    reproduce("mnist", run_dir=tmp_path, **{**KEYS, "epochs": 1})
    config = json.loads((tmp_path / "config.json").read_text())
    config["settings"][place] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        published.our_curves(tmp_path)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "step": 5}, "of another step than its name says: it holds 5"),
        (lambda s: {**s, "epochs": 5}, "say that 6 epochs are done, and 5"),
        (lambda s: {**s, "seconds": "x"}, "should hold a number >= 0 as 'seconds'; got 'x'"),
        (lambda s: {**s, "draws": torch.zeros(3)}, "hold no states of generators"),
        (lambda s: {**s, "optimizer": []}, "optimizer: its state should be a dict of 'state' and 'param_groups'"),
        (lambda s: {name: value for name, value in s.items() if name != "bias"}, "there is no bias in"),
        (
            lambda s: (s["optimizer"]["state"].pop(0), s)[1],
            "optimizer: 'state' has no entry 0, but after its first step",
        ),
        (
            lambda s: (s["optimizer"]["param_groups"][0].update(maximize=True), s)[1],
            r"optimizer: param_groups\[0\]\.maximize should be False, as the optimizer is made; got True",
        ),
    ],
)
def test_checkpoints_with_wrong_contents(change, message, tmp_path):
    reproduce("mnist", run_dir=tmp_path, **KEYS)
    path = Checkpoints(tmp_path / "checkpoints").path(6)
    save(path, change(load(path)))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        reproduce("mnist", run_dir=tmp_path, resume=True, **{**KEYS, "epochs": 8})
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small")
def test_step_sizes_that_six_digits_do_not_tell_apart_have_figures_of_their_own(tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for lr in (0.1, 0.1 + 1e-9):
        reproduce("mnist", run_dir=tmp_path / "ours" / repr(lr), **{**KEYS, "lr": lr, "epochs": 1})
    text = (tmp_path / "ours" / "0.1" / "metrics.csv").read_text()
    (theirs / "MNIST_A_512512_penalty_0.0_e_200_N_6_SGD_lr_0.1_seed_0.csv").write_text(text)
    report = table(theirs, tmp_path / "ours").read_text(encoding="utf-8")
    assert [line.split(" | ")[2] for line in report.splitlines() if "topk" in line and "| mnist" in line] == [
        "0.1",
        "0.100000001",
    ]
    assert len(list((tmp_path / "ours" / "figures").iterdir())) == 2


@pytest.mark.usefixtures("small")
def test_results_of_another_origin_stay(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(",train_loss\n0,2.3\n")
    with pytest.raises(ValueError, match="choose another directory"):
        reproduce("mnist", run_dir=tmp_path, resume=True, **KEYS)
    assert file.read_text() == ",train_loss\n0,2.3\n"


@pytest.mark.usefixtures("small")
def test_a_run_that_diverges(tmp_path):
    with pytest.raises(DivergedError, match=r"Try a smaller lr, clipped gradients \(.*--bias clip:1\); the") as caught:
        reproduce("mnist", run_dir=tmp_path, **{**KEYS, "lr": 1e30, "bias": "none"})
    assert "inner_lr" not in str(caught.value)


# -- memory ---------------------------------------------------------------------------------------------------------


FULL = memory.Needs(
    nodes=100, parameters=669_706, data=219_800_000, images=600, activations=4000, together=True, kept=0, element_size=4
)


def test_chunks_within_the_limit():
    for n, kept in itertools.product((1, 10, 100, 1000), (0, 1, 2)):
        needs = FULL._replace(nodes=n, images=60_000 // n, kept=kept)
        if needs.fixed + needs.of_a_node > memory.LIMIT:
            with pytest.raises(ValueError, match="this run takes about"):
                memory.largest_chunk(needs)
            continue
        chunk = memory.largest_chunk(needs)
        assert 1 <= chunk <= n
        assert needs.fixed + chunk * needs.of_a_node <= memory.LIMIT
    for kept in (0, 1, 2):  # the paper's setting always fits, and not node by node
        assert memory.largest_chunk(FULL._replace(kept=kept)) >= 5


def test_what_cannot_fit_is_said_and_can_be_had(monkeypatch):
    message = r"takes about .* GB, 4\.5 GB of it the operator's state for 100 nodes, .*2 GB .*--chunk 1"
    with pytest.raises(ValueError, match=message):
        memory.largest_chunk(FULL._replace(parameters=11_181_642, kept=1))
    monkeypatch.setattr(memory, "LIMIT", 0)
    keys = {"nodes": 6, "lr": 0.1, "beta": 0.5, "bias": parse("ef21:topk:20"), "seed": 0}
    with pytest.raises(ValueError, match=r"taken unasked\. Pass chunk=1"):
        Training(SMALL, made(24, 1), made(6, 2), **keys)
    assert Training(SMALL, made(24, 1), made(6, 2), chunk=1, **keys).epoch().train_loss > 0


def test_what_operators_keep_for_each_node():
    """As many numbers an entry as they say, whatever they are."""
    for spec in ("topk:20", "clip:1+topk:20", "ef14:topk:20", "ef21:topk:20", "ef21-sgdm(0.1):topk:20", "clip21:1"):
        operator = parse(spec)
        operator(torch.ones(3, 50))
        kept = [tensor for worker in operator.state_dict().get("workers", {}).values() for tensor in worker.values()]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 4 * 3 * 50 * len(operator.names), spec


def test_saving_copies_no_tensor(tmp_path):
    state = {"workers": {i: {"estimate": torch.full((1 << 20,), float(i))} for i in range(16)}}
    tracemalloc.start()  # torch's own memory is not in it, but buffers of bytes are
    try:
        checkpoints.save(tmp_path / "a.pt", state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # one tensor's bytes; there are 16
    again = checkpoints.load(tmp_path / "a.pt")["workers"]
    assert all(torch.equal(again[i]["estimate"], kept["estimate"]) for i, kept in state["workers"].items())


FULL_DISK = """
    import resource, sys, torch
    from pathlib import Path
    from metamom.training.checkpoints import save
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        save(Path(sys.argv[1]), {"a": torch.ones(1000)})
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_checkpoint_for_which_there_is_no_room(tmp_path):
    checkpoints.save(tmp_path / "a.pt", {"a": torch.zeros(1)})
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "a.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) in (errno.EFBIG, errno.ENOSPC)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    assert checkpoints.load(tmp_path / "a.pt")["a"].tolist() == [0]


PEAK = """
    import sys
    from metamom import cli
    from metamom.experiments.shared.peak import peak_mib
    assert cli.main(sys.argv[1:]) == 0
    print(peak_mib())
"""
HEAVIEST = (
    "none", "topk:33500", "ef21:topk:33500", "ef14:topk:33500", "ef21-sgdm(0.1):topk:33500", "clip21:1", "qsgd:4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bias", HEAVIEST)
def test_no_run_takes_more_than_2_gb(bias, data_root, tmp_path):
    """Begun, saved, resumed and saved again, with the default chunk."""
    common = ["--beta", "1", "--bias", bias, "--run-dir", str(tmp_path), "--data-root", str(data_root)]
    peaks = []
    for more in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
        command = [sys.executable, "-c", textwrap.dedent(PEAK), "reproduce", "mnist", *common, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]) * 2**20 / 1e6)
    print(f"{bias}: {peaks[0]:.0f} MB, resumed {peaks[1]:.0f} MB")
    assert max(peaks) < 2000


# -- the table --------------------------------------------------------------------------------------------------------


def test_names_of_files():
    for name, expected, seed in (
        ("MNIST_A_512512_penalty_0.0_e_200_N_100_SGD_lr_0.5_seed_1", ("mnist", 100, 0.5, "none", 1.0), "1"),
        ("MNIST_A_512512_penalty_0.0_e_200_N_20_SGDM_lr_0.05_beta_0.3_TopK_33500_seed_0",
         ("mnist", 20, 0.05, "topk:33500", 0.3), "0"),
        ("MNIST_A_512512_penalty_0.0_e_200_N_100_SGDM_lr_0.5_beta_0.1_ClipNorm_2.0",
         ("mnist", 100, 0.5, "clip:2", 0.1), None),
        ("FashionMNIST_A_ResNet18_penalty_0.0_e_300_N_100_SGD_lr_0.5_Norm",
         ("fashion", 100, 0.5, "normalize:tensor", 1.0), None),
    ):  # fmt: skip
        match = published.NAME.fullmatch(f"{name}.csv")
        assert published._named(match) == Setting(*expected)
        assert match["seed"] == seed
    assert published.NAME.fullmatch("MNIST_A_512512_penalty_0.1_e_200_N_100_SGD_lr_0.5_seed_1.csv") is None
    assert published._canonical("topk:1%", 11_181_642) == "topk:111816"
    assert published._canonical("topk:33500:all", 669_706) == "topk:33500"


def curve(beta: float, losses: list[float], accuracies: list[float], seed: int = 0) -> Curve:
    rows = [Row(loss, 0.0, 0.0, accuracy) for loss, accuracy in zip(losses, accuracies, strict=True)]
    return Curve(Setting("mnist", 100, 0.5, "none", beta), seed, rows)


def test_differences_over_as_many_epochs_as_said():
    ours, theirs = curve(1.0, [1.0] * 7, [0.5] * 7), curve(1.0, [1.0] * 4 + [1.5] + [2.0] * 5, [0.5] * 10)
    assert tables.largest_difference(ours.rows, theirs.rows, 4) == 0
    assert tables.largest_difference(ours.rows, theirs.rows, 5) == 0.5
    assert tables.largest_difference(ours.rows, theirs.rows, 7) == 1
    assert tables.largest_difference(ours.rows, theirs.rows, 8) is None
    assert tables._matched([ours], [theirs])[0].apart == (0.5, None)


def test_where_momentum_wins_is_judged_over_common_epochs():
    def said(sgd: list[float], momentum: list[float]) -> list[str]:
        curves = [curve(beta, accuracies, accuracies) for beta, accuracies in ((1.0, sgd), (0.1, momentum))]
        return tables._honest(tables._matched(curves, []))

    slow = [0.5] * 30 + [0.95] * 170  # 90 % after 31 epochs
    nothing, wins = ["No runs to compare momentum with SGD by."], ["Momentum wins wherever it was compared."]
    assert said(slow, [0.5] * 10) == nothing
    assert said([0.5] * 10, slow) == nothing
    assert said(slow[:40], [0.5] * 20 + [0.95]) == wins
    assert said(slow, [0.5] * 20 + [0.95] * 180) == wins
    assert "it is no sooner at 90%" in said(slow, [0.5] * 35)[-1]
    assert "ours): it ends 1.00 points lower." in said(slow, [0.95] * 20 + [0.94] * 180)[-1]
    assert said(slow[:100], [0.95] * 20 + [0.94] * 80) == wins  # who ends lower is open


@pytest.mark.usefixtures("small")
def test_the_table(tmp_path, capsys):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    for beta in (1.0, 0.5):
        reproduce("mnist", run_dir=ours / f"beta{beta}", **{**KEYS, "beta": beta})
        name = "SGD_lr_0.1" if beta == 1 else "SGDM_lr_0.1_beta_0.5"
        text = (ours / f"beta{beta}" / "metrics.csv").read_text()
        (theirs / f"MNIST_A_512512_penalty_0.0_e_200_N_6_{name}_TopK_20_seed_0.csv").write_text(text)
    path = table(theirs, ours)
    text = path.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| mnist")]
    assert len(lines) == 2
    assert all("| 0.0e+00 | — | 0 | 0 |" in line for line in lines)  # of 6 epochs, not of 10
    assert "No runs to compare momentum with SGD by." in text
    assert "not in 6" in lines[0]
    assert (ours / "figures" / "mnist-n6-lr0.1-topk-20.png").stat().st_size > 10_000
    metrics = ours / "beta0.5" / "metrics.csv"
    metrics.write_text(metrics.read_text() + "6,2.1,0.")  # a run under way
    assert table(theirs, ours).read_text(encoding="utf-8") == text
    shutil.copytree(ours / "beta0.5", ours / "copy")
    with pytest.raises(ValueError, match=r"beta0\.5 and .*copy are runs of one setting and seed"):
        table(theirs, ours)
    shutil.rmtree(ours / "copy")
    next(theirs.iterdir()).write_text("x")
    with pytest.raises(ValueError, match=r"seed_0\.csv holds no epochs: it is cut short or damaged"):
        table(theirs, ours)
    with pytest.raises(ValueError, match="none of the authors' results"):
        table(ours, ours)
    with pytest.raises(ValueError, match="no run of `metamom reproduce`"):
        table(theirs, theirs)
