"""Reads and verifies the published Omniglot images, from an archive or the folder that it unpacks to.

Nothing is ever unpacked to disk: members are read one by one into memory, after all of their names and sizes have
been checked.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from metamom.tasks.locate import DataError

MAX_ARCHIVE = 32 << 20  # bytes; the published archives have under 10 MB, and every entry takes at least 46 of them
MAX_DRAWING = 64 << 10  # bytes; the published drawings have under 1 kB
CLUTTER = re.compile(r"__MACOSX/.*|(.*/)?(\.DS_Store|Thumbs\.db)")  # left by file managers, never read
DRAWING = re.compile(r"(?P<character>[\w()-]+/character\d\d)/\d{4}_(?P<number>\d\d)\.png", re.ASCII)


class Expected(NamedTuple):
    """What a set of images must hold: so many characters, drawings of each, and pixels a side."""

    characters: int
    drawings: int = 20
    side: int = 105


class Characters(NamedTuple):
    """Decoded characters: names ``[C]`` like ``"Greek/character01"``, sorted, and images ``[C, drawings, H, H]`` uint8,
    strokes bright."""

    names: list[str]
    images: NDArray[np.uint8]


PUBLISHED = {"background": Expected(964), "evaluation": Expected(659)}


def read_characters(source: Path, part: str, image_size: int, expected: Expected | None = None) -> Characters:
    """Verifies and decodes one of the two published sets of images.

    Args:
        source: ``images_<part>.zip`` or the folder ``images_<part>``.
        part: ``"background"`` or ``"evaluation"``.
        image_size: pixels a side; drawings are resampled (Lanczos) unless it is their own size.
        expected: what the set must hold; the published counts unless given.

    Raises:
        DataError: for anything that isn't exactly that: damaged files, missing or strange members.
    """
    expected = PUBLISHED[part] if expected is None else expected
    with (_archive if source.is_file() else _folder)(source, f"images_{part}") as (members, read):
        characters = _arranged(source, members, expected)
        images = np.empty((len(characters), expected.drawings, image_size, image_size), dtype=np.uint8)
        total = len(characters) * expected.drawings
        with tqdm(total=total, desc=f"decoding Omniglot {part}", unit="img", disable=None, leave=False) as bar:
            for out, drawings in zip(images, characters.values(), strict=True):
                for number, member in drawings.items():
                    out[number - 1] = _decoded(read(member), source, member, expected.side, image_size)
                bar.update(len(drawings))
    return Characters(list(characters), images)


Members = Iterable[tuple[str, str, int]]  # path below images_<part>/, name to read it by, size in bytes
Reader = Callable[[str], bytes]


@contextmanager
def _archive(source: Path, top: str) -> Iterator[tuple[Members, Reader]]:
    size = source.stat().st_size
    if size > MAX_ARCHIVE:
        raise _bad(source, f"has {size} bytes, more than any Omniglot archive ({MAX_ARCHIVE})")
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise _bad(source, f"is no whole zip archive ({error})") from error
    with archive:
        members = []
        for info in archive.infolist():
            name = info.orig_filename  # as stored: `filename` may have been mended
            if CLUTTER.fullmatch(name):
                continue
            if info.flag_bits & 0x1:
                raise _bad(source, f"has an encrypted member {name!r}")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if not name.startswith(f"{top}/") or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _bad(source, f"has a member {name!r} that is no file or folder below {top}/")
            if not info.is_dir():
                members.append((name.removeprefix(f"{top}/"), name, info.file_size))

        def read(name: str) -> bytes:
            try:
                return archive.read(name)  # checks the CRC, and stops at the size that was checked
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
                raise _bad(source, f"has a damaged member {name} ({error})") from error

        yield members, read


@contextmanager
def _folder(source: Path, top: str) -> Iterator[tuple[Members, Reader]]:
    def members() -> Iterator[tuple[str, str, int]]:
        for folder, folders, files in os.walk(source):
            folders.sort()
            for file in files:
                path = Path(folder, file)
                if CLUTTER.fullmatch(file):
                    continue
                yield path.relative_to(source).as_posix(), str(path), path.stat().st_size

    yield members(), lambda name: Path(name).read_bytes()


def _arranged(source: Path, members: Members, expected: Expected) -> Mapping[str, Mapping[int, str]]:
    """``{character: {number of the drawing: name to read it by}}``, characters in order, complete."""
    found: dict[str, dict[int, str]] = {}
    for path, name, size in members:
        match = DRAWING.fullmatch(path)
        if match is None:
            raise _bad(source, f"has a member {path!r}, which isn't named like Alphabet/character01/0001_01.png")
        if size > MAX_DRAWING:
            raise _bad(source, f"has a drawing {path} of {size} bytes, more than any of Omniglot's ({MAX_DRAWING})")
        drawings = found.setdefault(match["character"], {})
        if int(match["number"]) in drawings:
            raise _bad(source, f"has drawing {match['number']} of {match['character']} twice")
        drawings[int(match["number"])] = name
    numbers = set(range(1, expected.drawings + 1))
    for character, drawings in found.items():
        if missing := numbers - drawings.keys():
            raise _bad(source, f"lacks drawing {min(missing):02d} of {character}")
        if more := drawings.keys() - numbers:
            raise _bad(source, f"has drawing {max(more):02d} of {character}; wanted {expected.drawings} of each")
    if len(found) != expected.characters:
        raise _bad(source, f"has {len(found)} characters instead of {expected.characters}")
    return dict(sorted(found.items()))


def _decoded(data: bytes, source: Path, member: str, side: int, image_size: int) -> NDArray[np.uint8]:
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as png:
            size = png.size
            grey = png.convert("L") if size == (side, side) else None
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise _bad(source, f"has a damaged drawing {member} ({error})") from error
    if grey is None:
        raise _bad(source, f"has a drawing {member} of {size[0]}x{size[1]} pixels instead of {side}x{side}")
    if image_size != side:
        grey = grey.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.subtract(255, np.asarray(grey), dtype=np.uint8)


def _bad(source: Path, what: str) -> DataError:
    return DataError(
        f"{source} {what}. Remove it and get it again: `metamom data fetch omniglot --root {source.parent.parent}`."
    )
