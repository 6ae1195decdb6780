"""Each notebook below docs/ becomes a Markdown page, with the outputs that are stored in it.

The pages then look like all others (highlighting, light and dark, search) and need no scripts from elsewhere, and the
build needs no Jupyter. `notebooks/NAME.md` in the nav is `docs/notebooks/NAME.ipynb`; the notebook itself is copied to
the site, and each page links to it.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

NO_DESCRIPTION = "Figure of the cell above"


class Page(NamedTuple):
    """A notebook as Markdown, and its pictures by file name."""

    markdown: str
    pictures: dict[str, bytes]


def as_page(notebook: dict[str, Any], name: str) -> Page:
    """Convert a notebook in format 4.

    Args:
        notebook: its JSON.
        name: of the file, ``NAME.ipynb``; pictures become ``NAME-1.png`` and so on. Their text alternative is the
            entry ``"alt"`` in the metadata of their cell.

    Raises:
        ValueError: for an output that is an error, or of a kind that has no place on a page.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        if cell["cell_type"] != "code":
            continue
        parts.append(_fenced(source, "python"))
        for output in _joined(cell["outputs"]):
            if "image/png" in output.get("data", {}):
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(output["data"]["image/png"]))
                parts.append(f"![{cell['metadata'].get('alt', NO_DESCRIPTION)}]({picture})")
            else:
                parts.append(_fenced(_text(output, name), 'text title="Output"'))
    title, _, rest = parts[0].partition("\n")
    download = f"[Download this notebook]({name}.ipynb)"
    return Page("\n\n".join([title, download, rest.strip(), *parts[1:]]) + "\n", pictures)


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs, with pieces of text that were printed one after another as one."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            joined[-1] = {**output, "text": [*joined[-1]["text"], *output["text"]]}
        else:
            joined.append(output)
    return joined


def _fenced(text: str, info: str) -> str:
    return f"```{info}\n{text.rstrip()}\n```"


def _text(output: dict[str, Any], name: str) -> str:
    """What a cell printed, or its value as text."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    if "text/plain" in output.get("data", {}):
        return "".join(output["data"]["text/plain"])
    raise ValueError(
        f"pages need outputs that are text or PNG; {name}.ipynb has {output['output_type']!r}. Run the notebook again "
        f"without errors."
    )
