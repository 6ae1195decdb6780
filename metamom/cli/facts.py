"""Choices and defaults that the help shows and that are defined where torch is imported; a test compares the two."""

from __future__ import annotations

ORDERS = ("replacement", "reshuffle")  # metamom.tasks.fixed
FIRST_STEPS = ("zero", "gradient")  # metamom.optim.FirstStep
SERVERS = ("replicated", "rank0")  # metamom.distributed
DATA_SETS = ("omniglot", "mnist", "fashion")  # metamom.tasks.locate.LAYOUTS
TIMEOUT = 600.0  # metamom.distributed
EPOCHS = {"mnist": 200, "fashion": 300}  # metamom.experiments.paper.run
