"""What the README, the tutorial and the docstrings show works as written."""

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
from typing import Any, NamedTuple

import pytest
import torch
from installed import need_learn2learn
from torch.nn import functional as F

import metamom
from metamom.cli.app import parser
from metamom.cli.compare import with_runs
from metamom.interop.learn2learn import AsTaskset, import_learn2learn
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs" / "tutorial.md")
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block of a page, and the line that it begins at."""

    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.stem}-line{self.line}"


class Command(NamedTuple):
    """A ``metamom ...`` of a page's shell blocks, as words."""

    page: Path
    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.stem}-line{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    """The pages' code blocks in these languages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for m in BLOCK.finditer(text):
            if m[1] in languages:
                yield Block(page, text.count("\n", 0, m.start()) + 2, m[2])


def commands() -> Iterator[Command]:
    """Every ``metamom ...`` in the pages' shell blocks."""
    for page, first, block in blocks("bash", "sh", "shell", "console"):
        lines = iter(enumerate(block.splitlines(), first))
        for number, line in lines:
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # METAMOM_DATA=... metamom ...
                words = words[1:]
            if words and words[0].split("/")[-1] == "metamom":
                yield Command(page, number, words[1:])
            elif "torchrun" in words:
                yield Command(page, number, words[words.index("metamom") + 1 :])


PYTHON = list(blocks("python"))
COMMANDS = list(commands())


def test_readme_shows_the_loop_and_the_commands():
    assert any("learner.backward" in block.code for block in PYTHON if block.page == README)
    shown = {command.words[0] for command in COMMANDS if command.page == README}
    assert {"train", "evaluate", "compare", "data"} <= shown


def learn2learn_names() -> dict[str, Any]:
    """What the README's learn2learn loops take for granted: a model, its loss, and batches of real tasks."""
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


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_code_of_the_pages_runs(block, tmp_path, monkeypatch, request):
    page, line, code = block
    if "Omniglot(" in code:
        monkeypatch.setenv("METAMOM_DATA", str(request.getfixturevalue("data_root")))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(None):
        torch.manual_seed(0)
        given = learn2learn_names() if "l2l." in code else {}
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__", **given})


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_of_the_pages_parse(command, capsys):
    page, line, words = command
    placeholders = {"[", "]", "...", "|"} & set("".join(words)) - {"."}
    assert not placeholders, f"{page}, line {line} cannot be typed as it stands: {words}"
    try:
        parsed = parser().parse_args(with_runs(words))
    except SystemExit as exit:
        if exit.code != 0:  # as of --version and --help
            pytest.fail(f"{page}, line {line}: {capsys.readouterr().err}")
        return
    assert isinstance(parsed, argparse.Namespace)
    assert callable(parsed.run)


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


def test_references_to_the_theory_name_what_is_there():
    """``docs/theory/x.md, "X"`` in the code is a heading of that page, or a bold title of a paragraph."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "theory").glob("*.md")}
    named = {
        (page, " ".join((quoted or theorem).split()))
        for folder in ("metamom", "tasks", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        for page, quoted, theorem in re.findall(
            r'docs/theory/(\w+\.md)(?:,\s+"([^"]+)"|,\s+(Theorem \w+))?', path.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 20
    missing = [
        (page, title)
        for page, title in sorted(named)
        if not re.search(rf"^(#+ |\*\*){re.escape(title)}" if title else "", pages[page], re.MULTILINE)
    ]
    assert missing == []
