"""What a network of the user's own is created with, and how many outputs it has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import the_error
from image_files import write_splits
from training_runs import global_seed

from metamom.training.directory import read_metrics

NETWORKS = """
from torch import nn


class Net(nn.Module):
    def __init__(self, outputs=1000):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3 * 16 * 16, outputs)

    def forward(self, x):
        return self.head(self.drop(x.flatten(1)))


def thousand():
    return Net()


def one():
    return Net(1)


def two(ways):
    return Net(ways)


def needs(n_classes):
    return Net(n_classes)


def hands_on(**kwargs):
    return Net(**kwargs)


class HandsOn(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def named(ways, **kwargs):
    return Net(ways, **kwargs)


def any_keyword(**kwargs):
    return Net(kwargs["num_classes"])
"""
SMALL = ["--ways", "2", "--iterations", "1", "--meta-batch", "2", "--queries", "2", "--image-size", "16"]
SMALL += ["--evaluate-tasks", "2"]
TAKES = "metamom passes the number of classes as ways or num_classes, if the callable has such a parameter or takes any"


@pytest.fixture
def train(tmp_path, monkeypatch, metamom):
    """``metamom train images`` with a network of that name, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_splits(Path("photos"), train=3, validation=3, test=3)
    Path("various.py").write_text(NETWORKS)
    sys.modules.pop("various", None)
    return lambda name, *more, command="train": metamom(
        *(command, "images", "--root", "photos", "--model", f"various:{name}", *SMALL, "--run-dir", name, *more)
    )


@pytest.mark.filterwarnings("always:the model various")
def test_more_outputs_than_classes(train):
    said = train("thousand")
    assert said.code == 0
    assert said.err.count("warning: the model various:thousand has 1,000 outputs, and tasks have 2 classes (ways)") == 1
    assert TAKES in said.err
    said = train("two")
    assert said.code == 0
    assert "outputs" not in said.err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_fewer_outputs_than_classes(command, train):
    said = the_error(train("one", command=command))
    assert "the model various:one has 1 output, and tasks have 2 classes (ways): it needs an output for each" in said
    assert TAKES in said
    assert not Path("one").exists()


def test_the_outputs_are_counted_without_a_trace(train, monkeypatch):
    """The network has dropout, and its draws are those of a run that does not count."""
    from metamom.experiments.recipes import Recipe

    with global_seed(7):
        assert train("two").code == 0
    monkeypatch.setattr(Recipe, "check_outputs", lambda *arguments: None)
    with global_seed(7):
        assert train("two", "--run-dir", "other").code == 0
    assert read_metrics("two")[0]["loss"] == read_metrics("other")[0]["loss"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needs", "the model various:needs(n_classes) cannot be called: missing a required argument: 'n_classes'. "),
        ("hands_on", "unexpected keyword argument 'num_classes' ({}, line 32). "),
        ("HandsOn", "unexpected keyword argument 'num_classes' ({}, line 37). "),
    ],
)
def test_a_callable_with_other_arguments(name, message, train, tmp_path):
    said = the_error(train(name))
    assert message.format(tmp_path / "various.py") + TAKES in said


@pytest.mark.parametrize("name", ["named", "any_keyword"])
def test_any_keyword(name, train):
    assert train(name).code == 0
