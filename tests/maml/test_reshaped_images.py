"""Reshaped images, which PyTorch's layout can view and metamom's must copy, against a plain loop over tasks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from problems import assert_close
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch

ALPHA = 0.1
SIDES = (4, 8)  # with a maximum pooling, and without


class Net(nn.Module):
    """Normalised images [N, 8, 4, 4] or [N, 8, 8, 8], then features from a function of them, and a head."""

    def __init__(self, activation: Callable[[Tensor], Tensor], features: Callable[[Tensor], Tensor], side: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)
        self.head, self.side = nn.Linear(8 * side * side, 3), side
        self.activation, self.features = activation, features

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.norm(self.conv(x)))
        return self.head(self.features(z if self.side == 8 else F.max_pool2d(z, 2)))


ACTIVATIONS = {"relu": F.relu, "leaky": F.leaky_relu, "none": lambda z: z}
READ = {  # what other people write before a head
    "view": lambda z: z.view(z.size(0), -1),
    "view of a size": lambda z: z.view(torch.Size([len(z), z[0].numel()])),
    "view of a size by its name": lambda z: z.view(size=(len(z), z[0].numel())),
    "view as": lambda z: z.view_as(z.new_empty(len(z), z[0].numel())),
    "view twice": lambda z: z.view(len(z), 8, -1).view(len(z), -1),
    "view of channels in groups": lambda z: (z.view(len(z), 2, 4, *z.shape[2:]) * 2).view(len(z), -1),
    "operator": lambda z: torch.ops.aten.view.default(z, [len(z), -1]),
    "positions": lambda z: z.flatten(2).transpose(1, 2).contiguous().view(len(z), -1),
    "positions first": lambda z: z.flatten(2).permute(2, 0, 1).transpose(0, 1).reshape(len(z), -1),
    "windows": lambda z: z.unfold(2, 2, 2).contiguous().view(len(z), -1),
    "parts": lambda z: torch.cat([part.contiguous().view(len(z), -1) for part in z.split(2, 1)], 1),
    "strided": lambda z: z.contiguous().as_strided((len(z), z[0].numel()), (z[0].numel(), 1)),
    "changed alone": lambda z: F.leaky_relu(z.view(len(z), -1) * 1, 0.2, True),
    "a copy changed": lambda z: (z.flatten(1).clone().add_(1), z.view(len(z), -1))[1],
}


def changes(reshaped: Callable[[Tensor], Tensor], then: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Features of images that are changed in place together with what they were reshaped to."""
    return lambda z: then(z, reshaped(z)).reshape(len(z), -1)


def added(z: Tensor, y: Tensor) -> Tensor:
    y += 0.5
    return z


WRITTEN = {
    "flatten": changes(lambda z: z.flatten(1), added),
    "view": changes(lambda z: z.view(len(z), -1), added),
    "reshape": changes(lambda z: z.reshape(len(z), -1), lambda z, y: (y.mul_(0.5), z)[1]),
    "ravel": changes(torch.ravel, added),
    "contiguous": changes(torch.Tensor.contiguous, added),
    "a module": changes(nn.Flatten(), lambda z, y: (nn.ELU(inplace=True)(y), z)[1]),
    "a view of it": changes(lambda z: z.flatten(1).t(), added),
    "an earlier view": lambda z: (z[:3], z.view(len(z), -1).add_(1))[0].repeat(2, 1, 1, 1).reshape(len(z), -1),
    "an item": changes(lambda z: z.flatten(1), lambda z, y: (y.__setitem__(0, 1.0), z)[1]),
    "the images": changes(lambda z: z.flatten(1), lambda z, y: (z.add_(0.5), y)[1]),
    "one after the other": changes(lambda z: z.flatten(1), lambda z, y: (y.add_(0.5), z.mul_(2.0), y)[2]),
    "a flag that is 1": changes(lambda z: z.flatten(1), lambda z, y: (F.elu(y, 1.0, 1), z)[1]),
    "an operator": changes(lambda z: z.flatten(1), lambda z, y: (torch.ops.aten.mul_.Scalar(y, 2.0), z)[1]),
}


def tokens(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Features of images and of a copy of them that is changed in place, in the order of metamom's memory."""
    return lambda z: change(z).reshape(len(z), -1) + z.reshape(len(z), -1)


COPIED = {  # in PyTorch's layout; they could share memory here
    "tokens": tokens(lambda z: F.leaky_relu(z.flatten(2).transpose(1, 2).contiguous(), 0.3, inplace=True)),
    "permuted": tokens(lambda z: z.permute(0, 2, 3, 1).contiguous().mul_(0.5)),
    "in one row": tokens(lambda z: z.permute(0, 2, 3, 1).reshape(-1).sub_(0.3)),
    "all places": tokens(lambda z: z.permute(0, 2, 3, 1).reshape(-1, 8).sub_(0.3)),
    "some images": tokens(lambda z: z.permute(0, 2, 3, 1)[:3].reshape(3, -1).sub_(0.3).repeat(2, 1)),
    "of a sum": tokens(lambda z: (z + 1).flatten(2).mT.contiguous().mul_(0.5)),
    "in a layout": tokens(lambda z: z.to(memory_format=torch.channels_last).sub_(0.3)),
    "contiguous in a layout": tokens(lambda z: z.contiguous(memory_format=torch.channels_last).sub_(0.3)),
}


def problem(activation: str, features: Callable[[Tensor], Tensor], side: int) -> tuple[Net, TaskBatch]:
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    model = Net(ACTIVATIONS[activation], features, side).double()
    x, query_x = torch.randn(2, 3, 6, 1, 8, 8, generator=generator, dtype=torch.float64)
    y, query_y = torch.randint(3, (2, 3, 6), generator=generator)
    return model, TaskBatch(x, y, query_x, query_y)


def gradients(learner: MAML, batch: TaskBatch) -> dict[str, Tensor]:
    return {name: g.squeeze(0) for name, g in learner.meta_gradient(batch).grads.items()}


@pytest.mark.parametrize("features", READ.values(), ids=READ)
def test_reshaping_runs_on_all_tasks_at_once(features):
    for activation, side in itertools.product(("relu", "none"), SIDES):
        model, batch = problem(activation, features, side)
        wanted = meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA)
        for options in ({"vectorize": "vmap"}, {"chunk_size": 1}):
            assert_close(gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA, **options), batch), wanted)


@pytest.mark.parametrize("features", COPIED.values(), ids=COPIED)
def test_copies_in_pytorchs_layout_are_copies(features):
    test_reshaping_runs_on_all_tasks_at_once(features)


SHARED = {  # views in either layout
    "places": lambda z: (z.flatten(2).sub_(0.3), z)[1].flatten(1),
    "tokens": lambda z: (z.permute(0, 2, 3, 1).flatten(1, 2).mul_(0.5), z)[1].flatten(1),
    "a channel": lambda z: (z[:, 0].flatten(1).add_(0.5), z)[1].flatten(1),
}


@pytest.mark.parametrize("features", SHARED.values(), ids=SHARED)
def test_views_in_either_layout_are_views(features):
    for side in SIDES:
        model, batch = problem("none", features, side)
        wanted = meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA)
        assert_close(gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap"), batch), wanted)


@pytest.mark.parametrize("features", WRITTEN.values(), ids=WRITTEN)
def test_changes_in_place_of_reshaped_images_reach_them_in_a_loop(features):
    # PyTorch refuses to change results that gradients need, of a ReLU or a tanh
    for activation, side in itertools.product(("leaky", "none"), SIDES):
        model, batch = problem(activation, features, side)
        with pytest.raises(ValueError, match="changes reshaped images in place"):
            MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap").meta_gradient(batch)
        learner = MAML(model, F.cross_entropy, inner_lr=ALPHA)
        with pytest.warns(UserWarning, match="reshaped images are changed in place.*runs task by task"):
            found = gradients(learner, batch)
        assert_close(found, meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA))
        assert_close(gradients(learner, batch), found)  # without a second warning


def test_memory_is_read_in_a_loop():
    model, batch = problem("relu", lambda z: z.as_strided((len(z), z[0].numel()), (z[0].numel(), 1)), 8)
    with pytest.raises(ValueError, match=r"as_strided on images.*Call .contiguous\(\) first"):
        MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap").meta_gradient(batch)
    with pytest.warns(UserWarning, match="its forward calls as_strided"):
        found = gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA), batch)
    assert_close(found, meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA))


class Pair(nn.Module):
    """Returns images and class scores of their changed copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(512, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(x)
        return self.head(F.relu(z.flatten(1), inplace=True)), z


class Signals(nn.Module):
    """A one-dimensional convolution, of which vmap's result has gaps in memory."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8, track_running_stats=False)
        self.head, self.features = nn.Linear(64, 3), features

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.features(self.norm(self.conv(x.squeeze(1))))).flatten(1))


def of_a_pair(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y) + out[1].square().mean()


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (Pair(), of_a_pair),
        (Signals(lambda z: (z.reshape(-1, 8).sub_(0.3), z)[1]), F.cross_entropy),
        (Signals(lambda z: (z.contiguous().mul_(0.5), z)[1]), F.cross_entropy),
    ],
    ids=["returned", "signals", "contiguous signals"],
)
def test_changes_that_others_read_reach_them(model, loss):
    _, batch = problem("none", torch.flatten, 8)
    model = model.double()
    with pytest.warns(UserWarning, match="reshaped images are changed in place"):
        found = gradients(MAML(model, loss, inner_lr=ALPHA), batch)
    assert_close(found, meta_gradient_by_copies(model, loss, batch, inner_lr=ALPHA))


class Transposed(nn.Module):
    """Features in a layout of the model's own: PyTorch keeps it in the sum, whose transpose is contiguous as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.norm(self.conv(x))).mean((1, 2, 3))[:, None, None]
        z = F.leaky_relu(self.layer(x.squeeze(1)).transpose(1, 2) + scale)
        y = z.transpose(1, 2).contiguous()
        y += 0.5
        return self.head(z.flatten(1))


def test_layouts_of_a_models_own_are_pytorchs():
    _, batch = problem("none", torch.flatten, 8)
    torch.manual_seed(4)
    model = Transposed().double()
    found = gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap"), batch)
    assert_close(found, meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA))


def test_signals_can_be_viewed():
    _, batch = problem("none", torch.flatten, 8)
    model = Signals(lambda z: z.view(-1, 8).view(len(z), -1)).double()
    found = gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA, vectorize="vmap"), batch)
    assert_close(found, meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA))


class OfData(nn.Module):
    """Reads, or changes, the data of its activations."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.use = nn.Linear(64, 6), nn.Linear(6, 3), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(torch.tanh(self.layer(x.flatten(1)))))


def focal(scores: Tensor, y: Tensor) -> Tensor:
    """As widely copied."""
    logs = F.log_softmax(scores, 1).gather(1, y.view(-1, 1))
    return -((1 - logs.data.exp()) ** 2 * logs).mean()


@pytest.mark.parametrize("loss", [F.cross_entropy, focal])
def test_data_is_read_on_all_tasks_at_once(loss):
    _, batch = problem("none", torch.flatten, 8)
    torch.manual_seed(4)
    model = OfData(lambda z: z / z.data.norm(dim=1, keepdim=True)).double()
    found = gradients(MAML(model, loss, inner_lr=ALPHA, vectorize="vmap"), batch)
    assert_close(found, meta_gradient_by_copies(model, loss, batch, inner_lr=ALPHA))


@pytest.mark.parametrize("use", [lambda z: (z.data.mul_(0.5), z)[1], lambda z: (z.data.copy_(2 * z.data), z * 1)[1]])
def test_data_is_changed_task_by_task(use):
    _, batch = problem("none", torch.flatten, 8)
    torch.manual_seed(4)
    model = OfData(use).double()
    with pytest.warns(UserWarning, match="runs task by task"):
        found = gradients(MAML(model, F.cross_entropy, inner_lr=ALPHA), batch)
    assert_close(found, meta_gradient_by_copies(model, F.cross_entropy, batch, inner_lr=ALPHA))


def test_data_of_weights_is_refused_as_in_a_loop():
    _, batch = problem("none", torch.flatten, 8)
    model = OfData(lambda z: z).double()
    model.use = lambda z: (model.head.weight.data.clamp_(-0.1, 0.1), z)[1]
    before = model.head.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vmap, about its speed
        with pytest.raises(ValueError, match=r"changed in place: head.weight"):
            MAML(model, F.cross_entropy, inner_lr=ALPHA).meta_gradient(batch)
    assert torch.equal(model.head.weight, before)
