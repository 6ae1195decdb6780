"""Models that draw at random: what a task draws depends on the seed and on its number, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.under_vmap.draws import DrawsByTask, Step

TASKS = 6


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Factory(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(x.shape, dtype=x.dtype)


class Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gumbel_softmax(x)


class Shuffled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.randperm(8)]


class Sampled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.gather(1, torch.multinomial(x.softmax(1), 8))


LAYERS = {
    "Dropout": lambda: nn.Dropout(0.5),
    "AlphaDropout": lambda: nn.AlphaDropout(0.5),
    "Dropout1d": lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Dropout1d(0.5), nn.Flatten()),
    "randn_like": Noisy,
    "rand": Factory,
    "gumbel_softmax": Gumbel,
    "randperm": Shuffled,
    "multinomial": Sampled,
}


def problem(layer: str) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), LAYERS[layer](), nn.Linear(8, 1)).double()
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(TASKS, n, d, generator=generator, dtype=torch.float64) for n in (5, 4) for d in (2, 1))
    return model, TaskBatch(*batch)


@pytest.mark.parametrize("options", [{}, {"inner_steps": 3}, {"estimator": "cross-fit"}, {"estimator": "first-order"}])
@pytest.mark.parametrize("layer", LAYERS)
def test_chunks_change_nothing(layer, options):
    model, batch = problem(layer)
    if options.get("estimator") == "cross-fit":
        batch = batch._replace(support_x=batch.support_x[:, :4], support_y=batch.support_y[:, :4])
    found = []
    for chunk_size in (None, 1, 2, 4, 5):
        torch.manual_seed(7)
        learner = MAML(model, F.mse_loss, inner_lr=0.1, chunk_size=chunk_size, **options)
        found.append(learner.meta_gradient(batch, workers=2))
        after = torch.rand(())
        torch.manual_seed(7)
        losses = learner.losses(batch)
        torch.testing.assert_close(losses.detach(), found[-1].losses)
        assert torch.rand(()) == after  # the generator has moved on as far
    for other in found[1:]:
        torch.testing.assert_close(other.losses, found[0].losses)
        assert_close(other.grads, found[0].grads)


@pytest.mark.parametrize("layer", LAYERS)
def test_tasks_and_steps_draw_differently(layer):
    model, batch = problem(layer)
    same = TaskBatch(*(x[:1].expand_as(x) for x in batch[:4]))
    learner = MAML(model, F.mse_loss, inner_lr=1e-9)
    torch.manual_seed(7)
    first, second = learner.losses(same), learner.losses(same)
    assert len(set(first.tolist()) | set(second.tolist())) == 2 * TASKS


def test_passes_draw_differently():
    """The query set's mask is not the support set's, nor is that of one inner step the next one's."""
    with Step().tasks(0, TASKS):
        passes = []
        for _ in range(3):
            with DrawsByTask(TASKS):
                passes.append(torch.func.vmap(torch.rand_like, randomness="different")(torch.ones(TASKS, 4)))
    assert len(torch.cat(passes).flatten().unique()) == 3 * TASKS * 4


def test_the_last_tasks_alone_draw_as_among_all():
    model, batch = problem("Dropout")
    torch.manual_seed(3)
    whole = MAML(model, F.mse_loss).meta_gradient(batch, workers=TASKS)
    torch.manual_seed(3)
    halves = MAML(model, F.mse_loss, chunk_size=TASKS // 2).meta_gradient(batch, workers=TASKS)
    assert_close(whole.grads, halves.grads)


def test_dropout_keeps_as_many_as_it_says():
    """Of 6 x 4,000 independent entries, half are kept: within five standard deviations."""
    torch.manual_seed(0)
    with DrawsByTask(TASKS):
        x = torch.func.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(torch.ones(TASKS, 4000))
    kept = (x != 0).sum(1)
    assert len(set(kept.tolist())) > 1
    assert set(x.unique().tolist()) == {0.0, 2.0}
    assert ((kept - 2000).abs() < 5 * (4000 * 0.25) ** 0.5).all()


def test_a_model_that_draws_nothing_leaves_the_generator_alone():
    model, batch = problem("Dropout")
    learner = MAML(model.eval(), F.mse_loss)
    before = torch.get_rng_state()
    learner.meta_gradient(batch)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_with_a_generator_of_its_own_keeps_it():
    """Draws from an explicit generator are the model's business, in the order in which it makes them."""
    with DrawsByTask(2):
        one = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one, torch.rand(3, generator=torch.Generator().manual_seed(5)))


# generators that are seeded within the forward: every task draws the same, as in a loop


class Seeded(nn.Module):
    """A layer times numbers that are the same at every call."""

    def __init__(self, numbers: Callable[[], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.numbers = nn.Linear(2, 6), nn.Linear(6, 1), numbers

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.numbers())


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_draws() -> Tensor:
    generator = seeded()
    return torch.randn(6, generator=generator).double() * torch.bernoulli(torch.full((6,), 0.5), generator=generator)


def shuffled() -> Tensor:
    return torch.arange(6.0, dtype=torch.float64)[torch.randperm(6, generator=seeded())]


def under_a_seed() -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return torch.randn(6).double() * torch.rand(6)


KEPT = torch.Generator()


def seeded_again() -> Tensor:
    return torch.randn(6, generator=KEPT.manual_seed(3)).double()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    "numbers",
    [lambda: torch.randn(6, generator=seeded()).double(), two_draws, shuffled, under_a_seed, seeded_again],
    ids=["one", "two", "permutation", "manual_seed", "seeded again"],
)
def test_what_is_seeded_in_the_forward_is_the_same_for_all_tasks(numbers, chunk_size):
    torch.manual_seed(0)
    model, batch = Seeded(numbers).double(), problem("Dropout")[1]
    expected, losses = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.1)
    found = MAML(model, F.mse_loss, inner_lr=0.1, chunk_size=chunk_size).meta_gradient(batch)
    assert_close({name: g.mean(0) for name, g in found.grads.items()}, expected)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=0)


def test_a_generator_that_goes_on_from_call_to_call_is_refused():
    generator = torch.Generator().manual_seed(1)
    model = Seeded(lambda: torch.randn(6, generator=generator).double()).double()
    with pytest.raises(
        ValueError, match=r"a torch\.Generator that keeps its state from call to call.*Seed it in the forward"
    ):
        MAML(model, F.mse_loss).backward(problem("Dropout")[1])
