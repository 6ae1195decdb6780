"""Measure the floors and write the report.

python -m metamom.experiments.floor [--only regressions|sinusoids] [--run-dir runs/floor]

``report.md`` holds what was run now and what an earlier run has left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.common.allocator import keep_freed_memory
from metamom.experiments.floor import regressions, sinusoids
from metamom.experiments.shared.parts import assembled, keep_part

EXPERIMENTS = {"regressions": regressions, "sinusoids": sinusoids}


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description="Bias floors, for every beta and with each cure.", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/floor"), help="where the report goes")
    parser.add_argument("--only", choices=EXPERIMENTS, help="one of them alone")
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in [arguments.only] if arguments.only else EXPERIMENTS:
        experiment, figure = EXPERIMENTS[name], Path("figures") / f"floor-{name}.png"
        table = experiment.show(arguments.run_dir / figure)
        keep_part(arguments.run_dir, name, f"{table}\n\n![{experiment.TITLE}]({figure})")
    titles = {name: experiment.TITLE for name, experiment in EXPERIMENTS.items()}
    print(assembled(arguments.run_dir, "The bias floor, every beta, and the cures", titles).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
