"""Images from files: how long decoding takes, how much memory it needs, and how fast tasks are sampled.

    python -m metamom.experiments.images [--images 60000] [--side 84] [--image-size 84] [--json]

Writes JPEG files of noise in a temporary folder, 600 for each class, and measures `ImageFolder` on them in new
processes: decoding them to an empty cache, opening it again, and sampling meta-batches of 4 tasks, 5-way 1-shot with 15
queries. A plain `torch.utils.data.DataLoader` reads the same files with Pillow. All files are in the system's page
cache, so disks do not matter.

Memory is that of the whole process with its imports, and how much of it is anonymous; the rest are pages of files,
which the system can drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from metamom.common.flag_types import count
from metamom.experiments.shared.peak import peak_mib
from metamom.tasks import ImageFolder
from metamom.tasks.image_store import threads
from metamom.training.directory import environment

PER_CLASS = 600  # as in miniImageNet
MOST = 1_000_000  # images
TASKS, WAYS, SHOTS, QUERIES = 4, 5, 1, 15  # of a meta-batch
SECONDS = 10.0  # of sampling
BATCH = 64  # images of the DataLoader


class Measured(NamedTuple):
    """What `main` prints.

    Attributes:
        rows: named numbers, in the order measured.
    """

    rows: dict[str, float]


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """The files as a data set of PyTorch reads them: open, convert, resize, to a tensor."""

    def __init__(self, root: Path, image_size: int) -> None:
        self.files = sorted((root / "train").glob("*/*.jpg"))
        names = sorted({file.parent.name for file in self.files})
        self.labels = [names.index(file.parent.name) for file in self.files]
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[i]) as image:
            resized = image.convert("RGB").resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255), self.labels[i]


def write_files(root: Path, images: int, side: int) -> None:
    """Write JPEG files of smooth noise, `PER_CLASS` in each class folder of ``root/train``."""

    def write(number: int) -> None:
        folder = root / "train" / f"class{number // PER_CLASS:04}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:07}.jpg", quality=90)

    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(write, range(images), chunksize=256):
            pass


def building(root: str, cache: str, image_size: int) -> list[float]:
    """Seconds and CPU seconds to decode everything, and MiB: total before and at the peak, then the anonymous ones."""
    os.environ["METAMOM_CACHE"] = cache
    before, anonymous = peak_mib(), _anonymous_mib()
    with _watched() as peak:
        began, cpu = time.perf_counter(), time.process_time()
        ImageFolder(root, image_size=image_size)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return [seconds, cpu, before, peak_mib(), anonymous, peak[0]]


def sampling(root: str, cache: str, image_size: int) -> list[float]:
    """Seconds to open the cache, images a second and a CPU second, and MiB at the peak, total and anonymous."""
    os.environ["METAMOM_CACHE"] = cache
    with _watched() as peak:
        began = time.perf_counter()
        tasks = ImageFolder(root, ways=WAYS, shots=SHOTS, queries=QUERIES, image_size=image_size)
        opened = time.perf_counter() - began
        step, began, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < SECONDS:
            tasks.sample(step, TASKS)
            step += 1
        images = step * TASKS * WAYS * (SHOTS + QUERIES)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return [opened, images / seconds, images / cpu, peak_mib(), peak[0]]


def loading(root: str, workers: int, image_size: int) -> list[float]:
    """Images a second, and a CPU second of this process, of a shuffled DataLoader, from its second batch on."""
    loader = DataLoader(_Files(Path(root), image_size), BATCH, shuffle=True, num_workers=workers)
    batches = iter(loader)
    next(batches)
    images, began, cpu = 0, time.perf_counter(), time.process_time()
    for x, _ in batches:
        images += len(x)
        if time.perf_counter() - began > SECONDS:
            break
    rates = [images / (time.perf_counter() - began), images / (time.process_time() - cpu)]
    del batches  # ends its workers
    return rates


def measure(images: int, side: int, image_size: int) -> Measured:
    """Measure everything on files in a temporary folder."""
    with TemporaryDirectory() as folder:
        root, cache = Path(folder) / "images", str(Path(folder) / "cache")
        write_files(root, images, side)
        given = (str(root), cache, image_size)
        seconds, cpu, before, peak, anonymous, most = _alone(building, *given)
        rows = {
            "decoding, s": seconds,
            "decoding, images/s": images / seconds,
            "decoding, images/CPU s": images / cpu,
            "the cache, MiB": sum(file.stat().st_size for file in Path(cache).glob("*.u8")) / 2**20,
            "imports alone, MiB": before,
            "peak while decoding, MiB": peak,
            "imports alone, anonymous MiB": anonymous,
            "peak while decoding, anonymous MiB": most,
        }
        opened, rate, of_cpu, peak, most = _alone(sampling, *given)
        rows |= {
            "opening the cache, s": opened,
            "sampling, images/s": rate,
            "sampling, images/CPU s": of_cpu,
            "peak while sampling, MiB": peak,
            "peak while sampling, anonymous MiB": most,
        }
        for workers in (0, threads()):
            rate, of_cpu = _alone(loading, str(root), workers, image_size)
            rows[f"DataLoader, {workers} workers, images/s"] = rate
            if not workers:
                rows["DataLoader, 0 workers, images/CPU s"] = of_cpu
    return Measured(rows)


def _alone(function: Callable[..., list[float]], *args: Any) -> list[float]:
    """Call the function in a new process and return its value."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def _watched() -> Iterator[list[float]]:
    """The largest anonymous memory within the block, in MiB, looked at every 20 ms."""
    peak, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], _anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _anonymous_mib() -> float:
    """Anonymous resident memory of this process; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("RssAnon:")), 0.0)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print.

    Args:
        words: the arguments of the command line; by default the process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.images",
        description="Measure reading images from files.",
        allow_abbrev=False,
    )
    parser.add_argument("--images", type=count(MOST, 1), default=60_000, help="files (default: 60000)")
    parser.add_argument("--side", type=count(4096, 1), default=84, help="pixels a side of the files (default: 84)")
    parser.add_argument("--image-size", type=count(1024, 1), default=84, help="pixels a side of tasks (default: 84)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(words)
    if arguments.images < PER_CLASS * (WAYS - 1) + SHOTS + QUERIES:
        parser.error(f"--images must be >= {PER_CLASS * WAYS}, for {WAYS} classes")
    found = measure(arguments.images, arguments.side, arguments.image_size)
    if arguments.json:
        described: dict[str, Any] = {"environment": environment(), **vars(arguments), "rows": found.rows}
        print(json.dumps(described))
        return
    for name, value in found.rows.items():
        print(f"{name:<38}{value:12,.1f}")


if __name__ == "__main__":
    main()
