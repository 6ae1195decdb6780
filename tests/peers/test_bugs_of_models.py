"""Public reports about models that could not be meta-learned: here they train as in a plain loop over tasks.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch
from as_in_a_loop import check
from model_zoo import Problem
from problems import regression_batch
from small_models import Of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metamom import MAML, CompositeMomentum, TaskBatch

WORDS = 7
TASK_BY_TASK = pytest.mark.filterwarnings("ignore:.*cannot run on all tasks at once:UserWarning")
SLOWLY = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap goes through a loop


def sentences(padding: int | None = None) -> TaskBatch:
    """Two tasks with a value for each sentence of three words, of which the last one is ``padding``."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for points in (4, 3):
        words = torch.randint(0, WORDS, (2, points, 3), generator=generator)
        if padding is not None:
            words[..., -1] = padding
        sets += [words, torch.randn(2, points, 1, generator=generator, dtype=torch.float64)]
    return TaskBatch(*sets)


class Recurrent(nn.Module):
    """Layers upon each other and a linear head, as in the report."""

    def __init__(self, kind: type[nn.RNNBase], **options: int | bool) -> None:
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@TASK_BY_TASK
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_the_adapted_weights(kind):
    """learn2learn 139, higher 27: an LSTM read the weights that it was made with; pytorch 134606: vmap of a GRU."""
    torch.manual_seed(0)
    model = Recurrent(kind, num_layers=2, bidirectional=kind is nn.GRU).double()
    check(Problem(model, F.mse_loss, regression_batch(tasks=2, support=4, dim=(5, 3))))


class Transformer(nn.Module):
    """Words, an attention layer that may be checkpointed, and a head, as in the report."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 1)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        z = self.words(x)
        z = checkpoint(self.layer, z, use_reentrant=False) if self.checkpointed else self.layer(z)
        return self.head(z.mean(1))


@TASK_BY_TASK
def test_a_checkpointed_transformer():
    """pytorch 165880, 122729: function transforms refuse saved tensor hooks, which `checkpoint` needs."""
    torch.manual_seed(0)
    model, batch = Transformer(checkpointed=False).double(), sentences()
    plain = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch)
    model.checkpointed = True
    found = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch)
    for name, grad in plain.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-9, atol=1e-12)
    check(Problem(Transformer(checkpointed=False).double(), F.mse_loss, batch))  # pytorch 102457: attention, batched


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(WORDS, 4, mode="sum")
        self.over, self.dense = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(torch.relu(self.over(self.bags(x))))


def test_bags_of_embeddings_for_each_task():
    """pytorch 86819: no batching rule for the bags of a recommendation model.

    A bag is the sum of its words, so a model of plain embeddings has the same second-order gradient.
    """
    torch.manual_seed(0)
    model, batch = Bags().double(), sentences()
    twin = Of(
        lambda self, x: self.dense(torch.relu(self.over(self.bags(x).sum(1)))),
        bags=nn.Embedding(WORDS, 4), over=nn.Linear(4, 4), dense=nn.Linear(4, 1),
    ).double()  # fmt: skip
    twin.load_state_dict(model.state_dict())
    found, wanted = (MAML(each, F.mse_loss, inner_lr=0.1).meta_gradient(batch) for each in (model, twin))
    for name, grad in wanted.grads.items():
        torch.testing.assert_close(found.grads[name], grad, rtol=1e-9, atol=1e-12)
    check(Problem(twin, F.mse_loss, batch))


class Shared(nn.Module):
    """A bias in two modules, a layer and a buffer under two names, as in the report."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3))
        self.linear = nn.Linear(3, 3)
        self.linear.bias = self.bias
        self.linear_cloned = self.linear
        self.register_buffer("buffer", torch.randn(3))
        self.register_buffer("buffer_cloned", self.buffer)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.linear(x) + self.buffer)
        return (self.linear_cloned(z) * self.bias + self.buffer_cloned).sum(1, keepdim=True)


def test_a_parameter_and_a_buffer_under_two_names():
    """functorch 446, pytorch 86708, 164759: a tied weight was refused, or only one of its names got the new value."""
    torch.manual_seed(0)
    model = Shared().double()
    check(Problem(model, F.mse_loss, regression_batch(tasks=2, support=4, dim=3)), inner_lr=0.005)
    assert sorted(MAML(model, F.mse_loss).meta_parameters()) == ["bias", "linear.weight"]


def test_parts_of_a_model_that_are_registered_again():
    """learn2learn 174: ten parameters became twenty, and the copies did not adapt together."""
    torch.manual_seed(0)
    body = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(2, 2), nn.Tanh())))
    head = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    model = Of(lambda self, x: self.net(x), body=body, head=head, net=nn.Sequential(body, head)).double()
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    batch = regression_batch(tasks=2)
    assert len(names) == 10
    assert list(learner.meta_parameters()) == names
    assert list(learner.adapt(batch.support_x, batch.support_y)) == names
    assert len(list(learner.parameters())) == 10
    check(Problem(model, F.mse_loss, batch))


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
def test_the_row_of_the_padding_stays(estimator):
    """pytorch 26302: padding got a gradient, 505 in each entry; wanted 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(WORDS, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 1)).double()
    batch = sentences(padding=2)
    learner = MAML(model, F.mse_loss, inner_lr=0.5, inner_steps=2, estimator=estimator)
    adapted = learner.adapt(batch.support_x, batch.support_y)["0.weight"]
    assert not adapted[:, 2].any()
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=0.5)
    for _ in range(2):
        learner.backward(batch)
        optimizer.step()
    grad = model[0].weight.grad
    assert grad is not None
    assert grad.any()
    assert not grad[2].any()
    assert not model[0].weight[2].any()


def test_parameters_that_a_task_does_not_use():
    """learn2learn 314: "gradients referenced before assignment", unless ``allow_unused`` was found."""
    torch.manual_seed(0)
    model = Of(lambda self, x: self.used(x), used=nn.Linear(2, 1), pooler=nn.Linear(3, 3)).double()
    model.pooler.bias.requires_grad_(False)
    batch = regression_batch()
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    adapted = learner.adapt(batch.support_x, batch.support_y)
    assert torch.equal(adapted["pooler.weight"], model.pooler.weight.expand(batch.num_tasks, 3, 3))
    learner.backward(batch)
    assert model.used.weight.grad is not None
    assert model.used.weight.grad.any()
    assert model.pooler.weight.grad is None or not model.pooler.weight.grad.any()
    assert model.pooler.bias.grad is None


def test_a_model_without_meta_parameters_says_so():
    """torchopt 144: "not enough values to unpack" for a model whose parameters are all frozen."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).requires_grad_(False).eval()
    with pytest.raises(ValueError, match="trainable parameters"):
        MAML(model, F.mse_loss)


def test_frozen_normalisation_in_a_model_that_trains():
    """torchopt 144, what its author wanted: layers in ``eval()`` take part with their statistics, which stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    model[1].running_mean.fill_(0.5)
    model.eval()
    check(Problem(model, F.mse_loss, regression_batch()))
    assert model[1].running_mean.tolist() == [0.5] * 3


@SLOWLY
@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_in_an_inner_loop(old):
    """higher 14: a normalised weight raised an error in the inner loop. It is made of the adapted parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    if old:
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model[0])
    else:
        nn.utils.parametrizations.weight_norm(model[0])
    learner, batch = MAML(model, F.mse_loss, inner_lr=0.1), regression_batch()
    g, v = ("0.weight_g", "0.weight_v") if old else (f"0.parametrizations.weight.original{i}" for i in (0, 1))
    adapted = learner.adapt(batch.support_x, batch.support_y)
    predictions = learner.predict(adapted, batch.query_x)
    for t in range(batch.num_tasks):
        direction = adapted[v][t] / adapted[v][t].norm(dim=1, keepdim=True)
        hidden = torch.tanh(F.linear(batch.query_x[t], adapted[g][t] * direction, adapted["0.bias"][t]))
        wanted = F.linear(hidden, adapted["2.weight"][t], adapted["2.bias"][t])
        torch.testing.assert_close(predictions[t], wanted)


class FrozenEncoder(nn.Module):
    """An LSTM, or a cell of one in a loop, whose parameters are frozen, and a head that adapts, as in the report."""

    def __init__(self, cell: bool) -> None:
        super().__init__()
        self.lstm: nn.Module = nn.LSTMCell(3, 4) if cell else nn.LSTM(3, 4, batch_first=True)
        self.lstm.requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        if not self.cell:
            return self.head(self.lstm(x)[0][:, -1])
        state = None
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
        return self.head(state[0])


@TASK_BY_TASK
@pytest.mark.parametrize("cell", [False, True])
def test_a_frozen_lstm_beneath_a_head(cell):
    """learn2learn 218: "gradients referenced before assignment" if the LSTM was frozen, and with a cell."""
    torch.manual_seed(0)
    model = FrozenEncoder(cell).double()
    assert list(MAML(model, F.mse_loss).meta_parameters()) == ["head.weight", "head.bias"]
    check(Problem(model, F.mse_loss, regression_batch(tasks=2, support=4, dim=(5, 3))))


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_a_compiled_part_of_a_model(vectorize):
    """pytorch 128711: `vmap` could not call a compiled function, if it had to be one graph."""
    torch.manual_seed(0)
    activation = torch.compile(lambda z: z.sin() * z, backend="aot_eager", fullgraph=True)
    layer = torch.compile(nn.Linear(3, 3), backend="aot_eager", fullgraph=True)
    parts = {"inner": nn.Linear(2, 3), "outer": nn.Linear(3, 1)}
    model = Of(lambda self, x: self.outer(layer(activation(self.inner(x)))), layer=layer, **parts).double()
    twin = Of(
        lambda self, x: self.outer(self.layer(self.inner(x).sin() * self.inner(x))), layer=layer._orig_mod, **parts
    )
    batch = regression_batch(tasks=2)
    found = MAML(model, F.mse_loss, inner_lr=0.1, vectorize=vectorize).meta_gradient(batch).grads
    wanted = MAML(twin, F.mse_loss, inner_lr=0.1, vectorize="loop").meta_gradient(batch).grads
    for grad, other in zip(wanted.values(), found.values(), strict=True):
        torch.testing.assert_close(other, grad, rtol=1e-9, atol=1e-12)
