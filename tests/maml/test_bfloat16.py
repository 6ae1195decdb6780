"""Products in bfloat16: really on, and as exact as eight bits can be."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch._inductor
from problems import (
    WAYS,
    conv4,
    generator,
    image_batch,
    plain_conv4,
    relative_error,
    small,
    small_batch,
)
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.nets.models import SinusoidMLP

# The bounds are those of the problem. On noise, at the start, eight bits move the gradient of Conv4 by 12 %, whoever
# computes it: see test_conv4_in_bfloat16_is_as_exact_as_plain_layers.
HALVED = {
    "Conv4": (
        lambda: conv4(16, dtype=torch.float32),
        F.cross_entropy,
        lambda seed: image_batch(seed, tasks=4, dtype=torch.float32),
        0.25,
    ),
    "SinusoidMLP": (
        lambda: SinusoidMLP(generator=generator(0)),
        F.mse_loss,
        lambda seed: small_batch(seed, tasks=4, dtype=torch.float32),
        0.05,
    ),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_products(traced, name, compile):
    """Really on, for it changes the gradient, and by no more than eight bits explain."""
    make, loss_fn, batch_of, bound = HALVED[name]
    model = make()
    halved = MAML(model, loss_fn, autocast=torch.bfloat16, compile=compile)
    full = MAML(model, loss_fn)
    errors = []
    for seed in range(0, 50, 10):
        grads, losses = halved.meta_gradient(batch_of(seed))
        assert {x.dtype for x in (*grads.values(), losses)} == {torch.float32}
        errors.append(relative_error(grads, full.meta_gradient(batch_of(seed)).grads))
    assert 1e-5 < statistics.median(errors) < bound, errors
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(traced) == int(compile)


@pytest.mark.parametrize("name", HALVED)
def test_bfloat16_in_evaluation(name):
    make, loss_fn, batch_of, bound = HALVED[name]
    model, batch = make(), batch_of(0)
    halved, full = (MAML(model, loss_fn, autocast=dtype) for dtype in (torch.bfloat16, None))
    with torch.no_grad():
        outs = [learner.predict(learner.adapt(*batch[:2], steps=2), batch.query_x) for learner in (halved, full)]
    assert [out.dtype for out in outs] == [torch.float32] * 2
    assert 1e-5 < float((outs[0] - outs[1]).norm() / outs[1].norm()) < bound


def gradient(model: nn.Module, batch: TaskBatch, autocast: bool) -> dict[str, Tensor]:
    """Without tasks or adaptation, by torch alone."""
    with torch.autocast("cpu", torch.bfloat16, autocast):
        scores = model(batch.query_x[0])
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(scores.float(), batch.query_y[0]), list(weights.values()))
    return dict(zip(weights, grads, strict=True))


def test_conv4_in_bfloat16_is_as_exact_as_plain_layers():
    model = conv4(16, dtype=torch.float32)
    plain = plain_conv4(model)
    ours, theirs = [], []
    for seed in range(0, 50, 10):
        batch = image_batch(seed, dtype=torch.float32)
        exact = gradient(plain, batch, autocast=False)
        ours.append(relative_error(gradient(model, batch, autocast=True), exact))
        theirs.append(relative_error(gradient(plain, batch, autocast=True), exact))
    assert statistics.median(ours) < 1.1 * statistics.median(theirs)


def test_bfloat16_reaches_the_convolutions_of_plain_layers():
    """A model without any other product: were they left in float32, nothing would change."""
    model = nn.Sequential(nn.Conv2d(1, WAYS, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    halved, full = (
        MAML(model, F.cross_entropy, autocast=dtype).meta_gradient(image_batch(dtype=torch.float32)).grads
        for dtype in (torch.bfloat16, None)
    )
    assert relative_error(halved, full) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"], ids=str)
def test_autocast_is_bfloat16_or_none(dtype):
    with pytest.raises(ValueError, match=r"autocast must be torch\.bfloat16 or None; got"):
        small(autocast=dtype)
