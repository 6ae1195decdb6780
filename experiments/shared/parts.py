"""A report in parts that are run one at a time: each part is stored, and the report joins all stored parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from metamom.common.files import write_atomically


def keep_part(run_dir: Path, name: str, text: str) -> None:
    """Store a part's Markdown in ``parts/NAME.md``."""
    (run_dir / "parts").mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "parts" / f"{name}.md", text.encode())


def assembled(run_dir: Path, heading: str, titles: Mapping[str, str]) -> Path:
    """Write ``report.md`` from the stored parts, in the order of their titles; an empty title is not shown."""
    sections = [f"# {heading}"]
    for name, title in titles.items():
        path = run_dir / "parts" / f"{name}.md"
        if path.exists():
            sections += [f"## {title}"] * bool(title) + [path.read_text(encoding="utf-8").strip()]
    write_atomically(run_dir / "report.md", ("\n\n".join(sections) + "\n").encode())
    return run_dir / "report.md"
