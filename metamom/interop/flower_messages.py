"""What Flower's clients and server agree on: the records of their messages, and the operator."""

from __future__ import annotations

from typing import Any

import torch

from metamom.bias import Bias, BiasOperator, Identity, as_operator
from metamom.interop.imports import import_flower
from metamom.maml.learner import MAML

flower = import_flower()

SPEC, DELIVERED = "metamom.bias", "metamom.delivered"  # what the server tells a client besides the round


def to_arrays(learner: MAML) -> Any:
    """The meta-parameters of a learner as Flower's ``ArrayRecord``, with which a strategy starts.

    Learned inner step sizes (Meta-SGD) are among them. Parameters in bfloat16, which NumPy lacks, travel as float32.
    """
    weights = {name: p.detach() for name, p in learner.meta_parameters().items()}
    return record_of({name: w.float() if w.dtype == torch.bfloat16 else w for name, w in weights.items()})


@torch.no_grad()
def from_arrays(learner: MAML, arrays: Any) -> None:
    """Set the meta-parameters of a learner to those of an ``ArrayRecord``, such as ``result.arrays``.

    Raises:
        ValueError: for arrays of other names, in another order, or of other shapes.
    """
    weights = learner.meta_parameters()
    if list(arrays) != list(weights):
        odd = sorted(set(arrays) ^ set(weights)) or ["their order"]
        raise ValueError(
            f"the arrays are not the learner's meta-parameters: {', '.join(odd)} differs. Start the strategy from "
            "to_arrays(learner), with the same learner on all sides."
        )
    for name, weight in weights.items():
        array = torch.from_numpy(arrays[name].numpy())
        if array.shape != weight.shape:
            raise ValueError(f"{name} has shape {list(weight.shape)}; got an array of {list(array.shape)}.")
        weight.copy_(array)


def shared_operator(bias: Bias) -> BiasOperator:
    """The operator, if clients can share it."""
    operator = as_operator(bias) or Identity()
    if not operator.separable:
        raise ValueError(
            f"{operator.spec} draws from a generator in the order of calls, which clients do not share: make it with "
            "seed= in place of generator=."
        )
    return operator


def record_of(tensors: dict[str, Any]) -> Any:
    """Tensors as an ``ArrayRecord``."""
    return flower.app.ArrayRecord({name: flower.app.Array(tensor.detach().cpu()) for name, tensor in tensors.items()})
