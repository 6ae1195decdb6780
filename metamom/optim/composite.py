"""The optimizer: it fetches the state, calls the momentum update, and moves the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.common.averaged import forget
from metamom.common.choices import FirstStep
from metamom.optim.checks import (
    as_parameters,
    check_beta,
    check_gradients,
    check_names,
    check_not_averaged,
    check_options,
)
from metamom.optim.update import momentum_update_, momentum_updates_, move_, together, total_norm


class CompositeMomentum(Optimizer):
    """Momentum as the paper analyses it: ``v <- (1 - beta) v + beta g``, then ``w <- w - lr v``.

    Beta is the weight of the *new* gradient: ``beta=0.1`` corresponds to a momentum of 0.9 elsewhere, and ``beta=1`` is
    plain SGD, bit for bit. The first value of v matters: with ``"gradient"``, the first gradient enters the sum of all
    steps with weight 1/beta instead of 1.

    | first_step | start | equivalent to |
    |---|---|---|
    | ``"zero"`` | ``v_{-1} = 0`` | ``SGD(lr=lr * beta, momentum=1 - beta)``; as in the analysis |
    | ``"gradient"`` | ``v_0 = g_0`` | ``SGD(lr, momentum=1 - beta, dampening=1 - beta)``; as in the paper's runs |

    Args:
        params: parameters or parameter groups. Every option below can differ per group.
        lr: the step size gamma, > 0. A 0-d tensor is accepted where torch accepts one.
        beta: 0 < beta <= 1; can change between steps (see `LambdaBeta`).
        first_step: the first value of v (see above).
        weight_decay: adds ``weight_decay * w`` to the gradient (L2), >= 0.
        maximize: ascend instead of descend.
        foreach: update all tensors of a group together (True), one by one (False), or together if all of them are
            plain strided tensors (None). The result is the same.
        normalize: move by ``lr v / ||v||``, so that every step has length lr. The norm is over all parameters with a
            gradient, in all groups that normalise; if v is zero, nothing moves. This needs no bound on lr. Its bias
            floor is 2b in the mean gradient norm (`metamom.theory.bound_1c`), which a lower lr approaches.

    Raises:
        ValueError: for an option out of range.
        TypeError: for other optimizers' options, here or in a group, with what to use instead; at `step`, for a
            sparse gradient.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = CompositeMomentum([w], lr=0.1, beta=0.5)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.data
        tensor([0.9000])

    Reference:
        Beikmohammadi, Khirirat, Magnússon, arXiv 2403.00853; the state ``"momentum"`` is their v_k. Normalised:
        Cutkosky, Mehta (2020), momentum improves normalized SGD.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        beta: float = 0.1,
        *,
        first_step: FirstStep = "zero",
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        normalize: bool = False,
        **others: NoReturn,
    ) -> None:
        check_names(others, strict=True)
        defaults = {
            "lr": lr,
            "beta": beta,
            "first_step": first_step,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "normalize": normalize,
        }
        check_options(defaults)
        super().__init__(as_parameters(params), defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a saved state, including one from a version without normalisation.

        Raises:
            ValueError: for options out of range; nothing changes then.
        """
        for group in state["param_groups"]:
            if missing := {"lr", "beta", "first_step", "weight_decay", "maximize", "foreach"} - set(group):
                raise ValueError(
                    f"the state of CompositeMomentum lacks {', '.join(sorted(missing))} in a parameter group."
                )
            check_options({**group, "lr": 1.0})  # except lr, which a schedule may have taken to 0
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("normalize", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Options that it does not set come from the constructor."""
        check_names(param_group, strict=False)
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        forget(self.param_groups[-1]["params"])  # notes from other optimizers do not apply to this one

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to ``None`` or to zero, like every optimizer. ``None`` takes a tenth of the time."""
        for group in self.param_groups:
            forget(group["params"])
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one momentum step on every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients; called once, before the step, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            ValueError: for a beta out of range, or a beta below 1 if workers have averaged the gradients (EF21SGDM).
            TypeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = []
        for group in self.param_groups:  # check all before any weight moves, so that an error changes nothing
            check_beta(group["beta"])  # it may have been scheduled or changed by hand
            pairs = [(p, g) for p in group["params"] if (g := p.grad) is not None]
            check_gradients(pairs)
            if group["beta"] != 1:
                check_not_averaged(pairs, group["beta"])
            pending.append((group, pairs))
        moved = [(group, *self._average(group, pairs)) for group, pairs in pending if pairs]
        norm = total_norm([v for group, _, bufs in moved if group["normalize"] for v in bufs])
        for group, params, bufs in moved:
            lr = float(group["lr"])
            if not group["normalize"]:
                move_(params, bufs, lr, group["foreach"])
            elif norm != 0:  # v = 0 has no direction; a NaN reaches the weights, where it shows
                directions = [v / norm for v in bufs]  # lr / norm may be too large for a float16
                move_(params, directions, lr, group["foreach"])
            forget(params)  # these gradients have been used
        return loss

    def _average(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Update a group's momenta. Returns the parameters and their ``v_k``."""
        beta = group["beta"]
        params = [p for p, _ in pairs]
        grads = [g for _, g in pairs]
        if group["maximize"] or group["weight_decay"]:
            grads = [_descent_gradient(p, g, group) for p, g in pairs]
        states = [self.state[p] for p in params]
        started = ["momentum" in state for state in states]
        for state, has_begun, p, g in zip(states, started, params, grads, strict=True):
            if not has_begun:
                # v_{-1}, the value before the first step; v_{-1} = g_0 gives v_0 = g_0
                state["momentum"] = torch.zeros_like(p) if group["first_step"] == "zero" else g.clone()
        bufs = [state["momentum"] for state in states]
        moving_bufs, moving_grads = bufs, grads
        if group["first_step"] == "gradient" and not all(started):
            # (1 - beta) g_0 + beta g_0 is g_0 only up to rounding. So new buffers, which are already v_0, are skipped.
            moving_bufs, moving_grads = list(compress(bufs, started)), list(compress(grads, started))
        if together(group["foreach"], params):
            momentum_updates_(moving_bufs, moving_grads, beta)
        else:
            for v, g in zip(moving_bufs, moving_grads, strict=True):
                momentum_update_(v, g, beta)
        return params, bufs


def _descent_gradient(p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient to average, with sign and weight decay applied. ``p.grad`` itself does not change."""
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"]:
        grad = grad.add(p, alpha=group["weight_decay"])
    return grad
