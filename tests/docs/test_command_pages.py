"""The pages of the command line, which the build makes from the parser, have every command and flag."""

from __future__ import annotations

import argparse
import importlib.util
import re
from types import ModuleType

import pytest
from pages import ROOT

from metamom.cli.app import parser


@pytest.fixture(scope="module")
def commands() -> ModuleType:
    """The module that writes the pages."""
    spec = importlib.util.spec_from_file_location("commands", ROOT / ".ci" / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_flag_is_on_its_page(commands, tmp_path):
    names = commands.write_pages(tmp_path)
    index = (tmp_path / "index.md").read_text(encoding="utf-8")
    leaves = list(commands.leaves(parser()))
    assert len(leaves) == len(names) - 1 > 10
    for words, leaf, _ in leaves:
        name = f"{'-'.join(words)}.md"
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert f"[`metamom {' '.join(words)}`]({name})" in index
        assert page.count("\n") < 300, name
        for action in leaf._actions:
            if action.help is not argparse.SUPPRESS and action.dest != "help" and action.option_strings:
                assert re.search(rf"^`.*{re.escape(action.option_strings[-1])}\b.*`$", page, re.MULTILINE), action


def test_the_navigation_has_the_pages(commands, tmp_path):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"command-line/([\w-]+\.md)$", text, re.MULTILINE)
    assert listed == commands.write_pages(tmp_path)


def test_defaults_and_markup(commands):
    assert commands.prose("where, as DIR/*.jpg: $METAMOM_DATA or --root") == (
        "where, as DIR/\\*.jpg: `$METAMOM_DATA` or `--root`"
    )
    command = argparse.ArgumentParser()
    flag = command.add_argument("--beta", help="weight (default: 0.1)")
    assert commands.definition(command, flag) == ["`--beta BETA`", ":   weight<br>*Default: 0.1*", ""]
