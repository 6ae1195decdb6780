"""Drawing ahead: the same batches, from a thread that starts where it pays, and ends with its sampler."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
import time
from collections import Counter

import pytest
import torch
from forked import started_script
from torch import nn
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, TaskBatch, evaluate, train
from metamom.batch import TaskSampler, check_sampler, described, of_stream
from metamom.tasks import FixedTasks, PerWorker, Prefetched, Sinusoid


class Slow(TaskSampler):
    """Notes which steps are drawn, by whom; the tasks of `fails` raise."""

    def __init__(self, seconds: float = 0.0, fails: tuple[int, ...] = ()) -> None:
        self.inner, self.seconds, self.fails = Sinusoid(), seconds, fails
        self.drawn: list[int] = []
        self.threads: set[str] = set()

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
        self.drawn.append(step)
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if step in self.fails:
            raise ValueError(f"step {step} fails")
        return self.inner.sample(step, num_tasks, rank=rank, world_size=world_size)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("metamom-prefetch")]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    if ours():
        gc.collect()
    wait_for(lambda: not ours())


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("steps", [range(12), [0, 1, 2, 9, 10, 3, 4, 4, 5, 0], [7, 3, 5]])
def test_the_same_batches_in_any_order(ahead, steps):
    with Prefetched(Slow(), ahead, threshold=0) as tasks:
        for step in steps:
            assert same(tasks.sample(step, 4), Sinusoid().sample(step, 4))
            assert same(tasks.sample(step, 6, rank=1, world_size=2), Sinusoid().sample(step, 6, rank=1, world_size=2))


def test_each_step_is_drawn_once_and_in_one_thread():
    inner = Slow()
    with Prefetched(inner, 3, threshold=0, until=20) as tasks:
        for step in range(20):
            tasks.sample(step, 4)
    assert Counter(inner.drawn) == Counter(range(20))
    assert len(inner.threads) == 2  # this one for step 0, and the other


def test_it_is_ahead():
    inner = Slow()
    with Prefetched(inner, 3, threshold=0) as tasks:
        tasks.sample(5, 4)
        wait_for(lambda: inner.drawn == [5, 6, 7, 8])


@pytest.mark.parametrize(("draws", "computes", "pays"), [(0.02, 0.02, True), (0.0005, 0.15, False)])
def test_it_starts_where_it_pays(draws, computes, pays):
    inner = Slow(draws)
    with Prefetched(inner) as tasks:
        assert tasks.draws_ahead is None
        for step in range(8):
            tasks.sample(step, 2)
            time.sleep(computes)
        assert tasks.draws_ahead is pays
        assert bool(ours()) is pays


def test_an_error_is_raised_at_its_step():
    with Prefetched(Slow(fails=(2,)), threshold=0) as tasks:
        tasks.sample(0, 2)
        tasks.sample(1, 2)
        for _ in range(2):
            with pytest.raises(ValueError, match="step 2 fails"):
                tasks.sample(2, 2)
        assert same(tasks.sample(3, 2), Sinusoid().sample(3, 2))


def test_closing_and_dropping_end_the_thread():
    tasks = Prefetched(Slow(0.01), 50, threshold=0)
    tasks.sample(0, 2)
    tasks.close()
    wait_for(lambda: not ours())
    assert same(tasks.sample(1, 2), Sinusoid().sample(1, 2))  # starts again
    tasks.close()
    inner = Slow(0.01)
    dropped = Prefetched(inner, 50, threshold=0)
    dropped.sample(0, 2)
    del dropped
    gc.collect()
    wait_for(lambda: not ours())
    assert len(inner.drawn) < 50


def test_copies_pickles_and_streams_have_threads_of_their_own():
    tasks = Prefetched(Sinusoid(), 3, threshold=0, until=9)
    tasks.sample(0, 2)
    for other in (copy.copy(tasks), copy.deepcopy(tasks), pickle.loads(pickle.dumps(tasks))):
        assert (other.ahead, other.until, other.threshold) == (3, 9, 0)
        assert same(other.sample(1, 2), Sinusoid().sample(1, 2))
        other.close()
    other = of_stream(tasks, "test")
    assert same(other.sample(1, 2), Sinusoid().with_stream("test").sample(1, 2))
    other.close()
    tasks.close()


def test_it_describes_what_it_draws():
    tasks = Prefetched(FixedTasks(Sinusoid(), 4))
    check_sampler(tasks)
    assert described(tasks) == described(FixedTasks(Sinusoid(), 4))
    assert tasks.workers is None
    assert Prefetched(PerWorker([Sinusoid(), Sinusoid()])).workers == 2
    assert repr(tasks).startswith("Prefetched(")


class Plain:
    """A sampler of one's own, without ranks."""

    def sample(self, step: int, num_tasks: int) -> TaskBatch:
        return Sinusoid().sample(step, num_tasks)


def test_a_sampler_without_ranks():
    with Prefetched(Plain(), threshold=0) as tasks:
        assert same(tasks.sample(3, 4), Sinusoid().sample(3, 4))
        assert same(tasks.sample(3, 4, rank=1, world_size=2), Sinusoid().sample(3, 4, rank=1, world_size=2))


def learner_of() -> tuple[MAML, CompositeMomentum]:
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    learner = MAML(net, F.mse_loss)
    return learner, CompositeMomentum(learner.parameters(), lr=0.01)


def test_training_and_evaluation_are_the_same_and_resume(tmp_path):
    plain = train(*learner_of(), Sinusoid(), iterations=8, meta_batch=4, run_dir=tmp_path / "plain")
    with Prefetched(Sinusoid(), threshold=0) as tasks:
        train(*learner_of(), tasks, iterations=5, meta_batch=4, run_dir=tmp_path / "ahead", checkpoint_every=5)
    learner, optimizer = learner_of()
    rest = train(learner, optimizer, Sinusoid(), iterations=8, meta_batch=4, run_dir=tmp_path / "ahead", resume=True)
    assert [line["loss"] for line in rest.metrics] == [line["loss"] for line in plain.metrics[5:]]
    with Prefetched(Sinusoid(), threshold=0) as tasks:
        found, expected = (evaluate(learner, each, tasks=20) for each in (tasks, Sinusoid()))
    assert torch.equal(found.values, expected.values)


INTERRUPTED = """
import os, signal, sys, threading, time
from metamom.tasks import Prefetched, Sinusoid
class Slow:
    def sample(self, step, num_tasks):
        time.sleep(0.05)
        return Sinusoid().sample(step, num_tasks)
tasks = Prefetched(Slow(), 4, threshold=0)
try:
    for step in range(10**6):
        tasks.sample(step, 2)
        if step == 3:
            print("running", flush=True)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


def test_ctrl_c(tmp_path):
    with started_script(INTERRUPTED, tmp_path) as started:
        started.until_it_says("running")
        os.kill(started.pid, signal.SIGINT)
        assert started.ended(20) == (130, "running\ninterrupted\n")


def test_a_fork_draws_for_itself():
    tasks = Prefetched(Sinusoid(), threshold=0)
    tasks.sample(0, 2)
    wait_for(lambda: all(future.done() for future in tasks._pending.values()))
    child = os.fork()
    if child == 0:
        os._exit(0 if same(tasks.sample(5, 2), Sinusoid().sample(5, 2)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    tasks.close()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3,), TypeError, "the sampler of Prefetched must have a method sample"),
        ((Sinusoid(), 0), ValueError, "ahead must be >= 1"),
        ((Sinusoid(), 1.5), TypeError, "ahead must be a whole number"),
        ((Sinusoid(), 999), ValueError, "ahead must be at most 64"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Prefetched(*arguments)
    with pytest.raises(ValueError, match="threshold must be a fraction"):
        Prefetched(Sinusoid(), threshold=1)
