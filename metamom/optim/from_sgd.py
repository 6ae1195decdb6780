"""The state of torch.optim.SGD as that of CompositeMomentum."""

from __future__ import annotations

from typing import Any

STEP_SIZES = ("initial_lr", "max_lr", "min_lr")  # what torch's schedulers keep in a group, next to its lr


def is_from_sgd(state: dict[str, Any]) -> bool:
    """Whether a state dict was saved by torch.optim.SGD."""
    return all("beta" not in group and {"momentum", "dampening"} <= set(group) for group in state["param_groups"])


def from_sgd(state: dict[str, Any]) -> dict[str, Any]:
    """Rewrite SGD's state dict so that the steps after it are the same.

    SGD's buffer follows ``b <- m b + (1 - d) g`` with ``w <- w - lr b``. With beta = 1 - m, ``v = beta / (1 - d) b``
    follows ``v <- (1 - beta) v + beta g``, and ``w <- w - lr (1 - d) / beta v``. The step sizes that a scheduler
    keeps in a group change alike. Those in the scheduler's own state, its ``base_lrs``, are the caller's to change.

    Raises:
        ValueError: where there is no such beta: a momentum or dampening of 1 or more; a first step yet to come that
            neither ``first_step`` takes.
    """
    groups, kept = [], dict(state["state"])
    for number, group in enumerate(state["param_groups"]):
        m, d = group["momentum"], group["dampening"]
        if not (0 <= m < 1 and (m == 0 or 0 <= d < 1)):
            raise ValueError(
                f"the state of SGD has momentum={m} and dampening={d} in group {number}: CompositeMomentum's average "
                "equals SGD's only for 0 <= momentum < 1 and 0 <= dampening < 1. Start it without this state."
            )
        beta = 1 - m
        scale = 1.0 if m == 0 or d == m else beta / (1 - d)
        buffers = {key: (state["state"].get(key) or {}).get("momentum_buffer") for key in group["params"]}
        if m and d not in (0, m) and any(b is None for b in buffers.values()):
            raise ValueError(
                f"the state of SGD has dampening={d} and momentum={m} in group {number}, and parameters that have not "
                "been moved yet. SGD's first step for these is not one of CompositeMomentum's: either of "
                "dampening=0 and dampening=momentum is. Load a state in which all parameters have moved."
            )
        for key, buffer in buffers.items():
            kept.pop(key, None)
            if m and buffer is not None:
                kept[key] = {"momentum": buffer * scale}
        options = {k: v for k, v in group.items() if k not in ("momentum", "dampening")}
        options |= {name: group[name] / scale for name in ("lr", *STEP_SIZES) if name in group}
        if group.get("fused") and group.get("nesterov"):
            options["fused"] = None  # which has the same result, and there is no kernel for both here
        first_step = "gradient" if m and d == m else "zero"
        groups.append({**options, "beta": beta, "first_step": first_step})
    return {**state, "state": kept, "param_groups": groups}
