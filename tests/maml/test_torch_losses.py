"""torch's losses, with all their options, give what a loop over tasks gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from slow_maml import slow_meta_gradient
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.3], dtype=torch.float64)


LAYER = torch.arange(16.0, dtype=torch.float64).cos().view(4, 4)


def of_two(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of scores and labels of two positions."""
    return lambda p, y: loss(torch.stack([p, 2 * p], -1), torch.stack([y, y.flip(0)], -1))


def of_variances(**options: object) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Gaussian losses with variances of several shapes."""
    variances = {
        "of each": lambda p: p.exp(),
        "a column": lambda p: p.exp().mean(1, keepdim=True),
        "of each point": lambda p: p.exp().mean(1),
        "below eps": lambda p: p.abs() * 1e-3,
        "constant": lambda p: torch.full_like(p, 0.5),
        "a number": lambda p: 0.5,
    }
    if options.get("eps") is None:
        options["eps"] = 1e-3
    return {
        f"gaussian {name} {options}": (
            "values",
            lambda p, y, var=var: nn.GaussianNLLLoss(**options)(p, y, var(p)),
        )
        for name, var in variances.items()
    }


def of_classes(reduction: str, weight: Tensor | None, smoothing: float) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Cross-entropies of labels and of probabilities."""
    options = {"reduction": reduction, "weight": weight, "label_smoothing": smoothing}
    said = f"cross-entropy {reduction} {'weighted' if weight is not None else ''} {smoothing}"
    return {
        f"{said} labels": ("classes", nn.CrossEntropyLoss(**options)),
        f"{said} some ignored": ("some classes", nn.CrossEntropyLoss(**options)),
        f"{said} 1 ignored": ("classes", nn.CrossEntropyLoss(**options, ignore_index=1)),
        f"{said} of positions": ("some classes", of_two(nn.CrossEntropyLoss(**options))),
        f"{said} of one point": ("classes", lambda p, y: F.cross_entropy(p[0], y[0], **options)),
        f"{said} probabilities": ("probabilities", nn.CrossEntropyLoss(**options)),
    }


def of_entries(reduction: str) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Losses of values and of binary labels."""
    losses = {
        "mse": ("values", nn.MSELoss(reduction=reduction)),
        "l1": ("values", nn.L1Loss(reduction=reduction)),
        "smooth l1": ("values", nn.SmoothL1Loss(reduction=reduction, beta=0.3)),
        "huber": ("values", nn.HuberLoss(reduction=reduction, delta=0.3)),
        "poisson": ("counts", nn.PoissonNLLLoss(reduction=reduction, full=True)),
        "poisson of rates": (
            "counts", lambda p, y: F.poisson_nll_loss(p.exp(), y, log_input=False, reduction=reduction)
        ),
        "logits": ("binary", nn.BCEWithLogitsLoss(reduction=reduction, weight=WEIGHT, pos_weight=WEIGHT)),
        "probabilities": ("binary", lambda p, y: F.binary_cross_entropy(p.sigmoid(), y, WEIGHT, reduction=reduction)),
        "soft margin": ("signs", nn.SoftMarginLoss(reduction=reduction)),
        "hinge": ("signs", nn.HingeEmbeddingLoss(reduction=reduction, margin=0.5)),
        "several labels": ("binary", nn.MultiLabelSoftMarginLoss(reduction=reduction, weight=WEIGHT)),
        "nll": ("some classes", lambda p, y: F.nll_loss(F.log_softmax(p, 1), y, WEIGHT, reduction=reduction)),
        "triplets": (
            "values", lambda p, y: nn.TripletMarginLoss(reduction=reduction, swap=True)(p, y, p.flip(0))
        ),
        "cosines": (
            "signs",
            lambda p, y: nn.CosineEmbeddingLoss(0.1, reduction=reduction)(p, 2 * p.flip(0) + 1, y[:, 0]),
        ),
        "ranks": ("signs", lambda p, y: nn.MarginRankingLoss(0.1, reduction=reduction)(p[:, 0], p[:, 1], y[:, 0])),
    }  # fmt: skip
    return {f"{name} {reduction}": loss for name, loss in losses.items()}


LOSSES = {
    **of_variances(),
    **of_variances(full=True, reduction="sum", eps=0.1),
    **of_classes("mean", None, 0.0),
    **of_classes("mean", None, 0.1),
    **of_classes("mean", WEIGHT, 0.0),
    **of_classes("mean", WEIGHT, 0.1),
    **of_classes("sum", WEIGHT, 0.1),
    **of_entries("mean"),
    **of_entries("sum"),
    "kl of logarithms": (
        "probabilities", lambda p, y: F.kl_div(F.log_softmax(p, 1), y.log(), reduction="sum", log_target=True)
    ),
    "kl of labels": (
        "classes", lambda p, y: F.kl_div(F.log_softmax(p, 1), F.one_hot(y, 4).to(p.dtype), reduction="sum")
    ),
    "kl": ("probabilities", lambda p, y: F.kl_div(F.log_softmax(p, 1), y, reduction="batchmean")),
    "an old reduction": ("some classes", lambda p, y: F.cross_entropy(p, y, WEIGHT, False, label_smoothing=0.1)),
    "weights of each task": (
        "some classes", lambda p, y: F.cross_entropy(p, y, p.detach().exp().mean(0), label_smoothing=0.1)
    ),
    "a part of the model's output": (
        "values", lambda p, y: F.gaussian_nll_loss(p[:, :2], y[:, :2], p[:, 2:].exp(), reduction="none").mean()
    ),
    **{
        f"cross-entropy of a linear layer, {options}": (
            "some classes", lambda p, y, options=options: F.linear_cross_entropy(p, LAYER, y, weight=WEIGHT, **options)
        )
        for options in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "reduction": "sum"})
        if hasattr(F, "linear_cross_entropy")
    },
    "roll": ("values", lambda p, y: F.mse_loss(p * p.mean().roll(1), y)),
}  # fmt: skip


def targets_of(kind: str, points: int) -> Tensor:
    """For 3 tasks and predictions of 4 numbers."""
    generator = torch.Generator().manual_seed(points)
    y = torch.randn(3, points, 4, generator=generator, dtype=torch.float64)
    labels = y.argmax(-1)
    return {
        "values": y,
        "counts": y.abs(),
        "binary": (y > 0).double(),
        "signs": y.sign(),
        "probabilities": y.softmax(-1),
        "classes": labels,
        "some classes": labels.index_fill(1, torch.tensor([1]), -100),
    }[kind]


def losses_of(kind: str) -> tuple[nn.Module, TaskBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    x = [torch.randn(3, points, 2, dtype=torch.float64) for points in (6, 5)]
    return model, TaskBatch(x[0], targets_of(kind, 6), x[1], targets_of(kind, 5))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_torch_does_as_in_a_loop(name):
    kind, loss_fn = LOSSES[name]
    model, batch = losses_of(kind)
    expected, losses = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    learner = MAML(model, loss_fn, inner_lr=0.1)
    for _ in range(2):  # the second call knows what the first has found out
        grads, ours = learner.meta_gradient(batch)
        assert_close({name: g.mean(0) for name, g in grads.items()}, expected)
        torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["gaussian of each {'eps': 0.001}", "cross-entropy mean weighted 0.1 some ignored"])
def test_a_loss_of_torch_compiles(name, traced):
    kind, loss_fn = LOSSES[name]
    model, batch = losses_of(kind)
    expected, _ = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    compiled = MAML(model, loss_fn, inner_lr=0.1, compile=True).meta_gradient(batch).grads
    assert_close({name: g.mean(0) for name, g in compiled.items()}, expected)
    assert len(traced) == 1


def test_a_model_of_several_outputs_has_variances_too():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.scale = nn.Linear(2, 4), nn.Linear(2, 4)
            self.double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(x), self.scale(x).exp()

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.gaussian_nll_loss(out[0], y, out[1])

    batch = losses_of("values")[1]
    model = Heads()
    grads, losses = slow_meta_gradient(model, loss_fn, batch, inner_lr=0.1)
    learner = MAML(model, loss_fn, inner_lr=0.1)
    torch.testing.assert_close(learner.losses(batch).detach(), losses, rtol=1e-12, atol=1e-12)
    learner.backward(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_fn", "said"),
    [
        (lambda p, y: F.gaussian_nll_loss(p, y, p), r"needs variances >= 0; got negative ones"),
        (lambda p, y: F.gaussian_nll_loss(p, y, -1.0), "var has negative entry"),
        (lambda p, y: F.gaussian_nll_loss(p, y, p.exp()[:, :3]), r"variance for each prediction \[6, 4\].*\[6, 3\]"),
        (lambda p, y: F.gaussian_nll_loss(p, y, p.exp(), reduction="median"), "none, mean or sum; got 'median'"),
    ],
)
def test_arguments_of_a_gaussian_loss_are_checked(loss_fn, said):
    model, batch = losses_of("values")
    with pytest.raises(ValueError, match=said):
        MAML(model, loss_fn).meta_gradient(batch)
