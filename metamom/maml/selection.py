"""Which parameters the inner steps move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor


def selected(
    adapt: Iterable[str] | Callable[[str], bool] | None,
    trainable: Mapping[str, Tensor],
    by_step: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    """Names of the parameters that the inner steps move, in the model's order.

    Args:
        adapt: the option of `metamom.MAML`.
        trainable: the parameters that they may move.
        by_step: those that ``step_norms`` learns for each inner step, which they do not move.

    Raises:
        ValueError: for unknown names, and if nothing is left.
        TypeError: for anything but names or a predicate.
    """
    if adapt is None:
        names = tuple(trainable)
    elif callable(adapt):
        names = tuple(name for name in trainable if adapt(name))
    else:
        if not isinstance(adapt, Iterable):
            raise TypeError(
                "adapt must be names of parameters or modules, as in ['head'], or a function of a parameter's name; "
                f"got {adapt!r}."
            )
        wanted = [adapt] if isinstance(adapt, str) else list(adapt)
        unknown = [w for w in wanted if not any(_within(name, w) for name in trainable)]
        if learned := [w for w in unknown if any(_within(name, w) for name in by_step)]:
            raise ValueError(
                f"step_norms=True learns scales and offsets for each inner step, and inner steps do not move them: "
                f"leave {', '.join(map(repr, learned))} out of adapt, or leave out step_norms."
            )
        if unknown:
            raise ValueError(
                f"adapt must name trainable parameters, or modules that hold some; {unknown} is none of "
                f"{', '.join(trainable)}."
            )
        names = tuple(name for name in trainable if any(_within(name, w) for w in wanted))
    if not names:
        raise ValueError(f"adapt selects no trainable parameter; the model has: {', '.join(trainable) or 'none'}.")
    return names


def _within(parameter: str, place: str) -> bool:
    return parameter == place or parameter.startswith(f"{place}.")
