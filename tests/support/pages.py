"""The pages of the documentation, and the blocks and commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
SHELLS = ("bash", "sh", "shell", "console")
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A code block of a page, and the line that it begins at."""

    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}-line{self.line}"


class Command(NamedTuple):
    """A command of a page's shell blocks, as words."""

    page: Path
    line: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}-line{self.line}"


def blocks(*languages: str) -> Iterator[Block]:
    """The pages' code blocks in these languages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for m in BLOCK.finditer(text):
            if m[1] in languages:
                yield Block(page, text.count("\n", 0, m.start()) + 2, m[2])


def commands() -> Iterator[Command]:
    """Every command in the pages' shell blocks, without the variables set for it; not what it prints."""
    for page, first, block in blocks(*SHELLS):
        is_session = any(line.startswith("$ ") for line in block.splitlines())
        lines = iter(enumerate(block.splitlines(), first))
        for number, line in lines:
            if is_session and not line.startswith("$ "):
                continue
            while line.endswith("\\"):
                line = line[:-1] + next(lines)[1]
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # METAMOM_DATA=... metamom ...
                words = words[1:]
            if words:
                yield Command(page, number, words)
