"""How long a meta-iteration takes in metamom, learn2learn, higher, TorchOpt and JAX.

    python -m metamom.experiments.speed [--rows sinusoid,omniglot] [--contenders learn2learn,metamom] [--json]

All contenders of a row have the same weights and the same tasks, and compute the same meta-gradient. This is
checked first, in float64 (``--check`` does nothing else); a contender that computes something else, or cannot run the
row, is not timed. Then they take turns in float32, so that a machine that slows down slows all of them. A turn is one
iteration, or as many as fill 50 ms. Times are medians and quartiles of turns, and CPU times (of all threads) are
medians; speeds are ratios of times in the same round. GFLOP/s count the matrix products that metamom's meta-gradient
needs, the same number for every contender.

"off by" is how far a contender's float32 meta-gradient is from the first contender's, relative to its norm.
``metamom-bfloat16``, which has to be requested (``--contenders metamom,metamom-bfloat16``), multiplies in bfloat16: it
is timed although it is off, and that column shows its cost in accuracy.

"1st call" is the time to make a contender and run its first iteration with an empty TorchInductor cache (unless
$TORCHINDUCTOR_CACHE_DIR names one), as in a program that has never run before; the kernels that metamom builds once per
machine are already built. ``--alone`` adds "2nd run": the same in a new process, with the cache filled. With ``--cold``
both caches are empty, and the time to build the kernels is shown separately. TF32 is off for all contenders.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from metamom.common.allocator import keep_freed_memory
from metamom.common.checks import MOST
from metamom.common.flag_types import count, number
from metamom.experiments.speed import measure as measuring
from metamom.experiments.speed import report
from metamom.experiments.speed.measure import Measured
from metamom.experiments.speed.peers import NAMES, ROUGH, makers, unavailable
from metamom.experiments.speed.rows import ROWS
from metamom.training.directory import environment


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print.

    Args:
        words: the arguments of the command line; by default the process's.

    Returns:
        The exit status: 1 if some contender disagrees.
    """
    arguments = parse(words)
    device = torch.device(arguments.device)
    keep_freed_memory()  # for all contenders, as `metamom train` does
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
        os.environ["NPROC"] = str(arguments.threads)  # read by XLA when JAX starts
    if arguments.one:
        row, name = arguments.one
        print(json.dumps(measuring.alone(ROWS[row]().to(device, torch.float32), name, device)))
        return 0
    with measuring.empty_caches(kernels=arguments.cold), warnings.catch_warnings():
        # learn2learn clones recurrent layers with tensors that are not leaves
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return _all_rows(arguments, device)


def _all_rows(arguments: argparse.Namespace, device: torch.device) -> int:
    start = measuring.now(device)
    unavailable("metamom-compiled", device)
    building = measuring.now(device) - start  # or loading, unless --cold
    skipped = {name: why for name in arguments.contenders if (why := unavailable(name, device)) is not None}
    present = [name for name in arguments.contenders if name not in skipped]
    env = environment()
    if not arguments.json:
        print(f"torch {env['torch']}, {env['threads']} threads, {device}, {env['processor']}")
        for name, why in skipped.items():
            print(f"skipped: {name}: {' '.join(why.split())[:200]}")
        if arguments.cold:
            print(f"metamom's kernels, built once per machine: {building:.1f} s")
    results = {}
    for row in tqdm(arguments.rows, desc="rows", disable=None):
        if (measured := run(row, present, device, arguments)) is None:
            continue
        results[row] = measured
        if not arguments.json:
            lines = report.checked(measured) if arguments.check else report.timed(measured)
            tqdm.write("\n".join(["", f"{row}:", *lines]), file=sys.stdout)
            sys.stdout.flush()
    if arguments.json:
        found: dict[str, Any] = {"environment": env, "device": str(device), "skipped": skipped}
        if arguments.cold:
            found["kernels_seconds"] = building
        rows = {row: report.as_json(measured) for row, measured in results.items()}
        print(json.dumps({**found, "rows": rows}))
    return int(any(measured.refused for measured in results.values()))


def run(row: str, present: Sequence[str], device: torch.device, arguments: argparse.Namespace) -> Measured | None:
    """Measure one row; ``None`` if no available contender takes part in it."""
    made = ROWS[row]().to(device, torch.float32)
    names = [name for name in makers(made) if name in present]
    if not names:
        return None
    if arguments.check:
        return measuring.check(made, names, device)
    measured = measuring.measure(made, names, device, arguments.seconds, arguments.rounds)
    if arguments.alone:
        options = ["--device", arguments.device]
        if arguments.threads is not None:
            options += ["--threads", str(arguments.threads)]
        for name in measured.milliseconds:
            measured.alone[name] = measuring.alone_elsewhere(row, name, options)
    return measured


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.speed", description="Time meta-iterations.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)} (default: all)")
    usual = ",".join(name for name in NAMES if name not in ROUGH)
    add("--contenders", default=usual, help=f"some of {', '.join(NAMES)} (default: all but {', '.join(ROUGH)})")
    add("--seconds", type=number, default=20.0, help="seconds for each row, after its first calls (default: 20)")
    add("--rounds", type=count(MOST, 1), default=200, help="most timed iterations of each contender (default: 200)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--threads", type=count(10_000, 1), help="CPU threads (default: PyTorch's and JAX's own choice)")
    add(
        "--alone",
        "--memory",
        action="store_true",
        help=("measure peak memory and a second run's first call too, each in its own process"),
    )
    add("--cold", action="store_true", help="also time the build of metamom's kernels, in an empty cache")
    add(
        "--check",
        action="store_true",
        help=("only check that all contenders compute the same; the exit status is 1 if not"),
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--one", nargs=2, help=argparse.SUPPRESS)  # row and contender: print this process's peak memory
    arguments = parser.parse_args(words)
    if arguments.one and (arguments.one[0] not in ROWS or arguments.one[1] not in makers(ROWS[arguments.one[0]]())):
        parser.error(f"--one needs a row and a contender that takes part in it; got {' '.join(arguments.one)}.")
    arguments.rows = _chosen(parser, "--rows", arguments.rows, ROWS)
    arguments.contenders = _chosen(parser, "--contenders", arguments.contenders, NAMES)
    if arguments.seconds < 0:
        parser.error(f"--seconds must be >= 0; got {arguments.seconds}.")
    if arguments.check and (arguments.alone or arguments.cold):
        parser.error("--check measures nothing; leave out --memory, --alone and --cold.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    return arguments


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: Any) -> list[str]:
    """The names in a comma-separated list, in the order of the known names."""
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(known)):
        parser.error(f"{option}: {', '.join(map(repr, unknown))} not among {', '.join(known)}.")
    return [name for name in known if name in names]


if __name__ == "__main__":
    sys.exit(main())
