"""Replace a model's parameters and buffers for one call: each registration once, one thread at a time.

`torch.func.functional_call` does not restore a module that is registered under two names (pytorch issue 164759), and
several threads that use it on one model see each other's tensors. Here a tensor is replaced wherever it is registered,
registrations are found by the module that holds them rather than by name, and the modules involved are locked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from metamom.common.modules import modules_of, named_modules_of, named_parameters_of

Places = list[tuple[dict[str, Tensor | None], str]]

# The attributes in which a PyTorch module registers its tensors and modules. A forward does not write to them.
_REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})

_ABSENT = object()

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_MAKING = threading.Lock()
_EVALUATING: ContextVar[bool] = ContextVar("evaluating", default=False)
_TRAINING: ContextVar[frozenset[int]] = ContextVar("training", default=frozenset())  # in evaluation mode for a call


# ids of the registries in which a forward has replaced a tensor, within `tensors_left`
_REPLACED: ContextVar[set[int] | None] = ContextVar("replaced", default=None)


class Slots(NamedTuple):
    """The tensors registered in a model, each under the first of its names.

    Attributes:
        tensors: the current parameters and buffers.
        places: where each one is registered.
    """

    tensors: dict[str, Tensor]
    places: dict[str, Places]


@contextmanager
def locked(*models: nn.Module) -> Iterator[list[nn.Module]]:
    """Lock these models, so that no other thread replaces their tensors or those of a module they share.

    Yields their modules, as `metamom.common.modules.modules_of` of the first model finds them, then of the others.
    """
    modules = modules_of(*models)
    with _MAKING:
        # in a fixed order to avoid deadlocks
        locks = [
            _LOCKS.get(module) or _LOCKS.setdefault(module, threading.RLock()) for module in sorted(modules, key=id)
        ]
    held = []
    try:
        for lock in locks:
            lock.acquire()
            held.append(lock)
        yield modules
    finally:
        for lock in reversed(held):
            lock.release()


def slots(model: nn.Module) -> Slots:
    """Find where the parameters and buffers of ``model`` are registered. Call this under `locked`."""
    names: dict[int, str] = {}
    found = Slots({}, {})
    modules = named_modules_of(model).items()
    # parameters first: a tensor that is also registered as a buffer keeps its name as a parameter
    registries: list[tuple[str, Any]] = [(prefix, module._parameters) for prefix, module in modules]
    registries += [(prefix, module._buffers) for prefix, module in modules]
    for prefix, registered in registries:
        for key, tensor in registered.items():
            if tensor is None:
                continue
            name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
            found.tensors[name] = tensor
            found.places.setdefault(name, []).append((registered, key))
    return found


def named(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, as in ``model.named_parameters()``."""
    with locked(model):
        return dict(named_parameters_of(model))


@contextmanager
def swapped(found: Slots, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the tensors of the same names by ``tensors``, and restore them at the end. Use this under `locked`."""
    for name, tensor in tensors.items():
        for registered, key in found.places[name]:
            registered[key] = tensor
    try:
        yield
    finally:
        replaced = _REPLACED.get()
        for name, tensor in tensors.items():
            for registered, key in found.places[name]:
                # a scripted module's registry has no get
                if replaced is not None and (key not in registered or registered[key] is not tensor):
                    replaced.add(id(registered))
                registered[key] = found.tensors[name]


@contextmanager
def tensors_left(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Remove tensors that these modules leave in attributes, and yield those that do. Use this under `locked`.

    This includes tensors in lists, tuples and dicts. Tensors from inside vmap cannot be used, copied or saved later.
    It also includes weak references, by which recurrent layers know whether their list of weights is still right.
    Other attributes of such a module are set back too, since a flag or a length may say that a table has been made;
    counters of calls and numbers that are annealed go on.
    """
    before = [(module, dict(module.__dict__), _contents(module)) for module in modules]
    found: set[nn.Module] = set()
    try:
        with _buffers_left([module for module, _, _ in before], found):
            yield found
    finally:
        for module, attributes, contents in before:
            for name, value in [*module.__dict__.items()]:
                had = contents.get(name, ())
                if value is attributes.get(name) and (name not in contents or _is_same(value, had)):
                    continue
                if name not in _REGISTERED and any(isinstance(item, (Tensor, ref)) for item in _held(value)):
                    found.add(module)
                    del module.__dict__[name]
            for name in attributes.keys() - module.__dict__.keys():
                module.__dict__[name] = _holding(attributes[name], contents.get(name, ()))
            if module in found:
                _set_back(module, attributes)


@contextmanager
def first_tensors_left(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """The same as `tensors_left` in less time, for modules that have left none before. Use this under `locked`.

    It sees attributes that are set, and lists and dicts that have grown.
    """
    before = [(module, module.__dict__.copy()) for module in modules]
    sizes = [
        (module, value, len(value))
        for module, attributes in before
        for name, value in attributes.items()
        if type(value) in (list, dict) and name not in _REGISTERED
    ]
    found: set[nn.Module] = set()
    try:
        with _buffers_left([module for module, _ in before], found):
            yield found
    finally:
        for module, value, size in sizes:
            if len(value) > size and any(isinstance(item, Tensor) for item in _held(value)):
                found.add(module)
                for key in range(size, len(value))[::-1] if isinstance(value, list) else [*value][size:]:
                    del value[key]
        for module, attributes in before:
            now = module.__dict__
            for name in [name for name, value in now.items() if attributes.get(name) is not value]:
                if name not in _REGISTERED and any(isinstance(item, Tensor) for item in _held(now[name])):
                    found.add(module)
            if module in found:
                _set_back(module, attributes)


@contextmanager
def _buffers_left(modules: Sequence[nn.Module], found: set[nn.Module]) -> Iterator[None]:
    """Remove the buffers that modules register with tensors from inside vmap or with a graph.

    Adds these modules to ``found``, and those that replace a parameter or a buffer, which `swapped` puts back.
    """
    before = [(module, dict(module._buffers.items())) for module in modules]
    token = _REPLACED.set(set())
    try:
        yield
    finally:
        replaced = _REPLACED.get() or ()
        _REPLACED.reset(token)
        for module, buffers in before:
            if replaced and (id(module._buffers) in replaced or id(module._parameters) in replaced):
                found.add(module)
            for name, value in [*module._buffers.items()]:
                if value is None or buffers.get(name) is value:
                    continue
                if value.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(value):
                    found.add(module)
                    if name in buffers:
                        module._buffers[name] = buffers[name]
                    else:
                        del module._buffers[name]


def _set_back(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set a module's attributes back to what they were, but for its registries and `_goes_on`."""
    now = module.__dict__
    for name in [name for name, value in now.items() if attributes.get(name, _ABSENT) is not value]:
        if name in _REGISTERED or _goes_on(attributes.get(name), now[name]):
            continue
        if name in attributes:
            now[name] = attributes[name]
        else:
            del now[name]


def _goes_on(before: object, now: object) -> bool:
    """Whether a number changes from call to call, as a counter or a temperature, rather than with what a module keeps.

    Example:
        >>> _goes_on(3, 4), _goes_on(1.0, 0.9), _goes_on(0, 20), _goes_on(False, True), _goes_on(None, 1)
        (True, True, False, False, False)
    """
    if type(before) is float:
        return type(now) is float
    return type(before) is int and type(now) is int and now == before + 1


def _contents(module: nn.Module) -> dict[str, Sequence[object]]:
    """What the lists and dicts among a module's attributes hold; other objects cannot change what they hold."""
    kept = ((name, value) for name, value in module.__dict__.items() if isinstance(value, (list, dict)))
    return {name: _held(value) if value else () for name, value in kept if name not in _REGISTERED}


def _is_same(value: Any, had: Sequence[object]) -> bool:
    """Whether a list or dict holds what it held before."""
    if not value or not had:
        return not value and not had
    held = _held(value)
    return len(held) == len(had) and all(a is b for a, b in zip(held, had, strict=True))


def tensors_within(module: nn.Module) -> list[Tensor]:
    """The tensors that a module keeps in attributes, without its parameters and buffers."""
    kept = (value for name, value in module.__dict__.items() if name not in _REGISTERED)
    return [item for value in kept for item in _held(value) if isinstance(item, Tensor)]


def _held(value: object) -> Sequence[object]:
    """A tensor itself, or the items of a list, tuple or dict (keys, then values); nothing for other types."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return [value] if isinstance(value, Tensor) else list(value) if isinstance(value, (list, tuple)) else ()


def _holding(value: object, held: Sequence[object]) -> object:
    """The same object with its earlier items restored."""
    if isinstance(value, list):
        value[:] = held
    elif isinstance(value, dict):
        value.clear()
        value.update(zip(held[: len(held) // 2], held[len(held) // 2 :], strict=True))
    return value


@contextmanager
def evaluating() -> Iterator[None]:
    """Run models in evaluation mode in this thread (see `in_mode`). The models' own mode does not change."""
    token = _EVALUATING.set(True)
    try:
        yield
    finally:
        _EVALUATING.reset(token)


@contextmanager
def in_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode if this thread is `evaluating`. Use this under `locked`."""
    training = [module for module in modules_of(model) if module.training] if _EVALUATING.get() else []
    if training:
        model.eval()
    token = _TRAINING.set(_TRAINING.get() | frozenset(map(id, training))) if training else None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if token is not None:
            _TRAINING.reset(token)


def trains_elsewhere(module: nn.Module) -> bool:
    """Whether ``module`` is in evaluation mode because of `in_mode` alone."""
    return id(module) in _TRAINING.get()


def is_training(module: nn.Module) -> bool:
    """Whether ``module`` runs in training mode in this thread (see `in_mode`)."""
    return module.training and not _EVALUATING.get()


def _forget_locks() -> None:
    """Replace the locks in a forked process, since other threads may have held them at the fork."""
    global _MAKING
    _LOCKS.clear()
    _MAKING = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
