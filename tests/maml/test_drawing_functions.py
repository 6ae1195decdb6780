"""Seeing only the functions that draw gives the same draws, bit for bit, as seeing every operation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_draws import LAYERS, problem
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML
from metamom.maml.running import run_by_task
from metamom.maml.under_vmap.drawing_functions import drawn_by_task, may_draw


class Permuted(nn.Module):
    """Dropout of a tensor in which the numbers of a point are not in their order in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x.unflatten(1, (4, 2)).transpose(1, 2)).flatten(1)


class Unseen(nn.Module):
    """Dropout; when ``late``, it also draws where calls of functions are not seen."""

    late = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.25, self.training)
        if not self.late:
            return x
        with torch._C.DisableTorchFunction():
            return x + torch.randn_like(x)


CASES: dict[str, Callable[[], nn.Module]] = {
    **LAYERS,
    "permuted": Permuted,
    "in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)).double(),
    "all": lambda: nn.Dropout(1.0),
    "none": lambda: nn.Dropout(0.0),
}


def learner_of(layer: nn.Module, vectorize: str) -> tuple[MAML, Callable[[], dict[str, Tensor]]]:
    model, batch = problem("Dropout")
    model[2] = layer
    learner = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=2, vectorize=vectorize)
    return learner, lambda: learner.meta_gradient(batch, workers=2).grads


def layer_of(case: str) -> nn.Module:
    torch.manual_seed(3)
    return CASES[case]()


def everywhere(run, tasks, device, *, known):
    return drawn_by_task(run, tasks, device, known=None)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_the_draws_are_those_of_the_mode_that_sees_everything(case, vectorize, monkeypatch):
    learner, gradient = learner_of(layer_of(case), vectorize)
    torch.manual_seed(7)
    found = [gradient() for _ in range(2)]
    assert not any(places.elsewhere for places in learner._run.places.values())
    after = torch.rand(())
    monkeypatch.setattr(run_by_task, "drawn_by_task", everywhere)
    gradient = learner_of(layer_of(case), vectorize)[1]
    torch.manual_seed(7)
    for each in found:
        assert_equal(each, gradient())
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_a_model_that_comes_to_draw_elsewhere_runs_again(vectorize, monkeypatch):
    layer = Unseen()
    learner, gradient = learner_of(layer, vectorize)
    for _ in range(2):
        gradient()
    layer.late = True
    torch.manual_seed(7)
    found = [gradient() for _ in range(2)]
    after = torch.rand(())
    assert any(places.elsewhere for places in learner._run.places.values())
    monkeypatch.setattr(run_by_task, "drawn_by_task", everywhere)
    torch.manual_seed(7)
    for each in found:
        assert_equal(each, gradient())
    assert torch.equal(torch.rand(()), after)


def test_which_functions_may_draw():
    drawing = [F.dropout, F.dropout2d, F.alpha_dropout, F.rrelu, F.gumbel_softmax, torch.rand, torch.randperm]
    drawing += [torch.bernoulli, torch.normal, torch.Tensor.normal_, torch.Tensor.uniform_, torch.multinomial]
    drawing += [torch.ops.aten.rand, F.multi_head_attention_forward, F.scaled_dot_product_attention, torch.lstm]
    assert [func for func in drawing if not may_draw(func)] == []
    quiet = [F.linear, F.relu, F.batch_norm, F.layer_norm, F.conv2d, F.gelu, F.softmax, torch.Tensor.add, torch.matmul]
    quiet += [torch.Tensor.shape.__get__, torch.Tensor.__getitem__, F.interpolate]
    assert [func for func in quiet if may_draw(func)] == []
