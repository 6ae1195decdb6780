"""Lists of modules, parameters and buffers are those of PyTorch's own iterators."""

from __future__ import annotations

import pytest
from torch import nn

from metamom.common.modules import modules_of, named_buffers_of, named_modules_of, named_parameters_of


class Nested(nn.Module):
    """Modules that occur twice, an absent one, tied weights, and one that contains a module listed before it."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.first = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(2, affine=False), self.norm), nn.ReLU())
        self.absent = None
        self.register_module("none", None)
        self.again = nn.ModuleDict({"shared": shared, "tied": nn.Linear(2, 2, bias=False), "all": self.first})
        self.again["tied"].weight = shared.weight
        self.register_buffer("count", None)


class Renaming(nn.Linear):
    """A module with an answer of its own."""

    def named_parameters(self, *args, **kwargs):
        return iter([("mine", self.weight)])

    def named_buffers(self, *args, **kwargs):
        return iter([("none", self.weight)])


@pytest.mark.parametrize("make", [Nested, lambda: nn.Linear(2, 2), lambda: Renaming(2, 2), nn.Identity])
def test_same_as_pytorchs(make):
    model = make()
    assert [*map(id, modules_of(model))] == [*map(id, model.modules())]
    for ours, theirs in (
        (named_modules_of(model), model.named_modules()),
        (named_parameters_of(model), model.named_parameters()),
        (named_buffers_of(model), model.named_buffers()),
    ):
        assert [(name, id(each)) for name, each in ours.items()] == [(name, id(each)) for name, each in theirs]
