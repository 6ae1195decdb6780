"""Embeddings, attention and losses: each task's gradient is the one that it has by itself, in a loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import adapt_task, slow_meta_gradient, weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from metamom import MAML, TaskBatch
from metamom.maml.functions_by_task import attention

OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 0},
    "padding at the end": {"padding_idx": -1},
    "scaled by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 2, "scale_grad_by_freq": True},
}


class Words(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3, **options)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(1))


class WordsByFunction(nn.Module):
    """The indices are made inside, so that nothing but the call itself tells that it looks something up."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.words = nn.Parameter(torch.randn(5, 3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.embedding(x.long(), self.words, **self.options)).mean(1))


class WordsByOperator(Words):
    """As a model that `torch.export` has written calls it; padding is the only option."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.ops.aten.embedding.default(self.words.weight, x, self.words.padding_idx)
        return self.head(torch.tanh(found).mean(1))


class WordsLater(nn.Module):
    """Begins to call what is replaced after the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 1)
        self.masked = False

    def forward(self, x: Tensor) -> Tensor:
        found = F.embedding(x, self.words, padding_idx=0) if self.masked else self.words[x]
        return self.head(torch.tanh(found).mean(1))


def batch_of(dtype: torch.dtype = torch.int64) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def points(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 5, (4, n, 6), generator=generator)
        return x.to(dtype), torch.randn(4, n, 1, generator=generator, dtype=torch.float64)

    return TaskBatch(*points(3), *points(2))


def problem(kind: type[nn.Module], options: dict[str, object]) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    batch = batch_of(torch.float64 if kind is WordsByFunction else torch.int64)
    return kind(**options).double(), batch


@pytest.mark.parametrize("adapt", [None, ["head"]], ids=["all adapt", "shared table"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_meta_gradient_is_that_of_a_loop(kind, options, steps, adapt):
    model, batch = problem(kind, options)
    learner = MAML(model, F.mse_loss, inner_lr=0.3, inner_steps=steps, adapt=adapt)
    for _ in range(2):  # the second call knows what the first has found out
        grads = learner.meta_gradient(batch).grads
        expected, _ = slow_meta_gradient(
            model, F.mse_loss, batch, steps=steps, inner_lr=0.3, adapted=set(learner.adapted)
        )
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_no_task_adapts_its_padding(kind):
    model, batch = problem(kind, {"padding_idx": 0})
    adapted = MAML(model, F.mse_loss, inner_lr=0.3).adapt(batch.support_x, batch.support_y)
    table = adapted[next(name for name in adapted if name.startswith("words"))]
    start = dict(model.named_parameters())[next(name for name in adapted if name.startswith("words"))]
    assert (batch.support_x == 0).any((1, 2)).all()
    assert torch.equal(table[:, 0], start[0].expand(4, -1))
    for task in range(4):
        expected = adapt_task(
            model, F.mse_loss, weights_of(model), batch.support_x[task], batch.support_y[task], steps=1,
            inner_lr=lambda name: 0.3, adapted=set(adapted),
        )  # fmt: skip
        assert_close({n: w[task].detach() for n, w in adapted.items()}, {n: w.detach() for n, w in expected.items()})


def test_sparse_gradients_are_as_dense_ones():
    model, batch = problem(Words, {"sparse": True})
    dense, _ = problem(Words, {})
    grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    expected = MAML(dense, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    assert_close(grads, expected)


def test_operators_of_exported_models_are_replaced_too():
    model, batch = problem(WordsByOperator, {"padding_idx": 0})
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    by_name = torch.embedding  # which F.embedding ends in
    for call in (torch.ops.aten.embedding.default, torch.ops.aten.embedding, by_name):
        model.forward = lambda x, call=call: model.head(torch.tanh(call(model.words.weight, x, 0)).mean(1))
        grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


def test_an_exported_model_trains():
    model, batch = problem(Words, {"padding_idx": 0})
    points = {0: torch.export.Dim("points")}
    exported = torch.export.export(model, (batch.support_x[0],), dynamic_shapes={"x": points}).module()
    grads = MAML(exported, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    assert_close({name: grads[name].mean(0) for name in expected}, expected)


def test_a_model_may_call_it_later():
    model, batch = problem(WordsLater, {})
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    for model.masked in (False, True):
        grads = learner.meta_gradient(batch).grads
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("write", ["script", "trace"])
def test_scripted_code_that_calls_it_is_refused(write):
    model, batch = problem(Words, {"padding_idx": 0})
    words = model.words
    model.words = torch.jit.script(words) if write == "script" else torch.jit.trace(words, batch.support_x[0])
    with pytest.raises(ValueError, match=r"scripted code of the model calls embedding.*Pass the model that torch.jit"):
        MAML(model, F.mse_loss)


@pytest.mark.parametrize("kind", [Words, WordsByFunction])
def test_a_compiled_learner_agrees(kind, traced):
    model, batch = problem(kind, {"padding_idx": 0})
    compiled = MAML(model, F.mse_loss, inner_lr=0.3, compile=True).meta_gradient(batch).grads
    expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    assert_close({name: g.mean(0) for name, g in compiled.items()}, expected)
    assert len(traced) == 1


# ---- operations that vmap does wrong in silence

SAME = torch.ones(2, 2, dtype=torch.float64)
OPERATIONS = {
    "select_scatter, first": lambda x, w: torch.select_scatter(x, w[0] * x[:, 0], 1, 0),
    "select_scatter, last": lambda x, w: (w[:1] * x).select_scatter(w[0] * x[0], 0, -1),
    "index_fill, same for all": lambda x, w: SAME.index_fill(1, torch.tensor([1]), w[0, 0]) @ w * x,
    "index_fill": lambda x, w: torch.index_fill(x @ w, 1, torch.tensor([0]), w.sum()),
    "index_fill, a number": lambda x, w: (x @ w).index_fill(0, torch.tensor([1]), 0.5),
    "prelu, same for all": lambda x, w: F.prelu(SAME - 0.3, w[0, :1]) @ w * x,
    "prelu, channels": lambda x, w: F.prelu(x @ w, w[0]) + nn.functional.prelu(SAME[0], w[1, 1]),
    "roll of a number": lambda x, w: x * torch.roll(w[0, 1], 1) + w.sum().roll(3),
    "roll": lambda x, w: torch.roll(x @ w, 1) + (x @ w).roll((1, -1), (0, 1)),
}


def halved_backwards(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    return h * 0.5 + 0.5 * h.detach() if h.requires_grad and not x.requires_grad else h * 3


def retained(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    h.retain_grad()
    return h


OPERATIONS |= {"requires_grad": halved_backwards, "retain_grad": retained}


def test_a_hook_in_the_forward_is_refused():
    def hooked(x: Tensor, w: Tensor) -> Tensor:
        h = torch.tanh(x @ w)
        h.register_hook(lambda gradient: gradient / 2)
        return h

    learner = MAML(Operation(hooked).double(), F.mse_loss)
    with pytest.raises(ValueError, match=r"registers a hook on a tensor, .*use a torch\.autograd\.Function"):
        learner.backward(regression_batch(tasks=3, support=2, query=2))


class Operation(nn.Module):
    def __init__(self, operation) -> None:
        super().__init__()
        self.weight, self.operation = nn.Parameter(torch.randn(2, 2)), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x, self.weight)[:, :1].tanh()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_as_in_a_loop(name):
    torch.manual_seed(0)
    model, batch = Operation(OPERATIONS[name]).double(), regression_batch(tasks=3, support=2, query=2)
    learner = MAML(model, F.mse_loss, inner_lr=0.3)
    expected, losses = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    for _ in range(2):
        grads, ours = learner.meta_gradient(batch)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)
        torch.testing.assert_close(ours, losses)


@pytest.mark.parametrize("index", [2, -3])
def test_a_place_that_is_not_there_is_an_error(index):
    model = Operation(lambda x, w: torch.select_scatter(x, w[0], 0, index)).double()
    with pytest.raises((IndexError, ValueError), match="out of range"):
        MAML(model, F.mse_loss).meta_gradient(regression_batch(tasks=3, support=2, query=2))


# ---- attention


class Attending(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.keys, self.values, self.head = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 1)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (layer(x).unsqueeze(0).expand(2, -1, -1) for layer in (self.keys, self.values))
        return self.head(F.scaled_dot_product_attention(keys, keys, values, **self.options)[0])


def plain_attention(query, key, value, mask, scale):
    """Position by position, as the formula has it."""
    out = []
    for i in range(query.shape[0]):
        scores = torch.stack([(query[i] * k).sum() * scale for k in key]) + mask[i]
        weights = scores.exp() / scores.exp().sum()
        out.append(sum(w * v for w, v in zip(weights, value, strict=True)))
    return torch.stack(out)


MASKS = {
    "none": ({}, torch.zeros(5, 5)),
    "scale": ({"scale": 0.3}, torch.zeros(5, 5)),
    "causal": ({"is_causal": True}, torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)),
    "boolean": (
        {"attn_mask": torch.eye(5).flip(0).bool() | torch.eye(5).bool()},
        torch.full((5, 5), -torch.inf).masked_fill((torch.eye(5) + torch.eye(5).flip(0)).bool(), 0),
    ),
    "added": ({"attn_mask": torch.arange(25.0).view(5, 5).double() / 8}, torch.arange(25.0).view(5, 5) / 8),
}


@pytest.mark.parametrize("estimator", ["exact", "first-order"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_agrees_with_its_formula(mask, estimator):
    options, added = MASKS[mask]
    torch.manual_seed(0)
    model = Attending(**options).double()

    class Plain(Attending):
        def forward(self, x: Tensor) -> Tensor:
            keys, values = self.keys(x), self.values(x)
            return self.head(plain_attention(keys, keys, values, added.double(), options.get("scale", 0.5)))

    plain = Plain().double()
    plain.load_state_dict(model.state_dict())
    batch = regression_batch(tasks=3, support=5, query=5)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, estimator=estimator)
    expected, losses = slow_meta_gradient(
        plain, F.mse_loss, batch, inner_lr=0.1, first_order=estimator == "first-order"
    )
    for _ in range(2):
        assert_close({name: g.mean(0) for name, g in learner.meta_gradient(batch).grads.items()}, expected)
    torch.testing.assert_close(learner.losses(batch).detach(), losses)
    with torch.no_grad():
        torch.testing.assert_close(learner.losses(batch), losses)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_layer_trains(training, compile, traced):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).train(training)
    model = nn.Sequential(nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, 1)).double()
    batch = regression_batch(tasks=3, dim=12)
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.1)
    learner = MAML(model, F.mse_loss, inner_lr=0.1, compile=compile)
    for _ in range(2):
        assert_close({name: g.mean(0) for name, g in learner.meta_gradient(batch).grads.items()}, expected)
    with torch.no_grad():
        params = learner.adapt(batch.support_x, batch.support_y)
        found = learner.predict(params, batch.query_x)
        for t in range(3):
            one = torch.func.functional_call(model, {name: w[t] for name, w in params.items()}, (batch.query_x[t],))
            torch.testing.assert_close(found[t], one)


class Padded(nn.Module):
    """Attention in sequences with padding, the first of which is nothing else."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.keys, self.head = how, nn.Linear(4, 4), nn.Linear(4, 1)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        keys, padding = self.keys(x), torch.cat([torch.ones_like(x[:1, :, 0]), x[1:, :, 0]]) > 0
        if self.how == "module":
            out, _ = self.attend(keys, keys, keys, key_padding_mask=padding, need_weights=False)
        else:
            mask = ~padding.unsqueeze(1)
            if self.how == "added":
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
            out = F.scaled_dot_product_attention(keys, keys, keys, attn_mask=mask)
        return self.head(out.mean(1))


@pytest.mark.parametrize("how", ["module", "boolean", "added"])
def test_who_may_look_at_nothing_sees_zeros(how):
    torch.manual_seed(0)
    model = Padded(how).double()
    xs = [torch.randn(3, n, 3, 4, dtype=torch.float64) for n in (4, 3)]
    batch = TaskBatch(xs[0], xs[0][:, :, 0, :1], xs[1], xs[1][:, :, 0, :1])
    with sdpa_kernel(SDPBackend.MATH):
        expected, _ = slow_meta_gradient(model, F.mse_loss, batch, inner_lr=0.3)
    grads = MAML(model, F.mse_loss, inner_lr=0.3).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in grads.items()}, expected)


def test_grouped_queries_share_their_keys():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 5, 4, generator=generator) for n in (4, 2, 2))
    found = attention(query, key, value, enable_gqa=True)
    for head in range(4):
        expected = F.scaled_dot_product_attention(query[head], key[head // 2], value[head // 2])
        torch.testing.assert_close(found[head], expected)


# ---- torch's losses, with all their options

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)

LAYER = torch.arange(16.0, dtype=torch.float64).cos().view(4, 4)


def of_two(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of scores and labels of two positions."""
    return lambda p, y: loss(torch.stack([p, 2 * p], -1), torch.stack([y, y.flip(0)], -1))


def of_variances(**options: object) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Gaussian losses with variances of several shapes."""
    variances = {
        "of each": lambda p: p.exp(),
        "a column": lambda p: p.exp().mean(1, keepdim=True),
        "of each point": lambda p: p.exp().mean(1),
        "below eps": lambda p: p.abs() * 1e-3,
        "constant": lambda p: torch.full_like(p, 0.5),
        "a number": lambda p: 0.5,
    }
    if options.get("eps") is None:
        options["eps"] = 1e-3
    return {
        f"gaussian {name} {options}": (
            "values",
            lambda p, y, var=var: nn.GaussianNLLLoss(**options)(p, y, var(p)),
        )
        for name, var in variances.items()
    }


def of_classes(reduction: str, weight: Tensor | None, smoothing: float) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Cross-entropies of labels and of probabilities."""
    options = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing}
    said = f"cross-entropy {reduction} {'weighted' if weight is not None else ''} {smoothing}"
    return {
        f"{said} labels": ("classes", nn.CrossEntropyLoss(**options)),
        f"{said} some ignored": ("some classes", nn.CrossEntropyLoss(**options)),
        f"{said} 1 ignored": ("classes", nn.CrossEntropyLoss(**options, ignore_index=1)),
        f"{said} of positions": ("some classes", of_two(nn.CrossEntropyLoss(**options))),
        f"{said} of one point": ("classes", lambda p, y: F.cross_entropy(p[0], y[0], **options)),
        f"{said} probabilities": ("probabilities", nn.CrossEntropyLoss(**options)),
    }


def of_entries(reduction: str) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Losses of values and of binary labels."""
    losses = {
        "mse": ("values", nn.MSELoss(reduction=reduction)),
        "l1": ("values", nn.L1Loss(reduction=reduction)),
        "smooth l1": ("values", nn.SmoothL1Loss(reduction=reduction, beta=0.3)),
        "huber": ("values", nn.HuberLoss(reduction=reduction, delta=0.3)),
        "poisson": ("counts", nn.PoissonNLLLoss(reduction=reduction, full=True)),
        "poisson of rates": (
            "counts", lambda p, y: F.poisson_nll_loss(p.exp(), y, log_input=False, reduction=reduction)
        ),
        "logits": ("binary", nn.BCEWithLogitsLoss(reduction=reduction, weight=WEIGHT, pos_weight=WEIGHT)),
        "probabilities": ("binary", lambda p, y: F.binary_cross_entropy(p.sigmoid(), y, WEIGHT, reduction=reduction)),
        "soft margin": ("signs", nn.SoftMarginLoss(reduction=reduction)),
        "hinge": ("signs", nn.HingeEmbeddingLoss(reduction=reduction, margin=0.5)),
        "several labels": ("binary", nn.MultiLabelSoftMarginLoss(reduction=reduction, weight=WEIGHT)),
        "nll": ("some classes", lambda p, y: F.nll_loss(F.log_softmax(p, 1), y, WEIGHT, reduction=reduction)),
        "triplets": (
            "values", lambda p, y: nn.TripletMarginLoss(reduction=reduction, swap=True)(p, y, p.flip(0))
        ),
        "cosines": (
            "signs",
            lambda p, y: nn.CosineEmbeddingLoss(0.1, reduction=reduction)(p, 2 * p.flip(0) + 1, y[:, 0]),
        ),
        "ranks": ("signs", lambda p, y: nn.MarginRankingLoss(0.1, reduction=reduction)(p[:, 0], p[:, 1], y[:, 0])),
    }  # fmt: skip
    return {f"{name} {reduction}": loss for name, loss in losses.items()}


LOSSES = {
    **of_variances(),
    **of_variances(full=True, reduction="sum", eps=0.1),
    **of_classes("mean", None, 0.0),
    **of_classes("mean", None, 0.1),
    **of_classes("mean", WEIGHT, 0.0),
    **of_classes("mean", WEIGHT, 0.1),
    **of_classes("sum", WEIGHT, 0.1),
    **of_entries("mean"),
    **of_entries("sum"),
    "kl": ("probabilities", lambda p, y: F.kl_div(F.log_softmax(p, 1), y, reduction="batchmean")),
    "an old reduction": ("some classes", lambda p, y: F.cross_entropy(p, y, WEIGHT, False, label_smoothing=0.1)),
    "weights of each task": (
        "some classes", lambda p, y: F.cross_entropy(p, y, p.detach().exp().mean(0), label_smoothing=0.1)
    ),
    "a part of the model's output": (
        "values", lambda p, y: F.gaussian_nll_loss(p[:, :2], y[:, :2], p[:, 2:].exp(), reduction="none").mean()
    ),
    **{
        f"cross-entropy of a linear layer, {options}": (
            "some classes", lambda p, y, options=options: F.linear_cross_entropy(p, LAYER, y, weight=WEIGHT, **options)
        )
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "reduction": "sum"})
        if hasattr(F, "linear_cross_entropy")
    },
    "roll": ("values", lambda p, y: F.mse_loss(p * p.mean().roll(1), y)),
}  # fmt: skip


def targets_of(kind: str, points: int) -> Tensor:
    """For 3 tasks and predictions of 4 numbers."""
    generator = torch.Generator().manual_seed(points)
    y = torch.randn(3, points, 4, generator=generator, dtype=torch.float64)
    labels = y.argmax(-1)
    return {
        "values": y,
        "counts": y.abs(),
        "binary": (y > 0).double(),
        "signs": y.sign(),
        "probabilities": y.softmax(-1),
        "classes": labels,
        "some classes": labels.index_fill(1, torch.tensor([1]), -100),
    }[kind]


def losses_of(kind: str) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x = [torch.randn(3, points, 2, dtype=torch.float64) for points in (6, 5)]
    return model, TaskBatch(x[0], targets_of(kind, 6), x[1], targets_of(kind, 5))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:size_average and reduce")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_torch_does_as_in_a_loop(name):
    kind, loss_fn = LOSSES[name]
    model, batch = losses_of(kind)
    expected, losses = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    learner = MAML(model, loss_fn, inner_lr=0.1)
    for _ in range(2):  # the second call knows what the first has found out
        grads, ours = learner.meta_gradient(batch)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)
        torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian of each {'eps': 0.001}", "cross-entropy mean weighted 0.1 some ignored"])
def test_a_loss_of_torch_compiles(name, traced):
    kind, loss_fn = LOSSES[name]
    model, batch = losses_of(kind)
    expected, _ = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    compiled = MAML(model, loss_fn, inner_lr=0.1, compile=True).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in compiled.items()}, expected)
    assert len(traced) == 1


def test_a_model_of_several_outputs_has_variances_too():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale = nn.Linear(2, 4), nn.Linear(2, 4)
            self.double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.scale(x).exp()

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.gaussian_nll_loss(out[0], y, out[1])

    batch = losses_of("values")[1]
    model = Heads()
    _, losses = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    learner = MAML(model, loss_fn, inner_lr=0.1)
    torch.testing.assert_close(learner.losses(batch).detach(), losses, rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="one tensor of predictions"):
        learner.backward(batch)


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda p, y: F.gaussian_nll_loss(p, y, p), r"needs variances >= 0; got negative ones"),
        (lambda p, y: F.gaussian_nll_loss(p, y, -1.0), "var has negative entry"),
        (lambda p, y: F.gaussian_nll_loss(p, y, p.exp()[:, :3]), r"variance for each prediction \[6, 4\].*\[6, 3\]"),
        (lambda p, y: F.gaussian_nll_loss(p, y, p.exp(), reduction="median"), "none, mean or sum; got 'median'"),
    ],
)
def test_arguments_of_a_gaussian_loss_are_checked(loss_fn, said):
    model, batch = losses_of("values")
    with pytest.raises(ValueError, match=said):
        MAML(model, loss_fn).meta_gradient(batch)


def test_the_flops_of_a_meta_gradient_can_be_counted():
    """By PyTorch's counter, which hangs hooks on what requires a gradient."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double(), regression_batch(tasks=3)
    learner = MAML(model, F.mse_loss)
    with FlopCounterMode(display=False) as counter:
        learner.backward(batch)
    assert counter.get_total_flops() > 0
