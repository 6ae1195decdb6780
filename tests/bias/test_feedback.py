"""Error feedback: recurrences and state, worker by worker."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from operators import FEEDBACK, assert_identical, cut, each, each_dtype
from torch import Tensor

from metamom import (
    MAML,
    Clip,
    Compose,
    CompositeMomentum,
    Identity,
    RandK,
    Sign,
    TopK,
    train,
)  # fmt: skip
from metamom.bias import EF14, EF21, EF21SGDM, BiasOperator, Clip21, Function, NonFiniteError
from metamom.nets.models import SinusoidMLP
from metamom.optim import LambdaBeta
from metamom.tasks import Sinusoid
from metamom.training.directory import read_metrics

# recurrences and state


def slow_ef14(g: Tensor, state: dict[str, Tensor], c: Callable[[Tensor], Tensor]) -> Tensor:
    p = g + state.setdefault("e", torch.zeros_like(g))
    state["e"] = p - c(p)
    return c(p)


def slow_ef21(g: Tensor, state: dict[str, Tensor], c: Callable[[Tensor], Tensor]) -> Tensor:
    h = state.setdefault("h", torch.zeros_like(g))
    state["h"] = h + c(g - h)
    return state["h"]


def slow_ef21_sgdm(g: Tensor, state: dict[str, Tensor], c: Callable[[Tensor], Tensor]) -> Tensor:
    state["v"] = 0.7 * state.setdefault("v", torch.zeros_like(g)) + 0.3 * g
    return slow_ef21(state["v"], state, c)


@pytest.mark.parametrize(
    ("operator", "inner", "slow"),
    [
        (EF14(TopK(2)), TopK(2), slow_ef14),
        (EF14(Sign()), Sign(), slow_ef14),
        (EF21(TopK(2)), TopK(2), slow_ef21),
        (EF21SGDM(TopK(2), eta=0.3), TopK(2), slow_ef21_sgdm),
        (EF21SGDM(Compose(Clip(1.0), TopK(3)), eta=0.3), Compose(Clip(1.0), TopK(3)), slow_ef21_sgdm),
        (Clip21(0.5), Clip(0.5), slow_ef21),
    ],
    ids=lambda value: value.__name__ if callable(value) and not isinstance(value, BiasOperator) else repr(value),
)
def test_recurrences_worker_by_worker(operator, inner, slow):
    generator = torch.Generator().manual_seed(0)
    states: list[dict[str, Tensor]] = [{} for _ in range(3)]
    for _ in range(6):
        g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        expected = torch.stack([slow(row, state, inner) for row, state in zip(g, states, strict=True)])
        torch.testing.assert_close(operator(g), expected, rtol=1e-12, atol=1e-14)


@each([TopK(2), Sign(), RandK(2), Identity()])
def test_ef21_sgdm_without_momentum_is_ef21(operator):
    one, other = EF21SGDM(operator, eta=1), EF21(operator)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        g = torch.randn(3, 5, generator=generator)
        assert_identical(one(g, step=step), other(g, step=step))


@pytest.mark.parametrize("kind", [EF14, EF21])
def test_without_loss_there_is_nothing_to_feed_back(kind):
    operator, generator = kind(Identity()), torch.Generator().manual_seed(0)
    for _ in range(3):
        g = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(operator(g), g)


@each(FEEDBACK)
def test_a_state_goes_on_where_it_stood(operator):
    generator = torch.Generator().manual_seed(0)
    gs = torch.randn(6, 3, 5, generator=generator)
    operator.reset()
    whole = [operator(g, sizes=cut(5)) for g in gs]
    operator.reset()
    assert operator.state == {}
    for g in gs[:3]:
        operator(g, sizes=cut(5))
    assert all(tensor.shape == (3, 5) for tensor in operator.state.values())
    saved = operator.state_dict()
    again = copy.deepcopy(operator)
    again.reset()
    for _ in range(2):  # a state loaded is not moved on by those who loaded it
        again.load_state_dict(saved)
        for g, expected in zip(gs[3:], whole[3:], strict=True):
            assert_identical(again(g, sizes=cut(5)), expected)
    operator.reset()
    assert_identical(operator(gs[0], sizes=cut(5)), whole[0])


@each(FEEDBACK)
def test_what_comes_out_is_the_callers(operator):
    generator = torch.Generator().manual_seed(0)
    gs = torch.randn(3, 2, 5, generator=generator)
    runs = []
    for spoil in (False, True):
        operator.reset()
        runs.append([])
        for g in gs:
            given = g.clone()
            out = operator(given, sizes=cut(5))
            runs[-1].append(out.clone())
            if spoil:
                out.fill_(7.0)
                given.fill_(7.0)
    for a, b in zip(*runs, strict=True):
        assert_identical(a, b)


@each(FEEDBACK)
def test_gradients_of_another_shape(operator):
    operator.reset()
    operator(torch.ones(2, 5), sizes=cut(5))
    before = operator.state
    for other in (torch.ones(3, 6), torch.ones(2, 6), torch.ones(4)):
        with pytest.raises(ValueError, match=r"keeps 5 entries of each worker; got gradients of [46]"):
            operator(other, sizes=cut(other.shape[-1]))
    for name, tensor in operator.state.items():
        assert_identical(tensor, before[name])
    operator.reset()
    operator(torch.ones(3, 6), sizes=cut(6))


@pytest.mark.parametrize("kind", [EF14, EF21, EF21SGDM])
@pytest.mark.parametrize("inner", [EF21(Sign()), Sign, None, abs], ids=["feedback", "class", "none", "function"])
def test_what_cannot_be_fed_back(kind, inner):
    with pytest.raises(TypeError, match="error feedback goes around an operator without it"):
        kind(inner)


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.1, math.nan])
def test_bad_eta(eta):
    with pytest.raises(ValueError, match="0 < eta <= 1; got"):
        EF21SGDM(Sign(), eta=eta)


def test_a_state_of_another_kind():
    one = EF14(Sign())
    one(torch.ones(2, 3))
    with pytest.raises(ValueError, match="ef21:sign keeps estimate of each worker; got error"):
        EF21(Sign()).load_state_dict(one.state_dict())


@each(FEEDBACK)
@pytest.mark.parametrize(("state", "got"), [({}, "nothing"), ({"workers": {}}, "'workers'"), ({"calls": 3}, "'calls'")])
def test_a_state_that_lacks_something(operator, state, got):
    kept = f"'workers', the {', '.join(operator.names)} of each, and 'operator', the state of {operator.operator.spec}"
    with pytest.raises(ValueError, match=re.escape(f"state_dict(): {kept}; got {got}.")):
        operator.load_state_dict(state)


def test_a_worker_without_a_state():
    with pytest.raises(ValueError, match="keeps estimate of each worker; got int"):
        EF21(Sign()).load_state_dict({"workers": {0: 3}, "operator": {}})


@each_dtype
@each([EF14(TopK(1)), EF14(RandK(1)), EF21(TopK(1)), EF21SGDM(TopK(1), eta=1), EF21(Sign())])
def test_a_state_beyond_the_dtype_is_refused(operator, dtype):
    """Each gradient is finite, but not its sum with what the state holds; the state is then as it was."""
    operator.reset()
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    g = (signs * torch.finfo(dtype).max).flip(0)  # row 1
    operator(g)
    before = {name: tensor.clone() for name, tensor in operator.state.items()}
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=rf" row 1 .*beyond the range of {dtype}"):
            operator(g if isinstance(operator, EF14) else -g)
        for name, tensor in operator.state.items():
            assert_identical(tensor, before[name])
    operator.reset()


@each(FEEDBACK)
def test_a_worker_s_state_goes_with_its_number(operator):
    """A slow twin: an operator for each worker, in whatever company and order their gradients come."""
    generator = torch.Generator().manual_seed(0)
    operator.reset()
    alone = {worker: copy.deepcopy(operator) for worker in range(6)}
    for step, workers in enumerate([[0, 1], [2], [2, 0], [5, 1, 0], [1], range(1, 6)]):
        g = torch.randn(len(workers), 5, generator=generator, dtype=torch.float64)
        out = operator(g, step=step, workers=workers, sizes=cut(5))
        for row, worker in enumerate(workers):
            expected = alone[worker](g[row], step=step, workers=[worker], sizes=cut(5))
            torch.testing.assert_close(out[row], expected, rtol=1e-12, atol=1e-14)
    assert all(len(tensor) == 6 for tensor in operator.state.values())
    operator.reset()


def test_workers_that_do_not_fit_the_gradients():
    for workers in ([0], [0, 0], [0, -1], range(3)):
        with pytest.raises(ValueError, match="workers are 2 numbers >= 0 that differ, one for each gradient; got"):
            EF21(Sign())(torch.ones(2, 3), workers=workers)


class Failing(Function):
    """Fails on request."""

    def __init__(self) -> None:
        super().__init__(self.keep)
        self._fails = False

    def keep(self, gradient: Tensor) -> Tensor:
        if self._fails:
            raise RuntimeError("failed")
        return gradient / 2


@pytest.mark.parametrize("kind", [EF14, EF21, EF21SGDM])
def test_an_error_within_leaves_the_state_as_it_was(kind):
    g = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    inner = Failing()
    for member in (inner, Compose(RandK(3), inner)):
        operator, twin = kind(member), kind(copy.deepcopy(member))
        for step in range(4):
            inner._fails = True
            with pytest.raises(RuntimeError, match="failed"):
                operator(g[-1 - step])
            inner._fails = False
            assert_identical(operator(g[step]), twin(g[step]))
            for name, tensor in operator.state.items():
                assert_identical(tensor, twin.state[name])


def test_a_schedule_may_not_give_the_server_momentum(tmp_path):
    learner = MAML(SinusoidMLP(generator=torch.Generator().manual_seed(0)), torch.nn.functional.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01, beta=1.0)
    schedule = LambdaBeta(optimizer, lambda step: 1.0 if step < 2 else 0.5)
    keys = {"iterations": 5, "meta_batch": 4, "workers": 2, "schedulers": [schedule], "run_dir": tmp_path}
    with pytest.raises(ValueError, match=r"server must have none.*no schedule of beta; got .*\{'beta': 0\.5\}"):
        train(learner, optimizer, Sinusoid(), bias=EF21SGDM(TopK(3)), **keys)
    assert len(read_metrics(tmp_path)) == 2  # the steps before it


# after a checkpoint is loaded elsewhere


@pytest.mark.parametrize("kind", [EF14, EF21, EF21SGDM])
def test_feedback_answers_in_the_gradients_dtype(kind):
    operator, g = kind(TopK(1)), torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    operator(g)
    resumed = kind(TopK(1))
    resumed.load_state_dict(operator.state_dict())
    resumed._workers = {i: {n: t.double() for n, t in kept.items()} for i, kept in resumed._workers.items()}
    out = resumed(g)
    assert out.dtype is torch.float32
    assert torch.equal(out, operator(g))
    assert all(t.dtype is torch.float32 for t in resumed.state.values())


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("elsewhere", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_the_servers_estimates_answer_where_the_messages_are(each, elsewhere, monkeypatch):
    """Estimates from a checkpoint on the CPU, in float32, and messages that came elsewhere or in another dtype."""
    operator = EF21(TopK(1))
    g = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    operator.receive(operator.send(g, step=0, workers=[0, 1]), 2, torch.float32, each=each)
    resumed = EF21(TopK(1))
    resumed.load_state_dict(operator.state_dict())
    change = torch.ones(2, 2) if each else torch.ones(2)
    arrived = change.to(**elsewhere)
    monkeypatch.setattr(resumed.operator, "transition_receive", lambda _, state, *__, **___: (arrived, state))
    estimates = resumed.receive([], 2, torch.float32, each=each)
    assert estimates.device == arrived.device
    assert estimates.dtype is arrived.dtype
    if "dtype" in elsewhere:
        sent = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        assert torch.equal(estimates, 1 + (sent if each else sent.sum(0)))


def test_states_of_workers_that_have_passed_since_and_of_others():
    """Some workers' gradients have come on a GPU since a checkpoint was loaded on the CPU, others' not yet."""
    operator = EF14(TopK(1))
    operator(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    operator._workers[0] = {name: tensor.to("meta") for name, tensor in operator._workers[0].items()}
    assert operator.state["error"].device.type == "meta"
    assert operator.state["error"].shape == (2, 2)
