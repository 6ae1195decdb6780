"""Bias operators on the gradients of a model in PyTorch's ``DistributedDataParallel``: each process is a worker.

    model = torch.nn.parallel.DistributedDataParallel(net)
    reduction = metamom.interop.ddp.register(model, "ef21:topk:1%")

The training loop stays as it is: after ``loss.backward()`` each parameter has the aggregate of the workers' gradients
in ``.grad``, where DDP would have left their mean.
"""

# torch compares the hook's annotations with the types themselves, so this file does not postpone them.
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from metamom.bias import Bias, BiasOperator, Identity, Layout, as_operator
from metamom.bias.checks import all_finite
from metamom.bias.coordinates import NonFiniteError
from metamom.bias.state import State
from metamom.common.averaged import forget, note
from metamom.common.checks import check_word
from metamom.common.kinds import named_type
from metamom.common.trees import mapped
from metamom.distributed import World
from metamom.interop.ddp_state import Groups, divided, joined
from metamom.server.aggregate import Aggregation
from metamom.server.robust import Aggregate, check_aggregate

__all__ = ["BiasedReduction", "register"]

Scope = Literal["model", "bucket"]


class _Bucket(NamedTuple):
    """A bucket of gradients that DDP has filled, until the last one arrives."""

    buffer: Tensor
    gradients: dict[int, Tensor]  # views of the buffer, by the number of the parameter
    done: torch.futures.Future[Tensor]


def register(
    ddp_model: DistributedDataParallel,
    bias: Bias = None,
    scope: Scope = "model",
    *,
    aggregate: Aggregate = "mean",
    dtype: torch.dtype | None = None,
    scaler: GradScaler | None = None,
) -> "BiasedReduction":
    """Replace DDP's mean of gradients by ``1/n sum_i C(g_i)`` over its n processes, each of which is a worker.

    Compressing operators send their messages (an all-gather), other operators whole gradients: an all-reduce for a
    mean, an all-gather for a robust aggregate. Nothing is sent until the last bucket of a backward pass has arrived.
    Then all processes agree that their gradients can be used, so that an error on one is raised on all.

    Within ``ddp_model.no_sync()`` gradients accumulate, and the operator acts on their sum. Parameters that a pass does
    not use have zero gradients. If DDP leaves ``.grad`` of a parameter alone because no process used it, error feedback
    goes on as if it were delivered. Call it once, before the first backward pass.

    Args:
        ddp_model: the model.
        bias: the operator C, its SPEC (``"ef21:topk:1%"``), or a function ``[d] -> [d]``; ``None`` for none. An
            operator is copied, with its state.
        scope: what C acts on: the gradient of the whole ``"model"``, flattened in the order of its parameters, or that
            of each ``"bucket"`` of DDP (``bucket_cap_mb``) by itself. Random operators draw alike in each bucket.
        aggregate: ``"mean"`` or a robust mean, see `metamom.server.robust.robust_mean`.
        dtype: in which gradients are sent and C and its state compute. By default float32, or float64 for gradients in
            float64. With ``torch.float16`` and no operator this is torch's ``fp16_compress_hook``.
        scaler: the `torch.amp.GradScaler` of the loop, if there is one. C then acts on gradients divided by its scale,
            which changes from step to step. If a process's gradient is not finite, all get NaN, so that all skip the
            step; C keeps its state.

    Returns:
        What runs in the backward pass: it has the state to save and the bytes sent.

    Raises:
        TypeError: for a model that is not in DDP, sparse gradients, anything but a `GradScaler`, or another bias or
            dtype.
        ValueError: for another scope or aggregate; for an operator that draws from a ``generator=``; if a hook is
            registered already; for parameters on several devices.

    Example:
        >>> reduction = register(ddp_model, "ef21:topk:1%")  # doctest: +SKIP
        >>> torch.save({"model": ..., "bias": reduction.state_dict()}, path)  # doctest: +SKIP

    Reference:
        arXiv 2403.00853: operators act on each worker's whole gradient, before the server averages.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            "register takes a model in torch.nn.parallel.DistributedDataParallel, which sends gradients; got "
            f"{named_type(ddp_model)}. Wrap it first, or use BiasedAccumulator(..., world=world) without DDP."
        )
    if ddp_model._comm_hooks:
        raise ValueError(
            "this DDP model has a communication hook already, and DDP takes one: make the DDP model again, and "
            "register only this one (dtype=torch.float16 sends 16 bits; mixed_precision= has a hook of its own)."
        )
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler is the torch.amp.GradScaler of the training loop; got {named_type(scaler)}.")
    reduction = BiasedReduction(_parameters(ddp_model), bias, scope, aggregate, dtype, scaler, ddp_model.process_group)
    ddp_model.register_comm_hook(reduction, _hook)
    return reduction


class BiasedReduction:
    """What `register` has put into a DDP model.

    Attributes:
        report: of the last step: ``grad_norm``, ``bias_error`` (not measured) and ``wire_bytes``, as
            `metamom.maml.Backward` explains them.
        world: the processes; ``world.sent`` counts the bytes that they have sent each other.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        bias: Bias,
        scope: Scope,
        aggregate: Aggregate,
        dtype: torch.dtype | None,
        scaler: GradScaler | None,
        group: dist.ProcessGroup,
    ) -> None:
        check_word("scope", scope, ("model", "bucket"))
        check_aggregate(aggregate, group.size())
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is a floating-point dtype, such as torch.bfloat16; got {dtype!r}.")
        operator = copy.deepcopy(as_operator(bias) or Identity())
        if not operator.separable:
            raise ValueError(
                f"{operator.spec} draws from a generator in the order of calls, which processes do not share: make it "
                "with seed= in place of generator=."
            )
        self.report: dict[str, float | int | None] = {}
        self.world = World(group.rank(), group.size(), group=group)
        self._parameters = parameters
        self._numbers = {p: number for number, p in enumerate(parameters.values())}
        self._sizes = Layout(p.shape for p in parameters.values())
        if scope == "model":
            operator.wire_bytes(sum(self._sizes), sizes=self._sizes)  # checks K
        operator.shard([self.world.rank], each=aggregate != "mean")
        self._scope, self._aggregate, self._dtype, self._scaler = scope, aggregate, dtype, scaler
        self._whole: Groups = (tuple(range(len(parameters))),)
        self._groups: Groups = self._whole
        self._operators = [operator]  # of each group
        self._waiting: list[_Bucket] = []

    @property
    def operator(self) -> BiasOperator:
        """The operator, with the state of this process's worker over all parameters."""
        return joined(self._operators, self._groups, self._sizes)

    def state_dict(self, *, gather: bool = True) -> dict[str, Any]:
        """The state of all workers, on the CPU. All processes must call this together; one may save it.

        Args:
            gather: whether to gather it from all processes. Without, it is this process's own part, for a file of its
                own, and nothing is sent.

        Returns:
            What `torch.load` reads with ``weights_only=True``. It depends neither on the scope nor on the buckets.

        Raises:
            ProcessError: if not all processes call it.
        """
        operator = self.operator
        own: dict[str, Any] = mapped(lambda tensor: tensor.to("cpu", copy=True), operator.state_dict())
        if gather:
            self.world.doing = f"the state of {operator.spec}"
            self.world.agree()
            own = operator.gather(self.world.gather_objects(own))
        return {
            "workers": self.world.size,
            "aggregate": self._aggregate,
            "parameters": {name: list(p.shape) for name, p in self._parameters.items()},
            "operator": own,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Continue from a `state_dict`, of whichever scope.

        Each process is a worker. With error feedback, a state of another number of processes is therefore an error,
        unless ``strict=False``: then workers that there still are keep theirs, those beyond the number of processes are
        dropped, new ones start at zero, and the server's estimates are added up again. Operators without error feedback
        take it in any case.

        Args:
            state: gathered, or this process's own part.
            strict: see above.

        Raises:
            ValueError: for parameters or an operator that differ; for another number of processes; for the part of
                another process. The state does not change then.
        """
        missing = {"workers", "aggregate", "parameters", "operator"} - set(state)
        if missing:
            raise ValueError(f"this is not a state of BiasedReduction: it has no {', '.join(sorted(missing))}.")
        own = {name: list(p.shape) for name, p in self._parameters.items()}
        if list(state["parameters"].items()) != list(own.items()):
            differing = next((name for name in own if state["parameters"].get(name) != own[name]), "their order")
            raise ValueError(f"the state is of a model with other parameters: {differing} differs.")
        operator = self.operator  # a copy
        operator.load_state_dict(state["operator"])
        if operator.feeds_back:
            self._fit(operator, state, strict)
        self._operators, self._groups = [operator], self._whole

    def reset(self) -> None:
        """Discard the state: error feedback starts at zero, and draws start again."""
        for operator in self._operators:
            operator.reset()

    def _fit(self, operator: BiasOperator, state: Mapping[str, Any], strict: bool) -> None:
        """Keep this process's part of a loaded state of error feedback."""
        n, rank, loaded = self.world.size, self.world.rank, operator.current_state()
        each = self._aggregate != "mean"
        same = state["workers"] == n
        if not same and strict:
            raise ValueError(
                f"the state has error feedback of {state['workers']} workers, and each of these {n} processes is a "
                "worker. Start as many processes; or load it with strict=False, so that workers that there still are "
                "keep theirs and new ones start at zero; or do not load it, so that all start at zero."
            )
        if loaded.workers and rank not in loaded.workers and same:
            raise ValueError(
                f"the state is of worker {', '.join(map(str, loaded.workers))}, and this process is worker {rank}: "
                "save state_dict() of all, or with gather=False a file for each process."
            )
        if loaded.workers and not (same and each == (state["aggregate"] != "mean")):
            if len(loaded.workers) != state["workers"]:
                raise ValueError("the state is of one process: another number of processes needs state_dict() of all.")
            kept = next(iter(loaded.workers.values()))
            zero = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
            operator.store(State(workers={worker: loaded.workers.get(worker, zero) for worker in range(n)}))
        operator.shard([rank], each=each)

    def _arrive(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Take a bucket, and once all are there, aggregate them."""
        if bucket.index() == 0:
            self._waiting = []  # those of a backward pass that failed
        buffer = bucket.buffer()
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        numbers = [self._numbers[p] for p in bucket.parameters()]
        self._waiting.append(_Bucket(buffer, dict(zip(numbers, bucket.gradients(), strict=True)), done))
        if bucket.is_last():
            buckets, self._waiting = self._waiting, []
            self._reduce(buckets)
            for each in buckets:
                each.done.set_result(each.buffer)
        return done

    @torch.no_grad()
    def _reduce(self, buckets: Sequence[_Bucket]) -> None:
        """Replace the gradients in all buckets by their aggregate."""
        gradients = {number: gradient for bucket in buckets for number, gradient in bucket.gradients.items()}
        by_bucket = tuple(tuple(sorted(bucket.gradients)) for bucket in buckets)
        self._regroup(self._whole if self._scope == "model" else by_bucket)
        spec, world = self._operators[0].spec, self.world
        world.doing = f"a step of bias={spec}, aggregate={self._aggregate}, {self._scope}s, {len(gradients)} gradients"
        scale = self._scaler.get_scale() if self._scaler is not None and self._scaler.is_enabled() else None
        steps: list[Aggregation] = []
        with world.together():
            rows = [self._row([gradients[number] for number in group], scale) for group in self._groups]
            finite = all(map(all_finite, rows))
            world.status = int(not finite)
            if finite:
                steps = [self._step(*each) for each in zip(self._operators, self._groups, rows, strict=True)]
            elif scale is None:
                raise self._not_finite(gradients)
        if any(world.statuses):  # the scaler of every process finds these, and skips the step
            for gradient in gradients.values():
                gradient.fill_(math.nan)
            return
        found = [step.finish() for step in steps]
        for group, (total, _) in zip(self._groups, found, strict=True):
            if scale is not None:
                total = total.to(torch.promote_types(total.dtype, torch.float32)) * scale
            pieces = total.split_with_sizes([self._sizes[number] for number in group])
            for number, piece in zip(group, pieces, strict=True):
                gradients[number].copy_(piece.view_as(gradients[number]))
        self._note(found)

    def _not_finite(self, gradients: Mapping[int, Tensor]) -> NonFiniteError:
        """The error about this process's gradient."""
        bad = next(name for number, name in enumerate(self._parameters) if not all_finite(gradients[number]))
        return NonFiniteError(
            f"the gradient of {bad} on process {self.world.rank} has infinite or NaN entries: a smaller step size, or "
            "the loss, must keep them finite; no operator can. If a GradScaler is to skip such steps, pass it as "
            "scaler= to register."
        )

    def _row(self, gradients: Sequence[Tensor], scale: float | None) -> Tensor:
        """The worker's gradient ``[1, d]``."""
        row = torch.cat([gradient.reshape(-1) for gradient in gradients]).unsqueeze(0)
        wide = torch.promote_types(row.dtype, torch.float32)
        return row.to(wide) / scale if scale is not None else row.to(wide)

    def _step(self, operator: BiasOperator, group: Sequence[int], row: Tensor) -> Aggregation:
        """The server's step for one group, which has this worker's gradient."""
        sizes = Layout(self._sizes.shapes[number] for number in group)
        step = Aggregation(self.world.size, operator, self._aggregate, sizes=sizes, world=self.world, measure=False)
        step.add(row.to(self._dtype or row.dtype), [self.world.rank])
        return step

    def _regroup(self, groups: Groups) -> None:
        """Divide the operator's state among other groups: DDP makes new buckets after its first step."""
        if groups != self._groups:
            self._operators = divided(self.operator, groups, self._sizes)
            self._groups = groups

    def _note(self, found: Sequence[tuple[Tensor, Mapping[str, float | int | None]]]) -> None:
        """Report a step, and tell optimizers whether its gradient is an average over steps."""
        reports = [report for _, report in found]
        self.report = {
            "grad_norm": math.hypot(*(report["grad_norm"] or 0.0 for report in reports)),
            "bias_error": None,
            "wire_bytes": sum(int(report["wire_bytes"] or 0) for report in reports),
        }
        forget(self._parameters.values())
        if self._operators[0].carries_momentum:
            for p in self._parameters.values():
                note(p, self._operators[0].spec)


def _hook(state: BiasedReduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """What DDP calls with each bucket."""
    return state._arrive(bucket)


def _parameters(ddp_model: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """The parameters of which DDP sends gradients, by name."""
    ignored = ddp_model.parameters_to_ignore
    found = {n: p for n, p in ddp_model.module.named_parameters() if p.requires_grad and n not in ignored}
    devices = sorted({str(p.device) for p in found.values()})
    if len(devices) > 1:
        raise ValueError(f"the gradient of a worker is on one device; got parameters on {', '.join(devices)}.")
    for name, module in ddp_model.module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise TypeError(f"operators act on dense gradients; make {name or 'the embedding'} with sparse=False.")
    return found
