"""What a plain loop over tasks does, task by task does too: it recomputes, draws and copies once for each task."""

from __future__ import annotations

import pytest
import torch
from problems import regression_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint
from unbatchable_models import (
    ALPHA,
    Features,
    assert_gradients,
    meta_gradient,
    sequences,
)

from metamom import MAML, TaskBatch

CHECKPOINT = checkpointing.CheckpointFunction
SMALL = regression_batch(tasks=2, support=4, dim=3)


class Checkpointed(Features):
    """Two checkpoints, which can be switched off: a plain loop would recompute with the model's own weights."""

    checkpointed = True

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def then(self, z: Tensor) -> Tensor:
        if not self.checkpointed:
            return torch.tanh(self.head.weight * z)
        return checkpoint(lambda z: torch.tanh(self.head.weight * z), z, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_parts_run_once(use_reentrant):
    model, tasks = Checkpointed(use_reentrant).double(), sequences()
    with pytest.warns(UserWarning, match="cannot run on all tasks at once .*task by task"):
        MAML(model, F.mse_loss, inner_lr=ALPHA).backward(tasks)
    model.checkpointed = False
    assert_gradients(model, meta_gradient(model, tasks))
    assert checkpointing.CheckpointFunction is CHECKPOINT  # PyTorch's own again
    model.checkpointed, x = True, torch.ones(2, 5, 3, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def test_the_warning_names_the_module_that_calls_checkpoint():
    """Not the part that runs again, which is all that an error in the backward pass tells of."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), Block()), nn.Linear(3, 2)).double()
    x, y = torch.ones(2, 5, 3, dtype=torch.float64), torch.ones(2, 5, 2, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"^module '1\.1' \(Block\) .*checkpoint runs a part of it again"):
        MAML(model, F.mse_loss).backward(TaskBatch(x, y, x, y))


def test_a_checkpointed_loss_runs_once():
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        return checkpoint(F.mse_loss, predictions, y, use_reentrant=False)

    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 1)).double(), sequences()
    MAML(model, loss, inner_lr=ALPHA, vectorize="loop").backward(tasks)
    assert_gradients(model, meta_gradient(model, tasks))


class StochasticDepth(nn.Module):
    """As torchvision's: it draws in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5) if self.training else x


@pytest.mark.parametrize("layer", [nn.RReLU(0.1, 0.9), StochasticDepth()], ids=["RReLU", "StochasticDepth"])
def test_draws_are_those_of_a_loop_and_of_the_task(layer):
    """What is drawn is recorded, and the plain loop multiplies by it. Chunks do not change the draws."""
    factors: list[Tensor] = []

    def record(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        factors.append(torch.where(given[0] == 0, 1.0, out / given[0]).detach())

    model, tasks = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), layer, nn.Linear(4, 1)).double(), sequences()
    found = []
    for options in ({"chunk_size": None}, {"chunk_size": 1}, {"chunk_size": 2, "vectorize": "loop"}):
        torch.manual_seed(3)
        learner = MAML(model, F.mse_loss, inner_lr=ALPHA, **options)
        learner.vectorize = "loop"
        found.append(learner.meta_gradient(tasks).grads)
    for grads in found[1:]:
        for name, g in grads.items():
            torch.testing.assert_close(g, found[0][name], rtol=1e-12, atol=1e-14)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, chunk_size=None)
    with pytest.warns(UserWarning, match="cannot run on all tasks at once .*task by task"):
        learner.meta_gradient(tasks)
    model[2].register_forward_hook(record)
    learner.backward(tasks)
    of_support, of_query = factors[-6::2], factors[-5::2]  # each task is computed in turn
    assert not torch.equal(of_query[0], of_query[1])
    plain = nn.Sequential(nn.Flatten(), model[1], _Times(), model[3])
    plain[2].factors = [f for pair in zip(of_support, of_query, strict=True) for f in pair]
    assert_gradients(model, meta_gradient(plain, tasks))


def test_a_model_that_is_random_in_training_is_batched_in_evaluation():
    model, tasks = (
        nn.Sequential(nn.Linear(3, 4), StochasticDepth(), nn.Linear(4, 1)).double(),
        SMALL,
    )
    learner = MAML(model, F.mse_loss)
    with pytest.warns(UserWarning, match="so the model runs task by task"):
        learner.meta_gradient(tasks)
    model.eval()
    learner.meta_gradient(tasks)
    assert learner._vectorization.looped == {("model", True)}


class _Times(nn.Module):
    factors: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.pop(0)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_a_loss_must_not_draw(vectorize):
    def loss(predictions: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(predictions + torch.randn_like(predictions), y)

    with pytest.raises(ValueError, match=r"In the model's forward, draw with"):
        MAML(nn.Linear(3, 1).double(), loss, vectorize=vectorize).backward(SMALL)


def test_finite_differences_refuse_draws_in_a_loop():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    for _ in range(2):
        with pytest.raises(ValueError, match="must not draw random numbers"):
            MAML(model, F.mse_loss, estimator="hessian-free", vectorize="loop").backward(SMALL)


class Changing(Features):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        x[x > 1] = 1.0
        return super().forward(x.mul_(2))

    def then(self, z: Tensor) -> Tensor:
        return z


def test_a_model_that_changes_its_input_gets_a_copy():
    model, tasks = Changing().double(), sequences()
    kept = [x.clone() for x in tasks[:4]]
    MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="loop").backward(tasks)
    assert all(torch.equal(a, b) for a, b in zip(kept, tasks[:4], strict=True))
    assert_gradients(model, meta_gradient(model, TaskBatch(*kept)))


@pytest.mark.parametrize("adapt", [None, ["head"]])
def test_a_parameter_that_is_changed_in_place_is_refused_before_it_is_changed(adapt):
    class Shrinking(Features):
        def then(self, z: Tensor) -> Tensor:
            with torch.no_grad():
                self.layer.weight.mul_(0.5)
            return z

    model = Shrinking().double()
    before = model.layer.weight.detach().clone()
    with pytest.raises(ValueError, match="in place"):
        MAML(model, F.mse_loss, adapt=adapt, vectorize="loop").backward(sequences())
    assert torch.equal(model.layer.weight, before)


def test_results_of_different_shapes_are_refused():
    class Selected(Features):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0, 0] > 0])

        def then(self, z: Tensor) -> Tensor:
            return z

    with pytest.raises(ValueError, match="every task must give results of one shape"):
        MAML(Selected().double(), F.mse_loss, vectorize="loop").predict(
            {name: p.expand(3, *p.shape) for name, p in Selected().double().named_parameters()}, sequences().query_x
        )


class Written(nn.Module):
    """Changes the result of a ReLU in place."""

    def __init__(self, write) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.ReLU())
        self.head, self.write = nn.LazyLinear(1), write

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        self.write(z)
        return self.head(z.flatten(1))


def subtract(z: Tensor) -> None:
    z -= 1


def fill(z: Tensor) -> None:
    z[:, 0] = 1.0


def through_a_view(z: Tensor) -> None:
    z.flatten(2).sub_(1.0)


def through_a_slice(z: Tensor) -> None:
    channel = z[:, 1]
    channel *= 2.0


@pytest.mark.parametrize(
    "write", [lambda z: z.sub_(1.0), subtract, fill, lambda z: torch.sigmoid_(z), through_a_view, through_a_slice]
)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_the_result_of_a_relu_that_changes_in_place_is_refused_as_by_pytorch(write, chunk_size):
    x, y = torch.randn(2, 3, 1, 6, 6, dtype=torch.float64), torch.randn(2, 3, 1, dtype=torch.float64)
    model, batch = Written(write).double(), TaskBatch(x, y, x, y)
    model(x[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.mse_loss(model(x[0]), y[0]).backward()
    with pytest.raises(ValueError, match="changes the result of a ReLU in place"):
        MAML(model, F.mse_loss, vectorize="vmap", chunk_size=chunk_size).backward(batch)
    learner = MAML(model, F.mse_loss, chunk_size=chunk_size)
    with (
        pytest.warns(UserWarning, match="the result of a ReLU is changed in place"),
        pytest.raises(ValueError, match="changes in place what its gradient needs"),
    ):
        learner.backward(batch)
    with torch.no_grad():  # nothing needs it then
        predicted = learner.predict({name: w.expand(2, *w.shape) for name, w in model.named_parameters()}, x)
        torch.testing.assert_close(predicted[1], model(x[1]))
