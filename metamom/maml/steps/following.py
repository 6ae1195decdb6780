"""Meta-gradients for momenta that follow the weights: of the same tasks, where a `CompositeMomentum` needs them.

The momentum is the optimizer's, or, with an operator such as `metamom.bias.EF21SGDM`, each worker's own. Then the
workers' momenta change, before they are compressed; the messages stay as small as without a variant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metamom.batch import TaskBatch
from metamom.bias import BiasOperator
from metamom.bias.feedback import EF21SGDM
from metamom.common.choices import FOLLOWING, Variant
from metamom.common.kinds import named_type
from metamom.distributed import World
from metamom.maml.gradient import MetaGradients
from metamom.maml.plan import Plan
from metamom.maml.steps.federation import Federation
from metamom.maml.steps.hessian import check_has_hessian, hessian_products
from metamom.maml.steps.server_step import Backward, Exchange
from metamom.maml.task_weights import Params
from metamom.optim import CompositeMomentum, extrapolated
from metamom.optim.variants import at, gradient_change
from metamom.server.aggregate import unflatten
from metamom.server.robust import AnyAggregate, RobustMean

Changes = Callable[[Tensor], Tensor]  # the workers' gradients [k, d] -> the changes of their momenta [k, d]


class Following(NamedTuple):
    """One step of a learner, for a momentum that follows the weights.

    Attributes:
        gradients: of the learner.
        weights: the meta-parameters by name.
        batch: this process's tasks.
        workers: n, over all processes.
        operator: the operator on the workers' gradients.
        world: the processes.
        step: takes the server's step at the current weights, into ``.grad``; ``exchange=`` moves the workers' momenta.
    """

    gradients: MetaGradients
    weights: Params
    batch: TaskBatch
    workers: int
    operator: BiasOperator | None
    world: World
    step: Callable[..., Backward]

    def backward(self, momentum: CompositeMomentum) -> Backward:
        """Compute the gradients that the optimizer's next step needs.

        Raises:
            ValueError: for a learner, an operator or processes that the variant does not go with.
        """
        variant = momentum.variant
        assert variant in FOLLOWING
        check_variant(self.gradients.plan(), variant, self.operator, self.workers, self.world)
        on_workers = self.operator is not None and self.operator.carries_momentum
        previous = momentum.previous()
        if variant == "igt" and on_workers:
            assert isinstance(self.operator, EF21SGDM)
            with at({p: extrapolated(p, w, self.operator.eta) for p, w in previous.items()}):
                done = self.step()
            momentum.transport({})
        elif variant == "igt":
            done = momentum.evaluate(self.step)
        elif on_workers:
            done = self._of_workers(variant, previous)
            momentum.transport({})
        elif variant == "storm":
            done = self._of_server(momentum, previous)
        else:
            done = self._hessian_of_server(momentum, previous)
        return done

    def _of_server(self, momentum: CompositeMomentum, previous: dict[Tensor, Tensor]) -> Backward:
        """STORM on the server: two steps of the workers, with the same tasks and the operator's same draws."""
        params = [*self.weights.values()]
        own = {p: previous[p] for p in params if p in previous}
        before = {p: p.grad for p in params}
        state = None if self.operator is None else copy.deepcopy(self.operator.state_dict())
        drawn = None if self.operator is None else self.operator.current_state()
        done: list[Backward] = []

        def rewind() -> None:
            if self.operator is not None and state is not None and drawn is not None:
                self.operator.store(drawn)
                if state:
                    self.operator.load_state_dict(state)

        def closure() -> None:
            if done:
                rewind()
            done.append(self.step())

        try:
            _, changes = gradient_change(params, own, closure)
        except BaseException:
            rewind()
            for p, grad in before.items():
                p.grad = grad
            raise
        for p, grad in before.items() if own else ():
            p.grad = grad if p.grad is None else p.grad if grad is None else grad + p.grad
        momentum.transport(changes)
        return _total(done)

    def _hessian_of_server(self, momentum: CompositeMomentum, previous: dict[Tensor, Tensor]) -> Backward:
        """The mean of the Hessians over all tasks, along the last movement."""
        along = self._moved(previous)
        changes: dict[Tensor, Tensor] = {}
        sent = self.world.sent
        if along:
            with self.world.together(), torch.random.fork_rng(devices=[]):  # the draws are the gradient's
                first = self.world.rank * self.batch.num_tasks
                mine = hessian_products(self.gradients, self.weights, along, self.batch, 1, first)[0]
            mean = self.world.all_reduce(mine) / self.world.size
            found = unflatten(mean, self.weights)
            changes = {self.weights[name]: found[name] for name in along}
            d, size = len(mine), mine.element_size()
        sent = self.world.sent - sent
        done = self.step()
        momentum.transport(changes)
        if not along:
            return done
        return _more(done, wire_bytes=self.workers * d * size, sent_bytes=sent)

    def _of_workers(self, variant: Variant, previous: dict[Tensor, Tensor]) -> Backward:
        """Each worker's own momentum follows."""
        along = self._moved(previous)
        if not along:
            return self.step()
        mine, first = self.world.workers(self.workers), self.world.rank * self.batch.num_tasks
        own = {self.weights[name]: previous[self.weights[name]] for name in along}
        with self.world.together(), torch.random.fork_rng(devices=[]):  # the draws are the gradient's
            if variant == "hessian":
                products = hessian_products(self.gradients, self.weights, along, self.batch, len(mine), first)
            else:
                with at(own):
                    found = self.gradients.by_worker(self.weights, self.batch, len(mine), first)
                    earlier = torch.cat([each.gradients for each in found])
        changes = (lambda rows: products) if variant == "hessian" else (lambda rows: rows - earlier)
        return self.step(exchange=Exchange(changes=changes))

    def _moved(self, previous: dict[Tensor, Tensor]) -> Params:
        return {name: (w - previous[w]).detach() for name, w in self.weights.items() if w in previous}


def check_variant(plan: Plan, variant: Variant, operator: BiasOperator | None, workers: int, world: World) -> None:
    """Refuse a learner, an operator or processes that a variant of the momentum does not go with.

    Args:
        plan: how meta-gradients are computed.
        variant: ``"igt"``, ``"storm"`` or ``"hessian"``.
        operator: the operator on the workers' gradients.
        workers: n, over all processes.
        world: the processes.

    Raises:
        ValueError: with what to use instead.
    """
    two = f"variant={variant!r} takes two gradients a step"
    on_workers = operator is not None and operator.carries_momentum
    if variant != "igt" and plan.memory is not None:
        raise ValueError(
            f'{two}, and a tracked estimator\'s averages move with each: use variant="igt", or another estimator.'
        )
    if variant == "hessian":
        check_has_hessian(plan)
    if operator is None:
        return
    if on_workers and type(operator) is not EF21SGDM:
        raise ValueError(
            f"the workers' momentum follows the weights in ef21-sgdm(ETA):A only; got {operator.spec} with "
            f"variant={variant!r}. Use that, or no variant."
        )
    if on_workers and variant != "igt" and workers < world.size:
        raise ValueError(
            f"variant={variant!r} on the workers needs as many workers as processes; got {workers} workers for "
            f"{world.size} processes."
        )
    instead = 'put the momentum on the workers, with bias="ef21-sgdm(ETA):A" and CompositeMomentum(beta=1) (--beta 1).'
    if not on_workers and operator.feeds_back and variant != "igt":
        raise ValueError(f"{two}, and the state of {operator.spec} is of one: {instead}")
    if not on_workers and variant == "hessian":
        raise ValueError(
            f'variant="hessian" has no second gradient that {operator.spec} could act on: use "storm", or {instead}'
        )


def check_alone(variant: Variant | None, federation: Federation, aggregate: AnyAggregate) -> None:
    """Refuse the options of a step that a variant does not go with.

    Args:
        variant: ``"igt"``, ``"storm"`` or ``"hessian"``.
        federation: absent workers, their weights, local steps, and the message to the workers.
        aggregate: how the server combines the workers' gradients.

    Raises:
        ValueError: with what to leave out.
    """
    if federation != Federation():
        raise ValueError(
            f"variant={variant!r} takes gradients at several points, from all workers with equal weights: leave out "
            "participation=, worker_weights=, local_steps= and down_bias=, or the variant."
        )
    if isinstance(aggregate, RobustMean) and aggregate.stateful and variant != "igt":
        raise ValueError(
            f"variant={variant!r} takes two gradients a step, and the state of aggregate={aggregate.spec!r}, or of its "
            'attack, is of one: use variant="igt", or another aggregate.'
        )


def check_momentum_kind(momentum: Any) -> CompositeMomentum:
    """Refuse anything but the optimizer with variants.

    Raises:
        TypeError: saying what to pass.
    """
    if not isinstance(momentum, CompositeMomentum):
        raise TypeError(f"momentum= takes the CompositeMomentum that steps next; got {named_type(momentum)}.")
    return momentum


def _total(done: list[Backward]) -> Backward:
    """The result at the current weights, with the bytes of all steps."""
    *others, last = done
    for other in others:
        last = _more(last, **{name: other.metrics[name] or 0 for name in ("wire_bytes", "sent_bytes")})
    return last


def _more(done: Backward, **sizes: Any) -> Backward:
    return done._replace(metrics={**done.metrics, **{n: (done.metrics[n] or 0) + more for n, more in sizes.items()}})
