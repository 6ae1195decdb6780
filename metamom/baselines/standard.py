"""The baselines that go with a learner."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from metamom.baselines.features import Penultimate
from metamom.baselines.per_task import PerTask
from metamom.baselines.probes import LinearProbe, NearestCentroid
from metamom.baselines.tuning import FineTuning, FromScratch
from metamom.common.choices import Norm
from metamom.maml.learner import MAML
from metamom.maml.normalisation.norm import resolved
from metamom.maml.normalisation.norm_modes import ByLayer


def standard_baselines(
    learner: MAML, *, classes: bool, make: Callable[[], nn.Module] | None = None, lr: float = 0.01
) -> dict[str, PerTask]:
    """The baselines for a trained learner, by name.

    Args:
        learner: its weights are where all but ``"from scratch"`` start. Batch normalisation uses the statistics that
            it uses, or those of the current set in place of the support set's.
        classes: whether the tasks are classification. Only then are there ``"nearest centroid"`` and
            ``"linear probe"``, on what the model's last linear layer gets.
        make: returns a new model, for ``"from scratch"``; left out if ``None``. It is also left out of a model with
            frozen weights, such as a pretrained backbone: training the others from random values is what
            ``"fine-tuning"`` does, but for their start.
        lr: of Adam, in ``"fine-tuning"`` and ``"from scratch"``.
    """
    model, loss_fn = learner.model, learner.loss_fn
    uses = resolved(model, learner.norm)
    norm: Norm | None = "batch" if uses == "support" else None if isinstance(uses, ByLayer) else uses
    found: dict[str, PerTask] = {}
    if classes and any(isinstance(module, nn.Linear) for module in model.modules()):
        features = Penultimate(model)
        found["nearest centroid"] = NearestCentroid(features, norm=norm)
        found["linear probe"] = LinearProbe(features, norm=norm)
    found["fine-tuning"] = FineTuning(model, loss_fn, lr=lr, norm=norm)
    if make is not None and all(p.requires_grad for p in model.parameters()):
        like = next(model.parameters())
        found["from scratch"] = FromScratch(make, loss_fn, lr=lr, norm=norm, device=like.device, dtype=like.dtype)
    return found
