"""`BiasedAccumulator` against the same thing done by hand, and its errors."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metamom import MAML, BiasedAccumulator, Clip, CompositeMomentum, TopK
from metamom.bias import parse
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid


def gradient(vector: torch.Tensor, params: list[nn.Parameter]) -> None:
    """Leave ``vector`` in the parameters' gradients by a real backward pass."""
    pieces = vector.split([p.numel() for p in params])
    sum((p.flatten() @ piece for p, piece in zip(params, pieces, strict=True)), start=torch.zeros(())).backward()


@settings(deadline=None)
@given(
    gradients=st.lists(st.lists(st.floats(-10, 10), min_size=5, max_size=5), min_size=1, max_size=6),
    bias=st.sampled_from([None, TopK(2), Clip(1.0), torch.sign]),
    data=st.data(),
)
def test_it_is_the_mean_over_workers_after_the_operator(gradients, bias, data):
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))]
    vectors = torch.tensor(gradients, dtype=torch.float64)
    workers = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=len(vectors), max_size=len(vectors)))
    accumulator = BiasedAccumulator(params, bias=bias)
    for k, vector in enumerate(vectors):
        gradient(vector, params)
        accumulator.add(None if workers is None else workers[k])
        assert all(p.grad is None for p in params)
    accumulator.finish()
    owners = torch.tensor(workers if workers is not None else range(len(vectors)))
    means = [vectors[owners == i].mean(0) for i in owners.unique()]
    expected = torch.stack([m if bias is None else bias(m) for m in means]).mean(0)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in params]), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "topk:10%",
        "topk:10%:tensor",
        "randk:10%:scaled:seed=4",
        "normalize:tensor",
        "sign:tensor",
        "clip:1+topk:5%",
        "ef14:topk:1%",
        "ef21-sgdm(0.3):sign:tensor",
        "clip21:0.5",
        "natural",
        "terngrad:tensor",
        "ef21:block8:block=64",
        "powersgd:1",
        "ef14:powersgd:2",
    ],
)
def test_it_equals_mamls_own_backward(spec):
    """Step by step: what operators draw by, and what they feed back, goes on alike."""
    learner = MAML(SinusoidMLP(generator=torch.Generator().manual_seed(0)).double(), F.mse_loss, inner_lr=0.01)
    theirs = parse(spec)
    accumulator = BiasedAccumulator(learner.parameters(), bias=parse(spec), workers=4)
    for step in range(3):
        batch = Sinusoid(dtype=torch.float64).sample(step, 8)
        learner.zero_grad()
        report = learner.backward(batch, workers=4, bias=theirs).metrics
        expected = [p.grad.clone() for p in learner.parameters()]
        learner.zero_grad()
        for t in range(8):
            learner.losses(batch.part(t, t + 1)).mean().backward()
            accumulator.add(worker=t // 2)
        ours = accumulator.finish()
        for p, grad in zip(learner.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, atol=1e-12, rtol=0)
        assert ours["wire_bytes"] == report["wire_bytes"]
        assert ours["bias_error"] == pytest.approx(report["bias_error"])


def test_layers_are_the_trainable_parameters():
    params = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(3), requires_grad=False),
        nn.Parameter(torch.zeros(1)),
    ]
    accumulator = BiasedAccumulator(params, bias=TopK(1, per_tensor=True))
    (params[0] @ torch.tensor([3.0, -4.0]) + 5 * params[2]).sum().backward()
    accumulator.add()
    accumulator.finish()
    assert params[0].grad.tolist() == [0, -4]
    assert params[2].grad.tolist() == [5]


def test_frozen_unused_and_shared_parameters():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.Linear(2, 2), shared)
    net[1].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    params = [*shared.parameters(), *net.parameters(), unused]
    accumulator = BiasedAccumulator(params, workers=2)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for part in x.split(2):
        net(part).square().mean().backward()
        accumulator.add()
    accumulator.finish()
    ours = shared.weight.grad.clone()
    net.zero_grad()
    net(x).square().mean().backward()
    torch.testing.assert_close(ours, shared.weight.grad)
    assert net[1].weight.grad is None
    assert unused.grad is None
    assert len(accumulator.params) == 4


def test_a_loop_over_steps_trains():
    w = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = CompositeMomentum([w], lr=0.2, beta=0.5)
    accumulator = BiasedAccumulator([w], bias=Clip(10.0), workers=2)
    for _ in range(60):
        optimizer.zero_grad()
        for centre in ([1.0, 0.0], [0.0, 1.0]):
            (w - torch.tensor(centre)).square().sum().backward()
            accumulator.add()
        accumulator.finish()
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spec", ["randk:2", "qsgd:2", "ef14:randk:2", "ef21:topk:1", "ef21-sgdm(0.3):topk:2"])
def test_named_workers_keep_their_draws_and_states(spec):
    """A slow twin: an operator for each worker. Who takes part differs from step to step."""
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    accumulator = BiasedAccumulator(params, bias=parse(spec))
    generator = torch.Generator().manual_seed(0)
    alone = [parse(spec) for _ in range(4)]
    for step, taking_part in enumerate([[0, 2], [2, 3], [3, 0, 1], [2], [1, 2]]):
        vectors = torch.randn(len(taking_part), 5, generator=generator, dtype=torch.float64)
        for worker, vector in zip(taking_part, vectors, strict=True):
            gradient(vector, params)
            accumulator.add(worker=worker)
        accumulator.finish()
        expected = [alone[i](g, step=step, workers=[i]) for i, g in zip(taking_part, vectors, strict=True)]
        ours = torch.cat([p.grad for p in params])
        torch.testing.assert_close(ours, torch.stack(expected).mean(0), rtol=0, atol=1e-12)
        for p in params:
            p.grad = None


def test_a_state_is_nobodys_where_workers_have_no_number(w):
    accumulator = BiasedAccumulator([w], bias=parse("ef21:topk:1"))
    w.sum().backward()
    with pytest.raises(ValueError, match=r"ef21:topk:1 keeps a state for each worker.*add\(worker=i\).*workers=n"):
        accumulator.add()
    accumulator.add(worker=0)  # nothing is lost
    accumulator.finish()
    assert w.grad.tolist() == [1, 0, 0]
    BiasedAccumulator([w], bias=parse("ef21:topk:1"), workers=1)


@pytest.fixture
def w():
    return nn.Parameter(torch.ones(3))


def test_a_forgotten_add_is_distinguished_from_a_forgotten_backward(w):
    accumulator = BiasedAccumulator([w])
    with pytest.raises(ValueError, match=r"add\(\) found no gradient"):
        accumulator.add()
    with pytest.raises(ValueError, match="nothing to aggregate"):
        accumulator.finish()
    w.sum().backward()
    accumulator.add()
    w.sum().backward()
    with pytest.raises(ValueError, match=r"a gradient in .grad that no add\(\) took"):
        accumulator.finish()
    accumulator.add()
    accumulator.finish()
    assert torch.equal(w.grad, torch.ones(3))


def test_a_forgotten_add_in_the_middle(w):
    accumulator = BiasedAccumulator([w])
    w.sum().backward()
    w.sum().backward()
    with pytest.raises(ValueError, match=r"no add\(\) had taken"):
        accumulator.add()
    w.grad = None
    accumulator.reset()
    w.sum().backward()
    accumulator.add()
    accumulator.finish()
    assert torch.equal(w.grad, torch.ones(3))


def test_zeroed_gradients_are_no_leftovers(w):
    accumulator = BiasedAccumulator([w])
    for _ in range(2):
        w.sum().backward()
        accumulator.add()
        accumulator.finish()
        assert torch.equal(w.grad, torch.ones(3))
        torch.optim.SGD([w], lr=0.1).zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="found no gradient"):
        accumulator.add()


def test_gradients_left_behind_by_the_last_step(w):
    accumulator = BiasedAccumulator([w])
    w.sum().backward()
    accumulator.add()
    accumulator.finish()
    w.sum().backward()  # no zero_grad: adds to the aggregate
    with pytest.raises(ValueError, match=r"no add\(\) had taken"):
        accumulator.add()
    w.grad = None
    accumulator.reset()
    w.sum().backward()
    accumulator.add()
    accumulator.finish()


def test_exactly_n_workers(w):
    accumulator = BiasedAccumulator([w], workers=3)
    w.sum().backward()
    accumulator.add(worker=2)
    with pytest.raises(ValueError, match=r"exactly 3 workers; got 1, none of worker\(s\) 0, 1"):
        accumulator.finish()
    w.sum().backward()
    with pytest.raises(ValueError, match="worker does not fit workers=3: got worker 3"):
        accumulator.add(worker=3)
    with pytest.raises(ValueError, match="every add"):
        accumulator.add()


def test_too_many_unnamed_workers(w):
    accumulator = BiasedAccumulator([w], workers=1)
    w.sum().backward()
    accumulator.add()
    w.sum().backward()
    with pytest.raises(ValueError, match=r"the number of add\(\) calls does not fit workers=1"):
        accumulator.add()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": []}, ValueError, "at least one parameter"),
        ({"workers": 0}, ValueError, "whole number >= 1; got 0"),
        ({"bias": 3}, TypeError, "a bias is an operator, a SPEC .* or a function"),
        ({"bias": "topk"}, ValueError, "topk needs a number"),
        ({"bias": Clip}, TypeError, "got the class Clip itself"),
        ({"params": torch.nn.Parameter(torch.ones(2, 2))}, TypeError, "got one tensor"),
        ({"params": [{"params": []}]}, TypeError, "got a dict"),
        ({"workers": 2.5}, ValueError, "whole number"),
    ],
)
def test_bad_arguments(w, arguments, error, message):
    with pytest.raises(error, match=message):
        BiasedAccumulator(**{"params": [w], **arguments})


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [(lambda g: g[:1], ValueError, "keep the shape"), (lambda g: None, TypeError, "must return a tensor")],
    ids=["shape", "nothing"],
)
def test_a_users_function_that_does_not_fit(w, function, error, message):
    accumulator = BiasedAccumulator([w], bias=function)
    w.sum().backward()
    accumulator.add()
    with pytest.raises(error, match=message):
        accumulator.finish()


def test_sparse_gradients():
    embedding = nn.Embedding(4, 2, sparse=True)
    accumulator = BiasedAccumulator(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        accumulator.add()


# hooks


def hooks(w: torch.Tensor) -> int:
    return len(w._backward_hooks or {})


def test_hooks_go_with_their_accumulator():
    w = torch.nn.Parameter(torch.ones(2))
    with BiasedAccumulator([w]) as one:
        other = BiasedAccumulator([w])
        assert hooks(w) == 2
    assert hooks(w) == 1
    w.sum().backward()
    with pytest.raises(ValueError, match="has been closed; make another one"):
        one.add()
    other.add()
    other.finish()
    assert w.grad.tolist() == [1.0, 1.0]
    del other
    gc.collect()
    assert hooks(w) == 0
