"""The help, and errors of command lines: soon, complete, and with suggestions."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

import pytest
from test_command_lines import leaves

from metamom import cli
from metamom.bias.spec import spec_help
from metamom.cli import spec_table
from metamom.cli.app import parsed, parser
from metamom.cli.parser import did_you_mean
from metamom.common.choices import DATA_SETS
from metamom.experiments import defaults, optimizers
from metamom.experiments.families import FAMILIES
from metamom.experiments.recipes import DTYPES, Recipe
from metamom.tasks.locate import LAYOUTS

GROUPS = ["task", "learner", "bias", "optimizer", "run", "processes"]
SLOW = ("torch", "scipy", "matplotlib", "pydantic", "PIL", "requests")  # to import
COMMANDS = [leaf.prog.split()[1:] for leaf in leaves(parser())]
WITHOUT_TORCH = f"""
import contextlib, io, json, sys
from metamom import cli
answers = {{}}
for line in json.loads(sys.argv[1]):
    before, said = set(sys.modules), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(line.split())
        except SystemExit as exit:
            code = exit.code
    answers[line] = code, said.getvalue(), sorted(set({SLOW}) & set(sys.modules) - before)
print(json.dumps(answers))
"""
WITHOUT_RUNNING = [
    ("--help", 0, "usage: metamom"),
    ("--version", 0, "metamom "),
    ("train --help", 0, "usage: metamom train"),
    *((f"{' '.join(words)} --help", 0, "examples:") for words in COMMANDS),
    ("train sinusoid --chunk-sise 3", 2, "did you mean --chunk-size?"),
]


@pytest.fixture(scope="module")
def without_torch() -> dict[str, tuple[int, str, list[str]]]:
    """Status, output and slow imports of each of these command lines, one after the other in a process."""
    command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps([words for words, _, _ in WITHOUT_RUNNING])]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.parametrize(("words", "code", "message"), WITHOUT_RUNNING)
def test_without_torch(words, code, message, without_torch):
    status, said, loaded = without_torch[words]
    assert loaded == []
    assert status == code, said
    assert message in said
    assert "SPEC, an" not in said or spec_help() in said


def test_the_table_of_operators_as_read_from_the_source(monkeypatch):
    monkeypatch.delitem(sys.modules, "metamom.bias.spec")
    assert spec_table.spec_table() == spec_help()


def test_every_dtype_of_the_help_is_known():
    assert tuple(DTYPES) == defaults.DTYPE_NAMES


def test_every_data_set_of_the_help_is_known():
    assert tuple(LAYOUTS) == DATA_SETS
    assert {family.data for family in FAMILIES.values()} <= {None, *LAYOUTS}


@pytest.mark.parametrize("task", FAMILIES)
@pytest.mark.parametrize("optimizer", defaults.OPTIMIZERS)
def test_defaults_of_a_recipe(task, optimizer, capsys):
    """Every number that the help shows is the recipe's."""
    recipe = Recipe(task=task, optimizer=optimizer)
    (leaf,) = [leaf for leaf in leaves(parser()) if leaf.prog == f"metamom train {task}"]
    shown = {a.dest: re.search(r"\(default: (.*)\)$", a.help or "")[1] for a in leaf._actions if a.dest != "help"}
    if optimizer in ("momentum", "sgd"):
        assert shown.pop("lr").startswith(f"{recipe.lr}; ")
    else:
        assert re.search(rf"; {recipe.lr} with [a-z, ]*\b{optimizer}\b", shown.pop("lr"))
    decay = inspect.signature(optimizers.find_optimizer(optimizer)).parameters.get("weight_decay")
    others = re.search(rf"; (\S+) with {optimizer}\b", shown.pop("weight_decay"))
    assert float(others[1] if others else 0) == (0 if decay is None else decay.default)
    words = {"adapt": "all", "compile": "off", "learn_inner_lr": "off", "normalize": "off", "patience": "off"}
    words |= {
        "fixed_tasks": "new tasks in each iteration",
        "tracking": "0.2",
        "proximal": "2",
        "optimizer": "momentum",
        "norm": "batch",
    }
    words |= {"root": "none", "splits": "the folders in --root", "augment": "none"}
    words |= {"init": "weights drawn from --seed", "init_except": "none"}
    words |= {"learner_kind": "maml", "head": "the last layer", "within_alphabet": "off"}
    words |= {
        "proximal": "2",
        "step_norms": "off",
        "positive_inner_lr": "off",
        "inner_optimizer": "sgd",
        "multi_step": "0",
        "first_order_until": "0",
        "attack": "none",
    }
    words |= {"optimizer_args": "its own", "inner_lr_lr": "that of --lr", "clip_grad": "off", "warmup": "0"}
    words |= {"participation": "1", "worker_weights": "equal", "local_steps": "1", "local_lr": "γ", "down_bias": "none"}
    words |= {"variant": "heavy-ball", "beta_schedule": "constant"}
    for name, value in recipe.settings().items():
        if name in shown:
            assert shown[name] == words.get(name, str(value)), name


def options(leaf: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """The arguments by the title of their group."""
    for group in leaf._action_groups:
        yield from ((group.title or "", action) for action in group._group_actions)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_a_command(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (leaf,) = [leaf for leaf in leaves(parser()) if leaf.prog.split()[1:] == words]
    said = leaf.format_help()
    assert max(map(len, said.splitlines())) <= 100
    titles = list(dict.fromkeys(title for title, action in options(leaf) if action.dest != "help"))
    assert titles == [title for title in GROUPS if title in titles]
    for _, action in options(leaf):
        if action.option_strings and action.dest != "help":
            assert re.search(r"\((default: [^()]+|default: .*\)|required)\)?$", action.help or ""), action.dest
            assert "None" not in (action.help or "")
    *_, head, first, second = said.splitlines()
    assert head == "examples:"
    for example in (first, second):
        program, *rest = shlex.split(example)
        assert program == "metamom"
        assert rest[: len(words)] == words
        assert parsed(parser(), rest).run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "argument COMMAND: invalid choice: 'trian' .*; did you mean train[?]"),
        ("train sinusiod", "argument TASK: invalid choice: 'sinusiod' .*; did you mean sinusoid[?]"),
        ("--versoin", "unrecognized arguments: --versoin; did you mean --version[?]"),
        ("train sinusoid --chunk_size 3", "unrecognized arguments: --chunk_size 3; did you mean --chunk-size[?]"),
        ("train sinusoid --iter=3", "unrecognized arguments: --iter=3; did you mean --iterations[?]"),
        ("train sinusoid --order reshufle", "invalid choice: 'reshufle' .*; did you mean reshuffle[?]"),
        ("reproduce mnist --run-dri x", "unrecognized arguments: --run-dri; did you mean --run-dir[?]"),
        ("train sinusoid --estimator exat", "did you mean exact[?]"),
        ("train sinusoid --momentum 0.9", "unrecognized arguments: --momentum 0.9$"),
        ("train sinusoid extra", "unrecognized arguments: extra$"),
        ("train sinusoid --lr --beta 1", "argument --lr: expected one argument$"),
        ("evaluate", "the following arguments are required: RUN$"),
        ("train sinusoid " + "--" + "x" * 5000, "unrecognized arguments: .{,100}$"),
        ("train sinusoid --a\u2028b\x1b[0m", r"unrecognized arguments: --a\\u2028b\\x1b\[0m$"),
    ],
)
def test_one_line_with_a_suggestion(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split(" "))
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert re.match("metamom[a-z ]*: error: ", line)
    assert re.search(message, line)


def test_what_comes_close():
    assert did_you_mean(["--lrr"], ["--lr", "--beta", "-h"]) == "; did you mean --lr?"
    assert did_you_mean(["--zzz"], ["--lr", "--beta", "-h"]) == ""
    assert did_you_mean(["--beat", "--lrs"], ["--lr", "--beta"]) == "; did you mean --beta, --lr?"


def test_version(metamom):
    assert metamom("--version") == (0, f"metamom {metadata.version('metamom')}\n", "")


@pytest.mark.parametrize(
    "command", [[], ["train"], ["train", "sinusoid"], ["evaluate"], ["compare", "omniglot"], ["data"]]
)
def test_help(command, metamom):
    said = metamom(*command, "--help")
    assert said.code == 0
    assert said.out.startswith(" ".join(["usage: metamom", *command]))


@pytest.mark.parametrize(
    "command", [["train", "sinusoid"], ["compare", "omniglot"], ["reproduce", "mnist"], ["reproduce", "fashion"]]
)
def test_help_on_specs(command, metamom, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = metamom(*command, "--help").out
    assert spec_help() in said
    assert max(map(len, said.splitlines())) <= 100
