"""The authors' results and ours, as curves. A run's settings are in its file's name, or in its ``config.json``."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from metamom.bias import TopK, parse
from metamom.common.schema import as_record
from metamom.experiments.paper.protocol import PROTOCOLS
from metamom.experiments.paper.training import Row
from metamom.training.directory import read_config

TITLES = {kind.title: name for name, kind in PROTOCOLS.items()}
NAME = re.compile(
    r"(?P<title>\w+?)_A_\w+?_penalty_0\.0_e_\d+_N_(?P<nodes>\d+)_SGDM?_lr_(?P<lr>[\d.]+?)(_beta_(?P<beta>[\d.]+?))?"
    r"(_(?P<operator>TopK|ClipNorm|ClipValue|Norm)(_(?P<argument>[\d.]+?))?)?(_seed_(?P<seed>\d+))?\.csv"
)
SPECS = {"TopK": "topk", "ClipNorm": "clip", "ClipValue": "clipvalue", "Norm": "normalize:tensor"}
SEEDS = 5  # number of seeds behind the authors' means


@dataclass(frozen=True)
class Run:
    """The settings of one of our runs."""

    dataset: Literal["mnist", "fashion"]
    nodes: int
    lr: float
    bias: str
    beta: float
    seed: int
    parameters: int


class Setting(NamedTuple):
    """A run's settings, except for its seed."""

    dataset: str
    nodes: int
    lr: float
    bias: str
    beta: float


class Curve(NamedTuple):
    """A run's metrics, a row for each epoch; the seed is ``None`` for the mean over the authors' five."""

    setting: Setting
    seed: int | None
    rows: list[Row]


def authors_curves(folder: Path) -> list[Curve]:
    """The authors' files in a folder and below it, those without weight decay.

    Raises:
        ValueError: if there is none, or one that cannot be read.
    """
    found = []
    for path in sorted(folder.rglob("*.csv")):
        if (match := NAME.fullmatch(path.name)) and match["title"] in TITLES:
            rows = list(_rows(path, "" if match["seed"] else "_mean"))
            if not rows:
                raise ValueError(f"{path} holds no epochs: it is cut short or damaged. Replace it with an intact copy.")
            found.append(Curve(_named(match), int(match["seed"]) if match["seed"] else None, rows))
    if not found:
        raise ValueError(
            f"{folder} holds none of the authors' results, such as "
            "MNIST_A_512512_penalty_0.0_e_200_N_100_SGD_lr_0.5_seed_0.csv; name the folder that holds them (--paper)."
        )
    return found


def our_curves(folder: Path) -> list[Curve]:
    """The runs of ``metamom reproduce`` in a folder and below it.

    Raises:
        ValueError: if there is none, or one that cannot be read.
    """
    found: list[Curve] = []
    places: dict[tuple[Setting, int], Path] = {}
    for path in sorted(folder.rglob("config.json")):
        settings = read_config(path.parent)["settings"]
        if settings.get("experiment") != "paper":
            continue
        metrics = path.with_name("metrics.csv")
        rows = list(_rows(metrics, "", running=True)) if metrics.exists() else []
        if rows:
            run = as_record(Run, settings, f"{path}, settings")
            setting = Setting(run.dataset, run.nodes, run.lr, _canonical(run.bias, run.parameters), run.beta)
            if lost := [epoch for epoch, row in enumerate(rows) if math.isnan(row.train_loss)]:
                raise ValueError(f"{metrics} has no metrics of epoch {lost[0]}: they were lost; move the run away.")
            other = places.setdefault((setting, run.seed), path.parent)
            if other != path.parent:
                raise ValueError(
                    f"{other} and {path.parent} are runs with the same settings and seed, which would count twice: "
                    "move one of them away."
                )
            found.append(Curve(setting, run.seed, rows))
    if not found:
        raise ValueError(f"{folder} holds no run of `metamom reproduce`; name a folder with some (--run-dir).")
    return found


def mean_rows(curves: list[Curve]) -> list[Row]:
    """The mean over runs, for as many epochs as all of them have."""
    return [
        Row(*(sum(values) / len(values) for values in zip(*rows, strict=True)))
        for rows in zip(*(curve.rows for curve in curves), strict=False)
    ]


def _named(match: re.Match[str]) -> Setting:
    operator, argument = match["operator"], match["argument"]
    spec = "none" if operator is None else SPECS[operator]
    if argument is not None:
        spec += f":{argument.removesuffix('.0')}"
    beta = 1.0 if match["beta"] is None else float(match["beta"])
    return Setting(TITLES[match["title"]], int(match["nodes"]), float(match["lr"]), spec, beta)


def _canonical(spec: str, parameters: int) -> str:
    """Write ratios as numbers, and drop the option for ties: the authors' names have neither."""
    operator = parse(spec)
    if isinstance(operator, TopK) and not operator.per_tensor:
        return f"topk:{operator.kept(parameters)}"
    return operator.spec


def _rows(path: Path, suffix: str, *, running: bool = False) -> Iterator[Row]:
    """The epochs of a file. A truncated last line is dropped for a run that may be in progress or was killed."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = [line.replace("\0", "?") for line in file if line.endswith("\n") or not running]
        for number, line in enumerate(csv.DictReader(lines), 2):
            try:
                yield Row(*(float(line[f"{name}{suffix}"]) for name in Row._fields))
            except (KeyError, TypeError, ValueError) as error:
                wanted = ", ".join(f"{name}{suffix}" for name in Row._fields)
                raise ValueError(f"{path}, line {number}: wanted numbers in {wanted}; got {line}.") from error
