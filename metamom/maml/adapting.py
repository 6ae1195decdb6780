"""What a learner does with adapted weights: it adapts, predicts with them, and judges the predictions.

Legend: T tasks, S support points, N points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metamom.common.choices import Norm
from metamom.common.held import check_distributions, held, released
from metamom.common.trees import Tree, lone
from metamom.maml.checks.batch_checks import check_adapted, check_mask
from metamom.maml.configured import Configured
from metamom.maml.fitting import fit_and_predict, fitted, refuse_one_task
from metamom.maml.metrics import accuracy
from metamom.maml.modes import differentiable, out_of_inference
from metamom.maml.predicting import losses
from metamom.maml.running.run_by_task import Support
from metamom.maml.running.swapping import named
from metamom.maml.task_weights import Params, Start
from metamom.maml.whole_sets import adaptations, predicted


class Adapting(Configured):
    """The part of `metamom.MAML` that adapts to tasks, predicts and judges."""

    def adapt(
        self, support_x: Tree, support_y: Tree, *, steps: int | None = None, mask: Tensor | None = None
    ) -> Params:
        """Adapt to each task's support set. Every step uses the whole set, whatever the estimator.

        Args:
            support_x: ``[T, S, ...]``, a tensor or a tree (`metamom.TaskBatch`).
            support_y: ``[T, S, ...]``, a tensor or a tree, or ``None`` for a loss without targets.
            steps: number of inner steps >= 0; the learner's own by default.
            mask: the points that count, ``[T, S]``, as ``support_mask`` of a batch from `metamom.pad`; all by default.

        Returns:
            Adapted parameters by name, ``[T, *shape]``, for use with `predict`. They are differentiable in the
            meta-parameters if gradients are enabled.

        Raises:
            ValueError: for the points of one task, without the axis of tasks, where that can be detected; use `fit`.
        """
        with out_of_inference():
            refuse_one_task(self, support_x, support_y)
            steps, keep_graph = self.inner_steps if steps is None else steps, torch.is_grad_enabled()
            weights = self.meta_parameters()  # first: it follows changes of the model
            problem = self._problem()
            *_, adapted = adaptations(problem, weights, support_x, support_y, steps, mask, keep_graph=keep_graph)
            return adapted

    def fit(self, support_x: Tree, support_y: Tree, steps: int | None = None, *, norm: Norm | None = None) -> nn.Module:
        """Adapt to one task, and return the adapted model as a module of its own.

        It is a deep copy of the model with the adapted weights, in ``eval()``, and shares nothing with the learner. So
        it works under `torch.inference_mode`, and can be pickled, saved, exported and moved. Dropout is off during
        adaptation, as in `metamom.evaluate`. It computes in the dtype of its weights, without the learner's
        ``autocast``.

        Its prediction for a point does not depend on the other points of a call: batch normalisation layers keep the
        statistics of the support set as their running statistics, unless the learner uses its own running ones.
        `metamom.evaluate` predicts in the same way with ``norm="support"``. With ``norm="batch"``, the usual choice
        for MAML in evaluations, it normalises all queries of a task together.

        Args:
            support_x: the points of one task, ``[S, ...]``, a tensor or a tree.
            support_y: their targets, ``[S, ...]`` (class labels: ``[S]``), a tensor or a tree, or ``None``.
            steps: number of inner steps >= 0; the learner's own by default.
            norm: what the module's batch normalisation uses: ``"support"``, the statistics of the support set;
                ``"frozen"``, the model's running ones; ``"batch"``, those of the points of each call. By default
                ``"frozen"`` if the learner's is, else ``"support"``.

        Raises:
            ValueError: for sets that do not fit the model or each other, and for statistics that no layer can keep
                because the model calls ``batch_norm`` itself, or one layer several times.

        Example:
            >>> from torch.nn import functional as F
            >>> from metamom import MAML
            >>> learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_lr=0.1)
            >>> x = torch.linspace(-1, 1, 10).unsqueeze(-1)
            >>> model = learner.fit(x, 2 * x, steps=100)
            >>> torch.allclose(model(x), 2 * x, atol=1e-2)
            True
        """
        return fitted(self, support_x, support_y, steps, norm)

    def fit_predict(
        self,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        steps: int | None = None,
        *,
        norm: Norm | None = None,
    ) -> Any:
        """Adapt to one task, and predict ``[Q, ...]`` for its queries, without a graph.

        The same as ``fit(support_x, support_y)(query_x)`` without making a module, so for any model.

        Args:
            support_x: the points of one task, ``[S, ...]``, a tensor or a tree.
            support_y: their targets, ``[S, ...]``, a tensor or a tree, or ``None``.
            query_x: ``[Q, ...]``, a tensor or a tree.
            steps: number of inner steps >= 0; the learner's own by default.
            norm: as for `fit`. With ``"batch"``, the statistics are those of ``query_x``.
        """
        return fit_and_predict(self, support_x, support_y, query_x, steps, norm)

    def trajectory(
        self, support_x: Tree, support_y: Tree, *, steps: int, mask: Tensor | None = None
    ) -> Iterator[Params]:
        """Yield the adapted parameters after 0, 1, ..., ``steps`` inner steps, as from `adapt` but without a graph."""
        with out_of_inference():
            weights = self.meta_parameters()  # first: it follows changes of the model
            return adaptations(self._problem(), weights, support_x, support_y, steps, mask)

    def predict(
        self,
        params: Params,
        x: Tree,
        mask: Tensor | None = None,
        *,
        support_x: Tree = None,
        support_mask: Tensor | None = None,
    ) -> Any:
        """Predict ``[T, N, ...]`` from inputs ``x: [T, N, ...]`` with each task's adapted weights (from `adapt`).

        Args:
            params: ``[T, *shape]`` by name.
            x: ``[T, N, ...]``, a tensor or a tree; the result is a tree if the model returns one.
            mask: ``[T, N]`` (``query_mask``); predictions of points outside mean nothing.
            support_x: the tasks' support sets ``[T, S, ...]``, which only ``norm="support"`` reads.
            support_mask: ``[T, S]``, the points of these that count.

        Raises:
            ValueError: with ``norm="support"``, without ``support_x``.
            TypeError: for distributions of several tasks that cannot be one.
        """
        found = released(self.predicted(params, x, mask, support_x=support_x, support_mask=support_mask))
        check_distributions(found)
        return found

    def predicted(
        self,
        params: Params,
        x: Tree,
        mask: Tensor | None = None,
        *,
        support_x: Tree = None,
        support_mask: Tensor | None = None,
    ) -> Tree:
        """What `predict` returns, as `metamom.common.held.held` holds it."""
        check_adapted(params, x, named(self.model))
        check_mask("query", x, mask)
        return held(predicted(self._problem(), params, x, mask, self._support(params, support_x, support_mask)))

    def judge(
        self, params: Params, predictions: Tree, y: Tree, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss and accuracy of each task's predictions.

        Args:
            params: the adapted weights that made the predictions; a loss module may share some of them.
            predictions: from `predict`, ``[T, N, ...]``.
            y: their targets, ``[T, N, ...]``, or ``None``.
            mask: the points that count, ``[T, N]``; all by default.

        Returns:
            The losses ``[T]``, and the accuracies ``[T]`` or ``None``: see `metamom.maml.metrics.accuracy`.
        """
        found = losses(self._problem(), Start(params, {}, {}, {}), params, predictions, differentiable(y), mask)
        return found, self._accuracy(predictions, y, mask)

    def _support(self, params: Params, support_x: Tree, mask: Tensor | None) -> Support | None:
        """The support sets that predictions need."""
        if self.norm != "support":
            return None
        if support_x is None:
            raise ValueError(
                'norm="support" normalises queries by the statistics of their support set: call predict(params, x, '
                "support_x=...) with the inputs that these parameters were adapted on."
            )
        check_adapted(params, support_x, named(self.model))
        check_mask("support", support_x, mask)
        return Support(differentiable(support_x), mask)

    def _accuracy(self, predictions: Tree, y: Tree, mask: Tensor | None = None) -> Tensor | None:
        """Each task's accuracy for predictions ``[T, N, ...]``. Their loss must have been computed before.

        ``None`` for several tensors of predictions or of targets, since which one holds scores is not known.
        """
        labels = lone(y)
        if labels is None or labels.is_floating_point():
            return None
        scores = lone(held(predictions))
        if scores is None:
            return None
        return accuracy(scores, labels, self._readings.of(self.loss_fn, scores, labels), mask)
