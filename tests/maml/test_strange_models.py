"""Models that are rarely tried: what they keep, what they write to, and sparse and quantised weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import meta_gradient_by_copies
from small_models import Of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, pad

ALPHA = 0.05
RUNS = ("auto", "loop")


def of(forward, **modules) -> nn.Module:
    torch.manual_seed(0)
    return Of(forward, a=nn.Linear(4, 6), c=nn.Linear(6, 1), **modules).double()


def gradient(model: nn.Module, vectorize: str, **options) -> dict[str, Tensor]:
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize=vectorize, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.backward(BATCH)
    return {name: p.grad for name, p in model.named_parameters()}


def assert_as_in_a_loop(model: nn.Module, vectorize: str) -> None:
    expected = meta_gradient_by_copies(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA)
    assert_close(gradient(model, vectorize), expected, 1e-10)


BATCH = regression_batch(1, tasks=3, support=6, query=6, dim=4)
NEIGHBOURS = torch.eye(6, dtype=torch.float64).roll(1, 0)
SPARSE = {"COO": Tensor.to_sparse_coo, "CSR": Tensor.to_sparse_csr, "CSC": Tensor.to_sparse_csc}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("vectorize", RUNS)
@pytest.mark.parametrize("multiply", [torch.matmul, torch.sparse.mm])
@pytest.mark.parametrize("layout", SPARSE)
def test_graphs_with_sparse_neighbours(layout, multiply, vectorize):
    model = of(lambda self, x: self.c(multiply(self.neighbours, self.a(x).T).T))
    model.register_buffer("neighbours", NEIGHBOURS)
    expected = meta_gradient_by_copies(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA)
    model.neighbours = SPARSE[layout](NEIGHBOURS)
    assert_close(gradient(model, vectorize), expected, 1e-10)


def test_sparse_parameters_are_refused():
    model = of(lambda self, x: self.c(torch.sparse.mm(self.w, self.a(x).T).T))
    model.w = nn.Parameter(NEIGHBOURS.to_sparse())
    with pytest.raises(ValueError, match=r"sparse parameters cannot be adapted: w\. Make them dense"):
        MAML(model, F.mse_loss)
    model.w.requires_grad_(False)
    dense = of(lambda self, x: self.c((NEIGHBOURS @ self.a(x).T).T))
    found = gradient(model, "auto")
    assert found.pop("w") is None
    assert_close(found, gradient(dense, "auto"), 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_refused():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1)), {nn.Linear})
    with pytest.raises(ValueError, match=r"the weights of 0, 1 are quantised\. Train the model before"):
        MAML(model, F.mse_loss)


@pytest.mark.parametrize("vectorize", RUNS)
def test_derivatives_along_a_direction_in_the_forward(vectorize):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: self.c(self.a(x).tanh()), (x,), (torch.ones_like(x),))[1]

    def by_hand(self, x: Tensor) -> Tensor:
        return ((1 - self.a(x).tanh() ** 2) * self.a.weight.sum(1)) @ self.c.weight.T

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = meta_gradient_by_copies(of(by_hand), F.mse_loss, BATCH, steps=2, inner_lr=ALPHA)
    assert_close(gradient(of(forward), vectorize), expected, 1e-10)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("norm", ["batch", "frozen", "support"])
def test_normalisation_between_processes_is_that_of_one(norm, vectorize):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.n(self.a(x)))

    one, synchronised = of(forward, n=nn.BatchNorm1d(6)), of(forward, n=nn.SyncBatchNorm(6))
    assert_close(gradient(synchronised, vectorize, norm=norm), gradient(one, vectorize, norm=norm), 1e-12)
    assert synchronised.n.num_batches_tracked == 0
    assert "forward" not in vars(synchronised.n)


class Remembers(nn.Module):
    """Reads how often it has left a tensor in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.layer(x) * len(self.seen)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
def test_a_list_that_a_model_fills_is_as_it_was_for_each_task(vectorize):
    torch.manual_seed(0)
    model = Remembers().double()
    assert_as_in_a_loop(model, vectorize)
    assert model.seen == []


def by_data(self, x: Tensor) -> Tensor:
    z = self.a(x)
    self.mean.data = 0.9 * self.mean + 0.1 * z.detach().mean(0)
    return self.c(z - self.mean)


def in_data(self, x: Tensor) -> Tensor:
    z = self.a(x)
    self.mean.data.mul_(0.9).add_(0.1 * z.detach().mean(0))
    return self.c(z - self.mean)


def decay(self, x: Tensor) -> Tensor:
    self.mean.data.mul_(0.9)
    return self.c(self.a(x) - self.mean)


def clamp(self, x: Tensor) -> Tensor:
    self.a.weight.data.clamp_(-0.1, 0.1)
    return self.c(self.a(x))


def replace(self, x: Tensor) -> Tensor:
    self.a.weight.data = self.a.weight.detach().clamp(-0.1, 0.1)
    return self.c(self.a(x))


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("forward", [by_data, in_data, decay, clamp, replace])
def test_writes_to_the_data_of_a_tensor_are_refused(forward, vectorize):
    model = of(forward)
    model.register_buffer("mean", torch.ones(6, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"in-place operations|changed in place"):
        gradient(model, vectorize)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Counts(nn.Module):
    """Weighs the loss by the number of its calls, or by what it sums up, which needs a loop."""

    def __init__(self, of_task: bool = False) -> None:
        super().__init__()
        self.of_task = of_task
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))

    def forward(self, predictions: Tensor, y: Tensor) -> Tensor:
        self.calls += float(y.sum()) if self.of_task else 1.0
        return self.calls * F.mse_loss(predictions, y)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
def test_a_loss_counts_once_for_all_tasks(vectorize):
    model, loss = of(lambda self, x: self.c(self.a(x))), Counts()
    learner = MAML(model, loss, inner_lr=ALPHA, vectorize=vectorize, chunk_size=None)
    wanted = meta_gradient_by_copies(
        model, lambda p, y: 3 * F.mse_loss(p, y), BATCH, inner_lr=ALPHA * 2 / 3
    )  # the first call weighs by 2, the second by 3
    learner.backward(BATCH)
    assert_close({name: p.grad for name, p in model.named_parameters()}, wanted, 1e-10)
    assert loss.calls == 3


@pytest.mark.filterwarnings("ignore:loss_fn cannot run on all tasks at once")
@pytest.mark.parametrize("vectorize", RUNS)
def test_a_loss_must_not_carry_over_what_depends_on_the_task(vectorize):
    learner = MAML(of(lambda self, x: self.c(self.a(x))), Counts(of_task=True), vectorize=vectorize, chunk_size=None)
    with pytest.raises(ValueError, match=r"loss_fn \(Counts\) changes calls by values that depend on the task"):
        learner.backward(BATCH)
    assert learner.loss_fn.calls == 1


DRAWING = {
    "transposed": lambda z: F.dropout(z.T, 0.3).T,
    "every other": lambda z: z * F.dropout(z.detach()[:, ::2], 0.3).repeat(1, 2),
    "images": lambda z: F.dropout(z.view(-1, 2, 3, 1).contiguous(memory_format=torch.channels_last), 0.3).flatten(1),
    "in place": lambda z: (1.0 * z).T.bernoulli_(0.3).T + z,
    "a permutation, then noise": lambda z: z[torch.randperm(6)] + torch.randn_like(z) + z[torch.randperm(6)],
}


@pytest.mark.parametrize("draw", DRAWING)
def test_draws_do_not_depend_on_the_layout_of_a_batch(draw):
    found = []
    for vectorize in ("auto", "loop"):
        model = of(lambda self, x: self.c(DRAWING[draw](self.a(x))))
        torch.manual_seed(1)
        found.append([gradient(model, vectorize) for _ in range(2)][1])
    assert_close(found[0], found[1], 1e-10)


def test_a_transformer_layer_drops_the_same_in_a_loop():
    found = []
    for vectorize in ("vmap", "loop"):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(6, 2, 4, dropout=0.3, batch_first=True)
        model = of(lambda self, x: self.c(self.t(self.a(x).unflatten(0, (2, 3))).flatten(0, 1)), t=layer)
        torch.manual_seed(1)
        found.append(gradient(model, vectorize))
    assert_close(found[0], found[1], 1e-10)


@pytest.mark.parametrize("forward", ["if", "divided"])
def test_padding_does_not_change_the_number_of_points_that_a_model_reads(forward):
    kinds = {
        "if": lambda self, x: self.c(self.a(x)) * (2 if len(x) > 2 else 1),
        "divided": lambda self, x: self.c(self.a(x)) / len(x),
    }
    model = of(kinds[forward])
    tasks = [TaskBatch(*(x[t : t + 1, :n] for x in BATCH[:4])) for t, n in enumerate((2, 6, 1))]
    each = [meta_gradient_by_copies(model, F.mse_loss, task, inner_lr=ALPHA) for task in tasks]
    expected = {name: sum(grads[name] for grads in each) / 3 for name in each[0]}
    MAML(model, F.mse_loss, inner_lr=ALPHA).backward(pad(tasks))
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-10)


@pytest.mark.parametrize("vectorize", RUNS)
def test_results_that_are_not_tensors_are_named(vectorize):
    model = of(lambda self, x: {"loss": None, "logits": self.c(self.a(x)), "cache": object(), "more": {1}})
    with pytest.raises(TypeError, match=r"\[N, ...\]; got a dict that holds a set, an object\. A tuple"):
        gradient(model, vectorize)


def jagged(self, x: Tensor) -> Tensor:
    z = torch.nested.nested_tensor_from_jagged(self.a(x), offsets=torch.tensor([0, 2, len(x)]))
    return self.c((torch.tanh(z) * z).values())


@pytest.mark.parametrize("vectorize", RUNS)
def test_nested_tensors_have_first_derivatives(vectorize):
    """Their memory is measured too, which is that of the tensors within."""
    plain = of(lambda self, x: self.c(torch.tanh(self.a(x)) * self.a(x)))
    expected = meta_gradient_by_copies(plain, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA, first_order=True)
    assert_close(gradient(of(jagged), vectorize, estimator="first-order"), expected, 1e-10)
