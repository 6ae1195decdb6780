"""What is in a folder of images: classes, images, sizes, kinds of pixels, and files that can't be decoded."""

from __future__ import annotations

import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from metamom.common.numbers import counted, plural
from metamom.tasks.decode import BrokenImageError, Header, examine, quiet
from metamom.tasks.image_files import (
    FOLDERS,
    Listing,
    Splits,
    find_images,
    find_root,
    find_splits,
    find_tree,
)
from metamom.tasks.image_store import Broken, threads
from metamom.tasks.locate import DataError, PathLike

TREE = "all classes"  # what a single tree without splits is called
SHOWN = 20  # lines of one kind in the text
USUAL = 16  # shots + queries where nothing is given
LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
NEEDED_BY = {  # what cannot be done without a split
    "train": "`metamom train images` needs it",
    "validation": "`metamom train images` needs it to choose the best checkpoint",
    "test": "`metamom evaluate` needs it",
}


class SplitCheck(NamedTuple):
    """What is in one split.

    Attributes:
        images: how many images each class has that can be decoded, by its name.
        sizes: how many images have each (width, height), as they are shown.
        modes: how many images have each of Pillow's modes ("RGB", "L", "P", ...).
        broken: the files that can't be decoded, and why.
    """

    images: dict[str, int]
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    broken: list[Broken]

    def __str__(self) -> str:
        counts = list(self.images.values())
        if not counts:
            return "no classes"
        lines = [
            f"{counted(len(counts), 'class', 'classes')}, {counted(sum(counts), 'image')}; "
            f"per class {min(counts):,} to {max(counts):,}, median {statistics.median(counts):g}"
        ]
        if self.sizes:
            widths, heights = ([size[side] for size in self.sizes] for side in (0, 1))
            (width, height), most = self.sizes.most_common(1)[0]
            others = f"; width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}"
            lines.append(f"pixels: {width}x{height} ({counted(most, 'image')}){others if len(self.sizes) > 1 else ''}")
            lines.append("modes: " + ", ".join(f"{mode} ({count:,})" for mode, count in self.modes.most_common()))
        lines += _listed([f"empty: {name} has no images" for name, count in self.images.items() if not count])
        lines += _listed([f"too few: {name} has 1 image; a task needs a shot and a query" for name in self.single])
        if not self.single and 0 < min(counts) < USUAL:
            name = min(self.images, key=self.images.__getitem__)
            lines.append(f"few: {name} has {min(counts)} images, so shots + queries must be at most {min(counts)}")
        lines += _listed([f"broken: {each.path} {each.fault}" for each in self.broken])
        return "\n".join(lines)

    @property
    def single(self) -> list[str]:
        """The classes with one image, of which no task can be made."""
        return [name for name, count in self.images.items() if count == 1]

    @property
    def sound(self) -> bool:
        """Whether every file can be decoded and every class has two images or more."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """Classes of which no task can be made, and files that can't be decoded: a line for each."""
        empty = [f"the class {name!r} has no images" for name, count in self.images.items() if not count]
        single = [f"the class {name!r} has 1 image; a task needs a shot and a query" for name in self.single]
        return empty + single + [f"{each.path} {each.fault}" for each in self.broken]

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        sizes = [{"width": width, "height": height, "images": n} for (width, height), n in self.sizes.most_common()]
        broken = [{"path": each.path, "fault": each.fault} for each in self.broken]
        return {"images": self.images, "sizes": sizes, "modes": dict(self.modes), "broken": broken, "sound": self.sound}


def _listed(lines: list[str]) -> list[str]:
    """The first lines, and how many others there are."""
    kind = lines[0].partition(":")[0] if lines else ""
    return lines[:SHOWN] + [f"{kind}: {counted(len(lines) - SHOWN, 'other')}"] * (len(lines) > SHOWN)


class ImagesCheck(NamedTuple):
    """What is in a folder of images.

    Attributes:
        root: the folder.
        splits: what is in each split; all in ``"all classes"`` for one tree ``ROOT/CLASS/*`` without splits.
        faults: what is wrong with the folders and lists: classes and files in two splits or classes, listed files
            and classes that are missing, splits without classes, lists that can't be read.
    """

    root: str
    splits: dict[str, SplitCheck]
    faults: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """All that must be put right before training: ``faults``, and the problems of each split."""
        of_splits = [f"{name}: {each}" for name, split in self.splits.items() for each in split.problems]
        return [*self.faults, *of_splits]

    @property
    def missing(self) -> list[str]:
        """Of train, validation and test, the splits that are not there; none of a tree without splits."""
        return [] if TREE in self.splits else [name for name in FOLDERS if name not in self.splits]

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        splits = {name: split.as_json() for name, split in self.splits.items()}
        return {
            "root": self.root,
            "splits": splits,
            "missing": self.missing,
            "problems": self.problems,
            "sound": self.sound,
        }

    def __str__(self) -> str:
        lines = [str(self.root)]
        if TREE in self.splits:
            lines.append("  no splits: training needs --splits, or folders train, validation and test of classes")
        for name, split in self.splits.items():
            first, *others = str(split).splitlines()
            lines += [f"  {name}: {first}", *(f"    {line}" for line in others)]
        lines += [f"  {name}: missing; {NEEDED_BY[name]}" for name in self.missing]
        return "\n".join(lines)


def check_images(root: PathLike, *, splits: Splits | None = None) -> ImagesCheck:
    """Read every image below a folder, and say what is there, and all that is wrong. Nothing is written.

    Args:
        root: the folder, as for `ImageFolder`.
        splits: as for `ImageFolder`; without them, a root without folders ``train``, ``validation`` or ``test`` is
            checked as one tree of classes.

    Returns:
        a record; ``print`` shows it as text.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if there are no images in class folders at all.

    Example:
        >>> print(check_images("data/birds"))  # doctest: +SKIP
        data/birds
          train: 100 classes, 5,864 images; per class 41 to 60, median 60
            pixels: 500x375 (2,104 images); width 121 to 500, height 145 to 500
            modes: RGB (5,859), L (5)
    """
    path = find_root(root)
    faults: dict[str, None] = {}  # each once, in the order found

    def report(error: DataError) -> None:
        faults[str(error)] = None

    names = find_splits(path, splits, report)
    listings = {name: find_images(path, name, splits, allow_empty=True, report=report) for name in names}
    if not names:
        listings = {TREE: find_tree(path)}
    if not faults and not any(listing.files for listing in listings.values()):
        raise DataError(
            f"{path} has no images in class folders; wanted ROOT/train/CLASS/*.png (and validation, test), or "
            "ROOT/CLASS/*.png."
        )
    like = [] if names else [name for name in listings[TREE].classes if name.lower() in LIKE_SPLITS]
    if like:
        one, many = "looks like a split, not like a class", "look like splits, not like classes"
        found = f"{', '.join(like)} {plural(len(like), one, many)}"
        faults[f"{found}: splits are folders named train, validation and test."] = None
    checked = {name: _checked(name, listing) for name, listing in listings.items()}
    return ImagesCheck(str(path), checked, tuple(faults))


def _checked(name: str, listing: Listing) -> SplitCheck:
    images = dict.fromkeys(listing.classes, 0)
    sizes, modes, broken = Counter[tuple[int, int]](), Counter[str](), list[Broken]()
    paths = [listing.root / file.path for file in listing.files]
    bar = tqdm(total=len(paths), desc=f"checking {name}", unit="img", disable=None, leave=False)
    with quiet(), bar, ThreadPoolExecutor(threads()) as pool:
        for row, found in enumerate(pool.map(_examined, paths)):
            bar.update()
            if isinstance(found, Header):
                images[listing.classes[listing.labels[row]]] += 1
                sizes[found.width, found.height] += 1
                modes[found.mode] += 1
            else:
                broken.append(Broken(row, listing.files[row].path, found))
    return SplitCheck(images, sizes, modes, broken)


def _examined(path: Path) -> Header | str:
    try:
        return examine(path)
    except BrokenImageError as error:
        return str(error)
