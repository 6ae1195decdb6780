"""The map's prediction on the paper's MNIST: no noise, so momentum wins, compressed or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from metamom.bias.coordinates import NonFiniteError
from metamom.bias.spec import parse
from metamom.common import tables
from metamom.experiments.paper.protocol import protocol
from metamom.experiments.paper.training import Training
from metamom.experiments.shared.figures import COLOURS, row_of_panels, save
from metamom.experiments.shared.numerals import distinguishable, shortest
from metamom.experiments.shared.tuning import HEAD, Tuned, cells, counted, listed, tune
from metamom.tasks.images import LabelledImages

TITLE = "Compressed MNIST"


@dataclass(frozen=True)
class CompressedMnist:
    """Full gradients of some of the paper's 100 nodes; a step is an epoch."""

    nodes: int = 20  # the first nodes, with 600 images each, in a fifth of the time
    operators: tuple[str, ...] = ("none", "topk:33500:all")
    lrs: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0)
    first: float = 0.5
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    target: float = 0.9  # target test accuracy
    epochs: int = 60
    seed: int = 0


class Bench:
    """The paper's model and data, loaded once."""

    def __init__(self, config: CompressedMnist, root: Path | None = None) -> None:
        self.config, self.kind = config, protocol("mnist")
        self.train, self.test = self.kind.data("train", root), self.kind.data("test", root)

    def full(self, operator: str, lr: float, beta: float, seed: int, cap: int) -> float:
        """Train as in the paper until the target; return the epochs (one update each), infinite beyond the cap."""
        images = len(self.train.labels) // 100 * self.config.nodes
        training = Training(
            self.kind, LabelledImages(*(part[:images] for part in self.train)), self.test, nodes=self.config.nodes,
            lr=lr, beta=beta, bias=parse(operator), seed=seed,
        )  # fmt: skip
        for epoch in range(cap):
            try:
                row = training.epoch()
            except NonFiniteError:
                return math.inf
            if not math.isfinite(row.train_loss):
                return math.inf
            if row.test_acc >= self.config.target:
                return epoch + 1
        return math.inf


class Answer(NamedTuple):
    """The text, and the results for each operator."""

    text: str
    full: dict[str, Tuned]


def answer(figures: Path, config: CompressedMnist = CompressedMnist()) -> Answer:
    """Search both sides for every operator, draw ``when-mnist.png``, and return the text in Markdown."""
    bench = Bench(config)
    full: dict[str, Tuned] = {}
    with tqdm(desc="mnist, full gradients", unit="run", disable=None) as bar:
        for operator in config.operators:
            full[operator] = tune(
                counted(partial(bench.full, operator), bar), config.lrs, config.betas, first=config.first,
                seeds=(config.seed,), again=(), cap=config.epochs, patience=1.0, tries=1,
            )  # fmt: skip
    return Answer(text_of(figures, config, full), full)


def text_of(figures: Path, config: CompressedMnist, full: dict[str, Tuned]) -> str:
    """The tables and the figure of a search."""
    _draw(figures / "when-mnist.png", config, full)
    text = [
        f"Steps to {config.target:.0%} test accuracy. Searched for both sides: γ ∈ {{{listed(sorted(config.lrs))}}}, "
        f"momentum β ∈ {{{listed([b for b in config.betas if b < 1])}}}, v₀ = g₀, seed {config.seed}, at most "
        f"{config.epochs} steps. The first {config.nodes} "
        f"of the paper's 100 nodes, full gradients:",
        "\n".join([*tables.head("operator", *HEAD), *(tables.row(name, *cells(at)) for name, at in full.items())]),
        "![Steps of every cell](figures/when-mnist.png)",
    ]
    return "\n\n".join(text)


def _draw(path: Path, config: CompressedMnist, full: dict[str, Tuned]) -> None:
    figure, panels = row_of_panels(len(full), sharey=False)
    for panel, (operator, tuned) in zip(panels, full.items(), strict=True):
        for number, beta in enumerate(config.betas):
            reached = sorted((c.lr, c.steps) for c in tuned.cells if c.beta == beta and math.isfinite(c.steps))
            label = "plain meta-SGD (β = 1)" if beta == 1 else f"momentum, β = {shortest(beta)}"
            x, y = [lr for lr, _ in reached], [steps for _, steps in reached]
            panel.plot(x, y, "os^"[number] + "-", color=COLOURS[number], markersize=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(config.lrs), distinguishable(sorted(config.lrs)))
        panel.set(
            xlabel="γ", title=f"{config.nodes} nodes' full gradients, {operator.removesuffix(':all')}", ylim=(0, None)
        )
    panels[0].set_ylabel(f"steps to {config.target:.0%} test accuracy")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)
