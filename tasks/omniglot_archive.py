"""Read and verify the published Omniglot images, from an archive or the unpacked folder.

Nothing is unpacked to disk. Members are read into memory one by one, after all names and sizes have been checked.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from metamom.common.reading import read_regular_file, what_is_there
from metamom.tasks.locate import DataError
from metamom.tasks.png import DamagedError, read_grey

MAX_ARCHIVE = 32 << 20  # bytes; the published archives have under 10 MB
MAX_MEMBERS = 50_000  # the published archives have under 21,000
MEMBER = b"PK\x01\x02"  # signature of each entry in a zip archive's directory
LOCAL_HEADER = 30  # bytes before a member's name
MAX_DRAWING = 64 << 10  # bytes; the published drawings have under 1 kB
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may take gigabytes to unpack a few bytes
ZIP_FAULTS = (  # errors seen from zipfile for damaged archives
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip
CLUTTER = re.compile(r"__MACOSX/.*|(.*/)?(\.DS_Store|Thumbs\.db)")  # left by file managers, never read
DRAWING = re.compile(r"(?P<character>[\w()-]+/character\d\d)/\d{4}_(?P<number>\d\d)\.png", re.ASCII)


class Expected(NamedTuple):
    """The required contents of a set of images: number of characters, drawings of each, and pixels a side."""

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
    """Verify and decode one of the two published sets of images.

    Args:
        source: ``images_<part>.zip`` or the folder ``images_<part>``.
        part: ``"background"`` or ``"evaluation"``.
        image_size: pixels a side; drawings are resampled (Lanczos) unless this is their original size.
        expected: the required contents; the published counts by default.

    Raises:
        DataError: for any deviation: damaged files, missing or unknown members.
    """
    expected = PUBLISHED[part] if expected is None else expected
    if (kind := what_is_there(source)) not in ("a file", "a folder"):
        raise _bad(source, f"is {kind}, neither an archive nor a folder")
    members, read = _archive(source, f"images_{part}/") if kind == "a file" else _folder(source)
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


def _archive(source: Path, top: str) -> tuple[Members, Reader]:
    size = source.stat().st_size
    if size > MAX_ARCHIVE:
        raise _bad(source, f"has {size} bytes, more than any Omniglot archive ({MAX_ARCHIVE})")
    data = read_regular_file(source, MAX_ARCHIVE)
    # count before zipfile creates an object for each; compressed data rarely contains this signature
    if (members := data.count(MEMBER)) > MAX_MEMBERS:
        raise _bad(source, f"has {members} members, more than any Omniglot archive ({MAX_MEMBERS})")
    try:
        archive = zipfile.ZipFile(BytesIO(data))
    except ZIP_FAULTS as error:
        raise _bad(source, f"is not a complete zip archive ({error})") from error

    def read(name: str) -> bytes:
        try:
            return archive.read(name)  # checks the CRC, and stops at the size that was checked
        except ZIP_FAULTS as error:
            raise _bad(source, f"has a damaged member {name} ({error})") from error

    return _members(source, archive, top), read


def _members(source: Path, archive: zipfile.ZipFile, top: str) -> Iterator[tuple[str, str, int]]:
    infos = archive.infolist()
    _check_apart(source, infos, archive.start_dir)
    for info in infos:
        name = info.orig_filename  # as stored; zipfile may have changed `filename`
        if CLUTTER.fullmatch(name):
            continue
        if info.flag_bits & 0x1:
            raise _bad(source, f"has an encrypted member {name!r}")
        if info.compress_type not in METHODS:
            raise _bad(source, f"has a member {name!r} that is packed by method {info.compress_type}, not by deflate")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not name.startswith(top) or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _bad(source, f"has a member {name!r} that is not a file or folder below {top}")
        if not info.is_dir():
            yield name.removeprefix(top), name, info.file_size


def _check_apart(source: Path, infos: Sequence[zipfile.ZipInfo], end: int) -> None:
    """Check that no two members share bytes. Zip bombs use overlapping members to grow a million fold.

    zipfile refuses them itself in newer versions of Python, but not in all that are supported.
    """
    before = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < before:
            raise _bad(source, f"has a member {info.orig_filename!r} that overlaps another")
        before = info.header_offset + LOCAL_HEADER + len(info.orig_filename) + info.compress_size
    if before > end:
        raise _bad(source, "is damaged: its members go beyond its end")


def _folder(source: Path) -> tuple[Members, Reader]:
    def read(name: str) -> bytes:
        try:
            return read_regular_file(Path(name), MAX_DRAWING)
        except OSError as error:
            raise _bad(source, f"has a drawing {name} that can't be read ({error.strerror})") from error

    return ((path, os.path.join(source, path), found.st_size) for path, found in files_below(source)), read


def files_below(source: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files of a folder of drawings by relative path, in order, without opening them.

    Raises:
        DataError: for anything but regular files, a link to a folder, or a folder that is not in the layout.
    """

    def fail(error: OSError) -> None:
        raise _bad(source, f"has a folder {error.filename} that can't be read ({error.strerror})") from error

    for folder, folders, files in os.walk(source, onerror=fail):
        folders.sort()
        below = Path(folder).relative_to(source)
        for name in folders:
            if len(below.parts) == 2 or os.path.islink(os.path.join(folder, name)):
                raise _bad(source, f"has a folder, or a link to one, {below / name} in place of a drawing")
        for name in sorted(files):
            if CLUTTER.fullmatch(name):
                continue
            path = os.path.join(folder, name)
            found = _status(path)
            if found is None or not stat.S_ISREG(found.st_mode):
                raise _bad(source, f"has {what_is_there(Path(path))} in place of a drawing, {below / name}")
            yield "/".join((*below.parts, name)), found


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a broken link, or a link to itself
            return None
        raise


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
        grey = read_grey(data, side, side)
    except DamagedError as error:
        raise _bad(source, f"has a damaged drawing {member} ({error})") from error
    except ValueError as error:
        raise _bad(source, f"has a drawing {member} {error}") from error
    if image_size != side:
        grey = np.asarray(Image.fromarray(grey).resize((image_size, image_size), Image.Resampling.LANCZOS))
    return np.subtract(255, grey, dtype=np.uint8)


def _bad(source: Path, what: str) -> DataError:
    return DataError(
        f"{source} {what}. Remove it and get it again: `metamom data fetch omniglot --root {source.parent.parent}`."
    )
