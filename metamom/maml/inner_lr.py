"""Inner step sizes: one for all parameters, for each tensor or for each entry; fixed or learned (Meta-SGD).

Legend: T tasks, J inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.checks import check_number
from metamom.common.choices import LEARNED_STEP_SIZES
from metamom.common.choices import LearnInnerLR as LearnInnerLR


class StepSizes(nn.Module):
    """The inner step size alpha of every adapted parameter.

    Args:
        inner_lr: a positive number for all; or a mapping from parameter names to positive numbers or to tensors
            that are scalar or have the parameter's shape. Leaf tensors that require a gradient are learned in place.
            Of one number for each entry, as Meta-SGD learns, some may be negative.
        adapted: the adapted parameters by name.
        learn: ``False`` keeps them as given; ``"scalar"`` learns one number for all, ``"tensor"`` one for each
            parameter tensor, ``"tensor-step"`` one for each tensor and inner step (MAML++), ``"entry"`` (or ``True``)
            one for each entry, which is Meta-SGD.
        steps: J, which only ``"tensor-step"`` reads. Further steps use the size of the last one.
        positive: learn log alpha in place of alpha, so that step sizes stay positive, and an outer step changes them by
            a factor. The learned tensors are the logarithms.

    Raises:
        ValueError: for a step size that is not positive and finite, a missing or unknown name, a wrong shape, or one
            that requires a gradient and is not a leaf.

    Reference:
        Li, Zhou, Chen, Li, "Meta-SGD" (2017) for ``"entry"``; not to be confused with plain meta-SGD, beta = 1.
        Antoniou, Edwards, Storkey, "How to train your MAML" (2019) for ``"tensor-step"``.
    """

    def __init__(
        self,
        inner_lr: float | Tensor | Mapping[str, float | Tensor],
        adapted: Mapping[str, Tensor],
        learn: LearnInnerLR,
        steps: int = 1,
        positive: bool = False,
    ) -> None:
        super().__init__()
        self.kind = "entry" if learn is True else learn
        self.positive = positive
        _check_learned(learn, inner_lr, positive)
        self._steps = steps
        given = dict(inner_lr) if isinstance(inner_lr, Mapping) else dict.fromkeys(adapted, inner_lr)
        if set(given) != set(adapted):
            raise ValueError(
                f"inner_lr needs one step size for each adapted parameter, {sorted(adapted)}; "
                f"missing {sorted(set(adapted) - set(given))}, unknown {sorted(set(given) - set(adapted))}."
            )
        one_tensor = not isinstance(inner_lr, Mapping) and torch.is_tensor(inner_lr) and inner_lr.requires_grad
        self.shared = self.kind == "scalar" or one_tensor
        self.fixed: dict[str, float] = {}
        # prefixed, since a parameter may share its name with an attribute of this module ("shared", "training")
        self._attributes = {name: "alpha" if self.shared else f"alpha:{name.replace('.', ':')}" for name in adapted}
        for name, parameter in adapted.items():
            by_step = (steps,) if self.kind == "tensor-step" else None
            value, place = _checked(name, given[name], parameter, by_step, positive), self._attributes[name]
            if isinstance(value, Tensor) and value.requires_grad:
                if self.kind is not False or not value.is_leaf:
                    raise ValueError(
                        f"the inner step size of {name} requires a gradient, so it must be a leaf tensor, such as an "
                        "nn.Parameter, and learn_inner_lr must be left out. To learn a copy of it instead, pass it "
                        'detached, with learn_inner_lr="scalar", "tensor" or "entry".'
                    )
                if value.dtype != parameter.dtype:
                    raise ValueError(
                        f"a learned inner step size has the dtype of its parameter, {parameter.dtype}; got "
                        f"{value.dtype} for {name}."
                    )
                self._register(place, value)
            elif self.kind is False:
                if isinstance(value, Tensor):
                    self._register(place, value)
                else:
                    self.fixed[name] = value
            elif place not in self._parameters:
                size = parameter.shape if self.kind == "entry" else by_step or ()
                start = torch.as_tensor(value, dtype=parameter.dtype, device=parameter.device)
                if self.kind == "tensor" and start.dim():
                    raise ValueError(f'learn_inner_lr="tensor" learns one number per tensor; got a tensor for {name}.')
                start = start.log() if positive else start
                self._register(place, nn.Parameter(start.expand(size).clone()))

    def assign(self, inner_lr: float | Tensor | Mapping[str, float | Tensor], adapted: Mapping[str, Tensor]) -> None:
        """Set new step sizes. Learned ones are updated in place and keep learning from the new values.

        Args:
            inner_lr: numbers or tensors, as for a new `StepSizes`, that do not require a gradient.
            adapted: the adapted parameters by name.

        Raises:
            ValueError: as a new `StepSizes`, and for a tensor that requires a gradient.
        """
        other = StepSizes(inner_lr, adapted, self.kind, self._steps, self.positive)
        if other.kind is False and other.learned():
            raise ValueError(
                "an inner_lr that requires a gradient must be given when the learner is made: MAML(..., inner_lr=...)."
            )
        if self.shared and isinstance(inner_lr, Mapping):
            raise ValueError(
                f"all parameters share one learned inner step size; got one per parameter for {sorted(inner_lr)}."
            )
        for name, place in self._attributes.items():
            mine = self._registered(place)
            if name in adapted:
                new = other.fixed.get(name, other._registered(other._attributes[name]))
            elif isinstance(inner_lr, Mapping):
                continue  # of a parameter that is frozen now, which keeps its own for later
            else:
                new = torch.as_tensor(inner_lr).log() if self.positive else inner_lr
            assert new is not None
            if mine is not None and (mine.requires_grad or self.kind is not False):
                with torch.no_grad():
                    mine.copy_(torch.as_tensor(new, dtype=mine.dtype))
                continue
            self.fixed.pop(name, None)
            self._buffers.pop(place, None)
            if isinstance(new, Tensor):
                self._register(place, new)
            else:
                self.fixed[name] = new

    def follow(self, adapted: Mapping[str, Tensor]) -> None:
        """Assign step sizes to new adapted parameters. Known ones keep theirs, others get the number that all share.

        Args:
            adapted: the new adapted parameters by name.

        Raises:
            ValueError: for a new parameter if there is not a single number for all.
        """
        new = [name for name in adapted if name not in self._attributes]
        values = set(self.fixed.values())
        if new and (len(values) != 1 or len(self.fixed) != len(self._attributes)):
            raise ValueError(
                f"the model has new trainable parameters without an inner step size: {', '.join(new)}. Make another "
                "learner around this model, with an inner_lr for each parameter."
            )
        for name in new:
            self._attributes[name] = f"alpha:{name.replace('.', ':')}"
            self.fixed[name] = next(iter(values))

    def values(self) -> float | Tensor | dict[str, float | Tensor]:
        """The current step sizes: one number or tensor if all adapted parameters share it, else by name.

        Learned ones are the learned tensors themselves, or, if ``positive``, computed from them.
        """
        each: dict[str, float | Tensor] = dict(self.fixed)
        for name, place in self._attributes.items():
            tensor = self._registered(place)
            if tensor is not None:
                each[name] = tensor.detach().exp() if self.positive else tensor
        if self.shared or (len(self.fixed) == len(each) and len(set(self.fixed.values())) == 1):
            return next(iter(each.values()))
        return each

    def _register(self, place: str, value: Tensor) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(place, value)
        else:
            self.register_buffer(place, value)

    def _registered(self, place: str) -> Tensor | None:
        found = self._parameters.get(place)
        return self._buffers.get(place) if found is None else found

    def describe(self) -> dict[str, Any]:
        """The fixed step sizes and which ones are learned, as JSON values. The state dict holds the learned values."""
        tensors = {name: self._registered(place) for name, place in self._attributes.items()}
        fixed = {name: t.tolist() for name, t in tensors.items() if t is not None and not t.requires_grad}
        kind: dict[str, Any] = {"kind": self.kind} if self.kind == "tensor-step" else {}  # others show by their shapes
        kind |= {"positive": True} if self.positive else {}
        return {"fixed": {**self.fixed, **fixed}, "learned": sorted(self.learned()), **kind}

    def learned(self) -> dict[str, Tensor]:
        """The learned step sizes by their key among the meta-parameters, ``"inner_lr.NAME"`` or ``"inner_lr"``.

        If ``positive``, these are their logarithms.
        """
        found = {}
        for name, place in self._attributes.items():
            tensor = self._registered(place)
            if tensor is not None and tensor.requires_grad:
                found["inner_lr" if self.shared else f"inner_lr.{name}"] = tensor
        return found

    def of(self, name: str, learned: Mapping[str, Tensor], dim: int, step: int = 0) -> float | Tensor:
        """Alpha of one parameter, shaped to multiply its gradients ``[T, *shape]``.

        Args:
            name: an adapted parameter.
            learned: values of the learned step sizes, with the keys of `learned` and a leading task axis.
            dim: number of dimensions of those gradients, including the task axis.
            step: how many inner steps were taken before.
        """
        if name in self.fixed:
            return self.fixed[name]
        key = "inner_lr" if self.shared else f"inner_lr.{name}"
        if key in learned:
            alpha = learned[key]
            if self.kind == "tensor-step":
                alpha = alpha[:, min(step, alpha.shape[1] - 1)]
            alpha = alpha.exp() if self.positive else alpha
            return alpha.reshape(alpha.shape + (1,) * (dim - alpha.dim()))  # align each task's number with its task
        fixed = self._registered(self._attributes[name])
        assert fixed is not None
        if self.kind == "tensor-step":  # frozen: requires_grad_(False)
            fixed = fixed[min(step, len(fixed) - 1)]
        return fixed.exp() if self.positive else fixed


def _check_learned(
    learn: LearnInnerLR, inner_lr: float | Tensor | Mapping[str, float | Tensor], positive: bool
) -> None:
    """Refuse a kind of learned step sizes that is unknown, or does not fit the others' form."""
    if not isinstance(learn, (bool, str)) or learn not in (False, True, *LEARNED_STEP_SIZES):
        raise ValueError(f'learn_inner_lr must be a bool, "scalar", "tensor", "tensor-step" or "entry"; got {learn!r}.')
    if learn == "scalar" and isinstance(inner_lr, Mapping):
        raise ValueError('learn_inner_lr="scalar" learns one number: pass inner_lr as one number too.')
    if positive and learn is False:
        raise ValueError(
            "positive_inner_lr learns the logarithms of inner step sizes: choose which to learn, with "
            'learn_inner_lr="tensor" (--learn-inner-lr tensor), or leave it out.'
        )


def _checked(
    name: str, value: float | Tensor, parameter: Tensor, by_step: tuple[int] | None, positive: bool
) -> float | Tensor:
    if isinstance(value, Tensor):
        if by_step and value.dim() and value.shape != by_step:
            raise ValueError(
                f"the inner step sizes of {name} must be a number, or one number for each of the {by_step[0]} inner "
                f"steps; got a tensor of shape {tuple(value.shape)}."
            )
        if not by_step and value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"the inner step size of {name} must be a number or have its shape {tuple(parameter.shape)}; "
                f"got {tuple(value.shape)}."
            )
        by_entry = not by_step and value.dim() > 0 and not positive
        if not bool(value.isfinite().all() and ((value > 0).any() if by_entry else (value > 0).all())):
            also = " Of one number for each entry, some may be negative, but not all." * by_entry
            raise ValueError(f"inner step sizes must be > 0 and finite; some of {name} are not.{also}")
        return value if value.requires_grad else value.to(parameter.dtype)
    check_number(f"inner_lr of {name}", value)
    if not 0 < float(value) < math.inf:
        raise ValueError(f"inner_lr must be > 0 and finite; got {value} for {name}.")
    return float(value)
