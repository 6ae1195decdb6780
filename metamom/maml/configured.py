"""The model, the loss and the options of a learner, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metamom.bias import BiasOperator
from metamom.common.checks import check_flag
from metamom.common.choices import Norm
from metamom.common.modules import identity_of, modules_of
from metamom.compile.graph import CompileMode
from metamom.maml.annealing import Annealing, check_annealing
from metamom.maml.checks.hooks import check_hooks
from metamom.maml.checks.loss_readings import LossFn as LossFn
from metamom.maml.checks.loss_readings import LossReadings
from metamom.maml.checks.model_checks import check_kind, structure
from metamom.maml.checks.unused import Uses
from metamom.maml.chunking import ChunkSize
from metamom.maml.estimators import ESTIMATORS, Estimator, InnerBatches, check_estimator, support_parts
from metamom.maml.fast_paths.fingerprint import fingerprint_of_learner
from metamom.maml.gradient import MetaGradients
from metamom.maml.implicit.proximal import Proximal, ProximalLike, as_proximal, check_proximal
from metamom.maml.implicit.solves import Solves
from metamom.maml.inner_lr import LearnInnerLR, StepSizes
from metamom.maml.inner_optimizer import (
    InnerOptimizer,
    InnerOptimizerLike,
    as_inner_optimizer,
    check_inner_optimizer,
)
from metamom.maml.normalisation.norm import check_norm, resolved
from metamom.maml.normalisation.step_norms import StepNorms, check_step_norms
from metamom.maml.options import check_change, check_compile, check_loss_owner, check_option
from metamom.maml.plan import Plan
from metamom.maml.problem import PLAIN, Problem, Rule, trainable
from metamom.maml.representation import representation
from metamom.maml.running.run_by_task import RunByTask
from metamom.maml.running.swapping import locked, named
from metamom.maml.running.vectorize import Vectorization, Vectorize
from metamom.maml.selection import other_names, selected
from metamom.maml.steps.server_step import Backward as Backward
from metamom.maml.task_weights import Params
from metamom.maml.tracking import TRACKING, Memory, check_tracking
from metamom.server.down import DownBias
from metamom.server.participation import Participation


class Configured(nn.Module):
    """The part of `metamom.MAML` that holds its options: checks them, follows changes of the model, saves its state.

    Arguments and attributes are those of `metamom.MAML`.
    """

    kind: ClassVar[str] = "maml"  # its name in runs and flags

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        inner_lr: float | Tensor | Mapping[str, float | Tensor] = 0.01,
        inner_steps: int = 1,
        estimator: Estimator = "exact",
        inner_batches: InnerBatches = "same",
        tracking: float | None = None,
        proximal: ProximalLike | None = None,
        learn_inner_lr: LearnInnerLR = False,
        adapt: Iterable[str] | Callable[[str], bool] | None = None,
        chunk_size: ChunkSize = "auto",
        vectorize: Vectorize = "auto",
        compile: CompileMode = False,
        autocast: torch.dtype | None = None,
        norm: Norm | None = None,
        multi_step: int = 0,
        first_order_until: int = 0,
        step_norms: bool = False,
        inner_optimizer: InnerOptimizerLike = None,
        positive_inner_lr: bool = False,
    ) -> None:
        super().__init__()
        check_estimator(estimator, inner_batches)
        self._inner_optimizer = as_inner_optimizer(inner_optimizer)
        check_inner_optimizer(estimator, self._inner_optimizer)
        check_option("inner_steps", inner_steps)
        check_option("loss_fn", loss_fn)
        check_option("vectorize", vectorize)
        check_tracking(estimator, tracking, inner_steps, learn_inner_lr)
        check_compile(compile)
        check_proximal(estimator, proximal, inner_steps, learn_inner_lr is not False, compile is True)
        check_kind(model)
        if vectorize == "vmap":
            check_hooks(model)
        check_norm(norm)
        resolved(model, norm)
        self.model = model
        self.loss_fn = loss_fn
        self.inner_steps = inner_steps
        self.estimator: Estimator = estimator
        self.inner_batches: InnerBatches = inner_batches
        self.proximal: Proximal = Proximal() if proximal is None else as_proximal(proximal)
        self.solves = Solves()
        self.chunk_size = chunk_size
        self.autocast = autocast
        self.vectorize: Vectorize = vectorize
        self.norm: Norm | None = norm
        self._adapt = adapt if adapt is None or callable(adapt) or isinstance(adapt, str) else tuple(adapt)
        self._make_step_sizes(inner_lr, learn_inner_lr, positive_inner_lr, step_norms)
        self._make_state(tracking, multi_step, first_order_until)
        check_proximal(estimator, proximal, inner_steps, bool(self.step_sizes.learned()))
        self.operators: dict[str, BiasOperator | None] = {}
        self.federated: dict[str, Participation | DownBias] = {}
        self._readings, self._uses = LossReadings(), Uses()
        self._run, self._vectorization = RunByTask(), Vectorization(vectorize)
        self._structure = structure(model)
        self._gradients = MetaGradients(self._plan, compile, partial(fingerprint_of_learner, self))

    def _make_step_sizes(
        self,
        inner_lr: float | Tensor | Mapping[str, float | Tensor],
        learn: LearnInnerLR,
        positive: bool,
        step_norms: bool,
    ) -> None:
        """Make what the learner learns besides the model's parameters."""
        weights, steps = trainable(self.model, self.loss_fn), self.inner_steps
        self.norms_by_step: StepNorms | None = None
        if check_flag("step_norms", step_norms):
            check_step_norms(self.estimator)
            self.norms_by_step = StepNorms(self.model, steps)
        self.adapted = self._selected(self._movable())
        moved, positive = {name: weights[name] for name in self.adapted}, check_flag("positive_inner_lr", positive)
        self.step_sizes = StepSizes(inner_lr, moved, learn, steps, positive)

    def _make_state(self, tracking: float | None, multi_step: int, first_order_until: int) -> None:
        """Make the state of the options that change over training, and what is looked up again if modules change."""
        self._identity: tuple[Hashable, ...] | None = None  # of the modules that `_own` is from
        self._own: Params = {}
        self.annealing: Annealing | None = None
        if multi_step != 0 or first_order_until != 0:
            self.annealing = Annealing(multi_step, first_order_until, self.inner_steps)
            check_annealing(self.estimator, multi_step, first_order_until)
        self.memory: Memory | None = None
        if ESTIMATORS[self.estimator].averages is not None:
            weights = trainable(self.model, self.loss_fn)
            self.memory = Memory(self.estimator, TRACKING if tracking is None else tracking, weights, self.adapted)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Constructor options are checked as in the constructor.

        Raises:
            AttributeError: for an option that only the constructor takes.
            ValueError: for a value out of range, or a model with different parameters.
            TypeError: for a value of the wrong kind.
        """
        if name == "inner_lr":
            self._keep_up()
            weights = trainable(self.model, self.loss_fn)
            self.step_sizes.assign(value, {n: weights[n] for n in self.adapted})
            return
        check_option(name, value)
        value = as_proximal(value) if name == "proximal" else value
        if "_gradients" in self.__dict__:  # construction has finished
            tracking = None if self.memory is None else self.memory.tracking
            check_change(self, name, value, tracking, self.step_sizes.kind)
            if name == "model":
                self._run, self._structure = RunByTask(), structure(value)
            if name in ("model", "loss_fn", "vectorize"):
                self._vectorization = Vectorization(value if name == "vectorize" else self.vectorize)
        if name == "loss_fn":
            check_loss_owner(value)
            self._modules.pop(name, None)  # a module may replace a function, or a function a module
        super().__setattr__(name, value)
        self.__dict__["_changes"] = self.__dict__.get("_changes", 0) + 1  # of attributes, so far
        if name == "inner_steps" and isinstance(annealing := getattr(self, "annealing", None), Annealing):
            annealing.follow(value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy adapts what this learner adapts now; a predicate cannot be pickled, and names can."""
        chosen = tuple(self.adapted) if callable(self._adapt) else self._adapt
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_adapt": chosen, "_identity": None, "_own": {}}

    @property
    def inner_lr(self) -> float | Tensor | dict[str, float | Tensor]:
        """The current inner step sizes: one number (or learned tensor) if all parameters share it, else by parameter.

        Can be set to anything the constructor takes. Learned step sizes keep learning from the new values.
        """
        return self.step_sizes.values()

    @property
    def inner_optimizer(self) -> InnerOptimizer:
        """What inner steps follow."""
        return self._inner_optimizer

    @property
    def support_parts(self) -> int:
        """The number of equal parts that a meta-gradient splits each support set into; 1 means no split.

        A sampler with ``shots=learner.support_parts * m`` gives inner batches of m shots each.
        """
        return support_parts(self.estimator, self.inner_steps, self.inner_batches)

    def describe(self) -> dict[str, Any]:
        """The options that recreate this learner, as JSON values."""
        return {
            "inner_lr": self.step_sizes.describe(),
            "inner_steps": self.inner_steps,
            "estimator": self.estimator,
            "inner_batches": self.inner_batches,
            "adapt": list(self.adapted),
            **({} if self.memory is None else {"tracking": self.memory.tracking}),
            **({"proximal": self.proximal.spec} if ESTIMATORS[self.estimator].proximal else {}),
            **({} if self.norm is None else {"norm": self.norm}),
            **({} if self.annealing is None else self.annealing.describe()),
            **({} if self.norms_by_step is None else {"step_norms": True}),
            **({} if self.inner_optimizer.plain else {"inner_optimizer": self.inner_optimizer.spec}),
            **({} if self.kind == "maml" else {"kind": self.kind}),
        }

    def __repr__(self) -> str:
        return representation(self)

    def reset_tracking(self) -> None:
        """Reset the moving averages of tracked estimators. Each task's next visit counts as its first."""
        if self.memory is not None:
            self.memory.reset()

    def expect(self, iterations: int) -> None:
        """Announce how many meta-gradients will follow, so that ``compile="auto"`` can decide whether to compile.

        `metamom.train` calls this. Without it, ``"auto"`` assumes that as many will follow as have been computed.

        Raises:
            ValueError: for a number below 0.
        """
        if iterations < 0:
            raise ValueError(f"the number of remaining iterations must be >= 0; got {iterations}.")
        self._gradients.expected = iterations

    def meta_parameters(self) -> Params:
        """The parameters that get a meta-gradient, by name: trainable ones of model and loss, and learned step sizes.

        Names are those of ``model.named_parameters()``; with ``step_norms``, scales and offsets of normalisations are
        ``"step_norms.NAME"`` instead. If ``loss_fn`` is a module, its parameters follow as
        ``"loss_fn.NAME"`` (inner steps do not move them). Step sizes follow as ``"inner_lr.NAME"`` or ``"inner_lr"``.
        """
        with locked(self.model) as modules:
            own = modules_of(self.loss_fn) if isinstance(self.loss_fn, nn.Module) else []
            now = identity_of([*modules, *own])
        if now != self._identity or self.norms_by_step is not None or self._rule() is not PLAIN:
            self._keep_up()
            self._own, self._identity = self._problem().parameters(), now
        return self._own | self.step_sizes.learned()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.state_dict`. Safe to call while other threads predict with this learner."""
        with locked(self):
            return super().state_dict(*args, **kwargs)

    def _keep_up(self) -> None:
        """Update the learner if the model's modules or trainable parameters have changed since the last check.

        Raises:
            ValueError: for a model that `MAML` would refuse, and for new parameters without an inner step size.
        """
        with locked(self.model):
            now = structure(self.model)
        if now == self._structure:
            return
        check_kind(self.model)
        resolved(self.model, self.norm)
        if self.vectorize == "vmap":
            check_hooks(self.model)
        parameters = self._movable()
        adapted = self._selected(parameters)
        if adapted != self.adapted:
            self.step_sizes.follow({name: parameters[name] for name in adapted})
            if self.memory is not None:
                raise ValueError(
                    "the trainable parameters of the model have changed, but this learner remembers each task's "
                    f"adapted weights: {', '.join(set(adapted) ^ set(self.adapted))}. Make another learner around "
                    "the model."
                )
            self.adapted = adapted
        self._run, self._vectorization = RunByTask(), Vectorization(self.vectorize)
        self._structure = now

    def _movable(self) -> Params:
        """The model's parameters that inner steps may move."""
        given = self._by_step()
        return {name: p for name, p in named(self.model).items() if p.requires_grad and name not in given}

    def _selected(self, movable: Params) -> tuple[str, ...]:
        """The names of the parameters that inner steps move."""
        with locked(self.model):
            others = other_names(self.model)
        return selected(self._adapt, movable, self._by_step(), others)

    def _by_step(self) -> frozenset[str]:
        """The model's parameters that are learned for each inner step instead."""
        return frozenset() if self.norms_by_step is None else self.norms_by_step.names

    def _problem(self) -> Problem:
        annealing = self.annealing
        return Problem(
            self.model,
            self.loss_fn,
            self.adapted,
            self.step_sizes,
            self.norms_by_step,
            None if annealing is None else annealing.objective(),
            self.estimator if annealing is None else annealing.estimator(self.estimator),
            self.autocast,
            resolved(self.model, self.norm),
            self._run,
            self._vectorization,
            self._readings,
            self._uses,
            self.proximal,
            self.solves,
            self._rule(),
            self.inner_optimizer,
        )

    def _rule(self) -> Rule:
        """Where this learner departs from MAML."""
        return PLAIN

    def _plan(self) -> Plan:
        return Plan(self, self._problem(), self.inner_steps, self.inner_batches, self.memory, self.chunk_size)
