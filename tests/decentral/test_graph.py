"""Mixing matrices: doubly stochastic, with gaps in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom.decentral import check_mixing, complete, metropolis, ring, ring_gap, spectral_gap, torus, torus_gap
from metamom.decentral.graph import neighbours

GRAPHS = {
    **{f"ring {n}": ring(n) for n in (1, 2, 3, 4, 5, 8, 17)},
    **{f"torus {r} x {c}": torus(r, c) for r, c in ((1, 1), (2, 2), (2, 3), (3, 3), (4, 4), (3, 5))},
    **{f"complete {n}": complete(n) for n in (1, 2, 7)},
}


@st.composite
def connected(draw: st.DrawFn) -> torch.Tensor:
    """The adjacency of a graph in one part: a random tree, and more edges."""
    n = draw(st.integers(1, 9))
    linked = torch.zeros(n, n, dtype=torch.bool)
    for i in range(1, n):
        linked[i, draw(st.integers(0, i - 1))] = True
    for i, j in draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8)):
        linked[i, j] = True
    return linked | linked.T


@settings(max_examples=60, deadline=None)
@given(connected())
def test_metropolis_weights_of_any_graph(linked):
    weights = metropolis(linked)
    degree = (linked & ~torch.eye(len(linked), dtype=torch.bool)).sum(1).tolist()
    for i in range(len(linked)):
        for j in range(len(linked)):
            if i != j:
                wanted = 1 / (1 + max(degree[i], degree[j])) if linked[i, j] else 0.0
                assert float(weights[i, j]) == pytest.approx(wanted, abs=1e-15)
    assert torch.equal(weights, weights.T)
    assert float(weights.min()) >= -1e-15
    torch.testing.assert_close(weights.sum(1), torch.ones(len(linked), dtype=torch.float64), rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(weights)  # in ascending order; the last is 1
    second = float(eigenvalues[:-1].abs().max()) if len(linked) > 1 else 0.0
    assert spectral_gap(weights) == pytest.approx(1 - second, abs=1e-12)
    assert spectral_gap(check_mixing(weights)) > 0
    assert neighbours(weights) == [[j for j in range(len(row)) if j != i and row[j]] for i, row in enumerate(linked)]


@settings(max_examples=30, deadline=None)
@given(connected(), st.integers(0, 2**31))
def test_one_step_of_mixing_keeps_the_mean_and_shrinks_differences_by_the_gap(linked, seed):
    weights = metropolis(linked)
    x = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = weights @ x
    torch.testing.assert_close(mixed.mean(0), x.mean(0), rtol=0, atol=1e-14)
    before, after = ((each - x.mean(0)).norm() for each in (x, mixed))
    assert float(after) <= (1 - spectral_gap(weights)) * float(before) + 1e-13


@pytest.mark.parametrize("name", GRAPHS)
def test_named_graphs_are_metropolis_weights_of_their_edges(name):
    weights = GRAPHS[name]
    torch.testing.assert_close(weights, metropolis(weights > 0), rtol=0, atol=1e-15)
    assert check_mixing(weights) is not None


def test_rings_by_hand():
    third = 1 / 3
    wanted = [[third, third, 0, third], [third, third, third, 0], [0, third, third, third], [third, 0, third, third]]
    torch.testing.assert_close(ring(4), torch.tensor(wanted, dtype=torch.float64))
    assert ring(2).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert ring(1).tolist() == [[1.0]]


@pytest.mark.parametrize("n", [3, 4, 5, 6, 9, 16, 33])
def test_the_gap_of_a_ring(n):
    closed_form = 1 - (1 / 3 + 2 / 3 * math.cos(2 * math.pi / n))
    assert ring_gap(n) == pytest.approx(closed_form, abs=1e-12)
    assert spectral_gap(ring(n)) == pytest.approx(closed_form, abs=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (3, 4), (4, 4), (5, 7), (1, 2), (2, 2), (2, 5), (1, 1)])
def test_the_gap_of_a_torus(rows, columns):
    assert spectral_gap(torus(rows, columns)) == pytest.approx(torus_gap(rows, columns), abs=1e-12)
    if min(rows, columns) >= 3:
        closed_form = 2 / 5 * (1 - math.cos(2 * math.pi / max(rows, columns)))
        assert torus_gap(rows, columns) == pytest.approx(closed_form, abs=1e-12)


def test_the_gap_of_a_complete_graph_and_of_one_worker_is_one():
    assert [spectral_gap(complete(n)) for n in (1, 2, 5)] == pytest.approx([1, 1, 1], abs=1e-12)
    assert ring_gap(1) == ring_gap(2) == 1


def test_a_directed_ring_is_a_mixing_matrix_too():
    weights = (torch.eye(4) + torch.eye(4).roll(1, 1)) / 2
    assert torch.equal(check_mixing(weights), weights.double())
    assert neighbours(weights) == [[1], [2], [3], [0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ring(0), "the number of workers must be >= 1; got 0"),
        (lambda: ring(2.5), "the number of workers must be a whole number"),
        (lambda: torus(0, 3), "rows must be >= 1"),
        (lambda: torus(100, 100), "at most 4,096; got 10000"),
        (lambda: complete(True), "must be a whole number"),
        (lambda: metropolis([[0, 1], [1, 0]]), "must be a tensor"),
        (lambda: metropolis(torch.ones(2, 3)), r"must be \[n, n\]"),
        (lambda: metropolis(torch.tensor([[0, 1], [0, 0]])), "must be symmetric"),
        (lambda: metropolis(torch.zeros(2, 2)), "in several parts"),
        (lambda: check_mixing(torch.eye(2)), "never brings all workers together: its spectral gap is 0"),
        (lambda: check_mixing(torch.eye(2).flip(0)), "never brings all workers together"),
        (lambda: check_mixing(torch.tensor([[0.5, 0.5], [0.4, 0.6]]).double()), "column 0 sums to 0.9"),
        (
            lambda: check_mixing(torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.25], [0.25, 0.25, 0.75]]).double()),
            "row 1 sums to 0.75",
        ),
        (lambda: spectral_gap(torch.full((2, 2), math.nan)), "column 0 sums to nan"),
    ],
)
def test_errors(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
