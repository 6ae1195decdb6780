"""Operators with independent groups along their first axis, so that `torch.func.vmap` only adds groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Grouped(Function):
    """An operator with independent groups along its first axis. Batching over tasks adds groups."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """``apply``, which is not typed in torch."""
        return cls.apply(*args)  # type: ignore[no-untyped-call]

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
            # not a view for autograd, which forbids in-place changes of views that a custom function returns
            own: Tensor = torch.ops.aten._unsafe_view(x, (tasks, x.shape[0] // tasks, *x.shape[1:]))
            return own

        out = cls.run(*(merged(x, dim) for x, dim in zip(args, in_dims, strict=True)))
        return (cut(out), 0) if isinstance(out, Tensor) else (tuple(map(cut, out)), (0,) * len(out))


class OfTwo(Grouped):
    """An operator with derivatives that need both of its arguments."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)
