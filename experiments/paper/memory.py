"""The number of nodes computed at a time, so that a run stays within a memory limit.

The estimates in bytes err on the large side; tests measure what runs really use.
"""

from __future__ import annotations

from typing import NamedTuple

LIMIT = 2_000_000_000  # of a run, unless the user sets the number of nodes at a time
PROCESS = 500_000_000  # the interpreter with torch and its libraries, and temporary memory while they load
CHUNK = 500 << 20  # of the nodes computed at a time: more of them are no faster
WEIGHTS = 6  # tensors of the weights' size: themselves, momentum, gradient, sums
ROWS = 6  # per node computed at a time: its gradient, and the operator's output
ROWS_OF_STATE = 2  # extra, per tensor that the operator keeps: the state before and after


class Needs(NamedTuple):
    """The sizes that decide how much memory a run needs.

    Attributes:
        nodes: n.
        parameters: d.
        data: bytes of the data.
        images: number of images per node.
        activations: numbers kept per image for the backward pass.
        together: whether a chunk's nodes are computed at once, or one after the other.
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
        """Bytes for any chunk: the process, data, weights, the nodes' states, and the activations of one node."""
        numbers = (WEIGHTS + self.nodes * self.kept) * self.parameters
        numbers += 0 if self.together else self.images * self.activations
        return PROCESS + self.data + self.element_size * numbers

    @property
    def of_a_node(self) -> int:
        """Bytes per node of a chunk: its gradient, the operator's output, its activations."""
        numbers = (ROWS + ROWS_OF_STATE * self.kept) * self.parameters
        numbers += self.images * self.activations if self.together else 0
        return self.element_size * numbers


def largest_chunk(needs: Needs) -> int:
    """The number of nodes that may be computed at a time.

    Raises:
        ValueError: if even one is too many.
    """
    room = LIMIT - needs.fixed
    if room < needs.of_a_node:
        state = needs.element_size * needs.nodes * needs.kept * needs.parameters
        of_state = f", {state / 1e9:.1f} GB of it the operator's state for {needs.nodes} nodes" if state else ""
        raise ValueError(
            f"this run takes about {(needs.fixed + needs.of_a_node) / 1e9:.1f} GB{of_state}, more than the "
            f"{LIMIT / 1e9:g} GB limit for an automatic chunk. Pass chunk=1 (--chunk 1) to run it anyway, or use "
            f"{'an operator that keeps less, or fewer' if state else 'more'} nodes."
        )
    return min(needs.nodes, max(1, min(room, CHUNK) // needs.of_a_node))
