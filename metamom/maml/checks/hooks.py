"""The hooks of a model's modules: which there are, and where they would not run.

Backward hooks do not run under vmap or in a compiled graph. Forward hooks do, but those that record or print cannot
use tensors from inside vmap, and a graph leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as every_module

from metamom.common.identity import by_identity
from metamom.common.modules import modules_of
from metamom.maml.vmap_errors import VmapError


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


def has_global_hooks() -> bool:
    """Whether all modules have a backward hook, as from `register_module_full_backward_hook`."""
    return bool(every_module._global_backward_hooks or every_module._global_backward_pre_hooks)


def global_hooks() -> tuple[Hashable, ...]:
    """A key of the hooks of all modules."""
    forward = (*every_module._global_forward_pre_hooks.values(), *every_module._global_forward_hooks.values())
    return has_global_hooks(), *map(by_identity, forward)
