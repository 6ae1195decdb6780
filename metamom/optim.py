"""The composite momentum method: the update rule, the optimizer, and a scheduler for beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import compress
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.common.averaged import averaged_by, forget
from metamom.common.checks import check_number, is_word

FirstStep = Literal["zero", "gradient"]

# Option names of other optimizers, and what to use instead.
INSTEAD = {
    "momentum": "a momentum of 0.9 elsewhere is beta=0.1 here, the weight of the new gradient",
    "dampening": 'first_step="gradient" is SGD with dampening = momentum, first_step="zero" the form of the analysis',
    "nesterov": "there is no Nesterov form; leave it out",
    "betas": "betas=(0.9, ...) is beta=0.1 here, the weight of the new gradient, and there is no second moment",
    "eps": "there is no second moment to keep away from zero; leave it out",
    "amsgrad": "there is no second moment; leave it out",
    "learning_rate": "the step size is lr",
    "gamma": "the step size is lr",
    "alpha": "the step size is lr, and the weight of the new gradient beta",
}


def momentum_update(buf: Tensor, grad: Tensor, beta: float) -> Tensor:
    """Update the momentum once: ``v_k = (1 - beta) v_{k-1} + beta g_k``.

    This recurrence is an exponential moving average of gradients. `torch.optim.SGD`'s
    ``v <- mu v + (1 - dampening) g`` is the same with ``mu = dampening = 1 - beta``, except for its first value (see
    `CompositeMomentum`).

    Args:
        buf: ``v_{k-1}``, any shape. Left unchanged.
        grad: ``g_k``, same shape.
        beta: weight of the new gradient, 0 < beta <= 1; 1 discards the past.

    Returns:
        ``v_k``, a new tensor.

    Raises:
        ValueError: if beta is outside (0, 1].

    Example:
        >>> momentum_update(torch.tensor([1.0]), torch.tensor([3.0]), beta=0.5)
        tensor([2.])

    Reference:
        arXiv 2403.00853, the momentum step of the algorithm.
    """
    return momentum_update_(buf.clone(), grad, _check_beta(beta))


def momentum_update_(buf: Tensor, grad: Tensor, beta: float) -> Tensor:
    """`momentum_update` in place: ``buf`` becomes ``v_k`` and is returned. Beta is not checked."""
    if beta == 1:  # 0 * v would keep past infinities and NaN
        return buf.copy_(grad)
    return buf.mul_(1 - beta).add_(grad, alpha=beta)


class CompositeMomentum(Optimizer):
    """Momentum as the paper analyses it: ``v <- (1 - beta) v + beta g``, then ``w <- w - lr v``.

    Beta is the weight of the *new* gradient: ``beta=0.1`` corresponds to a momentum of 0.9 elsewhere, and ``beta=1`` is
    plain SGD, bit for bit. The first value of v matters: with ``"gradient"``, the first gradient enters the sum of all
    steps with weight 1/beta instead of 1.

    ============ ===================== ====================================================================
    first_step   start                 equivalent to
    ============ ===================== ====================================================================
    "zero"       ``v_{-1} = 0``        ``SGD(lr=lr * beta, momentum=1 - beta)``; the form of the analysis
    "gradient"   ``v_0 = g_0``         ``SGD(lr, momentum=1 - beta, dampening=1 - beta)``; the form of the
                                       paper's experiments
    ============ ===================== ====================================================================

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
        _check_names(others, strict=True)
        defaults = {
            "lr": lr,
            "beta": beta,
            "first_step": first_step,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "normalize": normalize,
        }
        _check_options(defaults)
        super().__init__(_checked(params), defaults)

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
            _check_options({**group, "lr": 1.0})  # except lr, which a schedule may have taken to 0
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("normalize", False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Options that it does not set come from the constructor."""
        _check_names(param_group, strict=False)
        _check_options({**self.defaults, **param_group})
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
            _check_beta(group["beta"])  # it may have been scheduled or changed by hand
            pairs = [(p, g) for p in group["params"] if (g := p.grad) is not None]
            _check_gradients(pairs)
            if group["beta"] != 1:
                _check_momentum(pairs, group["beta"])
            pending.append((group, pairs))
        moved = [(group, *self._average(group, pairs)) for group, pairs in pending if pairs]
        norm = _norm([v for group, _, bufs in moved if group["normalize"] for v in bufs])
        for group, params, bufs in moved:
            lr = float(group["lr"])
            if not group["normalize"]:
                _move(params, bufs, lr, group["foreach"])
            elif norm != 0:  # v = 0 has no direction; a NaN reaches the weights, where it shows
                _move(
                    params, [v / norm for v in bufs], lr, group["foreach"]
                )  # lr / norm may be too large for a float16
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
        if _together(group["foreach"], params):
            _momentum_updates_(moving_bufs, moving_grads, beta)
        else:
            for v, g in zip(moving_bufs, moving_grads, strict=True):
                momentum_update_(v, g, beta)
        return params, bufs


class LambdaBeta:
    """Schedules beta in each group: ``beta_k = beta_0 * factor(k)``, like `LambdaLR` for the step size.

    The constructor sets ``beta_0 * factor(0)``, and each `step` advances k by one. The state is the step number and the
    initial betas; the function itself is not saved.

    Args:
        optimizer: an optimizer with ``"beta"`` in its groups.
        factor: a function of the step number 0, 1, 2, ..., or a list with one for each group.

    Raises:
        TypeError: if a group has no beta.
        ValueError: if the number of functions differs from the number of groups, or a beta leaves (0, 1].

    Example:
        >>> optimizer = CompositeMomentum([torch.nn.Parameter(torch.zeros(1))], lr=0.1, beta=0.5)
        >>> schedule = LambdaBeta(optimizer, lambda k: 1 / (1 + k))
        >>> schedule.step()
        >>> schedule.get_last_beta()
        [0.25]
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float] | Iterable[Callable[[int], float]]) -> None:
        groups = optimizer.param_groups
        if any("beta" not in group for group in groups):
            raise TypeError(f"LambdaBeta needs an optimizer with a beta; got {type(optimizer).__name__}.")
        factors = [factor] * len(groups) if callable(factor) else list(factor)
        if len(factors) != len(groups):
            raise ValueError(f"wanted one function, or one for each of the {len(groups)} groups; got {len(factors)}.")
        self.optimizer = optimizer
        self.factors = factors
        self.base_betas = [float(group["beta"]) for group in groups]
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Set the next step's beta. Call this after ``optimizer.step()``."""
        self.last_step += 1
        self._apply()

    def get_last_beta(self) -> list[float]:
        """The current betas, one for each group."""
        return [float(group["beta"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The step number and the initial betas."""
        return {"last_step": self.last_step, "base_betas": list(self.base_betas)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved schedule."""
        self.last_step = int(state_dict["last_step"])
        self.base_betas = [float(beta) for beta in state_dict["base_betas"]]
        self._apply()

    def _apply(self) -> None:
        for group, base, factor in zip(self.optimizer.param_groups, self.base_betas, self.factors, strict=True):
            group["beta"] = _check_beta(base * factor(self.last_step))


def _checked(params: Any) -> list[Any]:
    """Parameters, pairs of names and parameters, or groups, as a list.

    Raises:
        TypeError: for anything else.
        ValueError: for none.
    """
    if isinstance(params, (torch.nn.Module, Tensor, str, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(f"wanted parameters, such as model.parameters(); got {params!r:.80}.")
    found = list(params)
    if not found:
        raise ValueError("wanted parameters, such as model.parameters(); got none.")
    for each in found:
        if not isinstance(each, (Tensor, dict, tuple)):
            raise TypeError(f"wanted parameters, such as model.parameters(); got a {type(each).__name__} among them.")
    return found


def _descent_gradient(p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient to average, with sign and weight decay applied. ``p.grad`` itself does not change."""
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"]:
        grad = grad.add(p, alpha=group["weight_decay"])
    return grad


def _together(foreach: bool | None, params: list[Tensor]) -> bool:
    if foreach is None:
        return all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    return foreach


def _move(params: list[Tensor], bufs: list[Tensor], lr: float, foreach: bool | None) -> None:
    """``w <- w - lr v``."""
    if _together(foreach, params):
        for ps, vs in _by_kind(params, bufs):
            torch._foreach_add_(ps, vs, alpha=-lr)
    else:
        for p, v in zip(params, bufs, strict=True):
            p.add_(v, alpha=-lr)


def _norm(bufs: list[Tensor]) -> float:
    """The norm of the whole of v. It is wider than 16 bits, in which squares would overflow or vanish."""
    parts = [torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in bufs]
    return math.hypot(*map(float, parts))


def _by_kind(*lists: list[Tensor]) -> Iterable[tuple[list[Tensor], ...]]:
    """Split the lists into groups of one device and dtype, as torch's multi-tensor functions need them."""
    if len({(x.device, x.dtype) for x in lists[0]}) <= 1:
        return (lists,) if lists[0] else ()
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        kinds.setdefault((row[0].device, row[0].dtype), []).append(row)
    return [tuple([row[i] for row in rows] for i in range(len(lists))) for rows in kinds.values()]


def _momentum_updates_(bufs: list[Tensor], grads: list[Tensor], beta: float) -> None:
    for vs, gs in _by_kind(bufs, grads):
        if beta == 1:
            torch._foreach_copy_(vs, gs)
        elif vs[0].is_cpu and vs[0].element_size() == 2:
            # _foreach_mul_ would round 1 - beta to 16 bits: in bfloat16, 0.99 becomes 0.988, a beta of 0.012
            for v, g in zip(vs, gs, strict=True):
                momentum_update_(v, g, beta)
        else:
            torch._foreach_mul_(vs, 1 - beta)
            torch._foreach_add_(vs, gs, alpha=beta)


def _check_momentum(pairs: list[tuple[Tensor, Tensor]], beta: float) -> None:
    """Refuse to average gradients that the workers have averaged (`metamom.server.aggregate.deliver` notes these)."""
    spec = averaged_by(p for p, _ in pairs)
    if spec is not None:
        raise ValueError(
            f"{spec} carries the momentum on the workers, so the server must have none: use "
            f"CompositeMomentum(beta=1), and no schedule of beta; got beta={beta}."
        )


def _check_gradients(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for p, g in pairs:
        if g.layout is not torch.strided:
            raise TypeError(
                f"CompositeMomentum needs dense gradients; got one with layout {g.layout} for a parameter of shape "
                f"{tuple(p.shape)}. Its average would be dense after one step: use sparse=False in the embedding."
            )


def _check_beta(beta: float) -> float:
    if not 0 < beta <= 1:
        raise ValueError(
            f"beta is the weight of the new gradient and must be in (0, 1]; got {beta}. "
            "A momentum of 0.9 elsewhere is beta=0.1 here; plain SGD is beta=1."
        )
    return beta


def _check_names(options: Mapping[str, Any], *, strict: bool) -> None:
    """Refuse other optimizers' options; if strict, all unknown ones. Groups may hold keys of schedulers or users."""
    for name, value in options.items():
        if name in INSTEAD:
            cure = INSTEAD[name]
            if name == "momentum" and isinstance(value, (int, float)) and 0 <= value < 1:
                cure = f"momentum={value} is beta={1 - value:.12g} here"
            raise TypeError(f"CompositeMomentum has no option {name!r}: {cure}.")
        if strict:
            raise TypeError(
                f"CompositeMomentum has no option {name!r}; its options are lr, beta, first_step, weight_decay, "
                "maximize, foreach and normalize."
            )


def _check_options(options: dict[str, Any]) -> None:
    lr = options["lr"]
    for name in ("lr", "beta", "weight_decay"):
        if not isinstance(options[name], Tensor):
            check_number(name, options[name])
        elif options[name].numel() != 1:
            shape = tuple(options[name].shape)
            raise ValueError(f"{name} must be a number or a tensor with one element; got shape {shape}.")
    if not 0 < float(lr) < math.inf:
        raise ValueError(f"lr is the step size and must be > 0 and finite; got {lr}.")
    _check_beta(options["beta"])
    if not is_word(options["first_step"], ("zero", "gradient")):
        raise ValueError(f'first_step must be "zero" or "gradient"; got {options["first_step"]!r}.')
    if not 0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite; got {options['weight_decay']}.")
