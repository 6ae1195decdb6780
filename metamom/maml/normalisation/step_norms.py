"""Scale and offset of batch normalisation, learned for each inner step.

Legend: T tasks, J inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metamom.maml.estimators import ESTIMATORS, Estimator
from metamom.nets.layers import BatchNormReLU

PREFIX = "step_norms."  # of their names among the meta-parameters


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable scales and offsets of a model's batch and instance normalisation layers, by name."""
    kinds = nn.modules.batchnorm._NormBase, BatchNormReLU
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    found = {}
    for name, layer in layers.items():
        for own, p in layer.named_parameters(prefix=name, recurse=False):
            if p.requires_grad:
                found[own] = p
    return found


class StepNorms(nn.Module):
    """Values of the normalisations' scales and offsets after 0, 1, ..., J inner steps, ``[J + 1, *shape]`` each.

    The weights after j steps are used with row j, on the support and the query set; inner steps do not change them.
    After more than J steps, the last row is used. They replace the model's own scales and offsets, which stay as they
    were.

    Args:
        model: gives the first values, the same for each step.
        steps: J.

    Raises:
        ValueError: for a model without such layers.

    Reference:
        Antoniou, Edwards, Storkey (2019), "How to train your MAML", section 4: per-step batch normalisation weights
        and biases.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        found = norm_parameters(model)
        if not found:
            raise ValueError(
                "step_norms=True learns the scale and offset of batch normalisation for each inner step, and this "
                "model has no trainable ones. Leave it out, or use layers with affine=True."
            )
        self._places = {name: name.replace(".", ":") for name in found}  # names of parameters have no dots
        for name, p in found.items():
            self.register_parameter(self._places[name], nn.Parameter(p.detach().expand(steps + 1, *p.shape).clone()))

    @property
    def names(self) -> frozenset[str]:
        """The names of the model's parameters that they replace."""
        return frozenset(self._places)

    def learned(self) -> dict[str, Tensor]:
        """The rows by their key among the meta-parameters, ``"step_norms.NAME"``, but for frozen ones."""
        return {PREFIX + name: rows for name, rows in self._rows().items() if rows.requires_grad}

    def fixed(self) -> dict[str, Tensor]:
        """The rows that were frozen (``requires_grad_(False)``), by the name of the model's parameter."""
        return {name: rows for name, rows in self._rows().items() if not rows.requires_grad}

    def _rows(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(place) for name, place in self._places.items()}


def check_step_norms(estimator: Estimator) -> None:
    """Refuse tracked estimators, where weights of another step meet the query set, and ones without steps.

    Raises:
        ValueError: with what to do.
    """
    if ESTIMATORS[estimator].averages is not None:
        raise ValueError(
            f"estimator {estimator!r} uses a moving average of weights, which belongs to no inner step: leave out "
            "step_norms=True, or use estimator='exact'."
        )
    if ESTIMATORS[estimator].proximal:
        raise ValueError(
            f"estimator {estimator!r} adapts by solving a problem, not by inner steps: leave out step_norms=True, or "
            "use estimator='exact'."
        )


def after(rows: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The scales and offsets to use after some inner steps.

    Args:
        rows: by the name of the model's parameter, ``[T, J + 1, *shape]``.
        step: how many steps were taken, >= 0.

    Returns:
        ``[T, *shape]`` by name.

    Example:
        >>> import torch
        >>> after({"norm.bias": torch.tensor([[0.0, 1.0]])}, 5)
        {'norm.bias': tensor([1.])}
    """
    return {name: x[:, min(step, x.shape[1] - 1)] for name, x in rows.items()}
