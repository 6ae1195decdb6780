"""The timed problems: two learners and their tasks, in two sizes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from metamom.bias import BiasOperator, Identity
from metamom.bias.spec import parse
from metamom.maml.learner import MAML
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, Omniglot, Sinusoid
from metamom.tasks.family import TaskFamily

Scaling = Literal["strong", "weak"]


@dataclass(frozen=True)
class Problem:
    """A model and its tasks.

    Attributes:
        name: of the problem.
        hidden: channels of the Conv4, on 5-way 1-shot tasks of Omniglot; ``None`` for the sinusoid MLP.
        strong: tasks of all processes together, rounded up so that they can be dealt.
        weak: tasks per process.
    """

    name: str
    hidden: int | None
    strong: int
    weak: int

    def deal(self, scaling: Scaling, n: int, processes: tuple[int, ...]) -> tuple[int, int]:
        """Workers and tasks of n processes; in strong scaling the same for all numbers of ``processes``."""
        if scaling == "weak":
            return n, n * self.weak
        workers = math.lcm(*processes)
        return workers, workers * -(-self.strong // workers)

    @property
    def outcomes(self) -> int:
        """Bytes that a process reports on each task: its loss and, for classification, the correct predictions."""
        return 4 if self.hidden is None else 8


@dataclass(frozen=True)
class ScalingPlan:
    """The measurements to make; the quick plan only shows that everything runs."""

    problems: tuple[Problem, ...] = (Problem("sinusoid MLP", None, 64, 16), Problem("Conv4", 64, 16, 4))
    operators: tuple[str, ...] = ("none", "topk:1%", "qsgd:4", "sign", "ef21:topk:1%")
    planned: tuple[str, ...] = ("none", "topk:1%", "topk:0.1%", "randk:1%", "qsgd:4", "sign", "ef21:topk:1%")
    seconds: float = 25.0  # of timed steps, in each start of the processes
    counted: float = 0.5  # seconds of the steps between readings of the kernel's counter
    attempts: int = 5  # attempts to find a quiet moment
    entries: tuple[int, ...] = (1_761, 20_000, 112_517, 1_000_000)  # gradient lengths d for timing operators
    sizes: tuple[int, ...] = (
        16,
        1024,
        16_384,
        131_072,
        450_068,
        1_048_576,
        4_194_304,
    )  # bytes exchanged in timed collectives
    compute: tuple[int, ...] = (1, 2, 4, 8, 16)  # multiples of a quarter of a worker's tasks
    repeats: int = 15
    largest: int = 10_000_000  # parameters of a network that is planned but not timed
    workers: tuple[int, ...] = (10, 100, 1000)  # numbers of workers simulated on sinusoids
    convolved: int = 200  # numbers of workers simulated on Conv4
    hidden: int = 64  # channels of that Conv4
    chunk: int = 20  # tasks at a time

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


QUICK = ScalingPlan(
    problems=(Problem("sinusoid MLP", None, 4, 4), Problem("Conv4", 4, 4, 4)),
    operators=("none", "ef21:topk:1%"),
    seconds=0.0,
    counted=0.0,
    attempts=1,
    entries=(500, 2_000),
    sizes=(16, 65_536),
    compute=(1, 4),
    repeats=2,
    largest=100_000,
    workers=(4, 8),
    convolved=4,
    hidden=4,
    chunk=2,
)


class Made(NamedTuple):
    """A learner and its sampler."""

    learner: MAML
    tasks: TaskFamily

    @property
    def entries(self) -> int:
        """d."""
        return sum(p.numel() for p in self.learner.parameters())


def make(hidden: int | None, chunk_size: int | None = None, *, real: bool = True) -> Made:
    """The problem of `Problem.hidden`, eager; without Omniglot, noise images take its place at the same cost."""
    generator = torch.Generator().manual_seed(0)
    if hidden is None:
        model = SinusoidMLP(generator=generator)
        return Made(MAML(model, F.mse_loss, inner_lr=0.01, chunk_size=chunk_size), Sinusoid())
    learner = MAML(Conv4(5, hidden=hidden, generator=generator), F.cross_entropy, inner_lr=0.4, chunk_size=chunk_size)
    try:
        return Made(learner, Omniglot() if real else _noise())
    except FileNotFoundError:
        return Made(learner, _noise())


def operator(spec: str) -> BiasOperator | None:
    """The operator with that spelling; ``None`` for none."""
    made = parse(spec)
    return None if isinstance(made, Identity) else made


def _noise() -> Episodes:
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return Episodes(images, torch.arange(40) // 4, ways=5, shots=1, queries=1)
