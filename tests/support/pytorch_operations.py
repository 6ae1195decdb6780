"""Every operation that PyTorch's own tests know, within a model, against a loop over tasks: does vmap as a loop does?

python tests/pytorch_operations.py      prints {"done": [operations], "wrong": {operation: error}}

Importing the list freezes torch's backend flags, so that this is a process of its own.
"""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from problems import regression_batch
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db

from metamom import MAML

EXAMPLES = 12  # of each operation
INNER_LR = 0.003
# a loop draws other numbers, or each call seeds the generator; in a loop alone, a bias without a weight has no second
# derivative; numbers have 8 to 24 bits
LEFT_OUT = ("dropout", "lowrank", "fractional", "attention", "rrelu", "multinomial", "native_layer_norm")
ROUGH = ("bfloat16", "half", "float", "chalf", "cfloat")


class Around(nn.Module):
    """A number that depends on an operation's results; what it takes are parameters, scaled a little by the inputs.

    Args:
        operation: of tensors, numbers and lists of them.
        arguments: of one call.
        keywords: of that call.
        fixed: numbers of arguments that are the same for all tasks, and do not depend on the inputs.
    """

    def __init__(self, operation: Callable[..., Any], arguments: list[Any], keywords: Any, fixed: set[int]) -> None:
        super().__init__()
        self.operation, self.keywords, self.fixed = operation, keywords, fixed
        self.numbers = nn.ParameterList()
        self.arguments = [self._learned(argument) for argument in arguments]

    def _learned(self, argument: Any) -> Any:
        """Numbers of tensors in their place."""
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.layout is torch.strided:
            learned = len(self.numbers) not in self.fixed
            self.numbers.append(nn.Parameter(argument.detach().clone(), requires_grad=learned))
            return _Number(len(self.numbers) - 1)
        if isinstance(argument, (list, tuple)):
            return [self._learned(one) for one in argument]
        return argument

    def _given(self, argument: Any, scale: Tensor) -> Any:
        if isinstance(argument, _Number):
            tensor = self.numbers[argument]
            return tensor if argument in self.fixed else tensor * scale
        return [self._given(one, scale) for one in argument] if isinstance(argument, list) else argument

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0.01 * torch.tanh(x.mean())
        found = self.operation(*(self._given(argument, scale) for argument in self.arguments), **self.keywords)
        parts = [out for out in tensors_of(found) if out.is_floating_point()]
        total = sum((torch.tanh(0.3 * out) * torch.arange(out.numel()).cos().view(out.shape)).sum() for out in parts)
        return x[:, :1] * total


class _Number(int):
    """The number of a parameter."""


def tensors_of(out: Any) -> list[Tensor]:
    if isinstance(out, (list, tuple)):
        return [tensor for one in out for tensor in tensors_of(one)]
    return [out] if isinstance(out, Tensor) else []


def models() -> Iterator[tuple[str, nn.Module]]:
    """Of each operation a few examples; all that it takes depends on the inputs, or only the first or last of it."""
    for info in op_db:
        name = f"{info.name}.{info.variant_test_name}".rstrip(".")
        if name in ROUGH or any(part in name for part in LEFT_OUT) or torch.float64 not in info.supported_dtypes("cpu"):
            continue
        torch.manual_seed(0)
        random.seed(0)
        given = list(info.sample_inputs("cpu", torch.float64, requires_grad=False))
        for sample in given[:: max(1, len(given) // EXAMPLES)]:
            arguments = [sample.input, *sample.args]
            model = Around(info.op, arguments, sample.kwargs, set())
            last = len(model.numbers) - 1
            if not 0 < sum(p.numel() for p in model.parameters()) < 20_000:
                continue
            yield name, model
            if last > 0:
                yield name, Around(info.op, arguments, sample.kwargs, set(range(1, last + 1)))
                yield name, Around(info.op, arguments, sample.kwargs, set(range(last)))


def error(model: nn.Module) -> float | None:
    """How far the meta-gradient is from a loop's, relative to its size; ``None`` where the loop has none."""
    batch = regression_batch(tasks=3, support=2, query=2, dim=1)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            expected = meta_gradient_by_copies(model, F.mse_loss, batch, inner_lr=INNER_LR)
    except (RuntimeError, AssertionError, TypeError, ValueError, IndexError):  # not differentiable twice, or not here
        return None
    if not all(bool(g.isfinite().all()) for g in expected.values()):
        return None
    adapted = MAML(model, F.mse_loss, inner_lr=INNER_LR).meta_gradient(batch).grads
    scale = max(float(g.abs().max()) for g in expected.values() if g.numel())
    return max(float((adapted[n][0] - g).abs().max()) for n, g in expected.items() if g.numel()) / (scale + 1e-4)


def sweep() -> tuple[set[str], dict[str, str]]:
    """The operations that agree with a loop, and those that do not; those refused in words are neither."""
    done: set[str] = set()
    wrong: dict[str, str] = {}
    for name, model in models():
        try:
            found = error(model)
        except ValueError:
            continue
        except RuntimeError as raw:
            found, wrong[name] = None, f"{type(raw).__name__}: {raw}"
        if found is not None and not found < 1e-9:
            wrong[name] = f"relative error {found:.1e}"
        elif found is not None:
            done.add(name)
    return done, wrong


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    done, wrong = sweep()
    json.dump({"done": sorted(done), "wrong": wrong}, sys.stdout)
