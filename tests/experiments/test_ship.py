"""Trained networks that come with metamom: how they are written and loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import metamom
from metamom import MAML, nets
from metamom.experiments.published.outcome import read_all, write
from metamom.experiments.published.run import plan_omniglot, plan_sinusoid, reproduce
from metamom.experiments.published.ship import ship
from metamom.nets import shipped

pytestmark = pytest.mark.usefixtures("few_validation_tasks")
NAME = "omniglot-5w1s"


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_root, few_validation_tasks) -> Path:
    run = tmp_path_factory.mktemp("ship") / "run"
    reproduce(plan_omniglot("5w1s", "maml", iterations=1), run_dir=run, root=str(data_root), tasks=4)
    return run


@pytest.fixture
def weights(run, tmp_path, monkeypatch) -> Path:
    """A folder of shipped weights, in the place of metamom's."""
    ship(run, tmp_path / "weights", least=0.0)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def test_a_network_as_it_was_trained(run, weights):
    conv4, options, card = nets.pretrained(NAME)
    learner = metamom.load(run).learner
    assert all(torch.equal(a, b) for a, b in zip(conv4.parameters(), learner.model.parameters(), strict=True))
    assert options == {"inner_lr": 0.4, "inner_steps": 3}
    assert (weights / f"{NAME}.safetensors").stat().st_size < 500_000
    assert card["licence_of_data"].startswith("MIT")
    assert card["accuracy"]["adaptation_steps"] == 3
    assert "/" not in card["trained"]["flags"]
    assert nets.pretrained(NAME).model is not conv4


def test_adapted_in_one_line(run, weights):
    conv4, options, _ = nets.pretrained(NAME)
    x, y = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    scores = MAML(conv4, F.cross_entropy, **options).fit(x, y)(x)
    learner = metamom.load(run).learner
    assert torch.equal(scores, learner.fit(x, y, steps=3)(x))


def test_learned_step_sizes_are_in_the_file(tmp_path, data_root, monkeypatch):
    """Of Meta-SGD, one for each entry."""
    run, folder = tmp_path / "run", tmp_path / "weights"
    reproduce(plan_omniglot("5w1s", "meta-sgd", iterations=1), run_dir=run, root=str(data_root), tasks=4)
    ship(run, folder, least=0.0)
    monkeypatch.setattr(shipped, "FOLDER", folder)
    conv4, options, card = nets.pretrained(NAME)
    assert set(options) == {"inner_lr", "inner_steps"}
    assert "inner_lr" not in card["options"]
    x, y = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    scores = MAML(conv4, F.cross_entropy, **options).fit(x, y)(x)
    learner = metamom.load(run).learner
    assert torch.equal(scores, learner.fit(x, y, steps=options["inner_steps"])(x))
    assert all(torch.equal(options["inner_lr"][name], alpha) for name, alpha in learner.inner_lr.items())


def test_unknown_names_and_changed_files(weights, monkeypatch):
    with pytest.raises(ValueError, match=r"'omniglot-5w1'; there are omniglot-5w1s; did you mean omniglot-5w1s\?$"):
        nets.pretrained("omniglot-5w1")
    file = weights / f"{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(ValueError, match=r"not those of their card: .* Install it again\."):
        nets.pretrained(NAME)
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        nets.pretrained(NAME)
    monkeypatch.setattr(shipped, "FOLDER", weights / "none")
    with pytest.raises(ValueError, match="this version has none"):
        nets.pretrained(NAME)


def test_what_is_not_shipped(run, tmp_path):
    with pytest.raises(ValueError, match="at least 97 % is wanted"):
        ship(run, tmp_path)
    ((_, outcome),) = read_all(run)
    other = tmp_path / "other"
    other.mkdir()
    write(replace(outcome, row=None), other)
    with pytest.raises(ValueError, match="on sinusoids"):
        ship(other, tmp_path)
    sinusoid = tmp_path / "learned"
    reproduce(plan_sinusoid(5, "meta-sgd", iterations=1), run_dir=sinusoid, tasks=4)
    write(outcome, sinusoid)
    with pytest.raises(ValueError, match="one inner step size"):
        ship(sinusoid, tmp_path, least=0.0)
    assert not list(tmp_path.glob("*.safetensors"))


def test_every_shipped_network_is_the_one_of_its_card():
    """Of this checkout; all of them learned."""
    for path in shipped.FOLDER.glob("*.json"):
        found = nets.pretrained(path.stem)
        assert found.card["accuracy"]["batch"]["mean"] >= 0.97
        assert json.loads(path.read_text(encoding="utf-8")) == found.card
