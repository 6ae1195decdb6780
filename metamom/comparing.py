"""Compare runs that exist: their learners on the same tasks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metamom.batch import Sampler, TaskSampler
from metamom.common.choices import Norm
from metamom.common.numbers import counted
from metamom.evaluation import Compared, evaluate, paired
from metamom.loading import Checkpoint, GivenModel, LoadedRun, load
from metamom.task_metrics import Metric

LONGEST = 200  # characters of a value that an error shows


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

    def as_json(self, *, per_task: bool = False) -> dict[str, Any]:
        """The result as JSON values, by path; ``per_task`` adds every task's value, ``[k, T]``."""
        found: dict[str, Any] = {}
        for name, result in self.compared.evaluations.items():
            found[name] = {"steps": result.steps, "mean": result.mean, "halfwidth": result.halfwidth}
            if result.norm not in (None, "batch"):
                found[name]["norm"] = result.norm
            if per_task:
                found[name]["values"] = result.values.tolist()
            if name in self.compared.differences:
                other = self.compared.differences[name]
                found[name] |= {"difference": other.mean, "difference_halfwidth": other.halfwidth}
        first = next(iter(self.compared.evaluations.values()))
        return {"metric": first.metric, "tasks": first.values.shape[1], "runs": found}


def compare_runs(
    paths: Sequence[str | Path] | Mapping[str, LoadedRun],
    *,
    split: str = "test",
    checkpoint: Checkpoint = "best",
    model: GivenModel = None,
    device: str | None = None,
    root: str | None = None,
    tasks: int = 600,
    steps: Sequence[int] = (0, 1, 5, 10),
    norm: Norm | None = None,
    inner_lr: float | None = None,
    metric: str | Metric | None = None,
    sampler: Sampler | None = None,
    **asked: Any,
) -> ComparedRuns:
    """Evaluate runs on the same tasks, with paired intervals of their differences from the first.

    The tasks are the first run's: its split, seed and sizes, unless they are given; or those of ``sampler``. Every run
    gets them as it was trained to: images of its own size and channels, normalised by its own constants. How a run was
    trained (augmentation, rotated classes, optimizer, the command or Python) makes no difference.

    Args:
        paths: of at least two run directories; or runs from `metamom.load`, by name.
        split: of the tasks.
        checkpoint: of each run that is loaded here, as in `metamom.load`.
        model: makes the model of such runs from Python, as in `metamom.load`: a function, class or name.
        device: of their learners.
        root: the folder of the data.
        tasks: T >= 2.
        steps: numbers of adaptation steps.
        norm: what batch normalisation uses in all runs, as in `metamom.evaluate`; by default as each was trained.
        inner_lr: the inner step size of all runs; by default as each was trained.
        metric: as in `metamom.evaluate`.
        sampler: of the tasks, for runs that cannot recreate their own, such as those on `Episodes`. The stream of its
            seed is ``split``, and all runs get the same inputs.
        **asked: ``ways``, ``shots``, ``queries`` or ``seed`` of the tasks.

    Raises:
        ValueError: for fewer than two runs, one that was given twice, or runs that were trained on other tasks; the
            error says how they differ.
    """
    names = [str(each) for each in paths]
    places = names if isinstance(paths, Mapping) else [os.path.realpath(name) for name in names]
    if len(set(places)) < max(2, len(names)):
        raise ValueError(f"a comparison needs at least two different runs; got {', '.join(names) or 'none'}.")
    runs = (
        paths
        if isinstance(paths, Mapping)
        else {name: load(path, checkpoint, model, device=device) for name, path in zip(names, paths, strict=True)}
    )
    samplers: Mapping[str, Sampler]
    if sampler is None:
        samplers = _same_tasks(runs, split, root, asked)
    elif asked or root is not None:
        given = ", ".join([*asked, *(["root"] if root is not None else [])])
        raise ValueError(f"the sampler decides the tasks; got {given} as well. Leave out one of them.")
    else:
        samplers = dict.fromkeys(names, sampler)
    found = {
        name: evaluate(
            run.learner,
            samplers[name],
            tasks=tasks,
            steps=steps,
            stream=split,
            norm=norm,
            inner_lr=inner_lr,
            metric=metric,
        )
        for name, run in runs.items()
    }
    return ComparedRuns(tuple(runs.values()), paired(found))


def _same_tasks(
    runs: Mapping[str, LoadedRun], split: str, root: str | None, asked: Mapping[str, Any]
) -> dict[str, TaskSampler]:
    """Each run's sampler of the tasks that they share.

    Raises:
        ValueError: for a run that was trained on other tasks than the first.
    """
    (first, reference), *others = runs.items()
    samplers = {first: reference.sampler(split, root=root, **asked)}
    seed = getattr(samplers[first], "seed", None)  # which may be all that differs
    same = dict(asked) if seed is None else {"seed": seed, **asked}
    for name, run in others:
        samplers[name] = run.sampler(split, root=root, **same)
        _check_same(name, first, samplers[name], samplers[first])
    return samplers


def _check_same(name: str, first: str, sampler: TaskSampler, reference: TaskSampler) -> None:
    """Refuse a run that was trained on other tasks.

    Raises:
        ValueError: naming all that differs, and what to do.
    """
    there, wanted = sampler.task_identity(), reference.task_identity()
    differ = [each for each in {**wanted, **there} if wanted.get(each) != there.get(each)]
    if "family" in differ:
        differ = ["family"]
    said, advice = list[str](), list[str]()
    if "data_sha256" in differ:
        said.append(f"other data, {_where(sampler)} for {_where(reference)}")
        advice.append("Name one folder for all: root=DIR.")
        differ = [each for each in differ if each not in ("data_sha256", "images")]
    for each in differ:
        values = [repr(identity.get(each)) for identity in (there, wanted)]
        said.append(f"other values of {each}" if max(map(len, values)) > LONGEST else f"{each} {' for '.join(values)}")
    if sizes := [f"{each}={wanted[each]}" for each in differ if each in ("shots", "queries")]:
        advice.append(f"Choose the same for all: {', '.join(sizes)}.")
    if "ways" in differ:
        advice.append("A learner distinguishes as many classes as it was trained on: compare runs of the same ways.")
    if set(differ) - {"shots", "queries", "ways"}:
        advice.append("Choose one sampler for all, in Python: metamom.compare_runs(RUNS, sampler=...).")
    if said:
        raise ValueError(f"{name} was trained on other tasks than {first}: {', '.join(said)}. {' '.join(advice)}")


def _where(sampler: TaskSampler) -> str:
    """The folder of a sampler's data and the number of images, as far as it says so."""
    folder, images = sampler.location().get("root", "unknown"), sampler.describe().get("images")
    return f"{folder} ({counted(images, 'image')})" if isinstance(images, int) else str(folder)
