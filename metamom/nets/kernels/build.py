"""Build kernels.cpp with the local C++ compiler, once for each user, machine and version.

The library is native code. So it is loaded only if it is a regular file that belongs to this user, is not writable by
others, and matches the SHA-256 in its name. Otherwise it is rebuilt. Users who share a folder get separate libraries. A
folder in which every user may replace files is refused, since a file could be replaced between check and load. Members
of the folder's group are trusted.
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
    """There is no C++ compiler, a build failed (in it or in TorchInductor), or its output cannot be stored."""


def find_compiler() -> str:
    """Find the C++ compiler that TorchInductor uses: ``$CXX``, else clang++ on macOS and g++ elsewhere.

    Raises:
        CompilerError: if there is none.
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
    """Build kernels.cpp if necessary, and load its operators.

    Raises:
        CompilerError: if there is no compiler, it fails, or the cache folder is not writable or not trusted.
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
    """The library of this name in the cache folder. It is built if it is missing or not trusted.

    Raises:
        CompilerError: if the compiler fails, or every user can replace the folder's files.
        OSError: if the folder is not writable.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder)
    if (path := _trusted(folder, name)) is None:
        with FileLock(folder / f"{name}.lock"):  # one process builds; the others wait and then use its result
            if (path := _trusted(folder, name)) is None:
                path = _build(compiler, folder, name)
    return path


def _trusted(folder: Path, name: str) -> Path | None:
    """The library of this name that this user has built, if it is intact."""
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
            f"metamom's kernels are native code, and every user can replace files in the cache folder {folder}. "
            f"Remove that permission (chmod o-w {folder}), name another folder in $METAMOM_CACHE, or run without "
            "compiling."
        )


def _user() -> int | None:
    return os.getuid() if hasattr(os, "getuid") else None  # Windows does not have it


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _build(compiler: str, folder: Path, name: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        out = Path(scratch) / f"{name}.so"
        command = [compiler, str(SOURCE), "-o", str(out), *_flags()]
        # a new session, so that Ctrl-C reaches this process but does not kill the compiler
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
        if done.returncode != 0:
            said = gist(done.stderr or done.stdout) or f"it exited with status {done.returncode}"
            raise CompilerError(f"{compiler} cannot build metamom's kernels: {said}")
        out.chmod(0o700)
        for other in folder.glob(f"{name}-*.so"):
            if not other.is_dir() or other.is_symlink():
                other.unlink()
        path = folder / f"{name}-{_sha256(out.read_bytes())}.so"
        os.replace(out, path)
    return path


def gist(said: str) -> str:
    """Three lines of a compiler's output that name an error, or its first three lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower()] or lines
    return "; ".join(line[:300].rstrip(".") for line in errors[:3])


def _flags() -> list[str]:
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # avoid torch.utils.cpp_extension: importing it in a CUDA build of torch prints to stderr if there is no GPU
    include = Path(torch.__file__).with_name("include")
    flags += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = Path(torch.__file__).with_name("lib")
    flags += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    if sys.platform == "darwin":
        return [*flags, "-undefined", "dynamic_lookup"]
    return [*flags, "-fopenmp"]


def _processor() -> str:
    """Identify the processor that -march=native targets, since machines of several kinds may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), torch.backends.cpu.get_cpu_capability()
    )
