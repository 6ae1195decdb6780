"""What a model needs to be differentiated twice by plain autograd, one task at a time, with weights swapped in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from metamom.common.for_all_threads import ForAllThreads
from metamom.common.modules import modules_of, named_modules_of
from metamom.maml.task_weights import Params

# Found in the errors of torch.autograd.grad and of hooks on tensors that do not require gradients.
WITHOUT_GRADIENTS = (
    "does not require grad",
    "doesn't require grad",
    "Expected gradient function to be set",
    "'NoneType' object has no attribute 'register_hook'",
)


def with_gradients_if_needed(call: Callable[[Params], Any], tensors: Params, names: Collection[str]) -> Any:
    """``call(tensors)``, for a model or a loss that may differentiate inside, or register hooks on tensors.

    It can do so in a plain loop whether or not the caller wants gradients, if its weights or predictions require them.

    Args:
        call: the model or the loss, as a function of the tensors.
        tensors: by name.
        names: those that require gradients in a plain loop.
    """
    try:
        return call(tensors)
    except (RuntimeError, AssertionError, AttributeError) as error:
        if not any(sign in str(error) for sign in WITHOUT_GRADIENTS):
            raise
    wanted, named = torch.is_grad_enabled(), set(names)
    with torch.inference_mode(False), torch.enable_grad():
        out = call(
            {
                name: w.detach().clone().requires_grad_() if name in named and not w.requires_grad else w
                for name, w in tensors.items()
            }
        )
    return out if wanted else pytree.tree_map_only(Tensor, Tensor.detach, out)


@contextmanager
def differentiable_twice(module: nn.Module | None) -> Iterator[None]:
    """Choose implementations that have second derivatives, and that do not run parts of the model again later.

    Attention uses the math kernels. Recurrent layers on a GPU do not use cuDNN. Compiled parts run uncompiled.
    Checkpointed parts keep their activations: a second run in the backward pass would use the model's own weights.

    Args:
        module: the model or the loss; ``None`` for a loss that is a function.
    """
    parts = [] if module is None else modules_of(module)
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    recurrent = on_gpu and any(isinstance(part, nn.RNNBase) for part in parts)
    with _math_attention(), _no_cudnn() if recurrent else nullcontext(), uncompiled(), _checkpoints_off():
        yield


@contextmanager
def _only_math() -> Iterator[None]:
    """``sdpa_kernel(SDPBackend.MATH)``, which takes five times as long; every call of a model in a loop comes here."""
    if _ATTENTION is None:
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    before = [(use, enabled()) for enabled, use in _ATTENTION.values()]
    for name, (_, use) in _ATTENTION.items():
        use(name == "math")
    try:
        yield
    finally:
        for use, was in before:
            use(was)


def _attention_switches() -> dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] | None:
    """How to ask for, and to set, the use of each kind of attention kernel; ``None`` if this PyTorch has other ones."""
    names: Any = getattr(attention, "_backend_names", {})
    pairs = [(f"_get_{name}_sdp_enabled", f"_set_sdp_use_{name}") for name in names]
    if "math" not in names or not all(hasattr(torch._C, each) for pair in pairs for each in pair):
        return None
    return {name: (getattr(torch._C, a), getattr(torch._C, b)) for name, (a, b) in zip(names, pairs, strict=True)}


_ATTENTION = _attention_switches()


_math_attention = ForAllThreads(_only_math)
_no_cudnn = ForAllThreads(partial(torch.backends.cudnn.flags, enabled=False))
_eagerly = ForAllThreads(partial(torch.compiler.set_stance, "force_eager"))


def uncompiled() -> AbstractContextManager[None]:
    """Run what `torch.compile` has compiled as if it had not. Its graphs do not have second derivatives.

    So do other threads while this lasts.
    """
    # without Dynamo nothing is compiled, and its import takes seconds
    return _eagerly() if "torch._dynamo" in sys.modules else nullcontext()


def warm_starts(model: nn.Module) -> frozenset[str]:
    """The names of buffers that spectral norms overwrite in training, as the start of their next power iteration."""
    names: set[str] = set()
    for prefix, module in named_modules_of(model).items():
        keys = ["_u", "_v"] if isinstance(module, _SpectralNorm) else []
        hooks: list[Any] = [*module._forward_pre_hooks.values()]
        for hook in hooks:
            if type(hook).__name__ == "SpectralNorm":  # of torch.nn.utils.spectral_norm, which hides its class
                keys += [f"{hook.name}_u", f"{hook.name}_v"]
        names.update(f"{prefix}.{key}" if prefix else key for key in keys)
    return frozenset(names)


class _Direct:
    """Stands in for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _direct(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for the generator that `torch.utils.checkpoint.checkpoint` runs around its function."""
    yield


# torch has no switch for checkpoints, so these names are replaced while a model runs.
_DIRECT: dict[str, Any] = {"CheckpointFunction": _Direct, "_checkpoint_without_reentrant_generator": _direct}
_ORIGINAL: dict[str, Any] = {name: getattr(checkpoint, name, None) for name in _DIRECT}


@contextmanager
def _run_directly() -> Iterator[None]:
    """Run checkpointed functions as if they were not."""
    if None in _ORIGINAL.values():  # a future version of torch
        with disable_saved_tensors_hooks("checkpoints do not run under MAML: remove torch.utils.checkpoint"):
            yield
        return
    vars(checkpoint).update(_DIRECT)
    try:
        yield
    finally:
        vars(checkpoint).update(_ORIGINAL)


_checkpoints_off = ForAllThreads(_run_directly)
