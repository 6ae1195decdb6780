"""What a page needs of one run directory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metamom.experiments.python_tasks import task_family
from metamom.experiments.report.contents import Curve, SeedRun
from metamom.experiments.report.summary import POINTS, averaged
from metamom.training.directory import read_log
from metamom.training.ending import Ending, ending_of

ENDINGS = {
    "finished": "completed", "stopped": "stopped early", "interrupted": "interrupted", "diverged": "diverged",
    "failed": "failed",
}  # fmt: skip


class Logged(NamedTuple):
    """A run's ``config.json``, and what the page needs of its ``metrics.jsonl``."""

    path: Path
    config: dict[str, Any]
    run: SeedRun
    classifies: bool
    ending: Ending | None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that define the run."""
        settings: dict[str, Any] = self.config["settings"]
        return settings

    @property
    def total(self) -> int:
        """Iterations that the run was asked for; 0 if its record does not say."""
        total = self.config["length"].get("iterations", 0)
        return total if isinstance(total, int) else 0

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come, as far as the record says; a run that was killed has none."""
        return self.ending is not None or self.run.diverged is not None or 0 < self.total <= self.run.iterations

    @property
    def how(self) -> str:
        """How the run ended, in words."""
        if self.ending is not None:
            said = f": {self.ending.reason}" if self.ending.reason else ""
            return f"{ENDINGS[self.ending.kind]}{said}"
        if self.run.diverged is not None:
            return ENDINGS["diverged"]
        return ENDINGS["finished"] if self.ended else "not ended: under way, or killed"


def read_run(path: Path, config: dict[str, Any]) -> Logged:
    """What a run has logged so far. Unreadable lines are left out, with a warning."""
    log = read_log(path)
    if log.damaged:
        count = len(log.damaged)
        lines_are = "line is" if count == 1 else "lines are"
        warnings.warn(f"{path / 'metrics.jsonl'}: {count} unreadable {lines_are} left out.", stacklevel=2)
    lines = log.lines
    done = lines[-1]["step"] + 1 if lines else 0
    losses = _curve(lines, "loss")
    last = lines[-1].get("loss") if lines else None
    broken = isinstance(last, float) and not math.isfinite(last)
    total = config["length"].get("iterations")
    longest = max(done, total if isinstance(total, int) else 0)
    ending = ending_of(config)
    diverged = ending.step if ending is not None and ending.kind == "diverged" else done if broken else None
    run = SeedRun(
        seed=_seed(config["settings"], path),
        curve=_curve(lines, "validation"),
        loss=averaged(losses, math.ceil(longest / POINTS)),
        diverged=diverged,
        sent=_total(lines, "wire_bytes"),
        exchanged=_total(lines, "sent_bytes"),
        done=done,
    )
    return Logged(path, config, run, any(_number(line.get("accuracy")) for line in lines), ending)


def _curve(lines: Iterable[Mapping[str, Any]], name: str) -> Curve:
    return tuple((line["step"] + 1, float(line[name])) for line in lines if _number(line.get(name)))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _total(lines: Iterable[Mapping[str, Any]], name: str) -> int | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int)]
    return sum(values) if values else None


def _seed(settings: Mapping[str, Any], path: Path) -> int | str:
    seed = settings.get("seed", task_family(settings).get("seed"))
    return seed if isinstance(seed, int) else path.name
