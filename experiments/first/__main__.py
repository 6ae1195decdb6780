"""Run the three first experiments.

    python -m metamom.experiments.first [--run-dir runs/first] [--only law|floors|tuned]

A table and a figure each, in ``report.md`` and ``figures/``; docs/tutorial.md walks through them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.flag_types import folder
from metamom.experiments.first import floors, law, tuned
from metamom.experiments.shared.parts import assembled, keep_part

EXPERIMENTS = {"law": law, "floors": floors, "tuned": tuned}


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.first",
        description="Three first experiments on quadratics.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/first"), help="where to write the report")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run only this experiment")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else EXPERIMENTS:
        experiment, figure = EXPERIMENTS[name], Path("figures") / f"first-{name}.png"
        table = experiment.show(arguments.run_dir / figure)
        keep_part(arguments.run_dir, name, f"{table}\n\n![{experiment.TITLE}]({figure})")
    titles = {name: experiment.TITLE for name, experiment in EXPERIMENTS.items()}
    print(assembled(arguments.run_dir, "Three first experiments", titles).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
