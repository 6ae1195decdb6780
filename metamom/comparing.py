"""Compare runs that exist: their learners on the same tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metamom.batch import Sampler, described
from metamom.evaluation import Compared, compare_learners
from metamom.loading import Checkpoint, GivenModel, LoadedRun, load
from metamom.task_metrics import Metric


class ComparedRuns(NamedTuple):
    """The result of `compare_runs`. Printed as a table.

    Attributes:
        runs: as loaded, in the order of their paths.
        compared: their evaluations, and the differences from the first, by path.
    """

    runs: tuple[LoadedRun, ...]
    compared: Compared

    def __repr__(self) -> str:
        return repr(self.compared)

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values, by path."""
        found: dict[str, Any] = {}
        for name, result in self.compared.evaluations.items():
            found[name] = {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth}
            if name in self.compared.differences:
                other = self.compared.differences[name]
                found[name] |= {"difference": other.mean, "difference_halfwidth": other.halfwidth}
        first = next(iter(self.compared.evaluations.values()))
        return {"metric": first.metric, "tasks": first.values.shape[1], "runs": found}


def compare_runs(
    paths: Sequence[str | Path],
    *,
    split: str = "test",
    checkpoint: Checkpoint = "best",
    model: GivenModel = None,
    device: str | None = None,
    root: str | None = None,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    metric: str | Metric | None = None,
    sampler: Sampler | None = None,
    **asked: Any,
) -> ComparedRuns:
    """Evaluate runs on the same tasks, with paired intervals of their differences from the first.

    The tasks are the first run's: its split, seed and sizes, unless they are given; or those of ``sampler``.

    Args:
        paths: of at least two run directories.
        split: of the tasks.
        checkpoint: of each run, as in `metamom.load`.
        model: makes the model of runs from Python, as in `metamom.load`: a function, class or name.
        device: of the learners.
        root: the folder of the data.
        tasks: T >= 2.
        steps: numbers of adaptation steps.
        metric: as in `metamom.evaluate`.
        sampler: of the tasks, for runs that cannot recreate their own, such as those on `Episodes`. The stream of its
            seed is ``split``.
        **asked: ``ways``, ``shots``, ``queries`` or ``seed`` of the tasks.

    Raises:
        ValueError: for fewer than two runs, one that was given twice, or runs that were trained on other tasks; the
            error says how they differ.
    """
    names = [str(path) for path in paths]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"a comparison needs at least two different runs; got {', '.join(names) or 'none'}.")
    runs = tuple(load(path, checkpoint, model, device=device) for path in paths)
    if sampler is None:
        sampler = runs[0].sampler(split, root=root, **asked)
        wanted = described(sampler)
        for name, run in zip(names[1:], runs[1:], strict=True):
            _check_same(name, names[0], described(run.sampler(split, root=root, **_seeded(sampler, asked))), wanted)
    elif asked or root is not None:
        given = ", ".join([*asked, *(["root"] if root is not None else [])])
        raise ValueError(f"the sampler decides the tasks; got {given} as well. Leave out one of them.")
    learners = {name: run.learner for name, run in zip(names, runs, strict=True)}
    found = compare_learners(learners, sampler, tasks=tasks, steps=steps, stream=split, metric=metric)
    return ComparedRuns(runs, found)


def _seeded(sampler: Sampler, asked: dict[str, Any]) -> dict[str, Any]:
    """The same seed as the first run's, which may be all that differs."""
    seed = getattr(sampler, "seed", None)
    return asked if seed is None else {"seed": seed, **asked}


def _check_same(name: str, first: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a run that was trained on other tasks.

    Raises:
        ValueError: naming what differs.
    """
    differ = [each for each in {**wanted, **there} if wanted.get(each) != there.get(each)]
    if differ:
        said = ", ".join(f"{each} {there.get(each)!r:.40} for {wanted.get(each)!r:.40}" for each in differ)
        same = [each for each in differ if each in ("shots", "queries")]
        advice = f" Choose the same for all: {', '.join(f'--{each}' for each in same)}." if same == differ else ""
        raise ValueError(f"{name} was trained on other tasks than {first}: {said}.{advice}")
