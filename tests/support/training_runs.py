"""Runs of the training loop of every kind, and samplers that stop them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim import lr_scheduler as schedulers

from metamom import (
    MAML,
    CompositeMomentum,
    LambdaBeta,
    TaskSampler,
    TopK,
    train,
)
from metamom.bias import parse
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

PATIENCE = 120  # seconds until a process that should have done something has hung


TASKS = Sinusoid(shots=5, queries=5, seed=1)


class Parts(NamedTuple):
    """What one run is made of, besides the arguments in `options`."""

    learner: MAML
    optimizer: torch.optim.Optimizer
    schedulers: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012  (read only)


def learner(hidden: int = 8, **options: Any) -> MAML:
    return MAML(SinusoidMLP((hidden,), generator=torch.Generator().manual_seed(0)), F.mse_loss, **options)


def momentum(**options: Any) -> Parts:
    made = learner()
    return Parts(made, CompositeMomentum(made.parameters(), **{"lr": 0.02, "beta": 0.3, **options}))


def adam() -> Parts:
    made = learner()
    return Parts(made, Adam(made.parameters(), lr=0.01))


def scheduled() -> Parts:
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.5)
    both = schedulers.StepLR(optimizer, 3, 0.7), LambdaBeta(optimizer, lambda k: 1 / (1 + k))
    return Parts(made, optimizer, both)


def on_plateaus() -> Parts:
    """The step size halves at each validation but the first, since none gains as much as it would have to."""
    made = momentum()
    plateau = schedulers.ReduceLROnPlateau(made.optimizer, factor=0.5, patience=0, threshold=0.9)
    options = {"validation": TASKS, "evaluate_every": 4, "evaluate_tasks": 4}
    return made._replace(schedulers=(schedulers.LinearLR(made.optimizer, 0.2, total_iters=4), plateau), options=options)


def of_torch(name: str, **options: Any) -> Callable[[], Parts]:
    """With one of torch's other optimizers."""

    def make() -> Parts:
        made = learner()
        return Parts(made, getattr(torch.optim, name)(made.parameters(), lr=0.01, **options))

    return make


def learned_step_sizes() -> Parts:
    made = learner(inner_steps=2, learn_inner_lr=True)
    return Parts(made, CompositeMomentum(made.parameters(), lr=0.02))


def with_dropout() -> Parts:
    state = torch.get_rng_state()
    torch.manual_seed(5)
    made = MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)), F.mse_loss)
    torch.set_rng_state(state)
    return Parts(made, CompositeMomentum(made.parameters(), lr=0.02))


def compressed() -> Parts:
    return momentum()._replace(options={"workers": 4, "bias": TopK(ratio=0.2)})


def fed_back(spec: str, beta: float) -> Callable[[], Parts]:
    """With an operator that carries something from step to step."""
    return lambda: momentum(beta=beta)._replace(options={"workers": 4, "bias": parse(spec)})


KINDS: dict[str, Callable[[], Parts]] = {
    "from zero": momentum,
    "from the first gradient": lambda: momentum(first_step="gradient"),
    "Adam": adam,
    "schedulers": scheduled,
    "plateaus": on_plateaus,
    "clipped": lambda: momentum()._replace(options={"clip_grad": 0.5, "workers": 2}),
    "AdamW": of_torch("AdamW"),
    "NAdam": of_torch("NAdam", weight_decay=0.1, decoupled_weight_decay=True),
    "Adafactor": of_torch("Adafactor"),
    "ASGD": of_torch("ASGD"),
    "learned inner lr": learned_step_sizes,
    "dropout": with_dropout,
    "workers and TopK": compressed,
    "RandK": fed_back("randk:20%:seed=3", 0.3),
    "EF14": fed_back("ef14:topk:5%", 0.3),
    "federated": lambda: momentum()._replace(
        options={
            "workers": 4,
            "bias": parse("ef21:topk:5%"),
            "participation": 0.5,
            "worker_weights": (1, 2, 3, 4),
            "local_steps": 2,
            "down_bias": "randk:20%",
        }
    ),
    "EF21-SGDM": fed_back("ef21-sgdm(0.2):clip:1+randk:50%", 1.0),
}


def go(parts: Parts, run_dir: Path | None = None, *, iterations: int = 12, tasks: Any = TASKS, **options: Any) -> Any:
    options = {"meta_batch": 8, "checkpoint_every": 4, **parts.options, **options}
    if run_dir is None:
        del options["checkpoint_every"]
    return train(
        parts.learner,
        parts.optimizer,
        tasks,
        iterations=iterations,
        schedulers=parts.schedulers,
        run_dir=run_dir,
        **options,
    )


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class AtStep(TaskSampler):
    """A sampler that does something when a step's tasks are asked for."""

    def __init__(self, step: int, action: Callable[[Any], Any]) -> None:
        self.step, self.action = step, action

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        batch = TASKS.sample(step, num_tasks, rank=rank, world_size=world_size)
        return self.action(batch) or batch if step == self.step else batch

    def describe(self) -> dict[str, Any]:
        return TASKS.describe()


class CrashError(Exception):
    """What no code catches."""


def crash(batch: Any) -> None:
    raise CrashError


def spoil(batch: Any) -> Any:
    return batch._replace(query_y=batch.query_y + 8)
