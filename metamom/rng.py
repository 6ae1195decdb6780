"""Counter-based random numbers: a draw depends on its coordinates, not on earlier draws.

Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) maps (key, counter) to 64 random
bits. The key is (seed, stream), the counter (step, index of the task in the meta-batch, purpose). So any process can
draw any task at any time, and two seeds share nothing. NumPy guarantees Philox's bits across versions and platforms,
but not the numbers that its ``Generator`` derives from them. So the conversion from bits to numbers is done here.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_NUMBERS = 2**28  # in one draw: 2 GiB


class Purpose(IntEnum):
    """The purpose of a draw. Draws for different purposes are independent."""

    TASK = 0  # the task: an amplitude, a set of classes
    DATA = 1  # its points: inputs, noise, drawings
    AUGMENT = 2  # a user's random augmentation of those points
    CHOICE = 3  # which of a fixed set of tasks
    BIAS = 4  # which entries a random operator keeps, and how it rounds


class DrawCoordinates(NamedTuple):
    """Coordinates of tasks (or workers) in the counter space: stream, step, and indices in the meta-batch ``[T]``."""

    stream: str
    step: int
    indices: Ints


Places = DrawCoordinates  # its name in version 0.1


def uniforms(seed: int, places: DrawCoordinates, purpose: Purpose, count: int) -> Floats:
    """Draw numbers uniform on [0, 1), multiples of 2^-53, the same on every platform.

    Args:
        seed: 0 <= seed < 2^64.
        places: T coordinates.
        purpose: separates independent draws at the same coordinates.
        count: how many numbers to draw at each.

    Returns:
        ``[T, count]`` float64.

    Raises:
        ValueError: for more than 2^28 numbers, which take 2 GiB.
    """
    if len(places.indices) * count > MOST_NUMBERS:
        raise ValueError(
            f"{len(places.indices):,} tasks need {count:,} random numbers each; at most {MOST_NUMBERS:,} (2 GiB) are "
            "drawn at a time. Use fewer tasks, or fewer points."
        )
    bits = np.empty((len(places.indices), count), dtype=np.uint64)
    # Pass the key as an array: a list with a number >= 2^63 would go through float64 and lose its low bits.
    philox = np.random.Philox(key=np.array([seed, _stream_number(places.stream)], dtype=np.uint64))
    state = philox.state  # its buffer is empty; setting it is cheaper than a new generator
    for row, index in zip(bits, places.indices, strict=True):
        state["state"]["counter"] = np.array([0, index, places.step, purpose], dtype=np.uint64)
        philox.state = state
        row[:] = philox.random_raw(count)
    return (bits >> np.uint64(11)) * 2.0**-53


def normals(uniform: Floats) -> Floats:
    """Convert uniform numbers to standard normal ones (Box-Muller), ``[T, 2c] -> [T, 2c]``."""
    half = uniform.shape[-1] // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniform[..., :half]))
    angle = 2.0 * np.pi * uniform[..., half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def choose(uniform: Floats, n: int | Ints) -> Ints:
    """Choose k of 0..n-1 without replacement, all ordered choices equally likely.

    These are the first k steps of the Fisher-Yates shuffle, in all rows at once: step j swaps entry j with an entry
    p_j that is uniform on j..n-1. With the same numbers, a smaller k gives the first choices of a larger one.

    Args:
        uniform: ``[R, k]`` numbers on [0, 1), one for each choice; k <= n.
        n: size of the population, one for all rows or one for each row, ``[R]``.

    Returns:
        ``[R, k]`` int64, distinct within a row.
    """
    rows, k = uniform.shape
    steps = np.arange(k)
    sizes = np.broadcast_to(np.asarray(n, dtype=np.int64), (rows,))
    assert rows == 0 or sizes.min() >= k
    slots = steps + (uniform * (sizes[:, None] - steps)).astype(np.int64)
    largest = int(sizes.max(initial=0))
    if largest <= 2 * k * k:
        pool = np.tile(np.arange(largest), (rows, 1))
    else:  # only entries 0..k-1 and p_0..p_{k-1} can change, so a pool of these gives the same choices faster
        pool = np.concatenate([np.broadcast_to(steps, (rows, k)), slots], axis=1)
        slots = (pool[:, None, :] == slots[:, :, None]).argmax(axis=-1)
    row = np.arange(rows)
    for j, slot in enumerate(slots.T):
        pool[row, slot], pool[:, j] = pool[:, j].copy(), pool[row, slot]
    return pool[:, :k].astype(np.int64, copy=True)


def subset(seed: int, places: DrawCoordinates, purpose: Purpose, k: int, n: int) -> Ints:
    """Choose a set of k of 0..n-1 at each coordinate, all sets equally likely. Use it if k is too large for `choose`.

    It takes the first k distinct numbers of a row of uniform draws. If k is more than half of n, it draws the numbers
    to leave out instead.

    Args:
        seed: as for `uniforms`.
        places: T coordinates.
        purpose: as for `uniforms`.
        k: 1 <= k <= n.
        n: size of the population.

    Returns:
        ``[T, k]`` int64, distinct within a row.
    """
    few = min(k, n - k)
    rows = np.empty((len(places.indices), k), dtype=np.int64)
    for row, index in zip(rows, places.indices, strict=True):
        place = places._replace(indices=np.array([index]))
        chosen = _first_different(seed, place, purpose, few, n)
        row[:] = chosen if few == k else np.setdiff1d(np.arange(n), chosen, assume_unique=True)
    return rows


def _first_different(seed: int, place: DrawCoordinates, purpose: Purpose, k: int, n: int) -> Ints:
    # k distinct numbers take -n log(1 - k/n) draws on average; a longer row starts with the same draws as a shorter one
    count = k + 16 - int(n * np.log1p(-k / n)) if k < n else 0
    while k > 0:
        draws = (uniforms(seed, place, purpose, count)[0] * n).astype(np.int64)
        _, first = np.unique(draws, return_index=True)
        if len(first) >= k:
            chosen: Ints = draws[np.sort(first)[:k]]
            return chosen
        count *= 2
    return np.empty(0, dtype=np.int64)


def _stream_number(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
