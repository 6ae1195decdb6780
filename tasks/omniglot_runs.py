"""The published 20-way one-shot experiment on Omniglot: 20 tasks, each within one alphabet.

Legend: T tasks.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch

from metamom.batch import TaskBatch
from metamom.rng import DrawCoordinates
from metamom.tasks.checks import check_count
from metamom.tasks.episodic import scaled
from metamom.tasks.family import TaskFamily
from metamom.tasks.locate import PathLike
from metamom.tasks.omniglot import MAX_IMAGE_SIZE, images_of

WAYS = 20


class Run(NamedTuple):
    """One of the published runs.

    Attributes:
        alphabet: its name.
        characters: 20 names, as ``evaluation/Alphabet/characterNN``; class k is the k-th.
        drawers: of the support set and of the query set, 1 to 20.
    """

    alphabet: str
    characters: tuple[str, ...]
    drawers: tuple[int, int]


class OmniglotRuns(TaskFamily):
    """The 20 one-shot tasks on which people and models were compared, from the data set's publishers.

    Each is to tell 20 characters of one alphabet apart, given one drawing of each; the queries are one drawing of each
    by another person. There are two runs, by different people, of each of 10 alphabets of the evaluation part. So
    evaluate on all of them, once: ``evaluate(learner, OmniglotRuns(), tasks=20)``.

    To be judged on new alphabets, as people were, a learner must be trained on ``Omniglot(split="background")``. The
    split ``"train"`` has characters of all alphabets, those of these runs among them. With batch statistics, the usual
    ones of MAML, a learner sees the 20 queries of a run together; ``norm="support"`` looks at each alone.

    Args:
        root: as of `metamom.tasks.Omniglot`.
        image_size: H, pixels a side, up to 512.
        download: fetch the data if it is missing.

    Attributes:
        runs: the 20 runs in the published order.

    Returns (from `sample`):
        ``support_x: [T, 20, 1, H, H]``, ``query_x: [T, 20, 1, H, H]`` in [0, 1], strokes bright; labels int64. Task i
        of every step is run i + 1, and T is at most 20.

    Raises:
        FileNotFoundError: if the data is missing.
        ValueError: for damaged data, a size out of range, and more than 20 tasks.

    Example:
        >>> OmniglotRuns().sample(0, 20).query_x.shape  # doctest: +SKIP
        torch.Size([20, 20, 1, 28, 28])

    Reference:
        Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program induction" (2015):
        4.5 % error of people, 3.3 % of Bayesian program learning; "The Omniglot challenge: a 3-year progress report"
        (2019).
    """

    def __init__(self, root: PathLike | None = None, *, image_size: int = 28, download: bool = False) -> None:
        super().__init__()
        self.image_size = check_count("image_size", image_size)
        if self.image_size > MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be <= {MAX_IMAGE_SIZE}; got {image_size}.")
        self.ways, self.shots, self.queries = WAYS, 1, 1
        self.runs = published_runs()
        pairs = [images_of(run.characters, root, self.image_size, download) for run in self.runs[::2]]
        self._drawings = torch.stack([each for each in pairs for _ in range(2)])  # [20 runs, 20, 20 drawers, H, H]

    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """See `TaskFamily.draw`; nothing is drawn at random."""
        if len(tasks.indices) and int(tasks.indices.max()) >= len(self.runs):
            raise ValueError(
                f"there are {len(self.runs)} published runs; got a batch with task {int(tasks.indices.max()) + 1}. "
                f"Evaluate on each once: tasks={len(self.runs)}."
            )
        drawers = np.array([run.drawers for run in self.runs])[tasks.indices] - 1
        rows = torch.from_numpy(tasks.indices)
        support, query = (self._drawings[rows, :, torch.from_numpy(each)] for each in drawers.T)
        labels = torch.arange(WAYS).repeat(len(rows), 1)
        return TaskBatch(scaled(support).unsqueeze(2), labels, scaled(query).unsqueeze(2), labels)

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. The location of the data is left out."""
        sizes = {"ways": self.ways, "shots": self.shots, "queries": self.queries}
        return {"family": "OmniglotRuns", "image_size": self.image_size, **sizes}


@cache
def published_runs() -> tuple[Run, ...]:
    """The 20 runs in the published order, from the list next to this file."""
    lines = (files("metamom.tasks") / "splits" / "omniglot_runs.txt").read_text("utf-8").splitlines()
    found = []
    for alphabet, *words in (line.split() for line in lines if line and not line.startswith("#")):
        characters = tuple(f"evaluation/{alphabet}/character{number}" for number in words[:WAYS])
        for pair in words[WAYS:]:
            support, _, query = pair.partition(">")
            found.append(Run(alphabet, characters, (int(support), int(query))))
    return tuple(found)
