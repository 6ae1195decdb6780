"""Operators that users write, and the ways to name an operator where one is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from metamom import (
    EF14,
    EF21,
    MAML,
    BiasedAccumulator,
    Clip,
    Compose,
    CompositeMomentum,
    RandK,
    TopK,
    nets,
    train,
)  # fmt: skip
from metamom.bias import Bias, BiasOperator, as_operator, parse
from metamom.bias.coordinates import Coordinates
from metamom.diagnostics.bias_meter import measure
from metamom.server.aggregate import Aggregation, aggregate
from metamom.tasks import Sinusoid


class Own(BiasOperator):
    """What a user has to write."""

    def _apply(self, rows: Tensor, place: Coordinates) -> Tensor:
        return rows

    @property
    def spec(self) -> str:
        return "own"


class Plain(Own):
    """An attribute for each argument, and others."""

    def __init__(self, scale: float, shift: float = 0.0) -> None:
        self.scale = scale
        self.shift = shift
        self.calls = 0


class Private(Own):
    def __init__(self, scale: float) -> None:
        self._scale = scale


class Renamed(Own):
    def __init__(self, scale: float) -> None:
        self.factor = scale


class Keywords(Own):
    def __init__(self, **options: Any) -> None:
        self.scale = options["scale"]


class Several(Own):
    def __init__(self, *scales: float, **options: Any) -> None:
        self.scales = scales
        self.options = options


class Arrays(Own):
    def __init__(self, mask: Any) -> None:
        self.mask = mask


class Without(Own):
    """No constructor; attributes appear later."""

    found: Tensor


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (Plain(2.0), "Plain(scale=2.0)"),
        (Plain(2.0, shift=1.0), "Plain(scale=2.0, shift=1.0)"),
        (Private(2.0), "Private(...)"),
        (Renamed(2.0), "Renamed(...)"),
        (Keywords(scale=2.0), "Keywords(...)"),
        (Several(1.0, 2.0), "Several(*(1.0, 2.0), **{})"),
        (Without(), "Without()"),
    ],
)
def test_how_it_prints(operator: BiasOperator, text: str) -> None:
    assert repr(operator) == text
    assert repr(EF14(operator)) == f"EF14({text})"
    assert repr(Compose(operator, TopK(1))) == f"Compose({text}, TopK(k=1))"


def test_it_is_a_value_where_its_arguments_are_known() -> None:
    one, other = Plain(2.0), Plain(2.0)
    one.calls = 7  # no argument
    assert one == other
    assert hash(one) == hash(other)
    assert one != Plain(3.0)
    assert EF21(one) == EF21(other)
    assert Several(1.0, a=2) == Several(1.0, a=2) != Several(1.0, a=3)
    assert hash(Several(1.0, a=2)) == hash(Several(1.0, a=3))  # a dictionary has none of its own


@pytest.mark.parametrize("kind", [Private, Renamed])
def test_it_equals_itself_alone_where_they_are_not(kind: Any) -> None:
    one = kind(2.0)
    assert one == one
    assert one != kind(2.0)
    assert len({one, one, kind(2.0)}) == 2


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_arguments_that_are_arrays_compare_as_wholes(make: Any) -> None:
    one, other = Arrays(make([1.0, 2.0])), Arrays(make([1.0, 2.0]))
    assert one == other
    assert hash(one) == hash(other)
    assert one != Arrays(make([1.0, 3.0]))
    assert one != Arrays(make([1.0]))
    assert one != Arrays(None)


def test_a_generator_is_an_argument_too() -> None:
    generator = torch.Generator()
    assert RandK(3, generator=generator) == RandK(3, generator=generator) != RandK(3)
    assert "generator=<torch" in repr(RandK(3, generator=generator))


# a SPEC wherever an operator is taken

G = torch.tensor([[3.0, 1.0, -2.0], [0.0, 2.0, 1.0]])


def learner() -> MAML:
    return MAML(nets.SinusoidMLP(generator=torch.Generator().manual_seed(0)), F.mse_loss)


def stepped(bias: Bias) -> Tensor:
    made = learner()
    made.backward(Sinusoid().sample(0, 4), workers=2, bias=bias)
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


def trained(bias: Bias) -> Tensor:
    made = learner()
    train(
        made, CompositeMomentum(made.parameters(), 0.01), Sinusoid(), iterations=3, meta_batch=4, workers=2, bias=bias
    )
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def accumulated(bias: Bias) -> Tensor:
    w = torch.nn.Parameter(torch.zeros(3))
    accumulator = BiasedAccumulator([w], bias=bias, workers=2)
    for _ in range(2):
        w.grad = None
        for g in G:
            (w @ g).backward()
            accumulator.add()
        accumulator.finish()
    assert w.grad is not None
    return w.grad


WAYS = {
    "as_operator": lambda bias: as_operator(bias)(G),
    "aggregate": lambda bias: aggregate(G, bias)[0],
    "backward": stepped,
    "train": trained,
    "accumulator": accumulated,
    "measure": lambda bias: (
        measure(learner(), Sinusoid(shots=8), inner_batches=(1, 2), draws=3, bias=bias).sizes[0].bias.mean
    ),
    "feedback": lambda bias: EF14(bias)(G),
    "composition": lambda bias: Compose(bias, "sign")(G),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_spec_does_what_its_operator_does(way: str) -> None:
    assert torch.equal(WAYS[way]("topk:40%"), WAYS[way](TopK(ratio=0.4)))
    assert not torch.equal(WAYS[way]("topk:40%"), WAYS[way]("clip:0.1"))
    with pytest.raises(ValueError, match="bias operator 'topk:0%'"):
        WAYS[way]("topk:0%")


@pytest.mark.parametrize("way", ["as_operator", "train", "accumulator"])
@pytest.mark.parametrize("spec", ["ef14:topk:40%", "qsgd:3", "clip:1+randk:40%"])
def test_a_spec_with_a_state_keeps_it_where_it_is_made_once(way: str, spec: str) -> None:
    assert torch.equal(WAYS[way](spec), WAYS[way](parse(spec)))


@pytest.mark.parametrize("spec", ["ef14:topk:40%", "ef21-sgdm(0.1):topk:40%", "qsgd:3", "clip:1+randk:40%"])
def test_a_learner_keeps_the_state_of_its_specs(spec: str) -> None:
    one, other, operator = learner(), learner(), parse(spec)
    for step in range(3):
        batch = Sinusoid().sample(step, 4)
        one.zero_grad()
        other.zero_grad()
        one.backward(batch, workers=2, bias=spec)
        other.backward(batch, workers=2, bias=operator)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert str(one.operators[spec].state_dict()) == str(operator.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", ["ef14:topk:40%", "qsgd:3", "clip:1+randk:40%", "clip21:1"])
@pytest.mark.parametrize("way", [lambda bias: aggregate(G, bias), lambda bias: Aggregation(2, bias)])
def test_a_spec_with_a_state_is_refused_where_each_step_would_make_it_again(way: Any, spec: str) -> None:
    """Else error feedback would forget, and Rand-K draw the same entries at each step, without a word."""
    with pytest.raises(ValueError, match=r"a new operator at each step.*make it once.*metamom\.bias\.parse\("):
        way(spec)
    way(parse(spec))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Compose("clip:1", "ef14:sign"), "operators without error feedback; got 'ef14:sign'"),
        (lambda: EF21("ef14:sign"), "an operator without it; got 'ef14:sign'"),
        (lambda: Compose(Clip(1.0), 3), "operators without error feedback; got 3"),
    ],
)
def test_a_spec_is_refused_as_its_operator_is(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()
