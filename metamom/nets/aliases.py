"""Reshaped tensors that share memory in PyTorch's layout but not in metamom's, or vice versa.

metamom's images lie in memory as ``[N, H, W, C]``, and what vmap makes of some layers is not contiguous. There,
``flatten``, ``view`` and the like must copy what they could leave in place in PyTorch's layout, so a change in place of
the result does not reach the images. Where they could share what PyTorch would copy, they copy too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from metamom.nets.channels_last import on_any_layout

VIEWS = ("view", "view_as")


def _named(*names: str) -> Iterator[Callable[..., Any]]:
    """The functions of these names: torch's, a tensor's, and the operators, which exported models call."""
    for name in names:
        yield from (getattr(home, name) for home in (torch, torch.Tensor) if hasattr(home, name))
        packet = getattr(torch.ops.aten, name)
        yield from (packet, *(getattr(packet, overload) for overload in packet.overloads()))


RESHAPING = frozenset(_named(*VIEWS, "reshape", "reshape_as", "flatten", "ravel", "contiguous"))


class _Alias(NamedTuple):
    """The memory that a tensor was reshaped from and a copy of it, each with its version when the copy was made."""

    source: TensorWeakRef
    source_version: int
    copy: TensorWeakRef
    version: int


class _Layout(NamedTuple):
    """Memory of metamom's images, ``[N, H, W, C]``."""

    channels: int
    places: int  # H times W

    def shares(self, contiguous: bool, source: Tensor, found: Tensor) -> bool:
        """Whether ``found`` shares memory with ``source`` in PyTorch's layout, where images lie as ``[N, C, H, W]``."""
        return _shares(contiguous, tuple(source.shape), tuple(map(self._stride, source.stride())), tuple(found.shape))

    def _stride(self, stride: int) -> int:
        """In PyTorch's layout."""
        if stride >= self.channels * self.places:
            return stride
        return stride // self.channels if stride >= self.channels else stride * self.places


@lru_cache(1024)
def _shares(contiguous: bool, shape: tuple[int, ...], strides: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape and these strides is contiguous, or can be viewed in another shape."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        twin = torch.empty_strided(shape, strides, device="meta")
        if contiguous:
            return twin.is_contiguous()
        try:
            twin.view(wanted)
        except RuntimeError:
            return False
        return True


class Aliases:
    """The reshaped images of one call of a model."""

    def __init__(self) -> None:
        self._laid_out: Any = WeakIdKeyDictionary()  # memory of metamom's images
        self._made: list[_Alias] = []
        self._stale: Any = WeakIdKeyDictionary()  # memory that lacks a change in place of its alias
        self._any_stale = False

    def made(self, found: Any, args: Sequence[Any] | None = None) -> None:
        """Note images that metamom's operators make or, given its ``args``, a function that keeps their layout."""
        if not isinstance(found, Tensor) or not is_permuted(found):
            return  # most results, and quickly
        if args is None or any(isinstance(x, Tensor) and _root(x) in self._laid_out for x in args):
            self._laid_out.setdefault(_root(found), _Layout(found.shape[1], math.prod(found.shape[2:])))

    def reshaped(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call one of `RESHAPING`. It shares memory only where it does in PyTorch's layout."""
        source = args[0] if args else None
        if not isinstance(source, Tensor):
            return cast(Tensor, on_any_layout(func, args, kwargs))
        before = _root(source)
        layout: _Layout | None = self._laid_out.get(before)
        if layout is None and _is_dense(source):
            return cast(Tensor, on_any_layout(func, args, kwargs))
        shape = _shape_of_view(func, args, kwargs)
        found: Tensor = on_any_layout(func, args, kwargs) if shape is None else source.reshape(shape)
        after = _root(found)
        wanted = None if layout is None else layout.shares(_name(func) == "contiguous", source, found)
        if before is after:
            return found.clone() if wanted is False else found
        if wanted is not False and not source.is_inference():
            self.copied(source, found)
        return found

    def copied(self, source: Tensor, copy: Tensor) -> None:
        """Note a copy that shares memory with its source in a loop."""
        before, after = _root(source), _root(copy)
        self._made.append(_Alias(TensorWeakRef(before), before._version, TensorWeakRef(after), after._version))

    def in_layout(self, source: Any, found: Any) -> Any:
        """The result of a conversion to a memory format: a copy of metamom's images, which PyTorch would convert."""
        if isinstance(found, Tensor) and isinstance(source, Tensor) and _root(found) is _root(source):
            return found.clone() if _root(source) in self._laid_out else found
        return found

    def note(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note what a call has changed in place."""
        if not self._made or not _may_write(func, args, kwargs):
            return
        for alias in self._made:
            source, copy = alias.source(), alias.copy()
            if source is None or copy is None:
                continue
            if copy._version != alias.version:
                self._stale[source] = self._any_stale = True
            if source._version != alias.source_version:
                self._stale[copy] = self._any_stale = True

    def lacking(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an argument, or a tensor inside of one, lacks a change in place of its alias."""
        return self._any_stale and any(_root(each) in self._stale for each in _tensors(args, kwargs))


CURRENT: ContextVar[Aliases | None] = ContextVar("current", default=None)
"""Those of the model that runs under vmap in this thread."""


def is_permuted(images: Tensor) -> bool:
    """Whether the entries of another axis than the last are next to each other in memory, as of metamom's images."""
    if images.dim() < 3 or (images.stride(-1) == 1 and images.shape[-1] > 1):
        return False
    strides = [stride for size, stride in zip(images.shape, images.stride(), strict=True) if size > 1]
    return 1 in strides[:-1]


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, in any order of its axes; of a tensor inside vmap, what one task has of it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _shape_of_view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The shape that a view is to have; ``None`` for a view as another dtype, and for other functions."""
    name = _name(func)
    if name not in VIEWS:
        return None
    if len(args) < 2 or isinstance(args[1], torch.dtype):
        return kwargs.get("size")
    if name == "view_as":
        return args[1].shape
    return args[1] if isinstance(args[1], (tuple, list)) else args[1:]


def _may_write(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may change a tensor in place, by its name or a true argument such as ``inplace``."""
    return writes(func) or "out" in kwargs or any(type(x) in (bool, int) and x == 1 for x in (*args, *kwargs.values()))


@cache
def writes(func: Callable[..., Any]) -> bool:
    """Whether a function of PyTorch changes its first argument in place, by its name."""
    name = _name(func)
    if name.startswith("__"):
        return name.startswith("__i") or name == "__setitem__"
    return name.endswith("_")


def _root(tensor: Tensor) -> Tensor:
    """The tensor that one, which may be inside vmap, is a view of, or itself."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor if tensor._base is None else tensor._base


def _name(func: Callable[..., Any]) -> str:
    """The name of a function, or of an operator without its overload."""
    return str(getattr(func, "__name__", "")).partition(".")[0]


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for item in (*args, *kwargs.values()):
        yield from (each for each in pytree.tree_leaves(item) if isinstance(each, Tensor))
