"""Run a model on all tasks at once, with separate weights for each task.

Legend: T tasks, N points of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm
from metamom.compile.tracing import is_tracing
from metamom.maml import carried_over
from metamom.maml.autocast import autocast
from metamom.maml.draws import DrawsByTask
from metamom.maml.finite_differences import drawing_refused
from metamom.maml.functions_by_task import FunctionsByTask, may_call_them
from metamom.maml.misfits import check_output, inputs_explained
from metamom.maml.norm_modes import normalising
from metamom.maml.swapping import alone, in_mode, slots, swapped, tensors_left
from metamom.maml.task_weights import Params, Start
from metamom.maml.vmap_errors import explained, unchanged


class RunByTask:
    """Runs a model with `torch.func.vmap`, with the same results as a loop over the tasks.

    Differences between vmap and a loop are detected when they first occur and corrected from then on: random draws
    (`metamom.maml.draws`), some functions (`metamom.maml.functions_by_task`), and tensors left in attributes. They are
    recorded separately for training and evaluation mode.

    Attributes:
        draws: the modes (values of ``model.training``) in which the model draws at random.
        calls: whether the model calls such functions, by mode and by what its normalisations use.
        leaves: whether the model leaves tensors in attributes, by mode; they are removed after the call.
    """

    def __init__(self) -> None:
        self.draws: set[bool] = set()
        self.calls: dict[tuple[bool, Norm | None], bool] = {}
        self.leaves: dict[bool, bool] = {}

    def __call__(
        self,
        model: nn.Module,
        start: Start,
        own: Params,
        x: Tensor,
        *,
        draws: bool,
        dtype: torch.dtype | None,
        norm: Norm | None = None,
        support: Tensor | None = None,
    ) -> Tensor:
        """Predictions ``[T, N, ...]``.

        Args:
            model: always restored, even after an error; no other thread runs it at the same time.
            start: the parameters that all tasks share, or that inner steps do not move.
            own: each task's other parameters, ``[T, *shape]``.
            x: ``[T, N, ...]``.
            draws: whether the model may draw at random.
            dtype: dtype of its products, see `metamom.maml.autocast.autocast`.
            norm: what its normalisations use, from `metamom.maml.norm.resolved`.
            support: the set with the statistics that ``norm="support"`` uses, ``[T, S, ...]``; ``None`` for ``x``.

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
            sets = (x,) if support is None else (support, x)

            def one_task(own: Params, kept: Params, sets: tuple[Tensor, ...]) -> Tensor:
                weights = {**buffers, **start.shared, **kept, **own}
                places = {name: w for name, w in weights.items() if name in found.places}
                with swapped(found, places), carried_over.refused(model) if new else nullcontext():
                    out: Tensor = call(model, sets)
                check_output(model, out)
                return out

            with (
                explained(model),
                nullcontext() if draws else drawing_refused(),
                unchanged({"its input": x, "its support set": sets[0], **watched}, model),
                in_mode(model),
                autocast(x.device, dtype),
                self._functions(model, norm),
                normalising(model, norm) as call,  # its functions may be replaced again by those above
                self._attributes(model),
                carried_over.warn_of_draws() if new and draws else nullcontext(),
                inputs_explained(model, x, watched),
            ):
                return self._over_tasks(one_task, own, start.kept, sets, model.training, draws)

    def _over_tasks(
        self,
        one_task: Callable[..., Tensor],
        own: Params,
        kept: Params,
        sets: tuple[Tensor, ...],
        mode: bool,
        draws: bool,
    ) -> Tensor:
        """Map ``one_task`` over the tasks. Its random draws depend on the task's number."""
        if is_tracing() and draws:
            return _vmap(one_task, "different")(own, kept, sets)
        if not (draws and mode in self.draws):
            try:
                return _vmap(one_task, "error")(own, kept, sets)
            except RuntimeError as error:
                if not draws or "randomness" not in str(error):
                    raise
            self.draws.add(mode)
        with DrawsByTask(sets[-1].shape[0]):
            return _vmap(one_task, "different")(own, kept, sets)

    @contextmanager
    def _functions(self, model: nn.Module, norm: Norm | None) -> Iterator[None]:
        """Replace functions if the model has called them before, has modules that may call them, or is new."""
        kind = model.training, norm
        if not self.calls.get(kind, True) and not may_call_them(model):
            yield
            return
        with FunctionsByTask() as functions:
            yield
        self.calls[kind] = self.calls.get(kind, False) or functions.seen

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
