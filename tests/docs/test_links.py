"""Links lead somewhere: between pages, from the code to the pages, and from the navigation to every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import BLOCK, PAGES, README, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MADE_BY_THE_BUILD = re.compile(r"(\.\./)?command-line/[\w-]+\.md")  # .ci/docs/commands.py
FILES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / ".github" / "SECURITY.md"]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings: lower case, hyphens for spaces, no other punctuation."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", FILES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files(page):
    broken = []
    for target in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or MADE_BY_THE_BUILD.fullmatch(path):
            continue
        file = (page.parent / path).resolve() if path else page
        if not (file.exists() or file.with_suffix(".ipynb").exists()) or (
            anchor and file.suffix == ".md" and not anchor.startswith("metamom.") and anchor not in anchors(file)
        ):
            broken.append(target)
    assert broken == []


def test_the_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert len(listed) == len(set(listed))
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page != README}
    assert pages - set(listed) == set()
    missing = {name for name in set(listed) - pages if not name.startswith("command-line/")}
    assert {name for name in missing if not (ROOT / "docs" / name).with_suffix(".ipynb").exists()} == set()


def test_references_in_the_code_name_what_is_there():
    """``docs/theory/x.md, "X"`` is a heading of that page, or a bold title of a paragraph."""
    named = {
        (page, " ".join((quoted or theorem).split()))
        for folder in ("metamom", "tasks", "experiments", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != Path(__file__)
        for page, quoted, theorem in re.findall(
            r'\b(docs/[\w/-]+\.md)(?:,\s+"([^"]+)"|,\s+(Theorem \w+))?', path.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 20
    missing = [
        (page, title)
        for page, title in sorted(named)
        if not (ROOT / page).exists()
        or not re.search(
            rf"^(#+ |\*\*){re.escape(title)}" if title else "", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE
        )
    ]
    assert missing == []
