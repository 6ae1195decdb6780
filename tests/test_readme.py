"""What the README and the docstrings show works as written."""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import metamom
from metamom import cli
from metamom.flags import parser
from metamom.interop.learn2learn import AsTaskset, import_learn2learn
from metamom.nets import SinusoidMLP
from metamom.tasks import Sinusoid

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(*languages: str) -> list[tuple[int, str]]:
    """The README's code blocks in these languages, each with the line that it begins at."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    return [(text.count("\n", 0, m.start()) + 2, m[2]) for m in BLOCK.finditer(text) if m[1] in languages]


def commands() -> Iterator[tuple[int, list[str]]]:
    """Every ``metamom ...`` in the README's shell blocks, as words."""
    for first, block in blocks("bash", "sh", "shell", "console"):
        lines = iter(enumerate(block.splitlines(), first))
        for number, line in lines:
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # METAMOM_DATA=... metamom ...
                words = words[1:]
            if words and words[0].split("/")[-1] == "metamom":
                yield number, words[1:]


PYTHON = blocks("python")
COMMANDS = list(commands())


def test_readme_shows_the_loop_and_the_commands():
    assert any("learner.backward" in block for _, block in PYTHON)
    shown = {words[0] for _, words in COMMANDS}
    assert {"train", "evaluate", "compare", "data"} <= shown


def learn2learn_names() -> dict[str, Any]:
    """What the README's learn2learn loops take for granted: a model, its loss, and batches of real tasks."""
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


@pytest.mark.parametrize(("line", "code"), PYTHON, ids=[f"line{line}" for line, _ in PYTHON])
def test_code_of_the_readme_runs(line, code, tmp_path, monkeypatch, request):
    if "Omniglot(" in code:
        monkeypatch.setenv("METAMOM_DATA", str(request.getfixturevalue("data_root")))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(None):
        torch.manual_seed(0)
        given = learn2learn_names() if "l2l." in code else {}
        exec(compile("\n" * (line - 1) + code, str(README), "exec"), {"__name__": "__main__", **given})


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[f"line{line}" for line, _ in COMMANDS])
def test_commands_of_the_readme_parse(line, words, capsys):
    placeholders = {"[", "]", "...", "|"} & set("".join(words)) - {"."}
    assert not placeholders, f"{README}, line {line} cannot be typed as it stands: {words}"
    try:
        parsed = parser(cli.COMMANDS).parse_args(words)
    except SystemExit as exit:
        if exit.code != 0:  # as of --version and --help
            pytest.fail(f"{README}, line {line}: {capsys.readouterr().err}")
        return
    assert isinstance(parsed, argparse.Namespace)
    assert callable(parsed.run)


MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(metamom.__path__, "metamom.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        failed, _ = doctest.testmod(importlib.import_module(name))
    assert not failed


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    shown = [test for name in MODULES for test in finder.find(importlib.import_module(name), name) if test.examples]
    assert len(shown) >= 8
    assert {"metamom.tasks.sinusoid", "metamom.training", "metamom.maml"} <= {
        test.name.rsplit(".", 1)[0] for test in shown
    }
