"""Every layer that PyTorch's own tests know, with one tensor in and one out, against a loop over tasks.

python tests/pytorch_layers.py EXAMPLES      prints {"done": [kinds], "refused": {kind: reason}}, from so many of each

Importing the list freezes torch's backend flags, so that this is a process of its own.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator

import torch
from as_in_a_loop import SMALL, check
from model_zoo import Problem
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_modules import module_db

from metamom import TaskBatch


class Around(nn.Module):
    """Something to adapt on both sides of a layer, so that layers without parameters are seen too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.1)), nn.Parameter(torch.tensor(0.2))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x * self.scale if x.is_floating_point() else x)
        return (out * self.scale + self.shift) / 10


def layers(examples: int) -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    """Layers as PyTorch's tests make them, one after the other: what it is, itself, an input and its output."""
    for info in module_db:
        every = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=False)
        for number, given in enumerate(every[:examples]):
            made, called = given.constructor_input, given.forward_input
            if called is None or len(called.args) != 1 or called.kwargs or not isinstance(called.args[0], Tensor):
                continue
            torch.manual_seed(0)
            x = called.args[0].detach()
            layer = info.module_cls(*made.args, **made.kwargs).double().eval()
            out = layer(x)
            batched = isinstance(out, Tensor) and min(x.dim(), out.dim()) > 1 and len(out) == len(x) > 0
            if batched and out.is_floating_point():
                yield f"{info.module_cls.__name__} {number}", layer, x, out


def tried(layer: nn.Module, x: Tensor, out: Tensor) -> str | None:
    """``""`` where it trains as in a loop; what it is refused with; ``None`` where the loop itself ends in NaN."""
    generator = torch.Generator().manual_seed(2)

    def points() -> Tensor:
        each = [x + 0.1 * torch.randn(x.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        if not x.is_floating_point():
            each = [x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape) for _ in range(2)]
        return torch.stack(each)

    def targets() -> Tensor:
        return torch.randn(2, *out.shape, generator=generator, dtype=torch.float64)

    case = Problem(Around(layer).double(), F.mse_loss, TaskBatch(points(), targets(), points(), targets()))
    with sdpa_kernel(SDPBackend.MATH):
        grads = meta_gradient_by_copies(*case, inner_lr=SMALL)
    if not all(bool(g.isfinite().all()) for g in grads.values()):  # such as a root of negative means
        return None
    try:
        check(case, inner_lr=SMALL, evaluated=False)
    except ValueError as error:
        return str(error)
    return ""


def sweep(examples: int) -> tuple[set[str], dict[str, str]]:
    """The kinds of layers that train as in a loop, and those that are refused with a reason."""
    done: set[str] = set()
    refused: dict[str, str] = {}
    for name, layer, x, out in layers(examples):
        kind = name.split()[0]
        said = tried(layer, x, out)
        if said:
            refused[kind] = said
        elif said == "":
            done.add(kind)
    return done, refused


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    done, refused = sweep(int(sys.argv[1]))
    print(json.dumps({"done": sorted(done), "refused": refused}))
