"""PNG pictures of every kind, built byte by byte."""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIDE = 5
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, dx, dy


def chunk(name: bytes, contents: bytes = b"") -> bytes:
    return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", zlib.crc32(name + contents))


def picture(
    samples: np.ndarray, depth: int, colour: int = 0, before: bytes = b"", interlaced: bool = False, size: int = SIDE
) -> bytes:
    """A PNG of these samples ``[H, W]`` or ``[H, W, channels]``, with chunks ``before`` its pixels."""
    header = struct.pack(">IIBBBBB", size, size, depth, colour, 0, 0, int(interlaced))
    parts = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [samples]
    rows = b"".join(b"\0" + packed(row, depth) for part in parts if part.size for row in part)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def packed(row: np.ndarray, depth: int) -> bytes:
    bits = "".join(f"{sample:0{depth}b}" for sample in row.reshape(-1).tolist())
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
