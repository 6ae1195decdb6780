"""Training all weights on each task: from given weights, or from random ones.

Legend: S support points, Q query points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from metamom.baselines.per_task import PerTask, frozen_copy
from metamom.common.checks import check_number, check_whole
from metamom.common.choices import Norm
from metamom.common.kinds import named_type
from metamom.common.summaries import summary
from metamom.common.trees import Tree, leaves, mapped
from metamom.distributed import digest
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.fitting import copied
from metamom.maml.options import check_option
from metamom.maml.running.run_by_task import call

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": SGD, "adam": Adam}


class FineTuning(PerTask):
    """Train all weights of a copy of the model on each task's support set, by ``steps`` steps on the whole set.

    Args:
        model: maps ``[N, ...]`` to predictions ``[N, ...]``; copied, in ``eval()`` (no dropout).
        loss_fn: ``(predictions, targets) -> loss``.
        lr: the step size, > 0.
        optimizer: ``"sgd"``, ``"adam"``, or a function ``(parameters, lr=...) -> optimizer``.
        norm: what batch normalisation uses: ``"batch"``, the current set (support or queries); ``"frozen"``, running
            statistics; by default what the model's mode says.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom import evaluate
        >>> from metamom.tasks import Sinusoid
        >>> tuned = FineTuning(nn.Linear(1, 1), F.mse_loss, lr=0.01)
        >>> evaluate(tuned, Sinusoid(), tasks=4, steps=(0, 5)).metric
        'loss'
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        lr: float = 0.01,
        optimizer: str | Callable[..., Optimizer] = "adam",
        norm: Norm | None = None,
    ) -> None:
        check_option("loss_fn", loss_fn)
        check_number("lr", lr)
        if not lr > 0:
            raise ValueError(f"lr is the step size and must be > 0; got {lr}.")
        if not (optimizer in OPTIMIZERS if isinstance(optimizer, str) else callable(optimizer)):
            raise ValueError(f"optimizer must be {', '.join(OPTIMIZERS)}, or a function; got {optimizer!r:.40}.")
        self.model = frozen_copy(model, norm)
        self.loss_fn = loss_fn
        self.lr = lr
        self.optimizer = optimizer
        self.norm = norm

    def __repr__(self) -> str:
        values = {"lr": self.lr, "optimizer": self.optimizer}
        return summary(type(self).__name__, values, type(self.model).__name__)

    def parameters(self) -> Iterator[Tensor]:
        """Those of the model."""
        return self.model.parameters()

    def adapt_task(self, support_x: Tree, support_y: Tree, steps: int) -> nn.Module:
        """The trained model."""
        check_whole("steps", steps, 0)
        with torch.inference_mode(False), torch.enable_grad():
            x, y = (mapped(Tensor.clone, each) for each in (support_x, support_y))
            model = self.start(x)
            weights = [p for p in model.parameters() if p.requires_grad]
            optimizer = self._optimizer(weights)
            for _ in range(steps):
                predicted = call(model, x)
                loss = self.loss_fn(predicted) if y is None else self.loss_fn(predicted, y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return model

    def predict_task(self, state: nn.Module, x: Tree) -> Any:
        """Predictions ``[Q, ...]``."""
        with torch.no_grad():
            return call(state, x)

    def start(self, support_x: Tree) -> nn.Module:
        """A model with the weights that a task starts from."""
        return copied(self.model)

    def _optimizer(self, weights: Iterable[Tensor]) -> Optimizer:
        make = OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        return make(weights, lr=self.lr)


class FromScratch(FineTuning):
    """Train a new model on each task, from random weights: what pre-training has to beat.

    A task's initial weights depend on ``seed`` and on its support set, so not on which tasks are computed together.

    Args:
        make: returns a new model; it may draw its weights from torch's generator, which is seeded for each task and
            restored afterwards.
        loss_fn: as of `FineTuning`.
        lr: as of `FineTuning`.
        optimizer: as of `FineTuning`.
        norm: as of `FineTuning`.
        seed: of the weights.
        device: of the models; where ``make`` creates them by default.
        dtype: the same.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        loss_fn: LossFn,
        *,
        lr: float = 0.01,
        optimizer: str | Callable[..., Optimizer] = "adam",
        norm: Norm | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(make, nn.Module) or not callable(make):
            raise TypeError(f"make must be a function that returns a new model; got {named_type(make)}.")
        self.make = make
        self.seed = check_whole("seed", seed, 0)
        self._place = device, dtype
        super().__init__(self._made("the first"), loss_fn, lr=lr, optimizer=optimizer, norm=norm)

    def start(self, support_x: Tree) -> nn.Module:
        """A new model for this task."""
        return frozen_copy(self._made(digest(leaves(support_x))), self.norm)

    def _made(self, place: str) -> nn.Module:
        with _seeded(f"{self.seed} {place}"):
            made: object = self.make()
        if not isinstance(made, nn.Module):
            raise TypeError(f"make must return a model, a torch.nn.Module; it returned {named_type(made)}.")
        device, dtype = self._place
        made = made if device is None else made.to(device)
        return made if dtype is None else made.to(dtype)


@contextmanager
def _seeded(place: str) -> Iterator[None]:
    """Seed torch's generator of the CPU by name, and restore it afterwards."""
    before = torch.get_rng_state()
    number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:7], "little")
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before)
