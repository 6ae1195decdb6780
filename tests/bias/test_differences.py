"""DIANA, MARINA, DASHA and double momentum: steps by hand, slow twins, and what is left on workers that differ."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from operators import assert_identical, each
from test_feedback_floors import random_workers
from torch import Tensor

from metamom import QSGD, Clip, Identity, MLMCTopK, RandK, Sign, TopK
from metamom.bias import (
    DASHA,
    DIANA,
    EF21,
    EF21SGD2M,
    EF21SGDM,
    MARINA,
    BiasOperator,
    Clip21,
    Clip21SGD2M,
    Compose,
    GaussianNoise,
)
from metamom.bias.clip import clip
from metamom.bias.coordinates import place_of
from metamom.bias.marina import sends_whole

State = dict[str, Tensor]
C = Callable[[Tensor], Tensor]
RESCALED = RandK(2, scaled=True)
P = 0.4


def kept(state: State, name: str, like: Tensor) -> Tensor:
    return state.setdefault(name, torch.zeros_like(like))


def slow_sgd2m(g: Tensor, s: State, c: C, step: int) -> Tensor:
    s["v"] = 0.7 * kept(s, "v", g) + 0.3 * g
    s["u"] = 0.7 * kept(s, "u", g) + 0.3 * s["v"]
    s["h"] = kept(s, "h", g) + c(s["u"] - kept(s, "h", g))
    return s["h"]


def slow_clip21_sgd2m(g: Tensor, s: State, c: C, step: int) -> Tensor:
    s["v"] = 0.7 * kept(s, "v", g) + 0.3 * g
    wanted = s["v"] - kept(s, "h", g)
    s["h"] = s["h"] + 0.5 * clip(wanted, 0.5)
    s["server"] = kept(s, "server", g) + 0.5 * c(wanted)
    return s["server"]


def slow_diana(g: Tensor, s: State, c: C, step: int) -> Tensor:
    sent = c(g - kept(s, "h", g))
    before = s["h"]
    s["h"] = before + 0.3 * sent
    return before + sent


def slow_marina(g: Tensor, s: State, c: C, step: int) -> Tensor:
    s["h"] = g if "h" not in s or sends_whole(step, P) else s["h"] + c(g - s["previous"])
    s["previous"] = g
    return s["h"]


def slow_dasha(g: Tensor, s: State, c: C, step: int) -> Tensor:
    before = kept(s, "v", g)
    s["v"] = 0.7 * before + 0.3 * g
    s["h"] = kept(s, "h", g) + c(s["v"] - before - 0.2 * (kept(s, "h", g) - before))
    return s["h"]


TWINS = [
    (EF21SGD2M(TopK(2), eta=0.3), TopK(2), slow_sgd2m),
    (Clip21SGD2M(0.5, eta=0.3, server=0.5), Clip(0.5), slow_clip21_sgd2m),
    (
        Clip21SGD2M(0.5, eta=0.3, server=0.5, noise=0.1, seed=3),
        Compose(Clip(0.5), GaussianNoise(0.1, seed=3)),
        slow_clip21_sgd2m,
    ),
    (DIANA(RESCALED, alpha=0.3), RESCALED, slow_diana),
    (MARINA(RESCALED, p=P), RESCALED, slow_marina),
    (DASHA(MLMCTopK(2), a=0.2, eta=0.3), MLMCTopK(2), slow_dasha),
]
each_twin = pytest.mark.parametrize(("operator", "inner", "slow"), TWINS, ids=[repr(each[0]) for each in TWINS])


@each_twin
@pytest.mark.parametrize("by", ["calls", "messages", "each message"])
def test_recurrences_worker_by_worker(operator, inner, slow, by):
    generator = torch.Generator().manual_seed(0)
    states: list[State] = [{} for _ in range(3)]
    operator.reset()
    for step in range(8):
        g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        expected = torch.stack(
            [
                slow(row, state, lambda x, w=worker, k=step: inner(x, step=k, workers=[w]), step)
                for worker, (row, state) in enumerate(zip(g, states, strict=True))
            ]
        )
        if by == "calls":
            out = operator(g)
        else:
            messages = operator.send(g, step=step, workers=range(3))
            out = operator.receive(messages, 5, g.dtype, each=by == "each message")
        torch.testing.assert_close(out, expected.sum(0) if by == "messages" else expected, rtol=1e-10, atol=1e-12)
    operator.reset()


@each_twin
def test_a_state_of_calls_goes_on_with_messages(operator, inner, slow):
    """A checkpoint of one process, continued by several, and the other way."""
    generator = torch.Generator().manual_seed(0)
    gs = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    operator.reset()
    wanted = [operator(g).sum(0) for g in gs]
    operator.reset()
    for g in gs[:3]:
        operator(g)
    saved = operator.state_dict()
    operator.reset()
    operator.load_state_dict(saved)
    operator.shard(range(3))
    for step in (3, 4, 5):
        messages = operator.send(gs[step], step=step, workers=range(3))
        torch.testing.assert_close(operator.receive(messages, 5, gs.dtype), wanted[step], rtol=1e-10, atol=1e-12)
    operator.reset()


def test_by_hand():
    """Two steps of one worker: g = (4, 2), then (4, 0)."""
    g = torch.tensor([[[4.0, 2.0]], [[4.0, 0.0]]], dtype=torch.float64)

    def steps(operator: BiasOperator) -> list[list[float]]:
        return [operator(each).tolist()[0] for each in g]

    # v = (2, 1), u = (1, .5), h = (1, 0); v = (3, .5), u = (2, .5), u - h = (1, .5), h = (2, 0)
    assert steps(EF21SGD2M(TopK(1), eta=0.5)) == [[1, 0], [2, 0]]
    # v = (2, 1); v - 0 has norm sqrt 5
    first = [2 / math.sqrt(5) * 0.5, 1 / math.sqrt(5) * 0.5]
    assert steps(Clip21SGD2M(1.0, eta=0.5, server=0.5))[0] == pytest.approx(first)
    # c = (4, 0), h = (2, 0); g - h = (2, 0), out (4, 0)
    assert steps(DIANA(TopK(1), alpha=0.5)) == [[4, 0], [4, 0]]
    # the first gradient is whole, at step 1 the change (0, -2) is sent
    assert not sends_whole(1, 0.1)
    assert steps(MARINA(TopK(1), p=0.1)) == [[4, 2], [4, 0]]
    # c = (4, 0), h = (4, 0); (0, -2) - 0.5 ((4, 0) - (4, 2)) = (0, -1), h = (4, -1)
    assert steps(DASHA(TopK(1), a=0.5)) == [[4, 0], [4, -1]]


@pytest.mark.parametrize(
    ("operator", "same"),
    [
        (EF21SGD2M(TopK(2), eta=1), EF21(TopK(2))),
        (Clip21SGD2M(0.5, eta=1, server=1), Clip21(0.5)),
        (DIANA(TopK(2), alpha=1), EF21(TopK(2))),
        (DASHA(TopK(2), a=1), EF21(TopK(2))),
        (DASHA(TopK(2), a=1, eta=0.3), EF21SGDM(TopK(2), eta=0.3)),
    ],
    ids=repr,
)
def test_with_weights_of_one_they_are_their_elders(operator, same):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        g = torch.randn(3, 5, generator=generator)
        assert_identical(operator(g), same(g))
    operator.reset(), same.reset()


@each([DIANA(Identity()), MARINA(Identity(), p=0.5), MARINA(Sign(), p=1), DASHA(Identity())])
def test_without_loss_the_gradient_arrives(operator):
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(operator(g), g)


def test_marina_shares_its_coin():
    """Whole gradients with probability p, at the same steps for all, whatever they cost."""
    whole = [sends_whole(step, P) for step in range(2000)]
    assert abs(sum(whole) / 2000 - P) < 5 * math.sqrt(P * (1 - P) / 2000)
    operator, g = MARINA(TopK(1), p=P), torch.ones(2, 5)
    for step in range(8):
        expected = 1 + (20 if whole[step] or step == 0 else 8)
        assert operator.step_bytes(step, 5) == expected
        messages = operator.send(g, step=step, workers=[0, 1])
        assert [len(message) for message in messages] == [expected] * 2
        assert [int(message[0]) for message in messages] == [int(expected == 21)] * 2
    assert operator.wire_bytes(5) == 9


def test_a_worker_that_comes_late_sends_its_first_gradient_whole():
    operator, g = MARINA(TopK(1), p=1e-9), torch.tensor([[3.0, 1.0], [2.0, 5.0]])
    operator(g[:1], step=1, workers=[0])
    assert torch.equal(operator(g, step=2, workers=[0, 1]), g)


def test_damaged_messages_of_marina():
    operator = MARINA(TopK(1), p=0.5)
    [message] = operator.transition_send(
        torch.ones(1, 3), operator.current_state(), place_of(torch.ones(1, 3), 0, None)
    )[0]
    for bad, said in (
        (message[:0], "no first byte 0 or 1"),
        (torch.cat([torch.tensor([7], dtype=torch.uint8), message[1:]]), "no first byte 0 or 1"),
        (message[:-1], "sends 13 bytes of a whole gradient"),
        (torch.cat([message[:1], torch.full((12,), 255, dtype=torch.uint8)]), "infinite or NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            operator.decode(bad, 3, torch.float32)


def test_marina_counts_its_calls():
    operator = MARINA(TopK(1), p=0.5)
    for step in range(3):
        assert operator.draw_step == step
        operator(torch.ones(1, 3))
    state = operator.state_dict()
    assert state["calls"] == 3
    for bad in (-1, 2.5, None):
        with pytest.raises(ValueError, match="counts its calls by a whole number"):
            operator.load_state_dict({**state, "calls": bad})


@each([DIANA(RESCALED, alpha=0.3), DASHA(RESCALED, a=0.2), MARINA(RESCALED, p=0.3), DIANA(QSGD(4), alpha=0.2)])
def test_no_floor_and_no_noise_are_left_on_workers_that_differ(operator):
    """An unbiased operator alone has noise that stays; compressed differences converge, at a fixed step size."""
    workers = random_workers()
    x = torch.zeros(6, dtype=torch.float64)
    alone = x
    for step in range(450):
        x = x - 0.1 * operator(workers.gradients(x)).mean(0)
        alone = alone - 0.1 * operator.operator(workers.gradients(alone), step=step).mean(0)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)
    assert float((alone - workers.optimum).norm()) > 1e-3


@each([EF21SGD2M(TopK(1), eta=0.3), Clip21SGD2M(0.5, eta=0.3, server=0.7), DASHA(RESCALED, a=0.2, eta=0.3)])
def test_double_momentum_leaves_no_floor(operator):
    workers = random_workers()
    x = torch.zeros(6, dtype=torch.float64)
    for _ in range(500):
        x = x - 0.1 * operator(workers.gradients(x)).mean(0)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)


def test_the_second_average_of_one_gradient():
    """A single gradient among zeros enters what is compressed with eta^2 (k + 1) (1 - eta)^k after k more steps."""
    operator = EF21SGD2M(Identity(), eta=0.3)
    for k in range(5):
        g = torch.tensor([[float(k == 0)]], dtype=torch.float64)
        assert float(operator(g)) == pytest.approx(0.09 * (k + 1) * 0.7**k)


def test_noise_is_gaussian_and_only_at_the_server():
    operator = Clip21SGD2M(1.0, eta=1, server=1, noise=0.5)
    out = operator(torch.zeros(1, 20_001, dtype=torch.float64))
    assert float(out.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float(out.mean())) < 5 * 0.5 / math.sqrt(20_001)
    assert float((out / 0.5).pow(4).mean()) == pytest.approx(3, rel=0.1)
    assert not bool(operator.state["estimate"].any())
    assert_identical(operator.state["received"], out)


def test_momentum_on_the_workers():
    assert [each.carries_momentum for each in (EF21SGD2M(Sign()), Clip21SGD2M(1.0), DASHA(Sign(), eta=0.5))] == [
        True
    ] * 3
    assert not any(each.carries_momentum for each in (DIANA(Sign()), MARINA(Sign()), DASHA(Sign())))


@pytest.mark.parametrize("weight", [0.0, -0.1, 1.1, math.nan])
def test_bad_weights(weight):
    for make in (
        lambda: EF21SGD2M(Sign(), eta=weight),
        lambda: Clip21SGD2M(1.0, eta=weight),
        lambda: Clip21SGD2M(1.0, server=weight),
        lambda: DIANA(Sign(), alpha=weight),
        lambda: MARINA(Sign(), p=weight),
        lambda: DASHA(Sign(), a=weight),
        lambda: DASHA(Sign(), eta=weight),
    ):
        with pytest.raises(ValueError, match=r"<= 1; got"):
            make()
