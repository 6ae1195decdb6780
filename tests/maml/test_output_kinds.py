"""Models that return dicts, dataclasses and more, with ``None`` and numbers among their tensors."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from problems import WAYS, assert_close, labelled_batch
from slow_maml import adapt_tasks, meta_gradient_by_copies
from small_models import Of
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate, pad
from metamom.common.held import held, released

ALPHA = 0.1
RUNS = ("vmap", "auto", "loop")


@dataclass
class Output:
    logits: Tensor
    loss: Any = None
    hidden_states: Any = None
    points: int = 0


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    loss: Any = None


class Attributes(OrderedDict):
    """Items that are attributes, as those of Hugging Face's outputs."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Named(NamedTuple):
    logits: Tensor
    loss: Any


FORMS = {
    "dict": lambda z: {"logits": z, "loss": None, "scale": 2.0},
    "dataclass": lambda z: Output(z, hidden_states=(z, [z, None]), points=len(z)),
    "frozen dataclass": lambda z: Frozen(z),
    "dict of another class": lambda z: Attributes(logits=z, loss=None),
    "dict around another one": lambda z: UserDict(logits=z, loss=None),
    "named tuple": lambda z: Named(z, None),
    "namespace": lambda z: SimpleNamespace(logits=z, loss=None, hidden_states=(z, None)),
    "nested": lambda z: {"logits": z, "inner": Frozen({"z": z}), "more": (None, "text", True, z.shape, z.dtype)},
}
BATCH = labelled_batch(4, tasks=3, support=4, queries=5)


def logits_of(out: Any) -> Tensor:
    return out["logits"] if isinstance(out, (dict, UserDict)) else out.logits


def loss_of(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(out), y)


def of(form) -> nn.Module:
    torch.manual_seed(0)
    return Of(lambda self, x: form(self.c(self.a(x).tanh())), a=nn.Linear(4, 6), c=nn.Linear(6, WAYS)).double()


def gradient(model: nn.Module, vectorize: str, batch: TaskBatch, loss=loss_of) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MAML(model, loss, inner_lr=ALPHA, inner_steps=2, vectorize=vectorize).backward(batch)
    return {name: p.grad for name, p in model.named_parameters()}


class Fixed:
    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return BATCH


@pytest.mark.parametrize("vectorize", RUNS)
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_and_a_metric_get_what_the_model_returns(form, vectorize):
    model = of(FORMS[form])
    expected = meta_gradient_by_copies(model, loss_of, BATCH, steps=2, inner_lr=ALPHA)
    assert_close(gradient(model, vectorize, BATCH), expected, 1e-10)
    learner = MAML(model, loss_of, inner_lr=ALPHA, inner_steps=2, vectorize=vectorize)
    predicted = learner.predict(learner.adapt(BATCH.support_x, BATCH.support_y), BATCH.query_x)
    assert type(predicted) is type(FORMS[form](torch.zeros(1, WAYS)))
    right = []
    for task, weights in enumerate(adapt_tasks(model, loss_of, BATCH, steps=2, inner_lr=ALPHA)):
        wanted = logits_of(torch.func.functional_call(model, weights, (BATCH.query_x[task],)))
        assert_close({"logits": logits_of(predicted)[task]}, {"logits": wanted}, 1e-10)
        alone = learner.fit_predict(BATCH.support_x[task], BATCH.support_y[task], BATCH.query_x[task])
        assert_close({"logits": logits_of(alone)}, {"logits": wanted}, 1e-10)
        right.append(float((wanted.argmax(-1) == BATCH.query_y[task]).double().mean()))

    def share(out: Any, y: Tensor) -> float:
        return float((logits_of(out).argmax(-1) == y).double().mean())

    found = evaluate(learner, Fixed(), tasks=3, steps=(2,), metric=share)
    assert list(found.values[0]) == pytest.approx(right)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_padded_tasks(form, vectorize):
    model = of(FORMS[form])
    tasks = [TaskBatch(*(x[t : t + 1, :n] for x in BATCH[:4])) for t, n in enumerate((2, 4, 3))]
    each = [meta_gradient_by_copies(model, loss_of, task, steps=2, inner_lr=ALPHA) for task in tasks]
    expected = {name: sum(grads[name] for grads in each) / 3 for name in each[0]}
    assert_close(gradient(model, vectorize, pad(tasks)), expected, 1e-10)


@pytest.mark.filterwarnings("ignore:Of itself cannot run on all tasks at once")
def test_numbers_that_differ_between_tasks_reach_the_loss_as_tensors():
    model = of(lambda z: {"logits": z, "scale": 1 + z.detach().abs().sum().item(), "points": len(z)})

    def scaled(out: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"] / out["scale"] * out["points"], y)

    expected = meta_gradient_by_copies(model, scaled, BATCH, steps=2, inner_lr=ALPHA)
    MAML(model, scaled, inner_lr=ALPHA, inner_steps=2).backward(BATCH)
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-10)


def test_the_accuracy_of_the_only_tensor():
    found = [evaluate(MAML(of(FORMS["dict"]), loss_of, inner_lr=ALPHA), Fixed(), tasks=3, steps=(1,))]
    model = of(lambda z: z)
    found.append(evaluate(MAML(model, F.cross_entropy, inner_lr=ALPHA), Fixed(), tasks=3, steps=(1,)))
    assert list(found[0].values[0]) == list(found[1].values[0])
    assert found[0].metric == found[1].metric == "accuracy"


@pytest.mark.parametrize("form", FORMS)
def test_held_outputs_are_released_as_they_were(form):
    out = FORMS[form](torch.arange(6.0).view(2, 3))
    assert str(released(held(out))) == str(out)
    assert str(released(held(held(copy.copy(out))))) == str(out)


@pytest.mark.parametrize("out", [None, {"loss": None}, {}, 2.0])
def test_outputs_without_a_tensor_are_errors(out):
    with pytest.raises(TypeError, match="Of must return a tensor of predictions"):
        gradient(of(lambda z: out), "auto", BATCH)


class Tokens(nn.Module):
    """A classifier of tokens that computes its loss if it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, WAYS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        kept = attention_mask.unsqueeze(-1).double()
        logits = self.head((self.words(input_ids).tanh() * kept).sum(1) / kept.sum(1))
        return Output(logits, None if labels is None else F.cross_entropy(logits, labels))


@pytest.mark.parametrize("vectorize", RUNS)
def test_labels_among_the_inputs(vectorize):
    torch.manual_seed(0)
    model, ids = Tokens().double(), torch.arange(60).remainder(5).view(3, 5, 4) + 1
    given = {"input_ids": ids, "attention_mask": (ids > 1).long(), "labels": BATCH.query_y}
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    found = [
        gradient(model, vectorize, TaskBatch(given, None, given, None), lambda out: out.loss),
    ]
    model.zero_grad()
    found.append(gradient(model, vectorize, TaskBatch(inputs, BATCH.query_y, inputs, BATCH.query_y)))
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for task in range(3):
        start = dict(model.named_parameters())
        weights = start
        own = {name: x[task] for name, x in given.items()}
        for _ in range(2):
            loss = torch.func.functional_call(model, weights, (), own).loss
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - ALPHA * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        loss = torch.func.functional_call(model, weights, (), own).loss
        for name, grad in zip(start, torch.autograd.grad(loss, list(start.values())), strict=True):
            expected[name] += grad / 3
    for each in found:
        assert_close(each, expected, 1e-10)
