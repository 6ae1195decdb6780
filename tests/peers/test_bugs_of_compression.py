"""Public reports about compressed gradients: what is fed back, for which entries, and whose state it is.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

import pytest
import torch

from metamom import Sign, TopK
from metamom.bias import EF14


def test_top_k_of_the_whole_gradient_or_of_each_layer():
    """grace 9: compression of the whole update was that of each layer, which is another operator."""
    g, sizes = torch.tensor([5.0, -4.0, 3.0, 0.5, -0.25, 0.125]), [3, 3]
    assert TopK(2)(g, sizes=sizes).tolist() == [5.0, -4.0, 0, 0, 0, 0]
    assert TopK(1, per_tensor=True)(g, sizes=sizes).tolist() == [5.0, 0, 0, 0.5, 0, 0]


def test_signs_with_error_feedback_use_their_memory():
    """grace 10: EF-SignSGD never used its residual.

    The magnitude is the mean of |p|: 2 for (3, -1), and the error (1, 1) is added to the next gradient.
    """
    operator = EF14(Sign())
    assert operator(torch.tensor([3.0, -1.0])).tolist() == [2.0, -2.0]
    assert operator(torch.tensor([3.0, -1.0])).tolist() == [2.0, 0.0]  # p = (4, 0)


def test_what_is_held_back_is_sent_later():
    """grace 19: why a memory, and does it accumulate? What was sent and what is kept are the sum of all gradients."""
    operator, generator = EF14(TopK(1)), torch.Generator().manual_seed(0)
    sent = total = torch.zeros(5, dtype=torch.float64)
    for _ in range(20):
        g = torch.randn(5, generator=generator, dtype=torch.float64)
        total, sent = total + g, sent + operator(g)
    (kept,) = operator.state.values()
    assert kept.any()
    torch.testing.assert_close(sent + kept.flatten(), total)
    operator = EF14(TopK(1))  # a small entry that is always the same is sent once it has become the largest
    rows = [operator(torch.tensor([1.0, 0.3])).tolist() for _ in range(5)]
    assert [row[1] > 0 for row in rows] == [False, False, False, True, False]
    assert rows[3] == pytest.approx([0, 1.2])


def test_the_memory_belongs_to_a_worker_not_to_a_call():
    """grace 7: "compensate() missing 1 required positional argument: 'name'", since a memory went by names.

    flower 1910, 2033, 2216: is client 1 of this round client 1 of the last? Clients' states had to go through files.
    """
    operator, g = EF14(TopK(1)), torch.tensor([[1.0, 0.75]])
    assert [operator(g, workers=[client]).tolist() for client in (0, 1, 0, 7, 1)] == [
        [[1.0, 0.0]],
        [[1.0, 0.0]],
        [[0.0, 1.5]],
        [[1.0, 0.0]],  # who comes later starts with no error
        [[0.0, 1.5]],
    ]
