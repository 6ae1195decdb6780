"""The part of the optimizer that takes gradients where a variant of the momentum needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.common.choices import FOLLOWING, Variant
from metamom.optim.groups import take_scheduled_momentum
from metamom.optim.sharded import check_weights_are_known
from metamom.optim.variants import (
    Changes,
    at,
    extrapolated,
    gradient_change,
    hessian_change,
    not_evaluated,
    variant_of,
    with_decay,
)

R = TypeVar("R")


class Following(Optimizer):
    """An optimizer with a momentum that may follow the weights (`metamom.optim.variants`).

    Attributes:
        _waiting: parameters with a momentum that no gradient has entered yet.
        _changes: of the momentum, for the next step; ``None`` if nobody has computed them.
    """

    _waiting: set[Tensor]
    _changes: Changes | None

    @property
    def variant(self) -> Variant | None:
        """The variant of all groups."""
        return variant_of(self.param_groups)

    def evaluate(self, closure: Callable[[], R]) -> R:
        """Call a closure at the points where the variant takes its gradients; the next `step` needs no closure then.

        ``step(closure)`` is this and ``step()``. Call it by itself if something happens between the two. `zero_grad`
        discards what it has found.

        Args:
            closure: as of `step`.

        Returns:
            What the closure returned, at w or at the extrapolated point.

        Raises:
            ValueError: under ZeroRedundancyOptimizer, where no process can set all weights.
        """
        variant = self.variant
        changes: Changes | None = None
        with torch.enable_grad():
            if variant == "igt":
                check_weights_are_known(variant)
                for group in self.param_groups:
                    take_scheduled_momentum(group)
                betas = {p: group["beta"] for group in self.param_groups for p in group["params"]}
                with at({p: extrapolated(p, w, betas[p]) for p, w in self.previous().items()}):
                    found = closure()
                changes = {}
            elif variant == "storm":
                check_weights_are_known(variant)
                params = [p for group in self.param_groups for p in group["params"]]
                found, changes = gradient_change(params, self.previous(), closure)
            else:
                found = closure()
        self._changes = changes
        return found

    def previous(self) -> dict[Tensor, Tensor]:
        """``w_prev``: the weights of the last step, of parameters that have had a gradient. Not copied."""
        kept = {p: each["previous"] for p, each in self.state.items() if "previous" in each}
        return {p: w for p, w in kept.items() if p not in self._waiting}

    def transport(self, changes: Changes) -> None:
        """Have the next `step` add a change to the momentum: ``v <- (1 - beta)(v + c) + beta g``.

        For those who compute it themselves: of ``"storm"`` ``g(w) - g(w_prev)``, of ``"hessian"`` the Hessian times
        ``w - w_prev``. See `previous`.

        Args:
            changes: c of each parameter, of its shape; of parameters that are missing, it is zero.

        Raises:
            ValueError: without such a variant.
        """
        if self.variant not in FOLLOWING:
            raise ValueError(f"only variants {', '.join(FOLLOWING)} change the momentum; got {self.variant!r}.")
        self._changes = changes

    def _taken_changes(self) -> Changes:
        """The changes of the momenta in this step, of what they average."""
        variant, changes, self._changes = self.variant, self._changes, None
        if variant not in FOLLOWING:
            return {}
        previous = self.previous()
        if changes is None and variant == "hessian":
            check_weights_are_known(variant)
            changes = hessian_change((p for group in self.param_groups for p in group["params"]), previous)
        if changes is None:
            raise not_evaluated(variant)
        return with_decay(changes, previous, self.param_groups)
