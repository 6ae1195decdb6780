"""The norm of a momentum that lies on several processes, and the wrappers under which it cannot be known."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from traceback import walk_stack

import torch
from torch import Tensor

from metamom.common.sharded import whole


def total_norm(bufs: list[Tensor]) -> Tensor:
    """The norm of the whole of v, a 0-d tensor; for DTensors, that of the full tensors.

    It is wider than 16 bits, in which squares would overflow or vanish.
    """
    parts = [whole(torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32))) for v in bufs]
    wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
    norm: Tensor = torch.linalg.vector_norm(torch.stack([part.to(parts[0].device, wide) for part in parts]))
    return norm


def check_norm_is_known(params: Iterable[Tensor]) -> None:
    """Refuse to normalise parameters of which this process has only a part, unless they are DTensors.

    Raises:
        ValueError: under ZeroRedundancyOptimizer and FullyShardedDataParallel.
    """
    wrapper = None
    if any(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) for p in params):
        wrapper, instead = "FullyShardedDataParallel", "torch.distributed.fsdp.fully_shard, whose norms are known"
    elif _within_zero():
        wrapper, instead = "ZeroRedundancyOptimizer", "torch.distributed.fsdp.fully_shard, or the optimizer by itself"
    if wrapper is not None:
        raise ValueError(
            f"normalize=True needs the norm over all parameters, and under {wrapper} a process has only its own share "
            f"of them. Use {instead}, or normalize=False."
        )


def check_weights_are_known(variant: str) -> None:
    """Refuse a variant that uses the movement of all weights where a process knows only a part of them.

    Raises:
        ValueError: under ZeroRedundancyOptimizer.
    """
    if _within_zero():
        raise ValueError(
            f"variant={variant!r} needs the last movement of all weights, and under ZeroRedundancyOptimizer a process "
            "has only its own share of them. Use the optimizer by itself, or torch.distributed.fsdp.fully_shard."
        )


def _within_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is calling. It passes some of the parameters, and nothing that says so."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return False
    frames = (frame.f_locals.get("self") for frame, _ in walk_stack(None))
    return any(isinstance(caller, module.ZeroRedundancyOptimizer) for caller in frames)
