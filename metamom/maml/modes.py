"""Autograd modes of the caller's thread that a meta-gradient has to leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from metamom.batch import TaskBatch


@contextmanager
def out_of_inference() -> Iterator[None]:
    """Leave `torch.inference_mode`, in which nothing can be differentiated. The caller still gets no graph."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def differentiable(x: Tensor) -> Tensor:
    """Convert a tensor that was made in inference mode into one that autograd accepts."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def differentiable_batch(batch: TaskBatch) -> TaskBatch:
    """Apply `differentiable` to a batch's tensors."""
    if not isinstance(batch, TaskBatch) or not any(isinstance(x, Tensor) and x.is_inference() for x in batch):
        return batch
    return TaskBatch._make(None if x is None else differentiable(x) for x in batch)
