"""What goes wrong in silence, or in torch's words, when `train` gets the wrong parts; and what simply works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Adam, SparseAdam
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from metamom import (
    EF21SGDM,
    MAML,
    CompositeMomentum,
    LambdaBeta,
    TaskBatch,
    TaskSampler,
    TopK,
    evaluate,
    nets,
    train,
)  # fmt: skip
from metamom.batch import drawn
from metamom.diagnostics import TrackBias, measure
from metamom.distributed import World
from metamom.interop.learn2learn import AsTaskset
from metamom.tasks import FixedTasks, PerWorker, Sinusoid
from metamom.training.directory import read_config
from metamom.training.plan import check_momentum

TASKS = Sinusoid(5, 5)


def learner(**options: Any) -> MAML:
    return MAML(nets.SinusoidMLP(generator=torch.Generator().manual_seed(0)), F.mse_loss, **options)


def go(made: MAML, optimizer: Any, tasks: Any = TASKS, **options: Any) -> Tensor:
    """Train, and give the weights."""
    train(made, optimizer, tasks, **{"iterations": 2, "meta_batch": 4, **options})
    return torch.cat([p.detach().flatten() for p in made.parameters()])


def over(params: Any) -> CompositeMomentum:
    return CompositeMomentum(params, lr=0.01)


# optimizers


def test_an_optimizer_over_other_parameters():
    made = learner()
    rebuilt = learner()
    for others in (rebuilt.parameters(), [nn.Parameter(torch.ones(2))]):
        with pytest.raises(ValueError, match=r"none of the learner's parameters.*over learner\.parameters\(\)"):
            go(made, over(others))
    with pytest.raises(ValueError, match=r"1 of the optimizer's 7 parameters are not the learner's.*shape \(2,\)"):
        go(made, over([*made.parameters(), nn.Parameter(torch.ones(2))]))


def test_parts_that_are_frozen_or_left_out_stay():
    made = learner()
    first, *others = made.parameters()
    before = [p.detach().clone() for p in made.parameters()]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    go(made, SGD([*others, frozen], lr=0.01))
    assert torch.equal(first, before[0])
    assert not any(torch.equal(p, old) for p, old in zip(others, before[1:], strict=True))


@pytest.mark.parametrize("kind", ["scalar", "tensor", "entry"])
def test_learned_step_sizes_left_out_of_the_optimizer(kind):
    made = learner(learn_inner_lr=kind)
    with pytest.raises(
        ValueError, match=r"inner step sizes that the optimizer does not hold.*inner_lr.*over learner\."
    ):
        go(made, over(made.model.parameters()))
    sizes = list(made.step_sizes.parameters())
    before = [p.detach().clone() for p in sizes]
    go(made, over(made.parameters()))
    assert not any(torch.equal(p, old) for p, old in zip(sizes, before, strict=True))
    for p in sizes:
        p.requires_grad_(False)  # on purpose
    go(made, over(made.model.parameters()))


@pytest.mark.parametrize(("optimizer", "got"), [(SGD, "the class SGD itself"), (3, "an int"), (None, "a NoneType")])
def test_what_is_no_optimizer(optimizer, got):
    with pytest.raises(TypeError, match=f"a torch optimizer over learner.parameters.*got {got}"):
        go(learner(), optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            LBFGS,
            r"LBFGS\.step wants a closure, .* one meta-gradient a step: use CompositeMomentum, torch\.optim\.SGD or",
        ),
        (SparseAdam, r"SparseAdam takes only sparse gradients, and meta-gradients are dense: use torch\.optim\.Adam"),
    ],
)
def test_optimizers_that_need_other_gradients(make, message, tmp_path):
    made = learner()
    with pytest.raises(TypeError, match=message):
        go(made, make(list(made.parameters()), lr=0.01), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_ones_own_that_needs_a_closure():
    class Twice(SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            closure()
            return super().step(closure)

    made = learner()
    with pytest.raises(TypeError, match=r"Twice\.step wants a closure"):
        go(made, Twice(made.parameters(), lr=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"a": torch.ones(2)}}, r"settings must hold JSON values: .*; got a Tensor as 'a' \("),
        ({"settings": {"a": {"b": [object()]}}}, r"settings must hold JSON values: .*; got a dict as 'a' \("),
        ({"settings": {"a": {1: 2, "b": 3}}}, r"settings must hold JSON values: .*; got a dict as 'a' \("),
        ({"settings": {1: 2}}, r"settings are JSON values by name, .*; got the name 1\."),
        ({"settings": {1: 2, "a": 3}}, r"settings are JSON values by name, .*; got the name 1\."),
        ({"settings": 5}, r"settings are JSON values by name, .*; got 5\."),
        ({"free": 5}, r'free are names of settings, such as free=\("device",\); got 5\.'),
        ({"free": "device"}, r"free are names of settings, .*; got 'device'\."),
        ({"free": [1]}, r"free are names of settings, .*; got \[1\]\."),
        (
            {"track_bias": 5},
            r"track_bias takes a metamom\.diagnostics\.TrackBias\(every, pools, inner_batch\), .*; got 5\.",
        ),
        ({"track_bias": True}, r"track_bias takes a metamom\.diagnostics\.TrackBias\(.*; got True\."),
        ({"run_dir": 5}, r"run_dir is the path of a directory, or None; got 5\."),
        ({"resume": "no"}, r"resume must be True or False; got 'no'\."),
        ({"keep_checkpoints": 2.5}, r"keep_checkpoints must be a whole number; got 2\.5\."),
    ],
)
def test_what_cannot_be_recorded(options, message, tmp_path):
    made = learner()
    with pytest.raises(TypeError, match=message):
        go(made, over(made.parameters()), **{"run_dir": tmp_path / "run", **options})
    assert not (tmp_path / "run").exists()


def test_whole_numbers_of_numpy_are_recorded(tmp_path):
    made, theirs = learner(), learner()
    names = ("iterations", "meta_batch", "workers", "evaluate_every", "evaluate_tasks", "checkpoint_every")
    numbers = dict(zip(names, np.array([2, 4, 2, 1, 4, 1]), strict=True))
    tracked = TrackBias(np.int64(2), Sinusoid(10, 5), 1, np.int64(3))
    weights = go(made, over(made.parameters()), validation=TASKS, run_dir=tmp_path, track_bias=tracked, **numbers)
    assert torch.equal(weights, go(theirs, over(theirs.parameters()), workers=2))
    assert read_config(tmp_path)["length"]["iterations"] == 2
    assert read_config(tmp_path)["settings"]["meta_batch"] == 4


def test_what_is_no_learner():
    model = nets.SinusoidMLP()
    with pytest.raises(TypeError, match=r"takes a metamom\.MAML learner; got a SinusoidMLP. Wrap the model in MAML"):
        go(model, over(model.parameters()))


class Sharp(SGD):
    """An optimizer of somebody's, which calls something else beta."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["beta"] = 0.9


def test_only_what_is_momentum_counts_as_momentum():
    made, operator = learner(), EF21SGDM(TopK(1))
    check_momentum(Sharp(made.parameters(), lr=0.1), operator)
    check_momentum(Adam(made.parameters(), betas=(0.0, 0.999)), operator)
    for optimizer in (over(made.parameters()), Adam(made.parameters()), SGD(made.parameters(), lr=0.1, momentum=0.5)):
        with pytest.raises(ValueError, match="carries the momentum on the workers"):
            check_momentum(optimizer, operator)


# schedulers


def test_one_scheduler_is_a_list_of_one():
    lrs = []
    for wrap in (lambda s: s, lambda s: [s], lambda s: (s,), lambda s: iter([s])):
        made = learner()
        optimizer = over(made.parameters())
        go(made, optimizer, schedulers=wrap(StepLR(optimizer, 1, gamma=0.5)))
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == [0.0025] * 4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: StepLR, TypeError, "got the class StepLR itself"),
        (lambda o: None, TypeError, "schedulers are one or a list of them, .*; got None"),
        (lambda o: o, TypeError, "got a CompositeMomentum"),
        (lambda o: [(StepLR(o, 1),)], TypeError, "got a tuple"),
        (ReduceLROnPlateau, ValueError, "ReduceLROnPlateau .* advances at each validation: pass validation="),
        (
            lambda o: StepLR(SGD([nn.Parameter(torch.ones(1))], lr=1), 1),
            ValueError,
            "StepLR schedules another optimizer",
        ),
        (
            lambda o: LambdaBeta(over([nn.Parameter(torch.ones(1))]), lambda k: 1),
            ValueError,
            "LambdaBeta schedules another optimizer",
        ),
    ],
)
def test_what_is_no_scheduler_of_this_run(make, error, message):
    made = learner()
    optimizer = over(made.parameters())
    with pytest.raises(error, match=message):
        go(made, optimizer, schedulers=make(optimizer))


def test_a_scheduler_of_ones_own():
    class Counting:
        steps = 0

        def step(self) -> None:
            self.steps += 1

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            return None

    made, scheduler = learner(), Counting()
    optimizer = over(made.parameters())
    go(made, optimizer, schedulers=[scheduler, LambdaLR(optimizer, lambda k: 1)])
    assert scheduler.steps == 2


# samplers


class Short:
    """A user's own, of one process."""

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return TASKS.sample(step, num_tasks)


class Swallowing:
    def sample(self, step: int, num_tasks: int, **where: Any) -> TaskBatch:
        return TASKS.sample(step, num_tasks)


class Ignoring:
    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return TASKS.sample(step, num_tasks)


OWN = [Short(), Swallowing(), Ignoring()]


@pytest.mark.parametrize("sampler", OWN, ids=lambda sampler: type(sampler).__name__)
def test_a_sampler_that_knows_nothing_of_processes_serves_one(sampler):
    made, theirs = learner(), learner()
    weights = go(made, over(made.parameters()), sampler, validation=sampler, evaluate_tasks=60)
    assert torch.equal(weights, go(theirs, over(theirs.parameters())))
    found, expected = (evaluate(made, tasks, tasks=60, steps=(1,), stream="train") for tasks in (sampler, TASKS))
    assert torch.equal(found.values, expected.values)
    assert measure(made, sampler, inner_batches=(1,), draws=3).draws == 3
    assert len(list(AsTaskset(sampler, num_tasks=2))) == 2


@pytest.mark.parametrize("sampler", OWN[1:], ids=lambda sampler: type(sampler).__name__)
def test_a_sampler_that_ignores_its_part_is_reported_where_there_are_several(sampler):
    with pytest.raises(ValueError, match=r"returned 4 tasks for part 1 of 2 of a meta-batch of 4; wanted 2"):
        World(1, 2).sample(sampler, 0, 4)
    with pytest.raises(ValueError, match="returned 4 tasks for part 0 of 2"):
        PerWorker([sampler, TASKS]).sample(0, 4)


def test_a_sampler_that_takes_no_part_is_reported_where_there_are_several():
    for ask in (lambda: World(1, 2).sample(Short(), 0, 4), lambda: PerWorker([Short(), TASKS]).sample(0, 4)):
        with pytest.raises(
            TypeError, match=r"Short\.sample takes no rank and world_size.*2 processes or workers: write"
        ):
            ask()
    assert drawn(Short(), 0, 4).num_tasks == 4


class Alone:
    """A sampler that does not take the number of tasks."""

    def sample(self, step: int) -> TaskBatch:
        return TASKS.sample(step, 4)


def test_a_sampler_that_takes_too_little():
    made = learner()
    with pytest.raises(TypeError, match=r"train needs a sampler, .*; Alone\.sample takes \(step: "):
        go(made, over(made.parameters()), Alone())


class TheOtherWayRound:
    def sample(self, num_tasks: int, step: int) -> TaskBatch:
        return TASKS.sample(step, num_tasks)


class WithOtherNames:
    def sample(self, k: int, n: int) -> TaskBatch:
        return TASKS.sample(k, n)


def test_a_sampler_that_takes_the_number_of_tasks_first():
    made, sampler = learner(), TheOtherWayRound()
    message = (
        r"is called as sample\(step, num_tasks\), in this order; TheOtherWayRound\.sample takes .*Put the step first"
    )
    takers: list[Callable[[], Any]] = [
        lambda: go(made, over(made.parameters()), sampler),
        lambda: go(made, over(made.parameters()), validation=sampler),
        lambda: evaluate(made, sampler),
        lambda: measure(made, sampler),
        lambda: PerWorker([sampler]),
    ]
    for take in takers:
        with pytest.raises(TypeError, match=message):
            take()
    theirs = learner()
    weights = go(made, over(made.parameters()), WithOtherNames())
    assert torch.equal(weights, go(theirs, over(theirs.parameters())))


BATCH = TASKS.sample(0, 4)


class Giving:
    """A sampler of one batch."""

    def __init__(self, batch: TaskBatch) -> None:
        self.batch = batch

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return self.batch


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        *(
            (name, lambda x: x.numpy(), TypeError, rf"{name} of Giving\.sample must be .*ndarray.*from_numpy")
            for name in ("support_x", "support_y", "query_x", "query_y")
        ),
        ("support_x", lambda x: x.tolist(), TypeError, r"must be a tensor .*got a list of 4 items.*as_tensor"),
        ("query_x", lambda x: None, TypeError, r"query_x of Giving\.sample must be a tensor .*got None"),
        (
            "support_x",
            lambda x: x.to_sparse(),
            TypeError,
            r"a dense tensor .* layout torch\.sparse_coo.*x\.to_dense\(\)",
        ),
        ("query_y", lambda x: x.to_sparse(), TypeError, r"query_y of Giving\.sample must be a dense tensor"),
        (
            "support_x",
            lambda x: x[0, 0, 0],
            ValueError,
            r"support_x of Giving\.sample must have shape \[T, N, \.\.\.\]",
        ),
        ("task_ids", lambda x: np.arange(4), TypeError, r"task_ids of Giving\.sample must be a tensor \[T\]"),
    ],
)
def test_a_sampler_of_batches_of_something_else_than_tensors(name, change, error, message):
    made, sampler = learner(), Giving(BATCH._replace(**{name: change(getattr(BATCH, name))}))
    for take in (
        lambda: go(made, over(made.parameters()), sampler),
        lambda: evaluate(made, sampler, tasks=4, steps=(1,)),
        lambda: PerWorker([sampler]).sample(0, 4),
    ):
        with pytest.raises(error, match=message):
            take()


@pytest.mark.parametrize("name", ["support_x", "support_y", "query_x", "query_y"])
def test_a_sparse_batch_for_the_learner_itself(name):
    made, batch = learner(), BATCH._replace(**{name: getattr(BATCH, name).to_sparse()})
    for take in (lambda: made.backward(batch), lambda: made.meta_gradient(batch)):
        with pytest.raises(TypeError, match=rf"{name} must be a dense tensor \[T, N, .*x\.to_dense\(\)"):
            take()


@pytest.mark.parametrize(
    "sampler", [[BATCH], (BATCH,), BATCH, Sinusoid, None, 3], ids=lambda sampler: type(sampler).__name__
)
def test_what_is_no_sampler(sampler):
    made = learner()
    takers = {
        "train": lambda: go(made, over(made.parameters()), sampler),
        "validation": lambda: go(made, over(made.parameters()), validation=sampler),
        "evaluate": lambda: evaluate(made, sampler),
        "measure": lambda: measure(made, sampler),
        "PerWorker": lambda: PerWorker([sampler]),
        "AsTaskset": lambda: AsTaskset(sampler),
    }
    for name, take in takers.items():
        if name == "validation" and sampler is None:
            continue
        with pytest.raises(TypeError, match=r"must have a method sample\(step, num_tasks\).*got (an?|the class) \w+"):
            take()


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_sampler_of_something_else_than_batches(kind):
    class Other:
        def sample(self, step: int, num_tasks: int) -> Any:
            return kind(BATCH[:4])

    made = learner()
    with pytest.raises(TypeError, match=rf"Other\.sample must return a metamom\.TaskBatch\(.*got a {kind.__name__}"):
        go(made, over(made.parameters()), Other())


class Namesake:
    """A user's sampler that has our names for other things."""

    workers = 3  # of its data loader
    stream = None
    describe = "noise in the labels"

    def with_stream(self, cuda_stream: Any) -> None:
        raise AssertionError("no stream of draws")

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return TASKS.sample(step, num_tasks, rank=rank, world_size=world_size)


def test_a_sampler_with_attributes_of_our_names(tmp_path):
    made, theirs = learner(), learner()
    options = {"workers": 2, "run_dir": tmp_path / "run", "evaluate_tasks": 20}
    weights = go(made, over(made.parameters()), Namesake(), validation=Namesake(), **options)
    assert torch.equal(weights, go(theirs, over(theirs.parameters()), workers=2))
    assert measure(made, Namesake(), inner_batches=(1,), draws=3).draws == 3
    pair = PerWorker([Namesake(), Namesake()])
    assert pair.with_stream("test").describe()["samplers"] == [{"family": "Namesake"}] * 2


class Streamed(TaskSampler):
    """A user's sampler that asks for all of it."""

    def __init__(self, family: Sinusoid = TASKS) -> None:
        self.family = family

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        return self.family.sample(step, num_tasks, rank=rank, world_size=world_size)

    @property
    def workers(self) -> int:
        return 2

    def with_stream(self, stream: str) -> Streamed:
        return Streamed(self.family.with_stream(stream))

    def describe(self) -> dict[str, Any]:
        return {"family": "mine", "of": self.family.describe()}


def test_a_sampler_opts_in_by_its_base_class():
    made = learner()
    found, expected = (evaluate(made, tasks, tasks=20, steps=(1,)) for tasks in (Streamed(), TASKS))
    assert torch.equal(found.values, expected.values)
    with pytest.raises(ValueError, match="a family for each of 2 workers: pass workers=2; got 4"):
        go(made, over(made.parameters()), Streamed(), workers=4)
    assert PerWorker([Streamed()]).describe()["samplers"][0]["family"] == "mine"
    with pytest.raises(TypeError, match="abstract"):
        TaskSampler()  # type: ignore[abstract]


@pytest.mark.parametrize(
    "sampler", [TASKS, FixedTasks(TASKS, 4), PerWorker([TASKS, TASKS])], ids=lambda s: type(s).__name__
)
def test_our_own_have_it(sampler):
    assert isinstance(sampler, TaskSampler)
    assert sampler.describe()["family"] == type(sampler).__name__
    assert sampler.workers == (2 if isinstance(sampler, PerWorker) else None)
