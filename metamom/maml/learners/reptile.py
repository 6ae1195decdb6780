"""Reptile: move the weights towards those that tasks end at.

Legend: T tasks, J inner steps.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from metamom.common.checks import check_word
from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.inner_step import straight_through
from metamom.maml.learner import MAML
from metamom.maml.problem import Rule
from metamom.maml.task_weights import Params

TrainOn = Literal["all", "support"]
NOT_OF_REPTILE: dict[str, Any] = {  # options of `metamom.MAML` that it does not have, with the values that they are at
    "estimator": "first-order",
    "tracking": None,
    "learn_inner_lr": False,
    "positive_inner_lr": False,
    "multi_step": 0,
    "first_order_until": 0,
    "step_norms": False,
}


def displaced(before: Params, after: Params, losses: Tensor) -> Tensor:
    """Losses ``[T]`` with unchanged values, and ``w - u_J`` as each one's derivative in w.

    Args:
        before: w, ``[T, *shape]``.
        after: u_J, shaped and named as ``before``.
        losses: ``[T]``.
    """
    dots = [((w - after[name]).detach() * w).unsqueeze(-1).flatten(1).sum(1) for name, w in before.items()]
    return straight_through(losses, sum(dots[1:], dots[0]))


class Reptile(MAML):
    """Reptile: the meta-gradient of a task is ``w - u_J``, the way from the weights after J inner steps back to w.

    ``u_0 = w, u_{j+1} = u_j - alpha * grad L(u_j)``, without any derivative of these steps. With ``torch.optim.SGD`` of
    step size epsilon, a step is the paper's ``w <- w + epsilon * mean(u_J - w)``. The scale is that of the inner steps,
    not that of a gradient: divide by ``alpha * J`` to compare with one. With J = 1 it is alpha times the gradient of
    the mean loss over all tasks, which does not learn to adapt: use several steps.

    Losses and accuracies are those of the query set after adaptation, as for `metamom.MAML`. With ``train_on="all"``,
    training has adapted on it.

    Args:
        model: as of `metamom.MAML`.
        loss_fn: as of `metamom.MAML`, without parameters, which inner steps would not move.
        train_on: what meta-gradients adapt on: ``"all"``, support and query set together, as in the paper, whose
            training does not divide a task's points; or ``"support"``. Evaluations adapt on support sets.
        **options: as of `metamom.MAML`, but for ``adapt``, ``estimator``, ``tracking``, ``learn_inner_lr``,
            ``positive_inner_lr``, ``multi_step``, ``first_order_until`` and ``step_norms``.
            ``inner_batches="fresh"`` gives each inner step its own part of the points, as in the paper.

    Raises:
        ValueError: as `metamom.MAML`; for the options that do not apply, and a loss with trainable parameters.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom.tasks import Sinusoid
        >>> learner = Reptile(nn.Linear(1, 1), F.mse_loss, inner_lr=0.02, inner_steps=5)
        >>> grads, losses = learner.meta_gradient(Sinusoid().sample(0, 4), workers=2)
        >>> grads["weight"].shape, losses.shape
        (torch.Size([2, 1, 1]), torch.Size([4]))

    Reference:
        Nichol, Achiam, Schulman, "On first-order meta-learning algorithms" (2018), algorithm 2.
    """

    kind = "reptile"

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, train_on: TrainOn = "all", **options: Any) -> None:
        check_word("train_on", train_on, get_args(TrainOn))
        for name, plain in NOT_OF_REPTILE.items():
            if options.pop(name, plain) != plain:
                raise ValueError(
                    f"Reptile differentiates nothing, so {name} does not apply: leave it out, or use MAML."
                )
        if options.pop("adapt", None) is not None:
            raise ValueError(
                "Reptile learns only what inner steps move, so all trainable parameters adapt: leave adapt out, and "
                "freeze others with requires_grad_(False)."
            )
        if isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters()):
            raise ValueError(
                "loss_fn has trainable parameters, which inner steps do not move, so Reptile would not learn them: "
                "freeze them with requires_grad_(False), or use MAML."
            )
        self.train_on: TrainOn = train_on
        super().__init__(model, loss_fn, estimator="first-order", **options)
        if self.step_sizes.learned():
            raise ValueError(
                "Reptile differentiates nothing, so an inner_lr that requires a gradient would not be learned: give "
                "numbers, or use MAML."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "estimator" and value != "first-order":
            raise ValueError(f"Reptile differentiates nothing, so estimator does not apply; got {value!r}. Use MAML.")
        super().__setattr__(name, value)

    def describe(self) -> dict[str, Any]:
        """See `metamom.MAML.describe`."""
        return super().describe() | {"train_on": self.train_on}

    def _rule(self) -> Rule:
        return Rule(outer=displaced, joins=self.train_on == "all")

    def _another(self, **options: Any) -> MAML:
        return Reptile(self.model, self.loss_fn, train_on=self.train_on, **options)
