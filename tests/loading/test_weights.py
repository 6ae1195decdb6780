"""Weights in files of their own."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from forked import run_script
from torch import nn
from torch.nn import functional as F

import metamom
from metamom import MAML, CompositeMomentum, evaluate, load_weights, save_weights, train
from metamom.nets import Conv4, SinusoidMLP
from metamom.tasks import Sinusoid

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="safetensors is not installed"
)


def network(ways: int = 3, seed: int = 0) -> Conv4:
    return Conv4(ways, hidden=4, generator=torch.Generator().manual_seed(seed))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


@needs_safetensors
def test_weights_and_their_card(tmp_path):
    learner = MAML(SinusoidMLP(), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, Sinusoid(5, 5), iterations=2, meta_batch=4, run_dir=tmp_path / "run")
    run = metamom.load(tmp_path / "run")
    result = evaluate(run.learner, run.sampler(), tasks=10, steps=(0, 1))
    path = run.save_weights(tmp_path / "out" / "sine.safetensors", evaluation=result, licence="MIT")
    card = json.loads((tmp_path / "out" / "sine.json").read_text())
    assert card["architecture"] == "SinusoidMLP"
    assert card["parameters"] == 1761
    assert card["data"]["family"] == "Sinusoid"
    assert card["settings"]["meta_batch"] == 4
    assert card["iterations"] == 2
    assert card["evaluation"]["mean"] == list(result.mean)
    assert card["evaluation"]["tasks"] == 10
    assert card["licence"] == "MIT"
    assert card["command"] == sys.argv
    loaded = load_weights(SinusoidMLP(), path)
    assert_same(loaded, run.learner.model)
    x = torch.linspace(-1, 1, 5).unsqueeze(-1)
    script = (
        f"import torch, metamom; from metamom.nets import SinusoidMLP\n"
        f"m = metamom.load_weights(SinusoidMLP(), {str(path)!r})\n"
        f"print(m(torch.linspace(-1, 1, 5).unsqueeze(-1)).flatten().tolist())"
    )
    said = json.loads(run_script(script, tmp_path / "said"))
    assert said == pytest.approx(run.learner.model(x).flatten().tolist(), rel=1e-6)


@needs_safetensors
@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are Unix's")
def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_weights(network(), tmp_path / "weights.safetensors", {"licence": "MIT"})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path, path.with_suffix(".json"))} == {0o640}


@needs_safetensors
def test_names_are_the_models_own(tmp_path):
    from safetensors import safe_open

    model = network()
    model.again = model.head  # shared tensors
    save_weights(model, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert not (tmp_path / "w.json").exists()
    with pytest.raises(ValueError, match=r"name the file w\.safetensors; got 'w\.pt'"):
        save_weights(model, tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", [".pt", pytest.param(".safetensors", marks=needs_safetensors)])
def test_the_head_may_differ_if_that_is_said(suffix, tmp_path):
    source, file = network(5), tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), file)
    else:
        save_weights(source, file)
    target = network(3, seed=1)
    before = copy.deepcopy(target)
    message = r"of other shapes: head\.weight \[5, 4\] for \[3, 4\], head\.bias \[5\] for \[3\]\. Name what may differ"
    with pytest.raises(ValueError, match=message):
        load_weights(target, file)
    assert_same(target, before)
    assert load_weights(target, file, skip=["head"]) is target
    assert torch.equal(target.head.weight, before.head.weight)
    assert_same(target.features, source.features)
    with pytest.raises(ValueError, match="the model has no heads to skip"):
        load_weights(target, file, skip="heads")


def test_weights_that_are_not_finite_are_named(tmp_path):
    model, target = network(), network(seed=1)
    before = copy.deepcopy(target)
    with torch.no_grad():
        model.head.weight[0, :2] = math.nan
        model.features[1][1].bias[0] = math.inf
    torch.save(model.state_dict(), tmp_path / "w.pt")
    message = (
        r"weights in .*w\.pt are not finite: features\.1\.1\.bias \(1 value of 4\), head\.weight \(2 values of 12\)"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(target, tmp_path / "w.pt")
    assert_same(target, before)
    with pytest.raises(ValueError, match=r"not finite: features\.1\.1\.bias \(1 value of 4\)\."):
        load_weights(target, tmp_path / "w.pt", skip="head")
    masked = nn.Linear(2, 2)
    masked.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    torch.save(masked.state_dict(), tmp_path / "mask.pt")
    assert load_weights(masked, tmp_path / "mask.pt") is masked, "a mask may hold infinity"
    masked.mask[0] = math.nan
    torch.save(masked.state_dict(), tmp_path / "mask.pt")
    with pytest.raises(ValueError, match=r"not finite: mask \(1 value of 2\)"):
        load_weights(masked, tmp_path / "mask.pt")


def test_state_dicts_of_training_scripts(tmp_path):
    model = network()
    state = model.state_dict()
    for number, saved in enumerate(
        (
            state,
            {"state_dict": state, "epoch": 3},
            {"model": {f"module.{name}": w for name, w in state.items()}},
            {f"module.{name}": w for name, w in state.items()},
        )
    ):
        torch.save(saved, tmp_path / f"{number}.pt")
        assert_same(load_weights(network(seed=1), tmp_path / f"{number}.pt"), model)
    half = load_weights(network(seed=1).double(), tmp_path / "0.pt")
    assert half.head.weight.dtype == torch.float64


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_files_that_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"weight": 3}, "numbers.pt")
    Path("text.pt").write_text("no weights")
    Path("empty.pt").touch()
    torch.save({**network().state_dict(), "more": torch.ones(2)}, "more.pt")
    few = network().state_dict()
    del few["head.bias"]
    torch.save(few, "few.pt")
    for name, message in (
        ("nothing.pt", "there is no file"),
        ("evil.pt", "could run code"),
        ("list.pt", "holds no weights"),
        ("numbers.pt", "holds no weights"),
        ("text.pt", "text.pt"),
        ("empty.pt", "empty.pt"),
        ("more.pt", r"unexpected: more \[2\]"),
        ("few.pt", r"missing: head\.bias \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(network(), name)
    assert not Path("touched").exists()


@needs_safetensors
def test_damaged_safetensors(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(network(), tmp_path / "w.safetensors")
