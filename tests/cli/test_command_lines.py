"""Command lines of slips and worse: each is answered in one line, soon, and leaves the rest of the disk alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import loop_over
from fuzzing import bounded, campaign
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, cli, evaluate, train
from metamom.cli.app import parsed, parser
from metamom.common.allocator import out_of_memory
from metamom.common.checks import AT_ONCE, MOST
from metamom.common.flag_types import count, counts, long_count, names, number, numbers, path, seed, task_count
from metamom.experiments.recipes import Recipe
from metamom.nets.models import SinusoidMLP
from metamom.rng import DrawCoordinates, Purpose, uniforms
from metamom.tasks import FixedTasks, LinearRegression, Sinusoid

SAID_TO_BE_A_NUMBER = ("1_000", "١٢", "１２", "²", "0x10", "", " ", "1e3x", "--", "1\u2028", "9" * 5000)


@loop_over(text=SAID_TO_BE_A_NUMBER, kind=(long_count, task_count, number, counts(task_count), numbers, seed))
def test_what_only_python_takes_for_a_number(kind, text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (long_count, str(MOST), MOST),
        (task_count, " 10 ", 10),
        (task_count, "-1", -1),  # the library says what to do
        (number, "1e-3", 0.001),
        (counts(task_count), "0, 1,5", (0, 1, 5)),
        (numbers, "1,.1", (1.0, 0.1)),
        (names, "head, body", ("head", "body")),
        (seed, str(2**64), 2**64),
        (path, "a folder", "a folder"),
    ],
)
def test_what_is_taken(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (long_count, str(MOST + 1), "at most 2,147,483,647"),
        (long_count, str(-MOST - 1), "at most 2,147,483,647"),
        (task_count, str(AT_ONCE + 1), "at most 10,000,000"),
        (count(5, 1), "6", "from 1 to 5"),
        (count(5, 1), "0", "from 1 to 5"),
        (number, "nan", "wanted a number"),
        (number, "-inf", "wanted a number"),
        (number, "1e999", "wanted a number"),
        (counts(task_count), "1,,2", "commas between"),
        (counts(task_count), ",".join("1" * 101), "at most 100 of them"),
        (numbers, "0.1,", "commas between"),
        (names, "head,", "commas between"),
        (names, "", "commas between"),
        (path, "", "wanted a path"),
        (path, "a\udcffb", r"UTF-8; got 'a\\udcffb'"),
    ],
)
def test_what_is_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (["train", "sinusoid", "--iterations"], "2,147,483,647"),
        (["train", "sinusoid", "--meta-batch"], "10,000,000"),
        (["train", "sinusoid", "--shots"], "100,000"),
        (["train", "sinusoid", "--inner-steps"], "100,000"),
        (["evaluate", "nowhere", "--steps"], "100,000"),
        (["evaluate", "nowhere", "--tasks"], "10,000,000"),
        (["compare", "sinusoid", "--jobs"], "10,000"),
        (["compare", "sinusoid", "--seeds"], "10,000"),
        (["compare", "sinusoid", "--evaluate-tasks"], "10,000,000"),
        (["bias", "sinusoid", "--inner-batch"], "100,000"),
        (["reproduce", "mnist", "--run-dir", "run", "--epochs"], "2,147,483,647"),
        (["reproduce", "mnist", "--run-dir", "run", "--chunk"], "10,000,000"),
    ],
)
def test_whole_numbers_are_bounded(words, most, capsys):
    number = int(most.replace(",", ""))
    assert parsed(parser(), [*words, str(number)]).run
    for text in (str(number + 1), str(2**40), "1" * 30):
        with pytest.raises(SystemExit, match="2"):
            cli.main([*words, text])
        assert f"argument {words[-1]}: wanted a whole number of at most {most}; got" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--lrs", "0.1", "--lrs", "0.3"], ["--lrs=0.1", "--lrs", "0.3"]])
def test_the_last_of_a_flag_given_twice_counts(words):
    """So that a script's command line may be overridden at its end."""
    assert parsed(parser(), ["compare", "sinusoid", *words]).lrs == (0.3,)


def leaves(root: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers without sub-commands."""
    inner = [a for a in root._actions if isinstance(a, argparse._SubParsersAction)]
    return [leaf for action in inner for each in action.choices.values() for leaf in leaves(each)] or [root]


def test_no_flag_has_numbers_of_python_s_own():
    kinds = {action.type for leaf in leaves(parser()) for action in leaf._actions}
    assert not {int, float} & kinds
    for folder in ("experiments", "metamom"):
        for file in (Path(__file__).resolve().parents[2] / folder).rglob("*.py"):
            assert not re.search(r"type=(int|float)\b", file.read_text(encoding="utf-8")), file


def test_numbers_beyond_memory_are_refused_by_the_library(tmp_path):
    learner = MAML(SinusoidMLP((4,)), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    huge = 2**40
    calls: list[tuple[str, Callable[[], object]]] = [
        (f"{name} must be at most", lambda name=name: train(
            learner, optimizer, Sinusoid(), run_dir=tmp_path / "run", settings={},
            **{"iterations": 1, "meta_batch": 2, name: huge},
        ))
        for name in ("iterations", "meta_batch", "checkpoint_every", "evaluate_every", "evaluate_tasks")
    ] + [
        ("tasks must be at most", lambda: evaluate(learner, Sinusoid(), tasks=10**12)),
        ("inner steps must be at most", lambda: evaluate(learner, Sinusoid(), steps=[0, huge])),
        ("inner_steps must be at most", lambda: MAML(learner.model, F.mse_loss, inner_steps=huge)),
        ("shots must be at most", lambda: Sinusoid(shots=huge)),
        ("queries must be at most", lambda: LinearRegression(2, 5, queries=huge)),
        ("dim must be at most", lambda: LinearRegression(huge, 5)),
        ("the number of tasks must be at most", lambda: Sinusoid().sample(0, huge)),
        ("2 GiB", lambda: Sinusoid(shots=AT_ONCE).sample(0, 100)),
        ("2 GiB", lambda: uniforms(0, DrawCoordinates("train", 0, np.arange(2**15)), Purpose.DATA, 2**14)),
        ("cosine:N", lambda: Recipe("sinusoid", schedule=f"cosine:{'9' * 400}")),
    ]  # fmt: skip
    for message, call in calls:
        with bounded(10, 512), pytest.raises(ValueError, match=message):
            call()
    assert FixedTasks(Sinusoid(), huge).sample(0, 2).num_tasks == 2  # they are drawn when they are wanted
    assert not (tmp_path / "run").exists()


def test_a_prime_number_of_tasks():
    """It has no parts, which took as many steps to find out as there are tasks."""
    learner = MAML(SinusoidMLP((4,)), F.mse_loss)
    assert evaluate(learner, Sinusoid(1, 1), tasks=10_007, steps=[0]).values.shape == (1, 10_007)


def test_memory_that_cannot_be_had_is_distinguished_from_other_errors():
    with bounded(10, 256), pytest.raises(RuntimeError) as caught:
        torch.zeros(2**40)
    why = out_of_memory(caught.value)
    assert why is not None
    assert "tried to allocate" in why
    assert "\n" not in why
    assert out_of_memory(MemoryError()) == "an allocation failed"
    assert out_of_memory(RuntimeError("shapes do not fit")) is None


# the campaign

PIECES = (
    "0", "1", "2", "-1", "3", "1e-3", "0.1", "nan", "inf", "-inf", "1e308", "1e-320", "١", "1_0", "", " ", "--", "-",
    str(2**31), str(2**40), str(2**64), "9" * 400, "a" * 5000, "\u2028", "\udcff", "1,2", "0,,1", ",", "0.1,0.1",
    "auto", "none", "topk:1%", "every=1", "every=0", "cosine:2", "cosine:" + "9" * 50, "head", "nowhere", "..",
    "/dev/null", "median", "trimmed:0.2", "moml", "richardson", "float64", "zero", "adam", "cuda:99",
)  # fmt: skip
FEW = ["--iterations", "1", "--meta-batch", "2", "--evaluate-tasks", "2", "--shots", "2"]
START = {
    "train": ["train", "sinusoid", *FEW],
    "evaluate": ["evaluate", "trained", "--tasks", "2", "--steps", "0"],
    "compare": [
        "compare", "sinusoid", *FEW, "--tasks", "2", "--seeds", "1", "--lrs", "0.1", "--betas", "1", "--steps", "0",
    ],
    "bias": ["bias", "sinusoid", "--tasks", "4", "--inner-batch", "1"],
    "reproduce": ["reproduce", "mnist", "--data-root", "nowhere", "--run-dir", "paper"],
    "data": ["data", "check", "omniglot", "--root", "nowhere"],
}  # fmt: skip
LEFT_OUT = {"--jobs", "--help", "-h", "--version", "--compile", "--tensorboard"}  # processes, compilers


def command_line(rng: random.Random) -> list[str]:
    """A small command that works, with one to three changes: flags, words, values."""
    name = rng.choice(list(START))
    words = list(START[name])
    leaf = rng.choice([leaf for leaf in leaves(parser()) if leaf.prog.split()[1] == name])
    flags = sorted(set(leaf._option_string_actions) - LEFT_OUT)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.choice(("flag", "flag", "flag", "value", "value", "twice", "replace", "insert", "drop"))
        if kind == "flag" and (unused := [flag for flag in flags if flag not in words]):
            words += [rng.choice(unused), rng.choice(PIECES)]
        elif kind == "value" and (places := [i for i in range(2, len(words)) if words[i - 1] in flags]):
            words[rng.choice(places)] = rng.choice(PIECES)
        elif kind == "twice":
            words.append(f"{rng.choice(flags)}={rng.choice(PIECES)}")
        elif kind == "replace":
            words[rng.randrange(len(words))] = rng.choice(PIECES)
        elif kind == "insert":
            words.insert(rng.randrange(len(words)), rng.choice(PIECES))
        else:
            del words[rng.randrange(len(words))]
    return words


def answered(words: list[str]) -> tuple[object, str]:
    """The exit status and what stands on standard error, within bounds."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with bounded(20, 2048), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: object = cli.main(words)
        except SystemExit as exit:
            code = exit.code
    err.seek(0)
    return code, err.read()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run to evaluate."""
    run = tmp_path_factory.mktemp("campaign") / "trained"
    assert cli.main([*START["train"], "--run-dir", str(run)]) == 0
    return run


@campaign(60, 1500)
def test_any_command_line_is_answered(seeds, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("METAMOM_DATA", "nowhere")
    place = tmp_path / "outside" / "inside"
    for case in seeds:
        words = command_line(random.Random(case))
        here = place / str(case)
        here.mkdir(parents=True)
        (here / "trained").symlink_to(trained)
        monkeypatch.chdir(here)
        before = set(os.listdir(place.parent)), set(os.listdir(tmp_path))
        try:
            code, said = answered(words)
        except Exception as error:
            raise AssertionError(f"seed {case}: {words} raised {type(error).__name__}: {error}") from error
        assert code in (0, 1, 2), (case, words, code)
        lines = [line for line in said.splitlines() if re.match(r"metamom[a-z ]*: (error|diverged): ", line)]
        assert len(lines) == (0 if code == 0 else 1), (case, words, said)
        assert "Traceback" not in said, (case, words, said)
        assert (set(os.listdir(place.parent)), set(os.listdir(tmp_path))) == before, (case, words)
