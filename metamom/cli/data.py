"""``metamom data``: fetch or check data sets, or check a folder of images."""

from __future__ import annotations

import argparse
import json

from metamom.cli.flags import add_data_root, add_splits, switch
from metamom.cli.parser import Parser
from metamom.common.choices import DATA_SETS
from metamom.common.numbers import counted

IMAGES = "images"


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "data",
        help="fetch or check data sets",
        usage=f"%(prog)s fetch|check {'|'.join(DATA_SETS)} [--root DIR]\n"
        f"       %(prog)s check {IMAGES} --root DIR [--splits DIR] [--json]",
        examples=(
            "metamom data fetch omniglot",
            f"metamom data check {IMAGES} --root my-images",
        ),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    task = leaf.add_argument_group("task")
    task.add_argument("action", choices=("fetch", "check"), help="what to do")
    task.add_argument(
        "dataset",
        choices=(*DATA_SETS, IMAGES),
        help=f"the data set; {IMAGES} for a folder of your own, train/CLASS/*.png or CLASS/*.png",
    )
    add_data_root(task, "root")
    add_splits(task)
    switch(task, "--json", f"with {IMAGES}, print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    if arguments.dataset == IMAGES:
        return _check_images(arguments)
    if arguments.splits is not None or arguments.json:
        arguments.leaf.error(f"--splits and --json belong to `metamom data check {IMAGES}`; got {arguments.dataset}")
    from metamom.tasks.fetch import check, fetch

    if arguments.action == "fetch":
        for path in fetch(arguments.dataset, arguments.root):
            print(path)
    for part in check(arguments.dataset, arguments.root):
        print(f"{part.path}: {', '.join(f'{count:,} {what}' for what, count in part.holds.items())}, all sound")
    return 0


def _check_images(arguments: argparse.Namespace) -> int:
    """Print what is in a folder of images, and its problems at the end; the status is 1 if there are any."""
    from metamom.tasks.image_check import check_images
    from metamom.tasks.image_files import split_lists

    if arguments.action != "check" or arguments.root is None:
        arguments.leaf.error(f"a folder of your own images can be checked: metamom data check {IMAGES} --root DIR")
    splits = None if arguments.splits is None else split_lists(arguments.splits)
    found = check_images(arguments.root, splits=splits)
    if arguments.json:
        print(json.dumps(found.as_json()))
        return 0 if found.sound else 1
    print(found)
    if not found.sound:
        print(f"{counted(len(found.problems), 'problem')}:", *found.problems, sep="\n  ")
    return 0 if found.sound else 1
