"""What an operator carries from call to call, as a plain value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from metamom.bias.coordinates import Coordinates

Kept = Mapping[str, Tensor]  # one worker's tensors [d] by name


@dataclass(frozen=True, eq=False)
class State:
    """The state between two transitions. Empty at the start, and always for an operator without state.

    Attributes:
        workers: each worker's tensors ``[d]`` by name (error feedback).
        generators: the states of the operators' ``generator=``. One that is missing starts where it is.
        server: the server's estimates, if messages are sent: their sum ``[d]``, or each worker's ``[n, d]`` (EF21).
    """

    workers: Mapping[int, Kept] = field(default_factory=dict)
    generators: Mapping[torch.Generator, Tensor] = field(default_factory=dict)
    server: Tensor | None = None


EMPTY = State()


def with_generators(place: Coordinates, generators: Iterable[torch.Generator], state: State) -> Coordinates:
    """Add copies of the generators, in this state, to draw from in one transition."""
    copies = {}
    for generator in generators:
        drawn = state.generators.get(generator)
        copies[generator] = torch.Generator(device=generator.device)
        copies[generator].set_state(generator.get_state() if drawn is None else drawn)
    return place._replace(generators=copies) if copies else place


def after_draws(state: State, place: Coordinates) -> State:
    """The state after draws from the generators of `with_generators`."""
    if not place.generators:
        return state
    drawn = {generator: copy.get_state() for generator, copy in place.generators.items()}
    return replace(state, generators={**state.generators, **drawn})
