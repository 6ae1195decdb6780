"""Wrong arguments of the task families: each is an error that says what was wanted and what came."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from cases import loop_over
from torch import Tensor

from metamom.tasks import Episodes, FixedTasks, LinearRegression, Omniglot, PerWorker, Quadratic, Sinusoid

IMAGES, LABELS = torch.rand(12, 1, 4, 4), torch.arange(12) % 3


def linear(**change: Any) -> LinearRegression:
    return LinearRegression(**{"dim": 3, "shots": 2} | change)


def quadratic(**change: Any) -> Quadratic:
    return Quadratic(**{"dim": 3} | change)


def episodes(**change: Any) -> Episodes:
    return Episodes(**{"images": IMAGES, "labels": LABELS, "ways": 2, "shots": 1, "queries": 1} | change)


def fixed(**change: Any) -> FixedTasks:
    return FixedTasks(**{"sampler": Sinusoid(), "n": 4} | change)


def omniglot(**change: Any) -> Omniglot:
    return Omniglot(**{"root": "never looked for"} | change)


REFUSED = [
    (Sinusoid, "amplitude", "ab", TypeError, r"amplitude must be a range of two numbers \(low, high\); got 'ab'"),
    (Sinusoid, "amplitude", 3, TypeError, "amplitude must be a range of two numbers"),
    (Sinusoid, "phase", (1, 2, 3), TypeError, "phase must be a range of two numbers"),
    (Sinusoid, "x_range", None, TypeError, "x_range must be a range of two numbers"),
    (Sinusoid, "x_range", (0, "1"), TypeError, "x_range must be a range of two numbers"),
    (Sinusoid, "amplitude", torch.tensor([0.0, 1.0]), TypeError, "amplitude must be a range of two numbers"),
    (Sinusoid, "noise", "x", TypeError, "noise is a standard deviation, a number >= 0; got 'x'"),
    (Sinusoid, "noise", None, TypeError, "noise is a standard deviation"),
    (Sinusoid, "dtype", "float32", TypeError, "floating-point type such as torch.float32; got 'float32'"),
    (Sinusoid, "dtype", torch.int64, TypeError, "dtype must be a floating-point type"),
    (linear, "dtype", torch.int64, TypeError, "dtype must be a floating-point type"),
    (quadratic, "dtype", torch.bool, TypeError, "dtype must be a floating-point type"),
    (linear, "noise", "x", TypeError, "noise is a standard deviation"),
    (linear, "spectrum", 5, TypeError, "spectrum must be a range of two numbers"),
    (linear, "spectrum", (1,), TypeError, "spectrum must be a range of two numbers"),
    (linear, "spectrum", (-1, 1), ValueError, "0 <= low <= high"),
    (linear, "theta", "x", TypeError, "theta must be an array of real numbers; got <U1"),
    (linear, "theta", ["1", "2", "3"], TypeError, "theta must be an array of real numbers"),
    (linear, "theta", object(), TypeError, "theta must be an array of real numbers; got object"),
    (linear, "theta", 1j * np.ones(3), TypeError, "theta must be an array of real numbers; got complex128"),
    (linear, "theta", [[1, 2, 3], [1]], ValueError, "theta must be an array of numbers, all rows of one length"),
    (linear, "replacement", "no", TypeError, "replacement must be True or False; got 'no'"),
    (quadratic, "center_std", None, TypeError, "center_std is a standard deviation"),
    (quadratic, "hessian_noise", "1", TypeError, "hessian_noise is a standard deviation"),
    (quadratic, "hessian", object(), TypeError, "hessian must be an array of real numbers"),
    (episodes, "labels", ["a"] * 12, TypeError, "labels must be a tensor, an array or a list of numbers; got list"),
    (episodes, "labels", np.array(["a"] * 12), TypeError, "labels must be a tensor, an array or a list of numbers"),
    (episodes, "labels", None, TypeError, "labels must be a tensor, an array or a list of numbers; got NoneType"),
    (episodes, "labels", [2**64] * 12, TypeError, "labels must be a tensor, an array or a list of numbers"),
    (episodes, "labels", (label for label in range(12)), TypeError, "got generator"),
    (episodes, "labels", LABELS.to_sparse(), TypeError, r"labels must be a dense tensor; .* \.to_dense\(\)"),
    (episodes, "images", IMAGES.to_sparse(), TypeError, "images must be a dense tensor"),
    (episodes, "images", None, TypeError, "images must be a tensor, an array or a list of numbers; got NoneType"),
    (episodes, "images", [*IMAGES], TypeError, "Join a list of tensors with torch.stack"),
    (episodes, "augment", 5, TypeError, "augment must be a function of images and a generator, or None; got 5"),
    (episodes, "rotations", "all", TypeError, "rotations must be True or False; got 'all'"),
    (fixed, "n", 2**70, ValueError, "n must be at most 4,611,686,018,427,387,904"),
    (fixed, "fresh_data", "no", TypeError, "fresh_data must be True or False; got 'no'"),
    (PerWorker, "samplers", None, TypeError, "PerWorker needs a list of samplers, one for each worker; got NoneType"),
    (PerWorker, "samplers", Sinusoid(), TypeError, "PerWorker needs a list of samplers, .*; got Sinusoid"),
    (PerWorker, "samplers", [Sinusoid], TypeError, r"samplers\[0\] must have a method .* the class Sinusoid itself"),
    (omniglot, "split", [], ValueError, r"Omniglot has the splits .*; got \[\]"),
    (omniglot, "rotations", torch.ones(2), ValueError, "rotations must be True, False or 'all'"),
    (omniglot, "alphabets", 5, ValueError, "alphabets must be a list of names"),
    (omniglot, "alphabets", [["Greek"]], ValueError, "alphabets must be a list of names"),
    (omniglot, "alphabets", [None, "Greek"], ValueError, "alphabets must be a list of names"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "value", "error", "message"),
    REFUSED,
    ids=[f"{make.__name__}-{name}-{i}" for i, (make, name, *_) in enumerate(REFUSED)],
)
def test_wrong_arguments(make, name, value, error, message):
    with pytest.raises(error, match=message):
        make(**{name: value})


WRONG_PLACES = [
    ({"step": "0"}, "step must be an integer >= 0; got '0'"),
    ({"step": 0.5}, "step must be an integer >= 0; got 0.5"),
    ({"num_tasks": 4.0}, "the number of tasks must be a whole number; got 4.0"),
    ({"num_tasks": "4"}, "the number of tasks must be a whole number; got '4'"),
    ({"rank": "0"}, "rank must be a whole number; got '0'"),
    ({"rank": 0.5, "world_size": 2}, "rank must be a whole number; got 0.5"),
    ({"world_size": 2.0}, r"the number of workers \(or processes\) must be a whole number; got 2.0"),
]


@pytest.mark.parametrize(
    "sampler", [Sinusoid(), linear(), quadratic(), episodes(), fixed(), PerWorker([Sinusoid()] * 2)],
    ids=lambda sampler: type(sampler).__name__,
)  # fmt: skip
@loop_over(place=WRONG_PLACES)
def test_wrong_places(sampler, place):
    change, message = place
    assert isinstance(sampler.sample(np.int64(0), np.int32(4), rank=np.int8(0), world_size=1).query_x, Tensor)
    with pytest.raises(TypeError, match=message):
        sampler.sample(**{"step": 0, "num_tasks": 4} | change)


@pytest.mark.parametrize("sampler", [Sinusoid(), fixed()], ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("stream", [5, None, b"test"])
def test_streams_have_names(sampler, stream):
    with pytest.raises(TypeError, match=f"a stream has a name, .*; got {stream!r}"):
        sampler.with_stream(stream)


def test_numbers_of_numpy_are_numbers():
    sampler = Sinusoid(amplitude=np.array([1, 2]), noise=np.float32(0.5), shots=np.int64(3))
    assert sampler.sample(0, 2).support_x.shape == (2, 3, 1)
    assert json.loads(json.dumps(sampler.describe()))["amplitude"] == [1, 2]


def test_alphabets_may_come_from_any_iterable(data_root):
    names = ["Angelic", "Avesta"]
    once = Omniglot(data_root, split="validation", ways=2, alphabets=(name for name in names))
    assert once.alphabets == names
    assert {name.split("/")[1] for name in once.characters} == set(names)
