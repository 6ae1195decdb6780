"""Federated training with Flower makes the steps of our own loop over the same clients."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
from installed import need
from pages import ROOT, blocks
from torch import Tensor
from torch.nn import functional as F

from metamom import EF14, EF21, MAML, CompositeMomentum, RandK, TopK, evaluate, train
from metamom.bias import Layout, parse
from metamom.nets.models import SinusoidMLP
from metamom.server.aggregate import aggregate, flatten, unflatten
from metamom.server.robust import robust_mean
from metamom.tasks import PerWorker, Sinusoid

need("flwr")
# packages that it imports use what others have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")

N, TASKS_EACH, ROUNDS = 6, 2, 6


def sinusoids(dtype: torch.dtype = torch.float64, **options) -> Sinusoid:
    return Sinusoid(shots=5, queries=5, dtype=dtype, **{"seed": 1, **options})


def bands(dtype: torch.dtype = torch.float64) -> PerWorker:
    return PerWorker([sinusoids(dtype, amplitude=(k / 2 + 0.5, k / 2 + 1)) for k in range(N)])


SHARED, FAMILIES = sinusoids(), bands()


@pytest.fixture(autouse=True)
def same_draws() -> Iterator[None]:
    """Flower samples clients from Python's own generator."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    before = random.getstate()
    random.seed(0)
    yield
    random.setstate(before)


@contextmanager
def propagating(name: str) -> Iterator[None]:
    """Within this, pytest sees what a logger says."""
    logger = logging.getLogger(name)
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def learner(dtype: torch.dtype = torch.float64, **options) -> MAML:
    model = SinusoidMLP((8, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    return MAML(model, F.mse_loss, **options)


def momentum(parameters) -> CompositeMomentum:
    return CompositeMomentum(parameters, lr=0.02, beta=0.3)


def federated(
    bias=None,
    tasks=FAMILIES,
    rounds: int = ROUNDS,
    learner_fn=learner,
    optimizer=momentum,
    client: Mapping[str, Any] = MappingProxyType({}),
    grid: Mapping[str, Any] = MappingProxyType({}),
    **options,
):
    """The learner, the strategy and the result of a run whose nodes are in this process."""
    from federation import Nodes

    from metamom.interop.flower import MomentumStrategy, client_app, from_arrays, to_arrays

    app = client_app(learner_fn, tasks, bias=bias, meta_batch=TASKS_EACH, **client)
    strategy = MomentumStrategy(optimizer, bias=bias, **{"fraction_evaluate": 0.0, **options})
    made = learner_fn()
    result = strategy.start(Nodes(app, N, **grid), to_arrays(made), num_rounds=rounds)
    from_arrays(made, result.arrays)
    return made, strategy, result


def by_hand(
    participants: Mapping[int, Sequence[int]],
    bias,
    made: MAML,
    tasks=FAMILIES,
    *,
    how="mean",
    n: int = N,
    each: int = TASKS_EACH,
    forget=(),
    optimizer=momentum,
) -> MAML:
    """The same steps in a plain loop. EF21's absent clients keep their estimates, which start at zero."""
    server = optimizer(list(made.meta_parameters().values()))
    operator = parse(bias) if isinstance(bias, str) else bias
    estimates: dict[int, Tensor] = {}
    for number, present in participants.items():
        blocks = [tasks.sample(number - 1, n * each, rank=i, world_size=n) for i in present]
        for round_, client in forget:
            if round_ == number:
                state = operator.state_dict()
                del state["workers"][client]
                operator.load_state_dict(state)
        rows = torch.cat([flatten(made.meta_gradient(block).grads.values()) for block in blocks])
        if isinstance(operator, EF21):
            estimates |= dict(zip(present, operator(rows, step=number - 1, workers=present), strict=True))
            total = robust_mean(torch.stack([estimates.get(i, torch.zeros_like(rows[0])) for i in range(n)]), how)
        else:
            total, _ = aggregate(rows, operator, how, workers=present, sizes=Layout(p.shape for p in made.parameters()))
        for name, gradient in unflatten(total, made.meta_parameters()).items():
            made.meta_parameters()[name].grad = gradient
        server.step()
    return made


def assert_same_weights(ours: MAML, theirs: MAML, **tolerance) -> None:
    assert list(ours.meta_parameters()) == list(theirs.meta_parameters())
    for name, p in ours.meta_parameters().items():
        torch.testing.assert_close(p, theirs.meta_parameters()[name], **(tolerance or {"rtol": 1e-10, "atol": 1e-12}))


BIASES = [
    "none",
    "topk:20%",
    "randk:20%",
    "qsgd:4",
    "sign:tensor",
    "ef14:topk:10%",
    "ef21:topk:10%",
    "clip21:0.5",
    "ef14:powersgd:1",
]


@pytest.mark.parametrize("bias", BIASES)
def test_three_of_six_clients(bias):
    made, strategy, _ = federated(bias, min_train_nodes=3, fraction_train=0.5)
    assert [len(present) for present in strategy.participants.values()] == [3] * ROUNDS
    assert len({tuple(present) for present in strategy.participants.values()}) > 1
    assert_same_weights(made, by_hand(strategy.participants, bias, learner()))


@pytest.mark.parametrize("bias", [None, "ef21:topk:10%", "ef21-sgdm(0.2):topk:10%"])
def test_all_clients_are_the_workers_of_train(bias):
    def optimizer(parameters):
        return CompositeMomentum(parameters, lr=0.02, beta=1 if bias is not None and "sgdm" in bias else 0.3)

    made, strategy, _ = federated(bias, SHARED, optimizer=optimizer)
    assert set(map(tuple, strategy.participants.values())) == {tuple(range(N))}
    ours = learner()
    train(
        ours,
        optimizer(ours.parameters()),
        SHARED,
        iterations=ROUNDS,
        meta_batch=N * TASKS_EACH,
        workers=N,
        bias=bias,
    )
    assert_same_weights(made, ours)


@pytest.mark.parametrize("bias", [TopK(ratio=0.1), EF21(TopK(ratio=0.1))])
def test_robust_aggregates(bias):
    made, strategy, _ = federated(bias, aggregate="median", fraction_train=0.5)
    assert_same_weights(made, by_hand(strategy.participants, bias, learner(), how="median"))


def test_meta_sgd():
    def of_its_own() -> MAML:
        return learner(learn_inner_lr="tensor")

    def slow(parameters) -> CompositeMomentum:
        return CompositeMomentum(parameters, lr=0.001, beta=0.3)

    made, strategy, _ = federated("ef14:topk:10%", learner_fn=of_its_own, optimizer=slow, fraction_train=0.5)
    ours = by_hand(strategy.participants, EF14(TopK(ratio=0.1)), of_its_own(), optimizer=slow)
    assert_same_weights(made, ours)
    rates = [p for name, p in made.meta_parameters().items() if name.startswith("inner_lr")]
    assert any(bool((rate != 0.01).any()) for rate in rates)


def test_single_precision():
    def single() -> MAML:
        return learner(torch.float32)

    made, strategy, _ = federated("ef21:topk:10%", bands(torch.float32), learner_fn=single, fraction_train=0.5)
    ours = by_hand(strategy.participants, "ef21:topk:10%", single(), bands(torch.float32))
    assert_same_weights(made, ours, rtol=1e-6, atol=1e-6)


def test_local_steps_are_those_of_per_fedavg():
    """Clients make three steps of SGD each, and the server averages their weights."""
    made, _, _ = federated(
        rounds=2,
        client={"local_steps": 3, "local_lr": 0.05},
        optimizer=lambda p: CompositeMomentum(p, lr=3 * 0.05, beta=1),
    )
    server = learner()
    for number in range(2):
        clients = []
        for i in range(N):
            local = learner()
            local.load_state_dict(server.state_dict())
            sgd = torch.optim.SGD(local.parameters(), lr=0.05)
            for k in range(3):
                sgd.zero_grad()
                local.backward(FAMILIES.sample(3 * number + k, N * TASKS_EACH, rank=i, world_size=N))
                sgd.step()
            clients.append(local.state_dict())
        server.load_state_dict({name: sum(each[name] for each in clients) / N for name in clients[0]})
    assert_same_weights(made, server)


@pytest.mark.parametrize("bias", ["ef14:topk:10%", "ef21:topk:10%"])
def test_a_lost_reply_never_happened(bias):
    lost = {(2, 0), (2, 4), (3, 4), (5, 2)}  # round, client
    made, strategy, _ = federated(bias, grid={"lose": lost})
    assert strategy.participants == {r: [i for i in range(N) if (r, i) not in lost] for r in range(1, ROUNDS + 1)}
    assert_same_weights(made, by_hand(strategy.participants, bias, learner()))


@pytest.mark.parametrize("bias", ["ef14:topk:10%", "ef21:topk:10%"])
def test_a_client_that_lost_its_state_starts_at_zero(bias, caplog):
    forget = {(4, 2), (5, 3)}
    with caplog.at_level(logging.WARNING, "flwr"), propagating("flwr"):
        made, strategy, _ = federated(bias, grid={"forget": forget})
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "lost" in r.msg] == [
        "client 2 has lost its state, and starts at zero again",
        "client 3 has lost its state, and starts at zero again",
    ]
    assert_same_weights(made, by_hand(strategy.participants, bias, learner(), forget=forget))


def test_metrics_and_evaluation():
    made, _, result = federated("topk:10%", rounds=2, fraction_train=0.5, fraction_evaluate=1.0)
    d = sum(p.numel() for p in made.parameters())
    for metrics in result.train_metrics_clientapp.values():
        assert set(metrics) == {"train_loss", "grad_norm", "wire_bytes"}
        assert metrics["wire_bytes"] == 3 * TopK(ratio=0.1).wire_bytes(d, 8)
    whole = evaluate(made, FAMILIES, tasks=20 * N, steps=(1,), stream="validation")
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(whole.mean[-1], rel=1e-9)


def test_a_client_may_have_tasks_of_its_own():
    def own(context) -> Sinusoid:
        return sinusoids(seed=context.node_config["partition-id"])

    made, _, _ = federated(tasks=own, rounds=1)
    ours = learner()
    optimizer = momentum(ours.parameters())
    batches = [sinusoids(seed=i).sample(0, TASKS_EACH) for i in range(N)]
    torch.stack([ours.losses(batch).mean() for batch in batches]).mean().backward()
    optimizer.step()
    assert_same_weights(made, ours)


def test_momentum_on_top_of_momentum():
    with pytest.raises(ValueError, match="ef21-sgdm"):
        federated("ef21-sgdm(0.2):topk:10%", rounds=1)


def test_half_precision_travels():
    from metamom.interop.flower import from_arrays, to_arrays

    made, other = learner(torch.bfloat16), learner(torch.bfloat16)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    from_arrays(other, to_arrays(made))
    assert_same_weights(made, other, rtol=0, atol=0)


def test_clients_say_what_is_wrong():
    from federation import Nodes

    from metamom.interop.flower import MomentumStrategy, client_app, to_arrays

    def error(app, strategy=None, arrays=None, configured=True) -> str:
        grid = Nodes(app, 2)
        for context in grid.contexts.values():
            context.node_config = context.node_config if configured else {}
        strategy = strategy or MomentumStrategy(momentum, fraction_evaluate=0.0)
        with pytest.raises(RuntimeError, match="no client could train in round 1; one says: ") as caught:
            strategy.start(grid, to_arrays(learner()) if arrays is None else arrays, num_rounds=1)
        return str(caught.value)

    assert "sends messages of bias=topk:5%; the server expects none" in error(
        client_app(learner, SHARED, bias="topk:5%")
    )
    assert "partition-id=3 num-partitions=20" in error(client_app(learner, SHARED), configured=False)
    larger = to_arrays(MAML(SinusoidMLP((9, 8)), F.mse_loss))
    assert re.search(r"has shape \[8.*\]; got an array of \[9", error(client_app(learner, SHARED), arrays=larger))
    deeper = to_arrays(MAML(SinusoidMLP((8, 8, 8)), F.mse_loss))
    assert "the arrays are not the learner's meta-parameters" in error(client_app(learner, SHARED), arrays=deeper)

    def tracking() -> MAML:
        return learner(estimator="moml")

    assert "remembers each task's adapted weights" in error(client_app(tracking, SHARED))
    assert "learner_fn() must return a learner" in error(client_app(SinusoidMLP, SHARED))
    broken = to_arrays(learner())
    broken = type(broken)({name: type(a)(a.numpy() * float("nan")) for name, a in broken.items()})
    assert "infinite or NaN" in error(client_app(learner, SHARED), arrays=broken)


def test_two_nodes_with_one_number():
    from federation import Nodes

    from metamom.interop.flower import MomentumStrategy, client_app, to_arrays

    grid = Nodes(client_app(learner, SHARED), 2)
    for context in grid.contexts.values():
        context.node_config = {"partition-id": 1, "num-partitions": 2}
    with pytest.raises(ValueError, match="two nodes are client 1: give each its own partition-id"):
        MomentumStrategy(momentum, fraction_evaluate=0.0).start(grid, to_arrays(learner()), num_rounds=1)


@pytest.mark.slow
def test_the_page_in_the_simulation_engine(tmp_path):
    """20 clients, 5 a round, in processes of Ray: the page's figures, and the steps of our loop on the same draws."""
    need("ray")
    [block] = [block for block in blocks("python") if "flwr" in block.code]
    (tmp_path / "federated.py").write_text(block.code)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "federated.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"loss 4.09, then 3.\d\d; 7,040 bytes a round", done.stdout)
    saved = torch.load(tmp_path / "federated.pt")
    assert [len(set(present)) for present in saved["clients"].values()] == [5] * 30
    given: dict[str, Any] = {"__name__": "federated"}
    exec(block.code.partition("run_simulation(server")[0], given)
    made, ours = given["make_learner"](), given["make_learner"]()
    made.load_state_dict(saved["learner"])

    def optimizer(parameters):
        return CompositeMomentum(parameters, lr=0.05, beta=0.1)

    by_hand(saved["clients"], given["bias"], ours, given["tasks"], n=20, each=4, optimizer=optimizer)
    assert_same_weights(made, ours, rtol=1e-6, atol=1e-6)


def test_wrong_arguments():
    from metamom.interop.flower import MomentumStrategy, client_app

    with pytest.raises(TypeError, match="a function that makes the learner"):
        client_app(learner(), SHARED)
    with pytest.raises(TypeError, match="a sampler"):
        client_app(learner, [1])
    with pytest.raises(TypeError, match="got the class Sinusoid itself"):
        client_app(learner, Sinusoid)
    with pytest.raises(ValueError, match="3 local steps need their step size, local_lr > 0; got None"):
        client_app(learner, SHARED, local_steps=3)
    with pytest.raises(ValueError, match="local_lr > 0; got -1"):
        client_app(learner, SHARED, local_lr=-1)
    with pytest.raises(ValueError, match="meta_batch must be >= 1"):
        client_app(learner, SHARED, meta_batch=0)
    generator = RandK(ratio=0.5, generator=torch.Generator())
    for make in (
        lambda: client_app(learner, SHARED, bias=generator),
        lambda: MomentumStrategy(momentum, bias=generator),
    ):
        with pytest.raises(ValueError, match="make it with seed= in place of generator="):
            make()
    with pytest.raises(TypeError, match="a function that makes the optimizer"):
        MomentumStrategy(momentum(learner().parameters()))
    with pytest.raises(ValueError, match="aggregate must be"):
        MomentumStrategy(momentum, aggregate="medain")
