"""A Markdown extension: ``$x^2$`` in a line, and paragraphs ``$$ ... $$``, from LaTeX to MathML.

Browsers show MathML without a script, so formulas work from the file system, in both colour schemes and for screen
readers.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

# no space within the dollars and no letter or digit after them: prices and $VARIABLES are left alone
INLINE = r"(?<![\\\w$])\$(?![\s$])([^$\n]+(?:\n[^$\n]+)*?)(?<![\s\\])\$(?![\w$])"


def mathml(latex: str, display: str) -> str:
    """The formula as MathML, one line."""
    formula = convert(" ".join(latex.split()), display=display)
    # unless LaTeX asks for it by \left, a norm's lines do not grow, and both of a pair look alike
    return re.sub(r"<mo>(&#x02016;|&#x0007C;|\|)</mo>", r'<mo stretchy="false">\1</mo>', formula)


class Inline(InlineProcessor):
    """A formula within a line."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # noqa: N802 (Markdown's name)
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class Display(BlockProcessor):
    """A formula that is a paragraph."""

    def test(self, parent: ElementTree.Element, block: str) -> bool:
        text = block.strip()
        return text.startswith("$$") and text.endswith("$$") and len(text) > 4

    def run(self, parent: ElementTree.Element, blocks: list[str]) -> None:
        formula = mathml(blocks.pop(0).strip()[2:-2], "block")
        ElementTree.SubElement(parent, "p", {"class": "formula"}).text = self.parser.md.htmlStash.store(formula)


class MathML(Extension):
    """Both kinds of formula."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (Markdown's name)
        md.inlinePatterns.register(Inline(INLINE, md), "mathml", 185)  # after code, before escapes
        md.parser.blockprocessors.register(Display(md.parser), "mathml", 175)  # before lists and quotes


def makeExtension(**settings: object) -> MathML:  # noqa: N802 (Markdown's name)
    """What Markdown calls for the extension's name."""
    return MathML(**settings)
