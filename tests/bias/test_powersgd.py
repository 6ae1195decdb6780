"""PowerSGD: a worked example, the best rank-r matrix, its contraction, what it keeps, and the authors' recurrence."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_identical, each, each_dtype
from torch import Tensor

from metamom import PowerSGD, TopK
from metamom.bias import EF14, EF21, Compose, Layout, NonFiniteError
from metamom.bias.coordinates import Coordinates
from metamom.bias.powersgd import power_step
from metamom.bias.warm import START

LAYOUT = Layout([(4,), (6, 5), (3, 2, 4), (2, 2), (3, 0), ()])  # matrices [6, 5] and [3, 8]; [2, 2] is not shorter
D = sum(LAYOUT)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_matrix(matrix: Tensor) -> tuple[Tensor, Layout]:
    return matrix.flatten(), Layout([tuple(matrix.shape)])


def applied(operator: PowerSGD, matrix: Tensor, **place: int) -> Tensor:
    g, layout = of_matrix(matrix)
    return operator(g, sizes=layout, **place).view_as(matrix)


def test_by_hand():
    """M = [[2, 0], [0, 1]] from (1, 1): M start = (2, 1), P = (2, 1)/sqrt 5, Q = (4, 1)/sqrt 5."""
    matrix = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    p, q = power_step(matrix, torch.ones(2, 1, dtype=torch.float64))
    torch.testing.assert_close(p @ q.T, torch.tensor([[1.6, 0.4], [0.8, 0.2]], dtype=torch.float64))
    error = float((p @ q.T - matrix).square().sum())
    assert error == pytest.approx(5 - 17 / 5)  # ||M||^2 - ||Q||^2
    second, _ = power_step(matrix, q)
    torch.testing.assert_close(second.abs(), torch.tensor([[8.0], [1.0]], dtype=torch.float64) / 65**0.5)


def test_the_authors_recurrence():
    """A slow twin with error feedback: P = M Q, orthogonalised by Gram and Schmidt, Q = M^T P, e = M - P Q^T."""
    operator, plain = EF14(PowerSGD(2)), PowerSGD(2)
    matrices = [normal(6, 5, seed=step) for step in range(4)]
    layout, error, q = Layout([(6, 5)]), torch.zeros(6, 5, dtype=torch.float64), None
    for step, gradient in enumerate(matrices):
        wanted = gradient + error
        if q is None:  # the first start is drawn
            state = plain.transition(wanted.view(1, -1), plain.current_state(), Coordinates(step, [0]), layout)[1]
            out = plain(wanted.flatten(), sizes=layout, step=step).view(6, 5)
            q = state.workers[0][START][:10].view(5, 2)  # its columns' norms are one; the span is the same
        else:
            p = wanted @ q
            for column in range(2):
                for other in range(column):
                    p[:, column] -= (p[:, other] @ p[:, column]) * p[:, other]
                p[:, column] /= p[:, column].norm()
            q = wanted.T @ p
            out = p @ q.T
        error = wanted - out
        ours = operator(gradient.flatten(), sizes=layout).view(6, 5)
        torch.testing.assert_close(ours, out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.state["error"][0].view(6, 5), error, rtol=1e-10, atol=1e-10)


def test_on_one_matrix_it_finds_the_best_approximation():
    """Warm starts make a power iteration: the error falls to that of the singular value decomposition."""
    matrix = normal(7, 5) @ torch.diag(torch.tensor([8.0, 4.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    best = float(torch.linalg.svdvals(matrix)[2:].square().sum())
    operator = PowerSGD(2)
    errors = [float((applied(operator, matrix) - matrix).square().sum()) for _ in range(12)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 1.001 * best
    assert errors[-1] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (3, 8)])
@pytest.mark.parametrize("rank", [1, 2])
def test_matrices_of_that_rank_are_exact(shape, rank):
    matrix = normal(shape[0], rank) @ normal(rank, shape[1], seed=1)
    for operator in (PowerSGD(rank), PowerSGD(rank, fresh=True), PowerSGD(2)):
        torch.testing.assert_close(applied(operator, matrix), matrix, rtol=1e-10, atol=1e-10)


def test_a_rank_that_does_not_compress_sends_everything():
    matrix = normal(6, 5)
    for rank in (3, 5, 100):
        assert_identical(applied(PowerSGD(rank), matrix), matrix)
        assert PowerSGD(rank).wire_bytes(30, 8, Layout([(6, 5)])) == 240
        assert PowerSGD(rank, fresh=True).contraction(30, Layout([(6, 5)])) == 1
    assert PowerSGD(2).wire_bytes(30, 8, Layout([(6, 5)])) == 8 * 2 * 11


@settings(deadline=None, max_examples=20)
@given(a=st.integers(3, 8), b=st.integers(4, 8), rank=st.integers(1, 2), seed=st.integers(0, 1000))
def test_it_is_a_projection(a, b, rank, seed):
    """||C(M) - M||^2 = ||M||^2 - ||C(M)||^2, no less than the best error of this rank; idempotent on what it keeps."""
    matrix = normal(a, b, seed=seed)
    operator = PowerSGD(rank, fresh=True)
    out = applied(operator, matrix, step=seed)
    lost = float((out - matrix).square().sum())
    assert lost == pytest.approx(float(matrix.square().sum() - out.square().sum()), rel=1e-9, abs=1e-9)
    kept = rank if rank * (a + b) < a * b else min(a, b)
    assert lost >= float(torch.linalg.svdvals(matrix)[kept:].square().sum()) * (1 - 1e-9) - 1e-12
    torch.testing.assert_close(applied(operator, out, step=seed + 1), out, rtol=1e-8, atol=1e-8)


def test_its_contraction_in_the_mean():
    """Equal singular values attain r/k; unequal ones keep more. 400 draws, within five standard errors."""
    for matrix, attained in (
        (torch.eye(5, dtype=torch.float64), True),
        (torch.diag(torch.arange(1.0, 6).double()), False),
    ):
        g, layout = of_matrix(matrix)
        operator = PowerSGD(1, fresh=True)
        out = operator(g.expand(400, -1), sizes=layout, step=0)
        losses = (out - g).square().sum(1) / g.square().sum()
        error = 5 * float(losses.std()) / 400**0.5 + 1e-12
        wanted = 1 - operator.contraction(25, layout)
        assert wanted == 1 - 1 / 5
        assert float(losses.mean()) <= wanted + error
        assert (abs(float(losses.mean()) - wanted) <= error) is attained
    assert PowerSGD(1, fresh=True).contraction(D, LAYOUT) == 1 / 5
    assert PowerSGD(1, fresh=True).constants(D, zeta2=2.0, sizes=LAYOUT) == pytest.approx((0.8, 1.6, 0, 0))
    with pytest.raises(ValueError, match="no constants are known for powersgd:1"):
        PowerSGD(1).constants(D, sizes=LAYOUT)


def test_other_tensors_are_sent_as_they_are():
    g = normal(D)
    out = PowerSGD(1)(g, sizes=LAYOUT)
    for part, whole, shape in zip(out.split(list(LAYOUT)), g.split(list(LAYOUT)), LAYOUT.shapes, strict=True):
        if shape in {(6, 5), (3, 2, 4)}:
            rows = part.view(shape[0], -1)
            assert int(torch.linalg.matrix_rank(rows)) == 1
            assert not torch.equal(part, whole)
        else:
            assert_identical(part, whole)
    assert PowerSGD(1).wire_bytes(D, 4, LAYOUT) == 4 * (4 + 11 + 11 + 4 + 0 + 1)


def test_workers_start_where_they_stopped_alone_or_together():
    gs = [normal(3, D, seed=step) for step in range(3)]
    together, alone = PowerSGD(1), [PowerSGD(1) for _ in range(3)]
    for step, g in enumerate(gs):
        out = together(g, sizes=LAYOUT)
        for worker in (2, 0, 1):
            assert_identical(out[worker], alone[worker](g[worker], step=step, workers=[worker], sizes=LAYOUT))
    assert not torch.equal(out, PowerSGD(1)(gs[2], step=2, sizes=LAYOUT))  # nor is it a fresh draw


@each([PowerSGD(1), EF14(PowerSGD(2)), EF21(PowerSGD(1)), PowerSGD(1, fresh=True)])
def test_state_goes_through_a_file_and_over_processes(operator):
    operator.reset()
    gs = [normal(4, D, seed=step) for step in range(4)]
    for g in gs[:2]:
        operator(g, sizes=LAYOUT)
    file = io.BytesIO()
    torch.save(operator.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, halves = copy.deepcopy(operator), [copy.deepcopy(operator) for _ in range(2)]
    again.reset()
    again.load_state_dict(saved)
    for number, half in enumerate(halves):
        half.shard([2 * number, 2 * number + 1])
    for g in gs[2:]:
        wanted = operator(g, sizes=LAYOUT)
        assert_identical(again(g, sizes=LAYOUT), wanted)
        parts = [half(g[2 * i : 2 * i + 2], workers=[2 * i, 2 * i + 1], sizes=LAYOUT) for i, half in enumerate(halves)]
        assert_identical(torch.cat(parts), wanted)
    gathered = operator.gather([half.state_dict() for half in halves])
    again.load_state_dict(gathered)
    assert_identical(again(gs[0], sizes=LAYOUT), operator(gs[0], sizes=LAYOUT))
    operator.reset()


@each_dtype
def test_messages_are_what_the_call_leaves(dtype):
    g = normal(D).to(dtype)
    caller, sender = PowerSGD(1), PowerSGD(1)
    for step in range(3):
        [message] = sender.send(g.unsqueeze(0), step=step, workers=[0], sizes=LAYOUT)
        assert len(message) == sender.wire_bytes(D, dtype.itemsize, LAYOUT)
        out = caller(g, step=step, sizes=LAYOUT)
        assert_identical(sender.decode(message, D, dtype, sizes=LAYOUT), out)
    for bad, said in ((message[:-1], "sends .* bytes"), (torch.full_like(message, 255), "infinite or NaN")):
        with pytest.raises(ValueError, match=said):
            sender.decode(bad, D, dtype, sizes=LAYOUT)


@each_dtype
@pytest.mark.parametrize("magnitude", ["huge", "tiny"])
def test_huge_and_tiny_gradients(dtype, magnitude):
    finfo = torch.finfo(dtype)
    scale = finfo.max / 64 if magnitude == "huge" else finfo.smallest_normal * 64
    g = torch.outer(torch.tensor([1.0, -2.0, 4.0, 1.0]), torch.tensor([1.0, 0.5, -1.0, 2.0])).to(dtype) * scale
    out = applied(PowerSGD(1), g)
    torch.testing.assert_close(out.double() / scale, g.double() / scale, rtol=0, atol=0.1)
    with pytest.raises(NonFiniteError, match=r"powersgd:1 takes the finite gradient in row 0 .* range"):
        applied(PowerSGD(1), torch.full((40, 40), finfo.max, dtype=dtype))


def test_directions_that_vanish_are_drawn_again():
    """A matrix of rank 1 leaves the second direction to rounding; zero leaves both. Later matrices are found again."""
    operator, thin = PowerSGD(2), torch.outer(normal(6), normal(5, seed=1))
    applied(operator, thin)
    start = operator.current_state().workers[0][START][:10].view(5, 2)
    assert not bool(start[:, 1].any())
    assert float(start[:, 0].norm()) == pytest.approx(1)
    twice = torch.outer(normal(6, seed=2), normal(5, seed=3)) + thin
    torch.testing.assert_close(applied(operator, twice), twice, rtol=1e-9, atol=1e-9)
    assert not bool(applied(operator, torch.zeros(6, 5, dtype=torch.float64)).any())
    torch.testing.assert_close(applied(operator, twice), twice, rtol=1e-9, atol=1e-9)


def test_error_feedback_catches_up():
    """EF21's estimate of a constant gradient becomes exact, although no message is."""
    g, layout = of_matrix(normal(6, 5))
    operator = EF21(PowerSGD(1))
    for _ in range(60):
        out = operator(g, sizes=layout)
    torch.testing.assert_close(out, g, rtol=0, atol=1e-6)


def test_what_it_needs():
    g = normal(D)
    for sizes, got in ((None, "got none"), (list(LAYOUT), r"got sizes=\[4, 30")):
        with pytest.raises(ValueError, match=rf"pass sizes=metamom\.bias\.Layout\(.*{got}"):
            PowerSGD(1)(g, sizes=sizes)
    with pytest.raises(ValueError, match=f"add up to the gradient's {D} entries"):
        PowerSGD(1)(g, sizes=Layout([(4,)]))
    operator = PowerSGD(1)
    operator(g, sizes=LAYOUT)
    with pytest.raises(ValueError, match=f"keeps {D} entries of each worker; got gradients of 30"):
        operator(g[:30], sizes=Layout([(6, 5)]))
    for bad in ({"calls": 1, "workers": {0: {"error": g}}}, {"calls": 1, "workers": 3}):
        with pytest.raises(ValueError, match=r"powersgd:1 keeps (start of each worker|a dict of workers)"):
            operator.load_state_dict(bad)
    with pytest.raises(TypeError, match=r"without error feedback; got PowerSGD.*fresh=True"):
        Compose(TopK(1), PowerSGD(1))
    with pytest.raises(TypeError, match="error feedback goes around an operator without it"):
        EF14(EF21(PowerSGD(1)))


def test_a_layout_is_its_sizes_with_shapes():
    assert LAYOUT == (4, 30, 24, 4, 0, 1)
    for same in (pickle.loads(pickle.dumps(LAYOUT)), copy.deepcopy(LAYOUT)):
        assert same == LAYOUT
        assert same.shapes == LAYOUT.shapes
