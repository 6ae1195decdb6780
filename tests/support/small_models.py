"""Small models of other people's kinds: what `model_zoo` makes problems of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import checkpoint

WAYS = 3


class Of(nn.Module):
    """A module whose forward is a function of it and of its inputs."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


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


def recurrent(kind: type[nn.RNNBase], inputs: int = 2, hidden: int = 3, **options: Any) -> Callable[[], nn.Module]:
    directions = 2 if options.get("bidirectional") else 1
    return lambda: Of(
        lambda self, x: self.head(self.cell(x)[0][:, -1]),
        cell=kind(inputs, hidden, batch_first=True, **options), head=nn.Linear(directions * hidden, 1),
    )  # fmt: skip


def recurrent_cell(kind: type[nn.RNNCellBase], inputs: int = 2, hidden: int = 3) -> Callable[[], nn.Module]:
    def run(self: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)

    return lambda: Of(run, cell=kind(inputs, hidden), head=nn.Linear(hidden, 1))


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
