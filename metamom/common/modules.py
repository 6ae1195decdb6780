"""A model's modules and parameters as lists, for code that runs in every step.

PyTorch's own iterators are nested generators, one for each level of a module's parents.
"""

from __future__ import annotations

from torch import Tensor, nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The same as ``list(model.modules())``."""
    found: dict[int, nn.Module] = {}
    todo = [model]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                todo += [child for child in reversed([*module._modules.values()]) if child is not None]
    return [*found.values()]


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
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in named_modules_of(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found


def named_buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The same as ``dict(model.named_buffers())``, also for a model that overrides it."""
    if type(model).named_buffers is not nn.Module.named_buffers:
        return dict(model.named_buffers())
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in named_modules_of(model).items():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                found[f"{name}.{key}" if name else key] = buffer
    return found
