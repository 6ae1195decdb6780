"""Methods that change a tensor in place and that `torch.func.vmap` does not batch: new tensors, copied into it.

vmap would run them task by task, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

_NAMES = (
    "addcdiv", "addcmul", "addmm", "addr", "clamp", "clip", "cumprod", "cumsum", "fix", "fmod", "heaviside", "hypot",
    "index_copy", "ldexp", "lerp", "negative", "pow", "remainder", "scatter", "square", "subtract", "tril", "triu",
    "xlogy", "eq", "ge", "greater", "greater_equal", "gt", "le", "less", "less_equal", "lt", "ne", "not_equal",
)  # fmt: skip
_OPERATORS = {"__ipow__": "pow", "__imod__": "remainder"}


def change(name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Change a tensor in place by the method of this name, which returns a new tensor.

    Example:
        >>> x = torch.tensor([1.0, 5.0])
        >>> change("clamp", x, max=2.0) is x, x
        (True, tensor([1., 2.]))
    """
    made: Tensor = getattr(tensor.clone(), name)(*args, **kwargs)  # of a copy, since derivatives may need it
    if not torch.can_cast(made.dtype, tensor.dtype):
        return getattr(tensor, f"{name}_")(*args, **kwargs)  # type: ignore[no-any-return]  # raises torch's own error
    return tensor.copy_(made)


def fill_diagonal(tensor: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """`torch.Tensor.fill_diagonal_`."""
    if tensor.dim() != 2 or wrap:
        return tensor.fill_diagonal_(fill_value, wrap)
    tensor.diagonal().fill_(fill_value)
    return tensor


def squeeze(tensor: Tensor, *dim: Any, **kwargs: Any) -> Tensor:
    """`torch.Tensor.squeeze_`, which fails under vmap if it gets no axis."""
    if dim or kwargs or not torch._C._functorch.is_batchedtensor(tensor):
        return tensor.squeeze_(*dim, **kwargs)
    for axis in reversed(range(tensor.dim())):
        tensor.squeeze_(axis)  # leaves those of other lengths
    return tensor


def _methods(name: str) -> Iterator[Callable[..., Any]]:
    """All versions of a function that models may call: a tensor's, torch's, and the operator (in exported models)."""
    operator = getattr(torch.ops.aten, name, None)
    if operator is not None:
        yield from (operator, *(getattr(operator, kind) for kind in operator.overloads()))
    yield from (getattr(home, name) for home in (torch, torch.Tensor) if hasattr(home, name))


IN_PLACE: dict[Callable[..., Any], Callable[..., Tensor]] = {
    **{method: partial(change, name) for name in _NAMES for method in _methods(f"{name}_")},
    **{getattr(torch.Tensor, operator): partial(change, name) for operator, name in _OPERATORS.items()},
    **dict.fromkeys(_methods("fill_diagonal_"), fill_diagonal),
    **dict.fromkeys(_methods("squeeze_"), squeeze),
}
