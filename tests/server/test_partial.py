"""Absent workers and unequal weights: the server's step against plain loops, enumeration, and several processes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from test_pending_state import on_processes
from torch import Tensor

from metamom.bias import DASHA, DIANA, EF21, MARINA, BiasOperator, Clip, Layout, TopK, parse
from metamom.distributed import World
from metamom.server.aggregate import Aggregation, aggregate
from metamom.server.part import normalised_weights
from metamom.server.participation import Participation, present_count, present_workers
from metamom.server.robust import robust_mean

N, D, STEPS = 8, 6, 5
ROWS = torch.randn(STEPS, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 1.0, 1.0, 4.0, 2.5]
PRESENT = [(0, 3, 5), (6, 7), (1,), (0, 1, 2, 3, 4, 5, 6, 7), (2, 4, 6)]
REMEMBERED = ["ef21:topk:2", "ef21-sgdm(0.3):topk:2", "ef21-sgd2m(0.3):topk:2", "clip21:0.5", "clip21-sgd2m:0.5"]
MEMORYLESS = ["none", "topk:2", "clip:1", "randk:2", "qsgd:4", "ef14:topk:2"]


def steps(
    operator: BiasOperator | None,
    world: World | None = None,
    *,
    present: Sequence[Sequence[int] | None] = PRESENT,
    weights: Sequence[float] | None = None,
    how: str = "mean",
) -> tuple[list[Tensor], list[int]]:
    """The aggregates of some steps, and the bytes."""
    world = world or World()
    found, sent = [], []
    for rows, chosen in zip(ROWS, present, strict=True):
        server = Aggregation(N, operator, how, world=world, present=chosen, worker_weights=weights)
        mine = [worker for worker in world.workers(N) if chosen is None or worker in chosen]
        with world.together():
            server.add(rows[mine] if mine else rows[:0], mine)
        total, report = server.finish()
        found.append(total)
        sent.append(report["wire_bytes"])
    return found, sent


def looped(spec: str, weights: Sequence[float] | None) -> list[Tensor]:
    """The same by plain loops over the workers, each with an operator of its own."""
    w = torch.tensor(weights or [1.0] * N, dtype=torch.float64)
    w = w / w.sum()
    mine = [parse(spec) for _ in range(N)]
    estimates = torch.zeros(N, D, dtype=torch.float64)
    found = []
    for step, (rows, chosen) in enumerate(zip(ROWS, PRESENT, strict=True)):
        sent = torch.zeros(N, D, dtype=torch.float64)
        for worker in chosen:
            sent[worker] = mine[worker](rows[worker : worker + 1], step=step, workers=[worker])[0]
            estimates[worker] = sent[worker]
        remembered = spec in REMEMBERED
        share = 1.0 if remembered else len(chosen) / N
        found.append(sum(w[i] * (estimates if remembered else sent)[i] for i in range(N)) / share)
    return found


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("spec", [*REMEMBERED, *MEMORYLESS])
def test_against_loops_over_the_workers(spec, weights):
    found, _ = steps(parse(spec), weights=weights)
    torch.testing.assert_close(torch.stack(found), torch.stack(looped(spec, weights)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize(("size", "server"), [(2, "rank0"), (4, "replicated")])
@pytest.mark.parametrize("spec", ["none", "topk:2", "qsgd:4", "ef14:topk:2", "ef21:topk:2", "clip21:0.5"])
def test_on_several_processes(spec, size, weights, server):
    alone, sent = steps(parse(spec), weights=weights)
    for found, bytes_ in on_processes(size, lambda world: steps(parse(spec), world, weights=weights), server):
        torch.testing.assert_close(torch.stack(found), torch.stack(alone), rtol=1e-12, atol=1e-12)
        assert bytes_ == sent


@pytest.mark.parametrize("spec", ["none", "topk:2", "ef21:topk:2", "clip21:0.5"])
def test_robust_means(spec):
    """Over the present workers, or over the estimates of all."""
    found, _ = steps(parse(spec), how="median")
    twin, estimates = [parse(spec) for _ in range(N)], torch.zeros(N, D, dtype=torch.float64)
    wanted = []
    for rows, chosen in zip(ROWS, PRESENT, strict=True):
        for worker in chosen:
            estimates[worker] = twin[worker](rows[worker : worker + 1], workers=[worker])[0]
        wanted.append(robust_mean(estimates if spec in REMEMBERED else estimates[list(chosen)], "median"))
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    for others, _ in on_processes(2, lambda world: steps(parse(spec), world, how="median")):
        assert torch.equal(torch.stack(others), torch.stack(wanted))


@pytest.mark.parametrize("spec", ["none", "topk:2", "ef21:topk:2"])
def test_all_workers_with_equal_weights_are_the_plain_mean_bit_for_bit(spec):
    everyone = [tuple(range(N))] * STEPS
    found, sent = steps(parse(spec), present=everyone, weights=[3.0] * N)
    operator = parse(spec)
    plain = [aggregate(rows, operator) for rows in ROWS]
    assert all(torch.equal(a, b) for a, (b, _) in zip(found, plain, strict=True))
    assert sent == [report["wire_bytes"] for _, report in plain]


@pytest.mark.parametrize("weights", [None, WEIGHTS[:5]], ids=["equal", "weighted"])
def test_the_mean_over_all_sets_of_present_workers_is_the_mean_of_all(weights):
    """Enumerated: 10 sets of 3 out of 5 workers."""
    rows, operator = ROWS[0, :5], TopK(2)
    sets = list(itertools.combinations(range(5), 3))
    found = []
    for chosen in sets:
        server = Aggregation(5, operator, present=chosen, worker_weights=weights)
        server.add(rows[list(chosen)], chosen)
        found.append(server.finish()[0])
    whole = Aggregation(5, operator, worker_weights=weights)
    whole.add(rows, range(5))
    torch.testing.assert_close(torch.stack(found).mean(0), whole.finish()[0], rtol=1e-12, atol=1e-12)


def test_bytes_are_those_of_the_present_workers():
    _, sent = steps(TopK(2))
    each = TopK(2).wire_bytes(D, 8)
    assert sent == [len(chosen) * each for chosen in PRESENT]


def test_the_state_goes_on_from_a_checkpoint():
    """On one process and on two, with workers that were never present."""
    first, last = ROWS[:3], ROWS[3:]
    operator = parse("ef21:topk:2")

    def some(made: BiasOperator, rows: Tensor, chosen: Sequence[Sequence[int]]) -> list[Tensor]:
        found = []
        for each, here in zip(rows, chosen, strict=True):
            server = Aggregation(N, made, present=here)
            server.add(each[list(here)], here)
            found.append(server.finish()[0])
        return found

    some(operator, first, PRESENT[:3])
    saved = copy.deepcopy(operator.state_dict())
    assert sorted(saved["workers"]) == list(range(N))
    wanted = some(operator, last, [(0, 2), (5,)])
    resumed = parse("ef21:topk:2")
    resumed.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(some(resumed, last, [(0, 2), (5,)]), wanted, strict=True))

    def run(world: World) -> list[Tensor]:
        again = parse("ef21:topk:2")
        again.load_state_dict(saved)
        again.shard(world.workers(N))
        found = []
        for each, here in zip(last, [(0, 2), (5,)], strict=True):
            server = Aggregation(N, again, present=here, world=world)
            mine = [worker for worker in world.workers(N) if worker in here]
            server.add(each[mine] if mine else each[:0], mine)
            found.append(server.finish()[0])
        return found

    for found in on_processes(2, run):
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_workers_that_were_never_present_keep_the_start_of_the_operator_inside():
    """Else the state of PowerSGD inside error feedback would not load."""
    layout = Layout([(2, 3)])

    def step(made: BiasOperator, rows: Tensor, here: Sequence[int]) -> Tensor:
        server = Aggregation(N, made, present=here, sizes=layout)
        server.add(rows[list(here)], here)
        return server.finish()[0]

    first = parse("ef21-sgdm(0.5):powersgd:1")
    step(first, ROWS[0], PRESENT[0])
    resumed = parse("ef21-sgdm(0.5):powersgd:1")
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(step(resumed, ROWS[1], (0, 1)), step(first, ROWS[1], (0, 1)))


def test_draws():
    assert [present_count(10, share) for share in (0.01, 0.3, 0.25, 1.0)] == [1, 3, 3, 10]
    drawn = [present_workers(5, 0.4, step, seed=3) for step in range(2000)]
    assert all(len(chosen) == 2 and list(chosen) == sorted(set(chosen)) for chosen in drawn)
    counts = torch.tensor([drawn.count(pair) for pair in itertools.combinations(range(5), 2)], dtype=torch.float64)
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9  # chi-squared of 9 degrees of freedom at 0.999
    assert present_workers(5, 1.0, 0) == (0, 1, 2, 3, 4)
    participation = Participation(0.4, seed=3)
    assert participation.present(5) == participation.present(5) == drawn[0]
    participation.advance()
    resumed = Participation(0.4, seed=3)
    resumed.load_state_dict(participation.state_dict())
    assert resumed.present(5) == drawn[1]
    resumed.reset()
    assert resumed.present(5) == drawn[0]
    assert (repr(participation), repr(Participation(1))) == ("Participation(0.4, seed=3)", "Participation(1.0)")


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"participation is the share of workers .* 0 < share <= 1; got"):
        Participation(share)


def test_weights():
    assert normalised_weights(None, 3) is None
    assert normalised_weights([2.0, 2.0], 2) is None
    assert normalised_weights((1, 3), 2) == (0.25, 0.75)
    for bad in ([1.0], [1.0, 0.0], [1.0, float("inf")], [1.0, -2.0]):
        with pytest.raises(ValueError, match="worker_weights are 2 positive, finite numbers, one for each worker; got"):
            normalised_weights(bad, 2)
    with pytest.raises(TypeError, match="worker_weights are positive numbers"):
        normalised_weights("12", 2)


@pytest.mark.parametrize("operator", [DIANA("randk:2:scaled"), MARINA("topk:2"), DASHA("topk:2")])
def test_operators_that_need_all_workers(operator):
    Aggregation(4, operator, present=range(4))
    Aggregation(4, operator, worker_weights=[1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"needs all workers in every step.*Use participation=1, or an operator"):
        Aggregation(4, operator, present=[0, 2])


def test_refusals():
    with pytest.raises(ValueError, match="worker_weights need aggregate='mean': median counts all workers alike"):
        Aggregation(3, None, "median", worker_weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"trimmed:0\.3 of 2 workers leaves out none of them"):
        Aggregation(4, None, "trimmed:0.3", present=[0, 1])
    Aggregation(4, EF21("topk:2"), "trimmed:0.3", present=[0, 1])  # of four estimates
    for bad in ([], [1, 0], [0, 0], [4], [-1, 2]):
        with pytest.raises(ValueError, match="present are numbers of the 4 workers, at least one, ascending; got"):
            Aggregation(4, Clip(1.0), present=bad)
