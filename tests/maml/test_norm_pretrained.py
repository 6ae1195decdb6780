"""What normalisation uses in a pretrained network, and how its published statistics load."""

from __future__ import annotations

import pytest
import torch
from normalised_models import INNER_LR, MAKE, Loop, case
from problems import WAYS, assert_close, labelled_batch, noise
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.interop.imports import import_torchvision
from metamom.nets.models import use_batch_statistics


def published(model: nn.Module) -> dict[str, Tensor]:
    """Random weights in the layout of torchvision's files: a plain dict, in which layers have no count of batches."""
    state = {n: 0.1 * noise(*t.shape, seed=i, dtype=t.dtype) for i, (n, t) in enumerate(model.state_dict().items())}
    state |= {n: 0.5 + t**2 for n, t in state.items() if n.endswith("running_var")}
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented:UserWarning")
def test_a_pretrained_resnet_with_an_adapted_head():
    resnet18 = import_torchvision().models.resnet18
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18()
        weights = published(model)
        model.load_state_dict(weights)
        model.fc = nn.Linear(512, WAYS)
    model.double().eval()
    batch = labelled_batch(3, 32, 32, queries=15)
    few = TaskBatch(*(x[:2] for x in batch[:2]), *(x[:2, 7:12] for x in batch[2:4]))
    before = {n: t.clone() for n, t in model.state_dict().items() if n not in dict(model.named_parameters())}
    learner = MAML(model, F.cross_entropy, inner_lr=INNER_LR, adapt=["fc"])
    head = ["fc.weight", "fc.bias"]
    expected, losses = Loop(model, "frozen").meta_gradient(model, few, adapted=head)
    found = learner.meta_gradient(few)
    assert_close({n: g[0] for n, g in found.grads.items()}, expected, 1e-9)
    torch.testing.assert_close(found.losses, losses)
    assert learner.adapted == tuple(head)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    for norm in ("frozen", "support"):
        other = learner.like(norm=norm)
        params = other.adapt(batch.support_x[:2], batch.support_y[:2])
        among, alone = (
            other.predict(params, x, support_x=batch.support_x[:2]).detach() for x in (batch.query_x[:2], few.query_x)
        )
        torch.testing.assert_close(alone, among[:, 7:12], rtol=1e-9, atol=1e-9)
    back = resnet18(num_classes=WAYS).double().eval()
    back.load_state_dict(learner.model.state_dict())
    torch.testing.assert_close(back(few.query_x[0]), model(few.query_x[0]), rtol=0, atol=0)


@pytest.mark.parametrize("late", [False, True])
def test_published_weights_load_with_statistics_turned_off(late):
    make, shape = MAKE["2d"]
    model = make()
    weights, x = published(model), labelled_batch(*shape, dtype=torch.float32).query_x[0]
    if not late:
        model.load_state_dict(weights)
    use_batch_statistics(use_batch_statistics(model))
    if late:
        model.load_state_dict(weights)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    for training in (True, False):
        model.train(training)(x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    back = make().eval()
    back.load_state_dict(model.state_dict())
    assert not torch.allclose(back(x), model(x))
    torch.testing.assert_close(back.train()(x), model(x))


def test_a_state_of_an_earlier_version_lacks_statistics_that_are_turned_off():
    model, _ = case("2d")
    use_batch_statistics(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    assert all(not p.any() for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
