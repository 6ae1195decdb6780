"""The step in torch's fused kernel: average, weight decay and move in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metamom.common.sharded import local_part
from metamom.optim.update import by_kind


def check_fused(params: list[Tensor]) -> None:
    """Refuse what the kernel cannot take.

    Raises:
        TypeError: for parameters that are not plain floating-point tensors on a CPU, CUDA or MPS device.
    """
    for p in params:
        if not p.is_floating_point() or p.device.type not in ("cpu", "cuda", "mps", "xpu"):
            raise TypeError(
                "fused=True needs floating-point parameters on a CPU, CUDA, MPS or XPU device; got one of dtype "
                f"{p.dtype} on {p.device}. Use foreach=True, or neither."
            )


def fused_step_(
    params: list[Tensor],
    grads: list[Tensor],
    bufs: list[Tensor],
    group: dict[str, Any],
    *,
    new: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of parameters that all have, or all lack, a past. The kernel is SGD's, with dampening = momentum.

    Args:
        params, grads, bufs: w, the gradients and v.
        group: the options.
        new: whether v becomes the gradient itself.
        grad_scale, found_inf: from `torch.amp.GradScaler`: the gradients are divided by the first; nothing moves if
            the second is not 0.
    """
    beta, decay = float(group["beta"]), float(group["weight_decay"])
    new = new or beta == 1
    for ps, gs, vs in by_kind(*([local_part(x) for x in xs] for xs in (params, grads, bufs))):
        there = [None if x is None else x.to(ps[0].device) for x in (grad_scale, found_inf)]
        torch._fused_sgd_(
            ps,
            gs,
            vs,
            weight_decay=0.0 if group["decoupled_weight_decay"] else decay,
            momentum=0.5 if beta == 1 else 1 - beta,  # with 0, the kernel would leave v as it was
            lr=float(group["lr"]),
            dampening=1 - beta,
            nesterov=False,
            maximize=group["maximize"],
            is_first_step=new,
            grad_scale=there[0],
            found_inf=there[1],
        )
