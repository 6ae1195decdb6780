"""Where data sets are found: ``ROOT/<data set>``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_data_dir

PathLike = str | os.PathLike[str]


class DataError(ValueError):
    """Data that is missing, damaged or not what it should be; the message says what, where and what to do."""


class DataNotFoundError(DataError, FileNotFoundError):
    """Data that isn't where it was looked for."""


class Root(NamedTuple):
    """A data root: the folder, and where its name came from."""

    path: Path
    origin: str


def data_root(root: PathLike | None = None) -> Root:
    """The one folder that holds the data sets: ``root``, else ``$METAMOM_DATA``, else the per-user data folder."""
    if root is not None:
        return Root(Path(root).expanduser(), "root=")
    if named := os.environ.get("METAMOM_DATA"):
        return Root(Path(named).expanduser(), "$METAMOM_DATA")
    return Root(Path(user_data_dir("metamom", appauthor=False)), "the per-user data folder")


def locate(dataset: str, name: str, root: PathLike | None = None) -> Path:
    """The archive ``ROOT/dataset/name.zip``, or the folder ``ROOT/dataset/name`` that it unpacks to.

    Args:
        dataset: ``"omniglot"``.
        name: such as ``"images_background"``.
        root: see `data_root`.

    Raises:
        DataNotFoundError: if there is neither; no other root is tried.
    """
    path, origin = data_root(root)
    archive, folder = path / dataset / f"{name}.zip", path / dataset / name
    if archive.is_file():
        return archive
    if folder.is_dir():
        return folder
    command = f"metamom data fetch {dataset}"
    if root is None and not os.environ.get("METAMOM_DATA"):
        remedy = f"Run `{command}`, or name the folder that has it: root=, or $METAMOM_DATA."
    else:
        remedy = f"Run `{command} --root {path}`, or name another folder."
    raise DataNotFoundError(
        f"no {dataset} data: wanted {archive} or the folder {folder} (root from {origin}). {remedy}"
    )
