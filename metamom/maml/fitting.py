"""One task: adapt to it, and make a plain module of the result.

Legend: S support points, Q query points, of one task without a task axis.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from metamom.batch import TaskBatch, kind_of
from metamom.bias.checks import all_finite
from metamom.common.choices import Norm
from metamom.common.held import released
from metamom.common.trees import Tree, leaves, mapped, named_leaves
from metamom.maml.checks.batch_checks import NonFiniteDataError, refuse_non_finite
from metamom.maml.checks.not_finite import NonFiniteStepError
from metamom.maml.configured import Configured
from metamom.maml.modes import out_of_inference
from metamom.maml.normalisation.norm import check_norm, for_single_points, of_support, resolved
from metamom.maml.normalisation.norm_modes import AnyNorm, ByLayer, Normalisation, Statistics, statistics_of
from metamom.maml.problem import Problem
from metamom.maml.running.plain_autograd import with_gradients_if_needed
from metamom.maml.running.run_by_task import RunByTask, Support, call
from metamom.maml.running.swapping import evaluating, locked, tensors_within
from metamom.maml.task_weights import Params, Start
from metamom.maml.whole_sets import adaptations, predicted
from metamom.nets.layers import BatchNormReLU
from metamom.nets.statistics import fix, hide


def fitted(learner: Configured, support_x: Tree, support_y: Tree, steps: int | None, norm: Norm | None) -> nn.Module:
    """See `metamom.MAML.fit`."""
    with out_of_inference(), evaluating():
        support_x, support_y = _batch_of_one(learner, "support_x", support_x, "support_y", support_y)
        problem = _problem(learner, norm, support_x)
        adapted = _adapted(learner, problem, support_x, support_y, steps)
        with locked(learner.model):
            model = copied(learner.model)
        own = dict(model.eval().named_parameters())
        with torch.no_grad():
            for name, w in adapted.items():
                own[name].copy_(w[0])
            _bake(model, problem.norm, mapped(lambda x: x[0], support_x))
        return model


def fit_and_predict(
    learner: Configured, support_x: Tree, support_y: Tree, query_x: Tree, steps: int | None, norm: Norm | None
) -> Tree:
    """See `metamom.MAML.fit_predict`."""
    with out_of_inference(), torch.no_grad(), evaluating():
        support_x, support_y = _batch_of_one(learner, "support_x", support_x, "support_y", support_y)
        (query_x,) = _batch_of_one(learner, "query_x", query_x)
        problem = _problem(learner, norm, support_x)
        adapted = _adapted(learner, problem, support_x, support_y, steps)
        support = Support(support_x, None) if of_support(problem.norm) else None
        found = predicted(problem, adapted, query_x, None, support)
        return released(mapped(lambda x: x[0], found))


def _problem(learner: Configured, norm: Norm | None, support_x: Tree) -> Problem:
    """The learner's, with the normalisation of a model that is used on single points, unless the caller decides.

    Adaptation itself is the same with ``"batch"`` and ``"support"``: the support set is the batch.
    """
    check_norm(norm)
    problem = learner._problem()
    if norm is not None:
        return problem._replace(norm=resolved(learner.model, norm))
    if problem.norm == "frozen" or (problem.norm is None and not _mixes(learner.model, support_x)):
        return problem
    uses = for_single_points(problem.norm)
    return problem._replace(norm=uses if isinstance(uses, ByLayer) else resolved(learner.model, uses))


def _mixes(model: nn.Module, support_x: Tree) -> bool:
    """Whether a model normalises its points by statistics of several of them, in layers or by functions."""
    if any(isinstance(module, (_BatchNorm, BatchNormReLU)) for module in model.modules()):
        return True
    with locked(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return bool(_calls(model, mapped(lambda x: x[0], support_x)))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients. Tensors that modules keep in attributes lose their graph."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for each in tensors_within(module):
            if not each.is_leaf:  # which Python's deepcopy refuses
                memo[id(each)] = each.detach().clone()
    found: nn.Module = copy.deepcopy(model, memo)
    found.zero_grad(set_to_none=True)
    return found


def _batch_of_one(learner: Configured, *named_sets: object) -> tuple[Tree, ...]:
    """The sets of one task with a task axis, on the learner's device and in its dtype.

    Args:
        learner: gives the device and the dtype.
        *named_sets: name, set, name, set, ...
    """
    like = next(iter(learner.meta_parameters().values()))
    found = []
    for name, x in zip(named_sets[::2], named_sets[1::2], strict=True):
        found_within = {} if x is None else named_leaves(str(name), x)
        if not any(isinstance(leaf, Tensor) for leaf in found_within.values()) and x is not None:
            found_within = {str(name): x}
        for place, leaf in found_within.items():
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{place} must be a tensor, the points of one task [N, ...]; got {kind_of(leaf)}. Convert it: "
                    "torch.as_tensor(...)."
                )
            if leaf.dim() == 0:
                raise ValueError(f"{place} must hold the points of one task, [N, ...]; got a single number.")

        def move(x: Tensor) -> Tensor:
            x = x.to(device=like.device, dtype=like.dtype if x.is_floating_point() else None)
            return x.unsqueeze(0)

        found.append(mapped(move, x))
    return tuple(found)


def _adapted(learner: Configured, problem: Problem, support_x: Tree, support_y: Tree, steps: int | None) -> Params:
    """The adapted weights of a batch of one task, ``[1, *shape]``."""
    _refuse_ignored(learner, support_y)
    steps = learner.inner_steps if steps is None else steps
    *_, adapted = adaptations(problem, learner.meta_parameters(), support_x, support_y, steps)
    if not all(all_finite(w) for w in adapted.values()):
        _refuse_non_finite(support_x, support_y)
        raise NonFiniteStepError(
            f"the weights are not finite after {steps} inner steps, although the data is: the steps are too large, or "
            "the model or the loss has a derivative that is not finite. Try a smaller inner_lr, or fewer steps."
        )
    return adapted


def _refuse_non_finite(support_x: Tree, support_y: Tree) -> None:
    """Refuse data of one task that is not finite, or without any label that counts.

    Raises:
        NonFiniteDataError: naming the set and the first point.
    """
    places = {
        **named_leaves("support_x", support_x),
        **({} if support_y is None else named_leaves("support_y", support_y)),
    }
    for name, x in places.items():
        points = (~x.isfinite())[0].flatten(1).any(1) if x.dim() > 2 else ~x.isfinite()[0]
        if points.any():
            raise NonFiniteDataError(
                f"{name} has NaN or infinite values in {int(points.sum())} of {len(points)} points, first in point "
                f"{int(points.nonzero()[0])}, so the weights would not be finite. Clean the data."
            )
    refuse_non_finite(TaskBatch(support_x, support_y, None, None))


def _refuse_ignored(learner: Configured, support_y: Tree) -> None:
    """Refuse class labels that the loss ignores, all of them: nothing would be learned.

    Raises:
        ValueError: for those.
    """
    ignored = getattr(learner.loss_fn, "ignore_index", -100)
    if isinstance(support_y, Tensor) and not support_y.is_floating_point() and bool((support_y == ignored).all()):
        raise ValueError(
            f"all labels are {ignored}, which the loss ignores, so there is nothing to adapt to. Label some points."
        )


def _bake(model: nn.Module, norm: AnyNorm | None, support_x: Tree) -> None:
    """Let a model in ``eval()`` normalise as the learner does, without the learner.

    Raises:
        ValueError: for a model that normalises by functions of its own, whose statistics no layer can keep.
    """
    if norm is None or norm == "frozen":
        return
    kept = norm.frozen if isinstance(norm, ByLayer) else frozenset[str]()
    frozen = [module for name, module in model.named_modules() if name in kept]
    norm = norm.others if isinstance(norm, ByLayer) else norm
    calls = _calls(model, support_x, frozen)
    for module in model.modules():
        if any(module is each for each in frozen):
            continue
        if isinstance(module, BatchNormReLU) and norm == "support":
            module.fix(*_once(calls, module, model))
        elif isinstance(module, _BatchNorm) and norm == "support":
            fix(module, *_once(calls, module, model))
        elif isinstance(module, _NormBase):
            hide(module)
    free = norm == "support"  # to choose another norm
    alone_standing = [running for of, _, running in calls if of is None]
    if alone_standing and (norm == "support" or any(alone_standing)):
        raise ValueError(
            f'fit cannot put norm="{norm}" into the module that it returns: the model calls batch_norm itself, outside '
            "of a normalisation layer. Use fit_predict, or write the model with layers (torch.nn.BatchNorm2d)"
            + (', or pass norm="batch", by which a prediction depends on the other points of a call.' if free else ".")
        )


Call = tuple[nn.Module | None, Statistics, bool]  # its layer, the statistics of its input, whether it has running ones


def _calls(model: nn.Module, x: Tree, frozen: Sequence[nn.Module] = ()) -> list[Call]:
    """The normalisations by statistics of several points in a call of the model on ``x``, each by its own.

    The ``frozen`` layers use their running statistics.
    """

    def recorded(_: Params) -> list[Call]:
        recorder = _Recorder(frozen)
        with recorder.within(model), recorder:
            call(model, x)
        return recorder.calls

    calls: list[Call] = with_gradients_if_needed(recorded, {}, ())
    return calls


def _once(calls: list[Call], module: nn.Module, model: nn.Module) -> Statistics:
    """The statistics of the only call of a layer.

    Raises:
        ValueError: for a layer that the model calls several times, or never.
    """
    own = [statistics for of, statistics, _ in calls if of is module]
    if len(own) != 1:
        name = next(name for name, each in model.named_modules() if each is module)
        raise ValueError(
            f"fit puts the statistics of the support set into each normalisation layer, and the model calls "
            f"{name or 'itself'} {len(own)} times. Use fit_predict, or give each call a layer of its own, or pass "
            'norm="batch", by which a prediction depends on the other points of a call.'
        )
    return own[0]


class _Recorder(Normalisation):
    """Normalises each set by its own statistics, and records them with the layer that asked."""

    def __init__(self, frozen: Sequence[nn.Module]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._layer: nn.Module | None = None
        self._frozen = frozen

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Note which layer of a model is being called."""

        def enter(module: nn.Module, _: object) -> None:
            self._layer = module

        def leave(*_: object) -> None:
            self._layer = None

        layers = [module for module in model.modules() if isinstance(module, (_NormBase, BatchNormReLU))]
        hooks = [layer.register_forward_pre_hook(enter, prepend=True) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def of_batch(self, input: Tensor, running: Statistics | None, axis: int) -> Statistics | None:
        """Record the statistics of a call, and use them, unless the layer is frozen."""
        if self._is_frozen():
            return running
        self.calls.append((self._layer, statistics_of(input, axis), running is not None))
        return None

    def of_instance(self, running: Statistics | None) -> Statistics | None:
        """The running statistics of a frozen layer."""
        return running if self._is_frozen() else None

    def _is_frozen(self) -> bool:
        return any(self._layer is each for each in self._frozen)


def refuse_one_task(learner: Configured, support_x: object, support_y: object) -> None:
    """Refuse the points of one task where a batch of tasks is wanted, as far as the two can be distinguished.

    They can be if there is no axis left for the points, or if the model cannot take twice the points of a task, while
    it takes the first axis for points.

    Raises:
        ValueError: naming `metamom.MAML.fit`.
    """
    if not isinstance(support_x, Tensor) or not (support_y is None or isinstance(support_y, Tensor)):
        return
    if support_x.dim() < 1 or (support_y is not None and support_y.shape[:1] != support_x.shape[:1]):
        return
    without_points = support_x.dim() == 1 or (support_y is not None and support_y.dim() == 1)
    differ = support_y is not None and support_x.shape[:2] != support_y.shape[:2]
    if not without_points and not differ:  # an axis of features or channels would rarely have the length of another
        unclear = support_x.dim() == 2 or support_x.shape[1] == 1
        differ = unclear and not _takes_points(learner, support_x)
    if without_points or (differ and _runs(learner, support_x)):
        got = f"support_x {list(support_x.shape)}"
        got += "" if support_y is None else f" and support_y {list(support_y.shape)}"
        raise ValueError(
            "adapt takes a batch of tasks, support_x [T, S, ...] and support_y [T, S, ...]; got "
            f"{got}, which are the points of one task. Use learner.fit(support_x, support_y), or add the axis of tasks "
            "to both: x.unsqueeze(0)."
        )


def _takes_points(learner: Configured, support_x: Tensor) -> bool:
    """Whether the model takes any number of points ``[N, *shape]`` of a task; remembered by shape."""
    known, kind = learner._run.points, (support_x.shape[1:], support_x.dtype)
    if kind not in known:
        one = support_x[:1].detach()
        if 0 in one.shape or not _runs(learner, torch.cat([one[0], one[0]])):
            return 0 in one.shape
        known.add(kind)
    return True


def _runs(learner: Configured, x: Tensor) -> bool:
    """Whether the model maps the points ``[N, ...]`` to as many predictions."""
    weights = {name: p.detach().unsqueeze(0) for name, p in learner.model.named_parameters()}
    start, norm = Start(weights, {}, {}, {}), resolved(learner.model, learner.norm)
    run = RunByTask()  # its notes on this model are of no other call
    with out_of_inference(), torch.no_grad(), evaluating():
        x = (x.clone() if x.is_inference() else x.detach()).unsqueeze(0)
        try:
            found = run(learner.model, start, weights, x, draws=False, dtype=learner.autocast, loop=True, norm=norm)
        except Exception:  # noqa: BLE001 - whatever a model raises for points that it cannot take
            return False
    return all(each.dim() > 1 and each.shape[1] == x.shape[1] for each in leaves(found))
