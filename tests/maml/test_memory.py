"""What meta-gradients keep and need: no graph of a step that is over, and what the experiment tells."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import conv4, image_batch, small, small_batch
from torch import Tensor
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum
from metamom.experiments import memory
from metamom.maml.chunking import BUDGET

WORDS = ["--iterations", "8", "--tasks", "6"]


def of_conv4(**options: Any) -> tuple[MAML, Any]:
    return MAML(conv4(), F.cross_entropy, inner_lr=0.1, **options), lambda step: image_batch(step, tasks=4)


def of_an_mlp(**options: Any) -> tuple[MAML, Any]:
    return small(inner_steps=3, **options), lambda step: small_batch(step, tasks=4)


@pytest.fixture(autouse=True)
def only_this_test():
    """What earlier tests have left, millions of objects in a long session, is neither searched nor counted."""
    gc.collect()
    gc.freeze()


def live() -> tuple[int, int]:
    """How many tensors there are, and how many of them have a graph behind them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    return len(tensors), sum(x.grad_fn is not None for x in tensors)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"chunk_size": "auto"}, {"compile": True}], ids=str)
@pytest.mark.parametrize("make", [of_conv4, of_an_mlp], ids=["Conv4", "MLP"])
def test_no_graph_of_a_step_that_is_over(make, options, traced):
    """Whole training steps, second order: what there is after five of them was there after two."""
    learner, batch_of = make(**options)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    before = live()
    counted = {}
    for step in range(1, 6):
        optimizer.zero_grad()
        loss, _ = learner.backward(batch_of(step), workers=2)
        optimizer.step()
        counted[step] = live()
    assert not loss.requires_grad
    assert counted[5] == counted[2]
    assert counted[2][1] == before[1], "tensors with a graph were left"


def test_a_graph_that_is_kept_would_be_counted():
    """`live` sees one: else the test above could not fail."""
    learner, batch_of = of_an_mlp()
    before = live()
    kept = learner.losses(batch_of(0))
    assert live()[1] > before[1]
    del kept
    assert live()[1] == before[1]


@pytest.mark.slow
def test_the_experiment_tells_what_it_measured():
    command = [sys.executable, "-m", "metamom.experiments.memory", *WORDS, "--eager", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["iterations"] == 8
    assert found["environment"]["torch"] == torch.__version__
    assert list(found["flat"]) == ["sinusoid MLP, 8 tasks", "Conv4-16, 8 tasks", 'Conv4-64, 6 tasks, chunk_size="auto"']
    assert list(found["large"]) == ["6 tasks", '6 tasks, chunk_size="auto"']
    for name, peaks in {**found["flat"], **found["large"]}.items():
        assert len(peaks) == (memory.QUARTERS if name in found["flat"] else 2)
        assert all(math.isfinite(peak) for peak in peaks)
        assert peaks[0] > 100, "PyTorch alone takes more"
        assert all(a <= b for a, b in pairwise(peaks)), "a peak never falls"
        assert peaks[-1] - peaks[0] < 1.5 * BUDGET / 2**20, name
    assert found["large"]["6 tasks"][1] > found["large"]["6 tasks"][0] + 6  # a task keeps 6 MiB and more


@pytest.fixture
def instead(monkeypatch) -> list[tuple[Any, ...]]:
    """Nothing is measured; what would have been is noted."""
    asked: list[tuple[Any, ...]] = []

    def noting(function: Any, *args: Any) -> list[float]:
        asked.append(args)
        return [100.0] * (memory.QUARTERS if function is memory.flatness else 2)

    monkeypatch.setattr(memory, "alone", noting)
    return asked


def test_the_table_has_a_line_for_each(instead, capsys):
    memory.main(WORDS)
    lines = capsys.readouterr().out.splitlines()
    assert len(instead) == 8
    for given, *_ in instead:
        (line,) = (line for line in lines if line.startswith(f"  {given} "))
        assert set(line.removeprefix(f"  {given} ").split()) == {"100"}
    instead.clear()
    memory.main([*WORDS, "--eager"])
    assert len(instead) == 5
    assert not any(given.compile for given, *_ in instead)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--iterations", "3"], "--iterations must be >= 4"),
        (["--tasks", "0"], "argument --tasks: wanted a whole number from 1 to 10,000,000; got '0'"),
    ],
)
def test_wrong_flags(words, said, instead, capsys):
    with pytest.raises(SystemExit, match="2"):
        memory.main(words)
    assert said in capsys.readouterr().err
    assert instead == []


def test_long_runs_have_as_many_tasks_in_all(monkeypatch):
    """An iteration of 24 tasks counts as three of 8."""
    drawn: list[int] = []
    sample = memory.Sinusoid.sample

    def noting(self: memory.Sinusoid, step: int, num_tasks: int, **options: Any) -> Any:
        drawn.append(num_tasks)
        return sample(self, step, num_tasks, **options)

    monkeypatch.setattr(memory.Sinusoid, "sample", noting)
    for tasks, iterations in [(8, [8] * 24), (24, [24] * 8)]:
        drawn.clear()
        assert len(memory.flatness(memory.LongRun(None, tasks=tasks), 24)) == memory.QUARTERS
        assert drawn == iterations
