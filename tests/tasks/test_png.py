"""Grey values of PNG pictures of every kind, built byte by byte: converted to the right numbers, or refused."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
import pytest
from cases import loop_over
from fuzzing import bounded, campaign, damaged
from tiny_png import SIDE, chunk, picture

from metamom.tasks.png import DamagedError, read_grey


def grey(depth: int) -> np.ndarray:
    return np.random.default_rng(depth).integers(0, 2**depth, (SIDE, SIDE))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth(depth, interlaced):
    """0 is black, the largest sample white, and those between are scaled in proportion."""
    samples = grey(depth)
    read = read_grey(picture(samples, depth, interlaced=interlaced), SIDE, SIDE)
    assert read.dtype == np.uint8
    assert np.array_equal(read, np.floor(samples * 255 / (2**depth - 1) + 0.5))


def test_sixteen_bits_of_half_intensity_are_half_of_eight():
    samples = np.full((SIDE, SIDE), 0x8000)
    assert np.array_equal(read_grey(picture(samples, 16), SIDE, SIDE), np.full((SIDE, SIDE), 128))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_gives_its_colours_not_its_numbers(depth):
    """In an inverted palette 0 is white and 1 is black."""
    samples = grey(1)
    palette = chunk(b"PLTE", bytes([255, 255, 255, 0, 0, 0]))
    assert np.array_equal(read_grey(picture(samples, depth, 3, palette), SIDE, SIDE), 255 * (1 - samples))


def test_colours_are_weighed_by_luminance():
    samples = np.zeros((SIDE, SIDE, 3), dtype=int)
    samples[0, :4] = [[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert read_grey(picture(samples, 8, 2), SIDE, SIDE)[0].tolist() == [255, 76, 150, 29, 0]  # 0.299, 0.587, 0.114


def test_what_says_nothing_about_values_is_passed_over():
    before = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"sRGB", b"\0") + chunk(b"tEXt", b"a\0b")
    assert np.array_equal(read_grey(picture(grey(1), 1, before=before), SIDE, SIDE), 255 * grey(1))


ANIMATION = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
    b"fcTL", struct.pack(">IIIIIHHBB", 0, SIDE, SIDE, 0, 0, 1, 1, 0, 0)
)
REFUSED = {
    "grey and alpha": (picture(np.zeros((SIDE, SIDE, 2), int), 8, 4), "with transparency"),
    "colours and alpha": (picture(np.zeros((SIDE, SIDE, 4), int), 8, 6), "with transparency"),
    "a transparent grey": (picture(grey(1), 1, before=chunk(b"tRNS", b"\0\1")), "with transparency"),
    "a transparent colour": (
        picture(grey(1), 1, 3, chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0")),
        "with transparency",
    ),
    "an animation": (picture(grey(8), 8, before=ANIMATION), "with an animation"),
    "a part of an animation": (picture(grey(8), 8, before=ANIMATION[20:]), "with an animation"),
    "a linear gamma": (picture(grey(8), 8, before=chunk(b"gAMA", struct.pack(">I", 100000))), "with a gamma other"),
    "a profile": (picture(grey(8), 8, before=chunk(b"iCCP", b"x\0\0" + zlib.compress(b"x"))), "with a colour profile"),
    "colours of 16 bits": (picture(np.zeros((SIDE, SIDE, 3), int), 16, 2), "with colours of 16 bits"),
    "another size": (picture(grey(8), 8, size=6), "of 6x6 pixels instead of 5x5"),
    "a huge size": (picture(grey(8), 8, size=2**31 - 1), "of 2147483647x2147483647 pixels instead of 5x5"),
}
WHOLE = picture(grey(8), 8)
DAMAGED = {
    "empty": b"",
    "a web page": b"<html>404</html>",
    "nothing but the signature": WHOLE[:8],
    "cut short": WHOLE[:-1],
    "something after its end": WHOLE + b"x",
    "no header": WHOLE[:8] + chunk(b"IDAT") + chunk(b"IEND"),
    "no pixels": WHOLE[:33] + chunk(b"IEND"),
    "too few pixels": WHOLE[:33] + chunk(b"IDAT", zlib.compress(bytes(8))) + chunk(b"IEND"),
    "no such depth": picture(grey(8), 8)[:8]
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 5, 3, 0, 0, 0, 0))
    + WHOLE[33:],
    "two palettes": picture(grey(1), 1, 3, 2 * chunk(b"PLTE", bytes(6))),
    "a palette after the pixels": WHOLE[:-12] + chunk(b"PLTE", bytes(6)) + WHOLE[-12:],
    "a palette that ends within a colour": picture(grey(1), 1, 3, chunk(b"PLTE", bytes(7))),
    "no palette": picture(grey(8), 8, 3),
    "a palette too short": picture(grey(2), 2, 3, chunk(b"PLTE", bytes(9))),
    "text that unpacks to gigabytes": picture(
        grey(8), 8, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_kinds_are_refused(what):
    data, message = REFUSED[what]
    with bounded(10, 64), pytest.raises(ValueError, match=message):
        read_grey(data, SIDE, SIDE)


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_found(what):
    with bounded(10, 64), pytest.raises(DamagedError):
        read_grey(DAMAGED[what], SIDE, SIDE)


def parts_of(data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of a whole picture's chunks."""
    parts, at = [], 8
    while at < len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        parts.append((name, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return parts


def damaged_with_right_checksums(whole: bytes, rng: random.Random) -> bytes:
    """One fault within the chunks: in a name, in contents, a chunk too few or too many, or pixels cut or added to."""
    parts = parts_of(whole)
    at = rng.randrange(len(parts))
    name, contents = parts[at]
    kind = rng.choice(("name", "contents", "remove", "double", "double", "pixels", "pixels"))
    if kind == "name":
        letter = rng.randrange(4)
        parts[at] = (name[:letter] + bytes([name[letter] ^ 1 << rng.randrange(8)]) + name[letter + 1 :], contents)
    elif kind == "contents":
        parts[at] = (name, damaged(contents or b"x", rng))
    elif kind == "remove":
        del parts[at]
    elif kind == "double":
        other = rng.choice((contents, damaged(contents or b"x", rng)))
        parts.insert(rng.randrange(len(parts) + 1), (name, other))
    else:
        rows = zlib.decompress(parts[-2][1])
        changed = rng.choice((rows[: rng.randrange(len(rows))], rows + bytes(rng.choice((1, 6, 1 << 20)))))
        parts[-2] = (b"IDAT", zlib.compress(changed))
    return whole[:8] + b"".join(chunk(*part) for part in parts)


@campaign(200, 5000)
def test_damage_of_any_kind_is_found_or_harmless(seeds):
    """Nothing but ValueError, and never other pixels; in half of the cases the chunks' checksums are right."""
    for seed in seeds:
        rng = random.Random(seed)
        depth = rng.choice([1, 8, 16])
        whole = picture(grey(depth), depth, interlaced=rng.random() < 0.3)
        right = read_grey(whole, SIDE, SIDE)
        data = damaged_with_right_checksums(whole, rng) if seed % 2 else damaged(whole, rng)
        with bounded(10, 64):
            try:
                read = read_grey(data, SIDE, SIDE)
            except ValueError:
                continue
        assert np.array_equal(read, right), f"seed {seed}"


# ---- whole chunks, with right checksums, that do not fit each other


def made_of(*parts: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in parts)


HEADER = struct.pack(">IIBBBBB", 9, 5, 8, 0, 0, 0, 0)
ROWS = b"".join(b"\0" + bytes(range(row * 9, row * 9 + 9)) for row in range(5))
END = (b"IEND", b"")


def test_a_picture_made_by_hand_is_read():
    found = read_grey(made_of((b"IHDR", HEADER), (b"IDAT", zlib.compress(ROWS)), END), 9, 5)
    assert found.tolist() == [list(range(row * 9, row * 9 + 9)) for row in range(5)]


@pytest.mark.parametrize(
    "parts",
    [
        [(b"IHDR", HEADER), (b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)),
         (b"IDAT", zlib.compress(ROWS)), END],
        [(b"IHDR", HEADER), (b"IDAT", zlib.compress(ROWS[:20])), END],
        [(b"IHDR", HEADER), (b"IDAT", zlib.compress(ROWS + bytes(10**6))), END],
        [(b"IHDR", HEADER), (b"IDAT", zlib.compress(ROWS)[:-6]), END],
        [(b"IHDR", HEADER), (b"IDAT", zlib.compress(ROWS)), (b"IDAT", b"more"), END],
        [(b"IHDR", HEADER), (b"MORE", b""), (b"IDAT", zlib.compress(ROWS)), END],
        [(b"IHDR", HEADER[:-3] + b"\1\0\0"), (b"IDAT", zlib.compress(ROWS)), END],
        [(b"IHDR", HEADER[:8] + b"\3\0\0\0\0"), (b"IDAT", zlib.compress(ROWS)), END],
        [(b"IHDR", HEADER[:8] + b"\x08\5\0\0\0"), (b"IDAT", zlib.compress(ROWS)), END],
    ],
    ids=["two headers", "rows missing", "rows too many", "a cut stream", "a second stream", "unknown and critical",
         "another compression", "three bits", "no such colour type"],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(DamagedError):
        read_grey(made_of(*parts), 9, 5)


@loop_over(depth=(1, 2, 4, 8, 16), size=((1, 1), (1, 9), (9, 1), (3, 5), (17, 4)))
def test_interlaced_pictures_of_every_size(size, depth):
    """Narrow ones lack some of the seven passes."""
    width, height = size
    samples = np.random.default_rng(depth).integers(0, 2**depth, (height, width))
    data = picture(samples, depth, interlaced=True)
    header = chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29])
    found = read_grey(data[:8] + header + data[33:], width, height)
    assert np.array_equal(found, np.floor(samples * 255 / (2**depth - 1) + 0.5))
