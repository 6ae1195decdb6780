"""What a process has imported."""

from __future__ import annotations

import sys
from pathlib import Path


def write_modules(path: Path) -> None:
    """Their names, a line each."""
    path.write_text("\n".join(sys.modules))
