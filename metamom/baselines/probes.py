"""Classifiers of features: nearest centroid, and logistic regression.

Legend: S support points, Q query points, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.baselines.features import features_of
from metamom.baselines.per_task import PerTask, classes_of, frozen_copy
from metamom.common.checks import check_number
from metamom.common.choices import Norm
from metamom.common.summaries import summary
from metamom.common.trees import Tree

Distance = Literal["euclidean", "cosine"]


class _OfFeatures(PerTask):
    """Keeps a copy of the embedding."""

    def __init__(self, embedding: nn.Module, norm: Norm | None) -> None:
        self.embedding = frozen_copy(embedding, norm)
        self.loss_fn = F.cross_entropy

    def parameters(self) -> Iterator[Tensor]:
        """Those of the embedding."""
        return self.embedding.parameters()


class NearestCentroid(_OfFeatures):
    """Classify by the nearest class mean of the support features, as prototypical networks do.

    Adaptation takes no steps.

    Args:
        embedding: maps ``[N, ...]`` to features ``[N, F]``, such as ``Penultimate(learner.model)``; copied, in
            ``eval()``.
        distance: ``"euclidean"``: scores are ``-||z - c||^2``; ``"cosine"``: the cosine of z and c.
        norm: what batch normalisation uses: ``"batch"``, the current set (support or queries); ``"frozen"``, running
            statistics; by default what the embedding's mode says.

    Example:
        >>> from metamom import evaluate
        >>> from metamom.tasks import Episodes
        >>> images, labels = torch.rand(60, 4), torch.arange(60) % 6
        >>> tasks = Episodes(images.view(60, 1, 2, 2), labels, ways=3, shots=2, queries=2)
        >>> evaluate(NearestCentroid(nn.Flatten()), tasks, tasks=4, steps=(0,)).metric
        'accuracy'

    Reference:
        Snell, Swersky, Zemel, "Prototypical networks for few-shot learning" (2017), equations 1 and 2.
    """

    def __init__(self, embedding: nn.Module, *, distance: Distance = "euclidean", norm: Norm | None = None) -> None:
        super().__init__(embedding, norm)
        if distance not in get_args(Distance):
            raise ValueError(f'distance must be "euclidean" or "cosine"; got {distance!r:.40}.')
        self.distance = distance

    def __repr__(self) -> str:
        return summary("NearestCentroid", {"distance": self.distance}, type(self.embedding).__name__)

    def adapt_task(self, support_x: Tree, support_y: Tree, steps: int) -> Tensor:
        """The centroids ``[C, F]``."""
        z, one_hot = features_of(self.embedding, support_x), F.one_hot(support_y.long(), classes_of(support_y))
        weights = one_hot.to(z.dtype) / one_hot.sum(0)
        return weights.T @ z

    def predict_task(self, state: Tensor, x: Tree) -> Tensor:
        """Scores ``[Q, C]``."""
        z = features_of(self.embedding, x)
        if self.distance == "cosine":
            return F.normalize(z, dim=1) @ F.normalize(state, dim=1).T
        return -(z.unsqueeze(1) - state).square().sum(-1)


class Probe(NamedTuple):
    """A linear classifier: weights ``[C, F]`` and biases ``[C]``, in float64."""

    weight: Tensor
    bias: Tensor


class LinearProbe(_OfFeatures):
    """Logistic regression on the support features: the minimum of ``sum_i CE(W z_i + b, y_i) + l2/2 ||W||^2``.

    It is found by L-BFGS in float64 from zero weights, which makes it deterministic. Adaptation takes no steps.

    Args:
        embedding: maps ``[N, ...]`` to features ``[N, F]``, such as ``Penultimate(learner.model)``; copied, in
            ``eval()``.
        l2: > 0, the strength of the penalty; scikit-learn's ``C`` is ``1 / l2``.
        normalize: scale features to unit length first.
        norm: as of `NearestCentroid`.

    Reference:
        Tian, Wang, Krishnan, Tenenbaum, Isola, "Rethinking few-shot image classification" (2020).
    """

    def __init__(
        self, embedding: nn.Module, *, l2: float = 1.0, normalize: bool = True, norm: Norm | None = None
    ) -> None:
        super().__init__(embedding, norm)
        check_number("l2", l2)
        if not l2 > 0:
            raise ValueError(f"l2 must be > 0, since the regression of separable classes has no minimum; got {l2}.")
        self.l2 = l2
        self.normalize = normalize

    def __repr__(self) -> str:
        return summary("LinearProbe", {"l2": self.l2, "normalize": self.normalize}, type(self.embedding).__name__)

    def adapt_task(self, support_x: Tree, support_y: Tree, steps: int) -> Probe:
        """The classifier."""
        return logistic_regression(self._features(support_x), support_y.long(), classes_of(support_y), self.l2)

    def predict_task(self, state: Probe, x: Tree) -> Tensor:
        """Scores ``[Q, C]``."""
        return self._features(x) @ state.weight.T + state.bias

    def _features(self, x: Tree) -> Tensor:
        z = features_of(self.embedding, x).double()
        return F.normalize(z, dim=1) if self.normalize else z


def logistic_regression(z: Tensor, labels: Tensor, classes: int, l2: float) -> Probe:
    """The minimum of the penalised loss of `LinearProbe` for features ``[S, F]`` and labels ``[S]``."""
    with torch.inference_mode(False), torch.enable_grad():
        z, labels = z.clone(), labels.clone()  # which may be of inference mode
        weight, bias = (z.new_zeros(shape).requires_grad_() for shape in ((classes, z.shape[1]), (classes,)))
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=1000,
            tolerance_grad=1e-9,
            tolerance_change=1e-13,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(z @ weight.T + bias, labels, reduction="sum") + l2 / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Probe(weight.detach(), bias.detach())
