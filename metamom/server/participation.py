"""Partial participation: which workers are present in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metamom.common.checks import check_number, check_whole
from metamom.rng import DrawCoordinates, Purpose, choose, uniforms


def check_participation(share: object) -> float:
    """Check the share of workers that are present in each step, and return it.

    Raises:
        TypeError: for anything but a number.
        ValueError: unless 0 < share <= 1.
    """
    check_number("participation", share)
    assert isinstance(share, (int, float, np.number))
    if not 0 < share <= 1:
        raise ValueError(f"participation is the share of workers that are present, 0 < share <= 1; got {share}.")
    return float(share)


def present_count(workers: int, share: float) -> int:
    """The number of workers that are present in each step: ``share * workers`` rounded, at least 1.

    Example:
        >>> present_count(10, 0.3), present_count(4, 0.1)
        (3, 1)
    """
    return max(1, int(share * workers + 0.5))


def present_workers(workers: int, share: float, step: int, seed: int = 0) -> tuple[int, ...]:
    """Draw the workers that are present in a step, all sets of `present_count` workers equally likely.

    The draw depends on the seed and the step only, so all processes draw the same workers.

    Args:
        workers: n >= 1.
        share: of the workers that are present, in (0, 1].
        step: the number of the step, >= 0.
        seed: 0 <= seed < 2^64.

    Returns:
        Their numbers, ascending.

    Example:
        >>> present_workers(6, 0.5, step=0), present_workers(6, 0.5, step=1)
        ((1, 2, 5), (0, 3, 4))
    """
    count = present_count(workers, share)
    if count == workers:
        return tuple(range(workers))
    at = DrawCoordinates("participation", step, np.zeros(1, dtype=np.int64))
    return tuple(sorted(choose(uniforms(seed, at, Purpose.BIAS, count), workers)[0].tolist()))


class Participation:
    """The workers of each step in turn: `present_workers` with a count of the steps, for a checkpoint.

    Args:
        share: of the workers that are present, 0 < share <= 1.
        seed: of the draws, 0 <= seed < 2^64.

    Attributes:
        steps: the number of steps so far.

    Raises:
        ValueError: for a share or seed out of range.

    Example:
        >>> participation = Participation(0.5, seed=1)
        >>> len(participation.present(6))
        3
    """

    def __init__(self, share: float, *, seed: int = 0) -> None:
        self.share = check_participation(share)
        self.seed = check_whole("the seed of participation", seed, 0, 2**64 - 1)
        self.steps = 0

    def present(self, workers: int) -> tuple[int, ...]:
        """The workers of the next step, ascending."""
        return present_workers(workers, self.share, self.steps, self.seed)

    def advance(self) -> None:
        """Count a step."""
        self.steps += 1

    def reset(self) -> None:
        """Go back to the first step."""
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, for a checkpoint."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: for anything but a number of steps.
        """
        steps = state.get("steps")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"participation counts its steps by a whole number >= 0 as 'steps'; got {steps!r:.80}.")
        self.steps = steps

    def described(self) -> dict[str, Any]:
        """The share and the seed, as JSON values."""
        return {"share": self.share, "seed": self.seed}

    def __repr__(self) -> str:
        seeded = f", seed={self.seed}" if self.seed else ""
        return f"Participation({self.share!r}{seeded})"
