"""Patches, and normalisation with ReLU, each with first and second derivatives, in the fastest available code.

Inside `native`, the operators of kernels.cpp run on a CPU (float32 and float64). Otherwise reference.py is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from metamom.nets.kernels import convolutions, normalisations, reference
from metamom.nets.kernels.build import load

__all__ = [
    "activate",
    "are_native",
    "convolve",
    "convolve_to_images",
    "convolve_to_kernels",
    "fold",
    "native",
    "norm",
    "norm_backward",
    "norm_double_backward",
    "norm_relu",
    "norm_relu_backward",
    "norm_relu_double_backward",
    "pool",
    "unfold",
]

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
    "convolve(Tensor x, Tensor weight, Tensor? bias, int[] geometry) -> Tensor",
    "convolve_to_images(Tensor c, Tensor weight, int[] geometry, int H, int W) -> Tensor",
    "convolve_to_kernels(Tensor x, Tensor c, int[] geometry, int kh, int kw) -> Tensor",
    "norm(Tensor y, Tensor gain, Tensor shift, float eps) -> (Tensor, Tensor, Tensor)",
    "activate(Tensor y, Tensor gain, Tensor shift, Tensor mean, Tensor rstd, Tensor before, float slope) -> Tensor",
    "pool(Tensor y, Tensor gain, Tensor shift, Tensor mean, Tensor rstd, Tensor before, float slope, int[] windows,"
    " bool ceil_mode) -> (Tensor, Tensor)",
    "norm_backward(Tensor dz, Tensor y, Tensor gain, Tensor mean, Tensor rstd, Tensor? z, Tensor? places, float slope)"
    " -> (Tensor, Tensor, Tensor)",
    "norm_double_backward(Tensor v, Tensor a, Tensor s, Tensor dz, Tensor y, Tensor gain, Tensor mean, Tensor rstd,"
    " Tensor? z, Tensor? places, float slope) -> (Tensor, Tensor, Tensor)",
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


def are_native(x: Tensor) -> bool:
    """Whether operators on this tensor are the compiled ones."""
    return _wanted.get() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _by_device(plain: Callable[P, R]) -> Callable[P, R]:
    """Dispatch an operator: to the compiled one inside `native` if there is one, else to plain PyTorch."""

    @wraps(plain)
    def operator(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        home = torch.ops.metamom if are_native(first) else sys.modules[plain.__module__]
        out: R = getattr(home, plain.__name__)(*args, **kwargs)
        return out

    return operator


unfold = _by_device(reference.unfold)
fold = _by_device(reference.fold)
norm_relu = _by_device(reference.norm_relu)
norm_relu_backward = _by_device(reference.norm_relu_backward)
norm_relu_double_backward = _by_device(reference.norm_relu_double_backward)
convolve = _by_device(convolutions.convolve)
convolve_to_images = _by_device(convolutions.convolve_to_images)
convolve_to_kernels = _by_device(convolutions.convolve_to_kernels)
norm = _by_device(normalisations.norm)
activate = _by_device(normalisations.activate)
pool = _by_device(normalisations.pool)
norm_backward = _by_device(normalisations.norm_backward)
norm_double_backward = _by_device(normalisations.norm_double_backward)

# PyTorch's convolutions are called from Python; as operators of our own they stay whole in a compiled graph.
for _plain in (convolutions.convolve, convolutions.convolve_to_images, convolutions.convolve_to_kernels):
    _library.impl(_plain.__name__, _plain, "CPU")


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


def _convolve_shape(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    size = convolutions.Geometry.of(geometry).size(x.shape[2:4], weight.shape[3:])
    return x.new_empty(*x.shape[:2], *size, weight.shape[1])


def _images_shape(c: Tensor, weight: Tensor, geometry: list[int], H: int, W: int) -> Tensor:
    return c.new_empty(*c.shape[:2], H, W, weight.shape[2] * geometry[-1])


def _kernels_shape(x: Tensor, c: Tensor, geometry: list[int], kh: int, kw: int) -> Tensor:
    return x.new_empty(x.shape[0], c.shape[4], x.shape[4] // geometry[-1], kh, kw)


def _norm_shapes(y: Tensor, gain: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(gain.shape), y.new_empty(gain.shape)


def _activate_shape(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _pool_shapes(*given: Any) -> tuple[Tensor, Tensor]:
    return normalisations.pool(*given)  # PyTorch knows them


def _norm_backward_shapes(dz: Tensor, y: Tensor, gain: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_shapes(y, gain)


def _norm_double_backward_shapes(
    v: Tensor, a: Tensor, s: Tensor, dz: Tensor, y: Tensor, gain: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(dz.shape), y.new_empty(y.shape), y.new_empty(gain.shape)


def _of_channels(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[2])


_FAKES: Mapping[str, Callable[..., Any]] = {
    "unfold": _unfold_shape,
    "fold": _fold_shape,
    "norm_relu": _norm_relu_shapes,
    "norm_relu_backward": _norm_relu_backward_shapes,
    "norm_relu_double_backward": _norm_relu_double_backward_shapes,
    "convolve": _convolve_shape,
    "convolve_to_images": _images_shape,
    "convolve_to_kernels": _kernels_shape,
    "norm": _norm_shapes,
    "activate": _activate_shape,
    "pool": _pool_shapes,
    "norm_backward": _norm_backward_shapes,
    "norm_double_backward": _norm_double_backward_shapes,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"metamom::{_name}", _fake, lib=_library)
