"""Read what a page shows: run directories, comparisons, and the files of evaluations."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metamom.experiments.families import FAMILIES
from metamom.experiments.python_runs import is_python_run
from metamom.experiments.report.comparisons import comparison_sections
from metamom.experiments.report.contents import Ended, Page, Section
from metamom.experiments.report.evaluations import read_evaluations
from metamom.experiments.report.logged import Logged, read_run
from metamom.experiments.report.runs import run_sections
from metamom.training.directory import read_config

FILES = (".json", ".csv")  # of evaluations


class Read(NamedTuple):
    """A page, and whether all of its runs have ended."""

    page: Page
    finished: bool


def read_page(paths: Sequence[str | Path]) -> Read:
    """Read runs, comparisons and evaluations.

    Args:
        paths: run directories of ``metamom train`` and `metamom.train`, directories of ``metamom compare``
            and of other commands that keep such runs in ``runs/``, and files of ``metamom evaluate --record``,
            ``--json`` or ``--csv``.

    Raises:
        ValueError: for anything else, naming it.
    """
    places = places_of(paths)
    sections: list[Section] = []
    compared: list[Logged] = []
    runs: list[Logged] = []
    files: list[Path] = []
    environments: list[Mapping[str, Any]] = []
    finished = True
    for place in places:
        if _is_file(place):
            files.append(place)
            continue
        config = read_config(place)
        environments += [config["environment"]]
        if _compares(config["settings"]):
            found, members, ended = comparison_sections(place, config["settings"])
            sections += found
            compared += members
            finished &= ended
        else:
            runs.append(read_run(place, config))
    sections += run_sections(runs)
    finished &= all(run.ended for run in runs)
    evaluated = read_evaluations(files)
    sections += evaluated.sections
    environments += evaluated.environments
    title = _title(places, sections, len(runs), len(files))
    endings = tuple(Ended(run.path.name, run.run.seed, run.run.iterations, run.how) for run in [*compared, *runs])
    return Read(Page(title, tuple(sections), (), tuple(environments), evaluated.facts, endings), finished)


def places_of(paths: Sequence[str | Path]) -> list[Path]:
    """The run directories, comparisons and files among these paths, and the runs of other commands such as the demo.

    Raises:
        ValueError: for a path that is none of these, naming it and any runs in it.
    """
    found: list[Path] = []
    for path in paths:
        place = Path(os.path.normpath(path))
        if _is_file(place):
            found.append(place)
        elif not place.exists():
            raise ValueError(f"{place} does not exist; a report is of run directories, or files of metamom evaluate.")
        elif not place.is_dir():
            raise ValueError(f"{place} is neither a run directory nor a .json or .csv file of metamom evaluate.")
        elif (place / "config.json").exists():
            kept = not _is_run(read_config(place)["settings"]) and sorted((place / "runs").glob("*/config.json"))
            found += [each.parent for each in kept or [place / "config.json"]]
        else:
            inside = sorted(each.parent.name for each in place.glob("*/config.json"))
            advice = f" It holds runs, such as {inside[0]}: name them, {place}/*." if inside else ""
            raise ValueError(f"{place} holds no run: there is no {place / 'config.json'}.{advice}")
    return list(dict.fromkeys(found))


def _is_file(place: Path) -> bool:
    return place.suffix in FILES and not place.is_dir()


def _is_run(settings: Mapping[str, Any]) -> bool:
    return _compares(settings) or is_python_run(settings) or settings.get("task") in FAMILIES


def _compares(settings: Mapping[str, Any]) -> bool:
    return isinstance(settings.get("base"), dict) and "betas" in settings


def _title(places: Sequence[Path], sections: Sequence[Section], runs: int, files: int) -> str:
    """What the page is of: a single run's name, else what there is and on which tasks."""
    if files == len(places) and len(sections) == 1:
        return sections[0].title
    if len(places) == 1:
        return f"Report: {places[0].name or places[0].resolve().name}"
    counts = {"run": runs, "comparison": len(places) - runs - files, "evaluation": files}
    words = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    titles = list(dict.fromkeys(section.title for section in sections))
    return f"Report: {' and '.join(words)}{f', {titles[0]}' if len(titles) == 1 else ''}"
