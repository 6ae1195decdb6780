"""The examples in docstrings print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import metamom


def with_examples() -> Iterator[str]:
    """The modules with an example that runs, by the prompts in their source."""
    for module in pkgutil.walk_packages(metamom.__path__, "metamom."):
        lines = Path(module.module_finder.find_spec(module.name, None).origin).read_text(encoding="utf-8").splitlines()
        if any(">>> " in line and "+SKIP" not in line for line in lines):
            yield module.name


MODULES = sorted(with_examples())


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed


def test_there_are_examples():
    assert len(MODULES) >= 45
    assert {"metamom.tasks.sinusoid", "metamom.training.loop", "metamom.maml.learner"} <= set(MODULES)
