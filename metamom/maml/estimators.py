"""The meta-gradient estimators, and the inner batches that each one uses.

Legend: T tasks, S support points a task, J inner steps, P parts of a support set, c copies of a task, Q query points,
A and B the halves of a support set, H_A and u_A the Hessian, and the adapted weights, of half A.

For each estimator, `ESTIMATORS` says which half of the support set gives the gradients of the inner steps and which
half gives their Hessians. `cut` splits a batch of tasks accordingly. The rest of `metamom.maml` reads the record and
does not name any estimator. Importing this module does not import torch, which keeps the help of
the command fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from metamom.common.checks import check_word

if TYPE_CHECKING:
    from torch import Tensor

    from metamom.batch import TaskBatch
    from metamom.common.trees import Tree
    from metamom.maml.inner_step import Derivatives

Estimator: TypeAlias = str  # a key of `ESTIMATORS`
InnerBatches = Literal["same", "fresh"]
INNER_BATCHES: tuple[InnerBatches, ...] = get_args(InnerBatches)


class _Adaptation(NamedTuple):
    """The halves of the support set that give an adaptation's gradients, and those that give its Hessians."""

    along: tuple[int, ...]
    hessian: tuple[int, ...]


class _Term(NamedTuple):
    """Adaptations that are computed together, and the weight of each query loss."""

    weight: float
    adaptations: tuple[_Adaptation, ...]


@dataclass(frozen=True)
class Record:
    """A meta-gradient estimator. To add one, add an entry to `ESTIMATORS`.

    Attributes:
        terms: the adaptations to differentiate, with the weights of their query losses.
        meaning: one line for the help and the documentation.
        derivatives: how inner steps are differentiated: ``"exact"``, by ``"differences"`` of gradients, or ``"none"``.
        averages: the rule that averages the adapted weights over a task's visits, if any; see
            `metamom.maml.tracking`.
        sources: the sources of its bias besides the curvature, in the order in which `metamom.diagnostics` adds them:
            ``"coupling"``, then what the estimator adds itself; ``("estimator",)`` if they are not distinguished.
        biased: whether it is biased for the loss that a run reports (the loss after a step on its own inner batch);
            ``None`` if that is not known.
        proximal: whether a task adapts by solving ``min_u L_s(u) + lambda/2 |u - w|^2`` instead of taking steps; see
            `metamom.maml.implicit.proximal`.
        perturbs: whether the meta-gradient is a difference between solutions of that problem with the query loss
            added, instead of the derivative of its solution.
        reference: the estimator with the mean over both halves, on large inner batches, that gives the gradient of the
            meta-objective; the bias is the distance to it.
        population: the estimator that gives it on a whole population.
    """

    terms: tuple[_Term, ...]
    meaning: str
    derivatives: Derivatives = "exact"
    averages: Literal["moml", "scsc"] | None = None
    sources: tuple[str, ...] = ("estimator",)
    biased: bool | None = None
    proximal: bool = False
    perturbs: bool = False
    reference: Estimator = "cross-fit"
    population: Estimator = "exact"


_A, _B = (0,), (1,)
_WHOLE = _A + _B
_COUPLED = (_Term(1.0, (_Adaptation(_A, _A),)),)  # with only half A in use, the set is not split
_INDEPENDENT = (_Term(1.0, (_Adaptation(_A, _B),)),)
ESTIMATORS: dict[Estimator, Record] = {
    "exact": Record(_COUPLED, "differentiates through the adaptation (MAML)", sources=("coupling",), biased=False),
    "independent": Record(_INDEPENDENT, "adapts on half A of the support set, with the Hessians of half B", sources=()),
    "first-order": Record(
        _COUPLED,
        "the gradient at the adapted weights (FO-MAML)",
        derivatives="none",
        sources=("coupling", "hessian"),
        biased=True,
    ),
    "hessian-free": Record(
        _INDEPENDENT,
        "independent, with finite differences of gradients (HF-MAML); for smooth models: ReLU kinks make it noisy",
        derivatives="differences",
        sources=("hessian",),
    ),
    "cross-fit": Record(
        (_Term(0.5, (_Adaptation(_A, _B), _Adaptation(_B, _A))),),
        "independent, averaged over both roles of A and B",
        sources=(),
    ),
    "richardson": Record(
        (
            _Term(2.0, (_Adaptation(_WHOLE, _WHOLE),)),
            _Term(-0.5, (_Adaptation(_A, _A), _Adaptation(_B, _B))),
        ),
        "2 g(all) - [g(A) + g(B)]/2, where g is the exact estimator",
        sources=("coupling", "extrapolation"),
    ),
    "moml": Record(
        _INDEPENDENT, "independent, at a moving average of each task's adapted weights (MOML)", averages="moml"
    ),
    "moml-coupled": Record(
        _COUPLED,
        "moml with all points in both roles, as in MOML's public code, but without its factor b_u on the meta-gradient",
        averages="moml",
    ),
    "scsc": Record(_INDEPENDENT, "as moml, but the average first moves along with the weights (SCSC)", averages="scsc"),
    "implicit": Record(
        _COUPLED,
        "adapts by a proximal problem, differentiated at its solution by conjugate gradients (iMAML)",
        sources=(),
        biased=False,
        proximal=True,
        reference="implicit",
        population="implicit",
    ),
    "perturbed": Record(
        _COUPLED,
        "as implicit, from gradients alone: the difference between solutions with the query loss added",
        derivatives="none",
        sources=("perturbation",),
        proximal=True,
        perturbs=True,
        reference="implicit",
        population="implicit",
    ),
}


def tracked_estimators() -> list[Estimator]:
    """The estimators that keep a moving average for each task id."""
    return [name for name, record in ESTIMATORS.items() if record.averages is not None]


def memoryless_estimators() -> list[Estimator]:
    """The estimators without memory: every single draw shows their bias."""
    return [name for name, record in ESTIMATORS.items() if record.averages is None]


def proximal_estimators() -> list[Estimator]:
    """The estimators that adapt by solving a proximal problem."""
    return [name for name, record in ESTIMATORS.items() if record.proximal]


def treats_halves_alike(name: Estimator) -> bool:
    """Whether it stays the same if the halves of the support set change places."""
    adaptations = {each for term in ESTIMATORS[name].terms for each in term.adaptations}
    swapped = {_Adaptation(*(tuple(sorted(1 - half for half in part)) for part in each)) for each in adaptations}
    return adaptations == swapped


class InnerBatch(NamedTuple):
    """The data that T tasks use for one inner step.

    Attributes:
        x: inputs for the gradient, ``[T, s, ...]``, a tensor or a tree.
        y: their targets, ``[T, s, ...]``.
        hessian: inputs and targets for the Hessian, shaped as ``x`` and ``y``; ``None`` to use ``x`` and ``y``.
        mask: the points that count, ``[T, s]``; ``None`` for all. A set with a mask is not split.
    """

    x: Tree
    y: Tree
    hessian: tuple[Tree, Tree] | None = None
    mask: Tensor | None = None

    def points(self) -> tuple[Tree, Tree, Tensor | None]:
        """The inputs, targets and mask of the gradient."""
        return self.x, self.y, self.mask


class Adaptations(NamedTuple):
    """T·c adaptations: c adjacent copies of each of T tasks, which differ in their inner batches.

    Attributes:
        weight: the weight of each copy's query loss in the task's loss.
        copies: c.
        steps: the batches of the J inner steps, for T·c tasks.
        query_x: ``[T·c, Q, ...]``.
        query_y: ``[T·c, Q, ...]``.
        query_mask: the points that count, ``[T·c, Q]``; ``None`` for all.
    """

    weight: float
    copies: int
    steps: tuple[InnerBatch, ...]
    query_x: Tree
    query_y: Tree
    query_mask: Tensor | None = None

    def query(self) -> tuple[Tree, Tree, Tensor | None]:
        """The inputs, targets and mask of the query sets."""
        return self.query_x, self.query_y, self.query_mask


def check_estimator(estimator: str, inner_batches: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: listing the known ones.
    """
    check_word("estimator", estimator, ESTIMATORS)
    check_word("inner_batches", inner_batches, INNER_BATCHES)


def support_parts(estimator: Estimator, steps: int, inner_batches: InnerBatches = "same") -> int:
    """P, the number of equal parts of a support set: the number of halves times the inner batches of each.

    Args:
        estimator: which one.
        steps: J >= 1.
        inner_batches: ``"same"`` for every step, or ``"fresh"`` for each.

    Returns:
        1 or 2, times J if batches are fresh.

    Example:
        >>> support_parts("exact", 3), support_parts("independent", 3), support_parts("independent", 3, "fresh")
        (1, 2, 6)
    """
    return _halves(estimator) * (steps if inner_batches == "fresh" else 1)


def passes(estimator: Estimator, steps: int) -> int:
    """Roughly how often one meta-gradient calls the model, which determines the cost of compiling it."""
    record = ESTIMATORS[estimator]
    again = int(record.averages == "scsc")  # a step from the weights of the last visit
    return again + sum(steps * len(set(term.adaptations[0])) + 1 for term in record.terms)


def check_support(batch: TaskBatch, estimator: Estimator, steps: int, inner_batches: InnerBatches) -> None:
    """Refuse a batch if the estimator cannot split its support sets into parts.

    Raises:
        ValueError: if P does not divide S; or if the first task's support set is balanced over classes but its parts
            are not, as in a set with fewer shots than parts.
    """
    parts = support_parts(estimator, steps, inner_batches)
    if parts == 1:
        return
    from metamom.common import trees  # not at the top: it imports torch

    points = trees.points(batch.support_x)
    wanted = f"estimator {estimator!r} takes its inner batches from {parts} equal parts of the support set"
    if inner_batches == "fresh":
        wanted = f"estimator {estimator!r} with {steps} fresh inner batches takes them from {parts} equal parts"
    if batch.support_mask is not None:
        raise ValueError(
            f"{wanted}, and padded support sets have no equal parts. Use estimator 'exact' or 'first-order' with the "
            "same inner batches, or tasks of one size."
        )
    if points % parts or not points:
        raise ValueError(
            f"{wanted}; got {points} support points. Use shots={_multiple(points, parts)}, or another multiple of "
            f"{parts} (learner.support_parts)."
        )
    fields = {"support_x": batch.support_x, "support_y": () if batch.support_y is None else batch.support_y}
    sizes = {
        place: list(x.shape) for name, tree in fields.items() for place, x in trees.named_leaves(name, tree).items()
    }
    if {shape[1] if len(shape) > 1 else 0 for shape in sizes.values()} != {points}:
        raise ValueError(
            f"{wanted}, so every tensor in it must hold points, [T, S, ...]; got "
            f"{', '.join(f'{place} {shape}' for place, shape in sizes.items())}. Repeat what "
            "is one thing for each task for its points."
        )
    labels = trees.lone(batch.support_y)
    if labels is None or labels.dim() > 2 or labels.is_floating_point():
        return
    first = labels[0].tolist()
    shots, size = {first.count(label) for label in set(first)}, points // parts
    if len(shots) == 1 and any(set(first[i : i + size]) != set(first) for i in range(0, points, size)):
        each = shots.pop()
        raise ValueError(
            f"{wanted}, with every class in each; got {each} shots of {len(set(first))} classes, some of which are "
            f"missing from a part. Use shots={_multiple(each, parts)}, or another multiple of {parts}, ordered shot "
            "by shot."
        )


def cut(batch: TaskBatch, estimator: Estimator, steps: int, inner_batches: InnerBatches = "same") -> list[Adaptations]:
    """Split a batch into the adaptations that an estimator differentiates, with the weights of their query losses.

    ``independent`` computes ``(I - alpha H_B) grad L(u_A)``. ``cross-fit`` averages this and the same with A and B
    swapped. ``richardson`` computes ``2 g(whole) - [g(A) + g(B)]/2``, with g the gradient of ``exact``. Half h uses
    the parts hJ', ..., hJ' + J' - 1 of the support set one after the other, with J' = J if batches are fresh and 1
    otherwise.

    Args:
        batch: T tasks that `check_support` accepts.
        estimator: which one.
        steps: J >= 1.
        inner_batches: ``"same"`` for every step, or ``"fresh"`` for each.

    Returns:
        A list of `Adaptations`. Those on the first half, or on the whole set, come first.

    Example:
        >>> import torch
        >>> from metamom.batch import TaskBatch
        >>> batch = TaskBatch(*(torch.zeros(8, 6, d) for d in (2, 1, 2, 1)))
        >>> [(a.weight, a.copies, a.steps[0].x.shape) for a in cut(batch, "richardson", steps=1)]
        [(2.0, 1, torch.Size([8, 6, 2])), (-0.5, 2, torch.Size([16, 3, 2]))]

    Reference:
        Fallah, Mokhtari, Ozdaglar (2020) for Hessians on a separate batch; docs/theory/maml.md, "Linear regression".
    """
    from metamom.common import trees  # not at the top: it imports torch

    turns = steps if inner_batches == "fresh" else 1
    size, whole = trees.points(batch.support_x) // (_halves(estimator) * turns), _halves(estimator) * turns == 1

    def points(halves: tuple[tuple[int, ...], ...], turn: int) -> tuple[Tree, Tree]:
        """The points of part ``turn`` of each copy's halves, ``[T·c, ...]``."""
        if whole:  # also tensors that are one thing for each task
            return batch.support_x, batch.support_y
        places = [[half * turns + turn for half in each] for each in halves]
        x, y = (trees.mapped(lambda x: _taken(x, places, size), tree) for tree in (batch.support_x, batch.support_y))
        return x, y

    result = []
    for weight, adaptations in ESTIMATORS[estimator].terms:
        along, hessian = zip(*adaptations, strict=True)
        own = [
            InnerBatch(*points(along, turn), None if hessian == along else points(hessian, turn), batch.support_mask)
            for turn in range(turns)
        ]
        copies = len(adaptations)
        query = (
            trees.mapped(partial(_repeated, copies), tree) for tree in (batch.query_x, batch.query_y, batch.query_mask)
        )
        result.append(Adaptations(weight, copies, tuple(own if turns == steps else own * steps), *query))
    return result


def _halves(estimator: Estimator) -> int:
    adaptations = [adaptation for term in ESTIMATORS[estimator].terms for adaptation in term.adaptations]
    return 1 + max(half for along, hessian in adaptations for half in (*along, *hessian))


def _multiple(points: int, parts: int) -> int:
    """The smallest multiple of ``parts`` that is at least ``points``."""
    return max(1, -(-points // parts)) * parts


def _repeated(copies: int, x: Tensor) -> Tensor:
    """Adjacent copies of each task, ``[T, ...]`` to ``[T·c, ...]``."""
    import torch  # not at the top: see there

    return x if copies == 1 else torch.stack([x] * copies, 1).flatten(0, 1)


def _taken(x: Tensor, places: list[list[int]], size: int) -> Tensor:
    """For each list of parts, copy every task with the points of those parts: ``[T, S, ...]`` to ``[T·c, s, ...]``.

    A part has ``size`` points. A single copy of consecutive parts is a view.
    """
    import torch  # not at the top: see there

    copies = []
    for parts in places:
        if parts == list(range(parts[0], parts[-1] + 1)):
            copies.append(x[:, parts[0] * size : (parts[-1] + 1) * size])
        else:
            copies.append(torch.cat([x[:, part * size : (part + 1) * size] for part in parts], 1))
    return copies[0] if len(copies) == 1 else torch.stack(copies, 1).flatten(0, 1)
