"""Operators with independent groups along their first axis, so that `torch.func.vmap` only adds groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function


class _Info(NamedTuple):
    """What `Grouped.vmap` is given."""

    batch_size: int


class Grouped(Function):
    """An operator with independent groups along its first axis. Batching over tasks adds groups."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply`` for positional arguments, without most of the Python overhead of torch's own."""
        if not torch._C._are_functorch_transforms_active():
            return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
        transform = retrieve_current_functorch_interpreter()
        if not isinstance(transform, VmapInterpreter):
            return cls.apply(*args)  # type: ignore[no-untyped-call]
        level = transform.level()
        pairs = [functorch._unwrap_batched(x, level) if isinstance(x, Tensor) else (x, None) for x in args]
        values, dims = zip(*pairs, strict=True)
        with transform.lower():
            if all(dim is None for dim in dims):
                return cls.run(*values)
            out, axes = cls.vmap(_Info(transform.batch_size()), dims, *values)
        if isinstance(out, Tensor):
            return functorch._add_batch_dim(out, axes, level)
        return tuple(functorch._add_batch_dim(x, axis, level) for x, axis in zip(out, axes, strict=True))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Merge the tasks' axis into the groups'."""
        tasks = info.batch_size

        def merged(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.unsqueeze(0).expand(tasks, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.reshape(tasks * x.shape[1], *x.shape[2:])

        def cut(x: Tensor) -> Tensor:
            return _viewed(x, (tasks, x.shape[0] // tasks, *x.shape[1:]))

        out = cls.run(*(merged(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return (cut(out), 0) if isinstance(out, Tensor) else (tuple(map(cut, out)), (0,) * len(out))


def not_a_view(x: Tensor) -> Tensor:
    """A result of an operator that PyTorch lets a model change in place, without vmap too."""
    return _viewed(x, x.shape) if x._is_view() else x


def _viewed(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Not a view for autograd, which forbids in-place changes of views that a custom function returns."""
    own: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return own


class OfTwo(Grouped):
    """An operator with derivatives that need both of its arguments."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
