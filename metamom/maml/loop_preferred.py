"""Models that vmap can take, and that run faster task by task.

Weight norm and spectral norm make a matrix of each task from the matrix that the inner steps move. If gradients stay
thin factors (`metamom.nets.low_rank`), weight norm needs no such matrix. Otherwise every derivative passes over the
matrices of all tasks, which leave the caches; a loop passes over one at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from metamom.nets.low_rank import fits

SMALLEST = 2**14  # entries of a matrix: below, the loop's Python calls take longer


def faster_in_a_loop(model: nn.Module, adapted: Collection[str], points: int) -> bool:
    """Whether inner steps move a large matrix under spectral norm in ``eval()``, or under weight norm with many points.

    It depends on shapes alone, so that the same run makes the same choice everywhere.

    Args:
        model: the model.
        adapted: the names of the parameters that inner steps move.
        points: N, the number of points of a task.

    Example:
        >>> from torch.nn.utils.parametrizations import weight_norm
        >>> model = weight_norm(nn.Linear(256, 128))
        >>> names = dict(model.named_parameters())
        >>> faster_in_a_loop(model, names, points=5), faster_in_a_loop(model, names, points=50)
        (False, True)
    """
    return any(
        isinstance(module, nn.Linear) and is_parametrized(module, "weight") and _is_slow(name, module, adapted, points)
        for name, module in model.named_modules()
    )


def _is_slow(name: str, module: nn.Linear, adapted: Collection[str], points: int) -> bool:
    every: Any = module.parametrizations
    chain = every.weight
    out, fan_in = module.out_features, module.in_features
    prefix = f"{name}.parametrizations.weight.original" if name else "parametrizations.weight.original"
    if out * fan_in < SMALLEST or not any(each.startswith(prefix) for each in adapted):
        return False
    if any(isinstance(part, _SpectralNorm) and not part.training for part in chain):
        return True
    # the query set's factors come on top of those of the inner step
    return any(isinstance(part, _WeightNorm) for part in chain) and not fits(2 * points, out, fan_in)
