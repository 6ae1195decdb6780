"""The running statistics of normalisation layers: which layers use them, and how to hide them from a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def uses_running_statistics(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's normalisation layers and has running statistics that are not hidden."""
    return isinstance(module, _NormBase) and module.running_mean is not None


def hide(module: nn.Module) -> None:
    """Let a normalisation layer use the statistics of its input in every mode, and keep its buffers.

    The buffers remain in the ``state_dict``. Statistics that a loaded state lacks stay as they are.
    """
    if not isinstance(module, _NormBase):
        return
    module.track_running_stats = False
    if not uses_running_statistics(module):
        return
    # Python looks here before it asks the module for its buffers
    module.__dict__.update(dict.fromkeys(STATISTICS))
    module.register_load_state_dict_pre_hook(_complete)  # type: ignore[no-untyped-call]


def fix(module: _NormBase, mean: Tensor, variance: Tensor) -> None:
    """Let a normalisation layer use these statistics ``[C]`` in ``eval()``, as its running ones."""
    for name in STATISTICS:
        module.__dict__.pop(name, None)  # of `hide`
    module.track_running_stats = True
    for name, value in (("running_mean", mean), ("running_var", variance)):
        old = module._buffers.get(name)
        module.register_buffer(name, value.clone() if old is None else value.to(old.dtype))
    if module._buffers.get("num_batches_tracked") is None:
        module.register_buffer("num_batches_tracked", torch.ones((), dtype=torch.long, device=mean.device))


@contextmanager
def uncounted(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep normalisation layers from counting their calls in ``num_batches_tracked``, which they do in place.

    `torch.nn.SyncBatchNorm` normalises without other processes meanwhile, since each has sets of its own.
    """
    modules = list(modules)
    synchronised = [module for module in modules if isinstance(module, nn.SyncBatchNorm)]
    counting = [
        module for module in modules if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    ]
    for module in counting:
        module.__dict__["num_batches_tracked"] = None
    for module in synchronised:
        module.__dict__["forward"] = MethodType(_BatchNorm.forward, module)
    try:
        yield
    finally:
        for module in counting:
            del module.__dict__["num_batches_tracked"]
        for module in synchronised:
            del module.__dict__["forward"]


@contextmanager
def hidden(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hide the running statistics of normalisation layers, so that these use the statistics of their input.

    Layers with a forward of their own are put into training mode instead, since it may read the running statistics.
    """
    plain: list[nn.Module] = []
    evaluating: list[nn.Module] = []
    for module in modules:
        if uses_running_statistics(module):
            if not normalises_itself(type(module)):  # type: ignore[arg-type]  # a class hashes
                plain.append(module)
            elif not module.training:
                evaluating.append(module)
    for module in plain:
        module.__dict__.update(running_mean=None, running_var=None)
    for module in evaluating:
        module.training = True
    try:
        yield
    finally:
        for module in plain:
            del module.__dict__["running_mean"], module.__dict__["running_var"]
        for module in evaluating:
            module.training = False


@cache
def normalises_itself(kind: type[nn.Module]) -> bool:
    """Whether a class of batch normalisation has another forward than PyTorch's."""
    return issubclass(kind, _BatchNorm) and not kind.forward.__module__.startswith("torch.")


def _complete(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Add the hidden statistics that a state lacks, as states of earlier versions do."""
    for name in STATISTICS:
        state.setdefault(prefix + name, module._buffers[name])
