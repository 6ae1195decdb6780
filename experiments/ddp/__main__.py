"""Time a step of a model in DDP with bias operators, with PyTorch's communication hooks, and without a hook.

    python -m metamom.experiments.ddp [--processes 2] [--width 2048] [--rounds 20] [--json]

The processes are on this machine and have one thread each. Bytes are those of all processes in one step. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from metamom.common import tables
from metamom.common.checks import MOST
from metamom.common.flag_types import count
from metamom.experiments.shared.quartiles import shown, spread
from metamom.experiments.shared.torchrun import on_processes
from metamom.training.directory import environment

MOST_PROCESSES = 1000


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        words: the arguments of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.ddp",
        description="Time bias operators and other hooks in DDP.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--processes", type=count(MOST_PROCESSES, 2), default=2, help="number of processes (default: 2)")
    add("--width", type=count(MOST, 1), default=2048, help="of the model; 2048 has 10 million parameters (the default)")
    add("--rounds", type=count(MOST, 1), default=20, help="timed steps of each hook, in turns (default: 20)")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(words)
    plan = {"width": arguments.width, "rounds": arguments.rounds}
    try:
        found = on_processes("metamom.experiments.ddp.step", arguments.processes, plan)
    except ChildProcessError as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps({"environment": environment(), "processes": arguments.processes, **plan, **found}))
        return
    print(f"{found['parameters']:,} parameters, {arguments.processes} processes, {arguments.rounds} steps each\n")
    print("\n".join(table(found["hooks"])))


def table(hooks: dict[str, dict[str, list[float]]]) -> list[str]:
    """The results in Markdown; the first hook is what the others' bytes are compared with."""
    dense = hooks[next(iter(hooks))]["sent_bytes"][-1]
    lines = tables.head("hook", "ms a step (quartiles)", "MB sent", "share", right=(1, 2, 3))
    for name, found in hooks.items():
        sent, milliseconds = found["sent_bytes"][-1], [1e3 * seconds for seconds in found["seconds"]]
        lines.append(tables.row(name, shown(spread(milliseconds)), f"{sent / 1e6:.2f}", f"{sent / dense:.2%}"))
    return lines


if __name__ == "__main__":
    main()
