"""Episodes from a folder of image files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metamom.common.checks import check_word
from metamom.common.numbers import counted, plural
from metamom.rng import Ints
from metamom.tasks.augment import augmentation
from metamom.tasks.checks import check_count
from metamom.tasks.episodic import Augment, EpisodicFamily, augmentation_name
from metamom.tasks.image_files import Splits, canonical, find_images, find_root
from metamom.tasks.image_store import ImageStore, stored
from metamom.tasks.locate import PathLike
from metamom.tasks.normalize import MeanStd, check_constants

MAX_IMAGE_SIZE = 1024  # pixels a side
CHANNELS = (1, 3)
ON_BROKEN = ("raise", "skip")


class ImageFolder(EpisodicFamily):
    """Tasks "tell these `ways` classes apart" from image files in one folder for each class.

    Two layouts are understood: ``ROOT/train/CLASS/*.png`` with ``validation`` (or ``val``) and ``test`` next to it, and
    one tree ``ROOT/CLASS/*.png`` with ``splits`` that say which classes belong to each split. Folders below a class's
    are searched too. Names that start with a dot, and files that are not images by their suffix, are ignored; links are
    followed. Nothing is ever written to ROOT.

    At first use the images are decoded in parallel to a file in the cache (``$METAMOM_CACHE``, else the per-user cache
    folder); from then on, single images are read from there, so memory does not grow with the data. The cache is made
    again when a file changes. An image is turned as its EXIF data says; its largest centred square is resized with an
    antialiased bicubic filter. Alpha is dropped, as torchvision does; CMYK and palettes become RGB; 16 bits are scaled
    from 0..65535, floating point from 0..1. An animation gives its first frame.

    Args:
        root: the folder. It must be readable; it is never changed.
        split: ``"train"``, ``"validation"`` or ``"test"`` (or any other folder, or key of ``splits``). Each split
            draws from the stream of its name.
        ways: classes of a task.
        shots: support images per class.
        queries: query images per class.
        image_size: H, pixels a side, up to 1024.
        channels: 3 for RGB, 1 for grey.
        augment: names of augmentations (see `metamom.tasks.augment`), such as ``["crop", "flip"]`` or ``"crop,flip"``,
            or a function ``augment(images, generator)`` of one task's images ``[M, channels, H, H]`` in [0, 1]
            (support, then query) and a generator seeded by counter.
        rotations: ``True``: in ``"train"``, images rotated by 90°, 180° and 270° count as new classes. ``"all"``: in
            every split. ``False``: in none.
        normalize: subtract a mean and divide by a standard deviation of each channel, after augmentation: ``(mean,
            std)``, or ``"dataset"`` for those of the split ``"train"``, which are computed when it is decoded.
        seed: 0 <= seed < 2^64.
        splits: for one tree ``ROOT/CLASS/*``: a list of classes for each split, or the path of a CSV with
            ``filename,label`` lines (as published with miniImageNet) or of a text file with one class a line (as with
            CIFAR-FS).
        on_broken: ``"raise"`` an error that names a file that can't be decoded, or ``"skip"`` such files with a
            warning.

    Attributes:
        classes: names of the classes, sorted; class c, before rotation, is ``classes[c]``.
        num_classes: number of classes, including rotated ones.
        stream: ``split``.
        constants: ``(mean, std)`` of the normalisation, or ``None``.
        skipped: paths of the files that were skipped, below ROOT.

    Returns (from `sample`):
        ``support_x: [T, ways · shots, channels, H, H]``, ``query_x: [T, ways · queries, channels, H, H]`` float32;
        ``support_y`` and ``query_y`` int64 class indices 0..ways-1.

    Raises:
        FileNotFoundError: for a root, split, class or listed file that is not there.
        ValueError: for a broken file, a class in two splits, a class with too few images, more ways than classes, or
            an argument out of range.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog", "owl"):
        ...     (root / "train" / name).mkdir(parents=True)
        ...     for i in range(4):
        ...         Image.new("RGB", (40, 30), (60 * i, 0, 0)).save(root / "train" / name / f"{i}.png")
        >>> tasks = ImageFolder(root, ways=2, shots=1, queries=3, image_size=16)
        >>> tasks.classes
        ('cat', 'dog', 'owl')
        >>> tasks.sample(0, 8).query_x.shape
        torch.Size([8, 6, 3, 16, 16])

    Reference:
        Vinyals et al., "Matching networks for one shot learning" (2016), section 4.1.2 (miniImageNet); Ravi,
        Larochelle, "Optimization as a model for few-shot learning" (2017), its splits.
    """

    def __init__(
        self,
        root: PathLike,
        *,
        split: str = "train",
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        image_size: int = 84,
        channels: int = 3,
        augment: str | Sequence[str] | Augment | None = None,
        rotations: bool | Literal["all"] = False,
        normalize: MeanStd | Literal["dataset"] | None = None,
        seed: int = 0,
        splits: Splits | None = None,
        on_broken: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.split, self.image_size = canonical(split), check_pixels(image_size, channels)
        if not isinstance(rotations, bool | str) or rotations not in (True, False, "all"):
            raise ValueError(f"rotations must be True, False or 'all'; got {rotations!r}.")
        check_word("on_broken", on_broken, ON_BROKEN)
        of_data = isinstance(normalize, str) and normalize == "dataset"
        constants = None if of_data else check_constants(normalize, channels)
        self.root, self.channels, self.rotations = str(find_root(root)), channels, rotations
        self._splits, self._skips = splits, on_broken == "skip"
        turns = 4 if rotations == "all" or (rotations and self.split == "train") else 1

        def opened(split: str) -> tuple[ImageStore, tuple[str, ...], Ints]:
            listing = find_images(root, split, splits)
            store = stored(listing, self.image_size, channels, label=split, skip_broken=self._skips)
            return store, listing.classes, listing.labels

        self._store, self.classes, labels = opened(self.split)
        self.skipped = _skipped(self._store, self.root)
        sound = np.setdiff1d(np.arange(len(labels)), [broken.row for broken in self._store.record.broken])
        self._rows: Ints = sound.astype(np.int64)
        self._check_left(labels[sound])
        super().__init__(
            labels[sound],
            ways=ways,
            shots=shots,
            queries=queries,
            seed=seed,
            augment=augmentation(augment),
            turns=turns,
            names=self._named(labels),
        )
        self.stream = self.split
        if of_data:
            of_train = self._store if self.split == "train" else opened("train")[0]
            constants = check_constants(of_train.mean_and_std(), channels)
        self.constants = constants

    def mean_and_std(self) -> MeanStd:
        """Mean and standard deviation of each channel over this split's images in [0, 1], kept with the cache."""
        return self._store.mean_and_std()

    @property
    def data_sha256(self) -> str:
        """A digest of the split's images and their names. It does not depend on the root."""
        return self._store.record.sha256

    def describe(self) -> dict[str, Any]:
        """See `TaskFamily.describe`. The data is identified by its contents, not by its location."""
        return {
            "family": "ImageFolder",
            "split": self.split,
            "data_sha256": self.data_sha256,
            "images": len(self._rows),
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "image_size": self.image_size,
            "channels": self.channels,
            "augment": augmentation_name(self.augment),
            "rotations": self.rotations,
            "normalize": None if self.constants is None else self.constants.described(),
            "seed": self.seed,
        }

    def task_identity(self) -> dict[str, Any]:
        """See `TaskSampler.task_identity`. Rotations count in the splits that have them."""
        return super().task_identity() | {"rotations": self.num_classes > len(self.classes)}

    def location(self) -> dict[str, Any]:
        """The folder, and what says how to read it: ``splits`` and ``on_broken``, where they are not the defaults."""
        splits = (
            {} if self._splits is None else {"splits": {name: _listed(each) for name, each in self._splits.items()}}
        )
        return {"root": os.path.abspath(self.root), **splits, **({"on_broken": "skip"} if self._skips else {})}

    def __repr__(self) -> str:
        return (
            f"ImageFolder({self.root!r}, split={self.split!r}, ways={self.ways}, shots={self.shots}, "
            f"queries={self.queries}, image_size={self.image_size}, channels={self.channels}, seed={self.seed}): "
            f"{self.contents}"
        )

    @property
    def contents(self) -> str:
        """What tasks are drawn from, in words: ``160 images of 8 classes``."""
        return f"{counted(len(self._rows), 'image')} of {counted(len(self.classes), 'class', 'classes')}"

    def _named(self, labels: Ints) -> list[str]:
        """The classes for errors, with how many of their images are skipped."""
        broken = [each.row for each in self._store.record.broken]
        skipped = np.bincount(labels[broken], minlength=len(self.classes)).tolist()
        notes = (f", without {counted(n, 'broken image')} that {plural(n, 'is', 'are')} skipped," for n in skipped)
        return [f"{name!r}{note if n else ''}" for name, note, n in zip(self.classes, notes, skipped, strict=True)]

    def _check_left(self, labels: Ints) -> None:
        """Refuse a class of which every file was skipped: its number would become the next one's."""
        empty = np.setdiff1d(np.arange(len(self.classes)), labels)
        if len(empty):
            raise ValueError(
                f"every image of the class {self.classes[empty[0]]!r} is broken, and skipped. Repair its files, or "
                "remove the class."
            )

    def _scaled_items(self, index: Ints, turns: Ints) -> tuple[Tensor, bool]:
        """See `EpisodicFamily._scaled_items`. Task by task, so that the bytes of all are never in memory at once."""
        x = torch.empty(*index.shape, *self._store.shape)
        for task, rows, turned in zip(x, index[:, None], turns[:, None], strict=True):
            task.copy_(self._rotated_items(rows, turned)[0])
        return x.div_(255), True

    def _items(self, index: Ints) -> Tensor:
        images = self._store.read(self._rows[index.ravel()])
        return torch.from_numpy(images).view(*index.shape, *images.shape[1:])


def check_pixels(image_size: int, channels: int) -> int:
    """Check the size and the channels of decoded images, and return the size.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for other channels than 1 and 3, and for a size outside 1..1024.
    """
    if channels not in CHANNELS or isinstance(channels, bool):
        raise ValueError(f"channels must be 3 (RGB) or 1 (grey); got {channels!r}.")
    size = check_count("image_size", image_size)
    if size > MAX_IMAGE_SIZE:
        one, limit = (4 * channels * side**2 / 2**20 for side in (size, MAX_IMAGE_SIZE))
        raise ValueError(
            f"image_size must be at most {MAX_IMAGE_SIZE:,} pixels a side; got {size}: one image as float32 would take "
            f"{one:,.0f} MiB, and the limit is {limit:,.0f} MiB."
        )
    return size


def _listed(value: Sequence[str] | PathLike) -> list[str] | str:
    """A split's classes, or the path of its list, as JSON values. A list not in the current folder is in ROOT."""
    if isinstance(value, str | os.PathLike):
        path = os.path.expanduser(value)
        return os.path.abspath(path) if os.path.exists(path) else str(path)
    return list(value)


def _skipped(store: ImageStore, root: str) -> tuple[str, ...]:
    broken = store.record.broken
    if broken:
        warnings.warn(
            f"skipped {len(broken):,} of {counted(store.count, 'image')} in {root} that can't be read; the first: "
            f"{broken[0].path} {broken[0].fault}.",
            RuntimeWarning,
            stacklevel=3,
        )
    return tuple(each.path for each in broken)
