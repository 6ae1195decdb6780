"""Models for the Hugging Face Hub, saved and loaded in a local folder."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from metamom.interop.huggingface import with_hub
from metamom.nets import Conv4


def test_saved_and_loaded_again(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from safetensors import safe_open

    made = with_hub(Conv4, license="mit")
    model = made(3, hidden=4)
    assert isinstance(model, Conv4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ways"] == 3
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(Conv4(3, hidden=4).state_dict())
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(made.from_pretrained(tmp_path)(x), model(x))


def test_what_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="takes a class of models"):
        with_hub(Conv4(3))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        with_hub(Conv4)
