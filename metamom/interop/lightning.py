"""Train a learner with Lightning. Importing this module imports Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from metamom.batch import Sampler, TaskBatch, check_sampler, drawn, of_stream
from metamom.bias import Bias, as_operator
from metamom.common.checks import check_whole
from metamom.common.intervals import normal_halfwidth, standard_error
from metamom.interop.imports import import_lightning
from metamom.interop.meta_batches import MetaBatches, place
from metamom.judging import judged
from metamom.maml.learner import MAML

lightning = import_lightning()


class _TestTasks(IterableDataset[TaskBatch]):
    """The tasks that `metamom.evaluate` would draw, in blocks of at most ``block``, dealt to the processes."""

    def __init__(self, sampler: Sampler, tasks: int, block: int) -> None:
        check_sampler(sampler, "validation needs a sampler, which")
        self.sampler = of_stream(sampler, "validation")
        self.tasks = check_whole("validation_tasks", tasks, 2)
        self.block = check_whole("validation_block", block, 1)

    def __iter__(self) -> Iterator[TaskBatch]:
        rank, size = place()
        if self.tasks % size:
            raise ValueError(f"validation_tasks={self.tasks} must be a multiple of the {size} processes.")
        own = self.tasks // size
        parts = next(n for n in range(-(-own // self.block), own + 1) if own % n == 0)
        for part in range(parts):
            yield drawn(self.sampler, 0, self.tasks, rank * parts + part, size * parts)


class MetaModule(lightning.LightningModule):  # type: ignore[misc, name-defined]  # Lightning is not always installed
    """A learner, its tasks and its optimizer as a ``LightningModule``.

    ``Trainer.fit`` trains with `metamom.MAML.training_loss`, so that devices, loggers, callbacks, gradient clipping and
    accumulation, checkpoints and the DDP strategy are Lightning's. A checkpoint holds the number of the next step, and
    a resumed run (``ckpt_path=``) draws the tasks that an uninterrupted one would. With several processes, each step's
    meta-batch is dealt to them, and the result is that of one process, to rounding. The trainer's limits on batches
    (``limit_train_batches``) apply as usual.

    It logs ``train_loss`` in each step, and after each validation ``val_loss`` or ``val_accuracy`` with the half-width
    of its 95 % interval over tasks, ``val_loss_halfwidth`` or ``val_accuracy_halfwidth``.

    Args:
        learner: the learner.
        sampler: the tasks of training; ``None`` if the trainer gets loaders of `metamom.TaskBatch`.
        optimizer: makes the optimizer from the learner's parameters:
            ``lambda p: CompositeMomentum(p, lr=0.1, beta=0.1)``. It may return what Lightning's
            ``configure_optimizers`` may, such as a dict with a ``"lr_scheduler"``.
        meta_batch: tasks a step, over all processes.
        epoch: meta-batches in one of Lightning's epochs; a multiple of ``accumulate_grad_batches``, since Lightning
            makes a step at the end of an epoch with what it has.
        validation: the tasks of validation, if any: those of `metamom.evaluate` with ``stream="validation"``.
        validation_tasks: the number of tasks in a validation, a multiple of the number of processes.
        validation_block: the most of these to draw and evaluate at a time.
        bias: as of `metamom.MAML.backward`, for training in one process. Its state is part of checkpoints. With several
            processes, compress what they send each other with `metamom.interop.ddp`.
        **options: of `metamom.MAML.training_loss`: ``workers``, ``aggregate``, ``check_finite``.

    Raises:
        TypeError: for anything but a learner or a sampler.
        ValueError: for a number out of range.

    Example:
        >>> module = MetaModule(learner, Sinusoid(), lambda p: CompositeMomentum(p, lr=0.1))  # doctest: +SKIP
        >>> lightning.Trainer(max_steps=1000).fit(module)  # doctest: +SKIP
    """

    def __init__(
        self,
        learner: MAML,
        sampler: Sampler | None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer | dict[str, Any]],
        *,
        meta_batch: int = 16,
        epoch: int = 1000,
        validation: Sampler | None = None,
        validation_tasks: int = 100,
        validation_block: int = 20,
        bias: Bias = None,
        **options: Any,
    ) -> None:
        if not isinstance(learner, MAML):
            raise TypeError(f"MetaModule needs a learner, MAML(model, loss_fn, ...); got {learner!r:.60}.")
        if not callable(optimizer) or isinstance(optimizer, Optimizer):
            raise TypeError(
                "MetaModule needs a function that makes the optimizer from the parameters, such as "
                f"lambda p: CompositeMomentum(p, lr=0.1); got {optimizer!r:.60}."
            )
        super().__init__()
        self.learner = learner
        self.steps_drawn = 0
        self._make_optimizer, self._operator, self._options = optimizer, as_operator(bias), options
        self._tasks = None if sampler is None else self._batches(sampler, meta_batch, epoch)
        self._validation: _TestTasks | None = None
        if validation is not None:
            self._validation = _TestTasks(validation, validation_tasks, validation_block)
        self._judged: list[Tensor] = []
        self._metric = "loss"

    def _batches(self, sampler: Sampler, meta_batch: int, epoch: int) -> MetaBatches:
        return MetaBatches(sampler, meta_batch=meta_batch, steps=epoch, start=lambda: self.steps_drawn)

    def forward(self, batch: TaskBatch) -> Tensor:
        """`metamom.MAML.training_loss`."""
        loss: Tensor = self.learner.training_loss(batch, bias=self._operator, **self._options)
        return loss

    def setup(self, stage: str) -> None:
        """Refuse an operator where there are several processes: each would compress before Lightning averages.

        Raises:
            ValueError: for one.
        """
        if self._operator is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"bias={self._operator.spec} acts within one process, and there are {self.trainer.world_size}. Leave "
                "it out, and register it on the wrapped model: metamom.interop.ddp.register."
            )

    def configure_optimizers(self) -> Any:
        """What the function makes of the learner's parameters."""
        return self._make_optimizer(self.learner.parameters())

    def train_dataloader(self) -> Any:
        """The tasks of training from the next step on."""
        return () if self._tasks is None else DataLoader(self._tasks, batch_size=None)

    def val_dataloader(self) -> Any:
        """The tasks of validation, the same each time."""
        return () if self._validation is None else DataLoader(self._validation, batch_size=None)

    def training_step(self, batch: TaskBatch, batch_idx: int) -> Tensor:
        """One meta-batch."""
        loss: Tensor = self(batch)
        self.steps_drawn += 1
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=batch.num_tasks)
        return loss

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        """Adapt to each task, and keep its loss or accuracy."""
        learner = self.learner
        first = sum(map(len, self._judged))
        [(_, [values], right)] = judged([learner], batch, (learner.inner_steps,), first, None)
        self._metric = "accuracy" if right else "loss"
        self._judged.append(values)

    def on_validation_epoch_end(self) -> None:
        """Log the mean and its interval over the tasks of all processes."""
        own, self._judged = torch.cat(self._judged), []
        values = self.all_gather(own).flatten().double()
        halfwidth = normal_halfwidth(float(standard_error(values)))
        self.log(f"val_{self._metric}", float(values.mean()), prog_bar=True, rank_zero_only=False)
        self.log(f"val_{self._metric}_halfwidth", halfwidth)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the number of the next step, and the operator's state."""
        state = {} if self._operator is None else self._operator.state_dict()
        checkpoint["metamom"] = {"steps_drawn": self.steps_drawn, "bias": state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load them."""
        saved = checkpoint["metamom"]
        self.steps_drawn = saved["steps_drawn"]
        if self._operator is not None:
            self._operator.load_state_dict(saved["bias"])
