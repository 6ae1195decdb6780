"""A scheduler for beta."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

from metamom.optim.checks import check_beta


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
        >>> import torch
        >>> from metamom import CompositeMomentum
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
            group["beta"] = check_beta(base * factor(self.last_step))
