"""Read the grey values of a small PNG image, and verify every checksum.

Pillow decodes the image. The checks come before, because Pillow decodes damaged files too: it skips the checksums of
pixels, and fills in missing pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
RGB, WITH_ALPHA = 2, (4, 6)  # colour types
REFUSED = {
    b"tRNS": "transparency",
    b"acTL": "an animation",
    b"fcTL": "an animation",  # Pillow follows it even without an acTL chunk
    b"fdAT": "an animation",
    b"iCCP": "a colour profile",
    b"cICP": "a colour profile",
}
GAMMA = 45455  # 1/2.2 in units of 1e-5, the default without a gAMA chunk


# for each colour type: its allowed bit depths, and its numbers a pixel
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# the passes of an interlaced image: first column and row, and the steps between them
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


class DamagedError(ValueError):
    """The file isn't a complete PNG."""


def read_grey(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Read an image's luminance, ``[height, width]``, from 0 (black) to 255 (white).

    Grey with 1 to 16 bits, RGB with 8 bits (luma of ITU-R 601) and palettes are converted, interlaced or not. Ambiguous
    images are refused: transparency (over which background?), animations, colour profiles, other gammas.

    Args:
        data: the contents of the PNG file.
        width: the required width.
        height: the required height.

    Raises:
        DamagedError: if it isn't a complete PNG file.
        ValueError: for another size or kind, e.g. "with transparency".
    """
    chunks = list(_chunks(data))
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise DamagedError("no header")
    found_width, found_height, depth, colour, method, filtering, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if (found_width, found_height) != (width, height):
        raise ValueError(f"of {found_width}x{found_height} pixels instead of {width}x{height}")
    if depth not in DEPTHS.get(colour, ()) or method or filtering or interlaced > 1:
        raise DamagedError(
            f"an invalid header: colour type {colour} of {depth} bits, methods {method}, {filtering} and {interlaced}"
        )
    names = [name for name, _ in chunks]
    for name in names:
        if not name[0] & 32 and name not in CRITICAL:
            raise DamagedError(f"an unknown part {name!r}")
    if names.count(b"IHDR") > 1 or names.count(b"PLTE") > 1:
        raise DamagedError("two headers or palettes")
    if b"IDAT" in names and b"PLTE" in names[names.index(b"IDAT") :]:
        raise DamagedError("a palette after its pixels")
    if len(palette := dict(chunks).get(b"PLTE", b"")) % 3:
        raise DamagedError(f"a palette of {len(palette)} bytes, not 3 per colour")
    if colour in WITH_ALPHA:
        raise ValueError("with transparency")
    if colour == RGB and depth != 8:
        raise ValueError(f"with colours of {depth} bits")
    for name, contents in chunks:
        if name in REFUSED:
            raise ValueError(f"with {REFUSED[name]}")
        if name == b"gAMA" and contents != struct.pack(">I", GAMMA):
            raise ValueError("with a gamma other than 1/2.2")
    _check_pixels(
        b"".join(contents for name, contents in chunks if name == b"IDAT"),
        _inflated(width, height, depth * CHANNELS[colour], bool(interlaced)),
    )
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as png:
            if png.mode.startswith("I"):  # 16 bits, which Pillow's conversion to 8 bits would clip at 255
                return np.asarray(np.rint(np.asarray(png, dtype=np.float64) * (255 / 65535)), dtype=np.uint8)
            if png.mode == "P" and np.asarray(png).max() >= len(palette) // 3:
                raise DamagedError("a colour that its palette lacks")
            return np.asarray(png.convert("L"))
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
        raise DamagedError(str(error)) from error


def _inflated(width: int, height: int, bits: int, interlaced: bool) -> int:
    """The number of bytes of all rows, including one filter byte for each row."""
    total = 0
    for column, row, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-max(width - column, 0) // across), -(-max(height - row, 0) // down)
        total += rows * (1 + -(-columns * bits // 8)) if columns else 0
    return total


def _check_pixels(data: bytes, size: int) -> None:
    """Refuse fewer or more pixels than the header says, since Pillow fills in missing ones."""
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise DamagedError(str(error)) from error
    if len(found) != size or inflate.unconsumed_tail or inflate.unused_data or not inflate.eof:
        raise DamagedError("pixels missing, or more of them than its header says")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and contents of its chunks, with checksums verified. Pillow skips the checksums of pixels."""
    if data[:8] != SIGNATURE:
        raise DamagedError("not a PNG file")
    at, name = 8, b""
    while name != b"IEND":
        if at + 12 > len(data):
            raise DamagedError("its end is missing")
        length, name = struct.unpack_from(">I4s", data, at)
        contents, checksum = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if checksum != struct.pack(">I", zlib.crc32(name + contents)):
            raise DamagedError("a wrong checksum")
        yield name, contents
        at += 12 + length
    if at != len(data):
        raise DamagedError(f"{len(data) - at} bytes after its end")
