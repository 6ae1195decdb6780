"""Calls that go wrong, and what the errors must say: what was wanted, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forked import run_forked
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metamom import MAML, DivergedError, TaskBatch, TopK, evaluate, train
from metamom.distributed import start
from metamom.maml.batch_checks import NonFiniteDataError
from metamom.maml.misfits import inputs_explained, targets_explained
from metamom.nets.models import Conv4
from metamom.tasks import Sinusoid

T, S, Q = 4, 6, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def values(features: int = 1, *, tasks: int = T, support: int = S, query: int = Q) -> TaskBatch:
    sizes = [(support, features), (support, 1), (query, features), (query, 1)]
    return TaskBatch(*(normal(tasks, *size) for size in sizes))


def classes(ways: int = 3) -> TaskBatch:
    labels = torch.arange(S).remainder(ways).expand(T, S).clone()
    return TaskBatch(normal(T, S, 2), labels, normal(T, S, 2), labels)


def regressor(loss_fn: Callable[..., Any] = F.mse_loss, **options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), loss_fn, **options)


def classifier(ways: int = 3, loss_fn: Callable[..., Any] = F.cross_entropy, **options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, ways)), loss_fn, **options)


def embedder(**options: Any) -> MAML:
    return MAML(nn.Sequential(nn.Embedding(10, 3), nn.Flatten(), nn.Linear(3, 1)), F.mse_loss, **options)


def flat(batch: TaskBatch) -> TaskBatch:
    """Targets without their last axis."""
    return batch._replace(support_y=batch.support_y[..., 0], query_y=batch.query_y[..., 0])


class Returns(nn.Module):
    """A model that returns something of its predictions."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.made = nn.Linear(1, 1), made

    def forward(self, x: Tensor) -> Any:
        return self.made(self.layer(x))


class Table(nn.Module):
    """A model that looks up its inputs."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.look_up = nn.Parameter(normal(10, 1)), look_up

    def forward(self, x: Tensor) -> Tensor:
        return self.look_up(self.table, x)


class Bags(nn.Module):
    """An embedding of sets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 1, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x)


class Checkpointed(nn.Module):
    """Computes its hidden layer again in the backward pass."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.hidden, self.head, self.use_reentrant = nn.Linear(1, 8), nn.Linear(8, 1), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.hidden(x).tanh(), x, use_reentrant=self.use_reentrant))


class Batches:
    """A sampler that gives what it was made with."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        return self.batch


class Mistake(NamedTuple):
    """A wrong call, the kind of error, and parts of its message in their order."""

    call: Callable[[], object]
    error: type[Exception]
    parts: tuple[str, ...]


def labels(change: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], object]:
    """A classifier of 3 ways that gets changed labels in its query sets."""
    batch = classes()
    return lambda: classifier(**options).backward(batch._replace(query_y=change(batch.query_y)))


def whole(learner: MAML, batch: TaskBatch) -> Callable[[], object]:
    return lambda: learner.backward(batch)


V = values()
INPUTS = "the model cannot take inputs of shape [6, "
LINEAR = "in module '0', Linear(in_features=1, out_features=8, bias=True), which got [6, "
UNSQUEEZE = ("shape [6, 1] and targets of shape [6] for each task", "y.unsqueeze(-1)", "out.squeeze(-1)")
ONE_LOSS = ("loss_fn must return a 0-d tensor", "without float() or .item()")
A_TENSOR = "where one tensor of predictions [N, ...] is wanted. Wrap it in a module that returns that tensor alone"

MISTAKES = {
    # labels and targets
    "labels too large": Mistake(
        labels(lambda y: y + 4), ValueError, ("3 outputs (ways)", "must be in 0..2; they are 4..6", "from 0")
    ),
    "labels from 1": Mistake(labels(lambda y: y + 1), ValueError, ("labels must be in 0..2; they are 1..3",)),
    "labels below 0": Mistake(labels(lambda y: y - 1), ValueError, ("labels must be in 0..2; they are -1..1",)),
    "more ways than outputs": Mistake(
        whole(classifier(2), classes()), ValueError, ("2 outputs (ways)", "0..1; they are 0..2", "more outputs")
    ),
    "labels too large for one-hot vectors": Mistake(
        labels(lambda y: y + 1, loss_fn=lambda p, y: F.mse_loss(p, F.one_hot(y, p.shape[1]).to(p.dtype))),
        ValueError,
        ("index 3 is out of bounds", "labels must be in 0..2; they are 1..3"),
    ),
    **{
        f"labels too large, {name}": Mistake(
            labels(lambda y: y + 1, loss_fn=loss), ValueError,
            ("loss_fn cannot take", "index 3 is out of bounds", "labels must be in 0..2; they are 1..3"),
        )
        for name, loss in (
            ("as an index", lambda p, y: -F.log_softmax(p, 1)[torch.arange(len(y)), y].mean()),
            ("for a unit matrix", lambda p, y: F.mse_loss(p, torch.eye(3)[y])),
            ("to gather", lambda p, y: -F.log_softmax(p, 1).gather(1, y[:, None]).mean()),
        )
    },
    **{
        f"weights of other classes, {name}": Mistake(
            whole(classifier(loss_fn=loss, estimator="first-order"), classes()), ValueError,
            (said, "weight must hold 3 numbers, one for each of the model's outputs"),
        )
        for name, loss, said in (
            ("too many", nn.CrossEntropyLoss(weight=torch.ones(4)), "but got weight tensor of shape"),
            ("too few", nn.CrossEntropyLoss(weight=torch.ones(2), ignore_index=1), "but got weight tensor of shape"),
            ("smoothed", nn.CrossEntropyLoss(weight=torch.ones(4), label_smoothing=0.1), "but got weight tensor"),
            ("margins", nn.MultiMarginLoss(weight=torch.ones(4)), "inconsistent weight size"),
        )
    },
    "weights of other logits": Mistake(
        whole(regressor(nn.BCEWithLogitsLoss(pos_weight=torch.ones(4, 1))), V),
        ValueError, ("of tensor", "Both have one shape and dtype", "its weight"),
    ),
    **{
        f"complex numbers, {name}": Mistake(
            whole(learner, batch), ValueError,
            ("not implemented for 'ComplexFloat'", "Torch's losses take real numbers. Give them p.abs()"),
        )
        for name, learner, batch in (
            ("predictions", MAML(Returns(lambda out: torch.complex(out, out)), F.mse_loss), V),
            ("targets", regressor(), V._replace(support_y=torch.complex(V.support_y, V.support_y))),
            ("scores", MAML(Returns(lambda out: torch.complex(out, out).expand(-1, 3)), F.cross_entropy),
             flat(V)._replace(support_y=torch.zeros(T, S).long())),
        )
    },
    "labels in floating point": Mistake(
        labels(lambda y: y.float()), ValueError, ("targets of shape [6] of torch.float32", "make them integers: y.long")
    ),
    "labels of 16 bits": Mistake(labels(lambda y: y.short()), ValueError, ("torch.int16", "64-bit integers: y.long()")),
    "labels with an axis more": Mistake(
        labels(lambda y: y.unsqueeze(-1)),
        ValueError, ("targets of shape [6, 1]", "drop their last axis: y.squeeze(-1)"),
    ),
    "labels of pixels": Mistake(
        labels(lambda y: y[..., None].expand(-1, -1, 4)),
        ValueError, ("targets of shape [6, 4]", "without the class axis"),
    ),
    "targets without an axis": Mistake(whole(regressor(), flat(V)), ValueError, ("mse_loss of", *UNSQUEEZE)),
    "absolute errors": Mistake(whole(regressor(F.l1_loss), flat(V)), ValueError, ("l1_loss of", *UNSQUEEZE)),
    "a loss module": Mistake(whole(regressor(nn.HuberLoss()), flat(V)), ValueError, ("huber_loss of", *UNSQUEEZE)),
    "turned round": Mistake(whole(regressor(lambda p, y: F.mse_loss(y, p)), flat(V)), ValueError, UNSQUEEZE),
    "whole numbers as values": Mistake(
        whole(regressor(lambda p, y: F.mse_loss(p, y.float())), flat(V)._replace(support_y=torch.ones(T, S).long())),
        ValueError, UNSQUEEZE,
    ),
    "a loss by hand": Mistake(
        whole(regressor(lambda p, y: (p - y).pow(2).mean()), flat(V)),
        ValueError, ("the difference between", *UNSQUEEZE),
    ),
    **{
        f"a loss by hand, {name}": Mistake(whole(regressor(loss), flat(V)), ValueError, (said, *UNSQUEEZE))
        for name, loss, said in (
            ("scaled", lambda p, y: (2 * p - y).abs().mean(), "the difference between"),
            ("of logarithms", lambda p, y: (p.exp().log() - y.exp().log()).abs().mean(), "the difference between"),
            ("of a copy", lambda p, y: (y.detach().clone() - p).abs().mean(), "the difference between"),
            ("a quotient", lambda p, y: (p / y).mean(), "the quotient of"),
            ("a hinge", lambda p, y: F.relu(1 - p * y.sign()).mean(), "the product of"),
            ("a distance", lambda p, y: torch.dist(p, y), "the distance or angle between"),
            ("an angle", lambda p, y: F.cosine_similarity(p, y, dim=0).mean(), "the distance or angle between"),
        )
    },
    **{
        f"a loss that pairs wrongly, {name}": Mistake(
            whole(MAML(nn.Linear(1, outputs), loss), flat(V) if shape == "[6]" else V),
            ValueError, (said, f"shape [6, {outputs}] and targets of shape {shape} for each task", how),
        )
        for name, outputs, shape, loss, said, how in (
            ("columns", 2, "[6]", lambda p, y: -Normal(p[:, :1], p[:, 1:].exp()).log_prob(y).mean(),
             "the difference between", "as [6, 1] and [6]"),
            ("a column", 2, "[6, 1]", lambda p, y: -Normal(p[:, 0], p[:, 1].exp()).log_prob(y).mean(),
             "the difference between", "as [6] and [6, 1]"),
            ("equal shapes", 1, "[6, 1]", lambda p, y: ((p.squeeze(-1) - y) ** 2).mean(),
             "the difference between", "as [6] and [6, 1]"),
            ("expanded", 1, "[6]", lambda p, y: (p.expand(-1, len(y)) - y).abs().mean(),
             "the difference between", "y.unsqueeze(-1)"),
            ("repeated", 1, "[6]", lambda p, y: (p.repeat(1, len(y)) - y).abs().mean(),
             "the difference between", "y.unsqueeze(-1)"),
            ("chunks", 2, "[6]", lambda p, y: (p.chunk(2, 1)[0] - y).abs().mean(),
             "the difference between", "as [6, 1] and [6]"),
            ("unbound", 2, "[6, 1]", lambda p, y: (p.unbind(1)[0] - y).abs().mean(),
             "the difference between", "as [6] and [6, 1]"),
            ("a sum", 2, "[6, 1]", lambda p, y: (p.sum(dim=1) - y).abs().mean(),
             "the difference between", "as [6] and [6, 1]"),
            ("a choice", 1, "[6]", lambda p, y: torch.where(y > 0, F.softplus(-p), F.softplus(p)).mean(),
             "a choice between", "y.unsqueeze(-1)"),
            ("a comparison", 1, "[6]", lambda p, y: torch.where(p > y, 1.0, 2.0).mean() * p.mean(),
             "a comparison of", "y.unsqueeze(-1)"),
            ("axes for both in one place", 1, "[6]", lambda p, y: (p[..., None] - y[..., None]).abs().mean(),
             "the difference between", "as [6, 1, 1] and [6, 1]"),
            ("variances", 2, "[6]", lambda p, y: F.gaussian_nll_loss(p[:, :1], y, p[:, 1:].exp()),
             "gaussian_nll_loss of", "as [6, 1] and [6]"),
            ("by name", 1, "[6]", lambda p, y: F.huber_loss(target=y, input=p), "huber_loss of", "y.unsqueeze(-1)"),
            ("several outputs", 3, "[6, 1]", F.mse_loss, "mse_loss of", "Give both one shape, if need be by expand_as"),
        )
    },
    "several targets": Mistake(
        whole(regressor(), V._replace(support_y=normal(T, S, 2), query_y=normal(T, Q, 2))),
        ValueError, ("mse_loss of predictions of shape [6, 1] and targets of shape [6, 2] for each task", "expand_as"),
    ),
    "one of several outputs": Mistake(
        whole(MAML(Returns(lambda out: (out, out)), lambda out, y: (out[0] - y).abs().mean()), flat(V)),
        ValueError, UNSQUEEZE,
    ),
    "logits and targets without an axis": Mistake(
        whole(regressor(F.binary_cross_entropy_with_logits), flat(V)),
        ValueError, ("[6, 1]", "[6]", "Give both one shape"),
    ),
    "predictions without an axis": Mistake(
        whole(MAML(nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)), F.mse_loss), V),
        ValueError, ("predictions of shape [6] and targets of shape [6, 1]", "out.unsqueeze(-1)", "y.squeeze(-1)"),
    ),
    # sets
    "empty support sets": Mistake(
        whole(regressor(), values(support=0)),
        ValueError, ("support set needs at least one point", "support_x [4, 0, 1]"),
    ),
    "empty query sets": Mistake(
        whole(regressor(), values(query=0)), ValueError, ("query set needs at least one point", "query_x [4, 0, 1]")
    ),
    "no tasks": Mistake(whole(regressor(), values(tasks=0)), ValueError, ("at least one task",)),
    "other tasks in the query sets": Mistake(
        whole(regressor(), V._replace(query_x=V.query_x[:2], query_y=V.query_y[:2])),
        ValueError, ("same tasks", "support sets of 4 tasks, query sets of 2"),
    ),
    "targets of fewer tasks": Mistake(
        whole(regressor(), V._replace(query_y=V.query_y[:2])),
        ValueError, ("query_x and query_y", "[4, 3, 1] and [2, 3, 1]"),
    ),
    "targets of fewer points": Mistake(
        whole(regressor(), V._replace(support_y=V.support_y[:, :1])),
        ValueError, ("support_x and support_y", "[T, S, ...]", "[4, 6, 1] and [4, 1, 1]"),
    ),
    "points without an axis": Mistake(
        whole(regressor(), V._replace(query_x=V.query_x[:, 0, 0])), ValueError, ("query_x must have shape [T, N", "[4]")
    ),
    "ids of fewer tasks": Mistake(
        whole(regressor(), V._replace(task_ids=torch.arange(3))), ValueError, ("same tasks", "task_ids 3")
    ),
    "ids in a list": Mistake(
        whole(regressor(), V._replace(task_ids=[0, 1, 2, 3])), TypeError, ("task_ids must be a tensor [T]", "list of 4")
    ),
    # what is no batch
    "a tuple": Mistake(
        whole(regressor(), tuple(V)[:4]),
        TypeError, ("metamom.TaskBatch(support_x", "a tuple of 4", "TaskBatch(*batch)"),
    ),
    "a list": Mistake(
        lambda: regressor().losses(list(V)),
        TypeError, ("TaskBatch", "a list of 5", "TaskBatch(*batch)"),
    ),
    "a tensor": Mistake(lambda: regressor().meta_gradient(V.query_x), TypeError, ("got a tensor [4, 3, 1]",)),
    "nothing": Mistake(lambda: regressor().backward(None), TypeError, ("TaskBatch", "got None")),
    "arrays": Mistake(
        whole(regressor(), TaskBatch(*(x.numpy() for x in V[:4]))),
        TypeError, ("support_x must be a tensor", "as_tensor"),
    ),
    # inputs that the model cannot take
    "features": Mistake(
        whole(regressor(), values(3)), ValueError, (INPUTS + "3]", LINEAR + "3]", "Give support_x and query_x")
    ),
    "features of adapt": Mistake(
        lambda: regressor().adapt(normal(T, S, 3), normal(T, S, 1)), ValueError, (INPUTS + "3]", LINEAR + "3]")
    ),
    "features deep inside": Mistake(
        whole(MAML(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)), F.mse_loss),
              V._replace(support_x=normal(T, S, 1, 6, 6), query_x=normal(T, Q, 1, 6, 6))),
        ValueError, ("inputs of shape [6, 1, 6, 6]", "in module '2', Linear(in_features=8", "which got [6, 32]"),
    ),
    "channels": Mistake(
        whole(MAML(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 1)), F.mse_loss),
              V._replace(support_x=normal(T, S, 3, 3, 3), query_x=normal(T, Q, 3, 3, 3))),
        ValueError, ("inputs of shape [6, 3, 3, 3]", "in module '0', Conv2d(1, 2", "which got [6, 3, 3, 3]"),
    ),
    "words beyond a table": Mistake(
        whole(embedder(), V._replace(support_x=torch.full((T, S, 1), 12))),
        ValueError,
        ("in module '0', Embedding(10, 3), which got [6, 1]: index 12 is out of bounds", "must be in 0..n-1"),
    ),
    "words below a table": Mistake(
        whole(embedder(), V._replace(query_x=torch.full((T, Q, 1), -1), support_x=torch.zeros(T, S, 1).long())),
        ValueError,
        ("Embedding(10, 3)", "index -1 is out of bounds", "must be in 0..n-1"),
    ),
    **{
        f"numbers beyond a table, {name}": Mistake(
            whole(MAML(Table(look_up), F.mse_loss), V._replace(support_x=torch.full((T, S, 1), 12))),
            ValueError, ("the model cannot take inputs of shape [6, 1]", said, "must be in 0..n-1"),
        )
        for name, look_up, said in (
            ("as an index", lambda table, x: table[x[:, 0].long()], "index 12 is out of bounds"),
            ("to take", lambda table, x: torch.take(table, x.long()), "tried to access index 12"),
            ("to select", lambda table, x: table.index_select(0, x[:, 0].long()), "index 12 is out of bounds"),
        )
    },
    **{
        f"words beyond a bag's table, {mode}": Mistake(
            whole(MAML(Bags(mode=mode), F.mse_loss), V._replace(support_x=torch.full((T, S, 3), 12))),
            ValueError, ("in module 'words', EmbeddingBag(10, 1", "12", "must be in 0..n-1"),
        )
        for mode in ("sum", "mean", "max")
    },
    "sparse gradients": Mistake(
        whole(MAML(Bags(mode="sum", sparse=True), F.mse_loss), V._replace(support_x=torch.ones(T, S, 3).long())),
        ValueError, ("sparse gradients in 'words' (EmbeddingBag), which PyTorch does not batch", "set sparse=False."),
    ),
    **{
        f"a checkpoint, {use_reentrant}": Mistake(
            whole(MAML(Checkpointed(use_reentrant=use_reentrant), F.mse_loss), V),
            ValueError, ("torch.utils.checkpoint runs a part of the model", "Remove checkpoint(); chunk_size="),
        )
        for use_reentrant in (False, True)
    },
    "a checkpoint in the loss": Mistake(
        whole(regressor(lambda p, y: checkpoint(F.mse_loss, p, y, use_reentrant=False)), V),
        ValueError, ("or of the loss again", "Remove checkpoint(); chunk_size="),
    ),
    "an axis that is not there": Mistake(
        whole(MAML(Table(lambda table, x: (x * table[0]).sum(5)), F.mse_loss), V),
        ValueError, ("Dimension out of range", "Give support_x and query_x the shape"),
    ),
    "complex weights": Mistake(
        whole(MAML(nn.Linear(1, 1, dtype=torch.complex64), lambda p, y: (p - y).abs().mean()), V),
        ValueError, ("The weights are torch.complex64: convert the inputs, x.to(torch.complex64), or the model",),
    ),
    "complex inputs": Mistake(
        whole(regressor(), V._replace(support_x=torch.complex(V.support_x, V.support_x))),
        ValueError, ("The weights are torch.float32: convert the inputs", "model.to(torch.complex64)"),
    ),
    "a model's own error": Mistake(
        whole(MAML(Conv4(3), F.cross_entropy), classes()), ValueError, ("Conv4 wants images [N, 1, height, width]",)
    ),
    "float64": Mistake(
        whole(regressor(), V.to(dtype=torch.float64)),
        ValueError, (INPUTS + "1] of torch.float64", LINEAR, "batch.to(dtype=torch.float32)"),
    ),
    "whole numbers": Mistake(
        whole(regressor(), V._replace(support_x=V.support_x.long())), ValueError, ("torch.int64", "x.to(torch.float32)")
    ),
    # numbers
    "no workers": Mistake(
        lambda: regressor().backward(V, workers=0), ValueError, ("the number of workers must be >= 1; got 0.",)
    ),
    "no workers of a meta-gradient": Mistake(
        lambda: regressor().meta_gradient(V, 0), ValueError, ("the number of workers must be >= 1; got 0.",)
    ),
    "fewer workers than none": Mistake(lambda: V.split(-2), ValueError, ("must be >= 1; got -2",)),
    "parts of a worker": Mistake(lambda: V.split(1.5), TypeError, ("workers (or processes) must be a whole number",)),
    "workers that do not divide": Mistake(
        lambda: regressor().backward(V, workers=3), ValueError, ("equal blocks", "that 3 divides, got 4", "6 tasks")
    ),
    "half steps": Mistake(
        lambda: regressor().adapt(V.support_x, V.support_y, steps=2.5),
        TypeError, ("inner steps", "whole number", "2.5"),
    ),
    "steps that are true": Mistake(
        lambda: regressor().adapt(V.support_x, V.support_y, steps=True), TypeError, ("whole number; got True",)
    ),
    "steps in words": Mistake(
        lambda: regressor().trajectory(V.support_x, V.support_y, steps="3"), TypeError, ("whole number; got '3'",)
    ),
    "half inner steps": Mistake(lambda: regressor(inner_steps=2.5), TypeError, ("inner_steps must be a whole", "2.5")),
    "inner steps that are true": Mistake(lambda: regressor(inner_steps=True), TypeError, ("inner_steps", "got True")),
    "no inner steps": Mistake(lambda: regressor(inner_steps=-1), ValueError, ("inner_steps must be >= 1; got -1",)),
    "a step size in words": Mistake(lambda: regressor(inner_lr="0.1"), TypeError, ("inner_lr of 0.", "got '0.1'")),
    "no step size": Mistake(lambda: regressor(inner_lr=None), TypeError, ("inner_lr of 0.", "got None")),
    "a step size that is true": Mistake(lambda: regressor(inner_lr=True), TypeError, ("inner_lr of 0.", "got True")),
    "an empty set to adapt to": Mistake(
        lambda: regressor().adapt(V.support_x[:, :0], V.support_y[:, :0]), ValueError, ("at least one point a task",)
    ),
    # models, losses, aggregates
    "a class of models": Mistake(
        lambda: MAML(nn.Linear, F.mse_loss),
        TypeError, ("Linear(...)", "class Linear itself"),
    ),
    "a function": Mistake(lambda: MAML(torch.tanh, F.mse_loss), TypeError, ("torch.nn.Module", "builtin_function")),
    "no parameters": Mistake(lambda: MAML(nn.Tanh(), F.mse_loss), ValueError, ("trainable", "Tanh, it has no param")),
    "frozen parameters": Mistake(
        lambda: MAML(nn.Linear(1, 1).requires_grad_(False), F.mse_loss),
        ValueError, ("trainable", "all of its 2 are frozen"),
    ),
    "parameters to come": Mistake(
        lambda: MAML(nn.LazyLinear(1), F.mse_loss),
        ValueError, ("without a shape yet: weight, bias", "Call the model once"),
    ),
    "no loss": Mistake(lambda: regressor(None), TypeError, ("loss_fn is a function", "mse_loss", "got None")),
    "the name of a loss": Mistake(lambda: regressor("mse"), TypeError, ("loss_fn is a function", "'mse'")),
    "a class of losses": Mistake(lambda: regressor(nn.MSELoss), TypeError, ("nn.MSELoss()", "MSELoss'>")),
    "a loss that is a number": Mistake(whole(regressor(lambda p, y: 1.5), V), TypeError, (*ONE_LOSS[:1], "a float")),
    "no loss at all": Mistake(whole(regressor(lambda p, y: None), V), TypeError, ONE_LOSS),
    "several losses": Mistake(whole(regressor(lambda p, y: (p.mean(), 1)), V), TypeError, ("0-d tensor", "a tuple")),
    "a loss of each point": Mistake(
        whole(regressor(nn.MSELoss(reduction="none")), V), ValueError, ("one number a task", "(6, 1)")
    ),
    "two outputs": Mistake(
        whole(MAML(Returns(lambda out: (out, out)), F.mse_loss), V), TypeError, ("returns a tuple", A_TENSOR)
    ),
    "outputs by name": Mistake(
        whole(MAML(Returns(lambda out: {"logits": out}), lambda out, y: F.mse_loss(out["logits"], y)), V),
        TypeError, ("returns a dict", A_TENSOR, "out['logits']"),
    ),
    "no output": Mistake(whole(MAML(Returns(lambda out: None), F.mse_loss), V), TypeError, ("a tensor", "got None")),
    "an output that is a number": Mistake(
        whole(MAML(Returns(lambda out: 1.0), F.mse_loss), V), TypeError, ("Returns must return a tensor", "a float")
    ),
    "an aggregate that is a number": Mistake(
        lambda: regressor().backward(V, aggregate=3), TypeError, ("mean, median, geomedian", "got 3")
    ),
    "no aggregate": Mistake(
        lambda: regressor().backward(V, aggregate=None),
        TypeError, ("aggregate is a name", "None"),
    ),
    "a bias that is a number": Mistake(lambda: regressor().backward(V, bias=3), TypeError, ("a bias is", "got 3")),
    "a class of operators": Mistake(lambda: regressor().backward(V, bias=TopK), TypeError, ("TopK(...)", "class TopK")),
    # prediction
    "weights of other tasks": Mistake(
        lambda: (made := regressor()).predict(made.adapt(V.support_x, V.support_y), V.query_x[:2]),
        ValueError, ("inputs of 2 tasks", "as adapt returns them", "[2, 8, 1] for 0.weight; got [4, 8, 1]"),
    ),
    "weights of no task": Mistake(
        lambda: (made := regressor()).predict(dict(made.model.named_parameters()), V.query_x),
        ValueError, ("inputs of 4 tasks", "[4, 8, 1] for 0.weight; got [8, 1]"),
    ),
    "weights of another model": Mistake(
        lambda: regressor().predict({"head": normal(T, 1)}, V.query_x),
        ValueError, ("no parameters ['head']", "0.weight"),
    ),
    "weights in a list": Mistake(lambda: regressor().predict([V.query_x], V.query_x), TypeError, ("by name", "a list")),
    "an array to predict of": Mistake(
        lambda: regressor().predict({}, V.query_x.numpy()), TypeError, ("x must be a tensor [T, N, ...]", "as_tensor")
    ),
    # evaluation
    "half a task": Mistake(lambda: evaluate(regressor(), Sinusoid(), tasks=2.5), TypeError, ("tasks must be a whole",)),
    "evaluation after half steps": Mistake(
        lambda: evaluate(regressor(), Sinusoid(), steps=(0, 2.5)), TypeError, ("inner steps must be a whole", "2.5")
    ),
    "confidence in words": Mistake(
        lambda: evaluate(regressor(), Sinusoid(), confidence="95 %"), TypeError, ("confidence must be", "'95 %'")
    ),
    "one number of steps": Mistake(
        lambda: evaluate(regressor(), Sinusoid(), steps=3), TypeError, ("steps=(0, 1, 5)", "got 3")
    ),
    "a model for a learner": Mistake(
        lambda: evaluate(nn.Linear(1, 1), Sinusoid()), TypeError, ("MAML(model, loss_fn, ...)", "got a Linear")
    ),
    "batches that are tuples": Mistake(
        lambda: evaluate(regressor(), Batches(tuple(V)), tasks=T), TypeError, ("TaskBatch", "tuple")
    ),
    "fewer tasks than asked for": Mistake(
        lambda: evaluate(regressor(), Batches(V), tasks=7), ValueError, ("gave 4 tasks", "wanted 7")
    ),
    "a loss that draws": Mistake(
        whole(regressor(lambda p, y: F.mse_loss(F.dropout(p, 0.5), y)), V),
        ValueError, ("loss_fn cannot run on all tasks at once", "Draw in the model's forward"),
    ),
    "a model that draws in place": Mistake(
        whole(MAML(Returns(lambda out: out + torch.empty(len(out), 1).normal_()), F.mse_loss), V),
        ValueError, ("in Returns itself", ". Draw in the model's forward by functions that return a new tensor"),
    ),
    "a loss that looks at values": Mistake(
        whole(regressor(lambda p, y: p.mean() if (p > y).all() else y.mean() - p.mean()), V),
        ValueError, ("loss_fn cannot run on all tasks at once", ". The loss is taken of all tasks at once"),
    ),
    "targets without an axis in an evaluation": Mistake(
        lambda: evaluate(regressor(), Batches(flat(V)), tasks=T),
        ValueError, ("predictions of shape [3, 1] and targets of shape [3]", "y.unsqueeze(-1)"),
    ),
    "labels out of range in an evaluation": Mistake(
        lambda: evaluate(classifier(2), Batches(classes()), tasks=T), ValueError, ("2 outputs (ways)", "they are 0..2")
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, error, parts = MISTAKES[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    said, at = str(caught.value), 0
    for part in parts:
        assert part in said[at:], f"{part!r} is missing in: {said[at:]}"
        at = said.index(part, at) + len(part)


# NaN: in the data, or made by training


def nan_in(field: str, batch: TaskBatch = V) -> TaskBatch:
    x = getattr(batch, field).clone()
    x[2, 1] = math.nan
    x[3, 0] = math.inf
    return batch._replace(**{field: x})


@pytest.mark.parametrize("bias", [None, TopK(3)])
@pytest.mark.parametrize("field", TaskBatch._fields[:4])
def test_data_that_is_not_finite_is_named(field, bias):
    points = S if field.startswith("support") else Q
    learner = regressor()
    with pytest.raises(NonFiniteDataError, match=rf"{field} holds 2 of {4 * points}, the first in task 2\. Clean"):
        learner.backward(nan_in(field), bias=bias)
    assert all(p.grad is None for p in learner.parameters())


def test_every_field_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteDataError, match=r"support_x holds 2 of 24, .*; query_y holds 2 of 12, "):
        regressor().backward(nan_in("support_x", nan_in("query_y")))


def test_a_step_with_such_data_is_named_in_training():
    class FromStep3:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            return nan_in("query_x") if step == 3 else V

    learner = regressor()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    with pytest.raises(
        NonFiniteDataError, match=r"step 3: the result is not finite, and neither is the data: .*query_x"
    ):
        train(learner, optimizer, FromStep3(), iterations=5, meta_batch=T)


def test_nan_that_training_made_is_not_blamed_on_the_data():
    learner = regressor()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e20)
    with pytest.raises(DivergedError, match="Try a smaller lr"):
        train(learner, optimizer, Batches(V), iterations=20, meta_batch=T)
    with torch.no_grad():
        learner.model[0].weight[0] = math.inf
    assert not math.isfinite(learner.backward(V).loss)


def test_an_evaluation_names_the_data_too():
    with pytest.raises(NonFiniteDataError, match="query_x holds 2 of 12, the first in task 2"):
        evaluate(regressor(), Batches(nan_in("query_x")), tasks=T)
    bad = nan_in("query_x", classes())
    with pytest.raises(NonFiniteDataError, match="query_x holds 4 of 48, the first in task 2"):
        evaluate(classifier(), Batches(bad), tasks=T)


def test_labels_of_which_none_counts_are_named():
    batch = classes()
    y = batch.query_y.clone()
    y[2] = -100
    bad = batch._replace(query_y=y)
    said = r"not finite: all labels of query_y are -100 in 1 of 4 tasks, the first is task 2\. .* nothing left"
    for call in (lambda: classifier().backward(bad), lambda: evaluate(classifier(), Batches(bad), tasks=T)):
        with pytest.raises(NonFiniteDataError, match=said):
            call()
    # a task that has nothing to adapt to stays where it is, and a sum of nothing is zero
    assert math.isfinite(classifier().backward(batch._replace(support_y=y)).loss)
    summed = classifier(loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    found = summed.backward(bad)
    assert math.isfinite(found.loss)
    *_, adapted = summed.trajectory(bad.support_x, bad.support_y, steps=1)
    _, each = summed.judge(adapted, summed.predict(adapted, bad.query_x), bad.query_y)
    assert each.isnan().tolist() == [False, False, True, False]
    assert found.metrics["accuracy"] == pytest.approx(float(each[~each.isnan()].mean()))  # of those that have labels
    nothing = batch._replace(query_y=torch.full_like(y, -100))
    assert summed.backward(nothing).metrics["accuracy"] is None


def test_nan_that_a_loss_masks_is_fine():
    """Targets that are missing."""

    def masked(p: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.isnan(), 0.0, p - y.nan_to_num()).pow(2).mean()

    batch = V._replace(query_y=V.query_y.index_fill(1, torch.tensor([1]), math.nan))
    assert math.isfinite(regressor(masked).backward(batch).loss)


# compiled learners answer alike


@pytest.mark.parametrize("name", ["labels too large", "features", "targets without an axis", "float64", "two outputs"])
def test_a_compiled_learner_says_the_same(name, traced):
    make, batch = {
        "labels too large": (classifier, classes()._replace(query_y=classes().query_y + 4)),
        "features": (regressor, values(3)),
        "targets without an axis": (regressor, flat(V)),
        "float64": (regressor, V.to(dtype=torch.float64)),
        "two outputs": (lambda **options: MAML(Returns(lambda out: (out, out)), F.mse_loss, **options), V),
    }[name]
    said = []
    for options in ({}, {"compile": True}):
        with pytest.raises((ValueError, TypeError)) as caught:
            make(**options).backward(batch)
        # but for torch's own words, which count the tasks that run at a time
        said.append((type(caught.value), str(caught.value).partition(": Expected size")[0]))
    assert said[0] == said[1]


def test_a_graph_that_fails_says_what_the_eager_one_says(traced):
    """Labels that go wrong once it is compiled."""
    learner, batch = classifier(compile=True), classes()
    learner.backward(batch)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2; they are 1\.\.3"):
        learner.backward(batch._replace(query_y=batch.query_y + 1))
    learner.backward(batch)
    assert len(traced) == 1
    words = V._replace(support_x=torch.zeros(T, S, 1).long(), query_x=torch.zeros(T, Q, 1).long())
    learner = embedder(compile=True)
    learner.backward(words)
    with pytest.raises(ValueError, match=r"index 12 is out of bounds.*must be in 0\.\.n-1"):
        learner.backward(words._replace(query_x=words.query_x + 12))


# models that are wrapped for several processes


def test_data_parallel_is_refused():
    for model in (nn.DataParallel(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.DataParallel(nn.Linear(1, 1)))):
        with pytest.raises(ValueError, match=r"\(DataParallel\).*\.module.*backward\(batch, world=world\)"):
            MAML(model, F.mse_loss)


def say_of_wrapped_models() -> None:
    """What MAML says of models that torch has wrapped."""
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard

    with start(timeout=60):
        mesh, cpu = init_device_mesh("cpu", (1,)), torch.device("cpu")
        for model in (
            nn.parallel.DistributedDataParallel(nn.Linear(1, 1)),
            nn.Sequential(nn.Linear(1, 1), nn.parallel.DistributedDataParallel(nn.Linear(1, 1))),
            FullyShardedDataParallel(nn.Linear(1, 1), device_id=cpu),
            fully_shard(nn.Linear(1, 1), mesh=mesh),
            fully_shard(nn.Sequential(nn.Linear(1, 1)), mesh=mesh)[0],  # whose parameters alone show it
            replicate(nn.Linear(1, 1)),
        ):
            try:
                MAML(model, F.mse_loss)
            except ValueError as error:
                print(error)


@pytest.mark.filterwarnings("ignore")
def test_models_wrapped_for_processes_are_refused(tmp_path):
    ((status, said),) = run_forked(say_of_wrapped_models, 1, tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("MAML takes derivatives of the model itself")]
    assert status == 0, said
    found = [line.partition("found ")[2].partition(". Pass")[0] for line in lines]
    assert found == [
        "the model (DistributedDataParallel)",
        "1 (DistributedDataParallel)",
        "the model (FullyShardedDataParallel)",
        "the model (FSDPLinear), weight, bias",
        "weight, bias",
        "the model (DDPLinear)",
    ], said
    assert all("world=world" in line for line in lines)


def test_another_device_is_named():
    """A tensor without data stands for one on a GPU."""
    there = V.query_x.to("meta")
    model = nn.Sequential(nn.Linear(1, 1))
    said = r"inputs are on meta, the weights on cpu: use batch\.to\('cpu'\)"
    with pytest.raises(ValueError, match=said), inputs_explained(model, there, dict(model.named_parameters())):
        torch.ones(2) + torch.ones(3)  # an error of torch's, whichever
    said = "Targets are on meta, predictions on cpu: move the batch"
    with pytest.raises(ValueError, match=said), targets_explained(V.query_y, there):
        torch.ones(2) + torch.ones(3)  # an error of torch's, whichever


def test_an_assertion_on_a_gpu_says_what_it_may_be():
    """Which comes at any time after the label that it is about."""

    class Lost:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def lost(g: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    for call in (lambda: regressor().backward(V, bias=lost), lambda: evaluate(regressor(), Lost(), tasks=T)):
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.C-1.*run this batch on the CPU"):
            call()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
        ValueError("my own words"),
        RuntimeError("my own words"),
        IndexError("my own index 3 is out of bounds"),
        KeyError("name"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["model", "loss"])
def test_errors_of_other_kinds_pass_unchanged(error, place):
    def fail(*args: Any) -> Any:
        raise error

    learner = MAML(Returns(fail), F.mse_loss) if place == "model" else regressor(fail)
    with pytest.raises(type(error)) as caught:
        learner.backward(V)
    assert caught.value is error


@pytest.mark.parametrize("place", ["model", "loss"])
def test_the_index_of_a_list_passes_unchanged(place):
    def fail(*args: Any) -> Any:
        return list(args)[3]

    learner = MAML(Returns(fail), F.mse_loss) if place == "model" else regressor(fail)
    with pytest.raises(IndexError, match=r"^list index out of range$"):
        learner.backward(V)


# what must go on working


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_labels_of_other_widths(kind):
    batch = classes()
    expected = classifier_of_one_seed().meta_gradient(batch)
    other = batch._replace(support_y=batch.support_y.to(kind), query_y=batch.query_y.to(kind))
    found = classifier_of_one_seed().meta_gradient(other)
    assert torch.equal(found.losses, expected.losses)
    assert classifier_of_one_seed().backward(other).metrics == classifier_of_one_seed().backward(batch).metrics


def classifier_of_one_seed() -> MAML:
    made = classifier()
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return made


class Casts(nn.Module):
    """A model that takes whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


@pytest.mark.parametrize(
    ("learner", "batch"),
    [
        (MAML(Casts(), F.mse_loss), V._replace(support_x=V.support_x.double(), query_x=V.query_x.long())),
        (MAML(nn.Linear(1, 1).half(), F.mse_loss), V.to(dtype=torch.float16)),
        (MAML(nn.Linear(1, 1).bfloat16(), F.mse_loss), V.to(dtype=torch.bfloat16)),
        (MAML(nn.Linear(1, 1), F.mse_loss), V._replace(query_y=V.query_y.double())),
        (regressor(lambda p, y: F.mse_loss(p.squeeze(-1), y)), flat(V)),
        (regressor(lambda p, y: (p.squeeze(-1) - y).abs().mean()), flat(V)),
        (regressor(lambda p, y: F.mse_loss(p, y[:, None])), flat(V)),
        (regressor(lambda p, y: (p[:, None] - y[None]).pow(2).min(1).values.mean()), V),  # all pairs, as is meant
        (MAML(nn.Sequential(nn.Linear(1, 6), nn.Unflatten(1, (3, 2))),
              lambda p, y: ((p[:, :, None] - y[:, None]) ** 2).sum(-1).min(-1).values.mean()),  # between sets of points
         V._replace(support_y=normal(T, S, 7, 2), query_y=normal(T, Q, 7, 2))),
        (MAML(nn.Sequential(nn.Linear(1, 6), nn.Unflatten(1, (3, 2))),
              lambda p, y: (p.unsqueeze(2).expand(-1, -1, 7, -1) - y.unsqueeze(1)).square().sum(-1).mean()),
         V._replace(support_y=normal(T, S, 7, 2), query_y=normal(T, Q, 7, 2))),
        (MAML(nn.Linear(1, 4), lambda p, y: (p - y).abs().mean() - (p[:, :, None] - p[:, None]).abs().mean()), V),
        (MAML(nn.Linear(1, 2), lambda p, y: -Normal(p[:, :1], p[:, 1:].exp()).log_prob(y).mean()), V),
        (regressor(lambda p, y: F.mse_loss(p.expand_as(y), y)),
         V._replace(support_y=normal(T, S, 2), query_y=normal(T, Q, 2))),  # one prediction of several targets
        (regressor(lambda p, y: ((p[1:] - p[:-1]) - (y[1:] - y[:-1])).abs().mean()), V),
        (regressor(lambda p, y: F.relu(1 - (p - p.T) * (y - y.T).sign()).mean()), V),  # ranks
        (regressor(lambda p, y: (p - p.mean(0)).pow(2).mean() + F.mse_loss(p.squeeze(-1), y)), flat(V)),
        (MAML(nn.Linear(1, 3), lambda p, y: torch.maximum(0.1 * (y - p), 0.9 * (p - y)).mean()), V),  # 3 quantiles
        (classifier(5), classes(3)),  # more outputs than ways
        (embedder(), V._replace(support_x=torch.full((T, S, 1), 9), query_x=torch.zeros(T, Q, 1).int())),
        (regressor(), values(support=1, query=1)),
        (regressor(), values(tasks=1)),
        (regressor(), V._replace(task_ids=torch.tensor([3, 3, 3, 3]))),
        (MAML(nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1).requires_grad_(False)), F.mse_loss), V),
        (regressor(inner_steps=np.int64(2), inner_lr=np.float32(0.1)), V),
        (classifier(loss_fn=nn.CrossEntropyLoss(weight=torch.ones(3))), classes()),
    ],
)  # fmt: skip
def test_calls_that_are_fine(learner, batch):
    assert math.isfinite(learner.backward(batch).loss)


def test_a_loss_that_changes_is_watched_where_it_fails():
    """It runs as it is once it has been found fine."""

    def loss_fn(p: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(p, y) if not late else F.gaussian_nll_loss(p, y, torch.ones_like(p))

    late, learner = False, regressor(loss_fn)
    first = learner.losses(V)
    assert torch.equal(learner.losses(V), first)
    late = True
    assert math.isfinite(learner.backward(V).loss)


def test_outputs_that_the_loss_takes_apart_have_losses():
    learner = MAML(Returns(lambda out: {"logits": out}), lambda out, y: F.mse_loss(out["logits"], y))
    plain = MAML(learner.model.layer, F.mse_loss)
    torch.testing.assert_close(learner.losses(V), plain.losses(V))
    assert set(learner.predict(learner.adapt(V.support_x, V.support_y), V.query_x)) == {"logits"}
    ours, theirs = (evaluate(each, Batches(V), tasks=T, steps=(0, 1)) for each in (learner, plain))
    torch.testing.assert_close(ours.values, theirs.values)


def test_whole_numbers_of_numpy():
    learner = regressor()
    assert torch.equal(
        learner.meta_gradient(V, workers=np.int64(2)).grads["0.bias"],
        learner.meta_gradient(V, workers=2).grads["0.bias"],
    )
    learner.backward(V, workers=np.int32(2))
    adapted = learner.adapt(V.support_x, V.support_y, steps=np.int64(2))
    assert learner.predict(adapted, V.query_x).shape == (T, Q, 1)
    assert evaluate(learner, Batches(V), tasks=np.int64(T), steps=np.arange(2)).steps == (0, 1)


def test_no_step_needs_no_points():
    learner = regressor()
    adapted = learner.adapt(V.support_x[:, :0], V.support_y[:, :0], steps=0)
    torch.testing.assert_close(learner.predict(adapted, V.query_x), learner.model(V.query_x))
