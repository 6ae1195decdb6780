"""Momentum without a server: workers on a graph, which exchange messages with their neighbours only.

    from metamom.decentral import DecentralizedMomentum, ring

    learners = [MAML(copy.deepcopy(net), loss_fn) for _ in range(8)]  # every worker has weights of its own
    optimizer = DecentralizedMomentum([each.parameters() for each in learners], ring(8), lr=0.03, beta=0.1)

`graph` has the mixing matrices, `step` the rule as a pure function, `optimizer` the class around it.
"""

from metamom.decentral.graph import check_mixing, complete, metropolis, ring, ring_gap, spectral_gap, torus, torus_gap
from metamom.decentral.optimizer import DecentralizedMomentum
from metamom.decentral.step import DecentralizedState, decentralized_step, initial_state

__all__ = [
    "DecentralizedMomentum",
    "DecentralizedState",
    "check_mixing",
    "complete",
    "decentralized_step",
    "initial_state",
    "metropolis",
    "ring",
    "ring_gap",
    "spectral_gap",
    "torus",
    "torus_gap",
]
