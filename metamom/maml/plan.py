"""How meta-gradients are computed: the settings, and what follows from them for a batch.

Legend: T tasks, J inner steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch
from metamom.common.identity import by_identity
from metamom.common.modules import behaviour_of, modules_of
from metamom.maml.checks.batch_checks import check_batch
from metamom.maml.checks.hooks import global_hooks
from metamom.maml.chunking import ChunkSize
from metamom.maml.estimators import Adaptations, InnerBatches, check_support, cut
from metamom.maml.problem import Problem
from metamom.maml.task_weights import Params
from metamom.maml.tracking import Memory, distinct_ids


class Plan(NamedTuple):
    """How meta-gradients are computed.

    Attributes:
        owner: the module that holds model and loss; a compiled graph is tied to the modules in it.
        problem: the model, loss and settings of the adaptation.
        inner_steps: J.
        inner_batches: the same for all inner steps, or fresh ones.
        memory: the moving averages of a tracked estimator.
        chunk_size: the number of tasks at a time.
    """

    owner: nn.Module
    problem: Problem
    inner_steps: int
    inner_batches: InnerBatches
    memory: Memory | None
    chunk_size: ChunkSize

    def cut(self, batch: TaskBatch) -> list[Adaptations]:
        """The adaptations to differentiate, with the weights of their query losses."""
        batch = self.problem.rule.adapted_on(batch)
        return cut(batch, self.problem.estimator, self.inner_steps, self.inner_batches)

    def kind(self) -> tuple[Hashable, ...]:
        """What the memory of a task depends on, apart from shapes. The run is another object for other modules."""
        problem = self.problem
        adaptation = self.inner_steps, self.inner_batches, problem.estimator, problem.objective is None
        settings = *adaptation, problem.autocast, problem.norm, problem.inner_optimizer
        looped = problem.vectorization.vectorize, frozenset(problem.vectorization.looped)
        return *settings, *looped, problem.run, by_identity(problem.loss_fn), problem.model.training

    def built_in(self) -> tuple[Hashable, ...]:
        """The objects that a compiled meta-gradient depends on, apart from shapes.

        Modules, hooks, buffers and frozen parameters are compared by identity: the values of their tensors may change.
        A module's own numbers (a dropout rate) and plain tensors are not included.
        """
        problem = self.problem
        modules = modules_of(self.owner)
        device = next(p.device.type for module in modules for p in module._parameters.values() if p is not None)
        around = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        fixed: list[Hashable] = [by_identity(problem.loss_fn), around, *problem.step_sizes.fixed.values()]
        for module in modules:
            fixed += behaviour_of(module)
            fixed += module._buffers.values()
            fixed += [p for p in module._parameters.values() if p is not None and not p.requires_grad]
        vectorization = problem.vectorization
        fixed += [vectorization.vectorize, frozenset(vectorization.looped), global_hooks(), problem.norm]
        fixed.append(problem.objective is None)
        adaptation = self.inner_steps, problem.estimator, self.inner_batches, problem.inner_optimizer, problem.adapted
        return *adaptation, problem.autocast, *fixed

    def check(self, batch: TaskBatch) -> None:
        """Refuse a batch that the estimator cannot take.

        Raises:
            ValueError: saying what is wrong.
        """
        check_batch(batch)
        adapted_on, rule = self.problem.rule.adapted_on(batch), self.problem.rule
        check_support(adapted_on, self.problem.estimator, self.inner_steps, self.inner_batches)
        if rule.check is not None:
            rule.check(batch)
        if self.memory is not None:
            distinct_ids(batch.task_ids)

    def recall(self, batch: TaskBatch) -> Params:
        """The stored averages of the batch's tasks; empty for an estimator that is not tracked."""
        return {} if self.memory is None else self.memory.recall(batch.task_ids, self._trainable())

    def remember(self, task_ids: Tensor | None, averages: Sequence[Tensor], *results: Tensor) -> None:
        """Update the tasks' averages, unless a result is not finite."""
        if self.memory is not None and all(bool(x.isfinite().all()) for x in (*averages, *results)):
            self.memory.keep(task_ids, dict(zip(self.problem.adapted, averages, strict=True)), self._trainable())

    def _trainable(self) -> Params:
        return self.problem.parameters()
