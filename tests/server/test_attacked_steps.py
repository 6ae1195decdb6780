"""Steps of the server with attacks and with robust means that have a state: on several processes, and in `train`."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from endings import assert_same
from test_pending_state import on_processes
from torch import Tensor
from training_runs import TASKS, Parts, learner

from metamom import CompositeMomentum, train
from metamom.bias import BiasOperator, Identity, NonFiniteError, TopK, parse
from metamom.distributed import World
from metamom.server.aggregate import Aggregation, aggregate
from metamom.server.attacks import parse_attack
from metamom.server.robust import RobustMean, robust_mean
from metamom.training.checkpoints import CheckpointError, Checkpoints, load
from metamom.training.directory import read_config

N, D = 8, 6
STEPS = torch.randn(4, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HOW = {
    "centred-clip:0.5": "ipm:2",
    "bucketing:2>median": "gaussian:2",
    "nnm:2>krum:2": "alie:2:z=1.5",
    "mean": "sign-flip:2",
    "geomedian": "mimic:2:worker=1",
}
SPECS = ["none", "topk:2", "ef21-sgdm(0.3):topk:2", "randk:2", "clip:1"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("spec", ["none", "topk:2", "clip:1"])
def test_the_attack_is_on_what_is_sent(how, spec):
    """After the operator, before the robust mean; bytes stay, and the error is that of the honest mean."""
    operator, robust = parse(spec), RobustMean(how, HOW[how])
    for step, rows in enumerate(STEPS):
        total, report = aggregate(rows, operator, robust)
        sent = parse_attack(HOW[how])(operator(rows), step)
        if not robust.stateful:
            assert torch.equal(total, robust_mean(sent, how))
        honest = rows[:6].mean(0)
        assert report["bias_error"] == pytest.approx(float((total - honest).norm() / honest.norm()))
        assert report["wire_bytes"] == N * operator.wire_bytes(D, 8)
        assert robust.memory.step == (step + 1) * robust.stateful


def steps(how: str, spec: str, world: World | None = None, state: dict[str, Any] | None = None) -> list[Tensor]:
    """The aggregates of four steps, or of the last two after a state."""
    operator, robust = parse(spec), RobustMean(how, HOW[how])
    mine = range(N) if world is None else world.workers(N)
    if world is not None:
        operator.shard(mine, each=robust.gathers)
    if state is not None:
        robust.load_state_dict(state)
    found = []
    for rows in STEPS if state is None else STEPS[2:]:
        server = Aggregation(N, operator, robust, world=world, measure=False)
        for worker in mine:
            server.add(rows[[worker]], [worker])
        found.append(server.finish()[0].clone())
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("server", ["replicated", "rank0"])
def test_the_number_of_processes_plays_no_part(how, spec, server):
    alone = steps(how, spec)
    for size in (2, 4):
        for found in on_processes(size, lambda world: steps(how, spec, world), server):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), size


def test_workers_that_processes_share():
    """More processes than workers: each adds the mean over its own tasks."""

    def run(world: World) -> list[Tensor]:
        robust, found = RobustMean("centred-clip:0.5", "sign-flip:1"), []
        for rows in STEPS:
            server = Aggregation(2, None, robust, world=world, measure=False)
            server.add(rows[[world.rank]], world.workers(2))
            found.append(server.finish()[0].clone())
        return found

    robust, alone = RobustMean("centred-clip:0.5", "sign-flip:1"), []
    for rows in STEPS:
        alone.append(aggregate(torch.stack([rows[:2].mean(0), rows[2:4].mean(0)]), None, robust)[0].clone())
    for found in on_processes(4, run):
        torch.testing.assert_close(found, alone, rtol=1e-14, atol=1e-14)


def test_the_order_in_which_workers_are_added_plays_no_part():
    robust = RobustMean("median", "sign-flip:2")
    server = Aggregation(N, None, robust)
    for worker in (7, 0, 3, 6, 1, 2, 5, 4):
        server.add(STEPS[0][[worker]], [worker])
    total, report = server.finish()
    expected, expected_report = aggregate(STEPS[0], None, robust)
    assert torch.equal(total, expected)
    assert report["bias_error"] == pytest.approx(expected_report["bias_error"])

    def run(world: World) -> Tensor:
        server = Aggregation(N, parse("topk:2"), robust, world=world, measure=False)
        for worker in reversed(world.workers(N)):
            server.add(STEPS[0][[worker]], [worker])
        return server.finish()[0]

    wanted = aggregate(STEPS[0], parse("topk:2"), robust)[0]
    assert all(torch.equal(found, wanted) for found in on_processes(2, run))
    with pytest.raises(ValueError, match="an attack acts on the last of workers 0 to 1; got worker 5"):
        aggregate(STEPS[0][:2], None, RobustMean("mean", "ipm:1"), workers=[0, 5])


def test_a_step_that_fails_leaves_the_state():
    robust = RobustMean("centred-clip:1", "gaussian:2")
    aggregate(STEPS[0], None, robust)
    before = robust.state_dict()
    with pytest.raises(NonFiniteError):
        aggregate(STEPS[1] * math.nan, None, robust)
    aggregation = Aggregation(N, None, robust)
    aggregation.add(STEPS[1], range(N))
    assert robust.state_dict()["step"] == before["step"] == 1
    assert torch.equal(robust.state_dict()["previous"], before["previous"])
    aggregation.finish()
    assert robust.state_dict()["step"] == 2


class Byzantine:
    """Byz-EF21-SGDM in plain loops over lists: Top-1 on each worker's change, and a median of the estimates."""

    def __init__(self, eta: float, faulty: int) -> None:
        self.eta, self.faulty = eta, faulty
        self.momentum = [[0.0] * D for _ in range(N)]
        self.estimates = [[0.0] * D for _ in range(N)]

    def step(self, gradients: list[list[float]]) -> tuple[list[float], list[list[float]]]:
        """The server's vector, and the differences that were sent."""
        changes = []
        for v, h, g in zip(self.momentum, self.estimates, gradients, strict=True):
            v[:] = [(1 - self.eta) * a + self.eta * b for a, b in zip(v, g, strict=True)]
            wanted = [a - b for a, b in zip(v, h, strict=True)]
            largest = max(range(D), key=lambda j: abs(wanted[j]))
            changes.append([wanted[j] if j == largest else 0.0 for j in range(D)])
            h[:] = [a + b for a, b in zip(h, changes[-1], strict=True)]
        honest = N - self.faulty
        means = [math.fsum(h[j] for h in self.estimates[:honest]) / honest for j in range(D)]
        seen = [*self.estimates[:honest], *[[-0.5 * m for m in means]] * self.faulty]
        columns = [sorted(row[j] for row in seen) for j in range(D)]
        return [(c[(N - 1) // 2] + c[N // 2]) / 2 for c in columns], changes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_byz_ef21_sgdm_aggregates_the_estimates(size):
    """The robust mean and the attack see the estimates, not the sparse differences whose median is zero."""
    slow = Byzantine(0.3, 2)
    expected = [slow.step(rows.tolist()) for rows in STEPS]
    for _, changes in expected:
        assert float(torch.tensor(changes).median(0).values.abs().sum()) == 0

    def run(world: World | None) -> list[Tensor]:
        operator, robust = parse("ef21-sgdm(0.3):topk:1"), RobustMean("median", "ipm:2:eps=0.5")
        mine = range(N) if world is None else world.workers(N)
        found = []
        for rows in STEPS:
            server = Aggregation(N, operator, robust, world=world, measure=False)
            server.add(rows[list(mine)], mine)
            total, report = server.finish()
            assert report["wire_bytes"] == N * TopK(1).wire_bytes(D, 8)
            found.append(total.clone())
        return found

    for found in [run(None)] if size == 1 else on_processes(size, run):
        for total, (wanted, _) in zip(found, expected, strict=True):
            assert total.tolist() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


def test_byz_ef21_sgdm_gets_near_the_honest_optimum_and_its_mean_does_not():
    """Quadratics ``1/2 ||x - c_i||^2`` with two sign flips of eight, Top-1 of six: the gradient of the honest mean."""
    generator = torch.Generator().manual_seed(1)
    minima = 3 + 0.1 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    ended = {}
    for how in ("mean", "nnm:2>median", "centred-clip:0.1"):
        operator, robust, x = parse("ef21-sgdm(0.5):topk:1"), RobustMean(how, "ipm:2:eps=4"), torch.zeros(D).double()
        for _ in range(150):
            x = x - 0.1 * aggregate(x - minima, operator, robust)[0]
        ended[how] = float((x - minima[:6].mean(0)).norm())
    assert ended["mean"] > 3
    assert ended["nnm:2>median"] < 0.3
    assert ended["centred-clip:0.1"] < 0.3


def go(parts: Parts, **options: Any) -> Any:
    return train(
        parts.learner,
        parts.optimizer,
        TASKS,
        **{"iterations": 4, "meta_batch": 8, "workers": 4, "label": None, "checkpoint_every": 2, **options},
    )


def parts() -> Parts:
    made = learner()
    return Parts(made, CompositeMomentum(made.parameters(), lr=0.02, beta=1.0))


RUNS = [
    ("centred-clip:0.5", "gaussian:1:std=2", "ef21-sgdm(0.3):topk:20%"),
    ("bucketing:2:seed=3>median", None, "none"),
    ("mean", "gaussian:1:std=0.1", "topk:20%"),
]


@pytest.mark.parametrize(("how", "attack", "bias"), RUNS)
def test_a_run_goes_on_bit_for_bit(how, attack, bias, tmp_path):
    """And is the same as one's own loop with one `RobustMean`."""
    whole = parts()
    options = {"aggregate": how, "attack": attack, "bias": bias}
    wanted = go(whole, **options)
    half = {**options, "run_dir": tmp_path / "run"}
    go(parts(), **half, iterations=2)
    state = load(Checkpoints(tmp_path / "run" / "checkpoints").path(2))
    assert state["aggregate"]["step"] == 2
    assert ("previous" in state["aggregate"]) == ("clip" in how)
    second = parts()
    found = go(second, **half, resume=True)
    assert found.resumed_from == 2
    assert_same(second.learner.state_dict(), whole.learner.state_dict())
    config = read_config(tmp_path / "run")["settings"]
    assert (config["aggregate"], config.get("attack")) == (how, attack)

    own, robust, operator = parts(), RobustMean(how, attack), parse(bias)
    for step in range(4):
        own.optimizer.zero_grad()
        own.learner.backward(TASKS.sample(step, 8), workers=4, bias=operator, aggregate=robust)
        own.optimizer.step()
    assert_same(own.learner.state_dict(), whole.learner.state_dict())
    plain = parts()
    go(plain, aggregate=how.split(">")[-1] if attack is None else "mean", bias=bias)
    assert wanted.metrics[-1]["loss"] != 0
    pairs = zip(plain.learner.parameters(), whole.learner.parameters(), strict=True)
    assert not all(torch.equal(p, q) for p, q in pairs)


def test_another_attack_and_a_changed_checkpoint_are_refused(tmp_path):
    options = {"aggregate": "centred-clip:0.5", "attack": "alie:1:z=1", "run_dir": tmp_path / "run"}
    go(parts(), **options, iterations=2)
    for change in ({"attack": "alie:1:z=2"}, {"attack": None}, {"aggregate": "centred-clip:1"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))} is .* there and .* here"):
            go(parts(), **{**options, **change}, resume=True)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    state = load(checkpoints.path(2))
    for change, why in (
        ({"step": 3}, "'step' should be 2"),
        ({"previous": torch.zeros(3)}, "should be a tensor of"),
        ({"previous": torch.tensor([math.inf])}, "finite last aggregate"),
    ):
        others = {name: part for name, part in state.items() if name != "step"}
        checkpoints.save(2, {**others, "aggregate": {**state["aggregate"], **change}})
        with pytest.raises(CheckpointError, match=why):
            go(parts(), **options, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack": "alie:4"}, "needs 4 faulty workers and at least 2 honest; got 4 in all"),
        ({"attack": "krum:1"}, "attack must be sign-flip"),
        ({"aggregate": "krum:1"}, "needs at least 5 workers; got 4"),
        ({"aggregate": "nnm:1>krum:1"}, "needs at least 5 workers; got 4"),
    ],
)
def test_arguments_that_a_run_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        go(parts(), **options)


def test_a_name_with_state_in_one_step_is_refused():
    with pytest.raises(ValueError, match="make it once, robust = "):
        learner().backward(TASKS.sample(0, 8), workers=4, aggregate="centred-clip:1")


def test_an_attack_makes_the_mean_gather():
    assert isinstance(Aggregation(4, None, RobustMean("mean", "ipm:1")).operator, Identity)
    assert Aggregation(4, None, RobustMean("mean")).operator is None
    assert isinstance(Aggregation(4, "topk:1", "median").operator, BiasOperator)
