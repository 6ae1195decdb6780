"""What vmap does not take as PyTorch writes it: draws into new tensors, channels-last layouts, masked encoders."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import assert_close, regression_batch
from slow_maml import adapt_tasks, meta_gradient_by_copies
from small_models import Of
from torch import Tensor, distributions, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamom import MAML

ALPHA = 0.05
BATCH = regression_batch(1, tasks=3, support=6, query=6, dim=4)
ONE = torch.ones(6, dtype=torch.float64)


def of(forward, **modules) -> nn.Module:
    torch.manual_seed(0)
    return Of(forward, **{"a": nn.Linear(4, 6), "c": nn.Linear(6, 1), **modules}).double()


def gradient(model: nn.Module, vectorize: str) -> dict[str, Tensor]:
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize=vectorize)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.backward(BATCH)
    return {name: p.grad for name, p in model.named_parameters()}


def in_place(z: Tensor) -> Tensor:
    noise = z.new_zeros(6)
    noise.normal_()
    return z + noise


DRAWS = {
    "Laplace, of shared scales": lambda z: distributions.Laplace(z, 0.1 * ONE).rsample(),
    "Normal, without gradients": lambda z: z + distributions.Normal(0 * ONE, ONE).sample(),
    "Laplace": lambda z: distributions.Laplace(z, 1.0).rsample(),
    "Exponential": lambda z: distributions.Exponential(F.softplus(z)).rsample(),
    "Independent": lambda z: distributions.Independent(distributions.Laplace(z, 1.0), 1).rsample(),
    "a mean of each task, shared deviations": lambda z: z + torch.normal(z.detach().mean(0), ONE / 3),
    "shared means, a deviation of each task": lambda z: z + torch.normal(ONE[:3, None], z.detach()[0] ** 2).mean(0),
    "numbers of successes": lambda z: z + torch.binomial(5 * ONE, z.detach()[0].sigmoid()),
    "in place": in_place,
    "in place, and a mask that all tasks share": lambda z: in_place(z)[:, torch.zeros(6, dtype=torch.bool) | True],
}


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_those_of_a_loop(draw):
    found = []
    for vectorize in ("vmap", "loop"):
        model = of(lambda self, x: self.c(DRAWS[draw](self.a(x))))
        torch.manual_seed(1)
        found.append([gradient(model, vectorize) for _ in range(2)])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-10)


def images(z: Tensor) -> Tensor:
    return z.view(-1, 2, 3, 1)


LAST = {"memory_format": torch.channels_last}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(**LAST),
    "twice": lambda x: x.contiguous(**LAST).contiguous(**LAST),
    "clone": lambda x: x.clone(**LAST),
    "to": lambda x: x.to(**LAST),
    "to, with a dtype": lambda x: x.to(torch.float64, **LAST),
    "double": lambda x: x.double(**LAST),
    "like": lambda x: x + torch.zeros_like(x, **LAST),
    "if": lambda x: 2 * x if x.contiguous(**LAST).is_contiguous(**LAST) and not x.is_contiguous(**LAST) else x,
    "in memory": lambda x: x * (x.contiguous(**LAST).stride(1) + 1),
    "volumes": lambda x: x.unsqueeze(-1).contiguous(memory_format=torch.channels_last_3d).squeeze(-1),
}


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_last_layouts(layout, vectorize):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.k(LAYOUTS[layout](images(self.a(x)))).flatten(1))

    model = of(forward, k=nn.Conv2d(2, 2, (2, 1), padding=(1, 0), stride=(2, 1)), c=nn.Linear(4, 1))
    expected = meta_gradient_by_copies(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA)
    assert_close(gradient(model, vectorize), expected, 1e-10)


def test_a_layout_of_other_axes_is_an_error_of_pytorch():
    with pytest.raises(ValueError, match="required rank 4 tensor to use channels_last format"):
        gradient(of(lambda self, x: self.c(self.a(x).contiguous(**LAST))), "auto")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("mask_check", [True, False])
def test_an_encoder_in_evaluation_mode_with_padded_tokens(mask_check, vectorize):
    padded = torch.tensor([[False, False, True], [False, False, False]])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.t(self.a(x).unflatten(0, (2, 3)), src_key_padding_mask=padded).flatten(0, 1))

    layer = nn.TransformerEncoderLayer(6, 2, 4, batch_first=True)
    model = of(forward, t=nn.TransformerEncoder(layer, 1, mask_check=mask_check)).eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = meta_gradient_by_copies(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA)
        weights = list(adapt_tasks(model, F.mse_loss, BATCH, steps=2, inner_lr=ALPHA))
    assert_close(gradient(model, vectorize), expected, 1e-10)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, inner_steps=2, vectorize=vectorize)
    found = learner.predict(learner.adapt(BATCH.support_x, BATCH.support_y), BATCH.query_x)
    for task, own in enumerate(weights):
        wanted = torch.func.functional_call(model, own, (BATCH.query_x[task],))
        assert_close({"predictions": found[task]}, {"predictions": wanted}, 1e-10)
