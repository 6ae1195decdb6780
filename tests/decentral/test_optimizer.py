"""The optimizer: the pure step around models, with operators, schedules and checkpoints."""

from __future__ import annotations

import copy
from io import BytesIO
from itertools import pairwise

import pytest
import torch
from decentral_cases import CASES, made, moved, run
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TopK
from metamom.bias import EF21, RandK, parse
from metamom.decentral import DecentralizedMomentum, complete, decentralized_step, initial_state, ring, torus
from metamom.distributed import World
from metamom.tasks import Sinusoid


def workers(n: int, d: int = 3) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(d, generator=generator, dtype=torch.float64)) for _ in range(n)]


def pull(xs: list[nn.Parameter]) -> None:
    """Each worker's gradient of ``1/2 (i + 1) ||x - i||^2``."""
    for i, x in enumerate(xs):
        x.grad = (i + 1) * (x.detach() - i)


def test_it_is_the_pure_step_after_each_workers_operator():
    xs, mixing = workers(6), torus(2, 3)
    optimizer = DecentralizedMomentum([[x] for x in xs], mixing, lr=0.1, beta=0.3, bias="topk:1")
    x, operator = torch.stack([x.detach() for x in xs]), TopK(1)
    state = initial_state(x)
    for _ in range(10):
        pull(xs)
        optimizer.step()
        factors = torch.arange(6)[:, None]
        x, state = decentralized_step(x, operator((factors + 1) * (x - factors)), state, mixing, lr=0.1, beta=0.3)
        torch.testing.assert_close(torch.stack([each.detach() for each in xs]), x, rtol=1e-14, atol=1e-14)
        momenta = torch.stack([optimizer.state[each]["momentum"] for each in xs])
        torch.testing.assert_close(momenta, state.momentum, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("bias", [None, "topk:10%", "randk:20%"])
def test_on_a_complete_graph_from_equal_weights_it_trains_as_a_server_would(bias):
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    server = MAML(copy.deepcopy(net), F.mse_loss, inner_lr=0.05)
    momentum = CompositeMomentum(server.parameters(), lr=0.05, beta=0.2)
    operator = None if bias is None else parse(bias)
    learners = [MAML(copy.deepcopy(net), F.mse_loss, inner_lr=0.05) for _ in range(4)]
    parameters = [learner.parameters() for learner in learners]
    optimizer = DecentralizedMomentum(parameters, complete(4), lr=0.05, beta=0.2, bias=bias)
    tasks = Sinusoid(shots=3, queries=3, seed=1, dtype=torch.float64)
    for step in range(6):
        batch = tasks.sample(step, 8)
        momentum.zero_grad()
        server.backward(batch, workers=4, bias=operator)
        momentum.step()
        optimizer.zero_grad()
        for learner, part in zip(learners, batch.split(4), strict=True):
            learner.backward(part)
        optimizer.step()
    for learner in learners:
        for p, wanted in zip(learner.parameters(), server.parameters(), strict=True):
            torch.testing.assert_close(p, wanted, rtol=1e-12, atol=1e-12)
    assert optimizer.disagreement() < 1e-24


def test_workers_agree_on_the_minimum_of_the_mean():
    xs = workers(4)
    optimizer = DecentralizedMomentum([[x] for x in xs], ring(4), lr=0.1, beta=0.5)
    assert optimizer.disagreement() > 0.1
    for _ in range(300):
        pull(xs)
        optimizer.step()
    wanted = torch.full((3,), (1 * 0 + 2 * 1 + 3 * 2 + 4 * 3) / 10, dtype=torch.float64)
    for x in xs:
        torch.testing.assert_close(x.detach(), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.mean_weights(), [wanted], rtol=0, atol=1e-12)
    assert optimizer.disagreement() < 1e-24


def test_a_schedule_of_lr_and_a_closure():
    xs = workers(2)
    optimizer = DecentralizedMomentum([[x] for x in xs], complete(2), lr=1.0, beta=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    means = [torch.stack([x.detach() for x in xs]).mean(0)]

    def closure() -> float:
        assert torch.is_grad_enabled()
        for x in xs:
            x.grad = torch.ones(3, dtype=torch.float64)
        return 7.0

    for _ in range(3):
        assert optimizer.step(closure) == 7.0
        schedule.step()
        means.append(torch.stack([x.detach() for x in xs]).mean(0))
    moves = [float((before - after)[0]) for before, after in pairwise(means)]
    assert moves == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize("name", ["ring", "ring, untracked", "directed", "sgd"])
def test_a_run_continues_from_its_state_to_the_bit(name):
    case, world = CASES[name], World()
    learners, optimizer = made(case, world)
    moved(case, world, learners, optimizer, range(2))
    stored = BytesIO()
    torch.save([optimizer.state_dict(), [learner.state_dict() for learner in learners]], stored)
    stored.seek(0)
    state, weights = torch.load(stored, weights_only=True)
    others, again = made(case, world)
    for learner, each in zip(others, weights, strict=True):
        learner.load_state_dict(each)
    again.load_state_dict(state)
    moved(case, world, others, again, range(2, 5))
    got = [torch.cat([p.detach().flatten() for p in learner.parameters()]) for learner in others]
    assert torch.equal(torch.stack(got), run(case, world)["weights"])


def test_bytes_along_edges():
    models = [nn.Linear(2, 3) for _ in range(6)]
    made_of = [(ring(6), True, 2 * 9 * 4, 12), (torus(2, 3), False, 9 * 4, 18), (complete(6), True, 2 * 9 * 4, 30)]
    for mixing, tracking, per_edge, edges in made_of:
        optimizer = DecentralizedMomentum([m.parameters() for m in models], mixing, lr=0.1, tracking=tracking)
        assert (optimizer.edge_bytes, optimizer.wire_bytes) == (per_edge, edges * per_edge)


def test_a_parameter_without_a_gradient_counts_as_zero():
    models = [nn.Linear(1, 1) for _ in range(2)]
    optimizer = DecentralizedMomentum([m.parameters() for m in models], complete(2), lr=0.5, beta=1.0)
    biases = [m.bias.item() for m in models]
    for model in models:
        (3 * model.weight).sum().backward()
    optimizer.step()
    assert [m.bias.item() for m in models] == pytest.approx([sum(biases) / 2] * 2)


def test_nothing_changes_if_a_step_fails():
    xs = workers(3)
    optimizer = DecentralizedMomentum([[x] for x in xs], ring(3), lr=0.1, bias=EF21("topk:1"))
    pull(xs)
    optimizer.step()
    before = copy.deepcopy([[x.detach() for x in xs], optimizer.state_dict()])
    pull(xs)
    assert xs[2].grad is not None
    xs[2].grad[0] = float("nan")
    with pytest.raises(ValueError, match="infinite or NaN"):
        optimizer.step()
    after = [[x.detach() for x in xs], optimizer.state_dict()]
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)
    torch.testing.assert_close(after[1]["bias"], before[1]["bias"], rtol=0, atol=0)


def of(models: list[nn.Module], mixing: torch.Tensor, **options: object) -> DecentralizedMomentum:
    return DecentralizedMomentum([m.parameters() for m in models], mixing, **{"lr": 0.1, **options})


LINEAR = [nn.Linear(2, 2) for _ in range(3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(LINEAR, ring(4)), "has 3 of the 4 workers|has 4 of the 4 workers .* got 3"),
        (lambda: of([*LINEAR[:2], nn.Linear(2, 1)], ring(3)), r"worker 2 has \[\(1, 2\), \(1,\)\]"),
        (lambda: of([*LINEAR[:2], nn.Linear(2, 2).double()], ring(3)), "float64. Make each"),
        (lambda: DecentralizedMomentum(LINEAR[0], ring(3), lr=0.1), "a list of parameters for each worker"),
        (lambda: DecentralizedMomentum(LINEAR, ring(3), lr=0.1), "wanted parameters, such as model.parameters"),
        (lambda: DecentralizedMomentum([[{"params": []}]], ring(1), lr=0.1), "without names or groups"),
        (lambda: DecentralizedMomentum([LINEAR[0].parameters()] * 2, ring(2), lr=0.1), "got none"),
        (lambda: of([LINEAR[0], LINEAR[0]], ring(2)), "more than one parameter group"),
        (lambda: of(LINEAR, torch.eye(3)), "never brings all workers together"),
        (lambda: of(LINEAR, ring(3), lr=-1.0), "lr is the step size"),
        (lambda: of(LINEAR, ring(3), lr="fast"), "lr must be a number"),
        (lambda: of(LINEAR, ring(3), beta=0.0), "beta is the weight of the new gradient"),
        (lambda: of(LINEAR, ring(3), tracking=1), "tracking"),
        (lambda: of(LINEAR, ring(3), bias="topk:x"), "topk"),
        (lambda: of(LINEAR, ring(3)).add_param_group({"params": [nn.Parameter(torch.ones(1))]}), "are its workers"),
        (lambda: of(LINEAR, ring(3)).step(), "worker 0 has no gradient"),
        (lambda: of(LINEAR, ring(3)).load_state_dict({"param_groups": [{}], "state": {}}), r"workers \[0, 1, 2\]"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_errors_of_a_step():
    xs = workers(2)
    pull(xs)
    optimizer = DecentralizedMomentum([[x] for x in xs], ring(2), lr=0.1, beta=0.5, bias="ef21-sgdm(0.2):topk:1")
    with pytest.raises(ValueError, match=r"carries the momentum .*\(beta=1\)"):
        optimizer.step()
    embedding = [nn.Embedding(3, 2, sparse=True) for _ in range(2)]
    optimizer = DecentralizedMomentum([e.parameters() for e in embedding], ring(2), lr=0.1)
    for each in embedding:
        each(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        optimizer.step()


def test_a_generator_draws_in_one_process_only():
    xs = workers(2)
    operator = RandK(k=1, generator=torch.Generator().manual_seed(0))
    optimizer = DecentralizedMomentum([[x] for x in xs], ring(2), lr=0.1, bias=operator)
    pull(xs)
    optimizer.step()
    world = World(size=2)
    world.agree = lambda error=None: None  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="make it with seed="):
        DecentralizedMomentum([[xs[0]]], ring(2), lr=0.1, bias=operator, world=world)
