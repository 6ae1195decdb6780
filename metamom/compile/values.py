"""Refuse to trace code that reads the values of tensors: a graph would keep those of the batch that it is made from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metamom.nets.kernels.build import CompilerError

# These read memory directly, so a trace does not see an operator.
_READERS = frozenset({Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__})
_PRINTING = frozenset({Tensor.__repr__, Tensor.__format__})
_NOT_THE_USERS = ("torch", "metamom", "numpy", "contextlib")  # packages
_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class ValuesReadError(CompilerError):
    """The code to compile reads values of tensors, or has tensors whose shapes depend on values."""


@contextmanager
def reading_refused() -> Iterator[None]:
    """Refuse to read the values of traced tensors. Use this inside `make_fx`.

    Raises:
        ValuesReadError: naming what reads, and where.
    """
    with _Functions(), _Operators():  # type: ignore[no-untyped-call]
        yield


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READERS and _is_traced(args[0]):
            raise _error(f"Tensor.{func.__name__}")
        if func in _PRINTING:
            return f"<traced tensor of shape {list(args[0].shape)}>"
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(tag in func.tags for tag in _BY_VALUE):
            deciding: Any = args
            if func is torch.ops.aten.index.Tensor:  # only a mask decides about the shape
                deciding = [each for each in args[1] if each is not None and each.dtype in (torch.bool, torch.uint8)]
            if any(map(_is_traced, pytree.tree_leaves(deciding))):
                raise _error(str(func.overloadpacket).replace("aten._local_scalar_dense", "Tensor.item"))
        return func(*args, **(kwargs or {}))


def _is_traced(x: object) -> bool:
    """Whether a tensor depends on the arguments of the function that is traced, and not on constants alone."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

    mode = get_proxy_mode()
    found = None if mode is None or not isinstance(x, Tensor) else get_proxy_slot(x, mode.tracer, None)
    if found is None:
        return False
    todo: list[fx.Node] = [found.proxy.node]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        new = [each for each in node.all_input_nodes if each not in seen]
        seen.update(new)
        todo += new
    return False


def _error(what: str) -> ValuesReadError:
    return ValuesReadError(
        f"the model or the loss reads values ({what}{_where()}), and a graph would keep those of the first batch. "
        "Compute with tensors alone (torch.where in place of an if, a product with a mask in place of a selection), or "
        "run without compiling."
    )


def _where() -> str:
    """The innermost line of the user's code, for an error."""
    frame: Any = sys._getframe()
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in _NOT_THE_USERS:
            return f" in {frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        frame = frame.f_back
    return ""
