"""The server's steps, for many runs ``[G, S, d]`` at once, step sizes ``[G, 1, 1]``. To add one, add it to `RULES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamom.common.choices import Variant
from metamom.optim.update import momentum_update_
from metamom.optim.variants import extrapolated, transported_update
from metamom.theory import variant_powers, variant_weight

if TYPE_CHECKING:
    from metamom.experiments.leaderboard.methods import Setup

Oracle = Callable[[Tensor], Tensor]  # points [G, S, d] -> the server's gradient there [G, S, d], of this step's sample
Memory = dict[str, Tensor]  # a rule's tensors [G, S, d]
Rule = Callable[[Tensor, Oracle, Tensor, "Setup", Memory, int], Tensor]


def momentum(x: Tensor, gradient: Oracle, lr: Tensor, setup: Setup, memory: Memory, step: int) -> Tensor:
    """`CompositeMomentum` from ``v_{-1} = 0``."""
    v = memory.setdefault("momentum", torch.zeros_like(x))
    return x - lr * _direction(momentum_update_(v, gradient(x), setup.beta), setup.normalize)


def variant(name: Variant, scheduled: bool = False) -> Rule:
    """`CompositeMomentum` with a variant, at ``setup.beta``, or with the powers of `metamom.theory.variant_powers`."""
    power = float(variant_powers(name).step)

    def rule(x: Tensor, gradient: Oracle, lr: Tensor, setup: Setup, memory: Memory, step: int) -> Tensor:
        beta = variant_weight(name, step + 1) if scheduled else setup.beta
        v, before = memory.get("momentum", torch.zeros_like(x)), memory.get("previous", x)
        change = torch.zeros_like(x)
        if name == "igt":
            g = gradient(extrapolated(x, before, beta))
        else:
            g = gradient(x)
            if name == "storm" and step > 0:
                change = g - gradient(before)
        memory["momentum"], memory["previous"] = transported_update(v, g, beta, change), x
        size = lr * (step + 1) ** -power if scheduled else lr
        return x - size * _direction(memory["momentum"], setup.normalize)

    return rule


def _direction(v: Tensor, normalize: bool) -> Tensor:
    if not normalize:
        return v
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    return torch.where(norm > 0, v / norm, v)


RULES: dict[str, Rule] = {
    "momentum": momentum,
    "igt": variant("igt"),
    "storm": variant("storm"),
    "heavy-ball-powers": variant("heavy-ball", scheduled=True),
    "igt-powers": variant("igt", scheduled=True),
    "storm-powers": variant("storm", scheduled=True),
}
