"""A call that goes on until it is interrupted, for pools of processes. Run as a program, it makes three of them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from metamom.experiments.shared.processes import run_in_processes
from metamom.training.interrupts import Interrupts


def until_interrupted(folder: Path, number: int) -> None:
    """Leave ``NUMBER.begun`` with this process's id, and, some time after an interrupt, ``NUMBER.saved``."""
    with Interrupts() as interrupts:
        begun = folder / f"{number}.new"
        begun.write_text(str(os.getpid()))
        begun.rename(folder / f"{number}.begun")
        while interrupts.caught is None:
            time.sleep(0.01)
        time.sleep(0.5)
        (folder / f"{number}.saved").touch()
    raise KeyboardInterrupt(f"saved {number}")


if __name__ == "__main__":
    run_in_processes(until_interrupted, [(Path(sys.argv[1]), number) for number in range(3)], 2, "calls")
