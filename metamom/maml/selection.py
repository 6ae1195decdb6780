"""Which parameters the inner steps move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType

from torch import Tensor, nn


def selected(
    adapt: Iterable[str] | Callable[[str], bool] | None,
    trainable: Mapping[str, Tensor],
    by_step: frozenset[str] = frozenset(),
    others: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Names of the parameters that the inner steps move, in the model's order.

    Args:
        adapt: the option of `metamom.MAML`.
        trainable: the parameters that they may move.
        by_step: those that ``step_norms`` learns for each inner step, which they do not move.
        others: the names of tied parameters that are not in ``trainable``, and the name there of each, from
            `other_names`.

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
        places = [(name, name) for name in trainable]
        places += [(other, name) for other, name in others.items() if name in trainable]
        unknown = [w for w in wanted if not any(_within(place, w) for place, _ in places)]
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
        found = {name for place, name in places if any(_within(place, w) for w in wanted)}
        names = tuple(name for name in trainable if name in found)
    if not names:
        raise ValueError(f"adapt selects no trainable parameter; the model has: {', '.join(trainable) or 'none'}.")
    return names


def other_names(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that are registered more than once, and the first name of each.

    Example:
        >>> tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tied[1].weight = tied[0].weight
        >>> other_names(tied)
        {'1.weight': '0.weight'}
    """
    first = {id(p): name for name, p in model.named_parameters()}
    places = ((f"{m}.{key}" if m else key, p) for m, key, p in _registered(model) if id(p) in first)
    return {place: first[id(p)] for place, p in places if first[id(p)] != place}


def _registered(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Each registration of a parameter: the name of its module, its own, and the parameter."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield from ((name, key, p) for key, p in module._parameters.items() if p is not None)


def _within(parameter: str, place: str) -> bool:
    return parameter == place or parameter.startswith(f"{place}.")
