"""The operators' pure transitions: the same twice, nothing changed, and the calls are a fold of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import EVERY, FEEDBACK, assert_identical, cut, each, gradients
from torch import Tensor

from metamom import QSGD, Compose, RandK, Sign, TopK
from metamom.bias import EF14, EF21, BiasOperator, Function, NonFiniteError
from metamom.bias.coordinates import Coordinates, place_of
from metamom.bias.state import State


def drawing(operator: Callable[[torch.Generator], BiasOperator]) -> BiasOperator:
    return operator(torch.Generator().manual_seed(0))


DRAWING = [
    drawing(lambda g: RandK(2, generator=g)),
    drawing(lambda g: QSGD(4, generator=g)),
    drawing(lambda g: Compose(RandK(3, generator=g), QSGD(4, generator=g))),  # both draw from one generator
    drawing(lambda g: EF21(RandK(2, generator=g))),
]
each_operator = pytest.mark.parametrize(
    "operator",
    [*EVERY, *DRAWING],
    ids=[*map(repr, EVERY), *(f"{each.spec} from a generator" for each in DRAWING)],
)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, State):
        return tensors([value.workers, value.generators, value.server])
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors(each)]
    return [tensor for each in value for tensor in tensors(each)] if isinstance(value, (list, tuple)) else []


def copied(value: Any) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors(value)]


def assert_same(a: Any, b: Any) -> None:
    for one, other in zip(tensors(a), tensors(b), strict=True):
        if one.is_floating_point():
            assert_identical(one, other)
        else:
            assert torch.equal(one, other)


def held(operator: BiasOperator) -> list[Any]:
    """Everything that a transition could change: the state, the count of calls and the generators."""
    return [copied(operator.current_state()), copied(operator.state_dict()), operator.draw_step]


def assert_holds(operator: BiasOperator, before: list[Any]) -> None:
    now = held(operator)
    assert_same(now[:2], before[:2])
    assert now[2] == before[2]


@each_operator
@settings(max_examples=4, deadline=None)
@given(g=gradients(rows=3), step=st.integers(0, 5))
def test_a_transition_is_a_pure_function(operator, g, step):
    operator.reset()
    d, before = g.shape[1], held(operator)
    state = operator.transition(g.flip(0), operator.current_state(), Coordinates(0, [4, 1, 0]), cut(d))[1]
    place = place_of(g, step, [0, 1, 2])
    for transition in (operator.transition, operator.transition_send):
        rows, given_rows, given_state = g.clone(), g.clone(), copied(state)
        first = transition(rows, state, place, cut(d))
        kept = copied(first)
        assert_same(transition(rows, state, place, cut(d)), first)
        assert_same(first, kept)  # the second transition changed nothing of the first
        assert_same([rows, tensors(state)], [given_rows, given_state])
        assert_holds(operator, before)


@each_operator
@settings(max_examples=4, deadline=None)
@given(g=gradients(rows=3))
def test_the_servers_transition_is_a_pure_function(operator, g):
    operator.reset()
    d, before = g.shape[1], held(operator)
    messages, state = operator.transition_send(g, operator.current_state(), place_of(g, 0, None), cut(d))
    for each_one in (False, True):
        out, after = operator.transition_receive(messages, state, d, g.dtype, cut(d), each=each_one)
        given_messages, given_state = copied(messages), copied(after)
        twice = [operator.transition_receive(messages, after, d, g.dtype, cut(d), each=each_one) for _ in range(2)]
        assert_same(twice[0], twice[1])
        assert_same([messages, tensors(after)], [given_messages, given_state])
        assert out.shape == ((3, d) if each_one else (d,))
    assert_holds(operator, before)


@each_operator
def test_calls_are_a_fold_of_transitions(operator):
    generator = torch.Generator().manual_seed(1)
    company = ([0, 1, 2], [1], [2, 0], [3, 1, 0, 2])
    gs = [torch.randn(len(workers), 5, generator=generator) for workers in company]
    operator.reset()
    state, out = operator.current_state(), []
    for step, (g, workers) in enumerate(zip(gs, company, strict=True)):
        rows, state = operator.transition(g, state, Coordinates(step, workers), cut(5))
        out.append(rows)
    for g, workers, expected in zip(gs, company, out, strict=True):
        assert_identical(operator(g, workers=workers, sizes=cut(5)), expected)
    kept = operator.current_state()
    assert list(kept.workers) == list(state.workers)
    assert_same(kept, state)
    operator.reset()


@each_operator
@pytest.mark.parametrize("each_one", [False, True])
def test_messages_are_a_fold_of_transitions(operator, each_one):
    generator = torch.Generator().manual_seed(1)
    gs = torch.randn(4, 3, 5, generator=generator)
    operator.reset()
    state, out = operator.current_state(), []
    for step, g in enumerate(gs):
        messages, state = operator.transition_send(g, state, place_of(g, step, None), cut(5))
        received, state = operator.transition_receive(messages, state, 5, g.dtype, cut(5), each=each_one)
        out.append([messages, received])
    for step, (g, expected) in enumerate(zip(gs, out, strict=True)):
        messages = operator.send(g, step=step, workers=range(3), sizes=cut(5))
        assert_same([messages, operator.receive(messages, 5, g.dtype, sizes=cut(5), each=each_one)], expected)
    assert_same(operator.current_state(), state)
    operator.reset()


class Failing(Function):
    """Fails at a gradient that starts with a negative entry."""

    def __init__(self) -> None:
        super().__init__(self.check)

    def check(self, gradient: Tensor) -> Tensor:
        if gradient[0] < 0:
            raise RuntimeError("failed")
        return gradient / 2


@pytest.mark.parametrize("around", [lambda inner: inner, EF14, EF21], ids=["alone", "EF14", "EF21"])
def test_an_exception_changes_nothing(around):
    generator = torch.Generator().manual_seed(0)
    operator = around(Compose(RandK(5, generator=generator), Failing()))
    good, bad = torch.ones(2, 5), torch.tensor([[1.0] * 5, [-9.0] * 5])
    operator(good)
    before = held(operator)
    for call in (
        lambda: operator.transition(bad, operator.current_state(), place_of(bad, 1, None)),
        lambda: operator(bad),
        lambda: operator.send(bad, step=1, workers=[0, 1]),
    ):
        with pytest.raises(RuntimeError, match="failed"):
            call()
        assert_holds(operator, before)
    with pytest.raises(NonFiniteError):
        operator(bad / 0)
    assert_holds(operator, before)


@each(FEEDBACK)
def test_a_deferred_call_waits_for_its_commit(operator):
    g = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    operator.reset()
    operator(g[0], sizes=cut(5))
    before, twin = held(operator), copy.deepcopy(operator)
    with operator.defer():
        out = operator(g[1], step=1, sizes=cut(5))
    assert_holds(operator, before)
    assert_identical(out, twin(g[1], step=1, sizes=cut(5)))
    operator.commit()
    assert_holds(operator, held(twin))
    operator.commit()  # nothing is left to commit
    assert_holds(operator, held(twin))
    operator.reset()


def test_messages_received_before_a_commit():
    """The server's estimates are stored at once, and the workers' commit leaves them."""
    g = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    operator, twin = EF21(TopK(2)), EF21(TopK(2))
    for step in range(2):
        with operator.defer():
            messages = operator.send(g, step=step, workers=range(3))
        got = operator.receive(messages, 5, g.dtype)
        operator.commit()
        assert_identical(got, twin.receive(twin.send(g, step=step, workers=range(3)), 5, g.dtype))
    assert_holds(operator, held(twin))


def test_an_operator_of_ones_own_has_a_transition():
    class Half(BiasOperator):
        def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
            return rows / (2 + at.step)

        @property
        def spec(self) -> str:
            return "half"

    g = torch.ones(2, 3)
    out, state = Half().transition(g, State(), place_of(g, 2, None))
    assert_identical(out, g / 4)
    assert tensors(state) == []
    messages, _ = Half().transition_send(g, State(), place_of(g, 2, None))
    assert_identical(Half().transition_receive(messages, State(), 3, g.dtype, each=True)[0], g / 4)


def test_a_place_is_checked():
    with pytest.raises(NonFiniteError, match="the first in row 1"):
        place_of(torch.tensor([[1.0], [torch.nan]]), 0, None)
    with pytest.raises(ValueError, match="workers are 2 numbers >= 0 that differ"):
        place_of(torch.ones(2, 1), 0, [3, 3])
    assert place_of(torch.ones(2, 1), 3, None) == Coordinates(3, range(2))
    with pytest.raises(ValueError, match="ef21:sign has a state"):
        EF21(Sign()).encode(torch.ones(2))
