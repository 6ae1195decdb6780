"""Patches, and normalisation with ReLU, each with its first and second derivative, by the fastest code at hand.

Inside `native` the operators of kernels.cpp run on a CPU (float32 and float64); everywhere else reference.py does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from metamom.kernels import reference
from metamom.kernels.build import load

__all__ = ["fold", "native", "norm_relu", "norm_relu_backward", "norm_relu_double_backward", "unfold"]

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
    """Use the compiled operators inside, if ``device`` is a CPU; they are built at the first use.

    Raises:
        metamom.kernels.build.CompilerError: where there is no C++ compiler, or it cannot build them.
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


def _compiled(first: Tensor) -> bool:
    return _wanted.get() and first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64)


Three = tuple[Tensor, Tensor, Tensor]


def _run(name: str, first: Tensor, *rest: Any) -> Any:
    """The operator of this name: compiled where `native` asks for it and has it, in plain PyTorch elsewhere."""
    return getattr(torch.ops.metamom if _compiled(first) else reference, name)(first, *rest)


def unfold(images: Tensor) -> Tensor:
    """`reference.unfold`."""
    out: Tensor = _run("unfold", images)
    return out


def fold(patches: Tensor, H: int, W: int) -> Tensor:
    """`reference.fold`."""
    out: Tensor = _run("fold", patches, H, W)
    return out


def norm_relu(y: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Three:
    """`reference.norm_relu`."""
    out: Three = _run("norm_relu", y, gain, shift, eps)
    return out


def norm_relu_backward(dz: Tensor, y: Tensor, gain: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Three:
    """`reference.norm_relu_backward`."""
    out: Three = _run("norm_relu_backward", dz, y, gain, z, mean, rstd)
    return out


def norm_relu_double_backward(
    v: Tensor,
    a: Tensor,
    s: Tensor,
    dz: Tensor,
    y: Tensor,
    gain: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Three:
    """`reference.norm_relu_double_backward`."""
    out: Three = _run("norm_relu_double_backward", v, a, s, dz, y, gain, z, mean, rstd)
    return out


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
