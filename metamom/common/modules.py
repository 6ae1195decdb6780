"""A model's modules and parameters as lists, for code that runs in every step.

PyTorch's own iterators are nested generators, one for each level of a module's parents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from metamom.common.identity import by_identity

Named = TypeVar("Named", bound=Tensor)


def modules_of(*models: nn.Module) -> list[nn.Module]:
    """The same as ``list(model.modules())``; of several models, each module once."""
    found: dict[int, nn.Module] = {}
    todo = [*reversed(models)]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                todo += [child for child in reversed([*module._modules.values()]) if child is not None]
    return [*found.values()]


def identity_of(modules: Iterable[nn.Module]) -> tuple[Hashable, ...]:
    """Equal to an earlier result as long as the same modules hold the same parameters under the same names.

    It also depends on which parameters are trainable, and on which modules have backward hooks. The modules in it stay
    alive, so that no other one gets the id of one of them.
    """
    found: list[Hashable] = []
    for module in modules:
        found += (module, bool(module._backward_hooks or module._backward_pre_hooks), *module._modules.keys())
        if type(module).named_parameters is not nn.Module.named_parameters:
            found += [(name, id(parameter)) for name, parameter in module.named_parameters()]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found += (name, id(parameter), parameter.requires_grad)
    return tuple(found)


def behaviour_of(module: nn.Module) -> list[Hashable]:
    """A key of a module, its mode, its hooks, and a forward that was set on it; not of its tensors."""
    found: list[Hashable] = [module, module.training]
    if "forward" in module.__dict__:  # as accelerate's hooks are
        found.append(by_identity(module.__dict__["forward"]))
    if module._forward_hooks or module._forward_pre_hooks:
        found += map(by_identity, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))
    if module._backward_hooks or module._backward_pre_hooks:
        found += map(by_identity, (*module._backward_hooks.values(), *module._backward_pre_hooks.values()))
    return found


def named_modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The same as ``dict(model.named_modules())``.

    Example:
        >>> shared = nn.Linear(2, 2)
        >>> list(named_modules_of(nn.Sequential(shared, nn.Sequential(nn.ReLU()), shared)))
        ['', '0', '1', '1.0']
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo = [("", model)]
    while todo:
        name, module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            if module._modules:
                prefix = f"{name}." if name else ""
                children = reversed([*module._modules.items()])
                todo += [(prefix + key, child) for key, child in children if child is not None]
    return found


def named_parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same as ``dict(model.named_parameters())``, also for a model that overrides it."""
    if type(model).named_parameters is not nn.Module.named_parameters:
        return dict(model.named_parameters())
    return _named(model, lambda module: module._parameters)


def named_buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The same as ``dict(model.named_buffers())``, also for a model that overrides it."""
    if type(model).named_buffers is not nn.Module.named_buffers:
        return dict(model.named_buffers())
    return _named(model, lambda module: module._buffers)


def _named(model: nn.Module, own: Callable[[nn.Module], Mapping[str, Named | None]]) -> dict[str, Named]:
    """What each module has of its own, under the first of its full names."""
    found: dict[str, Named] = {}
    seen: set[int] = set()
    for name, module in named_modules_of(model).items():
        for key, value in own(module).items():
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                found[f"{name}.{key}" if name else key] = value
    return found
