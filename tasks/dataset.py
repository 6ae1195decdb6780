"""Episodes from any map-style data set of PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from metamom.common.kinds import named_type
from metamom.common.numbers import counted
from metamom.rng import Ints
from metamom.tasks.augment import augmentation
from metamom.tasks.checks import check_stream
from metamom.tasks.dataset_labels import Keys, Labels, find_labels, pair
from metamom.tasks.decode import DEEP, BrokenImageError, plain
from metamom.tasks.episodic import Augment, EpisodicFamily, augmentation_name, scaled
from metamom.tasks.normalize import MeanStd, check_constants

GREY = ("1", "L", "LA", "La", "F", *DEEP)  # Pillow's modes
COMPARED = 4  # items that are read twice
DESCRIBED = 8  # items that identify the data set in a run


def from_dataset(
    dataset: Any,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 1,
    seed: int = 0,
    labels: Sequence[int] | Sequence[str] | Tensor | None = None,
    transform: Callable[[Any], Any] | None = None,
    augment: str | Sequence[str] | Augment | None = None,
    normalize: MeanStd | None = None,
    keys: Keys | None = None,
    stream: str = "train",
) -> DatasetEpisodes:
    """Draw episodes from a map-style data set of ``(x, label)``: torchvision's, Hugging Face's, or your own.

    Items are read when they are drawn. Labels come from the data set where it keeps them (``.targets``, ``.labels``,
    ``.samples``, a column; also of a ``Subset`` or ``ConcatDataset``), without reading items; otherwise from one pass
    over it, with a progress bar.

    Where reading items takes more than a tenth of a training step, draw ahead: ``Prefetched(from_dataset(...))``. For
    items of 5 ms each, 120 a step, the fastest step took 0.67 s with it and 1.12 s without: drawing (0.69 s) and
    computing (0.45 s) at the same time instead of one after the other.

    Images of Pillow and uint8 arrays ``[H, W, channels]`` become float32 tensors ``[channels, H, W]`` in [0, 1], uint8
    tensors float32 in [0, 1]; floating-point arrays and tensors are kept. All items must have one shape: resize images
    in the data set's transform or in ``transform``.

    Args:
        dataset: has ``len(dataset)``, and ``dataset[i]`` gives ``(x, label)`` or a dict with both. It must give the
            same item every time, so that tasks can be drawn in any order; random changes belong in ``augment``.
        ways: classes of a task.
        shots: support items per class.
        queries: query items per class.
        seed: 0 <= seed < 2^64.
        labels: one for each item, whole numbers or text, instead of the data set's.
        transform: called with each item's x before anything else.
        augment: as for `ImageFolder`.
        normalize: ``(mean, std)`` of each channel, such as ``training_tasks.mean_and_std()``.
        keys: names of the input and the label in items that are dicts; found by common names if ``None``.
        stream: of the draws; ``"test"`` for a data set of test classes.

    Returns:
        A sampler as `Episodes` is, with ``classes``, the names of the classes.

    Raises:
        TypeError: for a data set without ``len`` or indexing, for items or labels of other kinds.
        ValueError: for items of different shapes, an item that differs when it is read again, and as `Episodes`.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> dataset = TensorDataset(torch.rand(60, 1, 8, 8), torch.arange(60) % 6)
        >>> from_dataset(dataset, ways=5, shots=1, queries=2).sample(0, 4).query_x.shape
        torch.Size([4, 10, 1, 8, 8])
    """
    _check(dataset)
    if transform is not None and not callable(transform):
        raise TypeError(f"transform must be a function of an item's x, or None; got {transform!r:.100}.")
    check_stream(stream)
    found = find_labels(dataset, labels, keys)
    tasks = DatasetEpisodes(
        dataset,
        found,
        keys,
        transform,
        ways=ways,
        shots=shots,
        queries=queries,
        seed=seed,
        augment=augmentation(augment),
        names=[repr(name) for name in found.classes],
    )
    tasks.constants = check_constants(normalize)
    tasks.stream = stream
    return tasks


class DatasetEpisodes(EpisodicFamily):
    """What `from_dataset` returns.

    Args:
        dataset: as given.
        labels: of its items.
        keys: as given.
        transform: as given.
        options: of `EpisodicFamily`.

    Attributes:
        dataset: as given.
        classes: names of the classes; class c is ``classes[c]``.
    """

    def __init__(
        self, dataset: Any, labels: Labels, keys: Keys | None, transform: Callable[[Any], Any] | None, **options: Any
    ) -> None:
        self.dataset, self.classes, self._keys, self._transform = dataset, labels.classes, keys, transform
        self._labels = labels.of_items
        super().__init__(labels.of_items, **options)
        for i in range(min(COMPARED, len(labels.of_items))):
            first, again = (self._items(np.array([[i]])) for _ in range(2))
            if not torch.equal(first.nan_to_num(), again.nan_to_num()):
                raise ValueError(
                    f"item {i} of the data set is another each time it is read, so a task would depend on when it is "
                    "drawn. Take random transforms out of the data set, and pass them as augment=, which draws by "
                    'counter: augment=["crop", "flip"].'
                )

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. Labels and a few items identify the data."""
        digest = hashlib.sha256(np.ascontiguousarray(self._labels).data)
        some = np.linspace(0, len(self._labels) - 1, DESCRIBED).astype(np.int64)
        items = self._items(some[None])
        digest.update(items.cpu().contiguous().view(torch.uint8).numpy().data)
        return {
            "family": "from_dataset",
            "dataset": type(self.dataset).__name__,
            "items": len(self._labels),
            "shape": list(items.shape[2:]),
            "data_sha256": digest.hexdigest(),
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "augment": augmentation_name(self.augment),
            "normalize": None if self.constants is None else self.constants.described(),
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        return (
            f"from_dataset({type(self.dataset).__name__}, ways={self.ways}, shots={self.shots}, "
            f"queries={self.queries}, seed={self.seed}): {counted(len(self._labels), 'item')} of "
            f"{counted(len(self.classes), 'class', 'classes')}"
        )

    def _items(self, index: Ints) -> Tensor:
        numbers = index.ravel().tolist()
        read = getattr(self.dataset, "__getitems__", None)  # faster, where a data set has it
        items = read(numbers) if callable(read) else [self.dataset[i] for i in numbers]
        x = [self._tensor(item, i) for item, i in zip(items, numbers, strict=True)]
        for tensor, i in zip(x, numbers, strict=True):
            if tensor.shape != x[0].shape or tensor.dtype != x[0].dtype:
                raise ValueError(
                    f"all items must have one shape and type; item {numbers[0]} is {list(x[0].shape)} of {x[0].dtype}, "
                    f"item {i} {list(tensor.shape)} of {tensor.dtype}. Resize or convert them in transform=."
                )
        return torch.stack(x).view(*index.shape, *x[0].shape)

    def _tensor(self, item: Any, i: int) -> Tensor:
        x = pair(item, self._keys)[0]
        try:
            return as_tensor(x if self._transform is None else self._transform(x))
        except (TypeError, BrokenImageError) as error:
            raise TypeError(f"item {i} of the data set {error}") from error


def as_tensor(x: Any) -> Tensor:
    """Convert an item to a floating-point tensor; images to ``[C, H, W]`` in [0, 1].

    Raises:
        TypeError: for anything but images, arrays and tensors; the message completes "item ...".
    """
    if isinstance(x, Image.Image):
        x = np.asarray(plain(x, 1 if x.mode in GREY else 3))
    if isinstance(x, np.ndarray):
        if x.dtype == np.uint8 and x.ndim in (2, 3):
            x = x[None] if x.ndim == 2 else x.transpose(2, 0, 1)
        x = torch.from_numpy(x.copy()) if x.dtype.kind in "fu" else x
    elif isinstance(x, (float, list, tuple)):
        x = torch.tensor(x)
    if not isinstance(x, Tensor):
        kind = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else named_type(x)
        raise TypeError(f"is {kind}; wanted an image, an array or a tensor. Convert it in transform=.")
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise TypeError(f"is a tensor of {x.dtype}; wanted uint8 or floating point. Convert it in transform=.")
    return scaled(x)


def _check(dataset: Any) -> None:
    """Refuse anything that is not a map-style data set.

    Raises:
        TypeError: with what to do.
    """
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"from_dataset takes one data set; got {named_type(dataset)} of {', '.join(map(repr, dataset))}. Pass "
            f"one of them: dataset[{next(iter(dataset), 'train')!r}]."
        )
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"from_dataset needs a map-style data set, with len(dataset) and dataset[i]; got "
            f"{named_type(dataset)}. Items of an iterable one can't be drawn in any order: keep them in a list, "
            "list(dataset), if they fit into memory, or write them to files for ImageFolder."
        )
    if not len(dataset):
        raise ValueError("from_dataset needs at least one item; the data set is empty.")
