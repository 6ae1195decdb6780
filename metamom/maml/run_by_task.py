"""Run a model on all tasks at once, with separate weights for each task.

Legend: T tasks, N points of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metamom.compile.tracing import is_tracing
from metamom.maml import carried_over
from metamom.maml.autocast import autocast
from metamom.maml.draws import DrawsByTask, repeatable
from metamom.maml.finite_differences import drawing_refused
from metamom.maml.functions_by_task import FunctionsByTask, may_call_them
from metamom.maml.misfits import check_output, inputs_explained
from metamom.maml.model_checks import modules_with_backward_hooks
from metamom.maml.one_by_one import (
    Vectorize,
    buffers_of_pytorch,
    checkpoint_refused,
    one_by_one,
    twice_differentiable,
)
from metamom.maml.swapping import alone, in_mode, slots, swapped, tensors_left
from metamom.maml.task_weights import Params, Start
from metamom.maml.vmap_errors import VmapError, explained, unchanged

R = TypeVar("R")


class RunByTask:
    """Runs a model with `torch.func.vmap`, or task by task where that is not possible, with the results of a loop.

    Differences between vmap and a loop are detected when they first occur and corrected from then on: random draws
    (`metamom.maml.draws`), some functions (`metamom.maml.functions_by_task`), and tensors left in attributes. They are
    recorded separately for training and evaluation mode.

    Args:
        vectorize: ``"vmap"``, ``"loop"``, or ``"auto"`` for vmap until it turns out that it is not possible.
        model: to see whether it has backward hooks, which do not run under vmap.

    Attributes:
        looped: whether the model and its loss run task by task.
        draws: the modes (values of ``model.training``) in which the model draws at random.
        calls: whether the model calls such functions, by mode.
        leaves: whether the model leaves tensors in attributes, by mode; they are removed after the call.
    """

    def __init__(self, vectorize: Vectorize, model: nn.Module) -> None:
        self.vectorize = vectorize
        self.looped = vectorize == "loop"
        self.draws: set[bool] = set()
        self.calls: dict[bool, bool] = {}
        self.leaves: dict[bool, bool] = {}
        if vectorize == "auto" and (hooked := modules_with_backward_hooks(model)):
            self.looped = True
            self._warn(f"Backward hooks do not run on all tasks at once, and the model has some: {', '.join(hooked)}.")

    def falling_back(self, compute: Callable[[], R]) -> R:
        """Compute something with this model or its loss: task by task from now on, if it is not possible with vmap.

        Raises:
            VmapError: if vmap was asked for, and is not possible.
        """
        if self.looped or self.vectorize == "vmap" or is_tracing():
            return compute()
        with repeatable() as back:
            try:
                return compute()
            except VmapError as error:
                why = str(error)
            back()
            self.looped = True
            try:
                found = compute()
            except BaseException:
                self.looped = False
                raise
        self._warn(why)
        return found

    def _warn(self, why: str) -> None:
        warnings.warn(
            f"{why} From now on it runs task by task: the gradients are the same, and a step takes up to as many times "
            'as long as there are tasks. vectorize="loop" does so without this warning.',
            stacklevel=2,
        )

    def __call__(
        self, model: nn.Module, start: Start, own: Params, x: Tensor, draws: bool, dtype: torch.dtype | None
    ) -> Tensor:
        """Predictions ``[T, N, ...]``.

        Args:
            model: always restored, even after an error; no other thread runs it at the same time.
            start: the parameters that all tasks share, or that inner steps do not move.
            own: each task's other parameters, ``[T, *shape]``.
            x: ``[T, N, ...]``.
            draws: whether the model may draw at random.
            dtype: dtype of its products, see `metamom.maml.autocast.autocast`.

        Raises:
            ValueError: for a model that cannot run with per-task weights, changes its parameters, buffers or inputs in
                place, or draws at random although ``draws`` is false.
        """
        with alone(model):
            new = model.training not in self.leaves
            found = slots(model)
            buffers = {name: b.clone() for name, b in model.named_buffers()}  # leave the model's own buffers unchanged
            given = {**buffers, **start.shared, **start.kept, **own}
            watched = {name: given.get(name, tensor) for name, tensor in found.tensors.items()}
            if self.looped:  # each task gets its own buffers, which PyTorch's layers may change (spectral norm)
                watched = {name: tensor for name, tensor in watched.items() if name not in buffers_of_pytorch(model)}

            def one_task(own: Params, kept: Params, x: Tensor) -> Tensor:
                fixed = {name: b.clone() for name, b in buffers.items()} if self.looped else buffers
                weights = {**fixed, **start.shared, **kept, **own}
                places = {name: w for name, w in weights.items() if name in found.places}
                with swapped(found, places), carried_over.refused(model) if new else nullcontext():
                    out: Tensor = model(x)
                check_output(model, out)
                return out

            with (
                explained(model),
                nullcontext() if draws else drawing_refused(),
                unchanged({"its input": x, **watched}, model),
                in_mode(model),
                autocast(x.device, dtype),
                self._functions(model),
                self._attributes(model),
                carried_over.warn_of_draws() if new and draws else nullcontext(),
                inputs_explained(model, x, watched),
            ):
                if not self.looped:
                    return self._over_tasks(one_task, own, start.kept, x, model.training, draws)
                with twice_differentiable(model), checkpoint_refused() if new else nullcontext():
                    return self._one_by_one(one_task, own, start.kept, x, model.training)

    def _over_tasks(
        self, one_task: Callable[..., Tensor], own: Params, kept: Params, x: Tensor, mode: bool, draws: bool
    ) -> Tensor:
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
        with DrawsByTask(x.shape[0]):
            return _vmap(one_task, "different")(own, kept, x)

    def _one_by_one(self, one_task: Callable[..., Tensor], own: Params, kept: Params, x: Tensor, mode: bool) -> Tensor:
        """Call ``one_task`` for each task. Its random draws depend on the task's number, as under vmap."""
        tasks = x.shape[0]
        out: Tensor
        if mode not in self.draws:
            before = torch.get_rng_state()
            out = one_by_one(one_task, tasks)(own, kept, x)
            if is_tracing() or torch.equal(before, torch.get_rng_state()):
                return out
            torch.set_rng_state(before)
            self.draws.add(mode)
        rows = iter(range(tasks))

        def drawing(*args: Any) -> Tensor:
            with DrawsByTask(tasks, row=next(rows)):
                return one_task(*args)

        out = one_by_one(drawing, tasks)(own, kept, x)
        return out

    @contextmanager
    def _functions(self, model: nn.Module) -> Iterator[None]:
        """Replace functions if the model has called them before, has modules that may call them, or is new."""
        mode = model.training
        if not self.calls.get(mode, True) and not may_call_them(model):
            yield
            return
        with FunctionsByTask() as functions:
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


def _vmap(one_task: Callable[..., Tensor], randomness: str) -> Callable[..., Tensor]:
    batched: Callable[..., Tensor] = torch.func.vmap(one_task, randomness=randomness)
    return batched
