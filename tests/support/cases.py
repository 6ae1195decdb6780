"""Many quick cases in one test, where a test for each would spend its time in pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import signature
from itertools import product

import pytest


def loop_over(**values: Iterable[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test for all combinations of these arguments, in a loop within one test; a failure names its case.

    Like `pytest.mark.parametrize`, for cases that take milliseconds and need no fixture of their own.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def looped(**others: object) -> None:
            for combination in combinations:
                case = dict(zip(values, combination, strict=True))
                try:
                    test(**others, **case)
                except (Exception, pytest.fail.Exception) as error:
                    named = ", ".join(f"{name}={value!r:.100}" for name, value in case.items())
                    raise AssertionError(f"for {named}: {error}") from error

        combinations = list(product(*values.values()))
        assert combinations
        own = signature(test)
        others = [parameter for name, parameter in own.parameters.items() if name not in values]
        looped.__signature__ = own.replace(parameters=others)  # type: ignore[attr-defined]
        return looped

    return decorate
