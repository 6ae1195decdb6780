"""Robust means in `BiasedAccumulator`: against plain loops, `MAML.backward`, several processes, and the errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from test_pending_state import on_processes
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, BiasedAccumulator, TopK
from metamom.bias import Bias, parse
from metamom.distributed import World
from metamom.nets.models import SinusoidMLP
from metamom.server import RobustMean
from metamom.tasks import Sinusoid

GRADIENTS = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [steps, workers, d]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(3, 1, dtype=torch.float64))]


def step(accumulator: BiasedAccumulator, vectors: Tensor, workers: Sequence[int] | None = None) -> Tensor:
    """Add each worker's gradient by a backward pass, and return the aggregate ``[d]``."""
    params = accumulator.params
    for row, vector in enumerate(vectors):
        pieces = zip(params, vector.split([p.numel() for p in params]), strict=True)
        sum((p.flatten() @ piece for p, piece in pieces), start=torch.zeros(())).backward()
        accumulator.add(None if workers is None else workers[row])
    accumulator.finish()
    found = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return found


def trimmed(values: Sequence[float]) -> float:
    """The mean without the smallest and the largest of six."""
    return statistics.fmean(sorted(values)[1:-1])


@pytest.mark.parametrize("bias", [None, "topk:2", "ef21:topk:2"])
@pytest.mark.parametrize(
    ("how", "of_entries"), [("mean", statistics.fmean), ("median", statistics.median), ("trimmed:0.2", trimmed)]
)
def test_entry_by_entry(how: str, of_entries: Callable[[Sequence[float]], float], bias: str | None):
    accumulator = BiasedAccumulator(parameters(), bias=parse(bias or "none"), workers=6, aggregate=how)
    twins = [parse(bias or "none") for _ in range(6)]
    for vectors in GRADIENTS:
        sent = [v if twin is None else twin(v) for twin, v in zip(twins, vectors, strict=True)]
        wanted = [of_entries([float(v[entry]) for v in sent]) for entry in range(5)]
        found = step(accumulator, vectors)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_krum_by_a_loop_over_the_workers():
    """``krum:1`` of six: the gradient with the smallest sum of squared distances to its three nearest others."""
    vectors = GRADIENTS[0].tolist()
    squared = [[math.dist(a, b) ** 2 for b in vectors] for a in vectors]
    sums = [sum(sorted(row[:i] + row[i + 1 :])[:3]) for i, row in enumerate(squared)]
    found = step(BiasedAccumulator(parameters(), aggregate="krum:1"), GRADIENTS[0])
    assert found.tolist() == vectors[sums.index(min(sums))]


@pytest.mark.parametrize(
    ("how", "attack", "bias"),
    [
        ("centred-clip:1", None, None),
        ("bucketing:2>median", None, "topk:10%"),
        ("nnm:1>trimmed:0.25", "alie:1", "ef21:topk:5%"),
        ("median", "gaussian:1", None),
    ],
)
def test_it_equals_mamls_own_backward(how: str, attack: str | None, bias: Bias):
    """Over three steps, with what the robust mean keeps from one to the next."""
    learner = MAML(SinusoidMLP(generator=torch.Generator().manual_seed(0)).double(), F.mse_loss, inner_lr=0.01)
    theirs, operator = RobustMean(how, attack), parse(bias or "none")
    ours = RobustMean(how, attack)
    accumulator = BiasedAccumulator(learner.parameters(), parse(bias or "none"), workers=4, aggregate=ours)
    for number in range(3):
        batch = Sinusoid(dtype=torch.float64).sample(number, 4)
        learner.zero_grad()
        report = learner.backward(batch, workers=4, bias=operator, aggregate=theirs).metrics
        expected = [p.grad.clone() for p in learner.parameters()]
        learner.zero_grad()
        for t in range(4):
            learner.losses(batch.part(t, t + 1)).mean().backward()
            accumulator.add()
        own = accumulator.finish()
        for p, wanted in zip(learner.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-10, atol=1e-12)
        assert own["wire_bytes"] == report["wire_bytes"]
        assert (
            ours.state_dict().get("step") == theirs.state_dict().get("step") == (number + 1 if ours.stateful else None)
        )


@pytest.mark.parametrize("bias", [None, "ef21:topk:2"])
def test_on_two_processes(bias: str | None):
    def run(world: World) -> list[Tensor]:
        ours = BiasedAccumulator(parameters(), parse(bias or "none"), workers=6, aggregate="median", world=world)
        mine = list(world.workers(6))
        return [step(ours, vectors[mine], mine) for vectors in GRADIENTS]

    alone = run(World())
    for found in on_processes(2, run):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"aggregate": "middle"}, ValueError, "aggregate must be mean, median, geomedian or trimmed:SHARE"),
        ({"aggregate": 3}, TypeError, "aggregate is a name, mean, median, geomedian or trimmed:SHARE; got 3"),
        ({"aggregate": "centred-clip:1"}, ValueError, "would be a new robust mean at each step.*make it once"),
        ({"aggregate": "trimmed:0.2", "workers": 3}, ValueError, "trimmed:0.2 of 3 workers leaves out none of them"),
        ({"aggregate": "krum:1", "workers": 4}, ValueError, r"krum:1 \(2 F \+ 3\)"),
    ],
)
def test_bad_aggregates(arguments: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        BiasedAccumulator(parameters(), **arguments)


def test_too_few_workers_for_it_lose_nothing():
    """Their number is only known at the end of a step."""
    accumulator = BiasedAccumulator(parameters(), TopK(2), aggregate="krum:1")
    with pytest.raises(ValueError, match="krum:1"):
        step(accumulator, GRADIENTS[0, :4])
    found = step(accumulator, GRADIENTS[0, 4:])
    wanted = step(BiasedAccumulator(parameters(), TopK(2), workers=6, aggregate="krum:1"), GRADIENTS[0])
    assert torch.equal(found, wanted)


def test_an_attack_needs_workers_from_0_to_n():
    accumulator = BiasedAccumulator(parameters(), aggregate=RobustMean("median", attack="ipm:1"))
    with pytest.raises(ValueError, match="an attack acts on the last of workers 0 to 2; got worker 7"):
        step(accumulator, GRADIENTS[0, :3], [0, 1, 7])
