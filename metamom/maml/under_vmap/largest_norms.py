"""Lookups that shorten long rows of their table first, as ``torch.nn.Embedding(max_norm=...)`` does.

PyTorch shortens them in place, without a derivative. Here a table of a task's own, which inner steps move, is written
to as well: it is a copy, whose value after the call the next inner step starts from. Other tables stay unchanged, and
only what is found is shortened, which gives the same values. In either case the derivative is that of the lookup alone.

Legend: V rows of D entries, L indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.common.code import code_of
from metamom.common.modules import modules_of
from metamom.compile.tracing import is_tracing

OPTION = "max_norm"
SMALL = 1e-7  # added to norms, as PyTorch does

_WRITABLE: ContextVar[frozenset[int]] = ContextVar("writable", default=frozenset())


def shorten_rows(model: nn.Module) -> bool:
    """Whether the model may shorten rows of a table, by what its modules are or by the code that they reach.

    The argument alone is not enough, since `torch.nn.utils.clip_grad_norm_` has one of this name.
    """
    modules = modules_of(model)
    if any(getattr(each, OPTION, None) is not None for each in modules):
        return True
    codes = {code for each in modules for code in code_of(each)}
    return any(map(_names_it, codes)) and any("embedding" in name for code in codes for name in code.co_names)


@contextmanager
def written_to(tables: Iterable[Tensor]) -> Iterator[None]:
    """Let lookups write to these tensors, ``[T, V, D]`` or those of one task."""
    token = _WRITABLE.set(frozenset(_place(table) for table in tables))
    try:
        yield
    finally:
        _WRITABLE.reset(token)


def shortened(input: Tensor, weight: Tensor, found: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """The rows that were looked up, with norms of at most ``max_norm``, and the gradient of ``found``.

    Args:
        input: indices of any shape, ``[...]``.
        weight: the table, ``[V, D]``.
        found: its rows at these indices, ``[..., D]``.
        max_norm: of those rows.
        norm_type: the p of the norm.

    Raises:
        ValueError: in a loop over the tasks that is compiled.
    """
    rows = found.detach()
    norms = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
    rows = torch.where(norms > max_norm, rows * (max_norm / (norms + SMALL)), rows)
    if _place(weight) not in _WRITABLE.get():
        return found + (rows - found.detach())
    with torch.no_grad():
        batched = torch._C._functorch.is_functorch_wrapped_tensor(weight)
        if is_tracing() and not batched:
            raise ValueError(
                "the model shortens rows of a table in place (max_norm=), which a compiled loop over the tasks cannot "
                "do. Run without compiling."
            )
        # a loop's tasks have views of one tensor, which may be written to only past autograd
        table = weight.detach() if batched else weight.data
        index = input.reshape(-1, 1).long().expand(-1, table.shape[1])
        table.copy_(torch.scatter(table, 0, index, rows.reshape(-1, table.shape[1])))
    return F.embedding(input, weight)


def _place(tensor: Tensor) -> int:
    """The memory of a tensor, or of all tasks' tensor that it is a part of."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def _names_it(code: CodeType) -> bool:
    """Whether code gives an argument of this name."""
    return OPTION in code.co_names or any(isinstance(each, tuple) and OPTION in each for each in code.co_consts)
