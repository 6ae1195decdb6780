"""The base class of N-way K-shot classification episodes: which classes, and which items of each.

Legend: T tasks, N items in all, C classes before rotation, M = ways · (shots + queries) items of one task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from metamom.batch import TaskBatch
from metamom.common.checks import check_ways
from metamom.rng import DrawCoordinates, Ints, Purpose, choose, uniforms
from metamom.tasks.checks import check_count
from metamom.tasks.family import TaskFamily
from metamom.tasks.normalize import Constants, MeanStd, measured, normalised

AT_A_TIME = 256  # images
Augment = Callable[[Tensor, torch.Generator], Tensor]


class ByClass(NamedTuple):
    """N items sorted by class. The items of class c are ``order[starts[c] : starts[c] + sizes[c]]``.

    Attributes:
        classes: the C distinct labels, sorted.
        order: ``[N]`` indices of items.
        starts: ``[C]``.
        sizes: ``[C]``.
    """

    classes: NDArray[Any]
    order: Ints
    starts: Ints
    sizes: Ints

    @classmethod
    def of(cls, labels: NDArray[Any]) -> ByClass:
        """Sort items with these labels ``[N]``."""
        classes, sizes = np.unique(labels, return_counts=True)
        order = np.argsort(labels, kind="stable").astype(np.int64)
        return cls(classes, order, np.cumsum(sizes) - sizes, sizes)


class EpisodicFamily(TaskFamily):
    """Tasks "tell these `ways` classes apart": random classes, random items of each.

    A task's classes are drawn without replacement and labelled 0..ways-1 in the order drawn. The items of each class
    are also drawn without replacement. Subclasses define how to read items (`_items`).

    Args:
        labels: ``[N]``, the class of each item.
        ways: classes of a task.
        shots: support items per class.
        queries: query items per class.
        seed: 0 <= seed < 2^64.
        augment: called with one task's scaled images ``[M, ...]`` and a generator; see `metamom.tasks.Episodes`.
        turns: 4 counts images rotated by 90°, 180° and 270° as new classes; they are rotated when drawn.
        names: what errors call a class; its label by default.

    Attributes:
        num_classes: number of classes, including rotated ones.
        constants: ``(mean, std)`` of each channel, by which images are normalised after augmentation, or ``None``.

    Raises:
        ValueError: for more ways than classes, more shots + queries than the smallest class has items, or a count
            below 1, or fewer than 2 ways.
        TypeError: for an ``augment`` that can't be called.
    """

    def __init__(
        self,
        labels: NDArray[Any],
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        augment: Augment | None = None,
        turns: int = 1,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(seed=seed)
        self.ways = check_ways(ways)
        self.shots, self.queries = check_count("shots", shots), check_count("queries", queries)
        if augment is not None and not callable(augment):
            raise TypeError(f"augment must be a function of images and a generator, or None; got {augment!r}.")
        self.augment = augment
        self.constants: Constants | None = None
        self._measured: Constants | None = None
        self._by_class = ByClass.of(labels)
        self.num_classes = len(self._by_class.classes) * turns
        if self.num_classes < self.ways:
            raise ValueError(
                f"an episode needs ways={self.ways} different classes; the data has {self.num_classes}. Use fewer ways."
            )
        sizes = self._by_class.sizes
        if self.shots + self.queries > sizes.min():
            smallest = int(sizes.argmin())
            label = self._by_class.classes[smallest]
            raise ValueError(
                f"an episode needs shots + queries = {self.shots} + {self.queries} images of each class; class "
                f"{label if names is None else names[int(label)]} has {sizes[smallest]}. Use fewer shots or queries, "
                "or leave that class out."
            )

    @abstractmethod
    def _items(self, index: Ints) -> Tensor:
        """Read the items with these indices ``[T, M]``: ``[T, M, ...]``, uint8 or floating point."""

    def _rotated_items(self, index: Ints, turns: Ints) -> Tensor:
        """Read the items and rotate them ``turns`` times by 90°: both ``[T, M]``."""
        x = self._items(index)
        return _rotated(x, torch.from_numpy(turns)) if turns.any() else x

    def _scaled_items(self, index: Ints, turns: Ints) -> tuple[Tensor, bool]:
        """Rotated items, scaled, ``[T, M, ...]``; and whether this is a new tensor, which may be changed in place."""
        x = self._rotated_items(index, turns)
        return scaled(x), not x.is_floating_point()

    def draw(self, tasks: DrawCoordinates, data: DrawCoordinates) -> TaskBatch:
        """See `TaskFamily.draw`. A task's identity is its classes and their order."""
        index, turns = self._chosen(tasks, data)
        x, fresh = self._scaled_items(index, turns)
        if self.augment is not None:
            x = self._augmented(x, self.augment, data)
        if self.constants is not None:
            x = normalised(x, self.constants, in_place=fresh or self.augment is not None)
        support = self.ways * self.shots
        y = torch.arange(self.ways, device=x.device).repeat(len(x), self.shots + self.queries)
        return TaskBatch(x[:, :support], y[:, :support], x[:, support:], y[:, support:])

    def mean_and_std(self) -> MeanStd:
        """Mean and standard deviation of each channel over all images ``[N, C, H, W]`` in [0, 1], computed once.

        Rotations and augmentations do not count. Compute them on the training split, and normalise all splits by them.

        Raises:
            ValueError: for items that are not images.
        """
        if self._measured is None:
            self._measured = measured(self._every_image())
        return self._measured

    def _every_image(self) -> Iterator[Tensor]:
        """All images, some at a time, ``[n, C, H, W]`` in [0, 1]."""
        items = np.arange(len(self._by_class.order))
        for at in tqdm(range(0, len(items), AT_A_TIME), desc="mean and std", disable=None, leave=False):
            x = scaled(self._items(items[None, at : at + AT_A_TIME]))[0]
            if x.dim() != 4:
                raise ValueError(
                    f"channels have a mean in images [C, H, W] alone; these items are {list(x.shape[1:])}."
                )
            yield x

    def _classes(self, tasks: DrawCoordinates) -> Ints:
        """The classes of each task ``[T, ways]``, rotated ones among them, in the order of the labels."""
        return choose(uniforms(self.seed, tasks, Purpose.TASK, self.ways), self.num_classes)

    def _chosen(self, tasks: DrawCoordinates, data: DrawCoordinates) -> tuple[Ints, Ints]:
        """The indices of the items, and how often each is rotated by 90°: both ``[T, M]``, shot by shot."""
        shown = self.shots + self.queries
        classes = self._classes(tasks).reshape(-1)
        # class c rotated r times is class c + r · (number of classes)
        turns, classes = np.divmod(classes, len(self._by_class.classes))
        u = uniforms(self.seed, data, Purpose.DATA, self.ways * shown).reshape(-1, shown)
        of_class = choose(u, self._by_class.sizes[classes])
        index = self._by_class.order[self._by_class.starts[classes, None] + of_class]
        return self._shot_by_shot(index), self._shot_by_shot(np.broadcast_to(turns[:, None], index.shape))

    def _shot_by_shot(self, rows: Ints) -> Ints:
        """Reorder ``[T · ways, shots + queries]`` to ``[T, M]``."""
        shown = self.shots + self.queries
        return np.ascontiguousarray(rows.reshape(-1, self.ways, shown).swapaxes(1, 2)).reshape(-1, self.ways * shown)

    def _augmented(self, x: Tensor, augment: Augment, data: DrawCoordinates) -> Tensor:
        seeds = (uniforms(self.seed, data, Purpose.AUGMENT, 1)[:, 0] * 2**53).astype(np.int64)
        out = []
        for task, seed in zip(x, seeds.tolist(), strict=True):
            new = augment(task, torch.Generator().manual_seed(seed))
            if not isinstance(new, Tensor) or new.shape != task.shape or not new.is_floating_point():
                raise ValueError(
                    f"augment must return floating-point images of the shape it was given, {tuple(task.shape)}; got "
                    f"{(tuple(new.shape), new.dtype) if isinstance(new, Tensor) else type(new).__name__}."
                )
            out.append(new)
        return torch.stack(out)


def augmentation_name(augment: Augment | None) -> str | None:
    """What identifies an augmentation in a description: the name of a function, the text of an object."""
    return None if augment is None else getattr(augment, "__qualname__", repr(augment))


def scaled(x: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; floating point as it is."""
    return x if x.is_floating_point() else x.to(torch.float32).div_(255)


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate square images ``[T, M, ..., H, H]`` by ``turns`` times 90°, ``[T, M]``."""
    x = x.clone()
    for turn in (1, 2, 3):
        where = turns == turn
        x[where] = torch.rot90(x[where], turn, (-2, -1))
    return x
