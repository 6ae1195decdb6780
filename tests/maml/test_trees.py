"""Inputs, targets and outputs that are not one tensor, but dicts, tuples and lists: as a plain loop uses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from problems import assert_close, generator, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate, train
from metamom.batch import block, drawn
from metamom.common.trees import leaves, lone, mapped
from metamom.maml.checks.batch_checks import NonFiniteDataError
from metamom.maml.running.run_by_task import call
from metamom.tasks import PerWorker

T, S, Q, L, WORDS, WAYS = 4, 6, 3, 5, 11, 3
TOLERANCE = 1e-12
Params = dict[str, Tensor]


class ModelOutput(OrderedDict):
    """As in Hugging Face's transformers: a dict with attributes, registered as a tree."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


pytree.register_pytree_node(
    ModelOutput,
    lambda out: (list(out.values()), list(out)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
    serialized_type_name="test_trees.ModelOutput",
)


class Classifier(nn.Module):
    """The interface of a sequence classifier of transformers."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda logits: ModelOutput(logits=logits)) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, WAYS)
        self.output = output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        h = self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        kept = attention_mask.unsqueeze(-1).to(h.dtype)
        return self.output(self.head((h * kept).sum(1) / kept.sum(1)))


class Pair(nn.Module):
    """Two inputs, of which the second holds one number for each task or one for each point."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)) * scale)


class OneDict(nn.Module):
    """A model that takes a dict as its only argument, and returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        out = self.pair(inputs["x"], inputs["more"][0])
        return out, out.square()


def of_logits(out: ModelOutput, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.logits, labels)


def of_two(out: tuple[Tensor, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    return (y["weight"] * (out[0] - y["values"]) ** 2).mean() + out[1].mean()


def text(points: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    g = generator(seed)
    ids = torch.randint(WORDS, (T, points, L), generator=g)
    lengths = torch.randint(1, L + 1, (T, points, 1), generator=g)
    labels = torch.arange(points).remainder(WAYS).expand(T, points).contiguous()
    return {"input_ids": ids, "attention_mask": (torch.arange(L) < lengths).long()}, labels


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def text_batch() -> TaskBatch:
    return TaskBatch(*text(S, 1), *text(Q, 2), torch.arange(T))


def pair(points: int, seed: int, *, per_task: bool = False) -> tuple[Tensor, Tensor]:
    return numbers(T, points, 2, seed=seed), numbers(T, *([] if per_task else [points]), 4, seed=seed + 1)


def nested(points: int, seed: int) -> tuple[tuple[dict[str, Any]], dict[str, Tensor]]:
    x, scale = pair(points, seed)
    y = {"values": numbers(T, points, 1, seed=seed + 2), "weight": numbers(T, points, 1, seed=seed + 3).exp()}
    return ({"x": x, "more": [scale]},), y


Case = tuple[nn.Module, Callable[..., Tensor], TaskBatch]
CASES: dict[str, Callable[[], Case]] = {
    "a dict": lambda: (Classifier(), of_logits, text_batch()),
    "a dict, one tensor out": lambda: (Classifier(lambda out: out), F.cross_entropy, text_batch()),
    "a tuple": lambda: (Pair(), F.mse_loss, TaskBatch(pair(S, 1), numbers(T, S, 1, seed=3),
                                                     pair(Q, 4), numbers(T, Q, 1, seed=6), torch.arange(T))),
    "a list": lambda: (Pair(), F.mse_loss, TaskBatch([*pair(S, 1)], numbers(T, S, 1, seed=3),
                                                    [*pair(Q, 4)], numbers(T, Q, 1, seed=6), torch.arange(T))),
    "a dict in a tuple": lambda: (OneDict(), of_two, TaskBatch(*nested(S, 1), *nested(Q, 5), torch.arange(T))),
    "no labels": lambda: (
        nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), lambda out: out.square().mean() + out.sum().cos(),
        TaskBatch(numbers(T, S, 2, seed=1), None, numbers(T, Q, 2, seed=2), None, torch.arange(T)),
    ),
}  # fmt: skip


def made(name: str) -> Case:
    model, loss_fn, batch = CASES[name]()
    return randomised(model.double()), loss_fn, batch


def task_of(batch: TaskBatch, t: int) -> TaskBatch:
    return TaskBatch(*(mapped(lambda x: x[t], field) for field in batch[:4]))


def task_loss(
    model: nn.Module, loss_fn: Callable[..., Tensor], task: TaskBatch, weights: Params, steps: int, lr: float,
    create_graph: bool = True,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The query loss and output after inner steps on the support set."""

    def loss(weights: Params, x: Any, y: Any) -> tuple[Tensor, Any]:
        names = {f"0.{name}": w for name, w in weights.items()}
        out = torch.func.functional_call(_Called(model), names, (x,))
        return (loss_fn(out) if y is None else loss_fn(out, y)), out

    own = weights
    for _ in range(steps):
        value, _ = loss(own, task.support_x, task.support_y)
        grads = torch.autograd.grad(value, [*own.values()], create_graph=create_graph)
        own = {name: w - lr * g for (name, w), g in zip(own.items(), grads, strict=True)}
    return loss(own, task.query_x, task.query_y)


class _Called(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return call(self[0], x)


def loop_gradient(case: Case, steps: int, lr: float, first_order: bool = False) -> tuple[Params, Tensor]:
    model, loss_fn, batch = case
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        values = torch.stack([
            task_loss(model, loss_fn, task_of(batch, t), weights, steps, lr, not first_order)[0]
            for t in range(batch.num_tasks)
        ])  # fmt: skip
    grads = torch.autograd.grad(values.mean(), [*weights.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(weights, grads, strict=True)), values.detach()


@pytest.mark.parametrize("options", [{}, {"vectorize": "vmap"}, {"vectorize": "loop"}, {"chunk_size": 3},
                                     {"estimator": "first-order"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", CASES)
def test_backward_is_that_of_a_loop(name, options):
    case = made(name)
    model, loss_fn, batch = case
    first_order = options.get("estimator") == "first-order"
    expected, values = loop_gradient(case, 2, 0.1, first_order)
    learner = MAML(model, loss_fn, inner_lr=0.1, inner_steps=2, **options)
    found = learner.backward(batch, workers=2)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, TOLERANCE)
    torch.testing.assert_close(found.loss, values.mean(), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(learner.losses(batch).detach(), values, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("estimator", ["independent", "cross-fit", "richardson", "moml", "scsc", "hessian-free"])
@pytest.mark.parametrize("name", CASES)
def test_estimators_split_every_tensor(name, estimator):
    """As a batch of one tensor does, which the model takes apart."""
    model, loss_fn, batch = made(name)
    flat, apart = as_one_tensor(model, loss_fn, batch)
    ours = MAML(model, loss_fn, inner_lr=0.1, estimator=estimator)
    theirs = MAML(apart, apart.loss, inner_lr=0.1, estimator=estimator)
    for _ in range(2):
        a, b = ours.meta_gradient(batch), theirs.meta_gradient(flat)
        for (n, x), y in zip(a.grads.items(), b.grads.values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9, msg=n)
        torch.testing.assert_close(a.losses, b.losses, rtol=1e-10, atol=1e-10)


def as_one_tensor(model: nn.Module, loss_fn: Callable[..., Tensor], batch: TaskBatch) -> tuple[TaskBatch, Any]:
    """The same batch with each field's tensors side by side in one, and the model and loss that take them apart."""

    def packed(tree: Any) -> Tensor:
        parts = [x.double().reshape(*x.shape[:2], -1) for x in leaves(tree)]
        return torch.cat(parts, -1) if parts else batch.support_x[..., :1] * 0

    def unpacked(flat: Tensor, like: Any) -> Any:
        kept = iter(flat.split([x[0, 0].numel() for x in leaves(like)], -1))
        return mapped(lambda x: next(kept).reshape(-1, *x.shape[2:]).to(x.dtype), like)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return call(self.inner, unpacked(x, batch.support_x))

        @staticmethod
        def loss(out: Any, y: Tensor) -> Tensor:
            return loss_fn(out) if batch.support_y is None else loss_fn(out, unpacked(y, batch.support_y))

    y = batch.support_y is None
    fields = [packed(batch.support_x), packed(batch.support_y), packed(batch.query_x)]
    query_y = batch.query_x[..., :1] * 0 if y else packed(batch.query_y)
    return TaskBatch(*fields, query_y, batch.task_ids), Apart()


@pytest.mark.parametrize("name", CASES)
def test_evaluate_trains_and_predicts(name):
    model, loss_fn, batch = made(name)
    learner = MAML(model, loss_fn, inner_lr=0.1)

    class Tasks:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            mine = block(num_tasks, rank, world_size)
            return batch.part(mine.start, mine.stop)

    found = evaluate(learner, Tasks(), tasks=T, steps=(0, 1))
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.eval().named_parameters()}
    for steps in (0, 1):
        for t in range(T):
            value, out = task_loss(model, loss_fn, task_of(batch, t), weights, steps, 0.1)
            if found.metric == "accuracy":
                value = (lone(out).argmax(1) == batch.query_y[t]).double().mean()
            torch.testing.assert_close(found.values[steps, t], value.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    assert (found.metric == "accuracy") == name.startswith("a dict") * ("tuple" not in name)
    before = float(learner.backward(batch).loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05, beta=1.0)
    metrics = train(learner, optimizer, Tasks(), iterations=5, meta_batch=T, workers=2, bias="topk:50%").metrics
    assert metrics[-1]["loss"] < before
    assert (metrics[-1]["accuracy"] is None) == (found.metric == "loss")


def test_a_tensor_of_each_task():
    """Only an estimator that splits the support set has to know which axis holds the points."""
    x, scale = pair(S, 1, per_task=True)
    query = pair(Q, 4, per_task=True)
    batch = TaskBatch((x, scale), numbers(T, S, 1, seed=3), query, numbers(T, Q, 1, seed=6))
    case = randomised(Pair().double()), F.mse_loss, batch
    expected, _ = loop_gradient(case, 1, 0.1)
    MAML(*case[:2], inner_lr=0.1).backward(batch)
    assert_close({n: p.grad for n, p in case[0].named_parameters()}, expected, TOLERANCE)
    with pytest.raises(ValueError, match=r"every tensor in it must hold points.*support_x\[1\] \[4, 4\]"):
        MAML(*case[:2], estimator="independent").backward(batch)


def test_workers_chunks_and_learned_step_sizes():
    model, loss_fn, batch = made("a dict")
    whole = MAML(model, loss_fn, inner_lr=0.1, learn_inner_lr="tensor", chunk_size=None)
    expected = whole.meta_gradient(batch, workers=4).grads
    for size in (1, 3, "auto"):
        other = MAML(model, loss_fn, inner_lr=0.1, learn_inner_lr="tensor", chunk_size=size)
        found = other.meta_gradient(batch, workers=4).grads
        assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("compiled", ["as traced", pytest.param("by TorchInductor", marks=pytest.mark.slow)])
def test_compiled(compiled, request):
    if compiled == "as traced":
        request.getfixturevalue("traced")
    model, loss_fn, batch = made("a dict in a tuple")
    expected = MAML(model, loss_fn, inner_lr=0.1).meta_gradient(batch, workers=2)
    learner = MAML(model, loss_fn, inner_lr=0.1, compile=True)
    for _ in range(2):
        found = learner.meta_gradient(batch, workers=2)
        assert_close(found.grads, expected.grads, 1e-9)
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-9, atol=1e-9)


def test_draws_do_not_depend_on_chunks():
    model, loss_fn, batch = made("a dict")
    model.encoder.dropout.p = 0.5
    found = []
    for size, vectorize in ((None, "vmap"), (1, "vmap"), (3, "loop")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            learner = MAML(model, loss_fn, chunk_size=size, vectorize=vectorize)
            found.append(learner.meta_gradient(batch, workers=4).grads)
    for other in found[1:]:
        assert_close(other, found[0], TOLERANCE)


def test_inference_tensors_become_ordinary_ones():
    model, loss_fn, batch = made("a dict")
    with torch.inference_mode():
        made_inside = TaskBatch(*(mapped(Tensor.clone, field) for field in batch))
        learner = MAML(model, loss_fn)
        learner.backward(made_inside)
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_returns_the_dtype_of_the_weights():
    model = Classifier().float()
    batch = text_batch()
    learner = MAML(model, of_logits, autocast=torch.bfloat16)
    out = learner.predict(learner.adapt(batch.support_x, batch.support_y), batch.query_x)
    assert out.logits.dtype == torch.float32


def test_the_batch_moves_and_divides():
    batch = text_batch()
    assert batch.num_tasks == T
    halves = batch.split(2)
    assert [half.num_tasks for half in halves] == [2, 2]
    assert torch.equal(halves[1].support_x["input_ids"], batch.support_x["input_ids"][2:])
    assert torch.equal(halves[1].task_ids, torch.tensor([2, 3]))
    moved = TaskBatch(*nested(S, 1), *nested(Q, 5)).to("cpu", torch.float32)
    assert {x.dtype for field in moved[:4] for x in leaves(field)} == {torch.float32}
    assert text_batch().to(dtype=torch.float64).support_x["input_ids"].dtype == torch.int64
    none = batch._replace(support_y=None, query_y=None)
    assert none.to("cpu").part(0, 1).support_y is None


def test_samplers_of_trees():
    class Tasks:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            mine = block(num_tasks, rank, world_size)
            return text_batch().part(mine.start, mine.stop)

    found = PerWorker([Tasks(), Tasks()]).sample(0, 4)
    assert torch.equal(found.support_x["input_ids"], IDS)
    assert drawn(Tasks(), 0, 2).num_tasks == 2


def changed(field: str, value: Any) -> TaskBatch:
    return text_batch()._replace(**{field: value})


IDS = text_batch().support_x["input_ids"]
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "other tasks in one tensor": (
        lambda: changed("support_x", {"input_ids": IDS, "attention_mask": IDS[:2]}),
        ValueError, r"all tensors of support_x must hold the same tasks.*support_x\['attention_mask'\] \[2, 6, 5\]",
    ),
    "labels of other tasks": (
        lambda: changed("support_y", {"a": text_batch().support_y[:2]}), ValueError, "got 4 and 2 tasks",
    ),
    "a list of numbers": (lambda: changed("support_x", [1.0, 2.0]), TypeError, "a list of 2 items. Convert it"),
    "an entry that is none": (
        lambda: changed("support_x", {"input_ids": IDS, "attention_mask": None}),
        TypeError, r"support_x\['attention_mask'\] must be a tensor \[T, ...\]; got None. Leave out",
    ),
    "no inputs": (lambda: changed("support_x", None), TypeError, "support_x must be a tensor.*got None"),
    "no points": (
        lambda: changed("support_x", mapped(lambda x: x[:, :0], text_batch().support_x)),
        ValueError, r"at least one point per task.*support_x\['input_ids'\]",
    ),
    "a name that the model does not take": (
        lambda: changed("support_x", {"input_ids": IDS, "token_type_ids": IDS}),
        ValueError, r"unexpected keyword argument 'token_type_ids'.*is passed as model\(\*\*x\).*wrap it: \(x,\)",
    ),
    "a tuple with too many": (
        lambda: changed("support_x", (IDS, IDS, IDS)), ValueError, r"positional arguments.*a tuple or a list as model",
    ),
    "words that there are not": (
        lambda: changed("support_x", {"input_ids": IDS + 9, "attention_mask": IDS}),
        ValueError, r"\{'input_ids': \[6, 5\] of torch.int64.*for each task",
    ),
    "no targets for a loss that needs them": (
        lambda: changed("support_y", None), TypeError, "the batch has no targets, so loss_fn is called with the pred",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name):
    batch, error, said = MISTAKES[name]
    learner = MAML(Classifier(), of_logits)
    with pytest.raises(error, match=said):
        learner.backward(batch())
    assert all(p.grad is None for p in learner.parameters())


def test_data_that_is_not_finite_is_named():
    model, loss_fn, batch = made("a dict in a tuple")
    batch.query_x[0]["more"][0][2, 0, 0] = torch.nan
    with pytest.raises(NonFiniteDataError, match=r"query_x\[0\]\['more'\]\[0\] holds 1 of .*, first in task 2"):
        MAML(model, loss_fn).backward(batch)
