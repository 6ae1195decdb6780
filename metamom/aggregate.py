"""From the workers' gradients to one gradient: the server's half of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.bias import Bias, as_operator


def flatten(grads: dict[str, Tensor]) -> Tensor:
    """Each worker's gradient as one vector: ``{name: [n, *shape]} -> [n, d]``, tensors in the order of the dict."""
    return torch.cat([g.reshape(g.shape[0], g[0].numel()) for g in grads.values()], dim=1)


def unflatten(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """One vector ``[d]`` cut back into tensors, shaped as a worker's in ``like: {name: [n, *shape]}``."""
    pieces = torch.split(vector, [g[0].numel() for g in like.values()])
    return {name: piece.view(g.shape[1:]).to(g.dtype) for (name, g), piece in zip(like.items(), pieces, strict=True)}


def aggregate(grads: dict[str, Tensor], bias: Bias = None) -> tuple[dict[str, Tensor], dict[str, float | int | None]]:
    """The mean of the workers' gradients, each after its operator: ``g = 1/n sum_i C(g_i)``.

    Args:
        grads: ``{name: [n, *shape]}``.
        bias: the operator C on flattened gradients ``[n, d]``, or a function ``[d] -> [d]``; ``None`` for the plain
            mean.

    Returns:
        ``({name: [*shape]}, report)``, the report with ``grad_norm``, ``bias_error`` and ``wire_bytes`` as
        `metamom.maml.Backward` explains them.

    Reference:
        arXiv 2403.00853, the server's averaging.
    """
    flat = flatten(grads)
    workers, d = flat.shape
    mean = flat.mean(0)
    operator = as_operator(bias)
    if operator is None:
        total, error, wire = mean, 0.0, d * flat.element_size()
    else:
        total = operator(flat).mean(0)
        norm = float(mean.norm())
        error = float((total - mean).norm()) / norm if norm else 0.0
        wire = operator.wire_bytes(d, flat.element_size())
    report: dict[str, float | int | None] = {
        "grad_norm": float(total.norm()),
        "bias_error": error,
        "wire_bytes": workers * wire,
    }
    return unflatten(total, grads), report
