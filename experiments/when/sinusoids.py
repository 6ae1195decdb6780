"""The map's prediction on sinusoid MAML: the larger the meta-batch, the more momentum gains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from metamom.batch import TaskBatch
from metamom.common import tables
from metamom.experiments.shared.figures import COLOURS, row_of_panels, save
from metamom.experiments.shared.sinusoid_bench import SinusoidBench
from metamom.experiments.shared.tuning import HEAD, Tuned, cells, counted, listed, tune
from metamom.maml.learner import MAML
from metamom.tasks import Sinusoid

TITLE = "Sinusoid MAML"


@dataclass(frozen=True)
class SinusoidSearch:
    """The same gammas for both sides, a factor of two apart; pairs of an operator and the tasks per step."""

    cases: tuple[tuple[str, int], ...] = (
        ("none", 1), ("none", 8), ("none", 64), ("topk:5%", 8), ("topk:5%", 64),
    )  # fmt: skip
    workers: int = 4  # with an operator
    lrs: tuple[float, ...] = tuple(2.0**power for power in range(-8, 2))
    first: float = 2.0**-5
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    inner_lr: float = 0.01
    target: float = 1.0  # target mean squared error after one inner step
    every: int = 20
    cap: int = 2500
    validation: int = 100
    seeds: tuple[int, ...] = (0,)
    again: tuple[int, ...] = (10, 11, 12)
    compile: bool = True


class Problem(NamedTuple):
    """The constants of R, at weights along SGD's trajectory."""

    smoothness: float
    variance: float  # trace of the covariance of one task's meta-gradient

    def room(self, gap: float, tasks: int) -> float:
        """``4 L gap T / trace``: R of a target on the loss, ``gap`` above the minimum."""
        return 4 * self.smoothness * gap * tasks / self.variance


class Bench(SinusoidBench[SinusoidSearch]):
    """The runs of the search, and the constants of R."""

    def gradients(self, batch: TaskBatch, workers: int) -> Tensor:
        """Meta-gradients ``[workers, d]`` of blocks of tasks; not compiled, since there are only a few calls."""
        plain = MAML(self.learner.model, F.mse_loss, inner_lr=self.config.inner_lr)
        grads = plain.meta_gradient(batch, workers=workers).grads.values()
        return torch.cat([g.flatten(1) for g in grads], 1).double()

    def measure(self, tasks: int = 200, iterations: int = 10, h: float = 1e-2) -> Problem:
        """Estimate L by power iteration on meta-gradient differences of many tasks, and the variance over tasks."""
        batch = Sinusoid(seed=2000).sample(0, tasks)
        rows = self.gradients(batch, tasks)
        parameters = list(self.learner.parameters())
        at = torch.nn.utils.parameters_to_vector(parameters).detach().clone()

        def gradient(w: Tensor) -> Tensor:
            torch.nn.utils.vector_to_parameters(w, parameters)
            return self.gradients(batch, 1)[0]

        direction, size = rows.mean(0).float(), 0.0
        for _ in range(iterations):
            direction = direction / direction.norm()
            product = (gradient(at + h * direction) - gradient(at - h * direction)) / (2 * h)
            size, direction = float(product @ direction.double()), product.float()
        torch.nn.utils.vector_to_parameters(at, parameters)
        return Problem(size, float(rows.var(0).sum()))


class Answer(NamedTuple):
    """The text, and the results for each operator and meta-batch."""

    text: str
    found: dict[tuple[str, int], Tuned]


def answer(figures: Path, config: SinusoidSearch = SinusoidSearch()) -> Answer:
    """Search both sides at every meta-batch, draw ``when-sinusoids.png``, and return the text in Markdown."""
    bench = Bench(config)
    found: dict[tuple[str, int], Tuned] = {}
    with tqdm(desc="sinusoids", unit="run", disable=None) as bar:
        for operator, tasks in config.cases:
            bar.set_postfix(operator=operator, tasks=tasks)
            run = counted(partial(bench.run, tasks, operator), bar)
            found[operator, tasks] = tune(
                run,
                config.lrs,
                config.betas,
                first=config.first,
                seeds=config.seeds,
                again=config.again,
                cap=config.cap,
            )
    return Answer(text_of(figures, config, found, _rooms(bench, found, config)), found)


def text_of(figures: Path, config: SinusoidSearch, found: dict[tuple[str, int], Tuned], rooms: dict[int, float]) -> str:
    """The table and the figure of a search, with R for each number of tasks."""
    _draw(figures / "when-sinusoids.png", config, found)
    lines = tables.head("operator", "tasks a step", "R at most", *HEAD)
    for (operator, tasks), tuned in found.items():
        lines.append(tables.row(operator, tasks, f"{rooms[tasks]:.3g}", *cells(tuned)))
    grid = ", ".join(f"{lr:g}" for lr in sorted(config.lrs))
    text = [
        f"Iterations until the error on {config.validation} validation tasks after one inner step is "
        f"{config.target:g}, looked at every {config.every}, at most {config.cap}. Searched for both sides: γ ∈ "
        f"{{{grid}}}, momentum β ∈ {{{', '.join(f'{b:g}' for b in config.betas if b < 1)}}}, v₋₁ = 0, seed "
        f"{listed(config.seeds)}; the best of each again on seeds {listed(config.again)}: median and all of them. R "
        "is estimated at half of SGD's steps of the largest batch, as if noise could take the whole target: an upper "
        "bound.",
        "\n".join(lines),
        "![Steps and speed-up against the meta-batch](figures/when-sinusoids.png)",
    ]
    return "\n\n".join(text)


def _rooms(bench: Bench, found: dict[tuple[str, int], Tuned], config: SinusoidSearch) -> dict[int, float]:
    """R for each meta-batch, at weights halfway along the longest SGD run without an operator that arrived."""
    tasks, side = max(((tasks, at.sgd) for (operator, tasks), at in found.items() if operator == "none"))
    if math.isfinite(side.best.steps):
        bench.run(tasks, "none", side.best.lr, 1.0, config.seeds[0], max(1, int(side.best.steps) // 2))
    problem = bench.measure()
    return {tasks: problem.room(config.target, tasks) for _, tasks in config.cases}


def _draw(path: Path, config: SinusoidSearch, found: dict[tuple[str, int], Tuned]) -> None:
    figure, (steps, ratio) = row_of_panels(2, sharey=False)
    for number, operator in enumerate(dict.fromkeys(operator for operator, _ in config.cases)):
        arrives = {key: at for key, at in found.items() if math.isfinite(at.speedup)}
        both = {tasks: at for (name, tasks), at in arrives.items() if name == operator}
        for dash, name, sides in (
            ("-", "plain meta-SGD", [at.sgd for at in both.values()]),
            ("--", "momentum", [at.momentum for at in both.values()]),
        ):
            colour, marker = COLOURS[number], "os"[name == "momentum"]
            label = f"{name}, {operator}"
            steps.plot(
                list(both), [at.steps for at in sides], dash, color=colour, marker=marker, markersize=4, label=label
            )
            for tasks, side in zip(both, sides, strict=True):
                steps.plot([tasks] * len(side.again), side.again, "_", color=colour, alpha=0.6)
        values = [at.speedup for at in both.values()]
        ratio.plot(list(both), values, "o-", color=COLOURS[number], markersize=4, label=operator)
    ratio.axhline(1, color="0.4", linewidth=0.8)
    every = sorted({tasks for (_, tasks), at in found.items() if math.isfinite(at.speedup)})
    for panel in (steps, ratio):
        panel.set_xscale("log", base=2)
        panel.set_xticks(every, [f"{tasks}" for tasks in every])
        panel.set_xlabel("tasks a step (the more, the less noise)")
        panel.legend(frameon=False, fontsize=8)
    shown = [value for value in (100, 200, 500, 1000, 2000, 5000) if steps.get_ylim()[0] < value < steps.get_ylim()[1]]
    steps.set(yscale="log", ylabel=f"iterations to an error of {config.target:g}", title="both at their best γ and β")
    steps.set_yticks(shown, [f"{value:g}" for value in shown])
    steps.set_yticks([], minor=True)
    ratio.set(ylabel="iterations of SGD / of momentum", title="speed-up", ylim=(0, None))
    save(figure, path)
