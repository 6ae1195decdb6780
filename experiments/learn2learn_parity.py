"""Claim: metamom's meta-gradient is learn2learn's accumulated gradient.

    python -m metamom.experiments.learn2learn_parity

The largest absolute difference over all entries, in float64, for an MLP on sinusoids and a Conv4 on images of noise;
first and second order; 1, 3 and 5 inner steps. The tests assert it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from metamom.batch import TaskBatch
from metamom.common import tables
from metamom.experiments.learn2learn_loop import adapted_loss, tasks_of
from metamom.interop.learn2learn import from_maml, import_learn2learn
from metamom.maml.learner import LossFn
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, Sinusoid

MODELS = ("MLP", "Conv4")
STEPS = (1, 3, 5)


class Parity(NamedTuple):
    """One comparison: its largest difference, absolute and relative to the gradient's largest entry."""

    model: str
    steps: int
    first_order: bool
    absolute: float
    relative: float


def problem(name: str) -> tuple[nn.Module, LossFn, TaskBatch]:
    """A model, its loss and four tasks, in float64."""
    generator = torch.Generator().manual_seed(0)
    if name == "MLP":
        return SinusoidMLP(generator=generator).double(), F.mse_loss, Sinusoid(dtype=torch.float64).sample(0, 4)
    images = torch.rand(48, 1, 28, 28, generator=generator, dtype=torch.float64)
    tasks = Episodes(images, torch.arange(48) // 6, ways=3, shots=1, queries=2).sample(0, 4)
    return Conv4(3, hidden=16, generator=generator).double(), F.cross_entropy, tasks.to(dtype=torch.float64)


def parity(name: str, steps: int, first_order: bool, inner_lr: float = 0.05) -> Parity:
    """Compare the two gradients on one problem."""
    model, loss_fn, batch = problem(name)
    learner: Any = import_learn2learn().algorithms.MAML(model, lr=inner_lr, first_order=first_order)
    for task in tasks_of(batch):
        adapted_loss(learner, task, loss_fn, steps).backward()  # type: ignore[no-untyped-call]
    ours = from_maml(learner, loss_fn, inner_steps=steps).meta_gradient(batch).grads
    theirs = {name: p.grad / batch.num_tasks for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs)
    absolute = max(float((ours[name][0] - theirs[name]).abs().max()) for name in theirs)
    return Parity(name, steps, first_order, absolute, absolute / max(float(g.abs().max()) for g in theirs.values()))


def table() -> Iterator[str]:
    """The comparisons as a Markdown table."""
    yield from tables.head("model", "order", *(f"{steps} step{'s' if steps > 1 else ''}" for steps in STEPS))
    for name in MODELS:
        for first_order in (False, True):
            cells = (f"{parity(name, steps, first_order).absolute:.0e}" for steps in STEPS)
            yield tables.row(name, "first" if first_order else "second", *cells)


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        prog="python -m metamom.experiments.learn2learn_parity",
        description="Compare meta-gradients with learn2learn's.",
        allow_abbrev=False,
    ).parse_args()
    for line in table():
        print(line)


if __name__ == "__main__":
    main()
