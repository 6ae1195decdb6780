"""Search the grids and write the report.

    python -m metamom.experiments.sensitivity [--only sinusoid,omniglot,anil,fashion,mlp] [--run-dir runs/sensitivity]

Every run's outcome is stored in ``RUN/outcomes``; an interrupted search continues where it stopped. The tables go into
``RUN/report.md``, next to those of earlier runs, the heat maps into ``RUN/figures``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import folder
from metamom.experiments.sensitivity.grid import search
from metamom.experiments.sensitivity.report import figure, table
from metamom.experiments.sensitivity.settings import SETTINGS
from metamom.experiments.shared.parts import assembled, keep_part


def main() -> None:
    """Run or resume, and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.sensitivity",
        description="Grids over γ and β at several levels of bias.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", default=",".join(SETTINGS), help=f"some of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--data-root", metavar="DIR", help="where the data is (default: as `metamom train` finds it)")
    parser.add_argument(
        "--run-dir", type=folder, default=Path("runs/sensitivity"), help=("where to write the outcomes and the report")
    )
    arguments = parser.parse_args()
    names = [name.strip() for name in arguments.only.split(",")]
    if unknown := [name for name in names if name not in SETTINGS]:
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(SETTINGS)}.")
    keep_freed_memory()
    for name in names:
        try:
            outcomes = search(name, arguments.run_dir / "outcomes" / f"{name}.json", root=arguments.data_root)
        except ValueError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            sys.exit("interrupted; finished runs are kept: run the same command again to continue.")
        text = table(outcomes, name)
        for level in SETTINGS[name].levels:
            path = Path("figures") / f"{name}-{level.replace(':', '').replace('%', '')}.png"
            figure(outcomes, name, level, arguments.run_dir / path)
            text += f"\n\n![{SETTINGS[name].title}, {level}]({path})"
        keep_part(arguments.run_dir, name, text)
    titles = {name: setting.title for name, setting in SETTINGS.items()}
    print(assembled(arguments.run_dir, "How sensitive training is to γ and β", titles).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
