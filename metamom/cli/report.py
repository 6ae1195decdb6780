"""``metamom report``: runs, comparisons and evaluations as one HTML page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from metamom.cli.flags import flag, switch
from metamom.cli.parser import Parser
from metamom.common.flag_types import count, path

NAME = "report.html"
EVERY = 5  # seconds between two looks at runs under way


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "report",
        help="runs, comparisons and evaluations as one HTML page",
        usage="%(prog)s RUN... [options]",
        examples=(
            "metamom report runs/compare-sinusoid --open",
            "metamom report runs/a runs/b --out reports --watch",
        ),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    own = leaf.add_argument_group("run")
    own.add_argument(
        "run_paths",
        type=path,
        nargs="+",
        metavar="RUN",
        help="directories of runs, comparisons or the demo; files of metamom evaluate --record, --json or --csv",
    )
    flag(
        own,
        "--out",
        f"the folder to write {NAME} to",
        "a single run's own, else the current one",
        type=path,
        metavar="DIR",
    )
    switch(own, "--open", "open the page in the browser")
    flag(
        own,
        "--watch",
        f"write the page again every so many seconds ({EVERY} if no number follows) until the runs have ended; the "
        "open page reloads itself",
        "off",
        type=count(3600, least=1),
        nargs="?",
        const=EVERY,
        metavar="SECONDS",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.report import write_page
    from metamom.experiments.report.reading import places_of, read_page

    paths = arguments.run_paths
    file = page_of(places_of(paths), arguments.out)
    found = read_page(paths)
    write_page(file, found.page, reload_every=None if found.finished else arguments.watch)
    print(f"page: {file}", flush=True)
    if arguments.open:
        _open(file)
    try:
        while arguments.watch and not found.finished:
            time.sleep(arguments.watch)
            found = read_page(paths)
            write_page(file, found.page, reload_every=None if found.finished else arguments.watch)
    except KeyboardInterrupt:  # the page that stays does not reload
        write_page(file, read_page(paths).page)
        raise
    return 0


def page_of(places: Sequence[Path], out: str | None) -> Path:
    """Where the page goes."""
    if out is not None:
        return Path(out) / NAME
    return places[0] / NAME if len(places) == 1 and places[0].is_dir() else Path(NAME)


def _open(file: Path) -> None:
    import webbrowser

    if not webbrowser.open(file.resolve().as_uri()):
        print("no browser was found: open the file yourself.")
