"""Choices and defaults that the help shows and that are defined where torch is imported; a test compares the two."""

from __future__ import annotations

ORDERS = ("replacement", "reshuffle")  # metamom.tasks.fixed
FIRST_STEPS = ("zero", "gradient")  # metamom.optim.FirstStep
SERVERS = ("replicated", "rank0")  # metamom.distributed
TIMEOUT = 600.0  # metamom.distributed
EPOCHS = {"mnist": 200, "fashion": 300}  # metamom.experiments.paper.run
# the grid of step sizes and the target of a comparison: metamom.experiments.compare.DEFAULTS
COMPARED = {"sinusoid": ((0.01, 0.03), 1.0), "omniglot": ((0.1, 0.3, 1.0), 0.85)}
