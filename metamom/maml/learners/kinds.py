"""The kinds of learners by name, as runs and flags spell them, and how to make one from the options of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from metamom.common.checks import check_word
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.learner import MAML
from metamom.maml.learners.boil import BOIL
from metamom.maml.learners.protomaml import ESTIMATORS, ProtoMAML
from metamom.maml.learners.reptile import NOT_OF_REPTILE, Reptile

KINDS: dict[str, type[MAML]] = {each.kind: each for each in (MAML, BOIL, Reptile, ProtoMAML)}
WITH_HEAD = ("boil", "protomaml")
LEFT_OUT: dict[str, tuple[str, ...]] = {  # options of every run that a kind has no use for
    "boil": ("adapt",),
    "reptile": ("adapt", *NOT_OF_REPTILE),
}


def check_kind_options(
    kind: str,
    *,
    head: str | None,
    estimator: str,
    adapt: object,
    learn_inner_lr: object,
    inner_batches: str,
    **switched: object,
) -> None:
    """Refuse the options of a run that its kind of learner does not have.

    Args:
        kind: a key of `KINDS`.
        head: the name of the head.
        estimator: ``"exact"`` stands for none.
        adapt: what adapts, ``None`` for the default.
        learn_inner_lr: whether step sizes are learned.
        inner_batches: ``"same"`` or ``"fresh"``.
        **switched: other options of `metamom.MAML`, which are on if they are not 0 or ``False``.

    Raises:
        ValueError: naming the option.
    """
    check_word("learner_kind", kind, KINDS)
    if head is not None and kind not in WITH_HEAD:
        raise ValueError(f"head={head!r} is of learners with a head, {' and '.join(WITH_HEAD)}; got {kind}.")
    changed = {
        "adapt": adapt is not None,
        "estimator": estimator != "exact",
        "learn_inner_lr": learn_inner_lr is not False,
        **{name: bool(value) for name, value in switched.items()},
    }
    for name in LEFT_OUT.get(kind, ()):
        if changed.get(name, False):
            raise ValueError(f"the learner {kind} has no {name}; leave it out, or use the learner maml.")
    if kind == "protomaml" and (estimator not in ESTIMATORS or inner_batches != "same"):
        raise ValueError(
            f"the learner protomaml has the estimators {' and '.join(ESTIMATORS)}, and inner_batches='same'; got "
            f"estimator={estimator!r} and inner_batches={inner_batches!r}."
        )


def make_learner(kind: str, model: nn.Module, loss_fn: LossFn, *, head: str | None = None, **options: Any) -> MAML:
    """A learner of a kind, with the options of a run; those that it has no use for are left out.

    Args:
        kind: a key of `KINDS`.
        model: as of `metamom.MAML`.
        loss_fn: as of `metamom.MAML`.
        head: for kinds with a head.
        **options: as of `metamom.MAML`, and ``train_on`` for `metamom.Reptile`.

    Raises:
        ValueError: for an unknown kind, and as the learner.
    """
    check_word("kind", kind, KINDS)
    kept = {name: value for name, value in options.items() if name not in LEFT_OUT.get(kind, ())}
    if kind in WITH_HEAD:
        kept["head"] = head
    return KINDS[kind](model, loss_fn, **kept)
