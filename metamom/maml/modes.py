"""Autograd modes of the caller's thread that a meta-gradient has to leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.common.trees import Tree, leaves, mapped


@contextmanager
def out_of_inference() -> Iterator[None]:
    """Leave `torch.inference_mode`, in which nothing can be differentiated. The caller still gets no graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def differentiable(x: Tree) -> Tree:
    """Convert tensors that were made in inference mode into tensors that autograd accepts."""
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x
    return mapped(differentiable, x) if _in_inference(x) else x


def differentiable_batch(batch: TaskBatch) -> TaskBatch:
    """Apply `differentiable` to a batch's tensors."""
    if not isinstance(batch, TaskBatch) or not any(x is not None and _in_inference(x) for x in batch):
        return batch
    return TaskBatch._make(differentiable(x) for x in batch)


def _in_inference(x: Tree) -> bool:
    if isinstance(x, Tensor):
        return x.is_inference()
    return any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves(x))
