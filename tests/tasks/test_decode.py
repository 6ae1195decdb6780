"""One image file to pixels: every kind of file gives what a user expects, or an error that says what is wrong."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamom.tasks.decode import BrokenImageError, Header, decode, examine, quiet

SIDE = 16


@pytest.fixture(autouse=True)
def as_in_a_sampler():
    with quiet():
        yield


def gradient(height: int = SIDE, width: int = SIDE) -> Image.Image:
    """Red rises to the right, green downwards; blue is flat."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 / (width - 1), rows * 255 / (height - 1), np.full((height, width), 99)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def decoded(image: Image.Image, path: Path, channels: int = 3, size: int = SIDE, **options: object) -> np.ndarray:
    image.save(path, **options)
    pixels, sha256 = decode(path, size, channels)
    assert pixels.shape == (channels, size, size)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert sha256 == hashlib.sha256(path.read_bytes()).digest()
    return pixels


def planes(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_an_image_of_the_size_is_kept_as_it_is(suffix, tmp_path):
    image = gradient()
    assert np.array_equal(decoded(image, tmp_path / f"a{suffix}"), planes(image))
    assert np.array_equal(decoded(image, tmp_path / f"a{suffix}", 1), planes(image.convert("L")))


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".gif"])
def test_lossy_files(suffix, tmp_path):
    found = decoded(gradient(), tmp_path / f"a{suffix}").astype(int)
    assert np.abs(found - planes(gradient())).mean() < 12


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_file_decides_and_not_its_suffix(name, tmp_path):
    gradient().save(tmp_path / name, format="BMP")
    assert np.array_equal(decode(tmp_path / name, SIDE, 3).pixels, planes(gradient()))


@pytest.mark.parametrize(("height", "width"), [(20, 32), (32, 20), (33, 20), (300, 201)])
def test_the_largest_centred_square_is_resized(height, width, tmp_path):
    image = gradient(height, width)
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    expected = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    assert np.array_equal(decoded(image, tmp_path / "a.png"), planes(expected))


def test_resizing_is_antialiased(tmp_path):
    stripes = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    found = decoded(stripes, tmp_path / "a.png", 1)
    assert np.abs(found.astype(int) - 127).max() <= 2


def test_small_images_are_enlarged(tmp_path):
    assert decoded(gradient(5, 7), tmp_path / "a.png").std() > 20


def test_large_jpegs_are_decoded_at_a_smaller_scale(tmp_path):
    """Pillow's draft mode; the result stays close to that of all pixels."""
    image = gradient(1600, 1600)
    found = decoded(image, tmp_path / "a.jpg", quality=95).astype(int)
    assert np.abs(found - planes(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_rotation(orientation, suffix, tmp_path):
    shown = gradient(24, 40)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    kept = shown.transpose(back[orientation]) if orientation in back else shown
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    options = {"quality": 98} if suffix in (".jpg", ".webp") else {}
    found = decoded(kept, path, exif=exif, **options).astype(int)
    expected = planes(shown.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(8, 0, 32, 24))).astype(int)
    assert np.abs(found - expected).mean() < 4
    header = examine(path)
    assert (header.width, header.height) == (40, 24)


def test_alpha_is_dropped(tmp_path):
    alpha = Image.new("L", (SIDE, SIDE), 7)
    image = gradient()
    image.putalpha(alpha)
    assert np.array_equal(decoded(image, tmp_path / "a.png"), planes(gradient()))
    grey = gradient().convert("L")
    grey.putalpha(alpha)
    for channels in (1, 3):
        found = decoded(grey, tmp_path / "a.png", channels)
        assert all(np.array_equal(plane, planes(gradient().convert("L"))[0]) for plane in found)


def test_palettes(tmp_path):
    image = gradient().quantize(64)
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(64))}):
        assert np.array_equal(decoded(image, tmp_path / "a.png", **options), planes(image.convert("RGB")))


def test_grey_and_one_bit(tmp_path):
    grey = gradient().convert("L")
    assert all(np.array_equal(plane, np.asarray(grey)) for plane in decoded(grey, tmp_path / "a.png"))
    bits = grey.convert("1")
    assert np.array_equal(decoded(bits, tmp_path / "b.png", 1)[0], np.asarray(bits) * 255)


def test_cmyk(tmp_path):
    image = gradient().convert("CMYK")
    found = decoded(image, tmp_path / "a.jpg", quality=98).astype(int)
    assert np.abs(found - planes(image.convert("RGB"))).mean() < 6
    assert np.array_equal(decoded(image, tmp_path / "a.tif"), planes(image.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(suffix, tmp_path):
    deep = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 257).astype(np.uint16)
    for channels in (1, 3):
        found = decoded(Image.fromarray(deep), tmp_path / f"a{suffix}", channels)
        assert all(np.array_equal(plane, np.arange(SIDE * SIDE).reshape(SIDE, SIDE)) for plane in found)


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_floating_point_is_scaled(channels, compression, tmp_path):
    real = np.linspace(0, 1, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE)
    found = decoded(Image.fromarray(real), tmp_path / "a.tif", channels, compression=compression)
    assert all(np.array_equal(plane, np.rint(real * 255)) for plane in found)


def write_float_tiff(path: Path, pixels: np.ndarray) -> None:
    """Write ``[H, W]`` or ``[H, W, C]`` of floating point, which Pillow can't: one strip, little-endian."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    data, entries, more = np.ascontiguousarray(pixels).tobytes(), b"", b""
    fields = {256: SIDE, 257: SIDE, 258: 8 * pixels.itemsize, 259: 1, 262: 2 if channels == 3 else 1, 273: 8}
    fields |= {277: channels, 278: SIDE, 279: len(data), 284: 1, 339: 3}  # 339: the sample format, 3 is floating point
    after = 8 + len(data) + 2 + 12 * len(fields) + 4
    for tag, value in fields.items():
        if tag in (258, 339) and channels == 3:  # a value for each channel, too long for the entry
            entries += struct.pack("<HHII", tag, 3, 3, after + len(more))
            more += struct.pack("<3H", value, value, value)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(fields)) + entries + bytes(4) + more)


def test_floating_point_of_other_kinds(tmp_path):
    """One channel of 32 bits is read; what Pillow does not know is refused by name."""
    real = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
    write_float_tiff(tmp_path / "a.tif", real.astype(np.float32))
    assert np.array_equal(decode(tmp_path / "a.tif", SIDE, 1).pixels[0], np.rint(real * 255))
    for pixels in (real.astype(np.float64), real.astype(np.float16), np.stack([real] * 3, -1).astype(np.float32)):
        write_float_tiff(tmp_path / "b.tif", pixels)
        for read in (lambda path: decode(path, SIDE, 3), examine):
            with pytest.raises(BrokenImageError, match=r"is not a TIFF of a known kind\. Convert it to 8 bits"):
                read(tmp_path / "b.tif")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.full((4, 4), 99.0, np.float32), "has floating-point numbers from 99 to 99, outside 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "has floating-point numbers from nan"),
        (np.full((4, 4), 70000, np.int32), "has integers from 70000 to 70000, outside 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "has integers from -1"),
    ],
)
def test_numbers_out_of_range(numbers, message, tmp_path):
    with pytest.raises(BrokenImageError, match=message):
        decoded(Image.fromarray(numbers), tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_an_animation_gives_its_first_frame(suffix, tmp_path):
    frames = [Image.new("RGB", (SIDE, SIDE), color) for color in ("red", "lime", "blue")]
    found = decoded(frames[0], tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    assert found[0].min() > 200
    assert found[1:].max() < 60


# Broken files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated_files(suffix, kept, tmp_path):
    path = tmp_path / f"a{suffix}"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(BrokenImageError, match=r"is damaged \(|is not an image of a known format|is not a TIFF of"):
        decode(path, SIDE, 3)
    with pytest.raises(BrokenImageError):
        examine(path)


@pytest.mark.parametrize(
    "data", [b"x", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_files_that_are_not_images(data, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(BrokenImageError, match=r"is not an image of a known format|is damaged"):
        decode(path, SIDE, 3)


def test_damaged_bytes_never_escape(tmp_path):
    """Any damage gives pixels or one kind of error."""
    random, path = np.random.default_rng(0), tmp_path / "a"
    for suffix in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        file = BytesIO()
        gradient(30, 30).save(file, suffix)
        for _ in range(60):
            data = np.frombuffer(file.getvalue(), np.uint8).copy()
            data[random.integers(0, len(data), 4)] = random.integers(0, 256, 4)
            path.write_bytes(data.tobytes())
            try:
                assert decode(path, SIDE, 3).pixels.shape == (3, SIDE, SIDE)
            except BrokenImageError:
                continue


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("link", "is a link to nothing"),
        ("empty", r"is empty \(0 bytes\)"),
        ("pipe", "is a named pipe"),
        ("gone", "is gone"),
    ):
        with pytest.raises(BrokenImageError, match=message):
            decode(tmp_path / f"{name}.png", SIDE, 3)


@pytest.mark.parametrize("side", [9_600, 14_000, 60_000])
def test_images_above_pillows_limit(side, tmp_path):
    """Said by the header alone; nothing is decoded."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b""))
    )
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(BrokenImageError, match=r"more than 89,478,485 pixels, Pillow's limit.*MAX_IMAGE_PIXELS"):
        decode(tmp_path / "a.png", SIDE, 3)


def test_headers(tmp_path):
    gradient(20, 30).save(tmp_path / "a.jpg")
    assert examine(tmp_path / "a.jpg") == Header(30, 20, "RGB")
