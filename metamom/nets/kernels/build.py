"""Building kernels.cpp with the machine's own C++ compiler, once for each user, machine and version.

The library is native code, so it is loaded only if it is a regular file that belongs to this user, that nobody else may
write to, and whose contents have the SHA-256 in its name. Otherwise it is built again. Users who share a folder have a
library each. A folder in which every user may replace files is refused: somebody could do so between the check and the
loading. The members of the folder's group are trusted not to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from metamom.common.files import cache_folder
from metamom.common.reading import read_regular_file

MAX_LIBRARY = 64 << 20  # bytes
SOURCE = Path(__file__).with_name("kernels.cpp")


class CompilerError(ValueError):
    """There is no C++ compiler, or it or TorchInductor could not build, or there is no place for what it builds."""


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
        CompilerError: where there is no compiler, or it fails, or the cache folder can't be written or trusted.
    """
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    what = [SOURCE.read_text(encoding="utf-8"), version, torch.__version__, torch.__config__.show(), *_flags()]
    digest = _sha256("\0".join([*what, _processor(), str(_user())]).encode())
    try:
        torch.ops.load_library(str(_library(compiler, f"kernels-{digest}")))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise CompilerError(
            f"cannot keep metamom's kernels in {cache_folder()} or load them from there: {error.__cause__ or error}. "
            "Name another folder in $METAMOM_CACHE, or run without compiling."
        ) from error


def _library(compiler: str, name: str) -> Path:
    """The library of this name from the cache folder; it is built if it isn't there or can't be trusted.

    Raises:
        CompilerError: where the compiler fails, or every user can replace the folder's files.
        OSError: where the folder can't be written.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder)
    if (path := _trusted(folder, name)) is None:
        with FileLock(folder / f"{name}.lock"):  # its holder builds; the others wait, then find it built
            if (path := _trusted(folder, name)) is None:
                path = _build(compiler, folder, name)
    return path


def _trusted(folder: Path, name: str) -> Path | None:
    """The library of this name that this user has built, if it is whole."""
    for path in folder.glob(f"{name}-*.so"):
        found = path.lstat()
        private = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) == 0
        if not (stat.S_ISREG(found.st_mode) and _user() in (None, found.st_uid) and private):
            continue
        if path.stem == f"{name}-{_sha256(read_regular_file(path, MAX_LIBRARY))}":
            return path
    return None


def _check_folder(folder: Path) -> None:
    found = folder.stat()
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX and _user() is not None:
        raise CompilerError(
            f"metamom's kernels are native code, and every user can replace files in the cache folder {folder}. Forbid "
            f"it (chmod o-w {folder}), name another folder in $METAMOM_CACHE, or run without compiling."
        )


def _user() -> int | None:
    return os.getuid() if hasattr(os, "getuid") else None  # Windows has none


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _build(compiler: str, folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / f"{name}.so"
        command = [compiler, str(SOURCE), "-o", str(out), *_flags()]
        # a session of its own: Ctrl-C is for this process to act on, not for the compiler to die of
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode != 0:
            said = gist(done.stderr or done.stdout) or f"it ended with status {done.returncode}"
            raise CompilerError(f"{compiler} cannot build metamom's kernels: {said}")
        out.chmod(0o700)
        for other in folder.glob(f"{name}-*.so"):
            if not other.is_dir() or other.is_symlink():
                other.unlink()
        path = folder / f"{name}-{_sha256(out.read_bytes())}.so"
        os.replace(out, path)
    return path


def gist(said: str) -> str:
    """Of what a compiler said, three lines that name an error, or else its first three."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()] or lines
    return "; ".join(line[:300].rstrip(".") for line in errors[:3])


def _flags() -> list[str]:
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # not from torch.utils.cpp_extension: a CUDA build of torch says on stderr, at its import, that there is no GPU
    include = Path(torch.__file__).with_name("include")
    flags += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
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
