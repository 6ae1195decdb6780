"""Models of other people's kinds, small, with a loss and a batch for each: what MAML must run as a loop does.

Each entry makes ``(model, loss_fn, batch)`` in float64; batches have three tasks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import checkpoint

from metamom import TaskBatch
from metamom.interop.imports import import_learn2learn, import_torchvision
from metamom.nets.models import use_batch_statistics

TASKS, SUPPORT, QUERY, WAYS = 3, 6, 3, 3


class Problem(NamedTuple):
    """A model, its loss and tasks."""

    model: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: TaskBatch


class Of(nn.Module):
    """A module whose forward is a function of it and of its inputs."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


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


def mlp(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 1))


def convolutional(*layers: nn.Module, channels: int = 3) -> nn.Module:
    body = [nn.Conv2d(1, channels, 3), *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4 * channels, WAYS))


def shared_base() -> nn.Module:
    base = nn.Linear(4, 6)
    features = nn.Sequential(base, nn.Tanh())
    return Of(lambda self, x: self.head(self.features(x)), base=base, features=features, head=nn.Linear(6, 1))


def twice_in_a_row() -> nn.Module:
    layer = nn.Linear(6, 6)
    return mlp(nn.Tanh(), layer, nn.Tanh(), layer)


def tied_autoencoder() -> nn.Module:
    model = Of(
        lambda self, x: self.head(torch.tanh(self.decoder(torch.tanh(self.encoder(x))))),
        encoder=nn.Linear(4, 4), decoder=nn.Linear(4, 4), head=nn.Linear(4, 1),
    )  # fmt: skip
    model.decoder.weight = model.encoder.weight
    return model


def tied_language_model() -> nn.Module:
    model = Of(
        lambda self, x: self.out(torch.tanh(self.words(x).mean(1))), words=nn.Embedding(7, 5), out=nn.Linear(5, 7)
    )
    model.out.weight = model.words.weight
    return model


def recurrent(kind: type[nn.RNNBase]) -> Callable[[], nn.Module]:
    return lambda: Of(
        lambda self, x: self.head(self.cell(x)[0][:, -1]),
        cell=kind(2, 3, batch_first=True),
        head=nn.Linear(3, 1),
    )


def recurrent_cell(kind: type[nn.RNNCellBase]) -> Callable[[], nn.Module]:
    def run(self: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)

    return lambda: Of(run, cell=kind(2, 3), head=nn.Linear(3, 1))


def residual() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((-2, -1)))

    norms = {f"norm{i}": nn.BatchNorm2d(4, track_running_stats=False) for i in (1, 2)}
    return Of(run, conv1=nn.Conv2d(1, 4, 3), conv2=nn.Conv2d(4, 4, 3, padding=1), **norms, head=nn.Linear(4, WAYS))


def transformer(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options), 2, enable_nested_tensor=False
        ),
        nn.Flatten(),
        nn.Linear(12, 1),
    )


def sequence_model(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Of(
        lambda self, x: self.head(torch.tanh(self.words(x)).mean(1)),
        words=nn.Embedding(7, 4, **options), head=nn.Linear(4, WAYS),
    )  # fmt: skip


def bag(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.EmbeddingBag(7, 4, **options), nn.Tanh(), nn.Linear(4, WAYS))


def attention() -> nn.Module:
    return Of(
        lambda self, x: self.head(self.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 1),
    )  # fmt: skip


def functional_parameters() -> nn.Module:
    """As in higher's examples: weights in lists, used by functions."""

    def run(self: Any, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.linear(torch.tanh(x), weight, bias)
        return x

    return Of(
        run,
        weights=nn.ParameterList([torch.randn(5, 4), torch.randn(1, 5)]),
        biases=nn.ParameterList([torch.zeros(5), torch.zeros(1)]),
    )


def frozen_features() -> nn.Module:
    model = mlp(nn.Tanh())
    model[0].requires_grad_(False)
    return model


def with_buffers() -> nn.Module:
    model = Of(lambda self, x: self.head((x - self.mean) / self.scale), head=nn.Linear(4, 1))
    model.register_buffer("mean", torch.linspace(-1, 1, 4))
    model.register_buffer("scale", torch.tensor(2.0), persistent=False)
    return model


def materialised() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.LazyLinear(1))
    model(torch.zeros(1, 4))
    return model


def dictionaries() -> nn.Module:
    return Of(
        lambda self, x: self.layers["out"](torch.tanh(self.layers["in"](x)) * self.scales["one"]),
        layers=nn.ModuleDict({"in": nn.Linear(4, 6), "out": nn.Linear(6, 1)}),
        scales=nn.ParameterDict({"one": nn.Parameter(torch.ones(6))}),
    )


# ---- registered twice, tied: as in higher's tests, and worse


def one_layer_in_two_blocks() -> nn.Module:
    layer = nn.Linear(4, 4)
    return Of(
        lambda self, x: self.head(self.one(x) + self.two(x)),
        one=nn.Sequential(layer, nn.Tanh()), two=nn.Sequential(layer), head=nn.Linear(4, 1),
    )  # fmt: skip


def projected_twice() -> nn.Module:
    layer = nn.Linear(4, 3)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(3, 4), nn.Sigmoid(), layer, nn.Tanh(), nn.Linear(3, 1))


def a_block_twice() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    return nn.Sequential(block, nn.Tanh(), nn.ModuleList([block])[0], nn.Linear(4, 1))


def twice_and_tied() -> nn.Module:
    """A layer under two names, whose weight a third layer has too."""
    model, third = shared_base(), nn.Linear(4, 6)
    third.weight = model.base.weight
    return nn.Sequential(OrderedDict(first=nn.Linear(4, 4), twice=model, again=nn.Linear(1, 4), third=third,
                                     last=nn.Linear(6, 1)))  # fmt: skip


def partly_frozen_base() -> nn.Module:
    model = shared_base()
    model.base.weight.requires_grad_(False)
    return model


def one_parameter_twice() -> nn.Module:
    """Under two names of one module, and twice in a list."""
    shared = nn.Parameter(torch.randn(4, 4))
    model = Of(
        lambda self, x: self.head(torch.tanh(x @ self.one @ self.many[0]) @ self.two @ self.many[2]),
        one=shared, many=nn.ParameterList([shared, nn.Parameter(torch.randn(2)), shared]), head=nn.Linear(4, 1),
    )  # fmt: skip
    model.two = shared
    return model


def padded_language_model() -> nn.Module:
    """The row of the padding learns by the output layer, and not by the embedding."""
    model = tied_language_model()
    model.words.padding_idx = 2
    return model


# ---- parameters in odd places and of odd shapes


def scalars() -> nn.Module:
    return Of(
        lambda self, x: torch.sin(self.gain * x[:, :1] + self.shift) + self.empty.sum(),
        gain=nn.Parameter(torch.tensor(1.0)), shift=nn.Parameter(torch.tensor(0.5)), empty=nn.Parameter(torch.ones(0)),
    )  # fmt: skip


def transposed_weight() -> nn.Module:
    """A weight that does not lie in memory as its indices go."""
    model = mlp(nn.Tanh())
    model[0].weight = nn.Parameter(torch.randn(4, 6).t())
    return model


def constant() -> nn.Module:
    """A prediction that is a view of a parameter."""
    return Of(lambda self, x: self.answer.view(2, 2).t()[1, :1].expand(len(x), 1), answer=nn.Parameter(torch.randn(4)))


def looks_at_its_parameters() -> nn.Module:
    return Of(lambda self, x: self.a(x) + sum(p.square().sum() for p in self.parameters()), a=nn.Linear(4, 1))


def experts() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        answers = torch.stack([torch.tanh(expert(x)) for expert in self.experts], 1)
        chosen = answers.gather(1, (x[:, :1] > 0).long().unsqueeze(1).expand(-1, 1, 2)).squeeze(1)
        return self.head((self.gate(x).softmax(1).unsqueeze(2) * answers).sum(1) + chosen)

    return Of(
        run, gate=nn.Linear(4, 3), experts=nn.ModuleList([nn.Linear(4, 2) for _ in range(3)]), head=nn.Linear(2, 1)
    )


def u_net() -> nn.Module:
    def run(self: Any, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm(self.down(x)))
        return self.out(torch.cat([x, self.up(inner)], 1)).mean((-2, -1))

    return Of(
        run, down=nn.Conv2d(1, 3, 3, stride=2, padding=1), norm=nn.GroupNorm(1, 3),
        up=nn.ConvTranspose2d(3, 2, 2, stride=2), out=nn.Conv2d(3, WAYS, 1),
    )  # fmt: skip


def attention_with_all_options() -> nn.Module:
    return Of(
        lambda self, x: self.head(self.attend(x, x, x, key_padding_mask=x[..., 0] > 1, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True, kdim=4, vdim=4),
        head=nn.Linear(4, 1),
    )


def encoder_and_decoder() -> nn.Module:
    return Of(
        lambda self, x: self.head(self.transform(x, x.flip(1)).mean(1)),
        transform=nn.Transformer(4, 2, 1, 1, 4, dropout=0.0, batch_first=True), head=nn.Linear(4, 1),
    )  # fmt: skip


# ---- parametrisations, hooks, scripts


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).mT


def symmetric() -> nn.Module:
    model = mlp(nn.Tanh(), nn.Linear(6, 6))
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def orthogonal(how: str) -> Callable[[], nn.Module]:
    return lambda: mlp(nn.Tanh(), parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=how))


def pruned() -> nn.Module:
    model = mlp(nn.Tanh())
    with torch.no_grad():  # a weight with a graph could not be copied
        prune.random_unstructured(model[0], "weight", 0.5)
    return model


def hooked() -> nn.Module:
    model = mlp(nn.Tanh())
    model[0].register_forward_hook(lambda module, args, out: out * 2 + module.bias)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def scripted() -> nn.Module:
    return torch.jit.script(mlp(nn.Tanh()))


def partly_traced() -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(4, 6), torch.zeros(1, 4)), nn.Tanh(), nn.Linear(6, 1))


class Cube(torch.autograd.Function):
    """With a derivative of its own, which has derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


def checkpointed() -> nn.Module:
    return Of(
        lambda self, x: self.head(checkpoint.checkpoint(self.body, x, use_reentrant=False)),
        body=nn.Sequential(nn.Linear(4, 6), nn.Tanh()), head=nn.Linear(6, 1),
    )  # fmt: skip


def quiet(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: make().eval()


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

# without second derivatives in PyTorch
FIRST_ORDER = {
    "embedding bag": lambda: problem(bag(mode="mean"), words(5), WAYS),
    "embedding bag with padding": lambda: problem(bag(mode="sum", padding_idx=1), words(5), WAYS),
    "embedding bag of maxima": lambda: problem(bag(mode="max"), words(5), WAYS),
}

REFUSED: dict[str, tuple[Callable[[], Problem], str]] = {
    name: ((lambda make=make, inputs=inputs, classes=classes: problem(make, inputs, classes)), said)
    for name, (make, inputs, classes, said) in {
        "running statistics": (lambda: convolutional(nn.BatchNorm2d(3)), IMG, WAYS, "use_batch_statistics"),
        "instance norm with running statistics": (
            lambda: convolutional(nn.InstanceNorm2d(3, track_running_stats=True)), IMG, WAYS, "use_batch_statistics",
        ),
        "embedding with a largest norm": (sequence_model(max_norm=1.0), words(5), WAYS, "in-place|in place"),
        "spectral norm in training": (
            lambda: mlp(parametrizations.spectral_norm(nn.Linear(6, 6))), V4, 0, "in-place|in place",
        ),
        "RNN": (recurrent(nn.RNN), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "GRU": (recurrent(nn.GRU), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "LSTM": (recurrent(nn.LSTM), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "LSTMCell": (recurrent_cell(nn.LSTMCell), images(4, 2), 0, "per-task weights, in module 'cell'"),
        "embedding bag": (bag(mode="mean"), words(5), WAYS, 'estimator="first-order"'),
        "random slopes": (lambda: mlp(nn.RReLU()), V4, 0, "per-task weights, in module '1'"),
        "checkpointed": (checkpointed, V4, 0, "Remove checkpoint\\(\\)"),
        "scripted embedding": (
            lambda: torch.jit.script(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, WAYS))),
            words(5), WAYS, "scripted code of the model calls embedding",
        ),
        "nothing to train": (lambda: nn.Sequential(nn.Tanh()), V4, 0, "trainable parameters"),
        "a branch on the data": (
            lambda: Of(lambda self, x: self.a(x) if x.sum() > 0 else -self.a(x), a=nn.Linear(4, 1)),
            V4, 0, "torch.where",
        ),
    }.items()
}  # fmt: skip


# ---- libraries of models, made when they are asked for


def of_learn2learn(name: str, side: int, channels: int, **options: Any) -> Callable[[], Problem]:
    def make() -> nn.Module:
        models = import_learn2learn().vision.models
        return use_batch_statistics(getattr(models, name)(**options)).eval()

    return lambda: problem(make, images(channels, side, side), WAYS)


def resnet12_block() -> nn.Module:
    import_learn2learn()
    from learn2learn.vision.models.resnet12 import BasicBlock

    shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    block = BasicBlock(3, 4, stride=2, downsample=shortcut)
    return use_batch_statistics(nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS)))


def wide_resnet() -> nn.Module:
    import_learn2learn()
    from learn2learn.vision.models.wrn28 import WideResNet

    return use_batch_statistics(nn.Sequential(WideResNet(10, 1, dropout_rate=0.0), nn.Flatten(), nn.Linear(64, WAYS)))


LEARN2LEARN: dict[str, Callable[[], Problem]] = {
    "OmniglotCNN": of_learn2learn("OmniglotCNN", 28, 1, output_size=WAYS, hidden_size=4, layers=4),
    "OmniglotFC": of_learn2learn("OmniglotFC", 28, 1, input_size=784, output_size=WAYS, sizes=[8, 4]),
    "CNN4": of_learn2learn("CNN4", 32, 3, output_size=WAYS, hidden_size=4, layers=4, embedding_size=16),
    "a block of ResNet12": lambda: problem(resnet12_block, images(3, 8, 8), WAYS),
    "a WideResNet of ten layers": lambda: problem(wide_resnet, images(3, 84, 84), WAYS, noise=0.01),
}
LARGE_LEARN2LEARN = ("a WideResNet of ten layers",)


def of_torchvision(make: Callable[[Any], nn.Module], side: int = 32) -> Callable[[], Problem]:
    return lambda: problem(
        lambda: use_batch_statistics(make(import_torchvision().models)).eval(), images(3, side, side), WAYS, noise=0.01
    )


def named(name: str, side: int = 32, **options: Any) -> Callable[[], Problem]:
    return of_torchvision(lambda models: getattr(models, name)(num_classes=WAYS, **options), side)


TORCHVISION: dict[str, Callable[[], Problem]] = {
    "a ResNet of four blocks": of_torchvision(
        lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=WAYS, width_per_group=64)
    ),
    "a vision transformer of two layers": of_torchvision(
        lambda models: models.VisionTransformer(
            image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=WAYS
        )
    ),
    "a Swin transformer": of_torchvision(
        lambda models: models.SwinTransformer(
            patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=WAYS,
            stochastic_depth_prob=0.0,
        )
    ),
    "a VGG of two layers": of_torchvision(
        lambda models: nn.Sequential(
            models.vgg.make_layers([4, "M", 8, "M"], batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, WAYS),
        ),
        16,
    ),
    "a DenseNet of two blocks": of_torchvision(
        lambda models: models.DenseNet(
            growth_rate=4, block_config=(2, 2), num_init_features=4, bn_size=2, num_classes=WAYS
        ),
        16,
    ),
    "DeepLab's pyramid": of_torchvision(
        lambda models: nn.Sequential(
            models.segmentation.deeplabv3.ASPP(3, [2, 4], 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, WAYS)
        ),
        8,
    ),
    "a MobileNetV2 of three blocks": of_torchvision(
        lambda models: models.MobileNetV2(
            num_classes=WAYS, width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 2]], round_nearest=4
        )
    ),
    "a ResNeXt of four blocks": of_torchvision(
        lambda models: models.ResNet(
            models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=WAYS, groups=2, width_per_group=4
        )
    ),
    "a MaxViT of two blocks": of_torchvision(
        lambda models: models.MaxVit(
            input_size=(32, 32), stem_channels=4, partition_size=2, block_channels=[4, 8], block_layers=[1, 1],
            head_dim=2, stochastic_depth_prob=0.0, num_classes=WAYS,
        )
    ),
    "a Swin transformer, version 2": of_torchvision(
        lambda models: models.SwinTransformer(
            patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=WAYS,
            stochastic_depth_prob=0.0, block=models.swin_transformer.SwinTransformerBlockV2,
        )
    ),
    "squeezenet1_1": named("squeezenet1_1"),
    "resnet18": named("resnet18"),
    "mobilenet_v3_small": named("mobilenet_v3_small"),
    "shufflenet_v2_x0_5": named("shufflenet_v2_x0_5", 64),
    "mnasnet0_5": named("mnasnet0_5", 64),
    "efficientnet_b0": named("efficientnet_b0", 64),
    "regnet_y_400mf": named("regnet_y_400mf", 64),
    "densenet121": named("densenet121"),
    "googlenet": named("googlenet", aux_logits=False, init_weights=False),
    "convnext_tiny": named("convnext_tiny"),
}  # fmt: skip
# without second derivatives in PyTorch (of hardsigmoid)
FIRST_ORDER_TORCHVISION = ("mobilenet_v3_small",)
SMALL_TORCHVISION = (
    "a vision transformer of two layers", "a Swin transformer", "a VGG of two layers", "a DenseNet of two blocks",
    "DeepLab's pyramid",
)  # fmt: skip
