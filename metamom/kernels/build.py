"""Building kernels.cpp with the machine's own C++ compiler, once for each machine and version."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from metamom.files import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")


class CompilerError(ValueError):
    """There is no C++ compiler, or it or TorchInductor could not build."""


def find_compiler() -> str:
    """The C++ compiler that TorchInductor takes too: ``$CXX``, else clang++ on macOS and g++ elsewhere.

    Raises:
        CompilerError: where there is none.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if (path := shutil.which(name)) is None:
        raise CompilerError(
            f"compiling needs a C++ compiler; there is no {name} on the path. Install one (Debian: apt install g++), "
            "name it in $CXX, or run without compiling."
        )
    return path


@cache
def load() -> None:
    """Build kernels.cpp if this machine has not yet, and load its operators.

    Raises:
        CompilerError: where there is no compiler, or it fails.
    """
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    what = [SOURCE.read_text(encoding="utf-8"), version, torch.__version__, torch.__config__.show(), *_flags()]
    digest = hashlib.sha256("\0".join([*what, _processor()]).encode()).hexdigest()[:24]
    folder = cache_folder()
    path = folder / f"kernels-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # its holder builds; the others wait, then find it built
            if not path.exists():
                _build(compiler, path)
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def _build(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        out = Path(scratch) / path.name
        command = [compiler, str(SOURCE), "-o", str(out), *_flags()]
        # a session of its own: Ctrl-C is for this process to act on, not for the compiler to die of
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode != 0:
            said = gist(done.stderr or done.stdout) or f"it ended with status {done.returncode}"
            raise CompilerError(f"{compiler} cannot build metamom's kernels: {said}")
        os.replace(out, path)


def gist(said: str) -> str:
    """Of what a compiler said, three lines that name an error, or else its first three."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()] or lines
    return "; ".join(line[:300].rstrip(".") for line in errors[:3])


def _flags() -> list[str]:
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    libraries = Path(torch.__file__).with_name("lib")
    flags += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup"]
    return [*flags, "-fopenmp"]


def _processor() -> str:
    """What -march=native stands for here: a cache on a shared disk may be read by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), torch.backends.cpu.get_cpu_capability()
    )
