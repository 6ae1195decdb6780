"""Run a model with separate weights for each task: on all tasks at once, or task by task.

Legend: T tasks, N points of each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metamom.common.modules import modules_of
from metamom.common.trees import Tree, count, device_of, named_leaves, points
from metamom.compile.tracing import is_tracing
from metamom.maml.autocast import autocast
from metamom.maml.checks import carried_over
from metamom.maml.checks.hooks import check_hooks
from metamom.maml.checks.misfits import inputs_explained
from metamom.maml.features import Features
from metamom.maml.finite_differences import drawing_refused
from metamom.maml.heads import Heads, Kind, depends, options_of, versions_of
from metamom.maml.normalisation.norm_modes import AnyNorm, normalising
from metamom.maml.padding import with_finite_padding
from metamom.maml.running.loop_preferred import convolutions_faster_in_a_loop, faster_in_a_loop
from metamom.maml.running.one_task import Masked, copies, of_one_task
from metamom.maml.running.one_task import call as call
from metamom.maml.running.plain_autograd import differentiable_twice, uncompiled
from metamom.maml.running.swapping import first_tensors_left, in_mode, is_training, locked, tensors_left
from metamom.maml.running.vectorize import one_by_one
from metamom.maml.task_weights import Params, Start
from metamom.maml.under_vmap.batched import over_tasks
from metamom.maml.under_vmap.drawing_functions import Places, drawn_by_task
from metamom.maml.under_vmap.draws import DrawsByTask, DrawsRefused, drawn, generator_states, rewinder
from metamom.maml.under_vmap.functions_by_task import FunctionsByTask, may_call_them
from metamom.maml.under_vmap.largest_norms import shorten_rows, written_to
from metamom.maml.vmap_errors import explained, restored, unchanged
from metamom.nets.linear import are_many


class Support(NamedTuple):
    """The set with the statistics that ``norm="support"`` uses.

    Attributes:
        x: ``[T, S, ...]``, a tensor or a tree.
        mask: the points that count, ``[T, S]``; ``None`` for all.
    """

    x: Tree
    mask: Tensor | None


class Rows(NamedTuple):
    """What differs between the tasks, a row for each.

    Attributes:
        own: the parameters that inner steps move, ``[T, *shape]``.
        kept: the other parameters that differ between tasks, ``[T, *shape]``.
        sets: ``[T, N, ...]``, tensors or trees; the last one gives the predictions.
    """

    own: Params
    kept: Params
    sets: tuple[Tree, ...]


class RunByTask:
    """Runs a model with `torch.func.vmap`, with the same results as a loop over the tasks; or in that loop.

    Differences between vmap and a loop are detected when they first occur and corrected from then on: random draws
    (`metamom.maml.under_vmap.draws`), some functions (`metamom.maml.under_vmap.functions_by_task`), and tensors left in
    attributes. They are recorded separately for training and evaluation mode.

    Attributes:
        draws: the modes (values of ``model.training``) in which the model draws at random.
        places: where it draws, by mode and whether it runs task by task, see
            `metamom.maml.under_vmap.drawing_functions`.
        calls: whether the model calls such functions, by mode, by what its normalisations use, and by the number of
            tasks (for small numbers PyTorch's own functions may be faster), whether more are to follow, and whether it
            runs under vmap.
        leaves: the modules that leave tensors in attributes, by mode; these are removed after the call.
        heads: the model's head, if it has one.
        mixes: whether a prediction depends on the other points of its task, by mode and by what normalisations use.
        points: the shapes and dtypes of sets for which the model was seen to take any number of points.
        unsuitable: indices of the fast paths of `metamom.maml.chunk_gradient` that have failed, with the mode, what
            normalisations use, the number of tasks, and the estimator.
        hooks: the forward hooks that return something, so that they may run under vmap.
        shortened: the weights ``[T, *shape]`` that tables of a model with largest norms have after a call, by name.
        preferred: whether the model runs faster task by task, by mode, number of points, adapted parameters, and the
            number of tasks in first order (``None`` in second).
    """

    def __init__(self) -> None:
        self.draws: set[bool] = set()
        self.places: dict[tuple[bool, bool], Places] = {}
        self.calls: dict[tuple[bool, AnyNorm | None, int, bool, bool], bool] = {}
        self.leaves: dict[bool, frozenset[nn.Module]] = {}
        self.heads = Heads()
        self.mixes: dict[tuple[bool, AnyNorm | None], bool] = {}
        self.points: set[tuple[torch.Size, torch.dtype]] = set()
        self.unsuitable: set[tuple[int, bool, AnyNorm | None, int, str]] = set()
        self.hooks: frozenset[Hashable] = frozenset()
        self.shortened: Params = {}
        self._shortens: bool | None = None
        self.preferred: dict[tuple[bool, int, tuple[str, ...], int | None], bool] = {}

    def __call__(
        self,
        model: nn.Module,
        start: Start,
        own: Params,
        x: Tree,
        mask: Tensor | None = None,
        *,
        draws: bool,
        dtype: torch.dtype | None,
        loop: bool,
        norm: AnyNorm | None = None,
        support: Support | None = None,
        features: Features | None = None,
        target: Callable[..., Any] | None = None,
    ) -> Tree:
        """Predictions ``[T, N, ...]``, a tensor or a tree.

        Args:
            model: always restored, even after an error; no other thread runs it at the same time.
            start: the parameters that all tasks share, or that inner steps do not move.
            own: each task's other parameters, ``[T, *shape]``.
            x: ``[T, N, ...]``, a tensor or a tree; see `call` for how the model gets it.
            draws: whether the model may draw at random.
            dtype: dtype of its products, see `metamom.maml.autocast.autocast`.
            loop: whether to run it task by task.
            norm: what its normalisations use, from `metamom.maml.normalisation.norm.resolved`.
            support: the set with the statistics that ``norm="support"`` uses; ``None`` for ``x``.
            features: features of earlier calls, for calls that differ in ``own`` alone.
            target: what to call in place of the model, with its weights in it.

        Raises:
            VmapError: for a model that cannot run with per-task weights under vmap.
            ValueError: for a model that changes its parameters or buffers in place, or draws at random although
                ``draws`` is false.
        """
        if not loop or is_tracing():
            check_hooks(model, compiling=loop)
        with locked(model):
            run = partial(self._run, model, start, own, draws=draws, dtype=dtype, loop=loop, norm=norm)
            sets: tuple[Tree, ...] = (x,) if support is None else (support.x, x)
            masks = (mask,) if support is None else (support.mask, mask)
            masked = any(each is not None for each in masks)
            plain = not masked and all(isinstance(each, Tensor) for each in sets)
            if features is not None and not loop and plain and features.reuses(sets):
                names = tuple(own)
                if self.heads.may_have_one(model, names):
                    return self._by_features(model, names, own, sets, features, norm, run)
            if loop and masked:
                sets = tuple(Masked(*each) for each in zip(sets, map(_whole, sets, masks), strict=True))
            elif masked:
                sets = tuple(map(with_finite_padding, sets, masks))
            return run(model if target is None else target, sets)

    def prefers_a_loop(self, model: nn.Module, own: Collection[str], x: Tree, *, first_order: bool) -> bool:
        """Whether a model that vmap can take runs faster task by task, see `metamom.maml.running.loop_preferred`."""
        if is_tracing():
            return False
        mode = is_training(model)
        first_order = first_order and mode not in self.draws
        kind = mode, points(x), tuple(own), count(x) if first_order else None
        if kind not in self.preferred:
            self.preferred[kind] = faster_in_a_loop(model, own, points(x)) or (
                first_order and convolutions_faster_in_a_loop(model, own, count(x))
            )
        return self.preferred[kind]

    def _by_features(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        own: Params,
        sets: tuple[Tensor, ...],
        features: Features,
        norm: AnyNorm | None,
        run: Callable[..., Any],
    ) -> Tree:
        """The same as ``run(model, sets)``, from the features of an earlier call if the model has a head."""
        mode, options = is_training(model), options_of(model)
        kind = Kind(mode, norm, names, tuple((x.shape[1:], x.dtype) for x in sets))
        ruled_out = options is None or mode in self.draws or bool(self.leaves.get(mode))
        if ruled_out or self.heads.has_none(kind, options):
            return run(model, sets)
        state = kind, options, versions_of(model, sets)
        kept = features.recall(sets, state)
        if kept is not None:
            return run(model.get_submodule(kept[0]).forward, kept[1])
        watch = self.heads.watch(model, kind, options)
        # without gradients, no graph shows what the features depend on
        sees = torch.is_grad_enabled() or self.heads.found_elsewhere(kind, options)
        if watch is None or (watch.closely and (is_tracing() or not sees)):
            return run(model, sets)
        found, inputs = run(watch, sets)
        if mode in self.draws or self.leaves[mode]:
            inputs = {}
        elif watch.closely:
            inputs = {path: each for path, each in inputs.items() if not depends(each, own)}
        head = self.heads.decide(kind, options, options_of(model), inputs)
        if head is not None:
            features.keep(sets, state, head, inputs[head])
        return found

    def _run(
        self,
        model: nn.Module,
        start: Start,
        own: Params,
        target: Callable[..., Any],
        sets: tuple[Tree, ...],
        *,
        draws: bool,
        dtype: torch.dtype | None,
        loop: bool,
        norm: AnyNorm | None,
    ) -> Any:
        """What ``target``, the model or a part of it, returns for the last of the sets.

        A `Watch` gives a pair: that, and the features of the sets.
        """
        mode = is_training(model)
        new = mode not in self.leaves
        writes = self.shortens(model)
        if writes or (loop and new):  # a write to a slice would reach the model's own parameters before it is noticed
            own = copies(own)
        if loop and new:
            start = start._replace(kept=copies(start.kept), shared=copies(start.shared))
        x = sets[-1].x if isinstance(sets[-1], Masked) else sets[-1]
        inputs = {} if loop else {**named_leaves("its input", x), **named_leaves("its support set", sets[0])}
        one_task, watched = of_one_task(model, start, own, target, new=new, loop=loop, writes=writes)
        closely = watched if new and not loop and not is_tracing() else ()  # a loop looks closely at each task
        with (
            explained(model, loop=loop),
            nullcontext() if draws else drawing_refused(),
            in_mode(model),
            autocast(device_of(x), dtype),
            self._functions(model, norm, count(x), fast=not loop),
            normalising(model, norm) as over_sets,  # its functions may be replaced again by those above
            nullcontext() if loop else self._attributes(model),
            restored(inputs.values()),
            unchanged({**inputs, **watched}, model, loop=loop, closely=closely),
            carried_over.warn_of_draws(loop=loop) if new and draws else nullcontext(),
            inputs_explained(model, x, watched),
            differentiable_twice(model) if loop else uncompiled(),
            written_to(own.values()) if writes else nullcontext(),
        ):
            rows, of_each = Rows(own, start.kept, sets), partial(one_task, over_sets)

            def of_one(*args: Any) -> Any:
                with self._attributes(model):  # each task finds the attributes as they were
                    return of_each(*args)

            of_tasks = partial(self._one_by_one, of_one) if loop else partial(self._over_tasks, of_each)
            found = of_tasks(rows, mode, draws)
        self.shortened = {name: w.detach() for name, w in own.items()} if writes else {}
        return found

    def shortens(self, model: nn.Module) -> bool:
        """Whether the model shortens rows of its tables, see `metamom.maml.under_vmap.largest_norms`."""
        if self._shortens is None:
            self._shortens = shorten_rows(model)
        return self._shortens

    def _over_tasks(self, one_task: Callable[..., Tree], rows: Rows, mode: bool, draws: bool) -> Tree:
        """Map ``one_task`` over the tasks. Its random draws depend on the task's number."""
        if is_tracing() and draws:
            return over_tasks(one_task, "different")(*rows)
        if not (draws and mode in self.draws):
            try:
                return over_tasks(one_task, "error")(*rows)
            except RuntimeError as error:
                if not draws or "randomness" not in str(error):
                    raise
            self.draws.add(mode)

        def run(_: DrawsByTask, on: Callable[[], AbstractContextManager[Any]]) -> Tree:
            with on():
                return over_tasks(one_task, "different")(*rows)

        return self._drawing(run, rows, mode, loop=False)

    def _one_by_one(self, one_task: Callable[..., Tree], rows: Rows, mode: bool, draws: bool) -> Tree:
        """Call ``one_task`` for each task in turn. Its random draws depend on the task's number."""
        if is_tracing():
            return one_by_one(one_task, *rows)
        if not (draws and mode in self.draws):
            rewind, before = rewinder(), generator_states(device_of(rows.sets))
            try:
                with DrawsRefused() if mode not in self.leaves or mode in self.draws else nullcontext():
                    found = one_by_one(one_task, *rows)
                if all(torch.equal(a, b) for a, b in zip(before, generator_states(device_of(rows.sets)), strict=True)):
                    return found
                raise drawn()
            except RuntimeError as error:
                if not draws or "randomness" not in str(error):
                    raise
            rewind()
            self.draws.add(mode)
        return self._drawing(lambda by_task, on: one_by_one(by_task.each(one_task, on), *rows), rows, mode, loop=True)

    def _drawing(self, run: Callable[..., Tree], rows: Rows, mode: bool, *, loop: bool) -> Tree:
        """Run a model that draws. Look at every operation until all draws are known to be in functions that draw."""
        kind = mode, loop
        known = self.places.get(kind)
        found, self.places[kind] = drawn_by_task(run, count(rows.sets[-1]), device_of(rows.sets), known=known)
        return found

    @contextmanager
    def _functions(self, model: nn.Module, norm: AnyNorm | None, tasks: int, *, fast: bool) -> Iterator[None]:
        """Replace functions if the model is new, has called them before, or has modules that may call them."""
        kind = model.training, norm, tasks, are_many(), fast
        if not self.calls.get(kind, True) and not is_tracing():
            yield
            return
        with FunctionsByTask(fast=fast) as functions:
            yield
        self.calls[kind] = self.calls.get(kind, False) or functions.seen or may_call_them(model, loop=not fast)

    @contextmanager
    def _attributes(self, model: nn.Module) -> Iterator[None]:
        """Remove tensors that the model leaves in attributes."""
        mode = model.training
        none_so_far = mode in self.leaves and not self.leaves[mode]
        with (first_tensors_left if none_so_far else tensors_left)(modules_of(model)) as found:
            yield
        self.leaves[mode] = self.leaves.get(mode, frozenset()) | found


def _whole(x: Tree, mask: Tensor | None) -> Tensor:
    """A mask of all points if there is none."""
    return torch.ones(count(x), points(x), dtype=torch.bool, device=device_of(x)) if mask is None else mask
