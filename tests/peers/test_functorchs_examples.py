"""functorch's two MAML examples: sinusoids and Omniglot's network, with the settings of the examples.

Sources (github.com/pytorch/functorch): ``examples/maml_regression/evjang_transforms_module.py`` (1-40-40-1 with ReLU,
amplitudes from 0.1 to 0.5, 20 points, 4 tasks, one step of 0.1, Adam at 1e-3) and
``examples/maml_omniglot/maml-omniglot-transforms.py`` (three blocks of convolution, batch norm with the batch's
statistics, ReLU in place and pooling, five steps of 0.1). Both compose `grad` and `vmap`; here a plain loop over tasks
is what each must equal, and the first example learns.
"""

from __future__ import annotations

import torch
from problems import assert_close
from slow_maml import slow_meta_gradient
from torch import nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.tasks import Sinusoid

WAYS = 5


def three_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def test_the_sinusoids_have_the_gradients_of_a_loop():
    model = three_layers().double()
    batch = Sinusoid(shots=20, queries=20, amplitude=(0.1, 0.5), dtype=torch.float64).sample(0, 4)
    found = MAML(model, F.mse_loss, inner_lr=0.1).meta_gradient(batch)
    wanted, losses = slow_meta_gradient(model, nn.MSELoss(), batch, inner_lr=0.1)
    assert_close({name: g[0] for name, g in found.grads.items()}, wanted)
    torch.testing.assert_close(found.losses, losses)


def test_the_sinusoids_are_learned():
    model, tasks = three_layers(), Sinusoid(shots=20, queries=20, amplitude=(0.1, 0.5))
    learner = MAML(model, F.mse_loss, inner_lr=0.1)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    before = evaluate(learner, tasks, tasks=100, steps=(0, 1)).mean
    for step in range(300):
        optimizer.zero_grad()
        learner.backward(tasks.sample(step, 4))
        optimizer.step()
    after = evaluate(learner, tasks, tasks=100, steps=(0, 1)).mean
    assert after[1] < 0.75 * before[1]
    assert after[1] < after[0]


def block(channels: int, width: int) -> list[nn.Module]:
    norm = nn.BatchNorm2d(width, momentum=1, affine=True, track_running_stats=False)
    return [nn.Conv2d(channels, width, 3), norm, nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]


def test_omniglots_network_has_the_gradients_of_a_loop():
    """A width of 4 instead of 64, and 5-way 1-shot, for speed."""
    torch.manual_seed(0)
    layers = [*block(1, 4), *block(4, 4), *block(4, 4), nn.Flatten(), nn.Linear(4, WAYS)]
    model = nn.Sequential(*layers).double()
    generator = torch.Generator().manual_seed(1)
    sets = []
    for shots in (1, 2):
        sets.append(torch.rand(2, WAYS * shots, 1, 28, 28, generator=generator, dtype=torch.float64))
        sets.append(torch.arange(WAYS).repeat(2, shots))
    batch = TaskBatch(*sets)
    found = MAML(model, F.cross_entropy, inner_lr=0.1, inner_steps=5).meta_gradient(batch)
    wanted, losses = slow_meta_gradient(model, nn.CrossEntropyLoss(), batch, steps=5, inner_lr=0.1)
    assert_close({name: g[0] for name, g in found.grads.items()}, wanted, 1e-9)
    torch.testing.assert_close(found.losses, losses)
