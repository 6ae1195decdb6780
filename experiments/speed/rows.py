"""The rows of the speed benchmark: the computation of each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom.batch import TaskBatch
from metamom.bias import BiasOperator, TopK
from metamom.experiments.shared.numerals import shortest
from metamom.experiments.speed.networks import LSTM, Encoder, conv_net, mlp, resnet12, resnet18
from metamom.maml.chunking import ChunkSize
from metamom.maml.estimators import Estimator
from metamom.maml.learner import LossFn
from metamom.nets.models import Conv4, SinusoidMLP
from metamom.tasks import Episodes, Sinusoid

# Between float32 results, relative to the norm. A ReLU with an input of zero up to rounding may fall on either side,
# and a Conv4 has millions of them: there the tolerance only catches garbage, and the check in float64 does the rest.
MLP_TOLERANCE, CONV4_TOLERANCE = 1e-4, 0.5


class PlainConv4(nn.Module):
    """`metamom.nets.Conv4` in PyTorch's own layers; it can load a Conv4's ``state_dict``.

    Args:
        ways: number of classes.
        hidden: channels of every block.
    """

    def __init__(self, ways: int, hidden: int = 64) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(
                nn.Conv2d(fan_in, hidden, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(hidden, track_running_stats=False),
                nn.ReLU(),
            )
            for fan_in in (1, hidden, hidden, hidden)
        ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[N, ways]`` of images ``[N, 1, 28, 28]``."""
        scores: Tensor = self.head(self.features(x).mean((2, 3)))
        return scores


class MetaRow(NamedTuple):
    """One meta-iteration: a meta-gradient of a batch of tasks and an optimizer step.

    Attributes:
        title: the computation in words.
        model: metamom's model.
        plain: the same network with the same weights in PyTorch's own layers, for the others.
        loss_fn: of a task.
        batch: the tasks.
        inner_lr: inner step size.
        tolerance: how far two contenders' float32 meta-gradients may be apart, relative to their norm.
        inner_steps: number of inner steps.
        estimator: second or first order.
        workers: number of workers that share the tasks.
        bias: their operator.
        chunk_size: metamom's option.
        in_jax: whether the network is written in JAX too.
        head: the module that inner steps adapt (ANIL); the others are frozen. ``None`` adapts all parameters.
    """

    title: str
    model: nn.Module
    plain: nn.Module
    loss_fn: LossFn
    batch: TaskBatch
    inner_lr: float
    tolerance: float
    inner_steps: int = 1
    estimator: Estimator = "exact"
    workers: int = 1
    bias: BiasOperator | None = None
    chunk_size: ChunkSize = "auto"
    in_jax: bool = True
    head: str | None = None

    @property
    def has_convolutions(self) -> bool:
        """Whether the model is a Conv4 rather than the MLP."""
        return isinstance(self.plain, PlainConv4)

    def to(self, device: torch.device, dtype: torch.dtype) -> MetaRow:
        """A copy with models and data on ``device``."""
        model, plain = (copy.deepcopy(m).to(device, dtype) for m in (self.model, self.plain))
        return self._replace(model=model, plain=plain, batch=self.batch.to(device, dtype))


class OptimizerRow(NamedTuple):
    """Only the optimizer step, for the parameters of a model and constant gradients.

    Attributes:
        title: the computation in words.
        model: the model whose parameters are updated.
        beta: weight of the new gradient.
        tolerance: how far two contenders' float32 weights may be apart after some steps, relative to their norm.
    """

    title: str
    model: nn.Module
    beta: float
    tolerance: float = 1e-5

    def to(self, device: torch.device, dtype: torch.dtype) -> OptimizerRow:
        """A copy with its model on ``device``."""
        return self._replace(model=copy.deepcopy(self.model).to(device, dtype))


Row = MetaRow | OptimizerRow


def _mlp() -> nn.Sequential:
    """1-40-40-1, as a plain `torch.nn.Sequential`."""
    return nn.Sequential(*SinusoidMLP(generator=torch.Generator().manual_seed(0)))


def _sinusoid(
    tasks: int = 25,
    *,
    inner_steps: int = 1,
    estimator: Estimator = "exact",
    workers: int = 1,
    bias: BiasOperator | None = None,
) -> MetaRow:
    model = _mlp()
    title = f"sinusoid MLP 1-40-40-1, {tasks} tasks, 10 + 10 points, {_steps_and_order(inner_steps, estimator)}"
    if bias is not None:
        title += f", {workers} workers, {bias}"
    return MetaRow(
        title,
        model,
        model,
        F.mse_loss,
        Sinusoid(10, 10).sample(0, tasks),
        inner_lr=0.01,
        tolerance=MLP_TOLERANCE,
        inner_steps=inner_steps,
        estimator=estimator,
        workers=workers,
        bias=bias,
    )


def _omniglot(
    tasks: int = 16,
    *,
    ways: int = 5,
    shots: int = 1,
    inner_steps: int = 1,
    estimator: Estimator = "exact",
    chunk_size: ChunkSize = "auto",
) -> MetaRow:
    """Images are noise, which costs as much as characters do."""
    generator = torch.Generator().manual_seed(0)
    model = Conv4(ways, generator=generator)
    plain = PlainConv4(ways)
    plain.load_state_dict(model.state_dict())
    images = torch.rand(400, 1, 28, 28, generator=generator)
    episodes = Episodes(images, torch.arange(400) // 10, ways=ways, shots=shots, queries=1)
    return _classification(
        "28x28 Conv4-64", model, plain, episodes, tasks, inner_steps, estimator, inner_lr=0.4, chunk_size=chunk_size
    )


def _images(
    model: Callable[[], nn.Module],
    name: str,
    shape: tuple[int, ...],
    tasks: int = 4,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 1,
    inner_steps: int = 1,
    estimator: Estimator = "exact",
    head: str | None = None,
) -> MetaRow:
    """A network that is not metamom's, on inputs of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = model()
    per_class = shots + queries + 1
    inputs = torch.randn(ways * per_class, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(ways * per_class) // per_class
    episodes = Episodes(inputs, labels, ways=ways, shots=shots, queries=queries)
    return _classification(
        name, network, network, episodes, tasks, inner_steps, estimator, inner_lr=0.01, in_jax=False, head=head
    )


def _classification(
    name: str,
    model: nn.Module,
    plain: nn.Module,
    episodes: Episodes,
    tasks: int,
    inner_steps: int,
    estimator: Estimator,
    **options: Any,
) -> MetaRow:
    sizes = f"{episodes.ways}-way {episodes.shots}-shot {episodes.queries}-query"
    return MetaRow(
        f"{name}, {tasks} tasks, {sizes}, {_steps_and_order(inner_steps, estimator)}",
        model,
        plain,
        F.cross_entropy,
        episodes.sample(0, tasks),
        tolerance=CONV4_TOLERANCE,
        inner_steps=inner_steps,
        estimator=estimator,
        **options,
    )


def _sequences(tasks: int = 8) -> MetaRow:
    """A recurrent network that predicts numbers from sequences of noise."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = LSTM(4, 32)
    generator = torch.Generator().manual_seed(0)
    shapes = ((tasks, 10, 16, 4), (tasks, 10, 1)) * 2
    return MetaRow(
        f"LSTM, hidden 32, sequences of 16 x 4, {tasks} tasks, 10 + 10 points, {_steps_and_order(1, 'exact')}",
        network,
        network,
        F.mse_loss,
        TaskBatch(*(torch.randn(*shape, generator=generator) for shape in shapes)),
        inner_lr=0.01,
        tolerance=MLP_TOLERANCE,
        in_jax=False,
    )


_plain_28 = partial(_images, partial(conv_net, 64, 28, 1, 5), "28x28 Conv-BN-ReLU-pool, 64 channels", (1, 28, 28), 16)
_plain_84 = partial(_images, partial(conv_net, 32, 84, 3, 5), "84x84 Conv-BN-ReLU-pool, 32 channels", (3, 84, 84))
_resnet18 = partial(
    _images, partial(resnet18, 5), "84x84 ResNet-18, frozen, adapted head", (3, 84, 84), inner_steps=5, head="fc"
)
_resnet12 = partial(_images, partial(resnet12, (64, 128, 256, 512), 5), "84x84 ResNet-12", (3, 84, 84), 2)


def _steps_and_order(inner_steps: int, estimator: Estimator) -> str:
    order = "second order" if estimator == "exact" else "first order"
    return f"{inner_steps} step{'s' if inner_steps > 1 else ''}, {order}"


def _optimizer(name: str, model: nn.Module, beta: float) -> OptimizerRow:
    d = sum(p.numel() for p in model.parameters())
    return OptimizerRow(f"optimizer step alone, beta = {shortest(beta)}, the {d} parameters of {name}", model, beta)


# By the name for --rows; made when needed.
ROWS: dict[str, Callable[[], Row]] = {
    "sinusoid": _sinusoid,
    "omniglot": _omniglot,
    "sinusoid-5-steps": lambda: _sinusoid(inner_steps=5),
    "sinusoid-128-tasks": lambda: _sinusoid(128),
    "sinusoid-first-order": lambda: _sinusoid(estimator="first-order"),
    "sinusoid-top-k": lambda: _sinusoid(100, workers=100, bias=TopK(ratio=0.05)),
    "omniglot-20-way": lambda: _omniglot(4, ways=20),
    "omniglot-5-shot": lambda: _omniglot(shots=5),
    "omniglot-5-steps": lambda: _omniglot(inner_steps=5),
    "omniglot-128-tasks": lambda: _omniglot(128),
    "omniglot-first-order": lambda: _omniglot(estimator="first-order"),
    "plain-28": _plain_28,
    "plain-28-5-shot": lambda: _plain_28(shots=5),
    "plain-28-15-query": lambda: _plain_28(queries=15),
    "plain-28-first-order": lambda: _plain_28(estimator="first-order"),
    "plain-28-5-steps": lambda: _plain_28(inner_steps=5),
    "plain-84": lambda: _plain_84(queries=5),
    "plain-84-first-order": lambda: _plain_84(queries=5, estimator="first-order"),
    "plain-84-5-shot": lambda: _plain_84(shots=5),
    "plain-84-15-query": lambda: _plain_84(queries=15),
    "plain-84-5-steps": lambda: _plain_84(inner_steps=5),
    "resnet12": _resnet12,
    "resnet12-5-shot": lambda: _resnet12(shots=5),
    "resnet18-anil": lambda: _resnet18(shots=5),
    "resnet18-anil-15-query": lambda: _resnet18(queries=15),
    "lstm": _sequences,
    "mlp": lambda: _images(partial(mlp, (784, 256, 128, 64), 5), "MLP 784-256-128-64", (784,), 32, queries=5),
    "transformer": lambda: _images(partial(Encoder, 64, 2, 5), "transformer, 2 layers, d = 64, 32 tokens", (32, 64), 8),
    "optimizer-mlp": lambda: _optimizer("the MLP", _mlp(), 0.1),
    "optimizer-mlp-sgd": lambda: _optimizer("the MLP", _mlp(), 1.0),
    "optimizer-conv4": lambda: _optimizer("Conv4", Conv4(5, generator=torch.Generator().manual_seed(0)), 0.1),
    "optimizer-conv4-sgd": lambda: _optimizer("Conv4", Conv4(5, generator=torch.Generator().manual_seed(0)), 1.0),
}
