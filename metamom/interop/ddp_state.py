"""An operator's state over a whole gradient, divided among groups of parameters, and joined again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from metamom.bias import BiasOperator
from metamom.bias.coordinates import Sizes
from metamom.bias.state import State

Groups = tuple[tuple[int, ...], ...]
"""Numbers of parameters: each parameter is in one group."""


def divided(operator: BiasOperator, groups: Groups, sizes: Sizes) -> list[BiasOperator]:
    """An operator for each group, with its part of the state.

    Args:
        operator: with the state of the gradient ``[d]`` of all parameters, in order.
        groups: the parameters of each group, in the order in which its gradient holds them.
        sizes: the numbers of entries of the parameters.
    """
    state = operator.current_state()
    return [_with_state(operator, _mapped(state, partial(_part, numbers=group, sizes=sizes))) for group in groups]


def joined(operators: Sequence[BiasOperator], groups: Groups, sizes: Sizes) -> BiasOperator:
    """The operator that `divided` into these."""
    order = [number for group in groups for number in group]
    states = [each.current_state() for each in operators]
    backwards = [order.index(number) for number in range(len(order))]
    lengths = [sizes[number] for number in order]
    first = states[0]
    workers = {
        worker: {name: torch.cat([state.workers[worker][name] for state in states]) for name in kept}
        for worker, kept in first.workers.items()
    }
    server = None
    if first.server is not None:
        server = torch.cat([state.server for state in states if state.server is not None], -1)
    whole = replace(first, workers=workers, server=server)
    return _with_state(operators[0], _mapped(whole, partial(_part, numbers=backwards, sizes=lengths)))


def _with_state(operator: BiasOperator, state: State) -> BiasOperator:
    """A copy with another state."""
    made = copy.deepcopy(operator)
    made.store(state)
    return made


def _part(entries: Tensor, numbers: Sequence[int], sizes: Sizes) -> Tensor:
    """The entries ``[..., d]`` of these parameters, in this order."""
    pieces = entries.split_with_sizes(list(sizes), -1)
    return torch.cat([pieces[number] for number in numbers], -1)


def _mapped(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """Change every tensor ``[..., d]`` of a state."""
    workers: Mapping[int, Mapping[str, Tensor]] = {
        worker: {name: change(tensor) for name, tensor in kept.items()} for worker, kept in state.workers.items()
    }
    return replace(state, workers=workers, server=None if state.server is None else change(state.server))
