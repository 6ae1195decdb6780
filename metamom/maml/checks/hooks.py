"""The hooks of a model's modules: which there are, and where they would not run.

Backward hooks do not run under vmap or in a compiled graph. Forward hooks do, but those that record or print cannot
use tensors from inside vmap, and a graph leaves them out.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from metamom.common.identity import by_identity
from metamom.common.modules import modules_of
from metamom.maml.vmap_errors import VmapError


def is_of_pytorch(model: nn.Module) -> bool:
    """Whether a model is made of PyTorch's own modules, without hooks, so that calls of it run no other code.

    Example:
        >>> is_of_pytorch(nn.Sequential(nn.Linear(2, 2), nn.Flatten()))
        True
        >>> is_of_pytorch(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))
        False
    """
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        return False
    return all(
        type(module).__module__.startswith("torch.nn.modules.")
        and not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
        for module in modules_of(model)
    )


def check_hooks(module: nn.Module, *, compiling: bool = False) -> None:
    """Refuse module backward hooks where they would never run.

    Args:
        module: the model, or a loss.
        compiling: whether they are ignored because a graph is compiled, not because of vmap.

    Raises:
        VmapError: naming the modules.
    """
    if not (has_global_hooks() or any(each._backward_hooks or each._backward_pre_hooks for each in modules_of(module))):
        return  # quickly, since every call of a model comes here
    names = [
        f"{name or 'the model'} ({type(each).__name__})"
        for name, each in module.named_modules()
        if each._backward_hooks or each._backward_pre_hooks
    ]
    where, instead = ("vmap", 'run the model task by task (vectorize="loop")')
    if compiling:
        where, instead = ("compiled meta-gradients", "run without compiling")
    names += ["every module (a global hook)"] * has_global_hooks()
    if names:
        raise VmapError(
            f"backward hooks of modules do not run under {where}, and would be silently ignored: {', '.join(names)}. "
            f"Remove them, or {instead}; to change a gradient, use a torch.autograd.Function in the forward.",
            where=", ".join(names),
            gist="backward hooks of modules do not run under vmap",
        )


@contextmanager
def forward_hooks_watched(model: nn.Module, *, everywhere: bool) -> Iterator[set[str]]:
    """Yield a set that collects the modules, by name and class, whose forward hooks return nothing.

    Such a hook runs for its side effects. PyTorch's own hooks are left out, and so are metamom's. With ``everywhere``,
    hooks of all modules are included.
    """
    found: set[str] = set()
    registered = [
        (f"{name or 'the model'} ({type(module).__name__})", hooks)
        for name, module in model.named_modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        if hooks
    ]
    of_all: tuple[dict[int, Any], ...] = every_module._global_forward_hooks, every_module._global_forward_pre_hooks
    registered += [("every module", hooks) for hooks in of_all if hooks and everywhere]
    before = [(hooks, dict(hooks)) for _, hooks in registered]

    def watched(hook: Any, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = hook(*args, **kwargs)
            if out is None:
                found.add(name)
            return out

        return call

    try:
        for name, hooks in registered:
            for key, hook in hooks.items():
                if _of_user(hook):
                    hooks[key] = watched(hook, name)
        yield found
    finally:
        for hooks, own in before:
            hooks.update(own)


@contextmanager
def keeping_refused(model: nn.Module) -> Iterator[None]:
    """Refuse forward hooks that keep tensors from inside vmap, which could not be used later. Use this under `locked`.

    Hooks that keep no tensor (which count calls, print names or return another output) run as they are.

    Args:
        model: the model, whose hooks these are, or of all modules.

    Raises:
        VmapError: at the first call of a hook that keeps one.
    """
    registries: list[tuple[str, dict[int, Any]]] = [
        ("all modules", every_module._global_forward_hooks),
        ("all modules", every_module._global_forward_pre_hooks),
    ]
    for name, module in model.named_modules():
        said = name or "the model"
        registries += [(said, hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks) if hooks]
    before = [(hooks, dict(hooks)) for _, hooks in registries]
    try:
        for said, hooks in registries:
            hooks.update({key: _keeping_nothing(hook, said) for key, hook in hooks.items() if _of_user(hook)})
        yield
    finally:
        for hooks, own in before:
            hooks.update(own)


def _keeping_nothing(hook: Callable[..., Any], whose: str) -> Callable[..., Any]:
    """The hook, refused when it keeps what it gets or makes, as the counts of references tell."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [*args[1:], *kwargs.values(), *pytree.tree_leaves((args[1:], kwargs))]
        tensors = [each for each in given if isinstance(each, Tensor)]
        if not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
            return hook(*args, **kwargs)
        before = _references(given)
        with _Made() as made:
            out = hook(*args, **kwargs)
        after = _references(given)
        passed_on = any(out is each for each in given)  # a tuple of inputs that is passed on adds no reference to them
        returned = Counter([id(out)] if passed_on else map(id, pytree.tree_leaves(out)))
        kept = [each for each in (found() for found in made.found) if each is not None and id(each) not in returned]
        if kept or any(now - was > returned[id(each)] for each, was, now in zip(given, before, after, strict=True)):
            raise VmapError(
                f"a forward hook of {whose} keeps tensors, and under vmap they could not be used later. Use "
                'vectorize="loop".',
                where=f"a forward hook of {whose}",
                gist="it would keep tensors that cannot be used later",
            )
        return out

    return call


def _references(values: list[Any]) -> list[int]:
    return [sys.getrefcount(values[i]) for i in range(len(values))]


class _Made(TorchFunctionMode):
    """Weak references to the tensors that functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[ref[Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [ref(each) for each in pytree.tree_leaves(out) if isinstance(each, Tensor)]
        return out


def forward_hooks_of(model: nn.Module) -> frozenset[Hashable]:
    """A key of the user's forward hooks of a model's modules."""
    found: list[Any] = []
    for module in modules_of(model):
        if module._forward_hooks or module._forward_pre_hooks:
            found += (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return frozenset(by_identity(hook) for hook in found if _of_user(hook)) if found else frozenset()


def _of_user(hook: Any) -> bool:
    """Whether a hook is neither PyTorch's own, such as weight norm's, nor metamom's."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] not in ("torch", "metamom")


def has_global_forward_hooks() -> bool:
    """Whether all modules have a forward hook, as from `register_module_forward_hook`."""
    return bool(every_module._global_forward_hooks or every_module._global_forward_pre_hooks)


def has_global_hooks() -> bool:
    """Whether all modules have a backward hook, as from `register_module_full_backward_hook`."""
    return bool(every_module._global_backward_hooks or every_module._global_backward_pre_hooks)


def global_hooks() -> tuple[Hashable, ...]:
    """A key of the hooks of all modules."""
    forward = (*every_module._global_forward_pre_hooks.values(), *every_module._global_forward_hooks.values())
    return has_global_hooks(), *map(by_identity, forward)
