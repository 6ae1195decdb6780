"""One task's call of a model, with the task's weights in it and everything else as it was.

Legend: N points of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from metamom.common.held import held
from metamom.common.modules import named_buffers_of
from metamom.common.trees import Tree, mapped
from metamom.compile.tracing import is_tracing
from metamom.maml.checks import carried_over
from metamom.maml.checks.misfits import check_output
from metamom.maml.heads import Watch
from metamom.maml.padding import cut_off, put_back
from metamom.maml.running.plain_autograd import warm_starts, with_gradients_if_needed
from metamom.maml.running.swapping import slots, swapped
from metamom.maml.task_weights import Params, Start
from metamom.maml.under_vmap.functions_by_task import checked
from metamom.maml.vmap_errors import unchanged


class Masked(NamedTuple):
    """A set and the points of it that count, ``[T, N, ...]`` and ``[T, N]``, or of one task."""

    x: Tree
    mask: Tensor


def of_one_task(
    model: nn.Module, start: Start, own: Params, target: Callable[..., Any], *, new: bool, loop: bool, writes: bool
) -> tuple[Callable[..., Tree], Params]:
    """One task's run of ``target``, and the tensors that the model must leave unchanged.

    It is a function of `normalising`'s call, the task's parameters and its sets of inputs. With ``writes``, the model
    may change the parameters in ``own``.
    """
    found = slots(model)
    buffers = {name: b.clone() for name, b in named_buffers_of(model).items()}  # the model's own stay unchanged
    given = {**buffers, **start.shared, **start.kept, **own}
    written = own.keys() if writes else ()
    watched = {name: given.get(name, tensor) for name, tensor in found.tensors.items() if name not in written}
    scratch = (warm_starts(model) if loop else frozenset()).union(written)

    def one_task(
        over_sets: Callable[[Callable[[Tree], Any], tuple[Tree, ...]], Any],
        own: Params,
        kept: Params,
        sets: tuple[Tree, ...],
    ) -> Any:
        weights = {**buffers, **start.shared, **kept, **own}
        mask = sets[-1].mask if isinstance(sets[-1], Masked) else None
        if loop:  # the task's own copies, to write to
            sets = tuple(mapped(Tensor.clone, cut_off(*x) if isinstance(x, Masked) else x) for x in sets)
            weights.update((name, buffers[name].clone()) for name in scratch & buffers.keys())
        places = {name: w for name, w in weights.items() if name in found.places}
        trainable = [name for name in places if found.tensors[name].requires_grad]
        moved = {name: w for name, w in places.items() if new and loop and name not in scratch and not is_tracing()}

        def with_weights(places: Params) -> Any:
            with (
                swapped(found, places),
                carried_over.refused(model, {name: places[name] for name in trainable}) if new else nullcontext(),
                unchanged(moved, model, loop=loop, closely=moved),
            ):
                return checked(lambda: held(over_sets(partial(call, target), sets)))

        out = with_gradients_if_needed(with_weights, places, trainable) if loop else with_weights(places)
        check_output(model, out)
        if mask is not None:
            return put_back(out, mask)
        return (out, target.features()) if isinstance(target, Watch) else out

    return one_task, watched


def call(model: Callable[..., Any], x: Tree) -> Any:
    """Call a model: ``model(x)`` for a tensor, ``model(**x)`` for a dict, ``model(*x)`` for a tuple or a list."""
    if isinstance(x, Tensor):
        return model(x)
    return model(**x) if isinstance(x, Mapping) else model(*x)


def copies(params: Params) -> Params:
    return {name: w.clone() for name, w in params.items()}
