"""Measure the floors and write the report.

python -m metamom.experiments.floor [--only regressions|sinusoids] [--run-dir runs/floor]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.allocator import keep_freed_memory
from metamom.experiments.floor import regressions, sinusoids
from metamom.files import write_atomically

EXPERIMENTS = {"regressions": regressions, "sinusoids": sinusoids}


def main() -> None:
    """Run, write and print."""
    parser = argparse.ArgumentParser(description="Bias floors, for every beta and with each cure.", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/floor"), help="where the report goes")
    parser.add_argument("--only", choices=EXPERIMENTS, help="one of them alone")
    arguments = parser.parse_args()
    keep_freed_memory()
    text = "# The bias floor, every beta, and the cures\n"
    for name in [arguments.only] if arguments.only else EXPERIMENTS:
        experiment, figure = EXPERIMENTS[name], Path("figures") / f"floor-{name}.png"
        table = experiment.show(arguments.run_dir / figure)
        text += f"\n## {experiment.TITLE}\n\n{table}\n\n![{experiment.TITLE}]({figure})\n"
    write_atomically(arguments.run_dir / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
