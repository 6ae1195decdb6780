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

DOCS = Path(__file__).resolve().parents[2] / "docs"
slug = slugify(case="lower")

# the identifiers of the reference, by themselves and by their last name
ENTRIES = {
    key: name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for key in (name, name.rpartition(".")[2])
}
# the headings of every page, its title first
HEADINGS = {
    page.relative_to(DOCS).as_posix(): re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for page in DOCS.rglob("*.md")
}


def as_markdown(text: str) -> str:
    """The docstring for the page, where every entry is in docs/reference."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r'docs/([\w/-]+\.md)(?:,\s+(?:"([^"]+)"|(Theorem \w+)))?', link_to_page, text)
    return re.sub(r"(?<![`\w\[])`([A-Za-z][\w.]*)`(?![`\w\]])", link_to_entry, text)


def link_to_page(m: re.Match[str]) -> str:
    """A link to a section of a page, or to the page if the section is a paragraph or none is named."""
    section = " ".join((m[2] or m[3] or "").split())
    anchor = f"#{slug(section, '-')}" if section in HEADINGS[m[1]] else ""
    return f"[{section or HEADINGS[m[1]][0]}](../{m[1]}{anchor})"


def link_to_entry(m: re.Match[str]) -> str:
    """A name in backticks, linked if it has an entry."""
    found = ENTRIES.get(m[1]) or ENTRIES.get(f"metamom.{m[1]}")
    return f"[`{m[1]}`][{found}]" if found else m[0]


class Docstrings(griffe.Extension):
    """Changes every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
