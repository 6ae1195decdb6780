"""Measure the floors and write the report.

python -m metamom.experiments.floor [--only regressions|sinusoids] [--run-dir runs/floor]

``report.md`` holds the results of this run and those left by earlier runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import folder
from metamom.experiments.floor import regressions, sinusoids
from metamom.experiments.shared.parts import assembled, keep_part

EXPERIMENTS = {"regressions": regressions, "sinusoids": sinusoids}


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.floor",
        description="Bias floors, for every beta and every remedy.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/floor"), help="where to write the report")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run only this part")
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in [arguments.only] if arguments.only else EXPERIMENTS:
        experiment, figure = EXPERIMENTS[name], Path("figures") / f"floor-{name}.png"
        table = experiment.show(arguments.run_dir / figure)
        keep_part(arguments.run_dir, name, f"{table}\n\n![{experiment.TITLE}]({figure})")
    titles = {name: experiment.TITLE for name, experiment in EXPERIMENTS.items()}
    print(
        assembled(arguments.run_dir, "The bias floor for every beta, and its remedies", titles).read_text(
            encoding="utf-8"
        )
    )


if __name__ == "__main__":
    main()
