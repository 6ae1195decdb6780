"""Measure the floors of momentum on a ring, on a torus and with a server, under biased gradients.

    python -m metamom.experiments.decentral [--run-dir runs/decentral]

Sixteen workers with different quadratics, float64. ``report.md`` has the table, ``floors.json`` every number, and
``figures/decentral.png`` the floor along the run, against the step size, and against how much workers differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.flag_types import folder
from metamom.experiments.decentral.problem import DecentralFloors
from metamom.experiments.decentral.report import report


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.decentral",
        description="Floors of momentum without a server.",
        allow_abbrev=False,
    )
    parser.add_argument("--run-dir", type=folder, default=Path("runs/decentral"), help="where to write the report")
    print(report(DecentralFloors(), parser.parse_args().run_dir).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
