"""The contenders of the speed benchmark: whole meta-iterations, each written as in its library's own examples."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.compile.graph import check_compiler
from metamom.experiments.learn2learn_loop import Task, adapted_loss, meta_iteration, tasks_of
from metamom.experiments.speed import with_jax
from metamom.experiments.speed.rows import MetaRow, OptimizerRow, Row
from metamom.interop.learn2learn import import_learn2learn
from metamom.maml.learner import MAML
from metamom.nets import kernels
from metamom.nets.kernels.build import CompilerError
from metamom.optim import CompositeMomentum
from metamom.server.accumulator import BiasedAccumulator

META_LR = 1e-3


class Contender(NamedTuple):
    """A timed computation.

    Attributes:
        iterate: one whole iteration, from ``zero_grad`` to the optimizer's step.
        outcome: the values that all contenders must agree on, by parameter name: the last iteration's meta-gradient,
            or the weights where only the optimizer step is timed.
    """

    iterate: Callable[[], Any]
    outcome: Callable[[], dict[str, Tensor]]


class _Plain(NamedTuple):
    """A row's network for contenders that adapt a module.

    Attributes:
        learned: the module that they adapt: the network, or its head.
        prefix: of its parameters' names in the network.
        tasks: returns the tasks that it is adapted to.
    """

    learned: nn.Module
    prefix: str
    tasks: Callable[[], list[Task]]


def _plain(row: MetaRow) -> _Plain:
    """With ANIL, features are computed once for each task and the head is adapted, as in learn2learn's examples."""
    network, tasks = copy.deepcopy(row.plain), tasks_of(row.batch)
    if row.head is None:
        return _Plain(network, "", lambda: tasks)
    head = network.get_submodule(row.head)
    network.set_submodule(row.head, nn.Identity())

    def featured(task: Task) -> Task:
        support = len(task.support_x)
        features = network(torch.cat([task.support_x, task.query_x]))
        return task._replace(support_x=features[:support], query_x=features[support:])

    return _Plain(head, f"{row.head}.", lambda: [featured(task) for task in tasks])


def _gradients(model: nn.Module, prefix: str = "") -> Callable[[], dict[str, Tensor]]:
    def outcome() -> dict[str, Tensor]:
        return {prefix + name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}

    return outcome


def _metamom(row: MetaRow, compile: bool = False, autocast: torch.dtype | None = None) -> Contender:
    model = copy.deepcopy(row.model)
    learner = MAML(
        model,
        row.loss_fn,
        inner_lr=row.inner_lr,
        inner_steps=row.inner_steps,
        estimator=row.estimator,
        chunk_size=row.chunk_size,
        compile=compile,
        autocast=autocast,
        adapt=None if row.head is None else [row.head],
    )
    optimizer = CompositeMomentum(learner.parameters(), lr=META_LR)

    def iterate() -> None:
        optimizer.zero_grad()
        learner.backward(row.batch, workers=row.workers, bias=row.bias)
        optimizer.step()

    return Contender(iterate, _gradients(model))


def _learn2learn(row: MetaRow) -> Contender:
    """`learn2learn_loop`; with a bias, each task is a worker and passes through metamom's accumulator."""
    model, prefix, tasks = _plain(row)
    learner = import_learn2learn().algorithms.MAML(model, lr=row.inner_lr, first_order=row.estimator == "first-order")
    optimizer = torch.optim.SGD(learner.parameters(), lr=META_LR)

    def plain() -> None:
        meta_iteration(learner, optimizer, tasks(), row.loss_fn, row.inner_steps)

    def biased() -> None:
        optimizer.zero_grad()
        for task in tasks():
            adapted_loss(learner, task, row.loss_fn, row.inner_steps).backward()  # type: ignore[no-untyped-call]
            accumulator.add()
        accumulator.finish()
        optimizer.step()

    if row.bias is None:
        return Contender(plain, _gradients(model, prefix))
    assert row.workers == row.batch.num_tasks
    accumulator = BiasedAccumulator(learner.parameters(), bias=row.bias, workers=row.workers)
    return Contender(biased, _gradients(model, prefix))


def _higher(row: MetaRow) -> Contender:
    """`higher.innerloop_ctx`, as in its Omniglot example; in first order no graph connects, so gradients are copied."""
    higher: Any = importlib.import_module("higher")
    model, prefix, tasks = _plain(row)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=META_LR)
    inner = torch.optim.SGD(weights, lr=row.inner_lr)
    exact = row.estimator == "exact"

    def iterate() -> None:
        optimizer.zero_grad()
        for task in tasks():
            context = higher.innerloop_ctx(model, inner, copy_initial_weights=False, track_higher_grads=exact)
            with context as (fast, inner_step):
                for _ in range(row.inner_steps):
                    inner_step.step(row.loss_fn(fast(task.support_x), task.support_y))
                loss = row.loss_fn(fast(task.query_x), task.query_y) / row.batch.num_tasks
                if exact:
                    loss.backward()  # type: ignore[no-untyped-call]
                    continue
                for w, gradient in zip(weights, torch.autograd.grad(loss, fast.parameters()), strict=True):
                    w.grad = gradient if w.grad is None else w.grad.add_(gradient)
        optimizer.step()

    return Contender(iterate, _gradients(model, prefix))


def _torchopt(row: MetaRow) -> Contender:
    """TorchOpt's functional optimizer, differentiated explicitly; its `MetaSGD` is this too, but has no first order."""
    torchopt: Any = importlib.import_module("torchopt")
    model, prefix, tasks = _plain(row)
    start = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=META_LR)
    inner = torchopt.sgd(row.inner_lr)

    def predict(weights: tuple[Tensor, ...], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(zip(start, weights, strict=True)), (x,))
        return out

    def iterate() -> None:
        optimizer.zero_grad()
        for task in tasks():
            weights = tuple(start.values())
            state = inner.init(weights)
            for _ in range(row.inner_steps):
                loss = row.loss_fn(predict(weights, task.support_x), task.support_y)
                gradients = torch.autograd.grad(loss, weights, create_graph=row.estimator == "exact")
                updates, state = inner.update(gradients, state, inplace=False)
                weights = torchopt.apply_updates(weights, updates, inplace=False)
            loss = row.loss_fn(predict(weights, task.query_x), task.query_y) / row.batch.num_tasks
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Contender(iterate, _gradients(model, prefix))


def _stepping(make: Callable[[nn.Module, float], torch.optim.Optimizer]) -> Callable[[OptimizerRow], Contender]:
    def contender(row: OptimizerRow) -> Contender:
        model = copy.deepcopy(row.model)
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        return Contender(make(model, row.beta).step, lambda: {n: p.detach() for n, p in model.named_parameters()})

    return contender


def _composite(model: nn.Module, beta: float) -> CompositeMomentum:
    return CompositeMomentum(model.parameters(), META_LR, beta, first_step="gradient")


def _sgd(model: nn.Module, beta: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), META_LR, momentum=1 - beta, dampening=1 - beta, foreach=True)


# The first contender that takes part is the reference for the others.
META: dict[str, Callable[[MetaRow], Contender]] = {
    "learn2learn": _learn2learn,
    "higher": _higher,
    "torchopt": _torchopt,
    "jax": lambda row: Contender(*with_jax.contender(row, META_LR)),
    "jax-map": lambda row: Contender(*with_jax.contender(row, META_LR, one_by_one=True)),
    "metamom": _metamom,
    "metamom-compiled": lambda row: _metamom(row, compile=True),
    "metamom-bfloat16": lambda row: _metamom(row, autocast=torch.bfloat16),
}
OPTIMIZERS: dict[str, Callable[[OptimizerRow], Contender]] = {
    "torch-sgd": _stepping(_sgd),
    "metamom": _stepping(_composite),
}
NAMES = tuple(dict.fromkeys([*META, *OPTIMIZERS]))
# Off by default, since they compute something else on purpose; their error is shown next to their times.
ROUGH = ("metamom-bfloat16",)


def makers(row: Row) -> dict[str, Callable[[], Contender]]:
    """All contenders that can take part in a row, by name; the reference first."""
    if isinstance(row, OptimizerRow):
        return {name: partial(make, row) for name, make in OPTIMIZERS.items()}
    unable = set()
    if row.bias is not None:
        unable = {"higher", "torchopt", "jax", "jax-map"}  # no counterpart; learn2learn's loop represents them
    elif not row.in_jax:
        unable = {"jax", "jax-map"}
    elif not row.has_convolutions:
        unable = {"jax-map"}
    return {name: partial(make, row) for name, make in META.items() if name not in unable}


def prepare(name: str, device: torch.device) -> None:
    """Import a contender's libraries outside of all timings. Also builds metamom's kernels, once per machine.

    Raises:
        ImportError: if its library is not installed, or not for ``device``.
        CompilerError: if it needs a compiler and there is none.
    """
    if name == "learn2learn":
        import_learn2learn()
    elif name in ("higher", "torchopt"):
        importlib.import_module(name)
    elif name in ("jax", "jax-map"):
        with_jax.prepare(device)
    elif name == "metamom-compiled":
        check_compiler(device)
        with kernels.native(device):
            pass


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a contender can't take part, or ``None`` if it can."""
    try:
        prepare(name, device)
    except (ImportError, CompilerError) as error:
        return str(error)
    return None
