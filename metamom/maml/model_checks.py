"""Checks of a model before any layer is considered: whether it is wrapped, and whether it has anything to train."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module
from torch.nn.parameter import is_lazy

from metamom.common.identity import by_identity
from metamom.common.kinds import named_type
from metamom.common.modules import modules_of, named_parameters_of
from metamom.maml.vmap_errors import VmapError

# The wrapper classes, by module and name. They are looked up only in modules that are already imported: importing these
# takes as long as the rest of metamom, and without the import no wrapper can exist.
WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.distributed._composable.replicate", "DDP"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.distributed._composable.fsdp", "FSDPModule"),
)
SHARDED = (("torch.distributed.tensor", "DTensor"), ("torch.distributed._tensor", "DTensor"))


def check_kind(model: object) -> None:
    """Refuse anything that is not a single-process model with trainable weights.

    Raises:
        TypeError: for anything but a module.
        ValueError: for models spread over processes or devices, naming ``world=``; for scripted code that calls
            functions of `metamom.maml.functions_by_task`, which cannot be replaced there; for a model without trainable
            parameters; and for one with uninitialised (lazy) or sparse parameters.
    """
    if isinstance(model, type):
        raise TypeError(f"wanted a model, such as {model.__name__}(...); got the class {model.__name__} itself.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"wanted a model, a torch.nn.Module; got {named_type(model)}.")
    wrappers, sharded = _loaded(WRAPPERS), _loaded(SHARDED)
    wrapped = [f"{n or 'the model'} ({type(m).__name__})" for n, m in model.named_modules() if isinstance(m, wrappers)]
    wrapped += [n for n, p in model.named_parameters() if isinstance(p, sharded)]
    if wrapped:
        raise ValueError(
            "MAML needs the plain model, without wrappers that exchange gradients or split weights and batches "
            f"between processes or devices; found {', '.join(wrapped)}. Pass the wrapper's .module, or a model that "
            "was never sharded, and let metamom share the tasks: learner.backward(batch, world=world), or train(..., "
            "world=world), with world = metamom.distributed.start() in each process."
        )
    scripted = sorted({call for module in model.modules() for call in _irreplaceable(module)})
    if scripted:
        raise ValueError(
            f"scripted code in the model calls {', '.join(scripted)}, which must be replaced to run all tasks at "
            "once, and cannot be replaced in scripted code. Pass the original model, before torch.jit.script or "
            "torch.jit.trace."
        )
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"parameters without a shape yet: {', '.join(lazy)}. Call the model once on inputs [N, ...] first."
        )
    frozen_forever = [name for name, p in model.named_parameters() if p.is_inference()]
    if frozen_forever:
        raise ValueError(
            f"parameters made under torch.inference_mode() cannot be trained: {', '.join(frozen_forever)}. Build the "
            "model outside it, or copy the weights: parameter.data = parameter.data.clone()."
        )
    sparse = [name for name, p in model.named_parameters() if p.requires_grad and p.layout is not torch.strided]
    if sparse:
        raise ValueError(
            f"sparse parameters cannot be adapted: {', '.join(sparse)}. Make them dense (p.to_dense()), or freeze "
            "them: p.requires_grad_(False)."
        )
    if not any(p.requires_grad for p in model.parameters()):
        quantised = [
            name or type(module).__name__
            for name, module in model.named_modules()
            if ".quantized" in type(module).__module__ and hasattr(module, "weight")
        ]
        if quantised:
            raise ValueError(
                f"MAML needs a model with trainable parameters; the weights of {', '.join(quantised)} are quantised. "
                "Train the model before it is quantised."
            )
        frozen = sum(1 for _ in model.parameters())
        why = (
            (f"all {frozen} of its parameters are frozen (requires_grad=False)")
            if frozen
            else "it has no parameters at all"
        )
        raise ValueError(f"MAML needs a model with trainable parameters; got {type(model).__name__}: {why}.")


def structure(model: nn.Module) -> tuple[Hashable, ...]:
    """The key of `check_kind` and of the choice of adapted parameters: modules, hooks, and trainable parameters."""
    modules = [(id(m), bool(m._backward_hooks or m._backward_pre_hooks)) for m in modules_of(model)]
    return *modules, *(name for name, p in named_parameters_of(model).items() if p.requires_grad)


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
    """Yield a set to which modules are added, by name and class, that have a forward hook which returns nothing.

    Such a hook runs for what else it does. PyTorch's own hooks are left out, and so are metamom's. Those of all modules
    are included if ``everywhere``.
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


def scripted_calls(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of these functions a scripted module calls; none for a module that is not scripted."""
    return [name for name in names if _nodes(module, name)]


def _irreplaceable(module: nn.Module) -> list[str]:
    """The calls in a scripted module that would be silently wrong, since they cannot be replaced."""
    fills = [list(node.inputs()) for node in _nodes(module, "index_fill")]
    calls = scripted_calls(module, ("embedding", "one_hot", "select_scatter"))
    return calls + ["index_fill"] * any(isinstance(inputs[-1].type(), torch.TensorType) for inputs in fills)


def _nodes(module: nn.Module, name: str) -> list[Any]:
    if not isinstance(module, torch.jit.ScriptModule) or not hasattr(module, "forward"):
        return []
    graph: Any = module.inlined_graph
    return list(graph.findAllNodes(f"aten::{name}"))


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    """The classes among these names that have already been imported."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return tuple(kind for kind in found if isinstance(kind, type))
