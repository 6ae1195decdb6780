"""Methods in place and readings of memory that `torch.func.vmap` does not know, against a plain loop over tasks."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.under_vmap.in_place import change

ALPHA, POINTS, CLASSES = 0.1, 6, 3
INDEX = torch.arange(POINTS * 5).view(POINTS, 5) % POINTS

CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {  # of a square's entries z, by others of the same shape
    "addcdiv_": lambda z, w: z.addcdiv_(w, w + 1, value=0.5),
    "addcmul_": lambda z, w: z.addcmul_(w, w),
    "addmm_": lambda z, w: z.addmm_(w, torch.full((5, 5), 0.2, dtype=z.dtype), beta=0.5),
    "addr_": lambda z, w: z.addr_(w[:, 0], w[0]),
    "clamp_": lambda z, w: z.clamp_(0.3, 0.5),
    "clamp_ by tensors": lambda z, w: z.clamp_(min=w),
    "torch.clamp_": lambda z, w: torch.clamp_(z, max=0.5),
    "clip_": lambda z, w: z.clip_(min=0.4),
    "cumprod_": lambda z, w: z.cumprod_(0),
    "cumsum_": lambda z, w: z.cumsum_(1),
    "fill_diagonal_": lambda z, w: z.fill_diagonal_(0.5),
    "%=": lambda z, w: operator.imod(z, w),
    "**=": lambda z, w: operator.ipow(z, w),
    "fmod_": lambda z, w: z.fmod_(w),
    "gt_": lambda z, w: z.gt_(w.detach()),
    "hypot_": lambda z, w: z.hypot_(w),
    "index_copy_": lambda z, w: z.index_copy_(0, torch.arange(4), w[:4]),
    "ldexp_": lambda z, w: z.ldexp_(w),
    "lerp_": lambda z, w: z.lerp_(w, 0.3),
    "lerp_ by tensors": lambda z, w: z.lerp_(w, w),
    "negative_": lambda z, w: z.negative_(),
    "pow_": lambda z, w: z.pow_(2),
    "remainder_": lambda z, w: z.remainder_(w),
    "scatter_": lambda z, w: z.scatter_(0, INDEX, w),
    "scatter_ of a number": lambda z, w: z.scatter_(0, INDEX[:3], 1.0),
    "square_": lambda z, w: z.square_(),
    "squeeze_": lambda z, w: z.unsqueeze_(1).squeeze_(),
    "squeeze_ of an axis": lambda z, w: z.unsqueeze_(1).squeeze_(1),
    "subtract_": lambda z, w: z.subtract_(w, alpha=2),
    "tril_": lambda z, w: z.tril_(),
    "triu_": lambda z, w: z.triu_(diagonal=-1),
    "xlogy_": lambda z, w: z.xlogy_(w),
    "operator": lambda z, w: torch.ops.aten.clamp_.default(z, 0.3, 0.5),
}
OF_MEMORY = {
    "untyped_storage": lambda z: z.untyped_storage().nbytes(),
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "shared memory": lambda z: z.clone().share_memory_(),
}


class Changed(nn.Module):
    """Scores of points, from features in (0.2, 0.7) that a function sees after they are copied."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.body, self.other, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        z, w = (torch.sigmoid(each(x)) / 2 + 0.2 for each in (self.body, self.other))
        changed = z.clone()
        self.change(changed, w)
        return self.head(changed + z + w)


def batch_of(tasks: int) -> TaskBatch:
    generator = torch.Generator().manual_seed(1)
    x, query_x = torch.randn(2, tasks, POINTS, 4, generator=generator, dtype=torch.float64)
    y, query_y = torch.randint(CLASSES, (2, tasks, POINTS), generator=generator)
    return TaskBatch(x, y, query_x, query_y)


def made(change: Callable[[Tensor, Tensor], object]) -> Changed:
    torch.manual_seed(2)
    return Changed(change).double()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_in_place_run_on_all_tasks_at_once_without_a_warning(change):
    model = made(change)
    for tasks in (1, 3, POINTS):  # as many as points, which an axis could be mistaken for
        batch = batch_of(tasks)
        wanted = meta_gradient_by_copies(model, F.cross_entropy, batch, steps=2, inner_lr=ALPHA)
        learner = MAML(model, F.cross_entropy, inner_lr=ALPHA, inner_steps=2, vectorize="vmap")
        for _ in range(3):  # looking at everything, and then on the fast path
            assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)


LOSSES = {
    "smoothed labels": lambda p, y: (
        -(torch.full_like(p, 0.1).scatter_(1, y[:, None], 0.8) * p.log_softmax(1)).sum(1).mean()
    ),
    "a margin": lambda p, y: (1 - (F.one_hot(y, CLASSES) * 2 - 1) * p).clamp_(min=0).square_().mean(),
    "squeezed": lambda p, y: -p.log_softmax(1).gather(1, y[:, None]).squeeze_().mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_change_their_own_tensors_in_place(loss):
    model = made(lambda z, w: None)
    for tasks in (3, POINTS):
        batch = batch_of(tasks)
        wanted = meta_gradient_by_copies(model, loss, batch, inner_lr=ALPHA)
        learner = MAML(model, loss, inner_lr=ALPHA, vectorize="vmap")
        for _ in range(3):
            assert_close({name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}, wanted)


@pytest.mark.parametrize("read", OF_MEMORY.values(), ids=OF_MEMORY)
def test_memory_is_read_task_by_task(read):
    model, batch = made(lambda z, w: read(w.detach())), batch_of(3)
    learner = MAML(model, F.cross_entropy, inner_lr=ALPHA)
    with pytest.warns(UserWarning, match="Changed itself cannot run on all tasks at once .*task by task"):
        found = learner.meta_gradient(batch).grads
    wanted = meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA)
    assert_close({name: g.squeeze(0) for name, g in found.items()}, wanted)
    with pytest.raises(ValueError, match="cannot run under per-task weights, in Changed itself"):
        MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap").meta_gradient(batch)


def test_dtypes_that_cannot_hold_the_result_are_refused_as_by_pytorch():
    for name, argument in (("clamp", 1.5), ("pow", torch.tensor(0.5)), ("xlogy", torch.tensor(2.0))):
        with pytest.raises(RuntimeError, match="can't be cast to the desired output type") as theirs:
            getattr(torch.tensor([1, 5]), f"{name}_")(argument)
        with pytest.raises(RuntimeError) as ours:
            change(name, torch.tensor([1, 5]), argument)
        assert str(ours.value) == str(theirs.value)
