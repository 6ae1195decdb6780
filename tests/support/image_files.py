"""Folders of image files that tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 12


def pixels(number: int, height: int = SIZE, width: int = SIZE, channels: int = 3) -> np.ndarray:
    """Pixels of noise, the same for the same number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_class(folder: Path, number: int, images: int = 4, suffix: str = ".png") -> None:
    """Write a class of images; each image of each class has other pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        Image.fromarray(pixels(100 * number + i)).save(folder / f"{i}{suffix}")


def write_splits(root: Path, images: int = 4, **classes: int) -> Path:
    """Write ROOT/<split>/CLASS/*.png with this number of classes for each split; no class is in two splits."""
    number = 0
    for split, count in classes.items():
        for _ in range(count):
            write_class(root / split / f"class{number:02}", number, images)
            number += 1
    return root
