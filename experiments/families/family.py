"""The record of a task family: its defaults, metric, model and tasks. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from metamom.maml.checks.loss_readings import LossFn
    from metamom.tasks.family import TaskFamily
    from metamom.tasks.preprocessing import Preprocessing

SPLITS = ("train", "validation", "test")


def cross_entropy_loss() -> LossFn:
    """The loss of families with classes."""
    from torch.nn.functional import cross_entropy

    return cross_entropy


class Defaults(NamedTuple):
    """What a recipe takes where nothing is given.

    Attributes:
        ways: classes of a task; ``None`` for a family without classes.
    """

    shots: int
    queries: int
    inner_lr: float
    lr: float
    meta_batch: int
    ways: int | None = None


class Classes(NamedTuple):
    """The classes of a classification family.

    Attributes:
        noun: what they are, such as ``characters``.
        seen_in: the splits that share classes with the training split.
    """

    noun: str
    seen_in: tuple[str, ...]


class Metric(NamedTuple):
    """How the quality of a learner is measured and printed.

    Attributes:
        name: in a report and on the axes of its figures.
        short: in help.
        higher_is_better: accuracies rise, errors fall.
        digits: decimal places shown.
        factor: of the shown value; 100 for per cent.
        unit: after the shown value.
        least: a bound of all values; an interval is drawn no lower.
        most: a bound of all values.
    """

    name: str
    short: str
    higher_is_better: bool
    digits: int
    factor: int = 1
    unit: str = ""
    least: float = -math.inf
    most: float = math.inf

    def within(self, low: float, high: float) -> tuple[float, float]:
        """The part of an interval that the metric can have, which covers the true value as often as the whole does."""
        return max(low, self.least), min(high, self.most)

    def show(self, value: float) -> str:
        """A value without its unit."""
        return f"{self.factor * value:.{self.digits}f}"

    def with_interval(self, value: float, halfwidth: float) -> str:
        """A value and its interval, such as ``90.6 ± 1.1 %``."""
        return f"{self.show(value)} ± {self.show(halfwidth)}{self.unit}"

    def exactly(self, value: float) -> str:
        """A value with its unit and all of its digits, as the user gave it."""
        text, scaled = self.show(value), self.factor * value
        return f"{text if math.isclose(float(text), scaled) else f'{scaled:.12g}'}{self.unit}"

    def reached(self, value: float, target: float) -> bool:
        """Whether a value is at least as good as the target."""
        return value >= target if self.higher_is_better else value <= target


MEAN_SQUARED_ERROR = Metric("mean squared error", "error", higher_is_better=False, digits=3, least=0.0)
LOSS = Metric("loss", "loss", higher_is_better=False, digits=3, least=0.0)
ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True, digits=1, factor=100, unit=" %", least=0.0, most=1.0)


class ComparisonPlan(NamedTuple):
    """What ``metamom compare`` takes where nothing is given.

    Attributes:
        lrs: the grid of step sizes.
        target: value of the metric to reach on validation.
    """

    lrs: tuple[float, ...]
    target: float


class BiasPlan(NamedTuple):
    """What ``metamom bias`` takes where nothing is given.

    Attributes:
        inner_batches: in shots.
        pool: support points of a task in all, a class or task.
        queries: query points, at least.
        tasks: in all.
        pairs: most pairs of draws from a task's pool.
        dtype: float64 where a bias is as small as float32's rounding may be.
        reason: in help, why the inner batches are not the usual ones.
    """

    inner_batches: tuple[int, ...] = (1, 2, 5, 10, 20)
    pool: int = 480
    queries: int = 20
    tasks: int = 300
    pairs: int = 12
    dtype: str = "float64"
    reason: str = ""


USUAL_BIAS_PLAN = BiasPlan()


class TaskSettings(NamedTuple):
    """The tasks that a family is asked for.

    Attributes:
        split: one of the family's.
        ways: classes of a task; ``None`` for a family without classes.
        shots: support points, a class or task.
        queries: query points, a class or task.
        seed: 0 <= seed < 2^64.
        dtype: of the weights; images are float32.
        root: of the data; ``None`` for where data is by default.
    """

    split: str
    ways: int | None
    shots: int
    queries: int
    seed: int
    dtype: torch.dtype
    root: str | None


@dataclass(frozen=True)
class Family:
    """A task family, with the model and loss that it is trained with. Everything that depends on the task is here.

    Attributes:
        name: on the command line and in ``config.json``.
        title: in reports and errors: a name, or a plural.
        help: a line in the list of tasks.
        defaults: of a recipe.
        iterations: of a training run.
        metric: that reports show.
        comparison: defaults of ``metamom compare``.
        tasks: creates the sampler; takes the family's own options as keywords.
        model: creates the model for these ways, with weights drawn from the generator; the same keywords.
        loss: returns the loss function.
        bias: defaults of ``metamom bias``.
        classes: ``None`` for a family without classes.
        splits: that tasks can be drawn from.
        options: the options that only some families have, by name, with their defaults for this one; they are declared
            with ``own=True`` in `metamom.experiments.options`.
        check: raises an error for values of the family's options that nothing can be made with, before anything is.
        kept: what a run keeps of its tasks (of training, then of other splits), as values of the family's options.
        preprocessing: how image files become inputs, given the family's options; ``None`` for tasks that are not made
            of image files.
        data: the data set that must be on disk, as ``metamom data fetch`` spells it; ``None`` if there is none.
        curve: the points ``x [N]``, ``y [N]`` of the first test task's true function, for a figure of the adaptation
            to it; ``None`` for tasks that are not functions of one variable.
        train_examples: command lines at the end of the help of ``metamom train``.
        compare_examples: the same for ``metamom compare``.
    """

    name: str
    title: str
    help: str
    defaults: Defaults
    iterations: int
    metric: Metric
    comparison: ComparisonPlan
    tasks: Callable[..., TaskFamily]
    model: Callable[..., nn.Module]
    loss: Callable[[], LossFn]
    bias: BiasPlan = USUAL_BIAS_PLAN
    classes: Classes | None = None
    splits: tuple[str, ...] = SPLITS
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[..., None] = lambda **own: None
    kept: Callable[..., Mapping[str, Any]] = lambda *tasks: {}
    preprocessing: Callable[..., Preprocessing] | None = None
    data: str | None = None
    curve: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    train_examples: tuple[str, ...] = ()
    compare_examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.classes is None) != (self.defaults.ways is None):
            raise ValueError(
                f"a family with classes has default ways, and no other family has; got ways={self.defaults.ways} and "
                f"classes={self.classes} of family {self.name!r}. Set both, or neither."
            )

    @property
    def unit(self) -> str:
        """What shots and queries are counted for."""
        return "a task" if self.classes is None else "a class"

    def titled(self, ways: int | None, shots: int | None) -> str:
        """The title, with ways and shots of a classification family."""
        return self.title if self.classes is None else f"{self.title}, {ways}-way {shots}-shot"


def of_split(tasks: TaskFamily, split: str, title: str) -> TaskFamily:
    """The tasks of a split, for a family that draws every split from a stream of its own.

    Raises:
        ValueError: for a split that is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"{title} have the splits train, validation and test; got {split!r}.")
    return tasks.with_stream(split)
