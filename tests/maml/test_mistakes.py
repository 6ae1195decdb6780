"""Mistakes in data, models and losses: the error says what was wanted, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from mistakes import (
    Bags,
    Batches,
    Checkpointed,
    Q,
    Returns,
    S,
    T,
    Table,
    V,
    classes,
    classifier,
    embedder,
    flat,
    labels,
    normal,
    regressor,
    values,
)
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metamom import MAML, TaskBatch, TopK, evaluate
from metamom.maml.vmap_errors import VmapError
from metamom.nets.models import Conv4
from metamom.tasks import Sinusoid


class Mistake(NamedTuple):
    """A wrong call, the kind of error, and parts of its message in their order."""

    call: Callable[[], object]
    error: type[Exception]
    parts: tuple[str, ...]


def at_once(learner: MAML) -> MAML:
    learner.vectorize = "vmap"
    return learner


def whole(learner: MAML, batch: TaskBatch) -> Callable[[], object]:
    return lambda: learner.backward(batch)


INPUTS = "the model cannot take inputs of shape [6, "


LINEAR = "in module '0', Linear(in_features=1, out_features=8, bias=True), which got [6, "


UNSQUEEZE = ("shape [6, 1] and targets of shape [6] for each task", "y.unsqueeze(-1)", "out.squeeze(-1)")


ONE_LOSS = ("loss_fn must return a differentiable 0-d tensor", "without float() or .item()")


A_TENSOR = "where one tensor of predictions [N, ...] is wanted. Wrap it in a module that returns that tensor alone"


def of_one_point() -> object:
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    one = V._replace(support_x=V.support_x[:, :1], support_y=V.support_y[:, :1])
    return MAML(model, F.mse_loss).backward(one)


MISTAKES = {
    "one point to normalise": Mistake(
        of_one_point, ValueError, ("module '1', BatchNorm1d", "more points", 'norm="frozen"', "GroupNorm")
    ),
    # labels and targets
    "labels too large": Mistake(
        labels(lambda y: y + 4), ValueError, ("3 outputs (ways)", "must be in 0..2; got 4..6", "from 0")
    ),
    "labels from 1": Mistake(labels(lambda y: y + 1), ValueError, ("labels must be in 0..2; got 1..3",)),
    "labels below 0": Mistake(labels(lambda y: y - 1), ValueError, ("labels must be in 0..2; got -1..1",)),
    "more ways than outputs": Mistake(
        whole(classifier(2), classes()), ValueError, ("2 outputs (ways)", "0..1; got 0..2", "more outputs")
    ),
    "labels too large for one-hot vectors": Mistake(
        labels(lambda y: y + 1, loss_fn=lambda p, y: F.mse_loss(p, F.one_hot(y, p.shape[1]).to(p.dtype))),
        ValueError,
        ("index 3 is out of bounds", "labels must be in 0..2; got 1..3"),
    ),
    **{
        f"labels too large, {name}": Mistake(
            labels(lambda y: y + 1, loss_fn=loss), ValueError,
            ("loss_fn cannot take", "index 3 is out of bounds", "labels must be in 0..2; got 1..3"),
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
        ValueError, ("of tensor", "Both have the same shape and dtype", "its weight"),
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
            ("several outputs", 3, "[6, 1]", F.mse_loss, "mse_loss of", "the same shape, if need be by expand_as"),
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
        ValueError, ("[6, 1]", "[6]", "Give both the same shape"),
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
        TypeError, ("TaskBatch", "a list of 7", "TaskBatch(*batch)"),
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
    **{
        f"a checkpoint, {use_reentrant}": Mistake(
            whole(at_once(MAML(Checkpointed(use_reentrant=use_reentrant), F.mse_loss)), V),
            VmapError, ("torch.utils.checkpoint runs a part of the model", "Remove checkpoint(); chunk_size="),
        )
        for use_reentrant in (False, True)
    },
    "a checkpoint in the loss": Mistake(
        whole(at_once(regressor(lambda p, y: checkpoint(F.mse_loss, p, y, use_reentrant=False))), V),
        VmapError, ("or of the loss again", "Remove checkpoint(); chunk_size="),
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
        lambda: regressor().backward(V, workers=3), ValueError, ("equal blocks", "a multiple of 3; got 4", "6 tasks")
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
        lambda: regressor().adapt(V.support_x[:, :0], V.support_y[:, :0]), ValueError, ("at least one point per task",)
    ),
    # models, losses, aggregates
    "a class of models": Mistake(
        lambda: MAML(nn.Linear, F.mse_loss),
        TypeError, ("Linear(...)", "class Linear itself"),
    ),
    "a function": Mistake(lambda: MAML(torch.tanh, F.mse_loss), TypeError, ("torch.nn.Module", "builtin_function")),
    "no parameters": Mistake(lambda: MAML(nn.Tanh(), F.mse_loss), ValueError, ("trainable", "Tanh: it has no param")),
    "frozen parameters": Mistake(
        lambda: MAML(nn.Linear(1, 1).requires_grad_(False), F.mse_loss),
        ValueError, ("trainable", "all 2 of its parameters are frozen"),
    ),
    "parameters to come": Mistake(
        lambda: MAML(nn.LazyLinear(1), F.mse_loss),
        ValueError, ("without a shape yet: weight, bias", "Call the model once"),
    ),
    "no loss": Mistake(lambda: regressor(None), TypeError, ("loss_fn must be a function", "mse_loss", "got None")),
    "the name of a loss": Mistake(lambda: regressor("mse"), TypeError, ("loss_fn must be a function", "'mse'")),
    "a class of losses": Mistake(lambda: regressor(nn.MSELoss), TypeError, ("nn.MSELoss()", "MSELoss'>")),
    "a loss that is a number": Mistake(whole(regressor(lambda p, y: 1.5), V), TypeError, (*ONE_LOSS[:1], "a float")),
    "no loss at all": Mistake(whole(regressor(lambda p, y: None), V), TypeError, ONE_LOSS),
    "several losses": Mistake(whole(regressor(lambda p, y: (p.mean(), 1)), V), TypeError, ("0-d tensor", "a tuple")),
    "a loss of each point": Mistake(
        whole(regressor(nn.MSELoss(reduction="none")), V), ValueError, ("one number per task", "(6, 1)")
    ),
    "two outputs": Mistake(
        whole(MAML(Returns(lambda out: (out, out)), F.mse_loss), V), TypeError, ("returns a tuple", A_TENSOR)
    ),
    "outputs by name": Mistake(
        whole(MAML(Returns(lambda out: {"logits": out}), F.mse_loss), V),
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
        lambda: evaluate(regressor(), Batches(V), tasks=7), ValueError, ("returned 4 tasks", "wanted 7")
    ),
    "a loss that draws": Mistake(
        whole(regressor(lambda p, y: F.mse_loss(F.dropout(p, 0.5), y)), V),
        ValueError, ("loss_fn cannot run on all tasks at once", "In the model's forward, draw"),
    ),
    "a model that draws in place": Mistake(
        whole(at_once(MAML(Returns(lambda out: out + torch.empty(len(out), 1).normal_()), F.mse_loss)), V),
        VmapError, ("in Returns itself", ". In the model's forward, draw with functions that return a new tensor"),
    ),
    "a loss that looks at values": Mistake(
        whole(at_once(regressor(lambda p, y: p.mean() if (p > y).all() else y.mean() - p.mean())), V),
        VmapError, ("loss_fn cannot run on all tasks at once", ". The loss is computed for all tasks at once"),
    ),
    "targets without an axis in an evaluation": Mistake(
        lambda: evaluate(regressor(), Batches(flat(V)), tasks=T),
        ValueError, ("predictions of shape [3, 1] and targets of shape [3]", "y.unsqueeze(-1)"),
    ),
    "labels out of range in an evaluation": Mistake(
        lambda: evaluate(classifier(2), Batches(classes()), tasks=T), ValueError, ("2 outputs (ways)", "got 0..2")
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
