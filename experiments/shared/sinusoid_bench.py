"""Many runs of sinusoid MAML with one learner: how many steps each takes to a target."""

from __future__ import annotations

import math
from typing import Generic, Protocol, TypeVar

import torch
from torch.nn import functional as F

from metamom import nets
from metamom.bias.coordinates import NonFiniteError
from metamom.bias.spec import parse
from metamom.maml.learner import MAML
from metamom.optim import CompositeMomentum
from metamom.tasks import Sinusoid


class BenchSettings(Protocol):
    """What all runs have in common.

    Attributes:
        workers: with an operator; one without.
        inner_lr: alpha, one inner step.
        target: mean squared error after the inner step, on the validation tasks.
        every: steps between validations.
        validation: tasks of a validation.
        compile: whether to compile the learner.
    """

    @property
    def workers(self) -> int: ...
    @property
    def inner_lr(self) -> float: ...
    @property
    def target(self) -> float: ...
    @property
    def every(self) -> int: ...
    @property
    def validation(self) -> int: ...
    @property
    def compile(self) -> bool: ...


S = TypeVar("S", bound=BenchSettings)


class SinusoidBench(Generic[S]):
    """A learner that is reused for all runs with new weights, so that it is compiled only once."""

    def __init__(self, config: S) -> None:
        self.config = config
        self.learner = MAML(nets.SinusoidMLP(), F.mse_loss, inner_lr=config.inner_lr, compile=config.compile)
        self.validation = Sinusoid(seed=1000).with_stream("validation").sample(0, config.validation)

    def start(self, seed: int) -> None:
        """Draw the weights."""
        fresh = nets.SinusoidMLP(generator=torch.Generator().manual_seed(seed))
        self.learner.model.load_state_dict(fresh.state_dict())

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error after one inner step, on the validation tasks."""
        return float(self.learner.losses(self.validation).mean())

    def run(self, tasks: int, operator: str, lr: float, beta: float, seed: int, cap: int) -> float:
        """Train, and return the iterations to the target."""
        self.start(seed)
        family, bias = Sinusoid(seed=seed), parse(operator)
        workers = 1 if operator == "none" else self.config.workers
        optimizer = CompositeMomentum(self.learner.parameters(), lr=lr, beta=beta)
        for step in range(cap):
            optimizer.zero_grad()
            try:
                loss = self.learner.backward(family.sample(step, tasks), workers=workers, bias=bias).loss
            except NonFiniteError:
                return math.inf
            optimizer.step()
            if not math.isfinite(float(loss)):
                return math.inf
            if (step + 1) % self.config.every == 0 and self.error() <= self.config.target:
                return step + 1
        return math.inf
