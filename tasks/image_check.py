"""What is in a folder of images: classes, images, sizes, kinds of pixels, and files that can't be decoded."""

from __future__ import annotations

import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from metamom.tasks.decode import BrokenImageError, Header, examine, quiet
from metamom.tasks.image_files import Listing, Splits, check_disjoint, find_images, find_root, find_splits, find_tree
from metamom.tasks.image_store import Broken, threads
from metamom.tasks.locate import DataError, PathLike

TREE = "all classes"  # what a single tree without splits is called
SHOWN = 20  # broken files in the text


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
            f"{len(counts):,} classes, {sum(counts):,} images; per class {min(counts):,} to {max(counts):,}, median "
            f"{statistics.median(counts):g}"
        ]
        if self.sizes:
            widths, heights = ([size[side] for size in self.sizes] for side in (0, 1))
            (width, height), most = self.sizes.most_common(1)[0]
            others = f"; width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}"
            lines.append(f"pixels: {width}x{height} ({most:,} images){others if len(self.sizes) > 1 else ''}")
            lines.append("modes: " + ", ".join(f"{mode} ({count:,})" for mode, count in self.modes.most_common()))
        lines += [f"empty: {name} has no images" for name, count in self.images.items() if not count][:SHOWN]
        lines += [f"broken: {each.path} {each.fault}" for each in self.broken[:SHOWN]]
        if len(self.broken) > SHOWN:
            lines.append(f"broken: {len(self.broken) - SHOWN:,} others")
        return "\n".join(lines)


class ImagesCheck(NamedTuple):
    """What is in a folder of images.

    Attributes:
        root: the folder.
        splits: what is in each split; all in ``"all classes"`` for one tree ``ROOT/CLASS/*`` without splits.
    """

    root: str
    splits: dict[str, SplitCheck]

    @property
    def sound(self) -> bool:
        """Whether every file can be decoded and every class has images."""
        return not any(split.broken or 0 in split.images.values() for split in self.splits.values())

    def __str__(self) -> str:
        lines = [str(self.root)]
        for name, split in self.splits.items():
            first, *others = str(split).splitlines()
            lines += [f"  {name}: {first}", *(f"    {line}" for line in others)]
        return "\n".join(lines)


def check_images(root: PathLike, *, splits: Splits | None = None) -> ImagesCheck:
    """Read every image below a folder, and say what is there. Nothing is written.

    Args:
        root: the folder, as for `ImageFolder`.
        splits: as for `ImageFolder`; without them, a root without folders ``train``, ``validation`` or ``test`` is
            checked as one tree of classes.

    Returns:
        a record; ``print`` shows it as text.

    Raises:
        FileNotFoundError: if the folder, a class or a listed file is not there.
        ValueError: for a class in two splits, or no classes at all.

    Example:
        >>> print(check_images("data/birds"))  # doctest: +SKIP
        data/birds
          train: 100 classes, 5,864 images; per class 41 to 60, median 60
            pixels: 500x375 (2,104 images); width 121 to 500, height 145 to 500
            modes: RGB (5,859), L (5)
    """
    path = find_root(root)
    names = find_splits(path, splits)
    listings = {name: find_images(path, name, splits, allow_empty=True) for name in names} or {TREE: find_tree(path)}
    check_disjoint({name: listing.classes for name, listing in listings.items()})
    if not any(listing.files for listing in listings.values()):
        raise DataError(
            f"{path} has no images in class folders; wanted ROOT/train/CLASS/*.png (and validation, test), or "
            "ROOT/CLASS/*.png."
        )
    return ImagesCheck(str(path), {name: _checked(name, listing) for name, listing in listings.items()})


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
