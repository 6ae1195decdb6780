"""Sinusoid: the formula, the ranges, exact values, bad arguments."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from metamom import TaskBatch
from metamom.rng import DrawCoordinates
from metamom.tasks import Sinusoid


def test_points_lie_on_the_task_s_sinusoid():
    tasks = Sinusoid(shots=4, queries=7, dtype=torch.float64)
    batch = tasks.sample(5, 6)
    amplitude, phase = (
        torch.from_numpy(p)[:, None, None] for p in tasks.parameters(DrawCoordinates("train", 5, np.arange(6)))
    )
    assert batch.support_x.shape == (6, 4, 1)
    assert batch.query_y.shape == (6, 7, 1)
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        torch.testing.assert_close(y, amplitude * torch.sin(x + phase), rtol=0, atol=1e-14)  # the same float64 formula


def test_draws_fill_their_ranges():
    tasks = Sinusoid(amplitude=(1, 2), phase=(-1, 0.5), x_range=(2, 6))
    amplitude, phase = tasks.parameters(DrawCoordinates("train", 0, np.arange(500)))
    x = tasks.sample(0, 500).query_x.numpy()
    for values, (low, high) in ((amplitude, (1, 2)), (phase, (-1, 0.5)), (x, (2, 6))):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)


def test_a_point_range_fixes_a_parameter():
    amplitude, _ = Sinusoid(amplitude=(2, 2)).parameters(DrawCoordinates("train", 0, np.arange(3)))
    assert amplitude.tolist() == [2, 2, 2]


def test_the_values_of_every_platform():
    """Exact up to float32 rounding: platforms' sines may differ in the last bit of float64."""
    batch = Sinusoid(shots=2, queries=1).sample(0, 2)
    x = torch.tensor([0.7051636576652527, -3.5854954719543457, -2.479039192199707, -1.394540548324585])
    y = torch.tensor([-0.10421884059906006, -0.9478628635406494, -2.865200996398926, 0.8792992830276489])
    torch.testing.assert_close(batch.support_x.flatten(), x, rtol=2e-7, atol=0)
    torch.testing.assert_close(batch.support_y.flatten(), y, rtol=2e-7, atol=0)


def test_noise_moves_no_point_and_has_its_size():
    clean, noisy = Sinusoid(queries=200).sample(0, 50), Sinusoid(queries=200, noise=0.3).sample(0, 50)
    assert torch.equal(clean.query_x, noisy.query_x)
    noise = noisy.query_y - clean.query_y
    assert abs(noise.std().item() - 0.3) < 4 * 0.3 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean().item()) < 4 * 0.3 / math.sqrt(noise.numel())


def test_float64_tasks_round_to_the_float32_ones():
    coarse, fine = Sinusoid().sample(3, 4), Sinusoid(dtype=torch.float64).sample(3, 4)
    for a, b in zip(coarse[:4], fine[:4], strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_description_is_json():
    assert json.loads(json.dumps(Sinusoid(noise=0.1, dtype=torch.float64).describe()))["dtype"] == "float64"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": 0}, "shots must be >= 1; got 0"),
        ({"queries": -1}, "queries must be >= 1"),
        ({"amplitude": (5, 1)}, "amplitude must be a finite range"),
        ({"x_range": (0, math.inf)}, "x_range must be a finite range"),
        ({"phase": (math.nan, 1)}, "phase must be a finite range"),
        ({"noise": -0.1}, "noise is a standard deviation"),
        ({"seed": -1}, "0 <= seed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sinusoid(**arguments)


def test_a_batch_is_printed_by_shapes():
    shown = repr(Sinusoid(shots=3, queries=2).sample(0, 4))
    assert shown == (
        "TaskBatch(support_x=[4, 3, 1] float32, support_y=[4, 3, 1] float32, query_x=[4, 2, 1] float32, "
        "query_y=[4, 2, 1] float32)"
    )
    assert repr(TaskBatch({"a": torch.ones(2, 3)}, None, torch.ones(2, 3), None)) == (
        "TaskBatch(support_x={'a': [2, 3] float32}, query_x=[2, 3] float32)"
    )
