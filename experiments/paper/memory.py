"""How many nodes are computed at a time, so that a run stays within a bound on memory.

Reckoned in bytes, on the large side; tests measure what runs really take.
"""

from __future__ import annotations

from typing import NamedTuple

LIMIT = 2_000_000_000  # of a run, unless it is told how many nodes to take at a time
PROCESS = 500_000_000  # the interpreter with torch and its libraries, and what passes while they load
CHUNK = 500 << 20  # of nodes at a time: more of them are no faster
WEIGHTS = 6  # tensors of the weights' size: themselves, momentum, gradient, sums
ROWS = 6  # of a node's gradient at a time: itself, and what the operator makes of it
ROWS_OF_STATE = 2  # more, for each tensor that the operator keeps: the state before, and after


class Needs(NamedTuple):
    """What decides how much memory a run takes.

    Attributes:
        nodes: n.
        parameters: d.
        data: bytes of the data.
        images: of each node.
        activations: numbers kept for each image on the way back.
        together: whether a chunk's nodes are computed in one, or one after the other.
        kept: tensors ``[d]`` that the operator keeps for each node.
        element_size: bytes of a number.
    """

    nodes: int
    parameters: int
    data: int
    images: int
    activations: int
    together: bool
    kept: int
    element_size: int

    @property
    def fixed(self) -> int:
        """Bytes, whatever the chunk: the process, data, weights, the nodes' states, activations of one at a time."""
        numbers = (WEIGHTS + self.nodes * self.kept) * self.parameters
        numbers += 0 if self.together else self.images * self.activations
        return PROCESS + self.data + self.element_size * numbers

    @property
    def of_a_node(self) -> int:
        """Bytes for each node of a chunk: its gradient, what the operator makes of it, its activations."""
        numbers = (ROWS + ROWS_OF_STATE * self.kept) * self.parameters
        numbers += self.images * self.activations if self.together else 0
        return self.element_size * numbers


def largest_chunk(needs: Needs) -> int:
    """How many nodes may be computed at a time.

    Raises:
        ValueError: if even one is too many.
    """
    room = LIMIT - needs.fixed
    if room < needs.of_a_node:
        state = needs.element_size * needs.nodes * needs.kept * needs.parameters
        of_state = f", {state / 1e9:.1f} GB of it the operator's state for {needs.nodes} nodes" if state else ""
        raise ValueError(
            f"this run takes about {(needs.fixed + needs.of_a_node) / 1e9:.1f} GB{of_state}, more than the "
            f"{LIMIT / 1e9:g} GB that are taken unasked. Pass chunk=1 (--chunk 1) to run it all the same, or take "
            f"{'an operator that keeps less, or fewer' if state else 'more'} nodes."
        )
    return min(needs.nodes, max(1, min(room, CHUNK) // needs.of_a_node))
