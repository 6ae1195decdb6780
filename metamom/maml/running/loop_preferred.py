"""Models that vmap can take, and that run faster task by task.

Weight norm and spectral norm make a matrix of each task from the matrix that the inner steps move. If gradients stay
thin factors (`metamom.nets.low_rank`), weight norm needs no such matrix. Otherwise every derivative passes over the
matrices of all tasks, which leave the caches; a loop passes over one at a time.

A convolution with a kernel of each task is one call for each task under vmap too, and some Python around it. In second
order, written-out derivatives make up for that; in first order, only where normalisation, ReLU and pooling follow,
which are then one operator. Times as fast as a plain loop, first order, one thread, 5 points, under vmap and in a loop:

===================================  ================  ================
network                              4 tasks           16 tasks
===================================  ================  ================
bottleneck blocks, 28 x 28           0.75, **0.97**    0.77, **1.00**
the same, 16 x 16                    0.81, **1.08**    1.00, **1.07**
ResNet-12 of half width, 32 x 32     0.62, **0.93**
GroupNorm residual blocks, 28 x 28   0.85, **0.99**    1.01, 1.03
depthwise-separable blocks, 28 x 28  0.84, **1.01**    **1.51**, 1.20
U-Net, 28 x 28                       0.90, **0.98**    1.09, 1.10
Conv, PReLU, MaxPool, 28 x 28        0.94, **1.01**    **1.18**, 1.11
Conv, BatchNorm, ReLU, MaxPool       1.05, 1.02        **1.55**, 1.14
===================================  ================  ================
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import is_parametrized

from metamom.common.modules import modules_of
from metamom.nets.low_rank import fits

SMALLEST = 2**14  # entries of a matrix: below, the loop's Python calls take longer
FEW_TASKS, MANY_TASKS = 4, 16  # convolutions: at most so many tasks
LEAST, DEEP = 3, 8  # convolutions: networks with at least so many, and those that stay slow with many tasks
DRAWING = (_DropoutNd, nn.RReLU)


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


def convolutions_faster_in_a_loop(model: nn.Module, adapted: Collection[str], tasks: int) -> bool:
    """Whether first-order inner steps move the kernels of a network of convolutions, few of which reduce its images.

    It depends on the modules and the number of tasks alone, as `faster_in_a_loop` does on shapes. Models with layers
    that draw at random are left to vmap.

    Args:
        model: the model.
        adapted: the names of the parameters that inner steps move.
        tasks: T, the number of tasks at a time.

    Example:
        >>> blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()) for _ in range(3)]
        >>> model = nn.Sequential(*blocks)
        >>> names = dict(model.named_parameters())
        >>> convolutions_faster_in_a_loop(model, names, tasks=4), convolutions_faster_in_a_loop(model, names, tasks=16)
        (True, False)
    """
    if tasks > MANY_TASKS:
        return False
    modules = modules_of(model)
    convolutions = [module for module in modules if type(module) is nn.Conv2d]
    own = {id(parameter) for name, parameter in model.named_parameters() if name in adapted}
    if len(convolutions) < LEAST or not all(id(module.weight) in own for module in convolutions):
        return False  # a parametrized one has another class
    if any(isinstance(module, DRAWING) for module in modules):
        return False
    reducing = sum(isinstance(module, (_MaxPoolNd, _AvgPoolNd)) for module in modules)
    reducing += sum(max(module.stride) > 1 for module in convolutions)
    if tasks <= FEW_TASKS:
        return 2 * reducing < len(convolutions) or any(isinstance(module, nn.PReLU) for module in modules)
    dense = all(module.groups == 1 for module in convolutions)
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in modules)
    return dense and normalised and len(convolutions) >= DEEP and 4 * reducing < len(convolutions)


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
