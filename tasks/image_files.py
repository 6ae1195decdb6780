"""Find the images of a split: ``ROOT/<split>/CLASS/*``, or one tree ``ROOT/CLASS/*`` with splits given as data.

Nothing is opened except lists of a split. Hidden files and folders are ignored, links are followed.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metamom.common.did_you_mean import did_you_mean
from metamom.common.files import named_folder
from metamom.common.numbers import counted
from metamom.common.reading import NotAFileError, read_regular_file
from metamom.rng import Ints
from metamom.tasks.locate import DataError, DataNotFoundError, PathLike

SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .avif".split()  # noqa: SIM905
)
FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
MAX_LIST = 1 << 28  # bytes of a list of a split

Splits = Mapping[str, Sequence[str] | PathLike]
_Files = dict[str, list["ImageFile"]]


def refuse(error: DataError) -> None:
    """Raise it; what finds images reports to this, unless something else collects what is wrong."""
    raise error


Report = Callable[[DataError], None]


class ImageFile(NamedTuple):
    """A file: its path relative to the root, size in bytes and time in ns. A link to nothing has size -1."""

    path: str
    size: int
    time: int

    @classmethod
    def of(cls, path: str, status: os.stat_result | None) -> ImageFile:
        """A file with this status."""
        return cls(path, -1, 0) if status is None else cls(path, status.st_size, status.st_mtime_ns)


class Listing(NamedTuple):
    """The images of a split.

    Attributes:
        root: the folder that paths are relative to.
        classes: names of the classes, sorted.
        files: N files, sorted by class and then by path.
        labels: ``[N]``, the class of each.
    """

    root: Path
    classes: tuple[str, ...]
    files: list[ImageFile]
    labels: Ints

    def fingerprint(self) -> str:
        """A digest that changes with the files: their paths, sizes and times."""
        digest = hashlib.sha256()
        for path, size, time in self.files:
            digest.update(f"{path}\0{size} {time}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def names_digest(self) -> str:
        """A digest of the paths alone."""
        names = "\0".join(file.path for file in self.files)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def canonical(split: str) -> str:
    """The name of a split; ``"val"`` is ``"validation"``."""
    if not isinstance(split, str) or not split:
        raise TypeError(f'split must be a name such as "train", "validation" or "test"; got {split!r}.')
    return next((name for name, others in FOLDERS.items() if split in others), split)


def find_root(root: PathLike) -> Path:
    """Check that the root is a folder, and return it.

    Raises:
        DataNotFoundError: if it does not exist or is not a folder.
    """
    path = named_folder(root, "root")
    if not path.is_dir():
        raise DataNotFoundError(
            f"{path} {'is not a folder' if path.exists() else 'does not exist'}; root must be a folder with "
            "train/CLASS/*.png (and validation, test), or CLASS/*.png and lists of the splits. Name it with root=."
        )
    return path


def find_splits(root: PathLike, splits: Splits | None = None, report: Report = refuse) -> list[str]:
    """The splits of a root, or an empty list for a single tree ``ROOT/CLASS/*`` without splits."""
    if splits is not None:
        return [canonical(name) for name in splits]
    path = find_root(root)
    return [name for name in FOLDERS if _split_folder(path, name, report) is not None]


def find_images(
    root: PathLike, split: str, splits: Splits | None = None, *, allow_empty: bool = False, report: Report = refuse
) -> Listing:
    """Find the images of a split.

    Args:
        root: the folder.
        split: its name.
        splits: for one tree ``ROOT/CLASS/*``: classes of each split, or the path of a list: a CSV of
            ``filename,label``, or a text file with one class a line.
        allow_empty: accept classes without images.
        report: called with what is wrong. If it returns, the search goes on without what can't be found.

    Raises:
        DataNotFoundError: for a root, a split, a class or a file that is not there.
        DataError: for a class in two splits or without images, and for a list that can't be read.
    """
    path, split = find_root(root), canonical(split)
    found = _of_folders(path, split, report) if splits is None else _of_splits(path, split, splits, report)
    if not found and splits is not None:
        report(DataError(f"the split {split!r} of {path} has no classes. Give it some, or name another split."))
    for name in sorted(found):
        if not found[name] and not allow_empty:
            report(
                DataError(
                    f"the class {name!r} of the split {split!r} in {path} has no images (files with "
                    f"{', '.join(sorted(SUFFIXES)[:8])}, ...). Add some, or remove the class."
                )
            )
    return _sorted(path, found)


def find_tree(folder: Path) -> Listing:
    """Find the images of one tree ``FOLDER/CLASS/*``; classes may be empty."""
    return _sorted(folder, {name: list(_images_below(folder, name)) for name in class_folders(folder)})


def _sorted(root: Path, found: Mapping[str, list[ImageFile]]) -> Listing:
    classes = tuple(sorted(found))
    files = [file for name in classes for file in sorted(found[name], key=lambda file: file.path)]
    labels = np.repeat(np.arange(len(classes)), [len(found[name]) for name in classes]).astype(np.int64)
    return Listing(root, classes, files, labels)


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split.

    Raises:
        DataNotFoundError: if there is none, with what is there instead.
    """
    folder = _split_folder(root, split)
    if folder is not None:
        return folder
    there = class_folders(root)
    shown = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
    advice = (
        "Name one of these."
        if find_splits(root)
        else "Name another split, or, if these are the classes, say which of them make each split: splits={'train': "
        "[...], 'test': [...]}, or the path of a CSV file filename,label for each."
    )
    raise DataNotFoundError(f"{root} has no folder {split!r} for the split; it has {shown or 'no folders'}. {advice}")


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir())


def check_disjoint(members: Mapping[str, Collection[str]], report: Report = refuse) -> None:
    """Report a class that is in two splits: naming the class and the splits."""
    seen: dict[str, str] = {}
    for split, names in members.items():
        for name in names:
            if seen.setdefault(name, split) != split:
                report(
                    DataError(
                        f"the class {name!r} is in two splits, {seen[name]!r} and {split!r}. Few-shot learners are "
                        "tested on classes that training has not seen: keep it in one of them."
                    )
                )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _split_folder(root: Path, split: str, report: Report = refuse) -> Path | None:
    there = [root / name for name in FOLDERS.get(split, (split,)) if not _is_hidden(name) and (root / name).is_dir()]
    if len(there) > 1:
        names = ", ".join(each.name for each in there)
        report(DataError(f"{root} has several folders for the split {split!r}: {names}. Keep one."))
    return there[0] if there else None


def _of_folders(root: Path, split: str, report: Report) -> dict[str, list[ImageFile]]:
    folders = {name: _split_folder(root, name, report) for name in dict.fromkeys((*FOLDERS, split))}
    folder = folders[split] or split_folder(root, split)
    check_disjoint({name: class_folders(each) for name, each in folders.items() if each is not None}, report)
    names = class_folders(folder)
    if not names:
        loose = sum(1 for name in os.listdir(folder) if _is_image(name))
        holds = f" but {counted(loose, 'image')}" if loose else ""
        report(
            DataError(f"{folder} has no class folders{holds}; wanted {folder}/CLASS/*.png, one folder for each class.")
        )
    return {name: [_moved(file, folder.name) for file in _images_below(folder, name)] for name in names}


def _moved(file: ImageFile, below: str) -> ImageFile:
    return file._replace(path=f"{below}/{file.path}")


def _images_below(folder: Path, name: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[ImageFile]:
    """The images of a class folder and the folders in it. A folder linked from inside itself is entered once."""
    here = os.stat(folder / name)
    if (here.st_dev, here.st_ino) in above:
        return
    with os.scandir(folder / name) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            path = f"{name}/{entry.name}"
            if entry.is_dir():
                yield from _images_below(folder, path, above | {(here.st_dev, here.st_ino)})
            elif _is_image(entry.name):
                yield ImageFile.of(path, _status(entry))


def _is_image(name: str) -> bool:
    return not _is_hidden(name) and os.path.splitext(name)[1].lower() in SUFFIXES


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # a link to nothing, or to itself; reading it fails, with its name
        return None


def _of_splits(root: Path, split: str, splits: Splits, report: Report) -> dict[str, list[ImageFile]]:
    if not isinstance(splits, Mapping):
        raise TypeError(
            "splits must map the name of each split to a list of classes or to the path of a CSV file; got "
            f"{type(splits).__name__}."
        )
    given = {canonical(name): value for name, value in splits.items()}
    if split not in given:
        raise DataError(f"splits has no split {split!r}; it has {', '.join(map(repr, given)) or 'none'}.")
    members = {name: _members(root, name, value, report) for name, value in given.items()}
    check_disjoint(members, report)
    listed = _listed_files(root, split, members, report)
    return {
        name: _class_files(root, name, report) if files is None else listed.get(name, [])
        for name, files in members[split].items()
    }


def _class_files(root: Path, name: str, report: Report) -> list[ImageFile]:
    if not (root / name).is_dir():
        report(DataNotFoundError(f"{root} has no class {name!r}{did_you_mean([name], class_folders(root)) or '.'}"))
        return []
    return list(_images_below(root, name))


def _members(root: Path, split: str, value: Sequence[str] | PathLike, report: Report) -> dict[str, list[str] | None]:
    """The classes of a split, each with its file names, or ``None`` for all files of the class's folder."""
    if isinstance(value, str | os.PathLike):
        try:
            return _read_list(root, Path(value))
        except DataError as error:
            report(error)
            return {}
    if not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            f"splits[{split!r}] must be a list of class names or the path of a CSV file; got {value!r:.100}."
        )
    return dict.fromkeys(value)


def _read_list(root: Path, named: Path) -> dict[str, list[str] | None]:
    """Read a CSV of ``filename,label``, or a file with one class a line."""
    path = named.expanduser()
    path = path if path.is_absolute() or path.exists() else root / path
    try:
        text = read_regular_file(path, MAX_LIST).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataNotFoundError(f"there is no list {named} of a split, nor {path}.") from error
    except (NotAFileError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"the list {path} of a split can't be read ({error}).") from error
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
    if not rows:
        raise DataError(f"the list {path} of a split is empty; wanted lines filename,label, or one class a line.")
    if all(len(row) == 1 for row in rows):
        return dict.fromkeys(row[0] for row in rows)
    header = [cell.lower() for cell in rows[0]]
    has_header = "filename" in header and "label" in header
    file_at, label_at = (header.index("filename"), header.index("label")) if has_header else (0, 1)
    members: dict[str, list[str] | None] = {}
    for number, row in enumerate(rows[has_header:], 1 + has_header):
        if len(row) <= max(file_at, label_at) or not row[file_at] or not row[label_at]:
            raise DataError(f"line {number} of {path} is {','.join(row)!r:.100}; wanted filename,label.")
        files = members.setdefault(row[label_at], [])
        assert files is not None
        files.append(row[file_at])
    return members


def _listed_files(
    root: Path, split: str, members: Mapping[str, Mapping[str, list[str] | None]], report: Report
) -> _Files:
    """Find the files that the lists of all splits name, and return those of one split by class.

    Files of this split that are not there are reported, and a file that is listed twice: in two splits, as two
    classes, or in one class.
    """
    seen: dict[str, str] = {}
    missing: list[str] = []
    files: _Files = {}
    for each, classes in members.items():
        for label, names in classes.items():
            place = f"as the class {label!r} of the split {each!r}"
            for name in names or ():
                file = _listed_file(root, label, name)
                if file is None:
                    if each == split:
                        missing.append(f"{name} of the class {label!r}; looked there and in {label}/ and images/")
                    continue
                before = seen.get(file.path)
                if before is not None:
                    twice = f"twice {place}" if before == place else f"{before} and {place}"
                    report(DataError(f"the file {file.path} in {root} is listed {twice}. Keep one of the lines."))
                seen.setdefault(file.path, place)
                if each == split:
                    files.setdefault(label, []).append(file)
    if missing:
        others = f" Of the split {split!r}, {counted(len(missing), 'listed file')} are missing." * (len(missing) > 1)
        report(DataNotFoundError(f"{root} has no file {missing[0]}.{others}"))
    return files


def _listed_file(root: Path, label: str, name: str) -> ImageFile | None:
    """A listed file in ROOT, ROOT/LABEL or ROOT/images; ``None`` if it is in none of them."""
    for path in (name, f"{label}/{name}", f"images/{name}"):
        try:
            return ImageFile.of(os.path.normpath(path).replace(os.sep, "/"), os.stat(root / path))
        except OSError:
            continue
    return None


def split_lists(folder: PathLike) -> dict[str, Path]:
    """The file that lists each split: ``train.csv`` or ``train.txt``, and so on.

    Args:
        folder: holds the lists, as `find_images` takes them.

    Raises:
        DataError: if there is none for training, or several for one split.
    """
    path = named_folder(folder, "splits")
    found: dict[str, Path] = {}
    for split, names in FOLDERS.items():
        there = [path / f"{name}{suffix}" for name in names for suffix in (".csv", ".txt")]
        there = [each for each in there if each.is_file()]
        if len(there) > 1:
            raise DataError(
                f"{path} has several lists of the split {split!r}: {', '.join(each.name for each in there)}. Keep one."
            )
        if there:
            found[split] = there[0]
    if "train" not in found:
        raise DataError(
            f"splits must be a folder with train.csv or train.txt (and validation, test); {path} has neither."
        )
    return found
