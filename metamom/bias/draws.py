"""The base of random operators: draws by counter, or from a generator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.checks import check_seed
from metamom.bias.coordinates import Coordinates
from metamom.rng import DrawCoordinates, Purpose, uniforms


class Draws(BiasOperator):
    """A random operator. Worker i draws at call k from the counter (seed, k, i), the same on any process."""

    seed: int
    generator: torch.Generator | None
    _calls: int

    def _seeded(self, seed: int, generator: torch.Generator | None) -> None:
        check_seed(seed)
        self.seed = seed
        self.generator = generator
        self._calls = 0

    @property
    def separable(self) -> bool:
        """Not with a ``generator``, since draws from it depend on the order of calls."""
        return self.generator is None

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return () if self.generator is None else (self.generator,)

    def reset(self) -> None:
        """Restart with the draws of the first call. A ``generator`` is not reset: its owner seeds it."""
        super().reset()
        self._calls = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of calls, and the state of the ``generator``, if any."""
        drawn = {} if self.generator is None else {"generator": self.generator.get_state()}
        return {"calls": self._calls, **drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BiasOperator`. A ``generator`` is set to the saved state.

        Raises:
            ValueError: if only one of the saved operator and this one has a generator; for a state without the number
                of calls.
        """
        if "calls" not in state:
            got = ", ".join(map(repr, state)) or "nothing"
            raise ValueError(f"{self.spec} resumes from its own state_dict(): 'calls', their number; got {got}.")
        if type(state["calls"]) is not int or state["calls"] < 0:
            raise ValueError(f"{self.spec} counts its calls by a whole number >= 0; got {state['calls']!r:.80}.")
        if ("generator" in state) != (self.generator is not None):
            saved, here = ("a generator", "seed=") if "generator" in state else ("seed=", "a generator")
            raise ValueError(
                f"{self.spec} drew by {saved} when it was saved and draws by {here} now: give it the same here."
            )
        self._calls = state["calls"]
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())

    @property
    def draw_step(self) -> int:
        return self._calls

    def advance(self) -> None:
        self._calls += 1

    @property
    def _seed_word(self) -> list[str]:
        return [f"seed={self.seed}"] if self.seed else []

    def _places(self, at: Coordinates) -> DrawCoordinates:
        indices = np.array(at.workers, dtype=np.int64)
        return DrawCoordinates(f"bias {type(self).__name__} {at.operator} {at.tensor}", at.step, indices)

    def _uniforms(self, at: Coordinates, n: int, count: int, device: torch.device) -> Tensor:
        """Draw numbers ``[n, count]`` on [0, 1) in float64, for the n workers at these coordinates."""
        if self.generator is not None:
            generator = at.generators[self.generator]
            drawn = torch.rand(n, count, generator=generator, device=generator.device, dtype=torch.float64)
        else:
            drawn = torch.from_numpy(uniforms(self.seed, self._places(at), Purpose.BIAS, count))
        return drawn.to(device)
