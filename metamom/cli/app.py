"""The ``metamom`` command.

A file for each command has its flags, `add`, and its action, `run`. Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import metamom
from metamom.cli import adapt, bias, compare, data, evaluate, export, report, reproduce, reproduce_published, train
from metamom.cli.config_file import read_flags
from metamom.cli.parser import Parser

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train.run,
    "evaluate": evaluate.run,
    "compare": compare.run,
    "report": report.run,
    "adapt": adapt.run,
    "export": export.run,
    "bias": bias.run,
    "reproduce": reproduce.run,
    "published": reproduce_published.run,
    "table": reproduce.run_table,
    "data": data.run,
}
"""The actions of the commands, by name: each takes the parsed arguments and returns an exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit status: 0, 1 (diverged), 2 (bad input), 3 (another process is gone or hangs), 130, 143 (interrupted).
    """
    words = sys.argv[1:] if argv is None else argv
    arguments = parsed(parser(), words)
    arguments.words = words
    from metamom.cli.running import run  # which imports torch

    return run(arguments)


def parser() -> Parser:
    """The command line; each command's function is in the result's ``run``."""
    root = Parser(prog="metamom", description="Meta-learners trained by composite momentum under biased gradients.")
    root.add_argument("--version", action="version", version=f"metamom {metamom.__version__}")
    kinds = root.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, evaluate, compare, report, bias, adapt, export, reproduce, data):
        command.add(kinds)
    return root


def parsed(root: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, or an exit with status 2; flags on the command line override those of ``--config``."""
    for argument in argv:
        name, equals, value = argument.partition("=")
        # which argparse takes for no value, or an empty list
        if name.startswith("--") and equals and value == "--":
            root.error(f"argument {name}: expected a value; got '--'")
    try:
        argv = compare.with_runs(argv)
    except ValueError as error:
        root.error(str(error))
    arguments = root.parse_args(argv)
    if getattr(arguments, "config", None) is None:
        return arguments
    leaf: Parser = arguments.leaf
    try:
        leaf.set_defaults(**read_flags(leaf, arguments.config))
    except (ValueError, OSError) as error:
        leaf.error(str(error))
    return root.parse_args(argv)
