"""Small archives in Omniglot's layout, made by the tests."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamom.tasks import omniglot, omniglot_archive
from metamom.tasks.omniglot_archive import Expected

SIDE = 12
TINY = Expected(characters=6, drawings=4, side=SIDE)


def pixels(number: int, drawing: int, side: int = SIDE) -> np.ndarray:
    """``[side, side]`` bool, strokes True; different for each drawing and unlike itself when rotated."""
    out = np.zeros((side, side), dtype=bool)
    out[0, : side // 2] = True
    out[2 + number % (side - 2), :3] = True
    out[:, 4 + drawing % (side - 4)] = True
    return out


def png(strokes: np.ndarray) -> bytes:
    """1-bit, black strokes on white, as published."""
    file = BytesIO()
    Image.fromarray(np.where(strokes, 0, 255).astype(np.uint8)).convert("1").save(file, "PNG")
    return file.getvalue()


def members(part: str = "background", expected: Expected = TINY) -> dict[str, bytes]:
    """``{name in the archive: PNG}``: characters of two alphabets in turn."""
    return {
        f"images_{part}/{('Alpha', 'Beta_(b)')[c % 2]}/character{c // 2 + 1:02d}/{c + 1:04d}_{d + 1:02d}.png": png(
            pixels(c, d)
        )
        for c in range(expected.characters)
        for d in range(expected.drawings)
    }


NAMES = tuple(f"background/{a}/character0{n}" for a in ("Alpha", "Beta_(b)") for n in (1, 2, 3))


def in_place_of_omniglot(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Have the sampler expect these characters, in every split, with a cache of its own."""
    monkeypatch.setattr(omniglot_archive, "PUBLISHED", {"background": TINY})
    monkeypatch.setattr(omniglot, "split_characters", lambda split: NAMES)
    monkeypatch.setenv("METAMOM_CACHE", str(cache))


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path
