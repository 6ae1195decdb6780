"""CompositeMomentum as torch's own tests of optimizers know one: `OptimizerInfo` records, and what goes into a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from metamom import CompositeMomentum

_environment = set(os.environ)
common = pytest.importorskip(
    "torch.testing._internal.common_optimizers",
    reason="torch.testing._internal cannot be imported here (it needs torch's own test requirements)",
    exc_type=ImportError,
)
for _name in set(os.environ) - _environment:  # the import sets a cache directory, for torch's own tests
    del os.environ[_name]
# the import also forbids to set flags such as cudnn.benchmark
_backends = torch.backends.disable_global_flags.__globals__
_backends["__allow_nonbracketed_mutation_flag"] = True

SGD = next(info for info in common.optim_db if info.optim_cls is torch.optim.SGD)
KINDS: list[dict[str, Any]] = [{}, {"nesterov": True}, {"normalize": True}]
VARIANTS = [{"first_step": first_step, **kind} for first_step in ("zero", "gradient") for kind in KINDS]
FLAGS = ("foreach", "fused", "differentiable")
WORDING = {  # of errors that are torch's in kind
    "invalid param type": "wanted parameters, such as model.parameters",
    "Tensor lr must be 1-element": "lr must be a number or a tensor with one element",
}


def inputs_of(variant: dict[str, Any]) -> list[Any]:
    """The options to test: SGD's list, and those that only CompositeMomentum has."""
    cases = {
        "default": {},
        "non-default lr": {"lr": 1e-2},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "tensor lr and beta": {"lr": torch.tensor(0.001), "beta": torch.tensor(0.3)},
        "beta": {"beta": 0.5},
        "no momentum": {"beta": 1.0},
        "weight_decay": {"weight_decay": 0.5},
        "weight_decay without momentum": {"weight_decay": 0.1, "beta": 1.0},
        "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
        "maximize": {"weight_decay": 0.1, "maximize": True},
    }
    return [
        common.OptimizerInput(params=None, kwargs={"lr": 1e-3, **variant, **case}, desc=name)
        for name, case in cases.items()
    ]


def errors_of(variant: dict[str, Any], device: str, dtype: torch.dtype) -> list[Any]:
    """What torch asks every optimizer to refuse, and a few of our own."""
    errors = common.get_error_inputs_for_all_optims(device, dtype)
    own = [
        ({"beta": -0.5}, ValueError, "beta is the weight of the new gradient"),
        ({"weight_decay": -0.5}, ValueError, "weight_decay must be"),
        ({"momentum": 0.9}, TypeError, "momentum=0.9 is beta=0.1 here"),
        ({"foreach": True, "differentiable": True}, ValueError, "differentiable=True updates the tensors one by one"),
    ]
    errors += [
        common.ErrorOptimizerInput(
            common.OptimizerInput(params=None, kwargs=kwargs, desc=regex), error_type=kind, error_regex=regex
        )
        for kwargs, kind, regex in own
    ]
    for error in errors:
        given = error.optimizer_error_input
        given.params = [nn.Parameter(torch.zeros(1, 1))] if given.params is None else given.params
        given.kwargs = {"lr": 1e-3, **variant, **given.kwargs}
        error.error_regex = WORDING.get(given.desc, error.error_regex)
    return errors


def info_of(variant: dict[str, Any]) -> Any:
    fused = len(variant) == 1  # there is no kernel for the other kinds
    return common.OptimizerInfo(
        CompositeMomentum,
        optim_inputs_func=lambda device, dtype=None: inputs_of(variant),
        optim_error_inputs_func=lambda device, dtype: errors_of(variant, device, dtype),
        scheduler_inputs=SGD.scheduler_inputs,
        supported_impls=("foreach", "differentiable", *(("fused",) if fused else ())),
        supports_fused_on=("cpu", "cuda") if fused else (),
        not_og_supported_flags=(*FLAGS, "maximize", "normalize", "nesterov", "decoupled_weight_decay"),
        supports_sparse=False,
        has_capturable_arg=False,
    )


INFOS = [info_of(variant) for variant in VARIANTS]
NAMES = [" ".join([variant["first_step"], *(k for k in variant if k != "first_step")]) for variant in VARIANTS]
every_info = pytest.mark.parametrize("info", INFOS, ids=NAMES)
every_fused_info = pytest.mark.parametrize(
    "info", [info for info in INFOS if info.supports_fused_on], ids=["zero", "gradient"]
)


def options_of(info: Any, skip: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """All options of an info, with each of its implementations, as new tensors."""
    for given in common._get_optim_inputs_including_global_cliquey_kwargs("cpu", None, info, skip=skip):
        yield deepcopy(given.kwargs)


class Affine:
    """``|W x + b|^2``, the problem of most of torch's tests."""

    def __init__(self, shape: tuple[int, int] = (10, 5), *, contiguous: bool = True, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> Tensor:
            if contiguous:
                return torch.randn(size, generator=generator)
            return torch.randn((*size, 2), generator=generator)[..., 0]

        self.weight, self.bias = nn.Parameter(draw(*shape)), nn.Parameter(draw(shape[0]))
        self.x = torch.randn(shape[1], generator=generator)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight, self.bias]

    def named(self, named: bool) -> list[Any]:
        return [(f"name{i}", p) for i, p in enumerate(self.params)] if named else self.params

    def backward(self) -> Tensor:
        for p in self.params:
            p.grad = None
        loss = (self.weight.mv(self.x) + self.bias).square().sum()
        loss.backward()
        return loss.detach()

    def copy(self) -> Affine:
        return deepcopy(self)


def advance(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


def assert_right_direction(before: Tensor, after: Tensor, kwargs: dict[str, Any]) -> None:
    assert after > before if kwargs.get("maximize") else after < before, f"{before} to {after} with {kwargs}"


def assert_same_params(ours: list[Tensor], theirs: list[Tensor], **tolerances: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerances)
