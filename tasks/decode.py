"""Decode one image file to an array of bytes: centre crop, antialiased resizing, and a rule for every kind of pixel."""

from __future__ import annotations

import functools
import hashlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from metamom.common.reading import NotAFileError, read_regular_file

VERSION = 1  # increase it when the same file gives other pixels
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # no format that runs a program
MAX_FILE = 1 << 30  # bytes
FAULTS = (  # what Pillow's readers raise for damaged files
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # modes of more than 8 bits
MODES = {1: "L", 3: "RGB"}
ORIENTATION = 0x0112  # EXIF's number for how to turn an image before it is shown
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(ValueError):
    """A file is not an image that can be decoded; the message completes the sentence "FILE ..."."""


class Decoded(NamedTuple):
    """A decoded file.

    Attributes:
        pixels: ``[C, H, H]`` uint8.
        sha256: digest of the file's bytes.
    """

    pixels: NDArray[np.uint8]
    sha256: bytes


class Header(NamedTuple):
    """What a file says about itself: width and height in pixels as shown, and Pillow's name of its kind of pixels."""

    width: int
    height: int
    mode: str


def decode(path: Path, size: int, channels: int) -> Decoded:
    """Decode a file to a square image.

    Args:
        path: of the file.
        size: H, pixels a side. The largest centred square is resized to it (bicubic, antialiased).
        channels: 1 or 3.

    Raises:
        BrokenImageError: if it can't be decoded.
    """
    data = _read(path)
    with _faults(data), Image.open(BytesIO(data), formats=_formats()) as image:
        _check_pixels(image)
        image.draft(None, (2 * size, 2 * size))  # JPEG: decode at the smallest scale that is still twice as large
        image.load()
        square = _square(plain(image, channels), size)
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        pixels = np.asarray(square if turn is None else square.transpose(turn))
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return Decoded(np.ascontiguousarray(pixels), hashlib.sha256(data).digest())


def examine(path: Path) -> Header:
    """Read a file's size and mode, and decode it to see that it is sound.

    Raises:
        BrokenImageError: if it can't be decoded.
    """
    data = _read(path)
    with _faults(data), Image.open(BytesIO(data), formats=_formats()) as image:
        _check_pixels(image)
        whole, mode = image.size, image.mode
        image.draft(None, (1, 1))  # JPEG: every byte is read, but few pixels are computed
        image.load()
        width, height = whole if image.format in ("JPEG", "MPO") else image.size  # Pillow has turned a TIFF by now
        turned = image.getexif().get(ORIENTATION, 1) >= 5
    return Header(height, width, mode) if turned else Header(width, height, mode)


def plain(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8 bits of grey or RGB.

    Alpha is dropped, as torchvision does. 16 bits are scaled from 0..65535, floating point from 0..1.

    Raises:
        BrokenImageError: for numbers outside these ranges.
    """
    if image.mode in DEEP:
        numbers = np.asarray(image).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise BrokenImageError(
                f"has integers from {numbers.min()} to {numbers.max()}, outside 0 to 65535. Convert it to 8 bits"
            )
        image = Image.fromarray(np.rint(numbers * (255 / 65535)).astype(np.uint8))
    elif image.mode == "F":
        real = np.asarray(image, dtype=np.float64)
        if not (real.min() >= 0 and real.max() <= 1):
            raise BrokenImageError(
                f"has floating-point numbers from {real.min():g} to {real.max():g}, outside 0 to 1. Convert it to 8 "
                "bits"
            )
        image = Image.fromarray(np.rint(real * 255).astype(np.uint8))
    elif image.mode == "LAB":  # Pillow converts it by a colour profile only
        raise BrokenImageError("has CIELAB colours. Convert it to RGB")
    if image.mode == "PA":
        image = image.convert("RGBA")
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


@contextmanager
def quiet() -> Iterator[None]:
    """Let Pillow raise for a file that would take gigabytes, and say nothing about odd metadata.

    Filters of warnings belong to the process, so threads that decode share those of this context.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _read(path: Path) -> bytes:
    try:
        data = read_regular_file(path, MAX_FILE)
    except NotAFileError as error:
        raise BrokenImageError(str(error.strerror)) from error
    except FileNotFoundError as error:
        raise BrokenImageError("is a link to nothing" if path.is_symlink() else "is gone") from error
    except OSError as error:
        raise BrokenImageError(f"can't be read ({error.strerror or error})") from error
    if not data:
        raise BrokenImageError("is empty (0 bytes)")
    return data


@contextmanager
def _faults(data: bytes) -> Iterator[None]:
    """Turn everything that Pillow raises for a bad file into one error."""
    try:
        yield
    except BrokenImageError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith((b"II*\0", b"MM\0*")):
            raise BrokenImageError(
                "is not a TIFF of a known kind. Convert it to 8 bits, if it has several channels of floating point, or "
                "floating point of 16 or 64 bits"
            ) from error
        raise BrokenImageError("is not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError(_too_large()) from error
    except MemoryError as error:
        raise BrokenImageError("needs more memory than there is") from error
    except FAULTS as error:
        raise BrokenImageError(f"is damaged ({error})") from error


def _check_pixels(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise BrokenImageError(_too_large())


def _too_large() -> str:
    return (
        f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit. Make it smaller, or raise the limit if you "
        "trust the data: PIL.Image.MAX_IMAGE_PIXELS"
    )


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
