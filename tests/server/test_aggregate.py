"""From the workers' gradients to one: operators before the mean, robust means after them, and what is reported."""

from __future__ import annotations

import math

import pytest
import torch
from operators import LAYERWISE, PLAIN, QUIET, each
from torch import Tensor

from metamom import Clip, Identity, TopK
from metamom.bias import EF21, NonFiniteError
from metamom.server.aggregate import Aggregation, aggregate, flatten, unflatten
from metamom.server.robust import robust_mean


def workers_gradients(n: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"b": (2, 3), "a": (), "c": (4,)}
    return {name: torch.randn(n, *shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("n", [1, 2])
def test_a_mean_is_not_a_view_of_the_gradients(n):
    """It may be scaled or clipped in place."""
    grads = torch.arange(3.0 * n).reshape(n, 3)
    total, report = aggregate(grads)
    assert total.tolist() == [sum(range(i, 3 * n, 3)) / n for i in range(3)]
    assert report["grad_norm"] == pytest.approx(math.sqrt(sum(value**2 for value in total.tolist())))
    total.zero_()
    assert grads.flatten().tolist() == [*range(3 * n)]


def test_flatten_keeps_the_order_of_the_dict():
    grads = workers_gradients()
    flat = flatten(grads.values())
    assert flat.shape == (3, 11)
    for i in range(3):
        assert flat[i].tolist() == [*grads["b"][i].flatten().tolist(), grads["a"][i].item(), *grads["c"][i].tolist()]
        back = unflatten(flat[i], {name: g[i] for name, g in grads.items()})
        assert list(back) == ["b", "a", "c"]
        assert all(torch.equal(back[name], grads[name][i]) for name in grads)
    rows = unflatten(flat, {name: g[0] for name, g in grads.items()})
    assert all(torch.equal(rows[name], grads[name]) for name in grads)


@pytest.mark.parametrize("bias", [None, *PLAIN], ids=repr)
def test_aggregate_is_the_mean_after_the_operator(bias):
    grads = flatten(workers_gradients().values())
    before = grads.clone()
    total, report = aggregate(grads, bias)
    rows = [row if bias is None else bias(row) for row in grads]
    expected = sum(rows) / len(rows)
    mean = grads.mean(0)
    torch.testing.assert_close(total, expected)
    assert torch.equal(grads, before)
    assert report["grad_norm"] == pytest.approx(float(expected.norm()))
    assert report["bias_error"] == pytest.approx(float((expected - mean).norm() / mean.norm()), abs=1e-14)
    assert report["wire_bytes"] == 3 * (bias or Identity()).wire_bytes(11, 8)


@each(LAYERWISE)
def test_operators_on_layers_get_their_sizes(operator):
    grads = flatten(workers_gradients().values())
    operator.reset()
    total, report = aggregate(grads, operator, sizes=[6, 1, 4])
    torch.testing.assert_close(total, operator(grads, step=0, sizes=[6, 1, 4]).mean(0))
    assert report["wire_bytes"] == 3 * operator.wire_bytes(11, 8, [6, 1, 4])
    with pytest.raises(ValueError, match="pass sizes="):
        aggregate(grads, operator)


@pytest.mark.parametrize("how", ["median", "trimmed:0.34", "geomedian"])
@pytest.mark.parametrize("bias", [None, TopK(2)], ids=repr)
def test_robust_means_come_after_the_operator(bias, how):
    grads = flatten(workers_gradients(5).values())
    total, report = aggregate(grads, bias, how)
    expected = robust_mean(grads if bias is None else bias(grads), how)
    assert torch.equal(total, expected)
    error = (expected - grads.mean(0)).norm() / grads.mean(0).norm()
    assert error > 0.01
    assert report["bias_error"] == pytest.approx(float(error))


def test_operators_act_before_the_mean():
    """Two workers that agree on nothing: clipped one by one they cancel, clipped together they would not."""
    total, report = aggregate(torch.tensor([[8.0, 0.0], [-2.0, 0.0]]), Clip(1.0))
    assert total.tolist() == [0.0, 0.0]
    assert report["bias_error"] == 1.0


def test_a_function_in_place_hides_no_error():
    for workers in (1, 2):
        total, report = aggregate(torch.tensor([[4.0, 0.0]] * workers), lambda g: g.div_(2))
        assert total.tolist() == [2.0, 0.0]
        assert report["bias_error"] == 0.5


@each(QUIET)
def test_nothing_has_no_error(operator):
    operator.reset()
    report = aggregate(torch.zeros(2, 11), operator, sizes=[6, 1, 4])[1]
    assert (report["bias_error"], report["grad_norm"]) == (0.0, 0.0)


def test_what_is_not_finite():
    """Without an operator it stays visible in the gradient; an operator refuses it."""
    bad = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    total, report = aggregate(bad)
    assert math.isnan(report["grad_norm"])
    assert not bool(total.isfinite().all())
    for bias in (TopK(1), Clip(1.0), lambda g: g, EF21(TopK(1))):
        with pytest.raises(NonFiniteError, match="the first in row 1"):
            aggregate(bad, bias)


def test_each_dtype_comes_back_as_it_was():
    grads = {"a": torch.ones(2, 3, dtype=torch.float32), "b": torch.ones(2, 3, dtype=torch.float64)}
    total = unflatten(aggregate(flatten(grads.values()), Clip(1.0))[0], {name: g[0] for name, g in grads.items()})
    assert {name: t.dtype for name, t in total.items()} == {"a": torch.float32, "b": torch.float64}


@pytest.mark.parametrize("bias", [None, Clip(1.0), EF21(TopK(k=1))], ids=str)
class TestEachWorkerIsAddedOnce:
    """Anything else would divide by the wrong number of workers."""

    ROWS = torch.eye(3)

    def test_a_row_for_each_worker(self, bias):
        server = Aggregation(3, bias)
        with pytest.raises(ValueError, match="2 rows, 3 workers"):
            server.add(self.ROWS[:2], range(3))
        server.add(self.ROWS[:1], [0])
        server.add(self.ROWS[1:], [1, 2])
        server.finish()

    def test_too_many(self, bias):
        server = Aggregation(3, bias)
        server.add(self.ROWS[:2], [0, 1])
        with pytest.raises(ValueError, match="2 workers when 1 were left"):
            server.add(self.ROWS[1:], [1, 2])

    def test_too_few(self, bias):
        server = Aggregation(3, bias)
        server.add(self.ROWS[:2], [0, 1])
        with pytest.raises(ValueError, match="1 are missing"):
            server.finish()

    def test_absent_workers_are_not_waited_for(self, bias):
        server = Aggregation(3, bias, present=[0, 2])
        server.add(self.ROWS[[0, 2]], [0, 2])
        server.finish()
