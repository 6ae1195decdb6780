"""``metamom train images`` with a network of the user's own, and with initial weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command import SMALL_IMAGES as SMALL
from command import the_error

from metamom.experiments.saved import load_run
from metamom.maml.normalisation.norm import resolved
from metamom.nets import Conv4
from metamom.training.directory import read_config

OWN_NETWORK = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def frozen(num_classes):
    return Net(num_classes).eval()


def number(ways):
    return ways


missing = None
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    """A user's module in the working folder."""
    (tmp_path / "my_networks.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_networks", None)
    return "my_networks"


@pytest.mark.parametrize("create", ["Net", "frozen"])
def test_a_network_of_the_users_own(create, photos, own_module, metamom, tmp_path):
    folder = tmp_path / "own"
    said = metamom(
        "train", "images", "--root", photos, "--model", f"{own_module}:{create}", *SMALL, "--run-dir", folder
    )
    assert said.code == 0, said
    assert metamom("evaluate", folder, "--tasks", "4", "--steps", "1").code == 0
    first, second = (load_run(folder).learner for _ in range(2))
    assert type(first.model).__name__ == "Net"
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert resolved(first.model, first.norm) == ("frozen" if create == "frozen" else "batch")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet", "got 'resnet'"),
        ("my_networks:Nett", "Net"),
        ("my_networks:missing", "NoneType"),
        ("my_networks:number", "must return a torch.nn.Module; got int"),
        ("nowhere:Net", "nowhere"),
    ],
)
def test_a_network_that_cannot_be_made(model, message, photos, own_module, metamom, tmp_path):
    said = metamom("train", "images", "--root", photos, "--model", model, *SMALL, "--run-dir", tmp_path / "run")
    assert message in the_error(said)
    assert not (tmp_path / "run").exists()


def test_initial_weights_from_a_file(photos, own_module, metamom, tmp_path):
    from my_networks import Net  # type: ignore[import-not-found]

    network = Net(5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    arguments = ["--root", photos, "--model", "my_networks:Net", "--init", tmp_path / "weights.pt", "--lr", "1e-12"]
    said = metamom("train", "images", *arguments, *SMALL, "--run-dir", tmp_path / "run")
    assert said.code == 0, said
    (tmp_path / "weights.pt").unlink()
    trained = load_run(tmp_path / "run").learner.model
    for name, weights in network.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weights)


def test_a_run_goes_on_without_the_file_of_its_initial_weights(photos, metamom, tmp_path):
    torch.save(Conv4(5, 3, 32, image_size=28, pooling="max").state_dict(), tmp_path / "weights.pt")
    arguments = ["train", "images", "--root", photos, "--init", tmp_path / "weights.pt", *SMALL]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert metamom(*arguments, "--run-dir", whole).code == 0
    assert metamom(*arguments, "--iterations", "2", "--run-dir", parts).code == 0
    (tmp_path / "weights.pt").unlink()
    assert "weights.pt" in the_error(metamom(*arguments, "--run-dir", tmp_path / "new", "--resume"))
    assert metamom(*arguments, "--run-dir", parts, "--resume").code == 0
    one, other = (load_run(each, "newest").learner.state_dict() for each in (whole, parts))
    assert all(map(torch.equal, one.values(), other.values()))


def test_a_run_of_the_users_own_network_says_where_its_module_was(photos, own_module, metamom, tmp_path, monkeypatch):
    model = ["--model", f"{own_module}:Net"]
    assert metamom("train", "images", "--root", photos, *model, *SMALL, "--run-dir", "run").code == 0
    assert read_config("run")["settings"]["model_folder"] == str(tmp_path)
    sys.modules.pop(own_module)
    monkeypatch.undo()
    message = f"It was in {tmp_path} before: start from there (cd {tmp_path}), or set PYTHONPATH={tmp_path}."
    assert message in the_error(metamom("evaluate", tmp_path / "run", "--tasks", "4"))


FAULTY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(28 * 28 * 3, num_classes)

    def forward(self, x):
        return self.scores(x)

    def scores(self, x):
        return self.head(x)


class Strict(Net):
    def scores(self, x):
        raise KeyError("of mine")


def refuses(num_classes):
    raise ValueError("no weights here")


def fails(num_classes):
    return nn.Linear(num_classes)
"""


@pytest.mark.parametrize(
    ("create", "message"),
    [
        ("refuses", "the model faulty:refuses(num_classes=5) raised ValueError: no weights here ({}, line 24)"),
        ("fails", "({}, line 28)"),
    ],
)
def test_errors_of_the_users_network(create, message, photos, metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("faulty.py").write_text(FAULTY)
    sys.modules.pop("faulty", None)
    said = metamom("train", "images", "--root", photos, "--model", f"faulty:{create}", *SMALL, "--run-dir", "run")
    assert the_error(said).endswith(message.format(tmp_path / "faulty.py"))


@pytest.mark.parametrize(
    ("name", "message", "scores"),
    [("Net", "the model cannot take inputs of shape [5, 3, 28, 28]", 15), ("Strict", "KeyError: 'of mine'", 20)],
)
def test_errors_in_the_forward_of_the_users_network(name, message, scores, photos, metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("faulty.py").write_text(FAULTY)
    sys.modules.pop("faulty", None)
    said = metamom("train", "images", "--root", photos, "--model", f"faulty:{name}", *SMALL, "--run-dir", "run")
    assert said.code == 2
    first, *frames = said.err[said.err.index("metamom: error") :].splitlines()
    assert first.startswith(f"metamom: error: {message}")
    places = [line.strip() for line in frames if line.strip().startswith("File")]
    file = tmp_path / "faulty.py"
    assert places == [f'File "{file}", line {n}, in {name}' for n, name in ((12, "forward"), (scores, "scores"))]
