"""One run in memory: its state, and an epoch of it in the order of the algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metamom.bias import BiasOperator, Layout
from metamom.experiments.paper.memory import Needs, largest_chunk
from metamom.experiments.paper.nodes import Seen
from metamom.experiments.paper.protocol import Protocol
from metamom.optim import CompositeMomentum
from metamom.server.aggregate import unflatten
from metamom.tasks.images import LabelledImages
from metamom.training.checkpoints import CheckpointError
from metamom.training.plan import check_momentum
from metamom.training.restore import checked_generators, checked_head, load_parts

TEST_BATCH = 1000  # images per forward pass


class Row(NamedTuple):
    """A line of ``metrics.csv``: training metrics before the epoch's update, test metrics after it."""

    train_loss: float
    train_acc: float
    test_loss: float
    test_acc: float


class Training:
    """The nodes, the server and their data.

    An epoch is one update: every node's full gradient at the same parameters, the operator on each, their mean, and a
    step of composite momentum that starts at ``v_0 = g_0``.

    Args:
        protocol: the experiment.
        train: normalised images ``[N, H, W]`` and labels ``[N]``; node i holds ``[i N/n, (i+1) N/n)``.
        test: the same, for testing.
        nodes: n; must divide N.
        lr: gamma.
        beta: weight of the new gradient.
        bias: the operator on each node's gradient; its state starts empty.
        seed: of the weights and of all later draws, as ``torch.manual_seed`` before the model is made.
        chunk: nodes computed at a time; ``None`` for as many as `memory` allows.
        device: of everything.

    Raises:
        ValueError: for an argument out of range; without a chunk, for a run that takes more than 2 GB.
    """

    def __init__(
        self,
        protocol: Protocol,
        train: LabelledImages,
        test: LabelledImages,
        *,
        nodes: int,
        lr: float,
        beta: float,
        bias: BiasOperator,
        seed: int,
        chunk: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if nodes < 1 or len(train.labels) % nodes:
            raise ValueError(f"the number of nodes must divide the {len(train.labels)} images; got nodes={nodes}.")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk, the number of nodes computed at a time, must be >= 1; got {chunk}.")
        self.protocol = protocol
        self.nodes = nodes
        self.train = LabelledImages(*(t.to(device).view(nodes, -1, *t.shape[1:]) for t in train))
        self.test = LabelledImages(*(t.to(device) for t in test))
        self.model, self.draws = protocol.initial(seed)
        self.model.to(device=device, dtype=train.images.dtype)
        self.optimizer = CompositeMomentum(self.model.parameters(), lr=lr, beta=beta, first_step="gradient")
        check_momentum(self.optimizer, bias)
        self.sizes = Layout(p.shape for p in self.model.parameters())
        self.parameters = sum(self.sizes)
        bias.wire_bytes(self.parameters, sizes=self.sizes)  # raises for an operator that is too large
        self.epochs = 0
        self.operator = bias
        self.operator.reset()
        self.chunk = largest_chunk(self._needs()) if chunk is None else min(nodes, chunk)

    def epoch(self) -> Row:
        """Do one update, and return the metrics around it."""
        gradient, seen = self._mean_gradient()
        weights = dict(self.model.named_parameters())
        for name, g in unflatten(gradient, weights).items():
            weights[name].grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.epochs += 1
        images = self.train.labels.numel()
        return Row(float(seen.loss.double().mean()), int(seen.hits.sum()) / images, *self._tested())

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bias": self.operator.state_dict(),
            "draws": self.draws.get_state(),
            "epochs": self.epochs,
        }

    def load_state_dict(self, state: dict[str, Any], where: str) -> None:
        """Continue from a checkpoint.

        Args:
            state: the checkpoint's contents.
            where: its origin, for the error.

        Raises:
            CheckpointError: for a checkpoint that does not fit; nothing is changed then.
        """
        epochs, _ = checked_head(state, where)
        if state.get("epochs") != epochs:
            raise CheckpointError(f"{where} say both that {epochs} epochs are done, and {state.get('epochs')!r:.80}.")
        draws = checked_generators({"cpu": state.get("draws"), "cuda": []}, where).cpu
        parts = {"model": self.model, "optimizer": self.optimizer, "bias": self.operator}
        load_parts(parts, state, where, entries=self.parameters, workers=self.nodes, step=epochs)
        self.draws.set_state(draws)
        self.epochs = epochs

    def _mean_gradient(self) -> tuple[Tensor, Seen]:
        """The server's mean ``[d]``, summed chunk by chunk, so that only one chunk's gradients exist at a time."""
        self.model.train()
        images, labels = self.train
        rows = images.new_empty(self.chunk, self.parameters)
        total = images.new_zeros(self.parameters)
        seen = []
        flips = self._flips(labels.numel())
        for first in range(0, self.nodes, self.chunk):
            y = labels[first : first + self.chunk]
            x = images[first : first + self.chunk].flatten(0, 1)
            flipped = None if flips is None else flips.view_as(labels)[first : first + self.chunk].flatten()
            out = rows[: len(y)]
            x = self.protocol.seen(x, flipped)
            seen.append(self.protocol.gradients(self.model, x.view(*y.shape, *x.shape[1:]), y, out))
            nodes = range(first, first + len(y))
            total += self.operator(out, step=self.epochs, workers=nodes, sizes=self.sizes).sum(0)
        return total.div_(self.nodes), Seen(*map(torch.cat, zip(*seen, strict=True)))

    @torch.no_grad()
    def _tested(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images; in `eval` mode the batches make no difference."""
        self.model.eval()
        loss, hits = 0.0, 0
        for x, y in self._test_batches():
            logits = self.model(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            hits += int((logits.argmax(-1) == y).sum())
        return loss / len(self.test.labels), hits / len(self.test.labels)

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.test
        flips = self._flips(len(labels))
        for first in range(0, len(labels), TEST_BATCH):
            part = slice(first, first + TEST_BATCH)
            yield self.protocol.seen(images[part], None if flips is None else flips[part]), labels[part]

    def _flips(self, count: int) -> Tensor | None:
        """Which images are mirrored, ``[count]``, with the draws of a `DataLoader` over ``RandomHorizontalFlip``.

        That is a seed for workers at each iteration over it, then a number for each image in turn.
        """
        if not self.protocol.flips:
            return None
        torch.empty((), dtype=torch.int64).random_(generator=self.draws)
        return (torch.rand(count, generator=self.draws) < 0.5).to(self.train.labels.device)

    def _needs(self) -> Needs:
        return Needs(
            nodes=self.nodes,
            parameters=self.parameters,
            data=sum(t.nbytes for t in (*self.train, *self.test)),
            images=self.train.labels.shape[1],
            activations=self.protocol.activations,
            together=self.protocol.together,
            kept=len(self.operator.names),
            element_size=self.train.images.element_size(),
        )
