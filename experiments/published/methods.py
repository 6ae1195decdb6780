"""The settings of a published method for any run of its kind of tasks: ``metamom train --recipe``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metamom.experiments.published.recipes import OMNIGLOT, SINUSOID, Published

METHODS: Mapping[str, Mapping[str, Published]] = {"sinusoid": SINUSOID, "omniglot": OMNIGLOT, "images": OMNIGLOT}
"""The methods by name, for each task family."""


def method(task: str, name: str, ways: int | None, iterations: int) -> dict[str, Any]:
    """The options of a `metamom.experiments.recipes.Recipe` that a method sets.

    Args:
        task: the task family.
        name: of the method.
        ways: classes of a task, ``None`` for tasks without. The published settings are for 5 and 20; others get those
            of the nearer one.
        iterations: of the run, for options that are a share of them.

    Example:
        >>> method("omniglot", "maml", 5, 60_000)["inner_lr"], method("omniglot", "maml", 18, 60_000)["inner_lr"]
        (0.4, 0.1)
    """
    published = METHODS[task][name]
    known = [each for each in published.meta_batch if each is not None]
    nearest = None if ways is None else min(known, key=lambda each: abs(each - ways))
    shares = {option: round(share.value * iterations) for option, share in published.shares.items()}
    return {**published.options(nearest), "meta_batch": published.meta_batch[nearest].value, **shares}
