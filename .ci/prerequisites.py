"""Checks what `make setup` needs of a machine, and says what is missing and how to get it."""

import os
import shutil
import sys
import sysconfig


def missing():
    """One line for each thing that is not there."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python is what this looks for)
        yield f"Python >= 3.10 (this is {sys.version.split()[0]}): name another with make setup PYTHON=python3.11"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        yield f"Python's headers (no {header}): on Debian or Ubuntu, apt install python3-dev"
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        yield "Python's venv with pip: on Debian or Ubuntu, apt install python3-venv"
    for names, what in ((("cc", "gcc", "clang"), "C"), (("c++", "g++", "clang++"), "C++")):
        if not any(map(shutil.which, names)):
            yield f"a {what} compiler (none of {', '.join(names)}): on Debian or Ubuntu, apt install build-essential"


if __name__ == "__main__":
    lines = list(missing())
    if lines:
        sys.exit("make setup needs:\n" + "\n".join(f"  - {line}" for line in lines))
