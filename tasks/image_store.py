"""Decode image files once into a file in the per-user cache, and read single images from it.

The file holds N images ``[N, C, H, H]`` uint8, then a JSON record, then a checksum of the record. It gets its name only
when it is complete and on disk. Images are read one by one, so neither writing nor reading keeps many in memory.

Legend: N images, C channels, H pixels a side.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from tqdm.auto import tqdm

from metamom.common.files import cache_folder, replacing
from metamom.common.numbers import counted, plural
from metamom.tasks import decode
from metamom.tasks.image_files import Listing
from metamom.tasks.locate import DataError

FORMAT = 1  # increase it when this file's layout changes
TAIL = struct.Struct(">Q32s")  # length of the record in bytes; SHA-256 of the key and the record
PART = 32  # files that a thread decodes at a time
LEVELS = np.arange(256)
_ONE_WRITER = threading.Lock()


class Broken(NamedTuple):
    """A file that can't be decoded: its row, its path below the root, and what is wrong with it."""

    row: int
    path: str
    fault: str


class Record(NamedTuple):
    """What is known about the stored images.

    Attributes:
        sha256: digest of the files' names and bytes, broken ones left out. It does not depend on the root.
        broken: the files without an image; their rows are zeros.
        sums: of the pixels of each channel, in units of 1/255.
        squares: of the squared pixels.
    """

    sha256: str
    broken: list[Broken]
    sums: list[int]
    squares: list[int]


class ImageStore:
    """The decoded images of a listing.

    Args:
        path: of the cache's file.
        shape: ``(C, H, H)``.
        count: N.
        record: see `Record`.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], count: int, record: Record) -> None:
        self.path, self.shape, self.count, self.record = path, shape, count, record
        self._handle: int | None = None

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images in these rows ``[R]``: ``[R, C, H, H]``.

        Raises:
            DataError: if the cache's file was removed or cut.
        """
        if not hasattr(os, "preadv"):  # Windows
            stored = np.memmap(self.path, np.uint8, "r", shape=(self.count, *self.shape))
            return np.asarray(stored[rows])
        out = np.empty((len(rows), *self.shape), np.uint8)
        size = out[:1].nbytes
        handle = self.open()
        for row, image in zip(rows.tolist(), out.reshape(len(rows), -1), strict=True):
            if os.preadv(handle, [image], row * size) != size:
                raise DataError(f"the cache {self.path} was cut while in use. Start again to decode the images again.")
        return out

    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels of all images, in units of [0, 1]."""
        pixels = (self.count - len(self.record.broken)) * self.shape[1] * self.shape[2]
        means = [total / (255 * pixels) for total in self.record.sums]
        # exact integers up to the last division: no cancellation
        variances = [
            (square * pixels - total * total) / (255 * pixels) ** 2
            for total, square in zip(self.record.sums, self.record.squares, strict=True)
        ]
        return tuple(means), tuple(variance**0.5 for variance in variances)

    def open(self) -> int:
        """Open the file, if it is not open yet; its handle."""
        if self._handle is None:
            try:
                self._handle = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise DataError(
                    f"can't read the cache of decoded images ({error}). Make the sampler again to decode them again."
                ) from error
            weakref.finalize(self, os.close, self._handle)
        return self._handle

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}


def stored(listing: Listing, size: int, channels: int, *, label: str, skip_broken: bool) -> ImageStore:
    """Return the decoded images of a listing, from the cache if possible.

    If several processes ask at once, one decodes and the others wait. Caches of the same files with other sizes or
    times are removed.

    Args:
        listing: the files.
        size: H.
        channels: C.
        label: what the progress bar says.
        skip_broken: keep a cache of files of which some are broken.

    Raises:
        DataError: for a broken file, unless it should be skipped, or if the cache can't be written.
    """
    shape = (channels, size, size)
    key = {"format": FORMAT, "decode": decode.VERSION, "shape": shape, "root": str(listing.root.resolve())}
    names = hashlib.sha256(json.dumps(key | {"names": listing.names_digest()}, sort_keys=True).encode())
    identity = json.dumps(key | {"files": listing.fingerprint()}, sort_keys=True).encode()
    family = f"images-{size}px-{names.hexdigest()[:16]}"
    path = cache_folder() / f"{family}-{hashlib.sha256(identity).hexdigest()[:16]}.u8"
    count = len(listing.files)
    record = _load(path, identity, count, shape)
    if record is None:
        with _locked(path):
            record = _load(path, identity, count, shape)
            if record is None:  # otherwise another process has made it while this one waited
                for stale in path.parent.glob(f".{path.name}.*.tmp"):
                    stale.unlink(missing_ok=True)
                record = _store(path, identity, listing, shape, label, skip_broken)
                _remove_older(path, family)
    if not skip_broken:
        check_sound(listing.root, record.broken, count)
    store = ImageStore(path, shape, count, record)
    store.open()  # now, so that it stays readable if another process replaces it
    return store


def check_sound(root: Path, broken: Sequence[Broken], count: int) -> None:
    """Refuse broken files.

    Raises:
        DataError: naming the first, and how many others there are.
    """
    if broken:
        more, verb = counted(len(broken) - 1, "other"), plural(len(broken) - 1, "is", "are")
        others = f" {more} of {count:,} files {verb} broken too." if len(broken) > 1 else ""
        raise DataError(
            f"{root / broken[0].path} {broken[0].fault}.{others} Repair or remove "
            f"{'them' if others else 'it'}, or leave broken files out: on_broken='skip'. `metamom data check images "
            f"--root {root}` lists all."
        )


def _load(path: Path, identity: bytes, count: int, shape: tuple[int, int, int]) -> Record | None:
    """Read the record; ``None`` if the file is missing, of another length, or the checksum is wrong."""
    pixels = count * int(np.prod(shape))
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(length - TAIL.size, 0))
            tail = file.read()
            if len(tail) != TAIL.size:
                return None
            size, checksum = TAIL.unpack(tail)
            if length != pixels + size + TAIL.size:
                return None
            file.seek(pixels)
            text = file.read(size)
        if _checksum(identity, text) != checksum:
            return None
        held = json.loads(text)
        return Record(**held | {"broken": [Broken(*each) for each in held["broken"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _checksum(identity: bytes, text: bytes) -> bytes:
    return hashlib.sha256(b"%d %b " % (len(identity), identity) + text).digest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise _not_writable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _not_writable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"can't write decoded images to the cache {path.parent} ({error}). Set $METAMOM_CACHE to a folder that can be "
        "written and has room."
    )


def _store(
    path: Path, identity: bytes, listing: Listing, shape: tuple[int, int, int], label: str, skip_broken: bool
) -> Record:
    _check_room(path, len(listing.files), shape)
    try:
        with replacing(path) as temporary, temporary.open("rb+") as file:
            record = _decode_all(file.fileno(), listing, shape, label)
            if not skip_broken:
                check_sound(listing.root, record.broken, len(listing.files))
            if len(record.broken) == len(listing.files):
                raise DataError(
                    f"none of the {counted(len(listing.files), 'image')} in {listing.root} can be read; the first: "
                    f"{record.broken[0].path} {record.broken[0].fault}."
                )
            text = json.dumps(record._asdict()).encode()
            file.seek(0, os.SEEK_END)
            file.write(text + TAIL.pack(len(text), _checksum(identity, text)))
    except OSError as error:
        raise _not_writable(path, error) from error
    return record


def _check_room(path: Path, count: int, shape: tuple[int, int, int]) -> None:
    """Refuse to decode images for which the cache has no room.

    Raises:
        DataError: with the bytes that are needed and those that are free.
    """
    needed, free = count * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"{counted(count, 'image')} of {shape[0]} x {shape[1]} x {shape[2]} bytes need {needed / 1e9:,.2f} GB in "
            f"the cache; {path.parent} has {free / 1e9:,.2f} GB free. Set $METAMOM_CACHE to a folder with room, or "
            "choose a smaller image_size."
        )


def _remove_older(path: Path, family: str) -> None:
    for other in path.parent.glob(f"{family}-*.u8"):
        if other != path:
            try:
                other.unlink(missing_ok=True)
            except OSError as error:  # Windows: another process still reads it
                if error.errno not in (errno.EACCES, errno.EPERM):
                    raise


class _Part(NamedTuple):
    """Some decoded files: their digests (``None`` for a broken one), and sums over their pixels."""

    first: int
    digests: list[bytes | None]
    broken: list[Broken]
    sums: NDArray[np.int64]
    squares: NDArray[np.int64]


def _decode_all(handle: int, listing: Listing, shape: tuple[int, int, int], label: str) -> Record:
    """Decode all files in parallel; Pillow lets threads run at the same time."""
    count, parts = len(listing.files), []
    os.truncate(handle, count * int(np.prod(shape)))
    bar = tqdm(total=count, desc=f"decoding {label}", unit="img", disable=None, leave=False)
    with decode.quiet(), bar, ThreadPoolExecutor(threads()) as pool:
        futures = [
            pool.submit(_decode_part, handle, listing, shape, range(first, min(first + PART, count)))
            for first in range(0, count, PART)
        ]
        try:
            for future in as_completed(futures):
                parts.append(future.result())
                bar.update(len(parts[-1].digests))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    parts.sort(key=lambda part: part.first)
    digest = hashlib.sha256()
    found = (sha256 for part in parts for sha256 in part.digests)
    for file, place, sha256 in zip(listing.files, listing.labels, found, strict=True):
        if sha256 is not None:
            name = f"{listing.classes[place]}\0{os.path.basename(file.path)}\0"
            digest.update(name.encode(errors="surrogateescape") + sha256)
    return Record(
        digest.hexdigest(),
        [broken for part in parts for broken in part.broken],
        [int(n) for n in np.sum([part.sums for part in parts], axis=0)],
        [int(n) for n in np.sum([part.squares for part in parts], axis=0)],
    )


def _decode_part(handle: int, listing: Listing, shape: tuple[int, int, int], rows: range) -> _Part:
    channels, size, _ = shape
    part = _Part(rows.start, [], [], np.zeros(channels, np.int64), np.zeros(channels, np.int64))
    for row in rows:
        path = listing.files[row].path
        try:
            pixels, sha256 = decode.decode(listing.root / path, size, channels)
        except decode.BrokenImageError as error:
            part.digests.append(None)
            part.broken.append(Broken(row, path, str(error)))
            continue
        _write(handle, pixels, row * pixels.nbytes)
        part.digests.append(sha256)
        for channel, plane in enumerate(pixels):
            histogram = np.bincount(plane.ravel(), minlength=256)  # exact, and faster than sums of wider numbers
            part.sums[channel] += histogram @ LEVELS
            part.squares[channel] += histogram @ LEVELS**2
    return part


def _write(handle: int, pixels: NDArray[np.uint8], offset: int) -> None:
    left = memoryview(pixels.tobytes())
    while left:
        if hasattr(os, "pwrite"):
            written = os.pwrite(handle, left, offset)
        else:  # Windows
            with _ONE_WRITER:
                os.lseek(handle, offset, os.SEEK_SET)
                written = os.write(handle, left)
        left, offset = left[written:], offset + written


def threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 32)
    return min(os.cpu_count() or 1, 32)
