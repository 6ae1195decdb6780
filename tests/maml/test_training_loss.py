"""A loss whose backward pass gives what `MAML.backward` adds to ``.grad``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forked import run_forked
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from metamom import MAML, CompositeMomentum, DivergedError, train
from metamom.maml.checks.batch_checks import NonFiniteDataError
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

TASKS = Sinusoid(shots=5, queries=5, seed=1)


def learner(**options) -> MAML:
    return MAML(SinusoidMLP((8, 8), generator=torch.Generator().manual_seed(0)), F.mse_loss, **options)


def gradients(made: MAML) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in made.named_parameters()}


CASES: dict[str, tuple[Callable[[], MAML], dict]] = {
    "exact": (learner, {}),
    "first order, chunks": (lambda: learner(estimator="first-order", chunk_size=3), {}),
    "learned step sizes": (lambda: learner(learn_inner_lr="tensor", inner_steps=2), {}),
    "compiled": (lambda: learner(compile=True), {}),
    "compressed workers": (learner, {"workers": 4, "bias": "ef21:topk:20%"}),
    "median": (learner, {"workers": 4, "aggregate": "median"}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_backward(case, traced):
    make, options = CASES[case]
    ours, theirs = make(), make()
    for k in range(2):  # the second adds to the first, and error feedback carries over
        batch = TASKS.sample(k, 8)
        loss = ours.training_loss(batch, **options)
        loss.backward()
        expected = theirs.backward(batch, **options).loss
        assert loss.detach() == expected
    for name, gradient in gradients(theirs).items():
        assert torch.equal(gradients(ours)[name], gradient), name
    assert len(traced) == (2 if case == "compiled" else 0)


def test_scaled_and_added_to_another_loss():
    made, batch = learner(), TASKS.sample(0, 8)
    made(batch).backward()
    alone = gradients(made)
    made.zero_grad()
    penalty = sum(p.square().sum() for p in made.parameters())
    (3 * made(batch) + penalty).backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(p.grad, 3 * alone[name] + 2 * p.detach())


def test_parameters_in_lower_precision_and_frozen_ones():
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    made = MAML(model, F.mse_loss)
    batch = TASKS.sample(0, 4).to("cpu", torch.bfloat16)
    (2 * made(batch)).backward()
    assert {name: None if p.grad is None else p.grad.dtype for name, p in model.named_parameters()} == {
        "0.weight": torch.bfloat16,
        "0.bias": None,
        "2.weight": torch.bfloat16,
        "2.bias": torch.bfloat16,
    }


def test_only_the_loss_without_gradients():
    made, batch = learner(), TASKS.sample(0, 8)
    with_gradients = made(batch)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            loss = made(batch, bias="ef21:topk:20%")
        assert not loss.requires_grad
        torch.testing.assert_close(loss, with_gradients.detach())
    assert made.operators == {}


def test_differentiated_once():
    made = learner()
    weights = list(made.parameters())
    first = torch.autograd.grad(made(TASKS.sample(0, 4)).square(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first[0].sum().backward()


def test_hooks_of_parameters_run_once():
    made, seen = learner(), []
    weight = next(made.parameters())
    weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    made(TASKS.sample(0, 4)).backward()
    assert len(seen) == 1
    assert torch.equal(weight.grad, 2 * seen[0])


def test_bad_batches_are_refused():
    made, batch = learner(), TASKS.sample(0, 4)
    with pytest.raises(NonFiniteDataError):
        made(batch._replace(query_y=batch.query_y * torch.nan))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(1e30)
    with pytest.raises(DivergedError):
        made(batch)
    assert not made(batch, check_finite=False).isfinite()
    with pytest.raises(ValueError, match="workers"):
        learner()(batch, workers=3)


def test_momentum_of_an_operator_is_not_doubled():
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.01, beta=0.1)
    made(TASKS.sample(0, 8), workers=2, bias="ef21-sgdm(0.2):topk:50%").backward()
    with pytest.raises(ValueError, match="beta=1"):
        optimizer.step()


def in_ddp() -> None:
    """Steps of a learner in `DistributedDataParallel`, whose processes share each step's tasks."""
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    made = learner(learn_inner_lr="tensor")
    wrapped = DistributedDataParallel(made)
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    for k in range(6):
        with wrapped.no_sync() if k % 2 == 0 else torch.enable_grad():  # two meta-batches a step
            (wrapped(TASKS.sample(k, 8, rank=rank, world_size=size)) / 2).backward()
        if k % 2:
            optimizer.step()
            optimizer.zero_grad()
    expected = in_one_process()
    for p, q in zip(made.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    distributed.destroy_process_group()


def in_one_process() -> MAML:
    made = learner(learn_inner_lr="tensor")
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    for k in range(0, 6, 2):
        optimizer.zero_grad()
        for batch in (TASKS.sample(k, 8), TASKS.sample(k + 1, 8)):
            made.backward(batch)
        for p in made.parameters():
            p.grad /= 2
        optimizer.step()
    return made


def test_in_ddp_with_accumulation(tmp_path):
    for status, said in run_forked(in_ddp, 2, tmp_path):
        assert status == 0, said


def test_in_a_loop_of_ones_own():
    ours, theirs = learner(), learner()
    optimizer = CompositeMomentum(ours.parameters(), lr=0.02, beta=0.3)
    for k in range(5):
        optimizer.zero_grad()
        ours(TASKS.sample(k, 8)).backward()
        optimizer.step()
    train(theirs, CompositeMomentum(theirs.parameters(), lr=0.02, beta=0.3), TASKS, iterations=5, meta_batch=8)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
