"""The picture of the rooms of the library, and of the data that flows through them, as SVG.

It is part of its page and takes its colours from the page, so it suits both colour schemes.
"""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT = 720, 545
STYLE = (
    "font-family:var(--md-text-font,sans-serif);fill:var(--md-default-fg-color,#222);"
    "stroke:none;font-size:15px;text-anchor:middle"
)
BOX = "fill:var(--md-code-bg-color,#f5f5f5);stroke:var(--md-default-fg-color--light,#888);stroke-width:1.2"
LINE = "fill:none;stroke:var(--md-typeset-a-color,#4051b5);stroke-width:1.8"
SMALL = "font-size:13px;fill:var(--md-default-fg-color--light,#555)"

#       x, y, name, what it holds
BOXES = [
    (5, 20, "tasks/", "families and data sets"),
    (265, 20, "maml/", "meta-gradient per worker"),
    (525, 20, "nets/, compile/", "networks and kernels"),
    (265, 150, "bias/", "operators, feedback"),
    (265, 280, "server/", "gradients into one"),
    (525, 280, "distributed/", "processes, messages"),
    (5, 280, "optim/", "the momentum step"),
    (5, 400, "training/", "loop, directory, resume"),
    (265, 400, "evaluation/", "accuracy, baselines"),
    (525, 400, "diagnostics/, theory/", "bias, bounds"),
]
BOX_WIDTH, BOX_HEIGHT = 190, 56
#         from,     to,       what flows, where its label stands
ARROWS = [
    ((195, 48), (265, 48), "TaskBatch", (230, 38)),
    ((360, 76), (360, 150), "one gradient per worker", (445, 118)),
    ((360, 206), (360, 280), "C(g) of each worker", (435, 248)),
    ((265, 308), (195, 308), "gradient", (230, 298)),
    ((130, 280), (290, 76), "new weights", (160, 180)),
    ((525, 48), (455, 48), "model", (490, 38)),
    ((525, 308), (455, 308), "messages", (490, 298)),
]


def picture() -> str:
    """The SVG, without blank lines (Markdown ends a block of HTML at one)."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="rooms-title" style="{STYLE}" class="rooms">',
        '<title id="rooms-title">Tasks go to maml, whose gradients go through bias to server and optim, which gives '
        "maml new weights. training runs this loop; experiments and the command stand above all.</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" style="fill:var(--md-typeset-a-color,#4051b5)"/></marker></defs>',
    ]
    for x, y, name, text in BOXES:
        parts.append(f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" style="{BOX}"/>')
        parts.append(f'<text x="{x + BOX_WIDTH / 2:g}" y="{y + 24}" font-weight="600">{escape(name)}</text>')
        parts.append(f'<text x="{x + BOX_WIDTH / 2:g}" y="{y + 44}" style="{SMALL}">{escape(text)}</text>')
    for (x1, y1), (x2, y2), text, (x, y) in ARROWS:
        parts.append(f'<path d="M{x1} {y1}L{x2} {y2}" style="{LINE}" marker-end="url(#tip)"/>')
        if text:
            parts.append(f'<text x="{x}" y="{y}" style="{SMALL}">{escape(text)}</text>')
    parts.append(f'<rect x="5" y="480" width="710" height="52" rx="6" style="{BOX}"/>')
    parts.append('<text x="360" y="502" font-weight="600">experiments/, then cli/</text>')
    parts.append(
        f'<text x="360" y="521" style="{SMALL}">recipes, comparisons, reports; the command. They import all of the '
        "above, never the reverse</text>"
    )
    parts.append("</svg>")
    return "\n".join(parts)
