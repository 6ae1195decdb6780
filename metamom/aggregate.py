"""From the workers' gradients to one gradient: the server's half of a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.linalg import vector_norm

from metamom.bias import Bias, Identity, as_operator
from metamom.bias.base import Sizes
from metamom.robust import Aggregate, check_aggregate, robust_mean


def flatten(grads: Iterable[Tensor]) -> Tensor:
    """Each worker's gradient as one vector: tensors ``[n, *shape]``, in their order, to ``[n, d]``."""
    return torch.cat([g.reshape(g.shape[0], g[0].numel()) for g in grads], dim=1)


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors ``[..., d]`` cut into tensors ``{name: [..., *shape]}``, of the shapes and dtypes of ``like``."""
    lead = vectors.shape[:-1]
    if not lead and all(w.dtype is vectors.dtype for w in like.values()):  # one call for all
        pieces = _unflatten_dense_tensors(vectors, list(like.values()))  # type: ignore[no-untyped-call]
        return dict(zip(like, pieces, strict=True))
    pieces = vectors.split_with_sizes([w.numel() for w in like.values()], -1)
    return {name: piece.view(lead + w.shape).to(w.dtype) for (name, w), piece in zip(like.items(), pieces, strict=True)}


def deliver(parameter: Tensor, gradient: Tensor, bias: Bias = None) -> None:
    """Leave a gradient in ``.grad``, with a note for `CompositeMomentum` if workers average their own over steps."""
    parameter.grad = gradient
    if getattr(bias, "carries_momentum", False):
        gradient.carries_momentum = bias  # type: ignore[attr-defined]


def aggregate(
    grads: Tensor,
    bias: Bias = None,
    how: Aggregate = "mean",
    *,
    workers: Sequence[int] | None = None,
    sizes: Sizes | None = None,
) -> tuple[Tensor, dict[str, float | int | None]]:
    """One gradient of the workers', each after its operator: ``g = 1/n sum_i C(g_i)``, or a robust mean.

    Args:
        grads: ``[n, d]``, each worker's flattened gradient.
        bias: the operator C on ``[n, d]``, or a function ``[d] -> [d]``; ``None`` for none.
        how: see `metamom.robust.robust_mean`.
        workers: whose gradients these are, for operators that draw or feed back; 0, 1, ... by default.
        sizes: the numbers of entries of the parameter tensors, for operators that act on each by itself.

    Returns:
        ``(g [d], report)``, the report with ``grad_norm``, ``bias_error`` and ``wire_bytes`` as
        `metamom.maml.Backward` explains them.

    Raises:
        ValueError: by the operator; for a spelling of ``how`` that means nothing, or that trims off none of n workers.

    Reference:
        arXiv 2403.00853, the server's averaging.
    """
    n, d = grads.shape
    mean = grads.mean(0) if n > 1 else grads[0]
    operator = as_operator(bias)
    if operator is None and how == "mean":
        total, error = mean, 0.0
    else:
        check_aggregate(how, n)
        # a robust mean would swallow one worker's NaN, so that operators' own check is wanted here too
        total = robust_mean((operator or Identity())(grads, workers=workers, sizes=sizes), how)
        norm = float(vector_norm(mean))
        error = float(vector_norm(total - mean)) / norm if norm else 0.0
    size = grads.element_size()
    wire = d * size if operator is None else operator.wire_bytes(d, size, sizes)
    report: dict[str, float | int | None] = {
        "grad_norm": float(vector_norm(total)),
        "bias_error": error,
        "wire_bytes": n * wire,
    }
    return total, report
