"""ProtoMAML: MAML in which each task's head starts at the prototypes of its classes."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from metamom.common.kinds import with_article
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.last_layer import head_name
from metamom.maml.learner import MAML
from metamom.maml.learners.prototypes import FromPrototypes
from metamom.maml.problem import Rule

ESTIMATORS = ("exact", "first-order")


class ProtoMAML(MAML):
    """`metamom.MAML` for classification, with a head that starts at the prototypes of each task's classes.

    With c_k the mean feature of the support points of class k, the head, a linear layer, starts at ``W_k = 2 c_k`` and
    ``b_k = -|c_k|^2``: before any inner step, predictions are those of a prototypical network. Inner steps then move
    body and head. Meta-gradients flow through the prototypes into the body, also with ``estimator="first-order"``.

    The head's own weights are not used: they are no meta-parameters, get no gradient, and stay as they are.

    Args:
        model: as of `metamom.MAML`, with a linear head that it calls once, for one vector a point.
        loss_fn: as of `metamom.MAML`, for class scores, such as `torch.nn.functional.cross_entropy`.
        head: the name of the linear layer; by default the last module, in the order of registration, that has trainable
            parameters of its own.
        **options: as of `metamom.MAML`; ``estimator`` is ``"exact"`` or ``"first-order"``, ``inner_batches`` is
            ``"same"``, and ``adapt``, if given, includes the head.

    Attributes:
        head: the name of the head.

    Raises:
        ValueError: as `metamom.MAML`; for a head that is not a linear layer with weight and bias of its own, which it
            shares with no other module, and options that do not apply. Its methods raise it for a support set without a
            point of some class.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from metamom.tasks import Episodes
        >>> tasks = Episodes(torch.rand(60, 4), torch.arange(60) % 6, ways=3, shots=2, queries=2)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> learner = ProtoMAML(net, F.cross_entropy, inner_lr=0.1)
        >>> list(learner.meta_gradient(tasks.sample(0, 4)).grads)
        ['0.weight', '0.bias']

    Reference:
        Triantafillou et al., "Meta-Dataset: a dataset of datasets for learning to learn from few examples" (2020),
        section 3.
    """

    kind = "protomaml"

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, head: str | None = None, **options: Any) -> None:
        self.head = head_name(model, head, "ProtoMAML")
        _check_options(**options)
        self._started = _from_prototypes(model, self.head)
        super().__init__(model, loss_fn, **options)
        if missing := {self._started.weight, self._started.bias} - set(self.adapted):
            raise ValueError(
                f"the head of ProtoMAML differs between tasks, so adapt must include it: {', '.join(sorted(missing))}."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("estimator", "inner_batches"):
            _check_options(**{name: value})
        super().__setattr__(name, value)

    def _keep_up(self) -> None:
        before = self._structure
        super()._keep_up()
        if self._structure != before:
            self._started = _from_prototypes(self.model, self.head)

    def describe(self) -> dict[str, Any]:
        """See `metamom.MAML.describe`."""
        return super().describe() | {"head": self.head}

    def _rule(self) -> Rule:
        by = self._started
        return Rule(replaced=(by.weight, by.bias), start=by.start, check=by.check)

    def _another(self, **options: Any) -> MAML:
        return ProtoMAML(self.model, self.loss_fn, head=self.head, adapt=self.adapted, **options)


def _check_options(estimator: str = "exact", inner_batches: str = "same", **others: Any) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"ProtoMAML has the estimators {' and '.join(ESTIMATORS)}; got {estimator!r}. Use MAML.")
    if inner_batches != "same":
        raise ValueError(
            f"ProtoMAML makes prototypes of the whole support set, so inner_batches must be 'same'; got "
            f"{inner_batches!r}."
        )


def _from_prototypes(model: nn.Module, head: str) -> FromPrototypes:
    layer = model.get_submodule(head)
    own = [getattr(layer, name, None) for name in ("weight", "bias")]
    if not isinstance(layer, nn.Linear) or not all(isinstance(p, nn.Parameter) for p in own):
        raise ValueError(
            f"ProtoMAML needs a head that is a torch.nn.Linear with a bias; {head!r} is {_kind_of_head(layer)}. Name "
            "the layer that gives the class scores with head=."
        )
    places = [(f"{name}." if name else "", m) for name, m in model.named_modules(remove_duplicate=False)]
    elsewhere = [
        f"{place}{key}"
        for place, module in places
        if module is not layer
        for key, p in module._parameters.items()
        if any(p is q for q in own)
    ]
    if elsewhere:
        raise ValueError(
            f"ProtoMAML replaces the weights of its head by prototypes, and {head!r} shares them with the rest of the "
            f"model, as {', '.join(elsewhere)}: give the head weights of its own, or use MAML."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    if not (layer.weight.requires_grad and layer.bias.requires_grad):
        raise ValueError(f"inner steps of ProtoMAML move the head; weights of {head!r} are frozen: unfreeze them.")
    return FromPrototypes(head, names[id(layer.weight)], names[id(layer.bias)], layer.out_features)


def _kind_of_head(layer: nn.Module) -> str:
    """What a layer that cannot be the head is."""
    kind = with_article(type_before_parametrizations(layer).__name__)
    if not isinstance(layer, nn.Linear):
        return kind
    if getattr(layer, "bias", None) is None:
        return f"{kind} without a bias"
    return f"{kind} that computes its weights from others (a parametrization, such as weight normalisation)"
