"""The Python blocks of the README and of every page of the documentation run as written, each by itself.

Of loops of 500 steps, the first 20.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from character_folders import write_characters
from installed import need, need_learn2learn
from pages import README, ROOT, Block, blocks
from torch.nn import functional as F

import metamom
from metamom import cli
from metamom.interop.imports import import_torchvision
from metamom.interop.learn2learn import AsTaskset, import_learn2learn
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

# tests/training/test_callbacks_page.py runs them, with the packages that they are about
OF_CALLBACKS = ROOT / "docs" / "howto" / "watch.md"
# tests/interop/test_flower.py runs the block with Flower, in its simulation engine
BLOCKS = [b for b in blocks("python", "py") if b.page != OF_CALLBACKS and "flwr" not in b.code]


def run(block: Block, given: dict[str, Any]) -> None:
    """Run a block, from a fixed seed; errors show its line on the page."""
    code = block.code.replace("range(500)", "range(20)")
    source = compile("\n" * (block.line - 1) + code, str(block.page), "exec")
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(None):
        torch.manual_seed(0)
        exec(source, {"__name__": "__main__", **given})


def learn2learn_names() -> dict[str, Any]:
    """What the learn2learn loops take for granted: a model, its loss, and batches of real tasks."""
    need_learn2learn()
    tasks = AsTaskset(Sinusoid(shots=5, queries=5))
    return {
        "l2l": import_learn2learn(),
        "torch": torch,
        **{name: getattr(metamom, name) for name in ("BiasedAccumulator", "CompositeMomentum", "TopK")},
        "model": SinusoidMLP((8,)),
        "loss_fn": F.mse_loss,
        "iterations": 2,
        "meta_batch": lambda k: [tasks[32 * k + i] for i in range(32)],
    }


def torchvision_names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pretrained networks take for granted: torchvision, here without a download of weights."""
    torchvision = import_torchvision()
    resnet18 = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights: resnet18(weights=None))
    return {"torch": torch, "torchvision": torchvision, "F": F, "MAML": metamom.MAML}


@pytest.fixture(scope="module")
def trained_on_photos(tmp_path_factory, data_root) -> Path:
    """A folder with ``photos``, and ``runs/photos``, briefly trained on them."""
    folder = tmp_path_factory.mktemp("own-data")
    photos = write_characters(data_root, folder / "photos")
    words = ["train", "images", "--root", str(photos), "--iterations", "2", "--meta-batch", "2", "--queries", "2"]
    words += ["--inner-lr", "0.1", "--image-size", "28", "--evaluate-tasks", "4"]
    assert cli.main([*words, "--run-dir", str(folder / "runs" / "photos")]) == 0
    shutil.copytree(next((photos / "test").iterdir()), folder / "inbox")
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_code_of_the_pages_runs(block, tmp_path, monkeypatch, request):
    given: dict[str, Any] = {}
    folder = tmp_path
    if "Omniglot(" in block.code:
        monkeypatch.setenv("METAMOM_DATA", str(request.getfixturevalue("data_root")))
    if "l2l." in block.code:
        given |= learn2learn_names()
    if "torchvision" in block.code:
        given |= torchvision_names(monkeypatch)
    if "init_process_group(" in block.code:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            monkeypatch.setenv(name, value)
    if '"runs/photos"' in block.code:
        folder = request.getfixturevalue("trained_on_photos")
        given |= {"metamom": metamom}
    if "tensorboard" in block.code:
        need("tensorboard")
    for package in ("accelerate", "lightning"):
        if package in block.code:
            need(package)
            import_torchvision()  # which they import too
    monkeypatch.chdir(folder)
    run(block, given)


def test_there_are_blocks():
    assert len(BLOCKS) > 30
    assert any("learner.backward" in block.code for block in BLOCKS if block.page == README)
