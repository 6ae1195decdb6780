"""A Griffe extension: docstrings as they stand in the code, made ready for Markdown.

Examples become code, names in backticks become links to their entries, and ``docs/theory/x.md, "Title"`` a link to the
section.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from pymdownx.slugs import slugify

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
slug = slugify(case="lower")


def entries() -> dict[str, str]:
    """The identifiers of the reference, by themselves and by their last name."""
    names = {}
    for page in sorted(REFERENCE.glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            names[name] = names[name.rpartition(".")[2]] = name
    return names


ENTRIES = entries()


def as_markdown(text: str) -> str:
    """The docstring for the page, where every entry is in docs/reference."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(
        r'docs/([\w/-]+)\.md(?:,\s+(?:"([^"]+)"|((?:Theorem|Proposition) \w+)))?',
        lambda m: f"[{(m[2] or m[3] or 'docs/' + m[1]).strip()}](../{m[1]}.md{anchor(m[2] or m[3])})",
        text,
    )
    return re.sub(r"(?<![`\w\[])`([A-Za-z][\w.]*)`(?![`\w\]])", link, text)


def anchor(title: str | None) -> str:
    """The anchor of a heading; bold titles and propositions have none."""
    return f"#{slug(title, '-')}" if title and f"\n{title}\n" in HEADINGS else ""


def link(m: re.Match[str]) -> str:
    """A name in backticks, linked if it has an entry."""
    found = ENTRIES.get(m[1]) or ENTRIES.get(f"metamom.{m[1]}")
    return f"[`{m[1]}`][{found}]" if found else m[0]


HEADINGS = "\n".join(
    f"\n{title}\n"
    for page in (REFERENCE.parent).rglob("*.md")
    for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
)


class Docstrings(griffe.Extension):
    """Changes every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
