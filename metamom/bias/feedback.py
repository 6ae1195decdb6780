"""Error feedback: each worker keeps what its operator has lost, and adds it back in later steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metamom.bias.base import BiasOperator
from metamom.bias.clip import Clip
from metamom.bias.coordinates import Coordinates, Sizes, check_gradient
from metamom.bias.function import inner_operator
from metamom.bias.spelling import Row, spelled, spelled_around
from metamom.bias.state import Kept, State
from metamom.common.checks import check_number
from metamom.optim import momentum_update_

Rows = dict[str, Tensor]  # the tensors [n, d] of a transition's workers, by name


class ErrorFeedback(BiasOperator):
    """The base of EF14, EF21, EF21-SGDM and Clip21: an operator, and tensors ``[d]`` that each worker keeps.

    A worker's state starts at zero, and each gradient of that worker updates it. It is part of a run: `train` saves it
    in every checkpoint. The theory requires a contractive operator (Top-K, Rand-K unscaled, Sign).

    Args:
        operator: C, or its SPEC, on whole gradients or layer by layer.

    Raises:
        TypeError: for anything but an operator, and for one with error feedback.
        ValueError: when called with gradients of a different length than before.

    Attributes:
        state: the workers' tensors by name, ``[n, d]`` in the order of the workers; empty before the first call.
    """

    def __init__(self, operator: BiasOperator | str) -> None:
        self.operator = inner_operator(operator, "error feedback goes around an operator without it")
        self._workers: dict[int, dict[str, Tensor]] = {}

    @property
    def state(self) -> dict[str, Tensor]:
        """The workers' tensors by name."""
        kept = [self._workers[worker] for worker in sorted(self._workers)]
        # some workers have been updated since a checkpoint was loaded; the others still have the loaded tensors
        return {name: torch.stack([state[name].to(kept[0][name]) for state in kept]) for name in self.names if kept}

    @abstractmethod
    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        """The recurrence up to the operator: its input ``[n, d]``, and the tensors that `_after` needs.

        The tensors ``kept`` are copies, which the recurrence may change in place.
        """

    @abstractmethod
    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        """The recurrence after it has ``sent = C(wanted)``: what the server receives, and the next tensors."""

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        wanted, kept = self._before(rows, self._rows_of(state, rows, place))
        sent, state = self.operator.transition(wanted, state, place, sizes)
        out, kept = self._after(wanted, sent, kept)
        return out, replace(state, workers=self._next(state, kept, place))

    def transition_send(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[list[Tensor], State]:
        """See `BiasOperator.transition_send`: the messages encode the operator's input, including the feedback."""
        wanted, kept = self._before(rows, self._rows_of(state, rows, place))
        check_gradient(wanted)
        messages, state = self.operator.transition_send(wanted, state, place, sizes)
        d, dtype = wanted.shape[1], wanted.dtype
        sent = torch.stack([self.operator.decode(message, d, dtype, sizes=sizes) for message in messages])
        _, kept = self._after(wanted, sent, kept)
        return messages, replace(state, workers=self._next(state, kept, place))

    def transition_receive(
        self,
        messages: Sequence[Tensor],
        state: State,
        d: int,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        *,
        each: bool = False,
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition_receive`: the decoded messages of the operator, which has no state for them."""
        return self.operator.receive(messages, d, dtype, sizes=sizes, each=each), state

    def _rows_of(self, state: State, rows: Tensor, place: Coordinates) -> Rows:
        """Copy the tensors ``[n, d]`` of the workers at this place, zero for a worker's first gradient."""
        found = [state.workers.get(worker, {}) for worker in place.workers]
        for kept in found:
            for tensor in kept.values():
                if tensor.shape != rows.shape[1:]:
                    raise ValueError(
                        f"{self.spec} keeps {len(tensor)} entries of each worker; got gradients of {rows.shape[1]}. "
                        "Use an operator of its own for each run, or reset() it."
                    )
        if not any(found):
            return {name: torch.zeros_like(rows) for name in self.names}
        zero = torch.zeros_like(rows[0])
        return {name: torch.stack([kept.get(name, zero).to(rows) for kept in found]) for name in self.names}

    def _next(self, state: State, kept: Rows, place: Coordinates) -> dict[int, Kept]:
        """The next state of all workers, given the new tensors ``[n, d]`` of those at this place."""
        for tensor in kept.values():  # if these are finite, so is what the server receives
            self._in_range(tensor)
        moved = {worker: {name: kept[name][row] for name in kept} for row, worker in enumerate(place.workers)}
        return {**state.workers, **moved}

    def current_state(self) -> State:
        """See `BiasOperator.current_state`."""
        return replace(super().current_state(), workers=self._workers)

    def store(self, state: State) -> None:
        """See `BiasOperator.store`. A worker's tensors keep their memory: new ones would fragment it."""
        super().store(state)
        self._workers = {
            worker: {name: _stored(self._workers.get(worker, {}).get(name), tensor) for name, tensor in kept.items()}
            for worker, kept in state.workers.items()
        }

    def _apply(self, rows: Tensor, at: Coordinates) -> Tensor:
        raise NotImplementedError(f"{self.spec} keeps a state: use transition, or call it.")

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return self.operator._generators

    @property
    def compresses(self) -> bool:  # type: ignore[override]
        """Whether the operator does."""
        return self.operator.compresses

    @property
    def varies(self) -> bool:
        """Whether the operator's messages do."""
        return self.operator.varies

    @property
    def separable(self) -> bool:
        """Whether the operator is. Each worker has its own state."""
        return self.operator.separable

    @property
    def draw_step(self) -> int:
        return self.operator.draw_step

    def advance(self) -> None:
        self.operator.advance()

    def wire_bytes(self, d: int, element_size: int = 4, sizes: Sizes | None = None) -> int:
        """The operator's. The state never leaves the worker."""
        return self.operator.wire_bytes(d, element_size, sizes)

    def encode(self, gradient: Tensor, *, step: int = 0, worker: int = 0, sizes: Sizes | None = None) -> Tensor:
        """Not supported: a message depends on the state, which a call updates."""
        raise ValueError(f"{self.spec} has a state: encode what its operator {self.operator.spec} is given.")

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self._workers = {}
        self.operator.reset()

    def state_dict(self) -> dict[str, Any]:
        """Each worker's tensors and the operator's own state. Not copied; the next call updates the tensors."""
        return {"workers": dict(self._workers), "operator": self.operator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BiasOperator`.

        Raises:
            ValueError: for anything but a state of such an operator.
        """
        if not {"workers", "operator"} <= set(state):
            raise ValueError(
                f"{self.spec} goes on from what its state_dict() gave: 'workers', the {', '.join(self.names)} of each, "
                f"and 'operator', the state of {self.operator.spec}; got {', '.join(map(repr, state)) or 'nothing'}."
            )
        if not isinstance(state["workers"], dict) or not isinstance(state["operator"], dict):
            raise ValueError(f"{self.spec} keeps a dict of workers and one of its operator; got {state!r:.80}.")
        for worker, kept in state["workers"].items():
            if not isinstance(kept, dict) or set(kept) != set(self.names):
                got = ", ".join(map(str, kept)) if isinstance(kept, dict) else type(kept).__name__
                raise ValueError(f"{self.spec} keeps {', '.join(self.names)} of each worker; got {got}.")
            if type(worker) is not int or worker < 0:
                raise ValueError(f"{self.spec} numbers the workers by whole numbers >= 0; got {worker!r:.80}.")
            for name, tensor in kept.items():
                if not isinstance(tensor, Tensor) or tensor.dim() != 1 or not tensor.is_floating_point():
                    raise ValueError(f"{self.spec} keeps {name} [d] of worker {worker}; got {tensor!r:.80}.")
        self.operator.load_state_dict(state["operator"])
        self._workers = {
            worker: {name: tensor.clone() for name, tensor in kept.items()} for worker, kept in state["workers"].items()
        }

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """See `BiasOperator.shard`."""
        self._workers = {worker: kept for worker, kept in self._workers.items() if worker in set(workers)}

    @staticmethod
    def gather(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `BiasOperator.gather`: the workers of all processes, in order."""
        workers = {worker: kept for state in states for worker, kept in state["workers"].items()}
        return {**states[0], "workers": dict(sorted(workers.items()))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.operator!r})"


def _stored(before: Tensor | None, tensor: Tensor) -> Tensor:
    """Copy a tensor, into the memory of the one before it if it fits."""
    if before is tensor:
        return tensor
    fits = before is not None and (before.shape, before.device, before.dtype) == (
        tensor.shape,
        tensor.device,
        tensor.dtype,
    )
    return before.copy_(tensor) if before is not None and fits else tensor.clone()


@spelled_around(
    "ef14",
    "error feedback around A: its losses are sent later",
    Row("`ef14:A`", "`EF14(A)`", "lowers the floor of a contractive A to one that goes with γ", "A's"),
)
class EF14(ErrorFeedback):
    """Classic error feedback: send ``C(g_i + e_i)`` and keep ``e_i <- g_i + e_i - C(g_i + e_i)``.

    The error is in units of the gradient; the literature uses those of ``gamma g``. Both are the same for a constant
    step size and an operator with ``C(a g) = a C(g)`` for a > 0.

    Reference:
        docs/theory.md; Seide et al., 2014; Karimireddy et al., 2019.
    """

    names = ("error",)

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return rows + kept["error"], {}

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return sent, {"error": wanted - sent}

    @property
    def spec(self) -> str:
        """``ef14:SPEC``."""
        return f"ef14:{self.operator.spec}"


@spelled_around(
    "ef21",
    "error feedback: A on the change from what was sent before",
    Row("`ef21:A`", "`EF21(A)`", "removes the floor of a contractive A", "A's"),
)
class EF21(ErrorFeedback):
    """Send the change ``c_i = C(g_i - h_i)``; worker and server keep the estimate ``h_i <- h_i + c_i`` of g_i.

    Compression leaves no floor, however much the workers differ.

    Reference:
        docs/theory.md; Richtárik, Sokolov, Fatkhullin, "EF21", 2021.
    """

    names: tuple[str, ...] = ("estimate",)

    def __init__(self, operator: BiasOperator | str) -> None:
        super().__init__(operator)
        self._received: Tensor | None = None  # the server's estimates (sum or each), if messages are sent

    def transition(
        self, rows: Tensor, state: State, place: Coordinates, sizes: Sizes | None = None
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition`."""
        out, state = super().transition(rows, state, place, sizes)
        return out, replace(state, server=None)  # without messages, the estimates are the workers' own

    def transition_receive(
        self,
        messages: Sequence[Tensor],
        state: State,
        d: int,
        dtype: torch.dtype,
        sizes: Sizes | None = None,
        *,
        each: bool = False,
    ) -> tuple[Tensor, State]:
        """See `BiasOperator.transition_receive`: the estimates, updated by the messages."""
        change, state = super().transition_receive(messages, state, d, dtype, sizes, each=each)
        # the checkpoint's estimates may have another device or dtype than the current gradients
        before = torch.zeros_like(change) if state.server is None else state.server.to(change)
        estimates = before + change
        return estimates, replace(state, server=estimates)

    def current_state(self) -> State:
        """See `BiasOperator.current_state`."""
        return replace(super().current_state(), server=self._received)

    def store(self, state: State) -> None:
        """See `BiasOperator.store`."""
        super().store(state)
        self._received = None if state.server is None else _stored(self._received, state.server)

    def reset(self) -> None:
        """Discard the state."""
        super().reset()
        self._received = None

    def shard(self, workers: Sequence[int], *, each: bool = False) -> None:
        """See `BiasOperator.shard`."""
        if self._received is None and self._workers:
            estimates = self.state["estimate"]
            self._received = estimates if each else estimates.sum(0)
        super().shard(workers, each=each)

    def state_dict(self) -> dict[str, Any]:
        """See `ErrorFeedback.state_dict`. If messages are sent, it includes the server's estimates."""
        return {**super().state_dict(), **({} if self._received is None else {"received": self._received})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ErrorFeedback.load_state_dict`."""
        received = state.get("received")
        if received is not None and not isinstance(received, Tensor):
            raise ValueError(f"{self.spec} keeps a tensor as 'received'; got {received!r:.80}.")
        super().load_state_dict(state)
        self._received = None if received is None else received.clone()

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        return rows - kept["estimate"], kept

    def _after(self, wanted: Tensor, sent: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        estimate = kept["estimate"].add_(sent)
        return estimate, {**kept, "estimate": estimate}

    @property
    def spec(self) -> str:
        """``ef21:SPEC``."""
        return f"ef21:{self.operator.spec}"


@spelled_around(
    "ef21-sgdm",
    "EF21 of the workers' own momentum, with beta = 1 at the server",
    Row(
        "`ef21-sgdm(0.1):A`",
        "`EF21SGDM(A, eta=0.1)`",
        "with momentum on the workers; a server with β < 1 is an error",
        "A's",
    ),
    argument="ETA",
)
class EF21SGDM(EF21):
    """EF21 on each worker's own momentum: ``v_i <- (1 - eta) v_i + eta g_i``, ``c_i = C(v_i - h_i)``.

    Momentum before compression reduces gradient noise, which momentum after compression cannot. The server then has no
    momentum, ``beta = 1`` (`train` requires it).

    Args:
        operator: C, or its SPEC.
        eta: weight of the new gradient in the workers' momentum, 0 < eta <= 1; 1 is EF21.

    Raises:
        ValueError: for eta out of range.

    Reference:
        docs/theory.md; Fatkhullin, Tyurin, Richtárik, "Momentum provably improves error feedback!", 2023.
    """

    names = ("estimate", "momentum")
    carries_momentum = True

    def __init__(self, operator: BiasOperator | str, eta: float = 0.1) -> None:
        super().__init__(operator)
        check_number("EF21SGDM's eta", eta)
        if not 0 < eta <= 1:
            raise ValueError(f"EF21SGDM needs the weight of the new gradient, 0 < eta <= 1; got {eta}.")
        self.eta = float(eta)

    def _before(self, rows: Tensor, kept: Rows) -> tuple[Tensor, Rows]:
        momentum = momentum_update_(kept["momentum"], rows, self.eta)
        return super()._before(momentum, {**kept, "momentum": momentum})

    def __repr__(self) -> str:
        return f"EF21SGDM({self.operator!r}, eta={self.eta!r})"

    @property
    def spec(self) -> str:
        """``ef21-sgdm(ETA):SPEC``."""
        return f"ef21-sgdm({repr(self.eta).removesuffix('.0')}):{self.operator.spec}"


@spelled(
    "clip21",
    "error feedback around clipping",
    Row("`clip21:1`", "`Clip21(1.0)`", "removes the floor of clipping", "4d"),
    argument="TAU",
    number=float,
)
class Clip21(EF21):
    """EF21 with clipping: ``h_i <- h_i + clip_tau(g_i - h_i)``. After finitely many steps nothing is clipped.

    Args:
        max_norm: tau > 0.

    Reference:
        docs/theory.md; Khirirat et al., "Clip21", 2023.
    """

    def __init__(self, max_norm: float) -> None:
        super().__init__(Clip(max_norm))
        self.max_norm = float(max_norm)

    def __repr__(self) -> str:
        return f"Clip21({self.max_norm!r})"

    @property
    def spec(self) -> str:
        """``clip21:TAU``."""
        return f"clip21:{self.operator.spec.partition(':')[2]}"
