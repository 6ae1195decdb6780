"""The optimizer: it fetches the state, calls the momentum update, and moves the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any, NoReturn, overload

import torch
from torch import Tensor

from metamom.common.averaged import forget
from metamom.common.choices import FOLLOWING, FirstStep, Variant
from metamom.optim.checks import as_parameters, check_names, check_options, check_state
from metamom.optim.following import Following
from metamom.optim.from_sgd import from_sgd, is_from_sgd
from metamom.optim.fused import check_fused, fused_step_
from metamom.optim.groups import Defaults
from metamom.optim.initialisation import only_makes_state, without_a_gradient
from metamom.optim.last_gradient import keep_last_gradients
from metamom.optim.pending import Pending, decays, descent_gradient, pending_of, value_of
from metamom.optim.sharded import check_norm_is_known, total_norm
from metamom.optim.update import (
    look_ahead,
    momentum_update,
    momentum_update_,
    momentum_updates_,
    move_,
    of_unit_length,
    shrink_,
    together,
)
from metamom.optim.variants import Changes, keep_previous, transport_, variant_of

LATER = {  # options that states of earlier versions may lack
    "maximize": False,
    "foreach": None,
    "normalize": False,
    "nesterov": False,
    "decoupled_weight_decay": False,
    "fused": None,
    "differentiable": False,
    "variant": None,
}


class CompositeMomentum(Following):
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
        lr: the step size gamma, >= 0. A 0-d tensor is accepted too: a compiled step then runs with any lr.
        beta: 0 < beta <= 1, or a 0-d tensor; can change between steps (see `LambdaBeta`). torch's OneCycleLR and
            CyclicLR cycle it as the momentum 1 - beta.
        first_step: the first value of v (see above).
        weight_decay: adds ``weight_decay * w`` to the gradient (L2), >= 0; a number or a 0-d tensor.
        decoupled_weight_decay: multiply w by ``1 - lr * weight_decay`` in each step instead, outside v.
        nesterov: move by ``(1 - beta) v_k + beta g_k`` instead of by v_k. From ``first_step="zero"`` it is
            ``SGD(lr=lr * beta, momentum=1 - beta, nesterov=True)``.
        normalize: move by ``lr v / ||v||``, so that every step has length lr. The norm is over all parameters with a
            gradient, in all groups that normalise; if v is zero, nothing moves. This needs no bound on lr. Its bias
            floor is 2b in the mean gradient norm (`metamom.theory.bound_1c`), which a lower lr approaches. Of
            DTensors, as `fully_shard` and tensor parallelism make them, it is the norm of the full tensors.
        variant: how v follows the weights (docs/reference/optimizer.md); one for all groups. ``"heavy-ball"`` is the
            rule above, and so is ``None``. ``"igt"`` takes the gradient at the extrapolated point
            ``w + (1 - beta)/beta (w - w_prev)``. ``"storm"`` is ``v <- g(w) + (1 - beta)(v - g(w_prev))``, with both
            gradients of the same data. ``"hessian"`` is ``v <- (1 - beta)(v + H(w)(w - w_prev)) + beta g``. The
            optimizer has to call what computes these gradients: pass `step` a closure, or call
            ``learner.backward(batch, momentum=optimizer)`` before it. For ``"hessian"``,
            ``loss.backward(create_graph=True)`` is enough. These three keep w_prev as the state ``"previous"``. They
            have no fused, differentiable or Nesterov's form.
        maximize: ascend instead of descend.
        foreach: update all tensors of a group together (True), one by one (False), or together if all of them are
            plain strided tensors (None). The result is the same.
        fused: use torch's fused SGD kernel, which supports `torch.amp.GradScaler` without a synchronisation. The
            result is the same up to rounding.
        differentiable: let autograd differentiate through `step`, as in torch.optim: with respect to gradients, and
            to lr, beta and weight_decay if they are tensors. The parameters must not be leaves, and change in place:
            compute the gradients from copies of them.

    Raises:
        ValueError: for an option out of range, options that exclude each other, or ``normalize=True`` under
            ZeroRedundancyOptimizer or FullyShardedDataParallel, where no process knows the norm.
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
        beta: float | Tensor = 0.1,
        *,
        first_step: FirstStep = "zero",
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = False,
        nesterov: bool = False,
        normalize: bool = False,
        variant: Variant | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        **others: NoReturn,
    ) -> None:
        check_names(others, strict=True)
        defaults = {
            "lr": lr,
            "beta": beta,
            "first_step": first_step,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "nesterov": nesterov,
            "normalize": normalize,
            "variant": variant,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        check_options(defaults)
        self._waiting = set()  # parameters with a momentum that no gradient has entered yet
        self._changes = None
        super().__init__(as_parameters(params), Defaults(defaults))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch's GradScaler leaves the division by its scale to `step`. Loaded states may change this."""
        return all(group["fused"] for group in self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, which is copied: two optimizers never share their momentum.

        Args:
            state_dict: from `CompositeMomentum.state_dict` of this or an earlier version, or from
                `torch.optim.SGD.state_dict`. The step size and momentum of the latter are converted, so that the next
                steps are the same.

        Raises:
            ValueError: for options out of range, or a state of SGD that has no equivalent here; nothing changes then.
        """
        if is_from_sgd(state_dict):
            state_dict = from_sgd(state_dict)
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a saved state, including one from an earlier version with fewer options.

        Raises:
            ValueError: for options out of range, or a parameter's momentum that is missing; nothing changes then.
        """
        check_state(state)
        super().__setstate__(state)
        self.defaults = Defaults(self.defaults)
        for p, each in self.state.items():
            if isinstance(each, dict) and "momentum" in each:  # users' hooks may keep other things here
                kept = {name: each[name].clone() for name in ("momentum", "previous") if name in each}
                self.state[p] = {**each, **kept}
        for group in self.param_groups:
            for name, value in LATER.items():
                group.setdefault(name, value)
        self._waiting, self._changes = without_a_gradient(self.state), None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Options that it does not set come from the constructor."""
        check_names(param_group, strict=False)
        options = {**self.defaults, **param_group}
        check_options(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            variant_of(self.param_groups)
            if options["normalize"]:
                check_norm_is_known(group["params"])
            if options["fused"]:
                check_fused([p for p in group["params"] if not p.is_meta])  # these may get memory later
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        forget(group["params"])  # notes from other optimizers do not apply to this one

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to ``None`` or to zero, like every optimizer. ``None`` takes a tenth of the time."""
        self._changes = None
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

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one momentum step on every parameter that has a gradient.

        Args:
            closure: clears the gradients, and recomputes the loss and its gradients; called once, before the step, with
                gradients enabled. With ``variant="storm"``, it is called at w_prev and then at w, and must use the same
                data in both calls; with ``"igt"``, once at the extrapolated point.

        Returns:
            What the closure returned, at w or at the extrapolated point.

        Raises:
            ValueError: for a beta out of range, or a beta below 1 if workers have averaged the gradients (EF21SGDM);
                for gradients without a closure that the variant cannot use.
            TypeError: for a sparse gradient, or parameters that the fused kernel cannot take.
        """
        loss = None
        if closure is not None:
            loss = self.evaluate(closure)
        with torch.set_grad_enabled(any(group["differentiable"] for group in self.param_groups)):
            self._step()
        return loss

    def _step(self) -> None:
        makes_state = only_makes_state(self.state, self.param_groups)
        changes = {} if makes_state else self._taken_changes()
        pending = [pending_of(group) for group in self.param_groups]  # all checks before any weight moves
        if makes_state:
            self._make_state(pending)
            return
        moves = []
        for each in pending:
            if each.group["variant"] in FOLLOWING:  # of all that have moved, also where this step has no gradient
                keep_previous(self.state, [p for p in each.group["params"] if p.grad is not None or p in self.state])
            if not each.params:
                continue
            if decays(each.group, decoupled=True):
                factor = 1 - value_of(each.group, "lr") * value_of(each.group, "weight_decay")
                found_inf = getattr(self, "found_inf", None) if each.group["fused"] else None
                shrink_(each.params, factor, each.group["foreach"], unless=found_inf)
            if each.group["fused"]:
                self._step_fused(each)
            else:
                moves.append((each, self._directions(each, changes)))
        normalised = [v for each, vs in moves if each.group["normalize"] for v in vs]
        norm = total_norm(normalised) if normalised else None
        for (group, params, _), directions in moves:
            if group["normalize"] and norm is not None:
                directions = of_unit_length(directions, norm)
            move_(params, directions, value_of(group, "lr"), group["foreach"])
        for each in pending:
            forget(each.params)  # these gradients have been used

    def _directions(self, pending: Pending, changes: Changes) -> list[Tensor]:
        """Update a group's momenta. Returns what its parameters move along: ``v_k``, or Nesterov's form of it."""
        group, params, grads = pending
        own = group["maximize"] or decays(group, decoupled=False)
        if own:
            grads = [descent_gradient(p, g, group) for p, g in zip(params, grads, strict=True)]
            pending = Pending(group, params, grads)
        beta = value_of(group, "beta")
        plain_sgd = not isinstance(beta, Tensor) and beta == 1
        if plain_sgd and not group["differentiable"] and not torch.compiler.is_compiling():
            keep_last_gradients(self.state, params, grads, own=own)
            self._waiting.difference_update(params)
            return grads
        started = self._start(pending)
        moving, new_grads = params, grads
        if group["first_step"] == "gradient" and not all(started):
            # (1 - beta) g_0 + beta g_0 is g_0 only up to rounding. So new buffers, which are already v_0, are skipped.
            moving, new_grads = list(compress(params, started)), list(compress(grads, started))
        bufs = [self.state[p]["momentum"] for p in moving]
        if changes:
            held = [p for p in moving if p in changes]
            transport_([self.state[p]["momentum"] for p in held], [changes[p] for p in held], group["foreach"])
        if group["differentiable"]:
            for p, v, g in zip(moving, bufs, new_grads, strict=True):
                self.state[p]["momentum"] = momentum_update(v, g, beta)
            bufs = [self.state[p]["momentum"] for p in params]
        elif together(group["foreach"], params):
            momentum_updates_(bufs, new_grads, beta)
        else:
            for v, g in zip(bufs, new_grads, strict=True):
                momentum_update_(v, g, beta)
        if moving is not params:
            bufs = [self.state[p]["momentum"] for p in params]
        if group["nesterov"]:
            return look_ahead(bufs, grads, beta, False if group["differentiable"] else group["foreach"])
        return bufs

    def _start(self, pending: Pending) -> list[bool]:
        """Make the momenta that do not exist yet: v_{-1}. Returns which ones did exist."""
        group, params, grads = pending
        started = self._started(params)
        if not all(started):
            for has_begun, p, g in zip(started, params, grads, strict=True):
                if not has_begun:  # v_{-1} = g_0 gives v_0 = g_0
                    self.state[p]["momentum"] = torch.zeros_like(p) if group["first_step"] == "zero" else g.clone()
        if self._waiting:
            self._waiting.difference_update(params)
        return started

    def _started(self, params: list[Tensor]) -> list[bool]:
        if self._waiting:
            return ["momentum" in self.state[p] and p not in self._waiting for p in params]
        return ["momentum" in self.state[p] for p in params]

    def _make_state(self, pending: list[Pending]) -> None:
        """Make zero momenta, into which no gradient has entered."""
        for each in pending:
            for p in each.params:
                self.state[p]["momentum"] = torch.zeros_like(p)
            if each.group["variant"] in FOLLOWING:
                keep_previous(self.state, each.params)
            self._waiting.update(each.params)
            forget(each.params)

    def _step_fused(self, pending: Pending) -> None:
        group = pending.group
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        fresh = group["first_step"] == "gradient" and not all(self._started(pending.params))
        if fresh and found_inf is not None and found_inf.item():
            return  # the first gradient to be finite is g_0
        started = self._start(pending)
        if group["first_step"] == "zero":
            started = [True] * len(started)
        bufs = [self.state[p]["momentum"] for p in pending.params]
        for new in (False, True):
            chosen = [begun != new for begun in started]
            params, grads, vs = (list(compress(x, chosen)) for x in (pending.params, pending.grads, bufs))
            if params:
                fused_step_(params, grads, vs, group, new=new, grad_scale=grad_scale, found_inf=found_inf)
