"""BOIL: MAML in which inner steps move the body of the model and leave its head."""

from __future__ import annotations

from typing import Any

from torch import nn

from metamom.maml.checks.loss_readings import LossFn
from metamom.maml.last_layer import head_name, parameters_within
from metamom.maml.learner import MAML


class BOIL(MAML):
    """Body only update in the inner loop: `metamom.MAML` that adapts everything but the model's head.

    The head gets a meta-gradient and stays the same for all tasks, so a task can be learned only by changing the
    features. ANIL, ``MAML(adapt=["head"])``, is the opposite.

    Args:
        model: as of `metamom.MAML`.
        loss_fn: as of `metamom.MAML`.
        head: the name of the module that does not adapt; by default the last one, in the order of registration, that
            has trainable parameters of its own.
        **options: as of `metamom.MAML`, but for ``adapt``.

    Attributes:
        head: the name of the head.

    Raises:
        ValueError: as `metamom.MAML`; for ``adapt``, for an unknown head, and if nothing is left for the body.

    Example:
        >>> from torch.nn import functional as F
        >>> from metamom.nets import Conv4
        >>> learner = BOIL(Conv4(5, hidden=8), F.cross_entropy, inner_lr=0.4)
        >>> learner.head, [name for name in learner.meta_parameters() if name not in learner.adapted]
        ('head', ['head.weight', 'head.bias'])

    Reference:
        Oh, Yoo, Kim, Yun, "BOIL: towards representation change for few-shot learning" (2021).
    """

    kind = "boil"

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, head: str | None = None, **options: Any) -> None:
        if options.pop("adapt", None) is not None:
            raise ValueError("BOIL adapts everything but the head: leave adapt out, or use MAML(adapt=...).")
        self.head = head_name(model, head, "BOIL")
        super().__init__(
            model,
            loss_fn,
            adapt=lambda name: name not in parameters_within(self.model, self.head),  # of the model as it is
            **options,
        )

    def describe(self) -> dict[str, Any]:
        """See `metamom.MAML.describe`."""
        return super().describe() | {"head": self.head}

    def _another(self, **options: Any) -> MAML:
        return BOIL(self.model, self.loss_fn, head=self.head, **options)
