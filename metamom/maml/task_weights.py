"""The weights that the tasks of a batch start from: those of their workers.

Legend: T tasks, n workers with T/n tasks each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from metamom.compile.tracing import is_tracing
from metamom.maml.normalisation.step_norms import PREFIX, after

Params = dict[str, Tensor]


class Start(NamedTuple):
    """The weights that T tasks start from.

    Attributes:
        own: parameters that the inner steps move, ``[T, *shape]``.
        kept: the other parameters if they differ between tasks (because workers differ), ``[T, *shape]``.
        shared: the other parameters if all tasks share them, ``[*shape]``: one large product instead of T.
        step_sizes: learned inner step sizes, ``[T, ...]``.
        norms: normalisations' scales and offsets by inner step, ``[T, J + 1, *shape]``, see
            `metamom.maml.normalisation.step_norms.StepNorms`.
    """

    own: Params
    kept: Params
    shared: Params
    step_sizes: Params
    norms: Mapping[str, Tensor] = MappingProxyType({})

    def at(self, step: int) -> Start:
        """The same, with the scales and offsets that belong to the weights after some inner steps."""
        return self._replace(kept={**self.kept, **after(self.norms, step)}) if self.norms else self


def deal(rows: Params, num_tasks: int, adapted: Collection[str], step_sizes: Collection[str]) -> Start:
    """Give T tasks the weights of their workers.

    Args:
        rows: the workers' meta-parameters, ``[n, *shape]``.
        num_tasks: T, a multiple of n; a worker's tasks are adjacent.
        adapted: names of the parameters that the inner steps move.
        step_sizes: names of the learned step sizes.
    """
    norms: Params = {}
    start = Start({}, {}, {}, {}, norms)
    for name, row in rows.items():
        workers, shape = row.shape[0], row.shape[1:]
        if workers == 1 and name not in adapted and name not in step_sizes and not name.startswith(PREFIX):
            start.shared[name] = row[0]
            continue
        # views with one worker, so that nothing is copied
        if workers == 1 and not is_tracing():  # compilers find products in the other form
            tasks = row.expand(num_tasks, *shape)
        else:
            tasks = row.unsqueeze(1).expand(workers, num_tasks // workers, *shape).reshape(num_tasks, *shape)
        kind = start.step_sizes if name in step_sizes else start.own if name in adapted else start.kept
        if name.startswith(PREFIX):
            kind, name = norms, name.removeprefix(PREFIX)
        kind[name] = tasks
    return start
