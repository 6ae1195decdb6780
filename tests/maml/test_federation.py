"""Absent workers, unequal weights, local steps and a compressed message down, against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from endings import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, Reptile, TopK
from metamom.bias import NonFiniteError, parse
from metamom.nets.models import SinusoidMLP
from metamom.server.down import DownBias
from metamom.server.participation import Participation, present_workers
from metamom.tasks import FixedTasks, Sinusoid

TASKS = Sinusoid(shots=3, queries=4, seed=2)
N, T = 4, 16  # workers, tasks a step


def learner(**options: Any) -> MAML:
    torch.manual_seed(0)
    return MAML(SinusoidMLP(hidden=(6,)).double(), F.mse_loss, inner_lr=0.05, **options)


def batch(step: int, tasks: int = T) -> Any:
    return TASKS.sample(step, tasks).to(dtype=torch.float64)


def flat(made: MAML) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in made.meta_parameters().values()])


def set_flat(made: MAML, values: Tensor) -> None:
    parameters = made.meta_parameters().values()
    with torch.no_grad():
        for p, part in zip(parameters, values.split([p.numel() for p in parameters]), strict=True):
            p.copy_(part.view_as(p))


def gradient(made: MAML, tasks: Any) -> Tensor:
    """One worker's meta-gradient ``[d]`` on its tasks."""
    return torch.cat([g[0].reshape(-1) for g in made.meta_gradient(tasks).grads.values()])


def written(made: MAML) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in made.meta_parameters().values()])


def trained(
    steps: int = 4, tasks: Any = batch, beta: float = 0.5, **options: Any
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The weights after some steps, and the metrics."""
    made = learner(**{key: options.pop(key) for key in ("estimator", "chunk_size") if key in options})
    optimizer = CompositeMomentum(made.parameters(), lr=0.05, beta=beta)
    metrics = []
    for step in range(4):
        optimizer.zero_grad()
        loss, line = made.backward(batch(step), workers=N, **options)
        optimizer.step()
        metrics.append({"loss": float(loss), **line})
    return flat(made), metrics


@pytest.mark.parametrize("bias", [None, "topk:3", "ef21:topk:3"])
def test_the_defaults_are_the_plain_step_bit_for_bit(bias):
    wanted, lines = trained(bias=bias)
    options = {
        "participation": 1.0,
        "worker_weights": [2.0] * N,
        "local_steps": 1,
        "local_lr": 0.3,
        "down_bias": "none",
    }
    found, others = trained(bias=bias, **options)
    assert torch.equal(found, wanted)
    assert lines == others


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("spec", ["topk:3", "ef21:topk:3"])
def test_absent_workers(spec, chunk_size):
    """The gradient is that of the present workers, with estimates of all where the server remembers them."""
    made, twin = learner(chunk_size=chunk_size), learner()
    share, operator, weights = Participation(0.5, seed=5), parse(spec), [1.0, 2.0, 3.0, 4.0]
    each, estimates = [parse(spec) for _ in range(N)], [torch.zeros(len(flat(made)), dtype=torch.float64)] * N
    for step in range(4):
        made.zero_grad()
        tasks = batch(step)
        loss, metrics = made.backward(tasks, workers=N, bias=operator, participation=share, worker_weights=weights)
        present = present_workers(N, 0.5, step, seed=5)
        assert len(present) == 2
        losses, sent = [], [torch.zeros_like(estimates[0])] * N
        for worker in present:
            own = tasks.split(N)[worker]
            losses.append(twin.losses(own).detach())
            sent[worker] = estimates[worker] = each[worker](gradient(twin, own)[None], workers=[worker])[0]
        rows, scale = (estimates, 1.0) if spec.startswith("ef21") else (sent, N / len(present))
        wanted = scale * sum(w / 10 * row for w, row in zip(weights, rows, strict=True))
        torch.testing.assert_close(written(made), wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, torch.cat(losses).mean())
        assert metrics["wire_bytes"] == 2 * each[0].wire_bytes(len(wanted), 8)


def test_accuracy_and_averages_of_present_workers_only():
    """A tracked estimator updates the tasks of present workers."""
    made = learner(estimator="moml")
    tasks = FixedTasks(Sinusoid(shots=4, queries=4), 16, order="reshuffle").sample(0, 16).to(dtype=torch.float64)
    share = Participation(0.25, seed=1)
    present = share.present(N)
    made.backward(tasks, workers=N, participation=share)
    other = learner(estimator="moml")
    other.backward(tasks.split(N)[present[0]])
    assert made.memory.state_dict().keys() == other.memory.state_dict().keys() != set()
    assert_same(made.memory.state_dict(), other.memory.state_dict())

    torch.manual_seed(0)
    classifier = MAML(nn.Linear(2, 3).double(), F.cross_entropy, inner_lr=0.1)
    x = torch.randn(4, 6, 2, dtype=torch.float64)
    labels = torch.arange(6).remainder(3).expand(4, 6)
    found = classifier.backward(type(tasks)(x, labels, x, labels), workers=4, participation=Participation(0.5, seed=1))
    chosen = list(Participation(0.5, seed=1).present(4))
    alone = classifier.backward(type(tasks)(x[chosen], labels[chosen], x[chosen], labels[chosen]), workers=2)
    assert found.metrics["accuracy"] == alone.metrics["accuracy"]


@pytest.mark.parametrize(
    ("share", "spec", "weights"),
    [(1.0, "none", None), (0.5, "topk:3", [1.0, 2.0, 3.0, 4.0]), (0.5, "ef21:topk:3", None)],
)
def test_local_steps(share, spec, weights):
    """Against one learner for each worker that takes its own steps."""
    made, operator, participation = learner(), parse(spec), Participation(share)
    each = [parse(spec) for _ in range(N)]
    d, lr, H = len(flat(made)), 0.1, 2
    estimates, w = [torch.zeros(d, dtype=torch.float64)] * N, [x / sum(weights or [4.0]) for x in weights or [1.0] * N]
    optimizer = CompositeMomentum(made.parameters(), lr=0.05, beta=0.5)
    for step in range(2):
        present = participation.present(N)
        tasks, start = batch(step), flat(made)
        rows, losses = [torch.zeros(d, dtype=torch.float64)] * N, []
        for worker in present:
            local = learner()
            set_flat(local, start)
            total = torch.zeros(d, dtype=torch.float64)
            for part in tasks.split(N)[worker].split(H):
                losses.append(local.losses(part).detach())
                g = gradient(local, part)
                set_flat(local, flat(local) - lr * g)
                total = total + g
            torch.testing.assert_close(total * lr, start - flat(local), rtol=1e-10, atol=1e-12)  # of the weights
            rows[worker] = estimates[worker] = each[worker](total[None], step=step, workers=[worker])[0]
        averaged, scale = (estimates, 1.0) if spec.startswith("ef21") else (rows, N / len(present))
        wanted = scale * sum(a * row for a, row in zip(w, averaged, strict=True))
        optimizer.zero_grad()
        options = {"participation": participation, "worker_weights": weights, "local_steps": H, "local_lr": lr}
        loss, _ = made.backward(tasks, workers=N, bias=operator, **options)
        torch.testing.assert_close(written(made), wanted, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, torch.cat(losses).mean())
        optimizer.step()


def small(normalised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(5, track_running_stats=False)] if normalised else []
    return nn.Sequential(nn.Linear(1, 5), *norm, nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAML(small(), F.mse_loss, inner_lr=0.05, estimator="independent"),
        lambda: MAML(small(), F.mse_loss, inner_lr=0.05, inner_steps=2, learn_inner_lr=True),
        lambda: MAML(small(normalised=True), F.mse_loss, inner_lr=0.05, step_norms=True),
        lambda: MAML(small(), F.mse_loss, inner_lr=0.05, vectorize="loop"),
        lambda: Reptile(small(), F.mse_loss, inner_lr=0.05, inner_steps=2),
    ],
    ids=["independent", "learned step sizes", "norms by step", "looped", "reptile"],
)
def test_local_steps_of_other_learners(make):
    """Of the present workers, against one learner for each."""
    made, share = make(), Participation(0.5, seed=2)
    tasks = Sinusoid(shots=4, queries=4).sample(0, T).to(dtype=torch.float64)
    sums = []
    for worker in share.present(N):
        local, total = make(), torch.zeros(len(flat(made)), dtype=torch.float64)
        for part in tasks.split(N)[worker].split(2):
            g = gradient(local, part)
            set_flat(local, flat(local) - 0.1 * g)
            total = total + g
        sums.append(total)
    made.backward(tasks, workers=N, participation=share, local_steps=2, local_lr=0.1)
    torch.testing.assert_close(written(made), torch.stack(sums).mean(0), rtol=1e-10, atol=1e-12)


def test_per_fedavg():
    """With beta = 1 and one step size, the server's weights are the mean of the workers'."""
    made, H, lr = learner(), 4, 0.1
    optimizer, start, ends = CompositeMomentum(made.parameters(), lr=lr, beta=1.0), flat(made), []
    for own in batch(0).split(N):
        local = learner()
        for part in own.split(H):
            set_flat(local, flat(local) - lr * gradient(local, part))
        ends.append(flat(local))
    made.backward(batch(0), workers=N, local_steps=H, local_lr=lr)
    optimizer.step()
    torch.testing.assert_close(flat(made), torch.stack(ends).mean(0), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(flat(made), start)


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 3}, {"chunk_size": 8}])
def test_local_steps_in_chunks(options):
    wanted, lines = trained(local_steps=2, local_lr=0.1, participation=0.5)
    found, others = trained(local_steps=2, local_lr=0.1, participation=0.5, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in others])


@pytest.mark.parametrize("spec", ["topk:3", "sign", "randk:3", "qsgd:4:seed=2"])
def test_a_compressed_message_down(spec):
    """Gradients at x, which follows w by compressed differences."""
    made, twin, operator = learner(), learner(), parse(spec)
    optimizer, down = CompositeMomentum(made.parameters(), lr=0.05, beta=0.5), DownBias(spec)
    w, v = flat(twin), torch.zeros(len(flat(twin)), dtype=torch.float64)
    x = w
    for step in range(5):
        if step:
            x = x + operator((w - x)[None], step=step - 1, workers=[0])[0]
        set_flat(twin, x)
        g = torch.stack([gradient(twin, own) for own in batch(step).split(N)]).mean(0)
        optimizer.zero_grad()
        _, metrics = made.backward(batch(step), workers=N, down_bias=down)
        torch.testing.assert_close(flat(made), w, rtol=1e-10, atol=1e-12)  # the server's weights
        torch.testing.assert_close(down.seen, x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(written(made), g, rtol=1e-9, atol=1e-12)
        assert metrics["wire_bytes_down"] == (N * operator.wire_bytes(len(w), 8) if step else 0)
        optimizer.step()
        v = 0.5 * v + 0.5 * g
        w = w - 0.05 * v
    assert not torch.allclose(x, w)


def test_a_whole_message_down_is_the_plain_path():
    """``x + (w - x)`` is w, up to rounding."""
    wanted, _ = trained()
    found, lines = trained(down_bias=f"topk:{len(wanted)}")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert all("wire_bytes_down" in line for line in lines)


def test_a_failed_step_changes_nothing():
    made, down, share = learner(), DownBias("topk:3"), Participation(0.5)
    made.backward(batch(0), workers=N, down_bias=down, participation=share)
    with torch.no_grad():
        next(made.parameters()).add_(0.1)
    before, seen = flat(made), down.seen.clone()
    bad = batch(1)
    bad.support_x[:, 0] = math.nan
    with pytest.raises(ValueError, match=r"not finite|NaN"):
        made.backward(bad, workers=N, down_bias=down, participation=share)
    assert torch.equal(flat(made), before)
    assert torch.equal(down.seen, seen)
    assert (down.messages, share.steps) == (0, 1)


def test_the_state_goes_on():
    """From a checkpoint after two of four steps, bit for bit; and as the learner keeps it for a share and a SPEC."""

    def run(made: MAML, steps: range, down: Any, share: Any, operator: Any) -> list[Tensor]:
        found = []
        for step in steps:
            made.zero_grad()
            made.backward(batch(step), workers=N, bias=operator, down_bias=down, participation=share)
            found.append(written(made))
            set_flat(made, flat(made) - 0.05 * found[-1])
        return found

    def parts() -> tuple[Any, ...]:
        return DownBias("randk:5"), Participation(0.5), parse("ef21:topk:3")

    whole = run(learner(), range(4), *parts())
    half, used, again = learner(), parts(), parts()
    begun = run(half, range(2), *used)
    for part, fresh in zip(used, again, strict=True):
        fresh.load_state_dict(part.state_dict())
    resumed = run(half, range(2, 4), *again)
    kept = run(learner(), range(4), "randk:5", 0.5, "ef21:topk:3")
    assert torch.equal(torch.stack(begun + resumed), torch.stack(whole))
    assert torch.equal(torch.stack(kept), torch.stack(whole))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": 3, "local_lr": 0.1}, r"4 workers takes 3 local .* a multiple of 12; got 16 tasks\. Use 24"),
        ({"local_steps": 2}, r"local_steps=2 needs the step size of local steps: pass local_lr > 0"),
        ({"local_steps": 0}, "local_steps must be >= 1; got 0"),
        ({"local_steps": 2, "local_lr": 0.0}, "local_lr is the step size of local steps, finite and > 0; got 0.0"),
        ({"participation": 0.0}, "participation is the share of workers"),
        ({"participation": 0.5, "bias": "marina(0.1):topk:3"}, "needs all workers in every step"),
        ({"worker_weights": [1, 2]}, "worker_weights are 4 positive, finite numbers"),
        ({"worker_weights": [1, 2, 3, 4], "aggregate": "median"}, "worker_weights need aggregate='mean'"),
    ],
)  # fmt: skip
def test_refused(options, message):
    made = learner()
    with pytest.raises(ValueError, match=message):
        made.backward(batch(0), workers=N, **options)
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.parametrize("down", [TopK(3), "ef21:topk:3", 3])
def test_refused_messages_down(down):
    with pytest.raises(TypeError, match=r"down_bias (keeps a state|is an operator without error feedback)"):
        learner().backward(batch(0), workers=N, down_bias=down)


def test_weights_that_are_not_finite():
    down = DownBias("topk:1")
    down.commit(down.next(torch.zeros(2)))
    with pytest.raises(NonFiniteError, match="infinite or NaN"):
        down.next(torch.tensor([math.nan, 0.0]))
    with pytest.raises(ValueError, match="down_bias keeps 2 weights that workers see; got 3"):
        down.next(torch.zeros(3))
    for bad in ({}, {"seen": 1, "messages": 0, "operator": {}}, {"seen": None, "messages": -1, "operator": {}}):
        with pytest.raises(ValueError, match="down_bias"):
            down.load_state_dict(bad)
    assert repr(down) == "DownBias(TopK(k=1))"
