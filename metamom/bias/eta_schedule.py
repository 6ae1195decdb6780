"""A schedule of the workers' momentum: the weight of the new gradient in `EF21SGDM`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metamom.bias.feedback import EF21SGDM
from metamom.common.kinds import named_type


class LambdaEta:
    """Schedules an operator's eta: ``eta_k = eta_0 * factor(k)``, like `metamom.LambdaBeta` for an optimizer's beta.

    The constructor sets ``eta_0 * factor(0)``, and each `step` advances k by one. Pass it to `metamom.train` as one of
    the ``schedulers``. The state is the step number and eta_0; the function itself is not saved.

    Args:
        operator: the operator with momentum on the workers.
        factor: a function of the step number 0, 1, 2, ...

    Raises:
        TypeError: for another operator.
        ValueError: if an eta leaves (0, 1].

    Example:
        >>> from metamom.bias import EF21SGDM, LambdaEta, TopK
        >>> operator = EF21SGDM(TopK(k=1), eta=1.0)
        >>> schedule = LambdaEta(operator, lambda k: (k + 1) ** -0.5)
        >>> for _ in range(3):
        ...     schedule.step()
        >>> operator.eta
        0.5
    """

    def __init__(self, operator: EF21SGDM, factor: Callable[[int], float]) -> None:
        if not isinstance(operator, EF21SGDM):
            raise TypeError(f"LambdaEta needs an operator with an eta, such as EF21SGDM; got {named_type(operator)}.")
        self.operator = operator
        self.factor = factor
        self.base_eta = operator.eta
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Set the next step's eta. Call this after the workers' gradients of this step have passed the operator."""
        self.last_step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """The step number and the initial eta."""
        return {"last_step": self.last_step, "base_eta": self.base_eta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved schedule."""
        self.last_step = int(state_dict["last_step"])
        self.base_eta = float(state_dict["base_eta"])
        self._apply()

    def _apply(self) -> None:
        eta = self.base_eta * self.factor(self.last_step)
        if not 0 < eta <= 1:
            raise ValueError(f"eta must stay in (0, 1]; got {eta} after {self.last_step} steps of the schedule.")
        self.operator.eta = eta
