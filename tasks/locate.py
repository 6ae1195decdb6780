"""Find data sets: ``ROOT/<data set>``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_data_dir

from metamom.common.files import named_folder
from metamom.common.reading import what_is_there

PathLike = str | os.PathLike[str]


class DataError(ValueError):
    """Data is missing, damaged or not what it should be; the message says what, where and what to do."""


class DataNotFoundError(DataError, FileNotFoundError):
    """Data is missing from the expected location."""


class Root(NamedTuple):
    """A data root: the folder, and where its name came from."""

    path: Path
    origin: str


def data_root(root: PathLike | None = None) -> Root:
    """The one folder that holds the data sets: ``root``, else ``$METAMOM_DATA``, else the per-user data folder.

    Raises:
        TypeError: if ``root`` is not a path.
        ValueError: for an invalid path.
    """
    if root is not None:
        return Root(named_folder(root, "root="), "root=")
    if named := os.environ.get("METAMOM_DATA"):
        return Root(named_folder(named, "$METAMOM_DATA"), "$METAMOM_DATA")
    return Root(Path(user_data_dir("metamom", appauthor=False)), "the per-user data folder")


class Layout(NamedTuple):
    """A data set's folder below ROOT, the suffix of its packed files, and the kind of an unpacked one."""

    folder: str
    suffix: str
    unpacked: str


LAYOUTS = {
    "omniglot": Layout("omniglot", ".zip", "folder"),
    "mnist": Layout("mnist", ".gz", "file"),
    "fashion": Layout("fashion_mnist", ".gz", "file"),
}


def packed_path(dataset: str, name: str, root: PathLike | None = None) -> Path:
    """The path of a data set's published file: ``ROOT/omniglot/images_background.zip``."""
    folder, suffix, _ = LAYOUTS[dataset]
    return data_root(root).path / folder / f"{name}{suffix}"


def locate(dataset: str, name: str, root: PathLike | None = None) -> Path:
    """Find the packed file of a data set, or the unpacked folder or file next to it.

    Args:
        dataset: ``"omniglot"``, ``"mnist"`` or ``"fashion"``.
        name: such as ``"images_background"``, ``"train-images-idx3-ubyte"``.
        root: see `data_root`.

    Raises:
        DataNotFoundError: if neither exists; no other root is tried.
        DataError: if something else has its name: a broken link, a named pipe, a device, ...
    """
    path, origin = data_root(root)
    kind = LAYOUTS[dataset].unpacked
    packed = packed_path(dataset, name, root)
    unpacked = packed.with_name(name)
    there = {file: what_is_there(file) for file in (packed, unpacked)}
    if there[packed] == "a file":
        return packed
    if there[unpacked] == f"a {kind}":
        return unpacked
    for file, found in there.items():
        if found != "nothing":
            raise DataError(f"{file} is {found}, where {dataset} data should be. Remove it, or name another folder.")
    if path.exists() and not path.is_dir():
        raise DataNotFoundError(
            f"the data root {path} (from {origin}) is not a folder. Name the folder that holds {dataset}."
        )
    command = f"metamom data fetch {dataset}"
    if root is None and not os.environ.get("METAMOM_DATA"):
        remedy = f"Run `{command}`, or name the folder that holds it: root=, or $METAMOM_DATA."
    else:
        remedy = f"Run `{command} --root {path}`, or name another folder."
    raise DataNotFoundError(
        f"no {dataset} data: wanted {packed} or the {kind} {unpacked} (root from {origin}). {remedy}"
    )
