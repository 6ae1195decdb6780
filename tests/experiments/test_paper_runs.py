"""Runs of the paper's experiments: files, resuming, refusals."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from endings import contents
from forked import CONTEXT, PATIENCE
from paper_runs import KEYS, run_until_killed

from metamom.bias import QSGD, RandK
from metamom.experiments.paper import published
from metamom.experiments.paper.run import reproduce
from metamom.experiments.paper.table import table
from metamom.experiments.paper.training import Training
from metamom.training.checkpoints import CheckpointError, Checkpoints, load, save
from metamom.training.interrupts import TrainingInterrupted
from metamom.training.progress import DivergedError


def read(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


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
    with pytest.raises(ValueError, match="already holds a run"):
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


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("save_after", "at"), [(1e9, 0), (1e9, 3), (0.0, 2)])
def test_killed_and_resumed_as_if_never(save_after, at, tmp_path):
    """Behind the start's checkpoint alone, too: those epochs are done again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = reproduce("mnist", run_dir=whole, **KEYS)
    process = CONTEXT.Process(target=run_until_killed, args=(parts, save_after, at))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
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
        ({"chunk": 0}, "chunk, the number of nodes"),
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
    with pytest.raises(ValueError, match=r"has done 6 epochs, more than the total of 4\. Pass epochs"):
        reproduce("mnist", run_dir=tmp_path, resume=True, **{**KEYS, "epochs": 4})
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small")
def test_metrics_lost_in_one_file_are_found_in_the_other(tmp_path):
    rows = reproduce("mnist", run_dir=tmp_path, **KEYS)
    log, copy = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"\0\xff\n", *lines[3:]]))
    with pytest.warns(UserWarning, match="metrics") as caught:
        assert reproduce("mnist", run_dir=tmp_path, resume=True, **KEYS) == rows
    assert [str(each.message).partition("jsonl ")[2] for each in caught] == [
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
        (lambda s: {**s, "step": 5}, "holds another step than its name says: 5"),
        (lambda s: {**s, "epochs": 5}, "say both that 6 epochs are done, and 5"),
        (lambda s: {**s, "seconds": "x"}, "should hold a number >= 0 as 'seconds'; got 'x'"),
        (lambda s: {**s, "draws": torch.zeros(3)}, "hold no states of generators"),
        (lambda s: {**s, "optimizer": []}, "optimizer: its state should be a dict of 'state' and 'param_groups'"),
        (lambda s: {name: value for name, value in s.items() if name != "bias"}, "there is no bias in"),
        (
            lambda s: (s["optimizer"]["state"].pop(0), s)[1],
            "optimizer: 'state' has no entry 0, but after the first step",
        ),
        (
            lambda s: (s["optimizer"]["param_groups"][0].update(maximize=True), s)[1],
            r"optimizer: param_groups\[0\]\.maximize should be False, as in this optimizer; got True",
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
