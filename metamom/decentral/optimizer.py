"""Decentralised momentum as an optimizer over the workers' copies of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metamom.bias import Bias, Layout, as_operator
from metamom.common.checks import check_flag, check_number
from metamom.common.sharded import is_sharded
from metamom.decentral.graph import check_mixing
from metamom.decentral.links import Links
from metamom.decentral.step import DecentralizedState, outgoing
from metamom.distributed import SAME, World, as_world, digest
from metamom.optim.checks import as_parameters, check_beta
from metamom.server.pending import PendingStep


class DecentralizedMomentum(Optimizer):
    """Momentum tracking without a server: each worker has its own weights, and exchanges with its neighbours only.

    ``m_i <- (1 - beta) m_i + beta C(g_i)``, ``y_i <- sum_j W_ij y_j + m_i - m_i^-``,
    ``x_i <- sum_j W_ij (x_j - lr y_j)``, from ``m = y = 0`` (`decentralized_step`). On a complete graph and from equal
    weights it is `CompositeMomentum` on the mean of the workers' gradients, up to rounding.

    Each step sends one message of ``x - lr y`` and y along every edge. Over processes (``world=``) each carries a block
    of the workers, sends to the processes of their neighbours and no others, and computes the same bits as one process.
    No agreement precedes a step: if a process fails, its neighbours raise `ProcessError` when the time-out ends.

    Args:
        workers: the parameters of each worker of this process (``world.workers(n)``), a list for each. All have equal
            shapes. Each worker is a parameter group, so schedulers of torch work, and lr and beta may differ.
        mixing: W, ``[n, n]``: `ring`, `torus`, `complete`, `metropolis` of a graph, or any that `check_mixing`
            accepts.
        lr: the step size, >= 0.
        beta: weight of the new gradient, 0 < beta <= 1.
        bias: the operator C on each worker's flattened gradient, its SPEC (``"topk:5%"``) or a function ``[d] -> [d]``.
            It changes gradients, not messages: these are sent whole.
        tracking: False for ``x_i <- sum_j W_ij (x_j - lr m_j)``, which sends half as much, and ends off the optimum if
            workers differ.
        world: the processes (`metamom.distributed.start`); one by default.

    Raises:
        ValueError: for options out of range, a matrix as `check_mixing`, another number of workers, or workers of
            other shapes; if processes differ in the matrix or options. At `step`, for a worker without a gradient, for
            a gradient that is not finite under an operator, or for beta < 1 with an operator that carries the momentum.
        TypeError: for anything but parameters; at `step`, for a sparse gradient.
        ProcessError: at `step`, if a process of a neighbour has died or does not arrive.

    Attributes:
        edge_bytes: bytes that one worker sends to one neighbour in a step.
        wire_bytes: bytes of a step along all edges, counted in both directions; the same for any number of processes.
            What crosses between processes is in ``world.sent``.

    Example:
        >>> from metamom.decentral import DecentralizedMomentum, ring
        >>> models = [torch.nn.Linear(1, 1, bias=False) for _ in range(4)]
        >>> optimizer = DecentralizedMomentum([m.parameters() for m in models], ring(4), lr=0.3, beta=0.5)
        >>> for step in range(200):
        ...     optimizer.zero_grad()
        ...     for target, model in enumerate(models):  # each worker pulls elsewhere: the mean of the targets is 1.5
        ...         (model.weight - target).square().sum().backward()
        ...     optimizer.step()
        >>> [round(m.weight.item(), 4) for m in models], optimizer.wire_bytes
        ([1.5, 1.5, 1.5, 1.5], 64)

    Reference:
        As of `decentralized_step`.
    """

    def __init__(
        self,
        workers: Iterable[Iterable[Tensor]],
        mixing: Tensor,
        lr: float,
        beta: float = 0.1,
        *,
        bias: Bias = None,
        tracking: bool = True,
        world: World | None = None,
    ) -> None:
        self._world = as_world(world)
        self._links: Links | None = None
        with self._world.together():  # or a process that fails would keep the others waiting
            self._links = self._start(workers, mixing, lr, beta, bias, tracking)
        spec = "none" if self.bias is None else self.bias.spec
        about = f"{digest([mixing.double()])}, bias={spec}, tracking={tracking}, {sum(self._sizes)} entries"
        self._world.check_same("the mixing matrix and options of DecentralizedMomentum", about, SAME)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported after the start: the groups are the workers of the mixing matrix.

        Raises:
            ValueError: always, for a user.
        """
        if self._links is not None:
            raise ValueError("the groups of DecentralizedMomentum are its workers; make another one for more of them.")
        super().add_param_group(param_group)

    @property
    def edge_bytes(self) -> int:
        """Bytes that one worker sends to one neighbour in a step."""
        first: Tensor = self.param_groups[0]["params"][0]
        return (2 if self.tracking else 1) * sum(self._sizes) * first.element_size()

    @property
    def wire_bytes(self) -> int:
        """Bytes of a step along all edges, both directions."""
        assert self._links is not None
        return self._links.edges * self.edge_bytes

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Exchange with the neighbours and move all workers of this process. All processes call this together.

        Nothing changes if it raises an error.

        Args:
            closure: computes the gradients, and returns the loss.

        Returns:
            The closure's loss, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self._links is not None
        for group in self.param_groups:
            _check_options(group)  # they may have been scheduled or changed by hand
        grads = torch.stack([_gradient(group) for group in self.param_groups])
        pending = self._pending()
        if pending is not None:
            grads = self._biased(pending, grads)
        x, state = self._rows(None), DecentralizedState(self._rows("momentum"), self._rows("tracker"))
        lr, beta = (grads.new_tensor([[float(g[name])] for g in self.param_groups]) for name in ("lr", "beta"))
        plain = all(group["beta"] == 1 for group in self.param_groups)  # 0 * m would keep past infinities
        messages, momentum = outgoing(x, grads, state, lr=lr, beta=1.0 if plain else beta, tracking=self.tracking)
        mixed = self._links.mix(messages)
        self._keep("momentum", momentum)
        if self.tracking:
            self._keep("tracker", mixed[:, 1])
        self._keep(None, mixed[:, 0])
        if pending is not None:
            pending.commit()
        return loss

    def mean_weights(self) -> list[Tensor]:
        """The mean of all workers' weights, a tensor for each parameter. All processes call this together.

        This gathers all weights, which no step does: use it to evaluate or save.
        """
        mean = self._everyone().mean(0)
        first = self.param_groups[0]["params"]
        return [piece.view_as(p) for piece, p in zip(mean.split_with_sizes(self._sizes), first, strict=True)]

    def disagreement(self) -> float:
        """``1/n sum_i ||x_i - mean||^2``. All processes call this together; it gathers all weights."""
        x = self._everyone()
        return float((x - x.mean(0)).square().sum(1).mean())

    def state_dict(self) -> dict[str, Any]:
        """This process's workers: momenta, trackers, and the operator's state as ``"bias"``."""
        return {**super().state_dict(), "bias": None if self.bias is None else self.bias.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same workers.

        Raises:
            ValueError: for other workers, or the state of another optimizer.
        """
        wanted, got = [self.mine, [g.get("worker") for g in state_dict.get("param_groups", [])]]
        if list(wanted) != got or "bias" not in state_dict:
            raise ValueError(
                f"this process has workers {[*wanted]} of DecentralizedMomentum; got the state of {got}. Load each "
                "process's own state, with the same number of processes."
            )
        if self.bias is not None:
            self.bias.load_state_dict(state_dict["bias"] or {})
        super().load_state_dict(state_dict)

    @property
    def mine(self) -> range:
        """This process's workers."""
        assert self._links is not None
        return self._links.mine

    def _start(self, workers: Any, mixing: Tensor, lr: float, beta: float, bias: Bias, tracking: bool) -> Links:
        """Check the arguments and make the groups."""
        links = Links(check_mixing(mixing), self._world)
        self.tracking = check_flag("tracking", tracking)
        self.bias = as_operator(bias)
        if self._world.size > 1 and self.bias is not None and not self.bias.separable:
            raise ValueError(
                f"{self.bias.spec} draws from a generator in the order of calls, which several processes do not share: "
                "make it with seed= in place of generator=."
            )
        lists = _lists(workers)
        _check_workers(lists, links.mine, len(mixing))
        super().__init__(
            [{"params": params, "worker": worker} for worker, params in zip(links.mine, lists, strict=True)],
            {"lr": lr, "beta": beta},
        )
        self._sizes = Layout(p.shape for p in lists[0])
        for group in self.param_groups:
            _check_options(group)
        return links

    def _pending(self) -> PendingStep | None:
        if self.bias is None:
            return None
        if self.bias.carries_momentum and any(group["beta"] != 1 for group in self.param_groups):
            raise ValueError(
                f"{self.bias.spec} carries the momentum on the workers already: use DecentralizedMomentum(beta=1), and "
                "no schedule of beta."
            )
        return PendingStep(self.bias, self._sizes)

    def _biased(self, pending: PendingStep, grads: Tensor) -> Tensor:
        """C of each worker's gradient, one at a time: sums over many rows at once may round otherwise."""
        each = zip(grads.unsqueeze(1), self.mine, strict=True)
        return torch.cat([pending.apply(row, [worker]).clone() for row, worker in each])

    def _everyone(self) -> Tensor:
        """All workers' weights ``[n, d]``."""
        return self._world.gather(self._rows(None)).flatten(0, 1)

    def _rows(self, name: str | None) -> Tensor:
        """The weights of this process's workers, or a tensor of their state, ``[own, d]``."""
        rows = []
        for group in self.param_groups:
            params = group["params"]
            if name is not None:
                params = [self.state[p].get(name, torch.zeros_like(p)) for p in params]
            rows.append(torch.cat([p.detach().reshape(-1) for p in params]))
        return torch.stack(rows)

    def _keep(self, name: str | None, rows: Tensor) -> None:
        """Write rows into the weights, or into the state."""
        for group, row in zip(self.param_groups, rows, strict=True):
            for p, piece in zip(group["params"], row.split_with_sizes(self._sizes), strict=True):
                if name is None:
                    p.copy_(piece.view_as(p))
                else:
                    self.state[p][name] = piece.view_as(p).clone()


def _lists(workers: Any) -> list[list[Any]]:
    """Each worker's parameters."""
    if isinstance(workers, (torch.nn.Module, Tensor, str)) or not isinstance(workers, Iterable):
        raise TypeError(
            "wanted a list of parameters for each worker, such as [m.parameters() for m in models]; got "
            f"{workers!r:.80}."
        )
    return [as_parameters(each) for each in workers]


def _check_workers(lists: Sequence[Sequence[Any]], mine: range, n: int) -> None:
    if len(lists) != len(mine):
        raise ValueError(
            f"this process has {len(mine)} of the {n} workers of the mixing matrix, and needs a list of parameters for "
            f"each; got {len(lists)}."
        )
    for worker, params in zip(mine, lists, strict=True):
        if not all(isinstance(p, Tensor) for p in params):
            raise TypeError(f"worker {worker} needs parameters, such as model.parameters(), without names or groups.")
        kinds = {(p.dtype, p.device) for p in params}
        if len(kinds) > 1 or any(is_sharded(p) or not p.is_floating_point() for p in params):
            raise ValueError(
                f"worker {worker}'s parameters must be plain floating-point tensors of one dtype on one device."
            )
        shapes, wanted = ([tuple(p.shape) for p in each] for each in (params, lists[0]))
        if shapes != wanted or params[0].dtype is not lists[0][0].dtype:
            raise ValueError(
                f"all workers have the same parameters: worker {mine[0]} has shapes {wanted}, {lists[0][0].dtype}; "
                f"worker {worker} has {shapes}, {params[0].dtype}. Make each worker's model a copy.deepcopy of one."
            )


def _check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr is the step size and must be >= 0 and finite; got {lr}.")
    check_number("beta", group["beta"])
    check_beta(group["beta"])


def _gradient(group: dict[str, Any]) -> Tensor:
    """A worker's flattened gradient; zero for the parameters that have none."""
    grads = [p.grad for p in group["params"]]
    if all(grad is None for grad in grads):
        raise ValueError(
            f"worker {group['worker']} has no gradient: every worker needs a backward pass of its own before step()."
        )
    if any(grad is not None and grad.layout is not torch.strided for grad in grads):
        raise TypeError("DecentralizedMomentum needs dense gradients; got a sparse one: use sparse=False.")
    pairs = zip(group["params"], grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if grad is None else grad).reshape(-1) for p, grad in pairs])
