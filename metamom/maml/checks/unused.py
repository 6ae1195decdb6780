"""Parameters without a gradient: either the model does not use them, or their graph is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from metamom.maml.inner_step import gradients

Params = dict[str, Tensor]


NEAR = 16  # distance of neighbouring values, in units of rounding
TRIES = 3


class Uses:
    """Remembers which parameters a loss does not depend on, and which of its gradients do not depend on the weights.

    Both are tested with other weight values, and tested again if a number, string or flag in a module has changed.
    """

    def __init__(self) -> None:
        self._unused: set[str] = set()
        self._constant: set[str] = set()
        self._options: Hashable = None

    def are_unused(self, names: Sequence[str], modules: Iterable[nn.Module]) -> bool:
        """Whether all were found unused before, with the modules in the same state."""
        return not names or (self._as_before(modules) and self._unused.issuperset(names))

    def are_constant(self, names: Sequence[str], modules: Iterable[nn.Module]) -> bool:
        """Whether all their gradients were found constant before, with the modules in the same state."""
        return not names or (self._as_before(modules) and self._constant.issuperset(names))

    def _as_before(self, modules: Iterable[nn.Module]) -> bool:
        options = tuple(
            (id(module), *(value for value in vars(module).values() if isinstance(value, (bool, int, float, str))))
            for module in modules
        )
        if options != self._options:
            self._options = options
            self._unused, self._constant = set(), set()
            return False
        return True

    def check_cut(self, missing: Sequence[str], weights: Params, loss: Callable[[Params], Tensor]) -> None:
        """Refuse parameters without a gradient that the loss depends on.

        Args:
            missing: their names.
            weights: all weights by name; other names are ignored.
            loss: computes the loss from weights.

        Raises:
            ValueError: naming them.
        """
        names = [name for name in missing if name in weights and name not in self._unused]
        loss = _drawing_alike(loss)
        used = changes(loss, weights, _without_gradient(loss, weights, names)) if names else []
        if used:
            raise cut_off(used)
        self._unused.update(missing)

    def check_constant(self, gradients: Mapping[str, Callable[[Params], Tensor]], weights: Params) -> None:
        """Refuse gradients that depend on the weights but have no derivative.

        Args:
            gradients: functions that compute each gradient from weights, by parameter name.
            weights: all weights by name.

        Raises:
            ValueError: naming them.
        """
        cut = [name for name, of in gradients.items() if changes(of, weights, list(weights), nearby=True)]
        if cut:
            raise differentiable_once(cut)
        self._constant.update(gradients)


def changes(
    output: Callable[[Params], Tensor], weights: Params, names: Sequence[str], *, nearby: bool = False
) -> list[str]:
    """The named weights that an output depends on, found by trying other values.

    Args:
        output: computes the output from weights; its draws from torch, NumPy and Python are repeated in each call.
        weights: all weights by name.
        names: the weights to try, one by one if the output changes when all of them change.
        nearby: whether the output must change at each of several neighbouring values. A piecewise constant output, such
            as the gradient of a piecewise linear loss, does not.
    """
    output = _drawing_alike(output)
    with torch.no_grad():
        before = output(weights)

        def matters(some: Sequence[str]) -> bool:
            others = (
                output({**weights, **{name: _other(weights[name], seed, nearby) for name in some}})
                for seed in range(TRIES if nearby else 1)
            )
            return all(not torch.equal(before.nan_to_num(), other.nan_to_num()) for other in others)

        return [name for name in names if matters([name])] if matters(names) else []


def _without_gradient(loss: Callable[[Params], Tensor], weights: Params, names: Sequence[str]) -> list[str]:
    """The named weights that get no gradient in a call of ``loss`` with its current draws."""
    at = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad():
        found = gradients(loss(at).sum(), [at[name] for name in names])
    return [name for name, gradient in zip(names, found, strict=True) if gradient is None]


def _drawing_alike(output: Callable[[Params], Tensor]) -> Callable[[Params], Tensor]:
    """Wrap a function so that it draws the same in every call and restores the generators."""

    def drawing(weights: Params) -> Tensor:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the model may use it
        try:
            with torch.random.fork_rng(devices=[]):
                return output(weights)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002

    return drawing


def cut_off(names: Sequence[str]) -> ValueError:
    """The error for parameters that the model uses but that no gradient reaches."""
    return ValueError(
        f"the loss depends on {', '.join(names)}, but no gradient reaches them: something in between cuts the graph, "
        "such as .detach(), .data, torch.no_grad(), .item(), or an autograd.Function without a derivative. Let the "
        "gradient through, or freeze what should not be trained (parameter.requires_grad_(False))."
    )


def differentiable_once(names: Sequence[str]) -> ValueError:
    """The error for parameters with gradients that depend on the weights but cannot be differentiated."""
    return ValueError(
        f"the gradient of {', '.join(names)} depends on the weights, but has no derivative: something in the model can "
        "be differentiated only once, such as an autograd.Function whose backward is once_differentiable or detaches "
        'what it computes with. Write that backward in differentiable operations, or use estimator="first-order".'
    )


def from_outside(names: Sequence[str]) -> ValueError:
    """The error for parameters that the loss reads directly, bypassing the tasks' own weights."""
    return ValueError(
        f"the loss depends on the original {', '.join(names)}, and not on each task's adapted weights: loss_fn, a "
        "hook, or a plain list (not a ModuleList or ParameterList) keeps its own reference to them. Read them from "
        "the model's registered parameters inside its forward, or make the loss an nn.Module that contains the model."
    )


def _other(weight: Tensor, seed: int, nearby: bool) -> Tensor:
    """New values of the same shape, far from the old ones or close to them."""
    if not weight.numel():
        return weight
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    scale = NEAR * torch.finfo(weight.dtype).eps * weight.abs().max() if nearby else 1 + weight.abs().max()
    return weight + noise * scale
