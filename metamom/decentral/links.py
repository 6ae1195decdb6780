"""The exchange of one step between neighbours, whichever processes carry them."""

from __future__ import annotations

import torch
from torch import Tensor

from metamom.batch import block
from metamom.common.numbers import counted
from metamom.decentral.graph import neighbours
from metamom.decentral.step import Slots, mix, slots_of
from metamom.distributed import World
from metamom.distributed.neighbours import exchange


class Links:
    """Sends each worker's message to the processes of its neighbours, and mixes what arrives.

    A process sends a row once to each other process that needs it, however many workers need it there.

    Args:
        mixing: W, ``[n, n]``, checked.
        world: the processes.

    Raises:
        ValueError: if the number of processes does not divide n.

    Attributes:
        mine: this process's workers.
        edges: the number of pairs (i, j) for which j sends to i.
    """

    def __init__(self, mixing: Tensor, world: World) -> None:
        n = len(mixing)
        if n % world.size:
            raise ValueError(
                f"every process carries equally many workers with weights of their own: {counted(n, 'worker')} on "
                f"{world.size} processes do not divide. Start a number of processes that divides {n}."
            )
        self.mine = world.workers(n)
        self._world = world
        from_whom = neighbours(mixing)
        self.edges = sum(map(len, from_whom))
        blocks = [block(n, rank, world.size) for rank in range(world.size)]
        needed = [sorted({j for i in own for j in from_whom[i]} - set(own)) for own in blocks]
        crossing = {
            (p, q): [j for j in needed[q] if j in own] for p, own in enumerate(blocks) for q in range(len(blocks))
        }
        self._crossings = sum(map(len, crossing.values()))
        here = world.rank
        self._sends = {q: crossing[here, q] for q in range(len(blocks)) if crossing[here, q]}
        self._receives = {p: crossing[p, here] for p in range(len(blocks)) if crossing[p, here]}
        order = [*self.mine, *[worker for rows in self._receives.values() for worker in rows]]
        position = {worker: i for i, worker in enumerate(order)}
        slots = slots_of(mixing)
        mine = slots.positions[list(self.mine)].tolist()
        self._slots = Slots(
            torch.tensor([[position[worker] for worker in row] for row in mine]), slots.weights[list(self.mine)]
        )

    def mix(self, messages: Tensor) -> Tensor:
        """``sum_j W_ij message_j`` for this process's workers: ``[own, ...] -> [own, ...]``.

        Raises:
            ProcessError: if a process of a neighbour has died or does not arrive within the time-out.
        """
        first = self.mine.start
        sends = {peer: messages[[j - first for j in rows]] for peer, rows in self._sends.items()}
        arrived = {peer: messages.new_empty(len(rows), *messages.shape[1:]) for peer, rows in self._receives.items()}
        exchange(self._world, sends, arrived, self._crossings * messages[0].nbytes)
        return mix(torch.cat([messages, *arrived.values()]), self._slots)
