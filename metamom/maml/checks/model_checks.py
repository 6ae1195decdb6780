"""Checks of a model before any layer is considered: whether it is wrapped, and whether it has anything to train."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from metamom.common.kinds import named_type
from metamom.common.modules import modules_of, named_parameters_of

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
            functions of `metamom.maml.under_vmap.functions_by_task`, which cannot be replaced there; for a model
            without trainable parameters; and for one with uninitialised (lazy) or sparse parameters.
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
