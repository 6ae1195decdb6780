"""MAML written to be obviously right: a loop over tasks, one at a time, and autograd through each adaptation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from metamom.batch import TaskBatch

Params = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]


def weights_of(model: nn.Module) -> Params:
    """The trainable parameters, as leaves of their own."""
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}


def adapt_task(
    model: nn.Module,
    loss_fn: LossFn,
    weights: Params,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    inner_lr: Callable[[str], float | Tensor],
    adapted: Collection[str],
    first_order: bool = False,
) -> Params:
    """One task's weights after ``steps`` inner steps, differentiable in ``weights`` and in the step sizes."""
    current = dict(weights)
    for _ in range(steps):
        loss = loss_fn(torch.func.functional_call(model, current, (x,)), y)
        moving = [name for name in current if name in adapted]
        grads = torch.autograd.grad(
            loss, [current[n] for n in moving], create_graph=not first_order, allow_unused=True, materialize_grads=True
        )
        for name, grad in zip(moving, grads, strict=True):
            current[name] = current[name] - inner_lr(name) * grad
    return current


def adapt_tasks(
    model: nn.Module, loss_fn: LossFn, batch: TaskBatch, *, steps: int, inner_lr: float
) -> Iterator[Params]:
    """`adapt_task` for each task, of all trainable parameters."""
    weights = weights_of(model)
    for x, y in zip(batch.support_x, batch.support_y, strict=True):
        yield adapt_task(model, loss_fn, weights, x, y, steps=steps, inner_lr=lambda name: inner_lr, adapted=weights)


def slow_meta_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    batch: TaskBatch,
    *,
    steps: int = 1,
    inner_lr: float | Mapping[str, float | Tensor] = 0.01,
    learned: Mapping[str, Tensor] | None = None,
    adapted: Collection[str] | None = None,
    first_order: bool = False,
) -> tuple[Params, Tensor]:
    """The mean over the tasks of the meta-gradient, and the query losses ``[T]``.

    Args:
        learned: learned step sizes by ``"inner_lr"`` or ``"inner_lr.NAME"``; they come instead of ``inner_lr``.
        adapted: names of the parameters that the inner steps move; all by default.
    """
    weights = weights_of(model)
    alphas = {name: a.detach().clone().requires_grad_() for name, a in (learned or {}).items()}
    leaves = weights | alphas

    def alpha(name: str) -> float | Tensor:
        if alphas:
            return alphas["inner_lr" if "inner_lr" in alphas else f"inner_lr.{name}"]
        return inner_lr[name] if isinstance(inner_lr, Mapping) else inner_lr

    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    losses = []
    for t in range(batch.num_tasks):
        end = adapt_task(
            model,
            loss_fn,
            weights,
            batch.support_x[t],
            batch.support_y[t],
            steps=steps,
            inner_lr=alpha,
            adapted=weights if adapted is None else adapted,
            first_order=first_order,
        )
        loss = loss_fn(torch.func.functional_call(model, end, (batch.query_x[t],)), batch.query_y[t])
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(leaves, grads, strict=True):
            total[name] += grad / batch.num_tasks
        losses.append(loss.detach())
    return total, torch.stack(losses)


# ---- estimators with inner batches of their own, by their formulas

Points = tuple[Tensor, Tensor]


def slow_estimate(
    model: nn.Module,
    loss_fn: LossFn,
    batch: TaskBatch,
    estimator: str,
    *,
    steps: int = 1,
    fresh: bool = False,
    inner_lr: float = 0.01,
    learned: Mapping[str, Tensor] | None = None,
    adapted: Collection[str] | None = None,
) -> tuple[Params, Tensor]:
    """The mean over the tasks of an estimator's meta-gradient, and the query losses ``[T]`` of its first adaptation.

    Of ``"hessian-free"`` the limit, with exact products.
    """
    leaves = weights_of(model) | {name: a.detach().clone() for name, a in (learned or {}).items()}
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    losses = []
    for t in range(batch.num_tasks):
        x, y = batch.support_x[t], batch.support_y[t]
        half = len(x) // 2

        def product(along: list[Points], hessian: list[Points] | None, t: int = t) -> tuple[Params, Tensor]:
            query = batch.query_x[t], batch.query_y[t]
            names = list(weights_of(model)) if adapted is None else adapted
            return product_formula(model, loss_fn, along, hessian, query, names, inner_lr, learned or {})

        whole = turns((x, y), steps, fresh)
        a, b = (turns((x[part], y[part]), steps, fresh) for part in (slice(half), slice(half, None)))
        both = [(torch.cat([p[0], q[0]]), torch.cat([p[1], q[1]])) for p, q in zip(a, b, strict=True)]
        terms = {
            "exact": lambda: [(1, product(whole, whole))],  # noqa: B023
            "first-order": lambda: [(1, product(whole, None))],  # noqa: B023
            "independent": lambda: [(1, product(a, b))],  # noqa: B023
            "hessian-free": lambda: [(1, product(a, b))],  # noqa: B023
            "cross-fit": lambda: [(0.5, product(a, b)), (0.5, product(b, a))],  # noqa: B023
            "richardson": lambda: [(2, product(both, both)), (-0.5, product(a, a)), (-0.5, product(b, b))],  # noqa: B023
        }[estimator]()
        for weight, (grads, _) in terms:
            for name in total:
                total[name] += weight * grads[name] / batch.num_tasks
        losses.append(terms[0][1][1])
    return total, torch.stack(losses)


def turns(points: Points, steps: int, fresh: bool) -> list[Points]:
    """The inner batch of each step: all points, or J consecutive parts of them."""
    if not fresh:
        return [points] * steps
    size = len(points[0]) // steps
    return [(points[0][j * size : (j + 1) * size], points[1][j * size : (j + 1) * size]) for j in range(steps)]


def product_formula(
    model: nn.Module,
    loss_fn: LossFn,
    along: list[Points],
    hessian: list[Points] | None,
    query: Points,
    adapted: Collection[str],
    inner_lr: float,
    learned: Mapping[str, Tensor],
) -> tuple[Params, Tensor]:
    """``prod_j (I - H_j(u_j) alpha) grad L_query(u_J)`` of one task, from the last factor to the first, and the loss.

    ``u_{j+1} = u_j - alpha grad L_{along j}(u_j)``; H_j, of batch ``hessian[j]``, are the second derivatives in an
    adapted parameter and any one. No factor is there if ``hessian`` is ``None``.
    """

    def loss(weights: Params, points: Points) -> Tensor:
        return loss_fn(torch.func.functional_call(model, weights, (points[0],)), points[1])

    def grads(value: Tensor, weights: Params, names: Collection[str], graph: bool = False) -> Params:
        found = torch.autograd.grad(
            value, [weights[n] for n in names], create_graph=graph, allow_unused=True, materialize_grads=True
        )
        return dict(zip(names, found, strict=True))

    def key(name: str) -> str:
        return "inner_lr" if "inner_lr" in learned else f"inner_lr.{name}"

    def leaves(weights: Params) -> Params:
        return {n: w.detach().requires_grad_() for n, w in weights.items()}

    alpha = {name: learned[key(name)].detach() if learned else inner_lr for name in adapted}
    path, gradients = [leaves(weights_of(model))], []
    for points in along:
        u = path[-1]
        g = grads(loss(u, points), u, adapted)
        gradients.append(g)
        path.append(leaves({n: w - alpha[n] * g[n] if n in adapted else w for n, w in u.items()}))
    end = loss(path[-1], query)
    v = grads(end, path[-1], list(path[-1]))
    by_alpha = {name: torch.zeros_like(a) for name, a in learned.items()}
    for j in reversed(range(len(along))):
        u = path[j]
        for name in adapted if learned else ():
            change = -v[name] * gradients[j][name]
            by_alpha[key(name)] += change if by_alpha[key(name)].dim() else change.sum()
        if hessian is not None:
            slope = grads(loss(u, hessian[j]), u, adapted, graph=True)
            dot = sum((slope[n] * (alpha[n] * v[n])).sum() for n in adapted)
            product = grads(dot, u, list(u))
            v = {n: v[n] - product[n] for n in v}
    return {**v, **by_alpha}, end.detach()


# ---- inner tracking, by its formulas


def slow_tracked(
    model: nn.Module,
    loss_fn: LossFn,
    batch: TaskBatch,
    estimator: str,
    memory: dict[int, tuple[Params, Params]],
    *,
    b_u: float,
    inner_lr: float,
    adapted: Collection[str] | None = None,
) -> tuple[Params, Tensor]:
    """The mean over the tasks of ``(I - alpha H_i(w; S'_i)) grad L_i(u_i)``, and the query losses ``[T]``.

    Args:
        memory: u_i (of the adapted parameters) and the weights of the last visit, by task id; moves on.
    """
    weights = weights_of(model)
    names = list(weights) if adapted is None else list(adapted)
    total, losses = {name: torch.zeros_like(w) for name, w in weights.items()}, []

    def loss(at: Params, points: Points) -> Tensor:
        return loss_fn(torch.func.functional_call(model, at, (points[0],)), points[1])

    def step(at: Params, points: Points) -> Params:
        moved = adapt_task(model, loss_fn, at, *points, steps=1, inner_lr=lambda name: inner_lr, adapted=names)
        return {name: moved[name].detach() for name in names}

    for t in range(batch.num_tasks):
        i, x, y = int(batch.task_ids[t]), batch.support_x[t], batch.support_y[t]
        half = len(x) // 2
        along = hessian = (x, y)
        if estimator != "moml-coupled":
            along, hessian = (x[:half], y[:half]), (x[half:], y[half:])
        new = step(weights, along)
        if i not in memory:
            memory[i] = new, weights
        u, last = memory[i]
        if estimator == "scsc":
            before = step(last, along)
            u = {n: (1 - b_u) * (u[n] + new[n] - before[n]) + b_u * new[n] for n in names}
        else:
            u = {n: (1 - b_u) * u[n] + b_u * new[n] for n in names}
        memory[i] = u, weights
        at = {n: u.get(n, w).detach().requires_grad_() for n, w in weights.items()}
        end = loss(at, (batch.query_x[t], batch.query_y[t]))
        v = dict(zip(at, torch.autograd.grad(end, list(at.values()), allow_unused=True), strict=True))
        moving = [weights[n] for n in names]
        slopes = torch.autograd.grad(loss(weights, hessian), moving, create_graph=True)
        dot = sum((g * v[n]).sum() for n, g in zip(names, slopes, strict=True))
        products = torch.autograd.grad(dot, list(weights.values()), allow_unused=True, materialize_grads=True)
        for n, product in zip(weights, products, strict=True):
            total[n] += (v[n] - inner_lr * product) / batch.num_tasks
        losses.append(end.detach())
    return total, torch.stack(losses)


# ---- the same by a copy of the model for each call, whatever is registered where


def called_with(model: nn.Module, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The output of a copy of ``model``, with ``weights`` (by the names of its parameters) wherever these stand."""
    names = {id(p): name for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        for key, p in mine._parameters.items():
            if p is not None and names[id(p)] in weights:
                theirs._parameters[key] = weights[names[id(p)]]  # type: ignore[assignment]
    out: Tensor = other(x)
    return out


def adapt_by_copies(
    model: nn.Module,
    loss_fn: LossFn,
    weights: Params,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    inner_lr: float,
    first_order: bool = False,
) -> Params:
    """One task's weights after ``steps`` inner steps, differentiable in ``weights``."""
    current = dict(weights)
    for _ in range(steps):
        grads = torch.autograd.grad(
            loss_fn(called_with(model, current, x), y),
            list(current.values()),
            create_graph=not first_order,
            allow_unused=True,
            materialize_grads=True,
        )
        current = {name: w - inner_lr * g for (name, w), g in zip(current.items(), grads, strict=True)}
    return current


def meta_gradient_by_copies(
    model: nn.Module,
    loss_fn: LossFn,
    batch: TaskBatch,
    *,
    steps: int = 1,
    inner_lr: float = 0.01,
    first_order: bool = False,
) -> Params:
    """The mean over the tasks of the meta-gradient in the trainable parameters."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for t in range(batch.num_tasks):
        end = adapt_by_copies(
            model,
            loss_fn,
            weights,
            batch.support_x[t],
            batch.support_y[t],
            steps=steps,
            inner_lr=inner_lr,
            first_order=first_order,
        )
        loss = loss_fn(called_with(model, end, batch.query_x[t]), batch.query_y[t])
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        for name, grad in zip(weights, grads, strict=True):
            total[name] += grad / batch.num_tasks
    return total
