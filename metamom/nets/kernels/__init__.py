"""Patches, and normalisation with ReLU, each with first and second derivatives, in the fastest available code.

Inside `native`, the operators of kernels.cpp run on a CPU (float32 and float64). Otherwise reference.py is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from metamom.nets.kernels import reference
from metamom.nets.kernels.build import load

__all__ = ["fold", "native", "norm_relu", "norm_relu_backward", "norm_relu_double_backward", "unfold"]

P = ParamSpec("P")
R = TypeVar("R")

_wanted: ContextVar[bool] = ContextVar("metamom_native_kernels", default=False)

_SCHEMAS = (
    "unfold(Tensor images) -> Tensor",
    "fold(Tensor patches, SymInt H, SymInt W) -> Tensor",
    "norm_relu(Tensor y, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)",
    "norm_relu_backward(Tensor dz, Tensor y, Tensor gain, Tensor z, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    "norm_relu_double_backward(Tensor v, Tensor a, Tensor s, Tensor dz, Tensor y, Tensor gain, Tensor z, Tensor mean,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
)
_library: Any = torch.library.Library("metamom", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _library.define(_schema)


@contextmanager
def native(device: torch.device) -> Iterator[None]:
    """Use the compiled operators in this context if ``device`` is a CPU. They are built on first use.

    Raises:
        metamom.nets.kernels.build.CompilerError: if there is no C++ compiler, or it cannot build them.
    """
    if device.type != "cpu":
        yield
        return
    load()
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def _by_device(plain: Callable[P, R]) -> Callable[P, R]:
    """Dispatch an operator: to the compiled one inside `native` if there is one, else to plain PyTorch."""

    @wraps(plain)
    def operator(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        compiled = _wanted.get() and first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64)
        out: R = getattr(torch.ops.metamom if compiled else reference, plain.__name__)(*args, **kwargs)
        return out

    return operator


unfold = _by_device(reference.unfold)
fold = _by_device(reference.fold)
norm_relu = _by_device(reference.norm_relu)
norm_relu_backward = _by_device(reference.norm_relu_backward)
norm_relu_double_backward = _by_device(reference.norm_relu_double_backward)


def _unfold_shape(images: Tensor) -> Tensor:
    B, H, W, C = images.shape
    return images.new_empty(B, (H + 1) // 2, (W + 1) // 2, 9 * C)


def _fold_shape(patches: Tensor, H: int, W: int) -> Tensor:
    return patches.new_empty(patches.shape[0], H, W, patches.shape[3] // 9)


def _norm_relu_shapes(y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), _of_channels(y), _of_channels(y)


def _norm_relu_backward_shapes(dz: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), _of_channels(y), _of_channels(y)


def _norm_relu_double_backward_shapes(
    v: Tensor, a: Tensor, s: Tensor, dz: Tensor, y: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), _of_channels(y)


def _of_channels(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[2])


_FAKES: Mapping[str, Callable[..., Any]] = {
    "unfold": _unfold_shape,
    "fold": _fold_shape,
    "norm_relu": _norm_relu_shapes,
    "norm_relu_backward": _norm_relu_backward_shapes,
    "norm_relu_double_backward": _norm_relu_double_backward_shapes,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"metamom::{_name}", _fake, lib=_library)
