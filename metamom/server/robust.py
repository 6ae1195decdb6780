"""Robust alternatives to the mean, which a few bad workers cannot move far."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from metamom.bias.checks import all_finite
from metamom.common.choices import Aggregate as Aggregate
from metamom.common.did_you_mean import did_you_mean
from metamom.common.numbers import shown
from metamom.server.attacks import Attack, parse_attack
from metamom.server.rules.base import MIXERS, RULES, Memory, Rule, load_all
from metamom.server.rules.entrywise import Mean
from metamom.server.rules.geometric import geometric_median as geometric_median
from metamom.server.rules.mixing import Mixed
from metamom.server.spelling import known, made, spelled

MOST_MIXERS = 5  # before one rule, far beyond any real use
FIRST = ("mean", "median", "geomedian", "trimmed")  # of version 0.1


def robust_mean(vectors: Tensor, how: Aggregate = "mean") -> Tensor:
    """Combine n vectors into one.

    Args:
        vectors: ``[n, d]``.
        how: ``"mean"``; ``"median"``, entrywise, the mean of the middle two if n is even; ``"trimmed:0.1"``, the
            entrywise mean without the ``floor(0.1 n)`` smallest and as many largest values; ``"geomedian"``, the point
            with the smallest sum of distances to the n vectors; ``"krum:F"`` and ``"multi-krum:F:M"``, the vector, or
            the mean of the M vectors, with the closest neighbours; ``"centred-clip:RADIUS:iterations=L"``, the mean of
            vectors clipped around a centre; ``"nnm:F>RULE"`` and ``"bucketing:S>RULE"``, one of these after mixing
            nearest neighbours or random buckets. The modules of `metamom.server.rules` have their definitions.

    Returns:
        ``[d]``. Rules with a memory (`RobustMean`) combine as in their first step.

    Raises:
        ValueError: for another spelling, or too few vectors.

    Example:
        >>> import torch
        >>> robust_mean(torch.tensor([[1.0], [2.0], [90.0]]), "median")
        tensor([2.])
        >>> robust_mean(torch.tensor([[1.0], [2.0], [3.0], [4.0], [90.0]]), "nnm:1>krum:1")
        tensor([2.5000])

    Reference:
        docs/theory/sources.md bounds their bias.
    """
    return parse_rule(how).combine(vectors)


def check_aggregate(how: Aggregate, workers: int | None = None) -> Rule:
    """Check ``how``, and return its rule.

    Args:
        how: as for `robust_mean`.
        workers: n, to check that the rule can combine as many.

    Raises:
        TypeError: for anything but a string.
        ValueError: for an unknown ``how``, or one that cannot combine n workers, or trims none of them.
    """
    rule = parse_rule(how)
    if workers is not None:
        rule.check(workers)
    return rule


def parse_rule(how: Aggregate) -> Rule:
    """Parse a robust mean: ``RULE``, or ``MIXER>RULE`` with one mixer or several.

    Raises:
        TypeError: for anything but a string.
        ValueError: for an unknown ``how``, and for arguments that are missing or out of range.

    Example:
        >>> parse_rule("bucketing:2>krum:1").spec
        'bucketing:2>krum:1'
    """
    if not isinstance(how, str):
        raise TypeError(f"aggregate is a name, mean, median, geomedian or trimmed:SHARE; got {how!r}.")
    load_all()
    *before, last = how.split(">")
    if len(before) > MOST_MIXERS:
        raise ValueError(f"aggregate has at most {MOST_MIXERS} mixers before a rule; got {len(before)}.")
    _check_names(how, before, last)
    rule = made(RULES, last, "aggregate")
    for each in reversed(before):
        rule = Mixed(made(MIXERS, each, "aggregate"), rule)
    return rule


def _check_names(how: str, before: list[str], last: str) -> None:
    """Refuse unknown names, and the first four rules with arguments that they do not take."""
    name = last.strip(" ").partition(":")[0]
    rules = known(RULES)
    refused = next((each for each in before if each.strip(" ").partition(":")[0] not in MIXERS), None)
    if refused is None and name in rules:
        try:
            made(RULES, last, "aggregate")
        except ValueError:
            if name not in FIRST:
                raise
        else:
            return
    others = [*(spelled(each, kind) for each, kind in RULES.items() if each not in FIRST)]
    mixers = [f"{spelled(each, kind)}>RULE" for each, kind in MIXERS.items()]
    near = did_you_mean([name if refused is None else refused.partition(":")[0]], [*rules, *MIXERS])
    raise ValueError(
        f"aggregate must be mean, median, geomedian or trimmed:SHARE with 0 < SHARE < 0.5; got {shown(how)}"
        f"{near or '.'} Other rules are {', '.join([*others, *mixers])}."
    )


@cache
def _mean() -> Rule:
    """The rule of most steps, parsed once."""
    return parse_rule("mean")


class RobustMean:
    """A robust mean with what it keeps from step to step, and an attack to test it with.

    Centred clipping starts from the last aggregate, and bucketing and the Gaussian attack draw by the number of the
    step. `metamom.train` creates one for a run and saves its state; in your own loop, create one and pass it as
    ``aggregate=`` to `metamom.MAML.backward` in each step. Other robust means are also just names there.

    Args:
        how: as for `robust_mean`.
        attack: what the last F of the workers send instead, such as ``"alie:2"`` (`metamom.server.attacks`); ``None``
            for honest workers. It acts after the operator, and the number of bytes stays. ``bias_error`` is then
            relative to the mean of the honest workers.

    Raises:
        TypeError: for anything but strings.
        ValueError: for an unknown robust mean or attack.

    Example:
        >>> import torch
        >>> robust = RobustMean("centred-clip:1", attack="ipm:1")
        >>> robust.combine(torch.tensor([[2.0], [3.0], [4.0], [100.0]]))
        tensor([2.5000])

    Reference:
        `metamom.server.rules`, `metamom.server.attacks`.
    """

    def __init__(self, how: Aggregate = "mean", attack: str | None = None) -> None:
        self.rule: Rule = _mean() if isinstance(how, str) and how == "mean" else parse_rule(how)
        self.attack: Attack | None = None if attack is None else parse_attack(attack)
        self.memory = Memory()

    @property
    def spec(self) -> str:
        """The name of the robust mean, without the attack."""
        return self.rule.spec

    @property
    def gathers(self) -> bool:
        """Whether it needs each worker's vector, not only their sum."""
        return self.attack is not None or not isinstance(self.rule, Mean)

    @property
    def stateful(self) -> bool:
        """Whether a step depends on earlier ones, or on their number."""
        return self.rule.keeps or self.rule.draws or (self.attack is not None and self.attack.draws)

    @property
    def faulty(self) -> int:
        """The number of workers that attack."""
        return 0 if self.attack is None else self.attack.faulty

    def check(self, workers: int) -> None:
        """Check the number of workers.

        Raises:
            ValueError: for too few of them, or if the rule trims none of them.
        """
        self.rule.check(workers)
        if self.attack is not None:
            self.attack.check(workers)

    def combine(self, rows: Tensor) -> Tensor:
        """The aggregate ``[d]`` of ``[n, d]``, which are in the order of the workers. Nothing changes."""
        sent = rows if self.attack is None else self.attack(rows, self.memory.step)
        return self.rule.combine(sent, self.memory)

    def commit(self, total: Tensor) -> None:
        """Count a step, and keep its aggregate ``[d]`` if the rule starts the next one from it."""
        if self.stateful:
            keep = self.rule.keeps and all_finite(total)
            self.memory = Memory(self.memory.step + 1, total.detach().clone() if keep else self.memory.previous)

    def reset(self) -> None:
        """Forget earlier steps."""
        self.memory = Memory()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, and the last aggregate if it matters; empty without state."""
        if not self.stateful:
            return {}
        previous = self.memory.previous
        return {"step": self.memory.step, **({} if previous is None else {"previous": previous})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: for anything but the state of such a robust mean.
        """
        if not self.stateful:
            if state:
                raise ValueError(f"{self.spec} carries no state; got {', '.join(map(str, state))}.")
            return
        step, previous = state.get("step"), state.get("previous")
        if type(step) is not int or step < 0:
            raise ValueError(f"{self.spec} counts its steps by a whole number >= 0 as 'step'; got {step!r:.80}.")
        if previous is not None and not (
            isinstance(previous, Tensor) and previous.dim() == 1 and previous.is_floating_point()
        ):
            raise ValueError(f"{self.spec} keeps the last aggregate [d] as 'previous'; got {previous!r:.80}.")
        if previous is not None and not (self.rule.keeps and all_finite(previous)):
            raise ValueError(f"{self.spec} keeps {'a finite' if self.rule.keeps else 'no'} last aggregate, 'previous'.")
        self.memory = Memory(step, None if previous is None else previous.clone())

    def check_loaded(self, entries: int, steps: int | None) -> None:
        """Check a loaded state against a run.

        Args:
            entries: d.
            steps: the completed steps, if known.

        Raises:
            ValueError: for another d or number of steps.
        """
        step, previous = self.memory
        if steps is not None and step != steps:
            raise ValueError(f"'step' should be {steps}, one for each step; got {step}.")
        if previous is not None and len(previous) != entries:
            raise ValueError(f"'previous' should be a tensor of {entries} entries; got {len(previous)}.")

    def __repr__(self) -> str:
        attack = "" if self.attack is None else f", attack={self.attack.spec!r}"
        return f"RobustMean({self.spec!r}{attack})"


AnyAggregate = Aggregate | RobustMean
"""What ``aggregate=`` takes: a name, or a robust mean with its state."""


def as_robust_mean(how: AnyAggregate) -> RobustMean:
    """Convert ``how`` for a single step. A name must not stand for a robust mean with state.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, and for one of a robust mean with state.
    """
    if isinstance(how, RobustMean):
        return how
    robust = RobustMean(how)
    if robust.stateful:
        raise ValueError(
            f"aggregate={how!r} would be a new robust mean at each step, but it carries a state from step to step (the "
            f"last aggregate, or a count of draws): make it once, robust = metamom.server.RobustMean({how!r}), "
            "and pass aggregate=robust."
        )
    return robust
