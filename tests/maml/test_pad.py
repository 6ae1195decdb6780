"""Tasks of different sizes: what a padded batch gives is what a loop over the original tasks gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_close, generator, randomised, regression_batch
from small_models import Of
from test_trees import Classifier, Params, of_logits, task_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML, CompositeMomentum, DivergedError, TaskBatch, evaluate, pad, train
from metamom.batch import block
from metamom.common.choices import NORMS
from metamom.common.trees import lone
from metamom.distributed import start
from metamom.maml.checks.batch_checks import NonFiniteDataError

SIZES = ((3, 2), (6, 5), (1, 4), (4, 1))
WAYS, FEATURES = 3, 2
TOLERANCE = 1e-12


def task(shots: int, queries: int, seed: int, *, labels: bool = True) -> tuple[Tensor, ...]:
    g = generator(seed)

    def points(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, FEATURES, generator=g, dtype=torch.float64)
        y = torch.randint(WAYS, (n,), generator=g) if labels else torch.randn(n, WAYS, generator=g).double()
        return x, y

    return (*points(shots), *points(queries))


def tasks(sizes: Any = SIZES, *, labels: bool = True) -> list[tuple[Tensor, ...]]:
    return [task(*size, seed, labels=labels) for seed, size in enumerate(sizes)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, WAYS))


class Centred(nn.Module):
    """A model whose prediction for a point depends on the others, in a way that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x - x.mean(0))


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, WAYS)
    )


MODELS = {"mlp": mlp, "batch norm": normalised, "centred": Centred}


def weighted_by_mask(p: Tensor, y: Tensor, *, power: float = 1.5, mask: Tensor | None = None) -> Tensor:
    each = (p - y).abs().pow(power).mean(1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum()


def smoothed(p: Tensor, y: Tensor, *, smoothing: float = 0.1) -> Tensor:
    return F.cross_entropy(p, y, label_smoothing=smoothing)


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
LOSSES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "cross_entropy": (F.cross_entropy, True),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), True),
    "weights and smoothing": (partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2), True),
    "an ignored label": (nn.CrossEntropyLoss(ignore_index=1, reduction="sum"), True),
    "a keyword of its own": (smoothed, True),
    "partial": (partial(smoothed, smoothing=0.3), True),
    "mse_loss": (F.mse_loss, False),
    "a sum": (nn.MSELoss(reduction="sum"), False),
    "by all points": (lambda p, y: (p - y).square().mean(1).max() + p.sum(0).exp().sum().log(), False),
    "mask": (weighted_by_mask, False),
}


def loop_gradient(
    model: nn.Module, loss_fn: Callable[..., Tensor], ragged: list[tuple[Tensor, ...]], steps: int, lr: float
) -> tuple[Params, Tensor]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        values = torch.stack([task_loss(model, loss_fn, TaskBatch(*each), weights, steps, lr)[0] for each in ragged])
    grads = torch.autograd.grad(values.mean(), [*weights.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(weights, grads, strict=True)), values.detach()


def agrees(model: nn.Module, loss_fn: Callable[..., Tensor], ragged: list[Any], steps: int = 2, **options: Any) -> MAML:
    expected, values = loop_gradient(model, loss_fn, ragged, steps, 0.1)
    learner = MAML(model, loss_fn, inner_lr=0.1, inner_steps=steps, **options)
    learner.zero_grad()
    batch = pad(ragged)
    found = learner.backward(batch)
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected, TOLERANCE)
    torch.testing.assert_close(found.loss, values.mean(), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(learner.losses(batch).detach(), values, rtol=TOLERANCE, atol=TOLERANCE)
    return learner


@pytest.mark.parametrize("options", [{}, {"vectorize": "loop"}, {"chunk_size": 3}], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, options):
    loss_fn, labels = LOSSES[loss]
    agrees(randomised(mlp().double()), loss_fn, tasks(labels=labels), **options)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("norm", NORMS)
def test_normalisation(norm, vectorize):
    """Of padded sets, only the points that count are in the statistics, of the queries' support sets too."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, WAYS)).double()
    randomised(model)
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(2.0)
    ragged = [task(*size, seed) for seed, size in enumerate([(3, 2), (6, 5), (2, 4), (4, 1)])]
    learner = MAML(model, F.cross_entropy, inner_lr=0.1, inner_steps=2, norm=norm, vectorize=vectorize)
    if norm == "batch":
        ragged = ragged[:3]  # a query alone has no variance
    alone = [learner.meta_gradient(pad([each])) for each in ragged]
    batch = pad(ragged)
    found = learner.backward(batch)
    grads = {name: torch.stack([each.grads[name][0] for each in alone]).mean(0) for name in alone[0].grads}
    assert_close({n: p.grad for n, p in model.named_parameters()}, grads, TOLERANCE)
    losses = torch.cat([each.losses for each in alone])
    torch.testing.assert_close(found.loss, losses.mean(), rtol=TOLERANCE, atol=TOLERANCE)
    params = learner.adapt(batch.support_x, batch.support_y, mask=batch.support_mask)
    support = {"support_x": batch.support_x, "support_mask": batch.support_mask}
    logits = learner.predict(params, batch.query_x, batch.query_mask, **support)
    own, _ = learner.judge(params, logits, batch.query_y, batch.query_mask)
    torch.testing.assert_close(own.detach(), losses, rtol=TOLERANCE, atol=TOLERANCE)


def test_padded_support_sets_with_their_statistics_are_refused_by_vmap():
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, WAYS)).double()
    batch = pad([task(*size, seed) for seed, size in enumerate([(3, 2), (6, 2)])])
    learner = MAML(model, F.cross_entropy, norm="support", vectorize="vmap")
    with pytest.raises(ValueError, match=r"the padding of a batch from metamom\.pad would change its predictions"):
        learner.backward(batch)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, vectorize):
    """Without a task of one point, which batch normalisation turns into zeros."""
    ragged = tasks(((3, 2), (6, 5), (2, 4), (4, 3)))
    agrees(randomised(MODELS[name]().double()), F.cross_entropy, ragged, vectorize=vectorize)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=5),
    st.sampled_from([1, 2]),
    st.sampled_from(["auto", "loop"]),
)
def test_any_sizes(sizes, steps, vectorize):
    ragged = tasks(sizes)
    batch = pad(ragged)
    for of, at in (("support", 0), ("query", 1)):
        mask, counts = getattr(batch, f"{of}_mask"), [size[at] for size in sizes]
        if len(set(counts)) == 1:
            assert mask is None
        else:
            assert mask.sum(1).tolist() == counts
    for t, each in enumerate(ragged):
        for field, x, mask in zip(batch[:4], each, (*[batch.support_mask] * 2, *[batch.query_mask] * 2), strict=True):
            assert torch.equal(field[t] if mask is None else field[t][mask[t]], x)
    agrees(randomised(mlp().double()), F.cross_entropy, ragged, steps, vectorize=vectorize)


def test_only_a_loss_with_a_mask_and_a_model_without_mixing_run_at_once():
    ragged = tasks(labels=False)
    agrees(randomised(mlp().double()), weighted_by_mask, ragged, vectorize="vmap")
    with pytest.raises(ValueError, match=r'no parameter mask, so with vectorize="vmap"'):
        MAML(mlp().double(), F.mse_loss, vectorize="vmap").backward(pad(ragged))
    for name in ("batch norm", "centred"):
        learner = MAML(MODELS[name]().double(), weighted_by_mask, vectorize="vmap")
        with pytest.raises(
            ValueError, match=r"the padding .* would change its predictions\. Use vectorize=.*GroupNorm"
        ):
            learner.backward(pad(ragged))


def test_first_order_workers_and_learned_step_sizes():
    ragged = tasks()
    model = randomised(mlp().double())
    whole = MAML(model, F.cross_entropy, inner_lr=0.1, learn_inner_lr="tensor", estimator="first-order")
    rows = whole.meta_gradient(pad(ragged), workers=4).grads
    for t, each in enumerate(ragged):
        one = whole.meta_gradient(TaskBatch(*(x.unsqueeze(0) for x in each))).grads
        assert_close({n: row[t] for n, row in rows.items()}, {n: row[0] for n, row in one.items()}, TOLERANCE)


@pytest.mark.parametrize("size", [1, 2])
def test_chunks_without_padding_do_not_hide_that_points_mix(size):
    agrees(randomised(Centred().double()), F.cross_entropy, tasks(((6, 5), (6, 5), (6, 5), (2, 3))), chunk_size=size)


class Pooled(nn.Module):
    """A model of words that also looks at all words of the set."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x).mean(1)) + self.words(x).mean((0, 1)))


@pytest.mark.parametrize("size", [1, None])
def test_models_of_whole_numbers_that_mix_points(size):
    ragged = [(x["input_ids"], y, query_x["input_ids"], query_y) for x, y, query_x, query_y in texts()]
    agrees(randomised(Pooled().double()), F.cross_entropy, ragged, chunk_size=size)


def test_dropout_does_not_keep_tasks_from_running_at_once():
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Linear(4, WAYS)).double()
    learner = MAML(model, F.cross_entropy)
    learner.backward(pad(tasks()))
    assert learner._run.mixes == {(True, None): False}


def test_accuracy_and_evaluate():
    ragged = tasks()
    model = randomised(mlp().double())
    learner = MAML(model, F.cross_entropy, inner_lr=0.1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    class Ragged:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            mine = block(num_tasks, rank, world_size)
            return pad(ragged[mine.start : mine.stop])

    expected = []
    for steps in (0, 1):
        outs = [(task_loss(model, F.cross_entropy, TaskBatch(*t), weights, steps, 0.1)[1], t[3]) for t in ragged]
        expected.append(torch.stack([(out.argmax(1) == y).double().mean() for out, y in outs]))
    found = evaluate(learner, Ragged(), tasks=4, steps=(0, 1))
    assert found.metric == "accuracy"
    torch.testing.assert_close(found.values, torch.stack(expected), rtol=TOLERANCE, atol=TOLERANCE)
    assert learner.backward(pad(ragged)).metrics["accuracy"] == pytest.approx(float(expected[1].mean()), abs=TOLERANCE)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.1, beta=1.0)
    metrics = train(learner, optimizer, Ragged(), iterations=3, meta_batch=4, workers=2).metrics
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def text(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    g = generator(seed)
    ids = torch.randint(11, (n, 5), generator=g)
    mask = (torch.arange(5) < torch.randint(1, 6, (n, 1), generator=g)).long()
    return {"input_ids": ids, "attention_mask": mask}, torch.randint(WAYS, (n,), generator=g)


def texts() -> list[tuple[Any, ...]]:
    return [(*text(s, 2 * i), *text(q, 2 * i + 1)) for i, (s, q) in enumerate(SIZES)]


def test_trees_and_missing_targets():
    agrees(randomised(Classifier().double()), of_logits, texts())
    without = [(x, None, query_x, None) for x, _, query_x, _ in tasks()]
    agrees(randomised(mlp().double()), lambda out: out.square().mean() + out.sum().cos(), without)


def test_batches_are_padded_too():
    ragged = [pad([each]) for each in tasks()]
    whole = pad([pad(ragged[:2]), *ragged[2:]])
    for ours, theirs in zip(whole, pad(tasks()), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    named = [each._replace(task_ids=torch.tensor([i])) for i, each in enumerate(ragged)]
    assert pad(named).task_ids.tolist() == [0, 1, 2, 3]
    assert pad(named).split(2)[1].support_mask.shape == (2, 6)
    moved = pad(named).to("cpu", torch.float32)
    assert (moved.support_x.dtype, moved.support_mask.dtype) == (torch.float32, torch.bool)


ONE = TaskBatch(*(x.unsqueeze(0) for x in tasks()[0]))
LEARNER = MAML(mlp().double(), F.cross_entropy)
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a list of tasks as a batch": (
        lambda: LEARNER.backward(tasks()),
        TypeError, r"got a list of 4 items\. Make one batch .* metamom\.pad\(tasks\)",
    ),
    "a list of batches as a batch": (
        lambda: LEARNER.losses([ONE, ONE]), TypeError, r"metamom\.pad\(tasks\)",
    ),
    "lists of sets as fields": (
        lambda: LEARNER.backward(TaskBatch(*(list(field) for field in zip(*tasks(), strict=True)))),
        ValueError, r"all tensors of support_x must hold the same tasks.*tasks of different sizes.*metamom\.pad",
    ),
    "no tasks": (lambda: pad([]), ValueError, "at least one task"),
    "a tensor": (lambda: pad([torch.ones(2)]), TypeError, "item 0 is a tensor"),
    "points of other shapes": (
        lambda: pad([tasks()[0], tuple(x[..., :1] if x.is_floating_point() else x for x in tasks()[1])]),
        ValueError, r"one form, shape and dtype; support_x differs.*not the points in them",
    ),
    "targets in some": (
        lambda: pad([tasks()[0], (tasks()[1][0], None, *tasks()[1][2:])]),
        ValueError, "either all tasks have support_y",
    ),
    "an empty set": (lambda: pad(tasks(((0, 1), (2, 1)))), ValueError, "task 0 has none"),
    "ids in some": (
        lambda: pad([ONE, ONE._replace(task_ids=torch.tensor([0]))]), ValueError, "either all tasks have task_ids or",
    ),
    "a mask of numbers": (
        lambda: LEARNER.backward(ONE._replace(support_mask=torch.ones(1, 3))),
        TypeError, "support_mask must be a tensor of",
    ),
    "a mask of another shape": (
        lambda: LEARNER.backward(ONE._replace(query_mask=torch.ones(1, 3).bool())),
        ValueError, r"shape \[1, 2\].*got \[1, 3",
    ),
    "nothing left": (
        lambda: LEARNER.backward(ONE._replace(query_mask=torch.zeros(1, 2).bool())),
        ValueError, "task 0 without any point",
    ),
    "an estimator that splits": (
        lambda: MAML(mlp().double(), F.cross_entropy, estimator="independent").backward(pad(tasks())),
        ValueError, "padded support sets have no equal parts. Use estimator 'exact'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained(name):
    call, error, said = MISTAKES[name]
    with pytest.raises(error, match=said):
        call()


def on_two(folder: Path) -> None:
    """Trees and padding on two processes, and a task on the second one that diverges."""
    with start(timeout=60) as world:
        learner = MAML(randomised(Classifier().double()), of_logits, inner_lr=0.1)
        ragged = texts()
        mine = pad(ragged).split(2)[world.rank]
        found = learner.backward(mine, workers=2, world=world)
        if world.first:
            torch.save([found.loss, *(p.grad for p in learner.parameters())], folder / "found.pt")
        values = tasks(labels=False)
        values[3] = (values[3][0], values[3][1] + 1e100, *values[3][2:])
        steep = MAML(mlp().double(), F.mse_loss, inner_lr=1e60)
        try:
            steep.backward(pad(values).split(2)[world.rank], world=world)
        except DivergedError as error:
            print(error)


def test_two_processes(tmp_path):
    ended = run_forked(on_two, 2, tmp_path / "said", tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    assert ended[0][1] == ended[1][1]
    assert "first in task 3: the inner steps are too large" in ended[0][1]
    learner = MAML(randomised(Classifier().double()), of_logits, inner_lr=0.1)
    ragged = texts()
    alone = learner.backward(pad(ragged), workers=2)
    expected = [alone.loss, *(p.grad for p in learner.parameters())]
    for ours, theirs in zip(torch.load(tmp_path / "found.pt", weights_only=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert lone(alone.loss) is alone.loss


@pytest.mark.parametrize(("vectorize", "points"), [("auto", 6), ("vmap", 6)])
def test_a_model_that_fails_on_fewer_points_says_why(vectorize, points):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) < points:
            raise ValueError("a set has six points")
        return self.a(x)

    def masked(p: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = torch.ones_like(p) if mask is None else mask.unsqueeze(-1).to(p.dtype)
        return (weights * (p - y) ** 2).sum() / weights.sum()

    batch = regression_batch(0, tasks=2, support=points, query=points, dim=2)
    tasks = [TaskBatch(*(x[t : t + 1, :n] for x in batch[:4])) for t, n in enumerate((4, points))]
    model = Of(forward, a=nn.Linear(2, 1)).double()
    learner = MAML(model, masked, vectorize=vectorize)
    with pytest.warns(UserWarning, match=r"Of does not take 4 points of a task .*\(a set has six points\), so smaller"):
        learner.backward(pad(tasks))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    MAML(nn.Sequential(model.a), masked, vectorize="loop").backward(pad(tasks))
    assert_close({name: found[name] for name in found}, {name: p.grad for name, p in model.named_parameters()}, 1e-10)
    with pytest.raises(ValueError, match="a set has six points"):
        MAML(model, masked, vectorize="loop").backward(pad(tasks))


def unfinished(batch: TaskBatch, filler: float) -> TaskBatch:
    """The batch with another padding, as functions that collate points and mark what is missing make it."""
    support_x = batch.support_x.masked_fill(~batch.support_mask.unsqueeze(-1), filler)
    return batch._replace(
        support_x=support_x, query_x=batch.query_x.masked_fill(~batch.query_mask.unsqueeze(-1), filler)
    )


@pytest.mark.parametrize("vectorize", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_a_padding_of_ones_own_need_not_be_finite(vectorize, filler):
    ragged = tasks(labels=False)
    batch, model = pad(ragged), randomised(mlp().double())
    bare = unfinished(batch, filler)
    learner = MAML(model, weighted_by_mask, inner_lr=0.1, inner_steps=2, vectorize=vectorize)
    expected, values = loop_gradient(model, weighted_by_mask, ragged, 2, 0.1)
    for _ in range(2):
        found = learner.meta_gradient(bare)
        assert_close({name: grad[0] for name, grad in found.grads.items()}, expected, TOLERANCE)
        torch.testing.assert_close(found.losses, values, rtol=TOLERANCE, atol=TOLERANCE)
    adapted = learner.adapt(bare.support_x, bare.support_y, mask=bare.support_mask)
    out = learner.predict(adapted, bare.query_x, bare.query_mask)
    for t, (*_, query_x, _) in enumerate(ragged):
        own = torch.func.functional_call(model, {name: w[t] for name, w in adapted.items()}, query_x)
        torch.testing.assert_close(out[t][batch.query_mask[t]], own, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_padding_that_is_not_finite_is_not_what_broke_a_step():
    bare = unfinished(pad(tasks(labels=False)), math.nan)
    model = randomised(mlp().double())
    with pytest.raises(DivergedError, match="the inner steps are too large"):
        MAML(model, weighted_by_mask, inner_lr=1e300, inner_steps=2).backward(bare)
    support_x = bare.support_x.clone()
    support_x[1, 0] = math.nan
    with pytest.raises(NonFiniteDataError, match=f"support_x holds {FEATURES} of .* first in task 1"):
        MAML(model, weighted_by_mask, inner_lr=0.1).backward(bare._replace(support_x=support_x))
