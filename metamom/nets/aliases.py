"""Reshaped images: copies here, and views of the same memory in PyTorch's layout.

metamom's images lie in memory as ``[N, H, W, C]``. There, ``flatten``, ``view`` and the like must copy what they could
leave in place in PyTorch's layout, so a change in place of the result does not reach the images, or the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from metamom.nets.channels_last import on_any_layout


def _named(*names: str) -> Iterator[Callable[..., Any]]:
    """The functions of these names: torch's, a tensor's, and the operators, which exported models call."""
    for name in names:
        yield from (getattr(home, name) for home in (torch, torch.Tensor) if hasattr(home, name))
        operator = getattr(torch.ops.aten, name)
        yield from (operator, *(getattr(operator, overload) for overload in operator.overloads()))


RESHAPING = frozenset(_named("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "contiguous"))


class _Alias(NamedTuple):
    """Memory that images were reshaped from and a copy of it, with the changes in place of both until then."""

    source: TensorWeakRef
    source_version: int
    copy: TensorWeakRef
    version: int


class Aliases:
    """The reshaped images of one call of a model."""

    def __init__(self) -> None:
        self._made: list[_Alias] = []
        self._stale: Any = WeakIdKeyDictionary()  # memory that lacks a change in place of its alias

    def reshaped(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Call one of `RESHAPING`. A view of images that is only possible in PyTorch's layout becomes a copy."""
        source = args[0] if args else None
        if not isinstance(source, Tensor) or not is_permuted(source):
            return cast(Tensor, on_any_layout(func, args, kwargs))
        shape = _shape_of_view(func, args, kwargs)
        found: Tensor = on_any_layout(func, args, kwargs) if shape is None else source.reshape(shape)
        before, after = _root(source), _root(found)
        if before is not after and not source.is_inference():
            self._made.append(
                _Alias(TensorWeakRef(before), before._version, TensorWeakRef(after), after._version),
            )
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
                self._stale[source] = True
            if source._version != alias.source_version:
                self._stale[copy] = True

    def lacking(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an argument lacks a change in place of its alias."""
        return len(self._stale) > 0 and any(_root(each) in self._stale for each in _tensors(args, kwargs))


def is_permuted(images: Tensor) -> bool:
    """Whether the entries of another axis than the last are next to each other in memory, as of metamom's images."""
    if images.dim() < 3:
        return False
    strides = [stride for size, stride in zip(images.shape, images.stride(), strict=True) if size > 1]
    return 1 in strides[:-1]


def _shape_of_view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The shape that a view is to have; ``None`` for a view as another dtype, and for other functions."""
    name = _name(func)
    if name not in ("view", "view_as") or kwargs or len(args) < 2 or isinstance(args[1], torch.dtype):
        return None
    if name == "view_as":
        return args[1].shape
    return args[1] if isinstance(args[1], (tuple, list)) else args[1:]


def _may_write(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may change a tensor in place, by its name or a true argument such as ``inplace``."""
    return writes(func) or "out" in kwargs or any(each is True for each in (*args, *kwargs.values()))


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
