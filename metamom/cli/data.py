"""``metamom data``: fetch or check data sets."""

from __future__ import annotations

import argparse

from metamom.common.flag_types import path


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    data = kinds.add_parser("data", help="fetch or check data sets", allow_abbrev=False)
    data.set_defaults(run=run)
    data.add_argument("action", choices=("fetch", "check"))
    data.add_argument("dataset", choices=("omniglot", "mnist", "fashion"))
    data.add_argument(
        "--root",
        type=path,
        metavar="DIR",
        help="where it is, or goes (default: $METAMOM_DATA, else the user's data folder)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.tasks.fetch import check, fetch

    if arguments.action == "fetch":
        for path in fetch(arguments.dataset, arguments.root):
            print(path)
    for part in check(arguments.dataset, arguments.root):
        print(f"{part.path}: {', '.join(f'{count:,} {what}' for what, count in part.holds.items())}, all sound")
    return 0
