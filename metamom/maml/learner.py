"""MAML: meta-gradients through adaptation by gradient steps, for all tasks at once.

Adaptation itself and predictions are in `metamom.maml.adapting`, meta-gradients in `metamom.maml.training`.

Legend: T tasks, n workers with T/n tasks each, J inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metamom.common.choices import Norm
from metamom.maml.checks.loss_readings import LossFn as LossFn
from metamom.maml.estimators import ESTIMATORS, Estimator, InnerBatches
from metamom.maml.normalisation.step_norms import check_step_norms
from metamom.maml.running.swapping import locked
from metamom.maml.steps.server_step import Backward as Backward
from metamom.maml.training import MetaGradient as MetaGradient
from metamom.maml.training import Training


class MAML(Training):
    """Model-agnostic meta-learning around any model, with exact second-order meta-gradients.

    A task's weights after J inner steps are ``u_0 = w, u_{j+1} = u_j - alpha * grad L_support(u_j)``, unless
    ``inner_optimizer`` says otherwise; its meta-loss is ``L_query(u_J)``.

    Args:
        model: maps ``[N, ...]`` to predictions ``[N, ...]``. It runs with separate weights for each task, so it must
            not change its parameters or buffers in place. A tensor is passed as ``model(x)``, a dict of tensors as
            ``model(**x)``, a tuple or a list as ``model(*x)`` (to pass a dict as one argument, wrap it: ``(x,)``). It
            may return a tensor, or a tree of tensors that the loss takes.
        loss_fn: ``(predictions [N, ...], targets [N, ...]) -> 0-d loss``, such as `torch.nn.functional.mse_loss`;
            ``(predictions) -> loss`` for batches without targets. The parameters of a loss module are learned with the
            model's; inner steps do not move them. Give it other arguments by `functools.partial`, or, if they differ
            between tasks, in a dict of targets. On a batch from `metamom.pad`, it gets each task's own points; a loss
            with a parameter ``mask`` [N] (booleans, ``True`` for points that count) may get all.
        inner_lr: alpha > 0: one number, or a number or tensor for each adapted parameter. Leaf tensors that require a
            gradient are learned in place. Can be set later: ``learner.inner_lr = 0.1``.
        inner_steps: J >= 1.
        estimator: the meta-gradient estimator: ``"exact"``, ``"first-order"`` (FO-MAML), or another one listed in
            `metamom.maml.estimators`, which says what each computes and how many points it takes.
        inner_batches: ``"same"`` support points for every inner step, or ``"fresh"`` ones: J consecutive parts of the
            support set (of each half). A support set must divide into `support_parts` parts.
        tracking: b_u in (0, 1], the weight of a new inner step in the moving averages of ``"moml"``,
            ``"moml-coupled"`` and ``"scsc"``; 0.2 by default, 1 for no average.
        proximal: lambda > 0 of ``"implicit"`` and ``"perturbed"``, 2 by default. These adapt by solving
            ``min_u L_support(u) + lambda/2 |u - w|^2`` to a tolerance instead of by steps of ``inner_lr``; `adapt` and
            `metamom.evaluate` with ``steps=k`` solve it k times, each time around the last solution. A number, or the
            solver's settings too: a `metamom.maml.Proximal`, or a text such as ``"2,tolerance=1e-6,iterations=50"``.
            Can be set later.
        learn_inner_lr: learn alpha with the weights: ``True`` or ``"entry"`` (Meta-SGD), ``"tensor"``, ``"scalar"``,
            or ``"tensor-step"``, one for each tensor and inner step (MAML++). Further steps use the size of step J.
        positive_inner_lr: learn the logarithms of these, so that no step size becomes negative, and outer steps change
            them by factors. The meta-parameters ``"inner_lr..."`` are the logarithms; `inner_lr` shows the step sizes.
        adapt: which parameters inner steps move: names of parameters or modules, or a predicate on a parameter's
            name; all trainable ones by default. ANIL is ``adapt=["head"]``: features that no inner step changes are
            computed once for all inner steps (docs/performance/index.md says for which models).
        chunk_size: compute at most this many tasks at a time, or ``None`` for all. This bounds memory and does not
            change the result (except for a compiled model's random draws). ``"auto"`` measures the memory of one task,
            once for each shape of batch, and uses about 256 MiB on a CPU, or half of the free memory on a GPU.
        vectorize: ``"vmap"`` runs model and loss on all tasks of a chunk at once. ``"loop"`` runs them task by task,
            with the same gradients to rounding. ``"auto"`` uses vmap until the model or the loss turns out not to work
            with it (recurrent layers, ``.item()`` or ``if`` on values, hooks), then warns once and loops. Of a batch
            from `metamom.pad`, a loop sees no padding, so ``"auto"`` also loops over those if the points of a task
            depend on each other (batch normalisation).
        compile: compile the whole meta-gradient, once for each batch shape, and again when the loss, a module, a
            hook, a buffer or a frozen parameter is replaced. Everything else that the model or loss reads (a dropout
            rate, a plain tensor) becomes a constant. ``"auto"`` compiles once it pays off (see `expect`). If
            compiling fails, it warns once and continues without. Batches from `metamom.pad` run without.
        autocast: dtype of the model's matrix products and convolutions: `torch.bfloat16`, accumulated in float32, or
            ``None``. Less accurate (docs/performance/memory.md), and faster only on hardware that multiplies in
            bfloat16.
        norm: what batch normalisation uses: ``"batch"``, the statistics of the current set (transductive, as in MAML);
            ``"frozen"``, the model's running statistics; or ``"support"``, for queries, the statistics of their task's
            support set at the adapted weights, so that predictions do not depend on the other queries (inductive). By
            default each layer's own mode decides: ``"frozen"`` for layers in ``eval()`` with running statistics, else
            ``"batch"``. Running statistics are never written.
        multi_step: N, the iterations over which the weights of the query losses after each inner step anneal from 1/J
            each to the last one alone (`metamom.maml.annealing.step_weights`); 0 for the last one from the start. The
            gradient is that of the weighted sum, and the reported loss that after the last step. `backward` and
            `training_loss` count the iterations, which are a part of the state dict; `losses` and `meta_gradient` do
            not. With one inner step it changes nothing.
        first_order_until: the number of first iterations with ``"first-order"`` meta-gradients, before those of
            ``estimator="exact"``.
        step_norms: learn the scale and offset of batch and instance normalisation for each of 0, ..., J inner steps
            (`metamom.maml.normalisation.step_norms.StepNorms`). Inner steps do not move them then.
        inner_optimizer: what inner steps follow, differentiated through: ``"sgd"``, the default, for plain steps;
            ``"momentum:0.9"`` or ``"nesterov:0.9"``; ``"adam"``, with options as in
            ``"adam:beta1=0.9,beta2=0.999,eps=1e-8"``; or an `InnerSGD` or `InnerAdam` of `metamom.maml`. The updates
            are those of `torch.optim.SGD` and `torch.optim.Adam` of step size ``inner_lr``, from a fresh state for each
            task and adaptation. Not for proximal and tracked estimators; Adam also not for ``"independent"``,
            ``"hessian-free"`` and ``"cross-fit"``.

    Random layers (dropout) are seeded from torch's generator at the start of a step and from the task's number in the
    batch, so their draws do not depend on chunks or processes. A compiled meta-gradient draws per chunk. Several
    threads may adapt, predict and evaluate with one learner, or with learners that share modules. No thread may call
    the bare model at the same time.

    Attributes:
        memory: the moving averages of tracked estimators, part of the ``state_dict``; ``None`` for the others.
        solves: how the last solves of ``"implicit"`` and ``"perturbed"`` went: see
            `metamom.maml.implicit.solves.Solves`.
        operators: the operators that were passed to `backward` as a SPEC, each created once. With error feedback,
            save their ``state_dict()`` with the learner's.
        federated: the same of `backward`'s ``participation`` and ``down_bias``, by what was passed.

    Raises:
        ValueError: for an option that is out of range or not supported by the estimator, an unknown parameter name, a
            model that ``norm`` does not fit, or ``compile=True`` without a compiler. Its methods raise it for a model
            with a graph that is cut between a parameter and the loss, or one that reads weights other than the tasks'.

    Example:
        >>> from torch import nn
        >>> from torch.nn import functional as F
        >>> from metamom.tasks import Sinusoid
        >>> learner = MAML(nn.Linear(1, 1), F.mse_loss, inner_lr=0.01)
        >>> grads, losses = learner.meta_gradient(Sinusoid().sample(0, 4), workers=2)
        >>> grads["weight"].shape, losses.shape
        (torch.Size([2, 1, 1]), torch.Size([4]))

    Reference:
        Finn, Abbeel, Levine (2017), algorithm 1; the composite gradient of arXiv 2403.00853.
    """

    def like(
        self,
        *,
        estimator: Estimator | None = None,
        inner_batches: InnerBatches | None = None,
        norm: Norm | None = None,
        inner_lr: float | Tensor | Mapping[str, float | Tensor] | None = None,
    ) -> MAML:
        """A learner with the same model and loss, not compiled. Options that are ``None`` stay as they are.

        It shares its parameter tensors with this learner. ``chunk_size`` is ``"auto"`` if this learner has none.
        """
        if self.norms_by_step is not None and estimator is not None:
            check_step_norms(estimator)
        self._keep_up()
        with locked(self):  # another thread may be running the model
            other = self._another(
                inner_lr=0.01 if inner_lr is None else inner_lr,
                inner_steps=self.inner_steps,
                estimator=self.estimator if estimator is None else estimator,
                inner_batches=self.inner_batches if inner_batches is None else inner_batches,
                proximal=self.proximal if ESTIMATORS[estimator or self.estimator].proximal else None,
                chunk_size="auto" if self.chunk_size is None else self.chunk_size,
                autocast=self.autocast,
                vectorize=self.vectorize,
                norm=self.norm if norm is None else norm,
                inner_optimizer=self.inner_optimizer,
            )
        other._run, other._vectorization, other.solves = self._run, self._vectorization, self.solves
        other.norms_by_step, other.adapted = self.norms_by_step, self.adapted
        if inner_lr is None:
            other.step_sizes = self.step_sizes
        return other

    def _another(self, **options: Any) -> MAML:
        """A learner of the same kind, with other options."""
        return MAML(self.model, self.loss_fn, adapt=self.adapted, **options)
