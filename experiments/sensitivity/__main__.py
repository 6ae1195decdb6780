"""Search the grids and write the report.

    python -m metamom.experiments.sensitivity [--only sinusoid,omniglot,anil,fashion,mlp] [--run-dir runs/sensitivity]

Every run's outcome is kept in ``RUN/outcomes``; an interrupted search goes on where it stood. The tables go into
``RUN/report.md``, the heat maps into ``RUN/figures``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metamom.allocator import keep_freed_memory
from metamom.experiments.sensitivity.grid import search
from metamom.experiments.sensitivity.report import figure, table
from metamom.experiments.sensitivity.settings import SETTINGS
from metamom.files import write_atomically


def main() -> None:
    """Run, or go on, and write the report."""
    parser = argparse.ArgumentParser(description="Grids over γ and β at several levels of bias.", allow_abbrev=False)
    parser.add_argument("--only", default=",".join(SETTINGS), help=f"some of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is (default: as `metamom train` finds it)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/sensitivity"), help="where it goes")
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(SETTINGS)}.")
    keep_freed_memory()
    text = "# How sensitive training is to γ and β\n"
    for name in names:
        outcomes = search(name, arguments.run_dir / "outcomes" / f"{name}.json", root=arguments.data_root)
        text += f"\n## {SETTINGS[name].title}\n\n{table(outcomes, name)}\n"
        for level in SETTINGS[name].levels:
            path = Path("figures") / f"{name}-{level.replace(':', '').replace('%', '')}.png"
            figure(outcomes, name, level, arguments.run_dir / path)
            text += f"\n![{SETTINGS[name].title}, {level}]({path})\n"
        write_atomically(arguments.run_dir / "report.md", text.encode())
    print(text)


if __name__ == "__main__":
    main()
