"""Runs the core tests on every supported Python, with the oldest to the newest torch and NumPy.

    python .ci/compat.py [--only 3.10,3.13]

One row at a time, in an environment of its own in ``.compat/``, removed when its row is done. Each row installs
torch, a CUDA build of 5 GB on most Pythons, and tests for some minutes. The table, which is CONTRIBUTING.md's, goes to
standard output and to ``.compat/table.md``, with the rows of other Pythons as they were run last. The exit status is 1
if a row fails.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent
PLACE = CHECKOUT / ".compat"
TOOLS = {"pytest", "pytest-xdist", "hypothesis", "tensorboard"}  # of requirements-dev.txt
HOURS = 2  # after which a row's tests have hung


class Row(NamedTuple):
    """What one environment has."""

    python: str
    torch: str
    numpy: str
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"python {self.python}, torch {self.torch}, numpy {self.numpy}"


# The lower bounds of pyproject.toml, and pyparsing of those days: matplotlib 3.8 calls what newer ones warn of.
OLDEST = (
    "tqdm==4.66.0",
    "lazy_loader==0.4",
    "pyyaml==6.0.1",
    "scipy==1.11.2",
    "matplotlib==3.8.0",
    "pillow==10.1.0",
    "platformdirs==4.0.0",
    "filelock==3.24.0",
    "pooch==1.8.0",
    "requests==2.31.0",
    "pydantic==2.8.0",
    "safetensors==0.4.3",
    "tensorboard==2.16.2",
    "bokeh==3.9.0",
    "pyparsing==3.1.4",
)
# Each Python once at least; of torch and NumPy the oldest, what is pinned, and the newest.
ROWS = (
    Row("3.10", "2.8.0", "1.26.0", OLDEST),
    Row("3.11", "2.13.0", "1.26.4"),
    Row("3.11", "2.13.0", "2.2.6"),
    Row("3.12", "2.14.1", "2.5.5"),
    Row("3.13", "2.13.0", "2.5.5"),
)
# The heart of the library; not the command, compiling, speed, several processes and other libraries, which take hours.
CORE = (
    "accumulator", "adapted_parameters", "another_loss", "attention", "bombs", "checkpoint_contents", "draws",
    "episodes", "feedback", "feedback_floors", "functions_by_task", "learned_step_sizes", "learner_options",
    "linear_oracle", "maml", "metrics", "nets", "numbers", "optim", "optim_last_gradient", "optim_normalised",
    "optim_options", "optim_schedules", "optim_state", "own_operators", "package", "registered_twice",
    "resume_settings", "rng", "robust", "run_directory", "runs_of_every_kind", "samplers", "sinusoid",
    "task_arguments", "torch_conformance", "torch_conformance_state", "torch_losses", "tracking", "training_mistakes",
    "unsuitable_models", "wire", "worker_momentum", "wrong_arguments",
)  # fmt: skip


def core() -> list[Path]:
    """The files of the core tests, in whatever room they are."""
    return [next((CHECKOUT / "tests").rglob(f"test_{name}.py")) for name in CORE]


class Result(NamedTuple):
    """What came of a row."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    why: str = ""

    @property
    def good(self) -> bool:
        return self.passed > 0 and self.failed == 0 and not self.why


def find_python(version: str) -> str:
    """An interpreter of that version: on the path, or of pyenv.

    Raises:
        ValueError: where there is none.
    """
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    candidates = [shutil.which(f"python{version}"), *sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        tried = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if tried.stdout.strip() == version:  # a shim of pyenv may be there and not run
            return candidate
    raise ValueError(f"no Python {version} on the path or in {pyenv}/versions; install one")


def run(row: Row) -> Result:
    """Make the environment, run the tests in it, remove it."""
    PLACE.mkdir(exist_ok=True)
    environment, log, junit = PLACE / "environment", PLACE / f"{row.name}.log", PLACE / "junit.xml"
    pins = (CHECKOUT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    own = {pin.split("==")[0] for pin in row.others}
    tools = [pin.split("#")[0].strip() for pin in pins if pin.split("==")[0] in TOOLS - own]
    shutil.rmtree(environment, ignore_errors=True)
    junit.unlink(missing_ok=True)
    python = str(environment / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    tests = [str(path.relative_to(CHECKOUT)) for path in core()]
    steps = {
        "making the environment": [find_python(row.python), "-m", "venv", str(environment)],
        "installing pip": [*pip, "pip>=23.2,<27"],
        "installing": [*pip, f"torch=={row.torch}", f"numpy=={row.numpy}", *row.others, *tools, "-e", "."],
        "testing": [
            python,
            "-m",
            "pytest",
            "-q",
            "-n",
            "auto",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
            *tests,
        ],
    }
    try:
        with log.open("w", encoding="utf-8") as file:
            for doing, command in steps.items():
                done = subprocess.run(
                    command,
                    cwd=CHECKOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=HOURS * 3600,
                    check=False,
                )
                if done.returncode != 0 and not junit.exists():
                    return Result(why=f"{doing} ended with status {done.returncode}; see {log}")
    except subprocess.TimeoutExpired:
        return Result(why=f"hung for {HOURS} hours; see {log}")
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    return counted(junit, f"status {done.returncode}; see {log}" if done.returncode not in (0, 1) else "")


def counted(junit: Path, why: str) -> Result:
    """What pytest's own report counts."""
    (suite,) = ElementTree.parse(junit).getroot().iter("testsuite")
    total, failures, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    return Result(total - failures - errors - skipped, failures + errors, skipped, why)


def table(results: dict[Row, Result]) -> str:
    """In Markdown, which reads in a terminal too."""
    lines = [("Python", "torch", "NumPy", "passed", "failed", "skipped")]
    for row, result in results.items():
        oldest = " (oldest of all)" if row.others else ""
        lines.append((row.python, row.torch, f"{row.numpy}{oldest}", *map(str, result[:3])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines]
    text.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(text)


def main() -> int:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description="Run the core tests on the matrix.", allow_abbrev=False)
    pythons = sorted({row.python for row in ROWS}, key=lambda text: int(text.partition(".")[2]))
    parser.add_argument("--only", default=",".join(pythons), help=f"some of {', '.join(pythons)} (default: all)")
    wanted = parser.parse_args().only.split(",")
    if unknown := sorted(set(wanted) - set(pythons)):
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(pythons)}.")
    results, kept = {}, PLACE / "results.json"
    before = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for row in ROWS:
        if row.python in wanted:
            print(f"{row.name}: ", end="", file=sys.stderr, flush=True)
            try:
                result = run(row)
            except ValueError as error:
                result = Result(why=str(error))
            summary = f"{result.passed} passed, {result.failed} failed, {result.skipped} skipped"
            print(result.why or summary, file=sys.stderr, flush=True)
            PLACE.mkdir(exist_ok=True)
            before[row.name] = result
            kept.write_text(json.dumps(before, indent=1), encoding="utf-8")
        if row.name in before:
            results[row] = Result(*before[row.name])
    text = table(results)
    (PLACE / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not all(result.good for row, result in results.items() if row.python in wanted))


if __name__ == "__main__":
    sys.exit(main())
