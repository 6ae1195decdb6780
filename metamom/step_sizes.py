"""Inner step sizes: one number, one for each tensor or entry, fixed or learned (Meta-SGD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

LearnInnerLR = bool | Literal["scalar", "tensor", "entry"]


class StepSizes(nn.Module):
    """The inner step size alpha of every adapted parameter.

    Args:
        inner_lr: a positive number for all; or a mapping from parameter names to positive numbers or to tensors
            that are scalar or of the parameter's shape.
        adapted: the adapted parameters by name.
        learn: ``False`` keeps them as given; ``"scalar"`` learns one number for all, ``"tensor"`` one for each
            parameter tensor, ``"entry"`` (or ``True``) one for each entry, which is Meta-SGD.

    Raises:
        ValueError: for a step size that is not positive and finite, a missing or unknown name, or a wrong shape.

    Reference:
        Li, Zhou, Chen, Li, "Meta-SGD" (2017) for ``"entry"``; not to be mixed up with plain meta-SGD, beta = 1.
    """

    def __init__(
        self, inner_lr: float | Mapping[str, float | Tensor], adapted: Mapping[str, Tensor], learn: LearnInnerLR
    ) -> None:
        super().__init__()
        kind = "entry" if learn is True else learn
        if kind not in (False, "scalar", "tensor", "entry"):
            raise ValueError(f'learn_inner_lr must be a bool, "scalar", "tensor" or "entry"; got {learn!r}.')
        if kind == "scalar" and isinstance(inner_lr, Mapping):
            raise ValueError('learn_inner_lr="scalar" learns one number: pass inner_lr as one number too.')
        given = dict(inner_lr) if isinstance(inner_lr, Mapping) else dict.fromkeys(adapted, inner_lr)
        if set(given) != set(adapted):
            raise ValueError(
                f"inner_lr needs one step size for each adapted parameter, {sorted(adapted)}; "
                f"missing {sorted(set(adapted) - set(given))}, unknown {sorted(set(given) - set(adapted))}."
            )
        self.shared = kind == "scalar"
        self.fixed: dict[str, float] = {}
        # prefixed, for a model may name a parameter as this module names something of its own ("shared", "training")
        self._attributes = {name: "alpha" if self.shared else f"alpha:{name.replace('.', ':')}" for name in adapted}
        for name, parameter in adapted.items():
            value = _checked(name, given[name], parameter)
            if kind is False:
                if isinstance(value, Tensor):
                    self.register_buffer(self._attributes[name], value)
                else:
                    self.fixed[name] = value
            elif self._attributes[name] not in self._parameters:
                size = parameter.shape if kind == "entry" else ()
                start = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
                if kind == "tensor" and start.dim():
                    raise ValueError(f'learn_inner_lr="tensor" learns one number a tensor; got a tensor for {name}.')
                self.register_parameter(self._attributes[name], nn.Parameter(start.expand(size).clone()))

    def describe(self) -> dict[str, Any]:
        """What is fixed and what is learned, as JSON values; learned values are in the state dict instead."""
        tensors = {n: self.get_buffer(a).tolist() for n, a in self._attributes.items() if a in self._buffers}
        return {"fixed": {**self.fixed, **tensors}, "learned": sorted(self.learned())}

    def learned(self) -> dict[str, Tensor]:
        """The learned step sizes by their key among the meta-parameters, ``"inner_lr.NAME"`` or ``"inner_lr"``."""
        if self.shared:
            return {"inner_lr": self.get_parameter("alpha")}
        return {f"inner_lr.{n}": p for n, a in self._attributes.items() if (p := self._parameters.get(a)) is not None}

    def of(self, name: str, learned: Mapping[str, Tensor], dim: int) -> float | Tensor:
        """Alpha of one parameter, in a form that multiplies its gradients ``[T, *shape]``.

        Args:
            name: an adapted parameter.
            learned: values to use for what `learned` names, each with a leading task axis.
            dim: number of dimensions of those gradients, the task axis among them.
        """
        if name in self.fixed:
            return self.fixed[name]
        key = "inner_lr" if self.shared else f"inner_lr.{name}"
        if key in learned:
            alpha = learned[key]
            return alpha.reshape(alpha.shape + (1,) * (dim - alpha.dim()))  # one number a task stays with its task
        return self.get_buffer(self._attributes[name])


def _checked(name: str, value: float | Tensor, parameter: Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"the inner step size of {name} must be a number or have its shape {tuple(parameter.shape)}; "
                f"got {tuple(value.shape)}."
            )
        if not bool((value > 0).all() and value.isfinite().all()):
            raise ValueError(f"inner step sizes must be > 0 and finite; {name} has others.")
        return value.detach().to(parameter.dtype)
    if not 0 < float(value) < math.inf:
        raise ValueError(f"inner_lr must be > 0 and finite; got {value} for {name}.")
    return float(value)
