"""Real Omniglot characters as somebody's photographs: RGB JPEGs of 84 x 84 pixels in a folder for each class."""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageOps

CLASSES = {"train": 24, "validation": 8, "test": 8}
SIZE = 84


def write_characters(data_root: Path, root: Path, *, drawings: int = 20, size: int = SIZE) -> Path:
    """Write ROOT/SPLIT/CLASS/*.jpg: 40 classes, none of them in two splits."""
    with zipfile.ZipFile(data_root / "omniglot" / "images_background.zip") as archive:
        by_class: dict[str, list[str]] = defaultdict(list)
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                _, alphabet, character, _ = name.split("/")
                by_class[f"{alphabet}-{character}"].append(name)
        names = iter(sorted(by_class)[: sum(CLASSES.values())])
        for split, count in CLASSES.items():
            for _ in range(count):
                name = next(names)
                folder = root / split / name
                folder.mkdir(parents=True)
                for i, drawing in enumerate(by_class[name][:drawings]):
                    image = Image.open(io.BytesIO(archive.read(drawing))).convert("L").resize((size, size))
                    tinted = ImageOps.colorize(image, (20, 40, 90), (250, 245, 230))  # ink on paper
                    tinted.save(folder / f"{i:02}.jpg", quality=92)
    return root
