"""What a Flower client keeps between rounds, in its ``Context.state``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from metamom.interop.imports import import_flower

flower = import_flower()

ROUNDS, LAST, BASE = "metamom.rounds", "metamom.last", "metamom.base"  # names of the records


class Kept(NamedTuple):
    """A client's tensors ``[d]`` of error feedback by name, after a round; round 0 and no tensors at the start."""

    round: int
    tensors: Mapping[str, Tensor]


def recall(context: Any, delivered: int) -> Kept:
    """What the client kept after a round.

    A client whose last reply never arrived goes back to the state before it, so that it agrees with the server.

    Args:
        context: Flower's ``Context`` of this client.
        delivered: the last round of which the server has this client's message; 0 for none.

    Returns:
        That round's state, or the start if the client no longer has it.
    """
    rounds = context.state.get(ROUNDS, {})
    for name in (LAST, BASE):
        if delivered and rounds.get(name) == delivered:
            return Kept(delivered, dict(context.state[name].to_torch_state_dict()))
    return Kept(0, {})


def keep(context: Any, base: Kept, last: Kept) -> None:
    """Keep the state after a round, and the one before it."""
    context.state[ROUNDS] = flower.app.ConfigRecord({LAST: last.round, BASE: base.round})
    for name, kept in ((LAST, last), (BASE, base)):
        context.state[name] = flower.app.ArrayRecord(dict(kept.tensors))
