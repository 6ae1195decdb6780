"""Fetch the data sets from their publishers, and verify local copies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pooch
from filelock import FileLock

from metamom.common.checks import is_word
from metamom.tasks import images
from metamom.tasks.download import ResumingDownloader
from metamom.tasks.locate import DataError, DataNotFoundError, PathLike, locate, packed_path
from metamom.tasks.omniglot_archive import MAX_ARCHIVE, PUBLISHED, read_characters


class Checked(NamedTuple):
    """A verified part of a data set: its path and contents, e.g. ``{"characters": 964, ...}``."""

    path: Path
    holds: dict[str, int]


class Published(NamedTuple):
    """A published file: its name without ``.zip`` or ``.gz``, its digest, and how to verify its contents."""

    name: str
    url: str
    md5: str
    verify: Callable[[Path], Checked]


def fetch(dataset: str, root: PathLike | None = None, *, mirror: str | None = None) -> list[Path]:
    """Download the missing files of a data set.

    Existing files are verified and kept, never replaced. Interrupted downloads resume where they stopped. A file gets
    its final name only after its digest was checked.

    Args:
        dataset: ``"omniglot"``, ``"mnist"`` or ``"fashion"``.
        root: data root; else ``$METAMOM_DATA``, else the per-user data folder.
        mirror: fetch from ``<mirror>/<file>`` instead; else ``$METAMOM_MIRROR``, if set.

    Returns:
        the packed (or unpacked) files of the data set.

    Raises:
        ValueError: for an unknown data set, damaged existing data, a failed download, or a wrong digest.
    """
    mirror = mirror or os.environ.get("METAMOM_MIRROR")
    paths = []
    for published in _published(dataset):
        try:
            paths.append(published.verify(locate(dataset, published.name, root)).path)
        except DataNotFoundError:
            target = packed_path(dataset, published.name, root)
            url = f"{mirror.rstrip('/')}/{target.name}" if mirror else published.url
            paths.append(_fetched(url, published.md5, target))
    return paths


def check(dataset: str, root: PathLike | None = None) -> list[Checked]:
    """Verify a data set completely: every name, every image.

    Args:
        dataset: ``"omniglot"``, ``"mnist"`` or ``"fashion"``.
        root: data root; else ``$METAMOM_DATA``, else the per-user data folder.

    Raises:
        FileNotFoundError: if a part is missing.
        ValueError: for an unknown data set or anything wrong with the data.
    """
    return [published.verify(locate(dataset, published.name, root)) for published in _published(dataset)]


def _check_omniglot(part: str) -> Callable[[Path], Checked]:
    def verify(path: Path) -> Checked:
        expected = PUBLISHED[part]
        names, images = read_characters(path, part, expected.side, expected)  # original size: no resampling
        return Checked(path, {"characters": len(names), "drawings": images.shape[0] * images.shape[1]})

    return verify


def _check_images(dataset: str, name: str) -> Callable[[Path], Checked]:
    def verify(path: Path) -> Checked:
        held = images.published(path, dataset, name)
        return Checked(path, {"images" if held.ndim == 3 else "labels": len(held)})

    return verify


# Digests of the published archives (the same ones that torchvision checks).
OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
IMAGES = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
}
DATASETS = {
    "omniglot": [
        Published(f"images_{part}", f"{OMNIGLOT}/images_{part}.zip", md5, _check_omniglot(part))
        for part, md5 in (
            ("background", "68d2efa1b9178cc56df9314c21c6e718"),
            ("evaluation", "6b91aef0f799c5bb55b94e3f2daec811"),
        )
    ],
    **{
        dataset: [
            Published(name, f"{source}/{name}.gz", md5, _check_images(dataset, name))
            for name, md5 in zip(images.FILES, IMAGES[dataset], strict=True)
        ]
        for dataset, source in (("mnist", MNIST), ("fashion", FASHION))
    },
}


def _published(dataset: str) -> list[Published]:
    if not is_word(dataset, DATASETS):
        raise ValueError(f"metamom knows the data sets {', '.join(DATASETS)}; got {dataset!r}.")
    return DATASETS[dataset]


def _fetched(url: str, md5: str, target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.exists():  # another process may have fetched it while this one waited
                downloader = ResumingDownloader(target.with_name(f"{target.name}.part"), limit=MAX_ARCHIVE)
                pooch.retrieve(
                    url, known_hash=f"md5:{md5}", fname=target.name, path=target.parent, downloader=downloader
                )
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise DataError(f"can't write {target} ({error}). Name another folder with root=.") from error
    except DataError:
        raise
    except ValueError as error:  # pooch: a wrong digest
        raise DataError(
            f"{url} isn't the published file ({error}). It was removed; try again later, or from another mirror."
        ) from error
    return target
