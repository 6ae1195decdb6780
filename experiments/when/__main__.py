"""When does momentum beat SGD under biased gradients? A map of quadratics, and two checks on networks.

    python -m metamom.experiments.when [--run-dir runs/when] [--only map|sinusoids|mnist]

``report.md`` begins with the rule and where it fails; figures are in ``figures/``. MNIST is read from $METAMOM_DATA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.flag_types import folder
from metamom.experiments.when import map as quadratics
from metamom.experiments.when import mnist, sinusoids
from metamom.experiments.when.report import WhenMomentumWins, report

PARTS = {"map": quadratics.TITLE, "sinusoids": sinusoids.TITLE, "mnist": mnist.TITLE}


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.when", description="When does momentum beat SGD?", allow_abbrev=False
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/when"), help="where to write the report")
    parser.add_argument("--only", choices=PARTS, help="run only this part")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else list(PARTS)
    print(report(arguments.run_dir, parts, WhenMomentumWins()).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
