"""Models of other people's kinds, small, with a loss and a batch for each: what MAML must run as a loop does.

Each entry makes ``(model, loss_fn, batch)`` in float64; batches have three tasks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from small_models import (
    WAYS,
    Cube,
    Of,
    a_block_twice,
    attention,
    attention_with_all_options,
    bag,
    checkpointed,
    constant,
    convolutional,
    dictionaries,
    encoder_and_decoder,
    experts,
    frozen_features,
    functional_parameters,
    hooked,
    looks_at_its_parameters,
    materialised,
    mlp,
    one_layer_in_two_blocks,
    one_parameter_twice,
    orthogonal,
    padded_language_model,
    partly_frozen_base,
    partly_traced,
    projected_twice,
    pruned,
    quiet,
    recurrent,
    recurrent_cell,
    residual,
    scalars,
    scripted,
    sequence_model,
    shared_base,
    symmetric,
    tied_autoencoder,
    tied_language_model,
    transformer,
    transposed_weight,
    twice_and_tied,
    twice_in_a_row,
    u_net,
    with_buffers,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from metamom import TaskBatch
from metamom.nets.models import use_batch_statistics

TASKS, SUPPORT, QUERY = 3, 6, 3


class Problem(NamedTuple):
    """A model, its loss and tasks."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: TaskBatch


def seeded(make: Callable[[], nn.Module], noise: float) -> nn.Module:
    """In float64; every parameter moved a little, so that weights of 1 and biases of 0 hide nothing."""
    torch.manual_seed(0)
    model = make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape, dtype=torch.float64))
    return model


def images(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda points, generator: torch.randn(TASKS, points, *shape, generator=generator, dtype=torch.float64)


def words(length: int, vocabulary: int = 7) -> Callable[[int, torch.Generator], Tensor]:
    return lambda points, generator: torch.randint(0, vocabulary, (TASKS, points, length), generator=generator)


def problem(
    make: Callable[[], nn.Module],
    inputs: Callable[[int, torch.Generator], Tensor],
    classes: int,
    noise: float = 0.1,
) -> Problem:
    """Classification of ``classes`` classes; regression of one number for 0."""
    generator = torch.Generator().manual_seed(1)
    sets = []
    for points in (SUPPORT, QUERY):
        sets.append(inputs(points, generator))
        labels = torch.randint(0, max(classes, 1), (TASKS, points), generator=generator)
        values = torch.randn(TASKS, points, 1, generator=generator, dtype=torch.float64)
        sets.append(labels if classes else values)
    return Problem(seeded(make, noise), F.cross_entropy if classes else F.mse_loss, TaskBatch(*sets))


V4, IMG, SEQ = images(4), images(1, 8, 8), images(3, 4)
ZOO: dict[str, Callable[[], Problem]] = {
    name: (lambda make=make, inputs=inputs, classes=classes: problem(make, inputs, classes))
    for name, (make, inputs, classes) in {
        # activations and plain layers
        "linear": (lambda: nn.Linear(4, 1), V4, 0),
        "without bias": (lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.GELU(), nn.Linear(6, 1)), V4, 0),
        "tanh": (lambda: mlp(nn.Tanh()), V4, 0),
        "relu in place": (lambda: mlp(nn.ReLU(inplace=True)), V4, 0),
        "prelu": (lambda: mlp(nn.PReLU(6)), V4, 0),
        "silu, elu, softplus": (lambda: mlp(nn.SiLU(), nn.ELU(), nn.Softplus()), V4, 0),
        "hardswish, mish": (lambda: mlp(nn.Hardswish(), nn.Mish()), V4, 0),
        "glu": (lambda: nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 1)), V4, 0),
        "softmax": (lambda: mlp(nn.Softmax(1)), V4, 0),
        "named layers": (
            lambda: nn.Sequential(OrderedDict(a=nn.Linear(4, 6), b=nn.Tanh(), c=nn.Linear(6, 1))), V4, 0,
        ),
        "bilinear": (
            lambda: Of(lambda self, x: self.pair(x, x), pair=nn.Bilinear(4, 4, 1)), V4, 0,
        ),
        # normalisation
        "layer norm": (lambda: mlp(nn.LayerNorm(6), nn.Tanh()), V4, 0),
        "batch norm, 1d": (lambda: mlp(nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()), V4, 0),
        "running statistics": (lambda: convolutional(nn.BatchNorm2d(3), nn.ReLU()).eval(), IMG, WAYS),
        "instance norm with running statistics": (
            lambda: convolutional(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)).eval(), IMG, WAYS,
        ),
        "batch norm, 2d": (lambda: convolutional(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()), IMG, WAYS),
        "batch norm made to use the batch": (
            lambda: use_batch_statistics(convolutional(nn.BatchNorm2d(3), nn.ReLU())), IMG, WAYS,
        ),
        "group norm": (lambda: convolutional(nn.GroupNorm(2, 4), nn.ReLU(), channels=4), IMG, WAYS),
        "instance norm": (lambda: convolutional(nn.InstanceNorm2d(3, affine=True), nn.ReLU()), IMG, WAYS),
        "local response norm": (lambda: convolutional(nn.LocalResponseNorm(2)), IMG, WAYS),
        "RMS norm": (lambda: mlp(nn.RMSNorm(6), nn.Tanh()), V4, 0),
        "layer norm over images": (lambda: convolutional(nn.LayerNorm((3, 6, 6), bias=False), nn.ReLU()), IMG, WAYS),
        "instance norm, 1d, and transposed": (
            lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.InstanceNorm1d(3), nn.Tanh(), nn.Flatten(),
                                  nn.Linear(24, 1)), images(2, 6), 0,
        ),
        "batch norm, 3d, and transposed": (
            lambda: nn.Sequential(nn.ConvTranspose3d(1, 2, 2), nn.BatchNorm3d(2, track_running_stats=False), nn.Tanh(),
                                  nn.Flatten(), nn.Linear(54, 1)), images(1, 2, 2, 2), 0,
        ),
        # convolutions and pooling
        "U-Net": (u_net, IMG, WAYS),
        "folding": (lambda: convolutional(nn.Unfold(2), nn.Tanh(), nn.Fold((6, 6), 2)), IMG, WAYS),
        "convolutions, 1d": (
            lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)), images(2, 6), 0,
        ),
        "convolutions, 3d": (
            lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)), images(1, 3, 3, 3), 0,
        ),
        "grouped and dilated": (
            lambda: convolutional(nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, dilation=2), channels=4), IMG, WAYS,
        ),
        "depthwise": (lambda: convolutional(nn.Conv2d(3, 3, 3, groups=3, padding="same"), nn.Tanh()), IMG, WAYS),
        "transposed": (lambda: convolutional(nn.Tanh(), nn.ConvTranspose2d(3, 3, 2, stride=2)), IMG, WAYS),
        "padding by reflection": (lambda: convolutional(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
                                  IMG, WAYS),
        "max pooling": (lambda: convolutional(nn.ReLU(), nn.MaxPool2d(2)), IMG, WAYS),
        "average and power pooling": (lambda: convolutional(nn.Softplus(), nn.AvgPool2d(2), nn.LPPool2d(2, 2)),
                                      IMG, WAYS),
        "adaptive max pooling": (lambda: convolutional(nn.AdaptiveMaxPool2d(3)), IMG, WAYS),
        "upsampling": (lambda: convolutional(nn.Tanh(), nn.Upsample(scale_factor=2, mode="bilinear")), IMG, WAYS),
        "pixel shuffle": (lambda: convolutional(nn.Tanh(), nn.PixelShuffle(2), nn.Conv2d(1, 4, 1), channels=4),
                          IMG, WAYS),
        "unfolding": (
            lambda: nn.Sequential(nn.Unfold(4, stride=4), nn.Flatten(), nn.Linear(64, WAYS)), IMG, WAYS,
        ),
        "residual network": (residual, IMG, WAYS),
        # sequences
        "RNNCell": (recurrent_cell(nn.RNNCell), images(4, 2), 0),
        "GRUCell": (recurrent_cell(nn.GRUCell), images(4, 2), 0),
        "LSTMCell": (recurrent_cell(nn.LSTMCell), images(4, 2), 0),
        "attention": (attention, SEQ, 0),
        "attention with all its options": (attention_with_all_options, SEQ, 0),
        "encoder and decoder": (encoder_and_decoder, SEQ, 0),
        "transformer": (transformer(), SEQ, 0),
        "transformer, normalised first": (transformer(norm_first=True, activation="gelu"), SEQ, 0),
        "transformer in evaluation mode": (quiet(transformer()), SEQ, 0),
        "embedding": (sequence_model(), words(5), WAYS),
        "embedding with padding": (sequence_model(padding_idx=2), words(5), WAYS),
        "embedding scaled by frequency": (sequence_model(scale_grad_by_freq=True), words(5), WAYS),
        # registered twice, tied, in containers
        "a base under two names": (shared_base, V4, 0),
        "a layer twice in a row": (twice_in_a_row, V4, 0),
        "tied autoencoder": (tied_autoencoder, V4, 0),
        "tied language model": (tied_language_model, words(5), 7),
        "a layer in two blocks": (one_layer_in_two_blocks, V4, 0),
        "a projection twice": (projected_twice, V4, 0),
        "a block twice": (a_block_twice, V4, 0),
        "under two names and tied": (twice_and_tied, V4, 0),
        "under two names and partly frozen": (partly_frozen_base, V4, 0),
        "a parameter in four places": (one_parameter_twice, V4, 0),
        "tied language model with padding": (padded_language_model, words(5), 7),
        "lists of parameters": (functional_parameters, V4, 0),
        "dictionaries": (dictionaries, V4, 0),
        "buffers": (with_buffers, V4, 0),
        "frozen features": (frozen_features, V4, 0),
        "lazy layers, made": (materialised, V4, 0),
        "an unused layer": (lambda: Of(lambda self, x: self.a(x), a=nn.Linear(4, 1), b=nn.Linear(4, 1)), V4, 0),
        "numbers and an empty parameter": (scalars, V4, 0),
        "a weight transposed in memory": (transposed_weight, V4, 0),
        "a constant": (constant, V4, 0),
        "looks at its parameters": (looks_at_its_parameters, V4, 0),
        "experts": (experts, V4, 0),
        "hooks": (hooked, V4, 0),
        "a function of its own": (lambda: Of(lambda self, x: Cube.apply(self.a(x).tanh()), a=nn.Linear(4, 1)), V4, 0),
        "scripted": (scripted, V4, 0),
        "partly traced": (partly_traced, V4, 0),
        # parametrised
        "symmetric": (symmetric, V4, 0),
        "orthogonal by exponentials": (orthogonal("matrix_exp"), V4, 0),
        "orthogonal by Cayley's map": (orthogonal("cayley"), V4, 0),
        "orthogonal by reflections": (orthogonal("householder"), V4, 0),
        "pruned": (pruned, V4, 0),
        "weight norm": (lambda: mlp(nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 6))), V4, 0),
        "spectral norm, frozen": (
            quiet(lambda: mlp(nn.Tanh(), parametrizations.spectral_norm(nn.Linear(6, 6)))), V4, 0,
        ),
        # drawing nothing in evaluation mode
        "dropout in evaluation mode": (quiet(lambda: mlp(nn.Tanh(), nn.Dropout(0.5))), V4, 0),
    }.items()
}  # fmt: skip

# without second derivatives in PyTorch, so that a loop of its own can be compared with by first order only
FIRST_ORDER = {
    "embedding bag": lambda: problem(bag(mode="mean"), words(5), WAYS),
    "embedding bag with padding": lambda: problem(bag(mode="sum", padding_idx=1), words(5), WAYS),
    "embedding bag of maxima": lambda: problem(bag(mode="max"), words(5), WAYS),
}

REFUSED: dict[str, tuple[Callable[[], Problem], str]] = {
    name: ((lambda make=make, inputs=inputs, classes=classes: problem(make, inputs, classes)), said)
    for name, (make, inputs, classes, said) in {
        "spectral norm in training": (
            lambda: mlp(parametrizations.spectral_norm(nn.Linear(6, 6))), V4, 0, "in-place|in place",
        ),
        "RNN": (recurrent(nn.RNN), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "GRU": (recurrent(nn.GRU), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "LSTM": (recurrent(nn.LSTM), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "embedding bag scaled by frequency": (
            bag(mode="mean", scale_grad_by_freq=True), words(5), WAYS, 'estimator="first-order"',
        ),
        "random slopes": (lambda: mlp(nn.RReLU()), V4, 0, "per-task weights, in module '1'"),
        "checkpointed": (checkpointed, V4, 0, "Remove checkpoint\\(\\)"),
        "scripted embedding": (
            lambda: torch.jit.script(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, WAYS))),
            words(5), WAYS, "scripted code in the model calls embedding",
        ),
        "nothing to train": (lambda: nn.Sequential(nn.Tanh()), V4, 0, "trainable parameters"),
        "a branch on the data": (
            lambda: Of(lambda self, x: self.a(x) if x.sum() > 0 else -self.a(x), a=nn.Linear(4, 1)),
            V4, 0, "torch.where",
        ),
    }.items()
}  # fmt: skip
