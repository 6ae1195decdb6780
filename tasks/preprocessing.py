"""From image files to a network's inputs, as in training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metamom.tasks.decode import BrokenImageError, decode, quiet
from metamom.tasks.image_files import SUFFIXES
from metamom.tasks.locate import DataError, DataNotFoundError, PathLike
from metamom.tasks.normalize import Constants, normalised

STEPS = (  # for a card: what somebody without metamom has to do
    "open the file with Pillow; of a JPEG, image.draft(None, (2 * image_size, 2 * image_size))",
    "of an animation, take the first frame; scale 16 bits from 0..65535 and floating point from 0..1 to 0..255",
    "image.convert({mode!r}), which drops alpha",
    "turn as the EXIF orientation says (PIL.ImageOps.exif_transpose)",
    "resize the largest centred square to image_size x image_size: Image.Resampling.BICUBIC, antialiased, 8 bits",
    "divide by 255, in float32: value_range",
    "(x - mean) / std of each channel",
)


class Preprocessing(NamedTuple):
    """How image files become inputs.

    Attributes:
        image_size: H, pixels a side.
        channels: C, 3 for RGB or 1 for grey.
        constants: mean and standard deviation of each channel, or ``None`` for inputs in [0, 1].
    """

    image_size: int
    channels: int
    constants: Constants | None

    def read(self, paths: PathLike | Sequence[PathLike]) -> Tensor:
        """Read image files, and all images in folders, in the order of their names.

        Returns:
            ``[N, C, H, H]`` float32.

        Raises:
            DataNotFoundError: for a path that does not exist.
            DataError: for a folder without images, and for a file that can't be decoded.
        """
        return self.read_files(image_paths(paths))

    def read_files(self, files: Sequence[Path]) -> Tensor:
        """As `read`, without looking into folders."""
        images = np.empty((len(files), self.channels, self.image_size, self.image_size), np.uint8)
        with quiet():
            for file, image in zip(files, images, strict=True):
                try:
                    image[...] = decode(file, self.image_size, self.channels).pixels
                except BrokenImageError as error:
                    raise DataError(f"{file} {error}. Repair it, or leave it out.") from error
        x = torch.from_numpy(images).to(torch.float32).div_(255)
        return x if self.constants is None else normalised(x, self.constants, in_place=True)

    def as_json(self) -> dict[str, Any]:
        """For a card: enough to do the same with Pillow and PyTorch."""
        mean, std = (None, None) if self.constants is None else map(list, self.constants)
        steps = STEPS if self.constants is not None else STEPS[:-1]
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "value_range": [0, 1],
            "mean": mean,
            "std": std,
            "steps": [step.format(mode="RGB" if self.channels == 3 else "L") for step in steps],
        }


def image_paths(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files of a path or several: files as they are, and the images in folders and those below them.

    Raises:
        TypeError: for anything but paths.
        DataNotFoundError: for a path that does not exist.
        DataError: for a folder without images, and for no path.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(given, Sequence) or not all(isinstance(path, str | os.PathLike) for path in given):
        raise TypeError(f"wanted a file, a folder, or a list of them; got {paths!r:.100}.")
    if not given:
        raise DataError("wanted image files or folders; got an empty list.")
    return [file for path in given for file in _images(Path(path).expanduser())]


def _images(path: Path) -> Iterator[Path]:
    """A file, or the images of a folder and those below it, without hidden ones."""
    if not path.is_dir():
        if not path.exists():
            raise DataNotFoundError(f"there is no file or folder {path}.")
        yield path
        return
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = (name for name in sorted(names) if not name.startswith("."))
        found += [Path(folder) / name for name in own if Path(name).suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{path} has no images (files with {', '.join(sorted(SUFFIXES)[:8])}, ...).")
    yield from found
