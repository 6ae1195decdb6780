"""Calls of the `metamom` command: flags of a small run, answers and errors."""

from __future__ import annotations

import re
from typing import NamedTuple

SMALL = ["--meta-batch", "4", "--shots", "5", "--evaluate-tasks", "4"]
SMALL_IMAGES = ["--iterations", "4", "--meta-batch", "2", "--queries", "2", "--inner-lr", "0.1", "--image-size", "28"]
SMALL_IMAGES += ["--evaluate-tasks", "4"]


class Answer(NamedTuple):
    """The exit status of a command, and what it printed."""

    code: int
    out: str
    err: str


def the_error(said: Answer) -> str:
    """The error in an answer: its only line, except that argparse prints the usage first."""
    assert said.code == 2, said
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("metamom")]
    assert len(lines) == 1, said.err
    assert said.err.endswith(lines[0] + "\n"), "the error comes last"
    assert re.match(r"metamom[a-z ]*: error: \S", lines[0])
    assert "Traceback" not in said.err
    return lines[0]
