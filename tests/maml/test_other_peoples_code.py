"""Models and losses written as other people write them, against a plain loop over tasks."""

from __future__ import annotations

import pytest
import torch
from as_in_a_loop import Given
from problems import assert_close, regression_batch
from slow_maml import adapt_by_copies, called_with, slow_meta_gradient, weights_of
from small_models import Of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metamom import MAML, TaskBatch, evaluate

ALPHA = 0.1
BATCH = regression_batch(1, tasks=3, support=6, query=6, dim=4)


def of(forward, **modules) -> nn.Module:
    torch.manual_seed(0)
    return Of(forward, a=nn.Linear(4, 6), c=nn.Linear(6, 1), **modules).double()


class Packed(nn.Module):
    """A recurrent model of sequences of their own lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, counts = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out.sum(1) / counts[:, None])


def sequences(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Sets of which no two have as many tokens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 5, 3, generator=g, dtype=torch.float64)
    lengths = torch.tensor([[5, 2, 3, 1], [5, 5, 4, 2], [1, 5, 1, 1]]).roll(seed, 0)
    return {"x": x, "lengths": lengths}, torch.randn(3, 4, 1, generator=g, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_packed_sequences_are_adapted_and_predicted_without_gradients():
    """vmap packs all tasks, and then fails on their shapes by an error that says nothing of vmap."""
    torch.manual_seed(0)
    model, batch = Packed().double(), TaskBatch(*sequences(0), *sequences(1))
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"\(stack expects each tensor.*\), so .* task by task"):
        found = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
    weights = dict(model.named_parameters())
    for t in range(3):
        x, query = ({key: value[t] for key, value in each.items()} for each in (batch.support_x, batch.query_x))
        loss = F.mse_loss(model(**x), batch.support_y[t])
        steps = zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True)
        expected = functional_call(model, {name: w - ALPHA * g for (name, w), g in steps}, (), query)
        torch.testing.assert_close(found[t], expected.detach(), rtol=1e-10, atol=1e-12)


def attribute(self, x: Tensor) -> Tensor:
    for p in self.b.parameters():
        p.requires_grad = False
    h = self.b(self.a(x))
    for p in self.b.parameters():
        p.requires_grad = True
    return self.c(h)


def method(self, x: Tensor) -> Tensor:
    self.b.requires_grad_(False)
    h = self.b(self.a(x))
    self.b.requires_grad_(True)
    return self.c(h)


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("forward", [attribute, method])
def test_a_forward_that_freezes_weights_is_refused(forward, vectorize):
    """vmap would ignore it, and the gradient would be another one."""
    model = of(forward, b=nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"sets requires_grad of b\.weight.*weight\.detach\(\)"):
        MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize=vectorize).backward(BATCH)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_weights_that_are_frozen_already_may_be_frozen_again():
    model = of(method, b=nn.Linear(6, 6))
    model.forward = lambda x: model.c(model.b.requires_grad_(False)(model.a(x)))
    model.b.requires_grad_(False)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="loop")
    learner.backward(BATCH)
    expected = MAML(of(lambda self, x: self.c(self.b(self.a(x))), b=nn.Linear(6, 6)), F.mse_loss, inner_lr=ALPHA)
    expected.model.b.requires_grad_(False)
    expected.backward(BATCH)
    torch.testing.assert_close(model.a.weight.grad, expected.model.a.weight.grad, rtol=1e-10, atol=1e-12)


def penalised(predictions: Tensor, y: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(predictions.exp().sum(), predictions, create_graph=True)
    return F.mse_loss(predictions, y) + 0.1 * slope.square().mean()


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.filterwarnings("ignore:loss_fn cannot run on all tasks at once")
def test_a_loss_that_differentiates_can_be_evaluated(vectorize):
    model = of(lambda self, x: self.c(torch.tanh(self.a(x))))
    learner = MAML(model, penalised, inner_lr=ALPHA, vectorize=vectorize)
    found = evaluate(learner, Given(BATCH), tasks=3, steps=(0, 1), metric="loss")
    for t, (x, y, query_x, query_y) in enumerate(zip(*BATCH[:4], strict=True)):
        for steps in (0, 1):
            own = adapt_by_copies(model, penalised, weights_of(model), x, y, steps=steps, inner_lr=ALPHA)
            expected = penalised(called_with(model, own, query_x), query_y).detach()
            torch.testing.assert_close(found.values[steps, t], expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(learner.losses(BATCH), found.values[1], rtol=1e-10, atol=1e-12)


class Recurrent(nn.Module):
    """A recurrent body that trains, and a head that adapts."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = layer(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0])


@pytest.mark.filterwarnings("ignore:module 'body'")
@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_the_head_of_a_recurrent_body_adapts(layer, vectorize):
    """All tasks share the body's weights; a recurrent layer used its own ones from the second task on."""
    torch.manual_seed(0)
    model = Recurrent(layer).double()
    adapted = ["head.weight", "head.bias"]
    expected, losses = slow_meta_gradient(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA, adapted=adapted)
    references = list(model.body._flat_weight_refs)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, adapt=["head"], vectorize=vectorize)
    for _ in range(2):
        found = learner.meta_gradient(BATCH)
        torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-12)
        assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-10)
    assert all(a is b for a, b in zip(references, model.body._flat_weight_refs, strict=True))


class Tied(nn.Module):
    """A head whose weight is the body's too, and stands there first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight, self.last = self.body.weight, nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(torch.tanh(self.body(x))))


@pytest.mark.parametrize("adapt", [["head", "last.bias"], ["head.weight", "last.bias"], ["body.weight", "last.bias"]])
def test_a_tied_weight_adapts_by_any_of_its_names(adapt):
    torch.manual_seed(0)
    model, adapted = Tied().double(), ["body.weight", "last.bias"]
    expected, losses = slow_meta_gradient(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA, adapted=adapted)
    found = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, adapt=adapt).meta_gradient(BATCH)
    torch.testing.assert_close(found.losses, losses, rtol=1e-10, atol=1e-12)
    assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, 1e-10)
