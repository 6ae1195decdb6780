"""The commands in the shell blocks of the README and of every page can be typed as they stand."""

from __future__ import annotations

import argparse
import importlib.util

import pytest
from pages import README, ROOT, commands

from metamom.cli.app import parser
from metamom.cli.compare import with_runs

ALL = list(commands())


def after_metamom(words: list[str]) -> list[str] | None:
    """The arguments of the metamom command, also under torchrun or a path; ``None`` for other commands."""
    if words[0].split("/")[-1] == "metamom":
        return words[1:]
    if "torchrun" in words:
        return words[words.index("metamom") + 1 :] if "metamom" in words else None
    return None


COMMANDS = [(each, words) for each in ALL if (words := after_metamom(each.words)) is not None]
MODULES = [each for each in ALL if "-m" in each.words and each.words[each.words.index("-m") + 1].startswith("metamom.")]


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=lambda each: str(each) if hasattr(each, "page") else "")
def test_commands_of_the_pages_parse(command, words, capsys):
    placeholders = {"[", "]", "...", "|"} & set("".join(words)) - {"."}
    assert not placeholders, f"{command} cannot be typed as it stands: {words}"
    try:
        parsed = parser().parse_args(with_runs(words))
    except SystemExit as exit:
        if exit.code != 0:  # as of --version and --help
            pytest.fail(f"{command}: {capsys.readouterr().err}")
        return
    assert isinstance(parsed, argparse.Namespace)
    assert callable(parsed.run)


@pytest.mark.parametrize("command", MODULES, ids=str)
def test_modules_of_the_pages_can_be_run(command):
    name = command.words[command.words.index("-m") + 1]
    found = importlib.util.find_spec(name)
    assert found is not None, f"{command}: there is no module {name}"
    assert not found.submodule_search_locations or importlib.util.find_spec(f"{name}.__main__"), command


def test_scripts_and_make_targets_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [(each, word) for each in ALL if each.words[0] == "make" for word in each.words[1:] if "=" not in word]
    assert [str(each) for each, target in targets if f"\n{target}:" not in makefile] == []


def test_the_pages_show_the_commands():
    shown = {words[0] for _, words in COMMANDS}
    assert {"train", "evaluate", "compare", "data", "adapt", "export"} <= shown
    assert {"train", "evaluate", "compare"} <= {words[0] for each, words in COMMANDS if each.page == README}
