"""Collect runs of ``metamom reproduce omniglot`` and ``sinusoid``: tables and figures next to the published numbers.

    python -m metamom.experiments.published FOLDER ... [--out DIR]

Reads every run below the folders that has a `published.json`. Writes ``report.md`` with the tables of Omniglot and of
sinusoids, and two figures: ``figures/omniglot-published.png``, validation error during training, and
``figures/sinusoid-published.png``, the error against adaptation steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.files import write_atomically
from metamom.common.flag_types import folder
from metamom.common.numbers import counted
from metamom.experiments.published.curves import omniglot_figure
from metamom.experiments.published.outcome import read_all
from metamom.experiments.published.report import omniglot_table, sinusoid_figure, sinusoid_table


def main() -> None:
    """Collect, draw and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.published",
        description="Compare runs of published recipes with the papers.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=folder, metavar="FOLDER", help="with runs, at any depth")
    parser.add_argument("--out", type=folder, default=Path("runs/published"), help="where the report goes")
    arguments = parser.parse_args()
    try:
        runs = [*read_all(*arguments.folders)]
    except ValueError as error:
        parser.error(str(error))
    outcomes = [outcome for _, outcome in runs]
    if not outcomes:
        parser.error("these folders have no finished run of `metamom reproduce omniglot` or `sinusoid`.")
    parts = []
    if any(each.row is not None for each in outcomes):
        omniglot_figure(
            arguments.out / "figures" / "omniglot-published.png", [each for each in runs if each[1].row is not None]
        )
        parts += ["## Omniglot", "", *omniglot_table(outcomes), ""]
        parts += ["![Validation error during training](figures/omniglot-published.png)", ""]
    if any(each.row is None for each in outcomes):
        picture = arguments.out / "figures" / "sinusoid-published.png"
        sinusoid_figure(picture, outcomes)
        parts += ["## Sinusoids", "", *sinusoid_table(outcomes), ""]
        parts += ["![Error against adaptation steps](figures/sinusoid-published.png)", ""]
    text = "\n".join([f"{counted(len(outcomes), 'run')}, ± is a 95 % interval.", "", *parts])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
