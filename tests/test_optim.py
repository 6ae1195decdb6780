"""CompositeMomentum: equal to torch's SGD where the two coincide, and a torch optimizer in every other respect."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from metamom import CompositeMomentum, LambdaBeta, momentum_update
from metamom.theory import bound_1c

SHAPES = [(3, 2), (5,), (), (2, 3, 1, 2)]
BETAS = [0.01, 0.1, 0.3, 0.5, 0.9]


def make_params(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Noise around a quadratic's gradient: it depends on the parameters, so that differences feed back."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (p.detach() * 2 + torch.randn(p.shape, generator=generator)).to(p.dtype)


def run(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int = 100, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """The parameters after every step."""
    params = make_params(dtype)
    optimizer = make(params)
    trace = []
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        trace.append([p.detach().clone() for p in params])
    return trace


def assert_same(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert torch.equal(x, y), f"step {step}, tensor {i}: differs by {(x - y).abs().max()}"
    assert not torch.equal(ours[0][0], ours[-1][0])  # and something happened


def step_once(optimizer: torch.optim.Optimizer, grads: list[float] | float) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, grads if isinstance(grads, list) else [grads] * len(params), strict=True):
        p.grad = torch.full_like(p, g)
    optimizer.step()


def scalar(value: float = 1.0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=dtype))


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"maximize": True}], ids=["plain", "decay", "max"])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_start_is_dampened_sgd_bit_for_bit(beta, options, foreach):
    lr = 0.02 if not options.get("maximize") else 0.001  # ascent on a convex function grows
    ours = run(lambda p: CompositeMomentum(p, lr, beta, first_step="gradient", foreach=foreach, **options))
    theirs = run(lambda p: torch.optim.SGD(p, lr, momentum=1 - beta, dampening=1 - beta, foreach=False, **options))
    assert_same(ours, theirs)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}], ids=["plain", "decay"])
def test_zero_start_is_undampened_sgd_with_a_smaller_step(beta, options):
    ours = run(lambda p: CompositeMomentum(p, 0.02, beta, **options), dtype=torch.float64)
    theirs = run(lambda p: torch.optim.SGD(p, 0.02 * beta, momentum=1 - beta, **options), dtype=torch.float64)
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)  # the scale is 1


@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}, {"maximize": True}], ids=["plain", "decay", "max"])
def test_beta_one_is_plain_sgd_bit_for_bit(first_step, foreach, options):
    ours = run(lambda p: CompositeMomentum(p, 0.003, 1.0, first_step=first_step, foreach=foreach, **options))
    assert_same(ours, run(lambda p: torch.optim.SGD(p, 0.003, **options)))


def test_the_two_first_steps_differ_as_stated():
    """From v_0 = g_0 the first gradient enters the sum of all steps with weight 1/beta instead of 1."""
    moved = {}
    for first_step in ("zero", "gradient"):
        optimizer = CompositeMomentum([w := scalar(0.0)], lr=1.0, beta=0.1, first_step=first_step)
        for k in range(2000):
            step_once(optimizer, 1.0 if k == 0 else 0.0)
        moved[first_step] = -w.item()
    assert moved["zero"] == pytest.approx(1, abs=1e-12)
    assert moved["gradient"] == pytest.approx(10, abs=1e-12)


def test_trajectory_of_a_biased_quadratic():
    """f = x^2/2, beta = 1/2, gamma = 1/3, bias +0.3, from x = 1, v = 0: worked out by hand."""
    optimizer = CompositeMomentum([x := scalar(1.0)], lr=1 / 3, beta=0.5)
    xs, vs = [], []
    for _ in range(5):
        step_once(optimizer, x.item() + 0.3)
        xs.append(x.item())
        vs.append(optimizer.state[x]["momentum"].item())
    assert xs == pytest.approx([0.7833333333, 0.4944444444, 0.2175925926, -0.0070987654, -0.1682613169], abs=1e-10)
    assert vs == pytest.approx([0.65, 0.8666666667, 0.8305555556, 0.6740740741, 0.4834876543], abs=1e-10)
    for _ in range(300):
        step_once(optimizer, x.item() + 0.3)
    assert x.item() == pytest.approx(-0.3, abs=1e-12)  # whatever beta: the bias sets the limit


finite = st.floats(-1e6, 1e6, allow_nan=False)
betas = st.floats(1e-6, 1.0)


@settings(deadline=None)
@given(v=st.lists(finite, min_size=1, max_size=6), beta=betas, data=st.data())
def test_momentum_update_is_a_convex_combination(v, beta, data):
    g = data.draw(st.lists(finite, min_size=len(v), max_size=len(v)))
    old, new = torch.tensor(v, dtype=torch.float64), torch.tensor(g, dtype=torch.float64)
    kept = old.clone(), new.clone()
    out = momentum_update(old, new, beta)
    slack = 1e-15 * (old.abs() + new.abs())  # two roundings
    assert bool((out >= torch.minimum(old, new) - slack).all())
    assert bool((out <= torch.maximum(old, new) + slack).all())
    assert torch.equal(old, kept[0])
    assert torch.equal(new, kept[1])


@settings(deadline=None)
@given(gs=st.lists(finite, min_size=1, max_size=30), v=finite, beta=betas)
def test_k_updates_are_the_weighted_average_of_their_gradients(gs, v, beta):
    """v_K = (1-b)^(K+1) v_{-1} + b sum_k (1-b)^(K-k) g_k, with weights that sum to one."""
    buf = torch.tensor(v, dtype=torch.float64)
    for g in gs:
        buf = momentum_update(buf, torch.tensor(g, dtype=torch.float64), beta)
    weights = [beta * (1 - beta) ** (len(gs) - 1 - k) for k in range(len(gs))]
    first = (1 - beta) ** len(gs)
    assert math.isclose(first + sum(weights), 1, rel_tol=1e-9)
    expected = first * v + math.fsum(w * g for w, g in zip(weights, gs, strict=True))
    assert buf.item() == pytest.approx(expected, rel=1e-12, abs=1e-12 * max(map(abs, [v, *gs])))


@pytest.mark.parametrize("past", [math.nan, math.inf])
def test_beta_one_forgets_even_a_past_that_is_not_finite(past):
    assert momentum_update(torch.tensor([past]), torch.tensor([3.0]), 1.0).tolist() == [3.0]


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        momentum_update(torch.zeros(1), torch.zeros(1), beta)
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        CompositeMomentum(make_params(), 0.1, beta)
    optimizer = CompositeMomentum([scalar()], 0.1, 0.5)
    optimizer.param_groups[0]["beta"] = beta
    with pytest.raises(ValueError, match=r"beta .* must be in \(0, 1\]"):
        step_once(optimizer, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_together_and_one_by_one_agree_exactly(dtype, beta, first_step):
    options = {"lr": 0.02, "beta": beta, "first_step": first_step, "weight_decay": 0.01}
    single = run(lambda p: CompositeMomentum(p, foreach=False, **options), 20, dtype)
    together = run(lambda p: CompositeMomentum(p, foreach=True, **options), 20, dtype)
    assert_same(single, together)
    assert all(p.dtype == dtype for p in together[-1])


def test_one_group_may_mix_dtypes():
    params = [scalar(1.0, torch.float32), scalar(1.0, torch.float64), scalar(2.0, torch.float32)]
    step_once(CompositeMomentum(params, 0.1, 0.5, foreach=True), 1.0)
    assert [p.item() for p in params] == pytest.approx([0.95, 0.95, 1.95])
    assert params[1].item() == 1 - 0.1 * 0.5


def test_groups_have_their_own_options():
    params = make_params()
    options = [
        {"lr": 0.1, "beta": 1.0},
        {"lr": 0.01, "first_step": "gradient", "foreach": False},
        {"maximize": True, "beta": 0.7},
        {"weight_decay": 0.5, "foreach": True},
    ]
    optimizer = CompositeMomentum([{"params": [p], **o} for p, o in zip(params, options, strict=True)], lr=0.03)
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
    alone = make_params()
    for i, o in enumerate(options):
        single = CompositeMomentum([alone[i]], **{"lr": 0.03, **o})
        for step in range(5):
            set_gradients(alone, step)
            single.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


BAD_OPTIONS = [
    ({"lr": 0.0}, "lr is the step size"),
    ({"lr": -0.1}, "lr is the step size"),
    ({"lr": math.nan}, "lr is the step size"),
    ({"lr": math.inf}, "lr is the step size"),
    ({"lr": torch.tensor([0.1, 0.1])}, "one element"),
    ({"lr": torch.tensor(-0.1)}, "lr is the step size"),
    ({"beta": 0}, "beta is the weight of the new gradient"),
    ({"first_step": "grad"}, "first_step must be"),
    ({"first_step": None}, "first_step must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"weight_decay": math.nan}, "weight_decay must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([scalar()], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([{"params": [scalar()], **options}], lr=0.1)
    optimizer = CompositeMomentum([scalar()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [scalar()], **options})
    assert len(optimizer.param_groups) == 1


def test_an_added_group_takes_the_constructors_options():
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.25, first_step="gradient", weight_decay=0.5)
    step_once(optimizer, 1.0)
    optimizer.add_param_group({"params": [late := scalar(2.0)], "lr": 1.0})
    step_once(optimizer, 1.0)
    assert late.item() == 2 - 1.0 * (1 + 0.5 * 2)  # its first step, though the optimizer's second
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [late]})


def test_closure_runs_once_before_the_step_with_gradients():
    optimizer = CompositeMomentum([w := scalar(3.0)], lr=0.1, beta=1.0)
    calls = []

    def closure() -> Tensor:
        calls.append(w.item())
        optimizer.zero_grad()
        loss = w.square()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [3.0]
    assert loss.item() == 9.0
    assert w.item() == pytest.approx(3 - 0.1 * 6)
    assert optimizer.step() is None


@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_state_dict_goes_on_where_it_stood(first_step):
    def make(params: list[nn.Parameter]) -> CompositeMomentum:
        return CompositeMomentum(params, 0.02, 0.1, first_step=first_step, weight_decay=0.01)

    expected = run(make, 20)
    params = make_params()
    optimizer = make(params)
    for step in range(10):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    optimizer = CompositeMomentum(params, lr=5.0)  # every option comes from the saved groups
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(10, 20):
        set_gradients(params, step)
        optimizer.step()
        for p, q in zip(params, expected[step], strict=True):
            assert torch.equal(p, q)


def test_state_dict_loads_into_another_dtype():
    params = make_params(torch.float64)
    optimizer = CompositeMomentum(params, 0.02)
    set_gradients(params, 0)
    optimizer.step()
    other = make_params(torch.float32)
    loaded = CompositeMomentum(other, 0.02)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other, strict=True):
        buf = loaded.state[q]["momentum"]
        assert buf.dtype == torch.float32
        assert torch.equal(buf, optimizer.state[p]["momentum"].float())
    set_gradients(other, 1)
    loaded.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_alike_and_apart(duplicate):
    params = make_params()
    optimizer = CompositeMomentum(params, 0.02)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    twin = duplicate(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    set_gradients(theirs, 1)
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))  # the original stays
    set_gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 10),  # a warm-up from zero
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rate_schedulers(name):
    def scheduled(make):
        params = make_params()
        optimizer = make(params)
        scheduler = SCHEDULERS[name](optimizer)
        trace, lrs = [], set()
        for step in range(20):
            set_gradients(params, step)
            optimizer.step()
            trace.append([p.detach().clone() for p in params])
            lrs.add(optimizer.param_groups[0]["lr"])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert len(lrs) > 2
        return trace

    ours = scheduled(lambda p: CompositeMomentum(p, 0.02, 0.1, first_step="gradient"))
    assert_same(ours, scheduled(lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, dampening=0.9)))


def test_learning_rate_may_be_a_tensor():
    lr = torch.tensor(0.02)
    number = run(lambda p: CompositeMomentum(p, float(lr)), 10)
    assert_same(run(lambda p: CompositeMomentum(p, lr.clone()), 10), number)
    optimizer = CompositeMomentum([w := scalar(1.0)], lr=torch.tensor(0.5), beta=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    step_once(optimizer, 1.0)
    scheduler.step()
    step_once(optimizer, 1.0)
    assert w.item() == 1 - 0.5 - 0.25


def test_lambda_beta_schedules_each_group():
    optimizer = CompositeMomentum([{"params": [scalar()]}, {"params": [scalar()], "beta": 0.4}], lr=0.1, beta=0.8)
    schedule = LambdaBeta(optimizer, [lambda k: 1 / (1 + k), lambda k: 0.5**k])
    seen = [schedule.get_last_beta()]
    for _ in range(3):
        step_once(optimizer, 1.0)
        schedule.step()
        seen.append([group["beta"] for group in optimizer.param_groups])
    expected = [[0.8, 0.4], [0.4, 0.2], [0.8 / 3, 0.1], [0.2, 0.05]]
    assert [b for row in seen for b in row] == pytest.approx([b for row in expected for b in row])


def test_scheduled_betas_are_the_ones_used():
    optimizer = CompositeMomentum([w := scalar(0.0)], lr=1.0, beta=0.8)
    schedule = LambdaBeta(optimizer, lambda k: 0.5**k)
    v = expected = 0.0
    for k, g in enumerate([1.0, -2.0, 3.0]):
        step_once(optimizer, g)
        schedule.step()
        beta = 0.8 * 0.5**k
        v = (1 - beta) * v + beta * g
        expected -= v
    assert w.item() == pytest.approx(expected, abs=1e-14)


def test_lambda_beta_state_dict():
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.8)
    schedule = LambdaBeta(optimizer, lambda k: 1 / (1 + k))
    for _ in range(3):
        schedule.step()
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    other = CompositeMomentum([scalar()], lr=0.1, beta=0.3)
    resumed = LambdaBeta(other, lambda k: 1 / (1 + k))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["beta"] == optimizer.param_groups[0]["beta"] == pytest.approx(0.2)
    schedule.step()
    resumed.step()
    assert resumed.get_last_beta() == schedule.get_last_beta() == pytest.approx([0.16])


def test_lambda_beta_errors():
    with pytest.raises(TypeError, match="LambdaBeta needs an optimizer with a beta; got SGD"):
        LambdaBeta(torch.optim.SGD([scalar()], lr=0.1), lambda k: 1.0)
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.5)
    with pytest.raises(ValueError, match="one for each of 1 groups; got 2"):
        LambdaBeta(optimizer, [lambda k: 1.0] * 2)
    for factor in (0.0, 3.0, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            LambdaBeta(optimizer, lambda k, factor=factor: factor)
    schedule = LambdaBeta(optimizer, lambda k: 1.0 - k)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]; got 0"):
        schedule.step()
    assert optimizer.param_groups[0]["beta"] == 0.5


@pytest.mark.parametrize("foreach", [False, True])
def test_sparse_gradients_are_refused(foreach):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    optimizer = CompositeMomentum(embedding.parameters(), lr=0.1, foreach=foreach)
    with pytest.raises(TypeError, match=r"dense gradients; got one with layout torch.sparse_coo .*\(4, 2\)"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("foreach", [False, True])
def test_parameters_without_gradient_are_left_alone(foreach):
    used, idle = scalar(1.0), scalar(2.0)
    optimizer = CompositeMomentum([used, idle], lr=0.1, beta=0.5, weight_decay=0.1, foreach=foreach)
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert idle.item() == 2.0
    assert idle not in optimizer.state
    idle.grad = torch.ones_like(idle)
    optimizer.step()
    momentum = optimizer.state[idle]["momentum"].clone()
    idle.grad = None
    value = idle.item()
    optimizer.step()
    assert idle.item() == value
    assert torch.equal(optimizer.state[idle]["momentum"], momentum)
    assert all(p.grad is None for p in (idle,))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"maximize": True, "weight_decay": 0.3}])
def test_gradients_are_not_modified_nor_kept(foreach, first_step, options):
    params = make_params()
    optimizer = CompositeMomentum(params, 0.1, 0.5, first_step=first_step, foreach=foreach, **options)
    for step in range(2):
        set_gradients(params, step)
        before = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))
        kept = [optimizer.state[p]["momentum"].clone() for p in params]
        for p in params:
            p.grad.fill_(math.nan)  # nor may the momentum be the gradient itself
        assert all(torch.equal(optimizer.state[p]["momentum"], v) for p, v in zip(params, kept, strict=True))


def test_steps_do_not_build_a_graph():
    params = make_params()
    optimizer = CompositeMomentum(params, 0.1)
    set_gradients(params, 0)
    optimizer.step()
    assert all(p.is_leaf and p.requires_grad for p in params)
    assert not any(optimizer.state[p]["momentum"].requires_grad for p in params)


def test_trains_a_network_in_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    net = nn.Linear(3, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    optimizer = CompositeMomentum(net.parameters(), lr=0.1, beta=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-6


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("first_step", ["zero", "gradient"])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_normalised_steps_written_out(beta, first_step, foreach):
    """``w <- w - lr v / ||v||`` with the norm over all tensors of both groups."""
    params, twins = make_params(torch.float64), make_params(torch.float64)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.3}]
    optimizer = CompositeMomentum(groups, lr=0.1, beta=beta, first_step=first_step, foreach=foreach, normalize=True)
    v: list[Tensor] = []
    for step in range(6):
        set_gradients(params, step)
        set_gradients(twins, step)
        optimizer.step()
        grads = [twin.grad for twin in twins]
        v = v or [g.clone() if first_step == "gradient" else torch.zeros_like(g) for g in grads]
        v = [(1 - beta) * old + beta * g for old, g in zip(v, grads, strict=True)]
        norm = torch.cat([x.flatten() for x in v]).norm()
        for i, (p, twin, x) in enumerate(zip(params, twins, v, strict=True)):
            twin.data -= (0.1 if i < 2 else 0.3) * x / norm
            torch.testing.assert_close(p, twin, rtol=1e-13, atol=1e-14)


def test_a_normalised_step_is_as_long_as_the_step_size():
    params = make_params()
    before = torch.cat([p.detach().flatten().clone() for p in params])
    set_gradients(params, 0)
    CompositeMomentum(params, lr=0.25, normalize=True).step()
    assert float((torch.cat([p.detach().flatten() for p in params]) - before).norm()) == pytest.approx(0.25, rel=1e-6)


def test_normalised_half_precision_neither_overflows_nor_vanishes():
    """The squares of 1e-5 and 1e3 do, in float16; each step is 1 / sqrt(2), rounded to 11 bits."""
    for size in (1e-5, 1e3):
        params = [nn.Parameter(torch.zeros(1, dtype=torch.float16)) for _ in range(2)]
        step_once(CompositeMomentum(params, lr=1.0, beta=1.0, normalize=True), size)
        for p in params:
            assert p.item() == pytest.approx(-(0.5**0.5), rel=2e-2 if size < 1 else 2**-10)  # 1e-5 is 168 * 2^-24 there


def test_no_direction_and_no_number():
    still = scalar()
    step_once(CompositeMomentum([still], lr=1.0, normalize=True), 0.0)
    assert still.item() == 1.0
    lost = scalar()
    step_once(CompositeMomentum([lost], lr=1.0, normalize=True), math.nan)
    assert math.isnan(lost.item())


def test_a_group_that_does_not_normalise_is_left_out_of_the_norm():
    plain, normal = scalar(), scalar()
    groups = [{"params": [plain]}, {"params": [normal], "normalize": True}]
    step_once(CompositeMomentum(groups, lr=0.1, beta=1.0), [30.0, 4.0])
    assert (plain.item(), normal.item()) == pytest.approx((1 - 3.0, 1 - 0.1))


def test_states_saved_before_normalisation_load():
    w = scalar()
    optimizer = CompositeMomentum([w], lr=0.1, beta=0.5)
    step_once(optimizer, 1.0)
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        del group["normalize"]
    other = CompositeMomentum([w], lr=0.1, beta=0.5)
    other.load_state_dict(old)
    step_once(other, 1.0)
    assert w.item() == pytest.approx(1 - 0.05 - 0.075)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("gamma", [0.02, 0.2])
def test_normalised_momentum_stays_within_its_bound(beta, gamma):
    """The mean norm of the gradient under adversarial bias, on sum a (1 - cos x), L = max a."""
    a, b, K = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64), 0.05, 300
    x = nn.Parameter(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    optimizer = CompositeMomentum([x], lr=gamma, beta=beta, normalize=True)
    gap = float((a * (1 - torch.cos(x.detach()))).sum())
    norms = []
    for _ in range(K):
        gradient = a * torch.sin(x.detach())
        norms.append(float(gradient.norm()))
        x.grad = gradient * (1 - b / max(norms[-1], 1e-12))  # against the gradient
        optimizer.step()
    assert sum(norms) / K <= bound_1c(1.0, beta, gamma, gap, norms[0], K, b, 0.0) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"momentum": 0.9}, r"no option 'momentum': momentum=0\.9 is beta=0\.1 here"),
        ({"momentum": 0}, r"momentum=0 is beta=1 here"),
        ({"momentum": None}, r"a momentum of 0\.9 elsewhere is beta=0\.1 here"),
        ({"dampening": 0.9}, 'first_step="gradient" is SGD with dampening'),
        ({"nesterov": True}, "no Nesterov form"),
        ({"betas": (0.9, 0.999)}, r"beta=0\.1 here.*no second moment"),
        ({"eps": 1e-8}, "no second moment"),
        ({"learning_rate": 0.1}, "the step size is lr"),
    ],
)
def test_other_optimizers_options(option, message):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=message):
        CompositeMomentum([w], 0.1, **option)
    with pytest.raises(TypeError, match=message):  # torch would keep it in the group, where nothing reads it
        CompositeMomentum([{"params": [w], **option}], 0.1)


def test_an_unknown_option():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="no option 'bata'; its options are lr, beta, first_step"):
        CompositeMomentum([w], 0.1, bata=0.1)
    assert CompositeMomentum([{"params": [w], "name": "head"}], 0.1).param_groups[0]["name"] == "head"
