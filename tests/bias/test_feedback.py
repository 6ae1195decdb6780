"""Error feedback: its recurrences, its state, and the floor that it removes, on workers' quadratics.

Worker i has f_i(x) = 1/2 sum_j a_ij (x_j - c_ij)^2, so that everything has a closed form; all in float64.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from operators import FEEDBACK, assert_identical, cut, each, each_dtype
from torch import Tensor

from metamom import (
    MAML,
    BiasedAccumulator,
    Clip,
    Compose,
    CompositeMomentum,
    Identity,
    RandK,
    Sign,
    TaskBatch,
    TopK,
    averaged,
    train,
)  # fmt: skip
from metamom.bias import EF14, EF21, EF21SGDM, BiasOperator, Clip21, Function, NonFiniteError
from metamom.nets.models import SinusoidMLP
from metamom.optim import LambdaBeta
from metamom.tasks import Sinusoid
from metamom.training.directory import read_metrics

BETAS = (1.0, 0.3, 0.1)


class Workers(NamedTuple):
    """Curvatures ``a [n, d]`` and centres ``c [n, d]``."""

    a: Tensor
    c: Tensor

    @property
    def optimum(self) -> Tensor:
        return (self.a * self.c).sum(0) / self.a.sum(0)

    def gradients(self, x: Tensor) -> Tensor:
        return self.a * (x - self.c)

    def value(self, x: Tensor) -> float:
        return float((self.a * (x - self.c).square()).sum(1).mean() / 2)

    def square(self, x: Tensor) -> float:
        """``||grad f(x)||^2``."""
        return float(self.gradients(x).mean(0).square().sum())

    def zeta2(self, x: Tensor) -> float:
        g = self.gradients(x)
        return float((g - g.mean(0)).square().sum(1).mean())


def random_workers(n: int = 4, d: int = 6, alike: bool = False) -> Workers:
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.rand(1 if alike else n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    return Workers((0.5 + a).expand(n, d), (6 * c - 3).expand(n, d))


def vectors(*rows: list[float]) -> Workers:
    """Of curvature one."""
    c = torch.tensor(rows, dtype=torch.float64)
    return Workers(torch.ones_like(c), c)


def descend(
    workers: Workers, operator: BiasOperator, *, beta: float = 1.0, lr: float = 0.1, steps: int = 1000
) -> tuple[Tensor, list[float]]:
    """The last point, and the squared gradient norms on the way, from 0; v_{-1} = 0."""
    operator.reset()
    x = torch.zeros_like(workers.c[0])
    v = torch.zeros_like(x)
    squares = []
    for step in range(steps):
        squares.append(workers.square(x))
        v = (1 - beta) * v + beta * operator(workers.gradients(x), step=step).mean(0)
        x = x - lr * v
    return x, squares


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
    with pytest.raises(ValueError, match=re.escape(f"state_dict() gave: {kept}; got {got}.")):
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
    """Fails when told to."""

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


# floors, without it

CLIPPED = random_workers()
FLOORS = {
    # Workers 1 and 2 keep the first entry, 3 and 4 the second: each coordinate is the mean of its keepers' centres.
    "topk": (TopK(1), vectors([-10, 3], [12, 3], [0, 20], [0, -12]), [1.0, 4.0]),
    # One worker in each quadrant: their 1-norms balance across both diagonals.
    "sign": (Sign(), vectors([-4, -3], [-6, 7], [3, -9], [5, 2]), [-0.25, 0.25]),
    "clip": (Clip(0.5), CLIPPED, None),
}


@pytest.mark.parametrize("name", FLOORS)
def test_no_beta_lowers_the_floor_of_workers_that_differ(name):
    operator, workers, expected = FLOORS[name]
    ends = [descend(workers, operator, beta=beta, steps=2500)[0] for beta in BETAS]
    for x in ends:
        torch.testing.assert_close(x, ends[0], rtol=0, atol=1e-8)
        if expected is not None:
            torch.testing.assert_close(x, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)
    floor = workers.square(ends[0])
    norms = workers.gradients(ends[0]).norm(dim=1)
    constants = operator.constants(workers.c.shape[1], zeta2=workers.zeta2(ends[0]), bound=float(norms.max()))
    assert 0.01 < floor <= constants.floor
    assert float(operator(workers.gradients(ends[0])).mean(0).norm()) < 1e-8  # where it stops


@pytest.mark.parametrize("beta", BETAS)
@each([TopK(1), TopK(3), Sign(), Clip(0.5), Compose(Clip(0.5), TopK(2))])
def test_workers_alike_converge_exactly(operator, beta):
    workers = random_workers(alike=True)
    x, _ = descend(workers, operator, beta=beta)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_unscaled_rand_k_has_no_floor(beta):
    """b^2 = 0 although the workers differ; what is left is noise, which goes with the step size."""
    workers, operator = random_workers(), RandK(2)
    sigma2 = operator.constants(6, workers=4, zeta2=workers.zeta2(workers.optimum)).sigma2
    for lr in (0.1, 0.02):
        _, squares = descend(workers, operator, beta=beta, lr=lr, steps=int(25 / lr))
        assert sum(squares[len(squares) // 2 :]) / (len(squares) / 2) < lr * sigma2 * 4


# and with it


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.parametrize("kind", [EF21, EF21SGDM])
def test_feedback_removes_the_floor(kind, name):
    operator, workers, _ = FLOORS[name]
    x, _ = descend(workers, kind(operator), lr=0.05, steps=1500)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)


@each([TopK(1), TopK(2), Sign(), Compose(Clip(0.5), TopK(2))])
@pytest.mark.parametrize("kind", [EF21, EF21SGDM])
def test_feedback_removes_every_floor(kind, operator):
    workers = random_workers()
    x, _ = descend(workers, kind(operator), lr=0.05, steps=1500)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_clip21_is_gradient_descent_in_the_end(tau):
    workers = random_workers()
    operator = Clip21(tau)
    x, _ = descend(workers, operator, lr=0.05, steps=1200)
    torch.testing.assert_close(x, workers.optimum, rtol=0, atol=1e-9)
    torch.testing.assert_close(operator.state["estimate"], workers.gradients(x), rtol=0, atol=1e-9)


@each([TopK(1), Sign()])
def test_ef14_leaves_a_floor_that_goes_with_the_step_size(operator):
    """avg ||grad f||^2 <= 2 D0 / (gamma K) + L gamma a / (1-a) zeta^2 for gamma <= (1-a) / ((1+a) L)."""
    c = random_workers().c
    workers = Workers(torch.ones_like(c), c)  # of equal curvature, so that zeta^2 is the same everywhere
    a = math.sqrt(1 - operator.contraction(6))
    start = workers.value(torch.zeros(6, dtype=torch.float64)) - workers.value(workers.optimum)
    largest = (1 - a) / (1 + a)
    tails = []
    for lr in (largest, largest / 10):
        _, squares = descend(workers, EF14(operator), lr=lr, steps=1500)
        bound = 2 * start / (lr * 1500) + lr * a / (1 - a) * workers.zeta2(workers.optimum)
        assert sum(squares) / 1500 <= bound
        tails.append(sum(squares[1000:]) / 500)
    biased = descend(workers, operator, lr=largest / 10, steps=1500)[1]
    assert tails[1] < 0.1 * tails[0]
    assert tails[1] < 0.05 * sum(biased[1000:]) / 500


def largest_ef21_step(alpha: float, smoothness: float, mean_smoothness: float) -> float:
    """1 / (L + L~ a / (1-a)), a = sqrt(1 - alpha_c)."""
    a = math.sqrt(1 - alpha)
    return 1 / (smoothness + mean_smoothness * a / (1 - a))


@each([TopK(1), TopK(2), TopK(6), Sign()])
def test_ef21_keeps_its_bound_at_the_largest_step(operator):
    """avg ||grad f||^2 <= 2 D0 / (gamma K) + G0 / ((1-a) K), for every K (docs/theory.md)."""
    assert largest_ef21_step(0.25, 1.0, 1.5) == pytest.approx(0.0934915622441133, abs=1e-15)
    workers = random_workers()
    alpha = operator.contraction(6)
    a = math.sqrt(1 - alpha)
    smoothness = float(workers.a.mean(0).max())
    lr = largest_ef21_step(alpha, smoothness, float(workers.a.max(1).values.square().mean().sqrt()))
    zero = torch.zeros(6, dtype=torch.float64)
    start = workers.value(zero) - workers.value(workers.optimum)
    g = workers.gradients(zero)
    missed = float((operator(g) - g).square().sum(1).mean())
    assert missed <= (1 - alpha) * float(g.square().sum(1).mean()) * (1 + 1e-12)
    _, squares = descend(workers, EF21(operator), lr=lr)
    total = 0.0
    for k, square in enumerate(squares, 1):
        total += square
        assert total / k <= 2 * start / (lr * k) + missed / ((1 - a) * k)


@pytest.mark.parametrize("path", ["MAML", "BiasedAccumulator"])
def test_momentum_on_the_workers_is_not_averaged_again_by_the_server(path):
    """In anybody's loop too: the optimizer sees it from the gradient, and nothing has moved."""
    w = torch.nn.Linear(2, 1, bias=False)
    operator = EF21SGDM(TopK(1), eta=0.5)
    learner = MAML(w, torch.nn.functional.mse_loss)
    accumulator = BiasedAccumulator(w.parameters(), bias=operator, workers=1)
    generator = torch.Generator().manual_seed(0)

    def backward(bias):
        w.zero_grad()
        x, y = torch.randn(2, 3, 2, generator=generator), torch.randn(2, 3, 1, generator=generator)
        if path == "MAML":
            learner.backward(TaskBatch(x, y, x, y), bias=bias)
        else:
            w(x).square().sum().backward()
            accumulator.bias = bias
            accumulator.add()
            accumulator.finish()

    optimizer = CompositeMomentum(w.parameters(), lr=0.1, beta=0.3)
    before = w.weight.detach().clone()
    backward(operator)
    with pytest.raises(ValueError, match=r"ef21-sgdm\(0\.5\):topk:1 carries the momentum.*beta=1.*got beta=0\.3"):
        optimizer.step()
    assert torch.equal(w.weight.detach(), before)
    assert not optimizer.state
    optimizer.param_groups[0]["beta"] = 1.0
    optimizer.step()
    assert not torch.equal(w.weight.detach(), before)
    optimizer.param_groups[0]["beta"] = 0.3
    backward(EF21(TopK(1)))  # no momentum of its own: nothing to be said
    optimizer.step()


def averaged_gradient(operator=None) -> tuple[torch.nn.Linear, CompositeMomentum]:
    """A layer whose gradient comes from workers with momentum of their own, and an optimizer that would add more."""
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = CompositeMomentum(layer.parameters(), lr=0.1, beta=0.3)
    x, y = torch.ones(2, 3, 2), torch.ones(2, 3, 1)
    MAML(layer, torch.nn.functional.mse_loss).backward(TaskBatch(x, y, x, y), bias=operator or EF21SGDM(TopK(1)))
    return layer, optimizer


def halve(layer):
    layer.weight.grad = layer.weight.grad * 0.5


def add_another_gradient(layer):
    layer(torch.ones(1, 2)).sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        halve,
        add_another_gradient,
        lambda layer: torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e-3),
        lambda layer: setattr(layer.weight, "grad", layer.weight.grad.clone()),
        lambda layer: layer.weight.grad.mul_(0.5),
    ],
    ids=["assigned", "accumulated", "clipped", "cloned", "in place"],
)
def test_the_guard_outlives_changes_of_the_gradient(change):
    layer, optimizer = averaged_gradient()
    change(layer)
    with pytest.raises(ValueError, match=r"ef21-sgdm\(0\.1\):topk:1 carries the momentum"):
        optimizer.step()
    assert not vars(layer.weight.grad)  # nothing hangs on somebody else's tensor
    assert not vars(layer.weight)


@pytest.mark.parametrize("zero", ["optimizer", "to zero", "new optimizer", "other operator"])
def test_the_guard_ends_with_the_gradient(zero):
    """The same parameters train by other means afterwards."""
    layer, optimizer = averaged_gradient()
    if zero == "new optimizer":
        layer.zero_grad()
        optimizer = CompositeMomentum(layer.parameters(), lr=0.1, beta=0.3)
    elif zero == "other operator":
        layer.zero_grad()
        x = torch.ones(2, 3, 2)
        batch = TaskBatch(x, x[..., :1], x, x[..., :1])
        MAML(layer, torch.nn.functional.mse_loss).backward(batch, bias=TopK(1))
    else:
        optimizer.zero_grad(set_to_none=zero == "optimizer")
    add_another_gradient(layer)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight.detach())


def test_a_step_uses_the_gradient_up():
    layer, optimizer = averaged_gradient()
    optimizer.param_groups[0]["beta"] = 1.0
    optimizer.step()
    layer.zero_grad()
    optimizer.param_groups[0]["beta"] = 0.3
    add_another_gradient(layer)
    optimizer.step()


def test_the_guard_keeps_neither_parameters_nor_operators_alive():
    operator = EF21SGDM(TopK(1))
    layer, optimizer = averaged_gradient(operator)
    gone = weakref.ref(layer.weight), weakref.ref(operator)
    noted = len(averaged._specs)
    del layer, optimizer, operator
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert len(averaged._specs) < noted


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
    monkeypatch.setattr(resumed.operator, "receive", lambda *_, **__: change.to(**elsewhere))
    estimates = resumed.receive([], 2, torch.float32, each=each)
    assert estimates.device == change.to(**elsewhere).device
    assert estimates.dtype is change.to(**elsewhere).dtype
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
