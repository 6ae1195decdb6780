"""``metamom data``: fetch or check data sets."""

from __future__ import annotations

import argparse

from metamom.cli.flags import add_data_root
from metamom.cli.parser import Parser
from metamom.common.choices import DATA_SETS


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "data",
        help="fetch or check data sets",
        usage=f"%(prog)s fetch|check {'|'.join(DATA_SETS)} [--root DIR]",
        examples=("metamom data fetch omniglot", "metamom data check mnist --root data"),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    task = leaf.add_argument_group("task")
    task.add_argument("action", choices=("fetch", "check"), help="what to do")
    task.add_argument("dataset", choices=DATA_SETS, help="the data set")
    add_data_root(task, "root")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.tasks.fetch import check, fetch

    if arguments.action == "fetch":
        for path in fetch(arguments.dataset, arguments.root):
            print(path)
    for part in check(arguments.dataset, arguments.root):
        print(f"{part.path}: {', '.join(f'{count:,} {what}' for what, count in part.holds.items())}, all sound")
    return 0
