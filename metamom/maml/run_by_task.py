"""Run a model with separate weights for each task: on all tasks at once, or task by task.

Legend: T tasks, N points of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metamom.common.trees import Tree, count, device_of, mapped, named_leaves
from metamom.compile.tracing import is_tracing
from metamom.maml import carried_over
from metamom.maml.autocast import autocast
from metamom.maml.draws import DrawsByTask, DrawsRefused, drawn, generator_states, rewinder
from metamom.maml.finite_differences import drawing_refused
from metamom.maml.functions_by_task import FunctionsByTask, may_call_them
from metamom.maml.misfits import check_output, inputs_explained
from metamom.maml.model_checks import check_hooks
from metamom.maml.padding import cut_off, mixes_points, put_back
from metamom.maml.plain_autograd import differentiable_twice, uncompiled, warm_starts
from metamom.maml.swapping import alone, in_mode, is_training, slots, swapped, tensors_left
from metamom.maml.task_weights import Params, Start
from metamom.maml.vectorize import one_by_one
from metamom.maml.vmap_errors import explained, unchanged

# Found in the errors of torch.autograd.grad and of hooks on tensors that do not require gradients.
WITHOUT_GRADIENTS = (
    "does not require grad",
    "doesn't require grad",
    "Expected gradient function to be set",
    "'NoneType' object has no attribute 'register_hook'",
)


class RunByTask:
    """Runs a model with `torch.func.vmap`, with the same results as a loop over the tasks; or in that loop.

    Differences between vmap and a loop are detected when they first occur and corrected from then on: random draws
    (`metamom.maml.draws`), some functions (`metamom.maml.functions_by_task`), and tensors left in attributes. They are
    recorded separately for training and evaluation mode.

    Attributes:
        draws: the modes (values of ``model.training``) in which the model draws at random.
        calls: whether the model calls such functions, by mode.
        leaves: whether the model leaves tensors in attributes, by mode; they are removed after the call.
        mixes: whether a prediction depends on the other points of its task, by mode.
    """

    def __init__(self) -> None:
        self.draws: set[bool] = set()
        self.calls: dict[bool, bool] = {}
        self.leaves: dict[bool, bool] = {}
        self.mixes: dict[bool, bool] = {}

    def __call__(
        self,
        model: nn.Module,
        start: Start,
        own: Params,
        x: Tree,
        draws: bool,
        dtype: torch.dtype | None,
        loop: bool,
        mask: Tensor | None = None,
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
            mask: the points that count, ``[T, N]``; in a loop, the model does not see the others.

        Raises:
            VmapError: for a model that cannot run with per-task weights under vmap.
            ValueError: for a model that changes its parameters or buffers in place, or draws at random although
                ``draws`` is false.
        """
        if not loop or is_tracing():
            check_hooks(model, compiling=loop)
        with alone(model):
            mode = is_training(model)
            new = mode not in self.leaves
            if loop and new:  # a write to a slice would reach the model's own parameters before it is noticed
                own, start = _copies(own), start._replace(kept=_copies(start.kept), shared=_copies(start.shared))
            one_task, watched = _of_one_task(model, start, own, new=new, loop=loop)
            with (
                explained(model, loop=loop),
                nullcontext() if draws else drawing_refused(),
                unchanged(watched if loop else {**named_leaves("its input", x), **watched}, model, loop=loop),
                in_mode(model),
                autocast(device_of(x), dtype),
                self._functions(model, fast=not loop),
                self._attributes(model),
                carried_over.warn_of_draws(loop=loop) if new and draws else nullcontext(),
                inputs_explained(model, x, watched),
                differentiable_twice(model) if loop else uncompiled(),
            ):
                run = self._one_by_one if loop else self._over_tasks
                return run(one_task, own, start.kept, (x, mask) if loop and mask is not None else (x,), mode, draws)

    def loops_over_padded(
        self, model: nn.Module, predict: Callable[[Tree], Tree], x: Tree, mask: Tensor, *, must_not: bool
    ) -> bool:
        """Whether padded tasks must run one by one, since the padding would change the predictions for other points.

        Raises:
            ValueError: if they must, and ``must_not``.
        """
        mode = is_training(model)
        if mode not in self.mixes:
            rewind = rewinder()

            def again(x: Tree) -> Tree:
                rewind()
                return predict(x)

            mixes = mixes_points(model, again, x, mask)
            rewind()
            if mixes is None:  # try with the next batch; until then a loop is right in any case
                return not must_not
            self.mixes[mode] = mixes
        if self.mixes[mode] and must_not:
            raise ValueError(
                f"{type(model).__name__} computes with all points of a set at once (batch normalisation, or attention "
                "to the set), so the padding of a batch from metamom.pad would change its predictions. Use "
                'vectorize="auto" or "loop", which run such tasks one by one without padding, or layers such as '
                "GroupNorm that take each point alone."
            )
        return self.mixes[mode]

    def _over_tasks(
        self, one_task: Callable[..., Tree], own: Params, kept: Params, x: Tree, mode: bool, draws: bool
    ) -> Tree:
        """Map ``one_task`` over the tasks. Its random draws depend on the task's number."""
        if is_tracing() and draws:
            return _vmap(one_task, "different")(own, kept, x)
        if not (draws and mode in self.draws):
            try:
                return _vmap(one_task, "error")(own, kept, x)
            except RuntimeError as error:
                if not draws or "randomness" not in str(error):
                    raise
            self.draws.add(mode)
        with DrawsByTask(count(x)):
            return _vmap(one_task, "different")(own, kept, x)

    def _one_by_one(
        self, one_task: Callable[..., Tree], own: Params, kept: Params, x: Tree, mode: bool, draws: bool
    ) -> Tree:
        """Call ``one_task`` for each task in turn. Its random draws depend on the task's number."""
        if is_tracing():
            return one_by_one(one_task, own, kept, x)
        if not (draws and mode in self.draws):
            rewind, before = rewinder(), generator_states(device_of(x))
            try:
                with DrawsRefused() if mode not in self.leaves or mode in self.draws else nullcontext():
                    found = one_by_one(one_task, own, kept, x)
                if all(torch.equal(a, b) for a, b in zip(before, generator_states(device_of(x)), strict=True)):
                    return found
                raise drawn()
            except RuntimeError as error:
                if not draws or "randomness" not in str(error):
                    raise
            rewind()
            self.draws.add(mode)
        return one_by_one(DrawsByTask(count(x)).each(one_task), own, kept, x)

    @contextmanager
    def _functions(self, model: nn.Module, *, fast: bool) -> Iterator[None]:
        """Replace functions if the model has called them before, has modules that may call them, or is new."""
        mode = model.training
        if not self.calls.get(mode, True) and not may_call_them(model):
            yield
            return
        with FunctionsByTask(fast=fast) as functions:
            yield
        self.calls[mode] = self.calls.get(mode, False) or functions.seen

    @contextmanager
    def _attributes(self, model: nn.Module) -> Iterator[None]:
        """Remove tensors that the model leaves in attributes, if it has done so before or is new."""
        mode = model.training
        if not self.leaves.get(mode, True):
            yield
            return
        with tensors_left(model) as names:
            yield
        self.leaves[mode] = self.leaves.get(mode, False) or bool(names)


def _of_one_task(
    model: nn.Module, start: Start, own: Params, *, new: bool, loop: bool
) -> tuple[Callable[..., Tree], Params]:
    """The model as a function of one task's parameters and inputs, and the tensors that it must leave unchanged."""
    found = slots(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}  # leave the model's own buffers unchanged
    given = {**buffers, **start.shared, **start.kept, **own}
    watched = {name: given.get(name, tensor) for name, tensor in found.tensors.items()}
    scratch = warm_starts(model) if loop else frozenset()

    def one_task(own: Params, kept: Params, given: tuple[Tree, ...]) -> Any:
        x, *mask = given
        weights = {**buffers, **start.shared, **kept, **own}
        if loop:  # the task's own copies, to write to
            x = mapped(Tensor.clone, cut_off(x, mask[0]) if mask else x)
            weights.update((name, buffers[name].clone()) for name in scratch & buffers.keys())
        places = {name: w for name, w in weights.items() if name in found.places}

        def with_weights(places: Params) -> Any:
            with swapped(found, places), carried_over.refused(model) if new else nullcontext():
                return call(model, x)

        out = _with_gradients_if_needed(with_weights, places, found.tensors) if loop else with_weights(places)
        check_output(model, out)
        return put_back(out, mask[0]) if mask else out

    return one_task, watched


def call(model: Callable[..., Any], x: Tree) -> Any:
    """Call a model: ``model(x)`` for a tensor, ``model(**x)`` for a dict, ``model(*x)`` for a tuple or a list."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def _copies(params: Params) -> Params:
    return {name: w.clone() for name, w in params.items()}


def _with_gradients_if_needed(call: Callable[[Params], Any], places: Params, tensors: Params) -> Any:
    """The output for one task, of a model that may differentiate inside its forward, or register hooks on tensors.

    It can do so in a plain loop whether or not the caller wants gradients, since its parameters require them.
    """
    try:
        return call(places)
    except (RuntimeError, AssertionError, AttributeError) as error:
        if not any(sign in str(error) for sign in WITHOUT_GRADIENTS):
            raise
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        out = call(
            {
                name: w.detach().clone().requires_grad_() if tensors[name].requires_grad and not w.requires_grad else w
                for name, w in places.items()
            }
        )
    return out if wanted else pytree.tree_map_only(Tensor, Tensor.detach, out)


def _vmap(one_task: Callable[..., Tree], randomness: str) -> Callable[..., Tree]:
    batched: Callable[..., Tree] = torch.func.vmap(one_task, randomness=randomness)
    return batched
