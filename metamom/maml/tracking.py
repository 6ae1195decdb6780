"""Inner tracking: average a task's adapted weights over its visits, instead of using one noisy inner step.

Legend: T tasks of a batch, n tasks visited so far, u_i the average of task i, b_u the weight of a new inner step,
S_i and S'_i the inner batches of a visit.

The rules are pure functions. `Memory` stores what they need between visits, and `metamom.maml` combines the two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metamom.maml.estimators import ESTIMATORS, Estimator, tracked_estimators
from metamom.maml.inner_step import straight_through
from metamom.maml.task_weights import Params

TRACKING = 0.2  # default b_u


def moml(u: Tensor, step: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 - b_u) u + b_u step``, which lags behind moving weights.

    Args:
        u: the previous average.
        step: ``w - alpha grad L_S(w)`` at the weights of this visit, shaped as ``u``.
        weight: b_u in (0, 1], a number or a tensor that broadcasts; 1 gives ``step``, bit for bit.

    Example:
        >>> moml(torch.tensor([1.0]), torch.tensor([2.0]), 0.25)
        tensor([1.2500])

    Reference:
        Wang, Yuan, Ying, Yang, "Memory-based optimization methods for model-agnostic meta-learning" (2021), MOML.
    """
    return torch.lerp(u, step, weight)


def scsc(u: Tensor, step: Tensor, step_from_last: Tensor, weight: float | Tensor) -> Tensor:
    """``(1 - b_u) (u + step - step_from_last) + b_u step``, which first moves the average along with the weights.

    Args:
        u: the previous average.
        step: ``w - alpha grad L_S(w)`` at the weights of this visit.
        step_from_last: the same, on the same S, at the weights of the last visit.
        weight: b_u in (0, 1], a number or a tensor that broadcasts; 1 gives ``step``, bit for bit.

    Example:
        >>> scsc(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.5]), 0.5)
        tensor([1.7500])

    Reference:
        Chen, Sun, Yin, "Solving stochastic compositional optimization is nearly as easy as solving stochastic
        optimization" (2021), SCSC.
    """
    return torch.lerp(u + (step - step_from_last), step, weight)


def check_tracking(estimator: Estimator, tracking: float | None, inner_steps: int, learn_inner_lr: object) -> None:
    """Refuse options that a tracked estimator does not support, and b_u for an estimator that is not tracked.

    Raises:
        ValueError: with what to set.
    """
    if ESTIMATORS[estimator].averages is None:
        if tracking is not None:
            raise ValueError(
                f"tracking is the weight of a new inner step in estimators {', '.join(tracked_estimators())}; got "
                f"tracking={tracking!r} with estimator {estimator!r}. Leave it out, or use one of these."
            )
        return
    if tracking is not None and not 0 < tracking <= 1:
        raise ValueError(f"tracking is the weight of a new inner step, 0 < tracking <= 1; got {tracking!r}.")
    if inner_steps != 1:
        raise ValueError(
            f"estimator {estimator!r} averages the results of one inner step; got inner_steps={inner_steps}. Use "
            "inner_steps=1, or estimator 'independent'."
        )
    if learn_inner_lr:
        raise ValueError(
            f"estimator {estimator!r} averages inner steps of a fixed size; got learn_inner_lr={learn_inner_lr!r}. "
            "Leave it out, or use estimator 'independent'."
        )


class Memory(nn.Module):
    """The state of tracked estimators by task id: u_i, and for SCSC the weights at the task's last visit.

    The tensors and task ids are this module's extra state, so they are saved in a learner's ``state_dict`` and in
    checkpoints. On their next use, tensors move to the device and dtype of the weights.

    Args:
        estimator: one of `metamom.maml.estimators.tracked_estimators`.
        tracking: b_u in (0, 1].
        weights: the trainable parameters by name, ``[*shape]``.
        adapted: names of the parameters that the inner step moves.

    Attributes:
        tracking: as given.
        rows: the row of each task in the tensors, by task id.
        tensors: ``"u.NAME"`` for the adapted parameters and, with SCSC, ``"last.NAME"`` for all; ``[n, *shape]``.
    """

    def __init__(
        self, estimator: Estimator, tracking: float, weights: Mapping[str, Tensor], adapted: Collection[str]
    ) -> None:
        super().__init__()
        self.tracking = tracking
        self.rows: dict[int, int] = {}
        self.tensors = {f"u.{name}": weights[name].detach().new_empty(0, *weights[name].shape) for name in adapted}
        if ESTIMATORS[estimator].averages == "scsc":
            self.tensors |= {f"last.{name}": w.detach().new_empty(0, *w.shape) for name, w in weights.items()}

    def reset(self) -> None:
        """Forget all tasks."""
        self.rows = {}
        self.tensors = {key: kept[:0].clone() for key, kept in self.tensors.items()}

    def recall(self, task_ids: Tensor | None, weights: Mapping[str, Tensor]) -> Params:
        """Look up what `tracked` needs for the tasks of a batch: their tensors, ``[T, *shape]``, and ``"weight": [T]``.

        The weight is b_u, except at a task's first visit: there it is 1, and the average is the inner step itself. The
        current weights then take the place of the missing tensors.

        Args:
            task_ids: ``[T]``, from a `metamom.TaskBatch`.
            weights: the trainable parameters by name, ``[*shape]``.

        Raises:
            ValueError: for a batch without ids, or with one twice.
        """
        ids = distinct_ids(task_ids)
        rows = [self.rows.get(i, -1) for i in ids]
        like = next(iter(weights.values()))
        known = torch.tensor([row >= 0 for row in rows], device=like.device)
        at = torch.tensor([max(row, 0) for row in rows], device=like.device)
        weight = [self.tracking if row >= 0 else 1.0 for row in rows]
        found = {"weight": torch.tensor(weight, dtype=like.dtype, device=like.device)}
        for key, kept in self.tensors.items():
            w = weights[key.partition(".")[2]].detach()
            start = w.expand(len(ids), *w.shape)
            if not self.rows:
                found[key] = start.clone()
                continue
            kept = kept.to(w)
            found[key] = torch.where(known.view(-1, *[1] * w.dim()), kept.index_select(0, at), start)
        return found

    def keep(self, task_ids: Tensor | None, averages: Params, weights: Mapping[str, Tensor]) -> None:
        """Store the new averages of a batch's tasks.

        Args:
            task_ids: ``[T]``.
            averages: their new u_i by name, ``[T, *shape]``.
            weights: the weights at this visit by name, ``[*shape]``.
        """
        ids = distinct_ids(task_ids)
        rows, tensors = dict(self.rows), {}
        for i in ids:
            rows.setdefault(i, len(rows))
        for key, kept in self.tensors.items():
            kind, _, name = key.partition(".")
            new = (averages[name] if kind == "u" else weights[name].expand(len(ids), *kept.shape[1:])).detach()
            kept = kept.to(new)
            if len(kept) < len(rows):
                kept = torch.cat([kept, kept.new_zeros(len(rows) - len(kept), *kept.shape[1:])])
            at = torch.tensor([rows[i] for i in ids], device=new.device)
            tensors[key] = kept.index_copy_(0, at, new)
        self.rows, self.tensors = rows, tensors

    def get_extra_state(self) -> dict[str, Any]:
        """``{"ids": [n] int64, "tensors": {key: [n, *shape]}}``."""
        return {"ids": torch.tensor(list(self.rows), dtype=torch.int64), "tensors": dict(self.tensors)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load a copy of a state from `get_extra_state`.

        Raises:
            ValueError: for the memory of another estimator or other weights.
        """
        ids, tensors = state["ids"].tolist(), state["tensors"]
        wanted = {key: (len(ids), *kept.shape[1:]) for key, kept in self.tensors.items()}
        found = {key: tuple(kept.shape) for key, kept in tensors.items()}
        if wanted != found:
            odd = sorted(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
            raise ValueError(
                f"this memory of {len(ids)} tasks belongs to another estimator, or to other adapted weights: "
                f"{', '.join(odd)} should be {[wanted.get(key) for key in odd]}, but is "
                f"{[found.get(key) for key in odd]}. Load it into a learner like the one that saved it."
            )
        self.rows = {i: row for row, i in enumerate(ids)}
        self.tensors = {key: tensors[key].to(kept, copy=True) for key, kept in self.tensors.items()}


def tracked(memory: Params, step: Params, step_from: Callable[[Params], Params]) -> Params:
    """The tasks' new averages, with the derivatives of an inner step from the current weights.

    So the meta-gradient is ``(I - alpha H_i(w; S'_i)) grad L_i(u_i)``. Differentiating the average itself would add a
    factor b_u (which MOML's public code has).

    Args:
        memory: the state of T tasks, from `Memory.recall`.
        step: ``w - alpha grad L_i(w; S_i)`` by name, ``[T, *shape]``, with its derivatives on S'_i.
        step_from: computes the same on the same S_i from other weights, by name, ``[T, *shape]``; only SCSC calls it.

    Returns:
        u_i by name, ``[T, *shape]``.
    """
    u, last = ({key[len(kind) :]: x for key, x in memory.items() if key.startswith(kind)} for kind in ("u.", "last."))
    from_last = step_from(last) if last else None
    averages = {}
    for name, new in step.items():
        weight = memory["weight"].to(new.dtype).view(-1, *[1] * (new.dim() - 1))
        if from_last is None:
            value = moml(u[name], new.detach(), weight)
        else:
            value = scsc(u[name], new.detach(), from_last[name], weight)
        averages[name] = straight_through(value, new)
    return averages


def distinct_ids(task_ids: Tensor | None) -> list[int]:
    """Return the ids of a batch's tasks, ``[T]``, as a list.

    Raises:
        ValueError: for a batch without ids, or with one twice.
    """
    if task_ids is None:
        raise ValueError(
            f"estimators {', '.join(tracked_estimators())} remember each task by its id; got a batch without "
            "task_ids. Use a fixed set of tasks: metamom.tasks.FixedTasks(sampler, n) (--fixed-tasks N)."
        )
    ids: list[int] = task_ids.tolist()
    if len(set(ids)) != len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(
            "an estimator that remembers tasks needs each of them at most once in a batch; got task_ids "
            f"with {twice} twice."
        )
    return ids
