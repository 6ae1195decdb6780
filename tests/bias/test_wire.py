"""Messages: what a worker sends says exactly what its operator leaves, in as many bytes as promised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import FEEDBACK, STATELESS, G, assert_identical, cut, each, each_dtype, gradients

from metamom import MARINA, QSGD, Clip, Compose, Identity, RandK, Sign, TopK
from metamom.bias.packing import digits_in_byte, pack, packed_bytes, unpack
from metamom.bias.select import INTEGERS


@each(STATELESS)
@settings(deadline=None, max_examples=8)
@given(g=gradients(rows=3), step=st.integers(0, 2**40))
def test_messages_say_exactly_what_the_operator_leaves(operator, g, step):
    d = g.shape[-1]
    for i, row in enumerate(g):
        message = operator.encode(row, step=step, worker=i, sizes=cut(d))
        assert message.dtype is torch.uint8
        least = operator.wire_bytes(d, g.element_size(), cut(d))
        assert len(message) == least or (len(message) > least and getattr(operator, "ties", "index") == "all")
        out = operator(row, step=step, workers=[i], sizes=cut(d))
        assert_identical(operator.decode(message, d, g.dtype, sizes=cut(d)), out)


@pytest.mark.parametrize("operator", [Identity(), TopK(1), RandK(1, scaled=True), Sign(), QSGD(1), QSGD(200)])
def test_a_message_of_one_entry(operator):
    for value in (-1.5, 0.0, -0.0):
        g = torch.tensor([value])
        assert_identical(operator.decode(operator.encode(g), 1, g.dtype), operator(g))


@each([TopK(2), Sign(), QSGD(3), Identity(), Compose(TopK(2), Sign())])
def test_messages_leave_the_gradient_alone(operator):
    g = G.clone()
    operator.encode(g).zero_()
    message = operator.encode(g)
    operator.decode(message, 4, g.dtype).zero_()
    assert torch.equal(g, G)
    assert torch.equal(message, operator.encode(g))


@each([TopK(2), Sign(), QSGD(3), Identity()])
def test_messages_of_another_length(operator):
    message = operator.encode(G)
    for bad in (message[:-1], message.to(torch.int16), message.unsqueeze(0)):
        with pytest.raises(ValueError, match=rf"sends {len(message)} bytes for 4 entries of torch.float64; got"):
            operator.decode(bad, 4, G.dtype)
    with pytest.raises(ValueError, match=r"one worker's gradient \[d\]; got shape \(2, 4\)"):
        operator.encode(G.repeat(2, 1))


@each([TopK(3), TopK(3, ties="all"), TopK(1, per_tensor=True), RandK(3), RandK(3, scaled=True)])
@each_dtype
def test_indices_that_are_none(operator, dtype):
    d, sizes = 10, [3, 3, 4]
    good = operator.encode(torch.arange(1.0, 11).to(dtype), sizes=sizes)
    operator.decode(good, d, dtype, sizes=sizes)
    for index in (-1, d, 2**31 - 1, -(2**31)):
        message = good.clone()
        message[4:8] = torch.tensor([index], dtype=torch.int32).view(torch.uint8)
        with pytest.raises(ValueError, match=r"holds indices outside 0\.\.9\. It is damaged, or of another operator"):
            operator.decode(message, d, dtype, sizes=sizes)
    with pytest.raises(ValueError, match=r"indices outside 0\.\.4"):  # as many bytes for fewer entries
        TopK(3).decode(TopK(3).encode(torch.arange(1.0, 11).to(dtype)), 5, dtype)
    message = good.clone()
    message[4:8] = message[:4]
    with pytest.raises(ValueError, match="holds an index twice"):
        operator.decode(message, d, dtype, sizes=sizes)


@each(STATELESS)
@each_dtype
def test_messages_of_values_that_are_not_finite(operator, dtype):
    g = torch.arange(1.0, 8).to(dtype)
    size = operator.wire_bytes(7, g.element_size(), cut(7))
    with pytest.raises(ValueError, match="It is damaged, or of another operator, size or dtype"):
        operator.decode(torch.full((size,), 255, dtype=torch.uint8), 7, dtype, sizes=cut(7))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each([TopK(2), RandK(2), Identity(), Sign(), QSGD(2)])
@each_dtype
def test_one_value_that_is_not_finite(operator, dtype, value):
    message = operator.encode(G.to(dtype))
    wide = torch.promote_types(dtype, torch.float32) if isinstance(operator, QSGD) else dtype
    bad = torch.tensor([value], dtype=wide).view(torch.uint8)
    start = 8 if isinstance(operator, TopK | RandK) else 0
    message[start : start + len(bad)] = bad
    with pytest.raises(ValueError, match="values that are infinite or NaN"):
        operator.decode(message, 4, dtype)


def test_what_has_no_message():
    for operator in FEEDBACK:
        with pytest.raises(ValueError, match="has a state: encode what its operator"):
            operator.encode(G)


@settings(deadline=None, max_examples=40)
@given(g=gradients(min_d=2), layers=st.booleans(), k=st.integers(1, 2))
def test_messages_with_all_ties_hold_what_is_kept(g, layers, k):
    """An index and a value for each kept entry that is not zero, and never fewer than K of them."""
    sizes = cut(g.shape[-1]) if layers else [g.shape[-1]]
    k = min(k, *(size for size in sizes if size))
    operator, least = TopK(k, per_tensor=layers, ties="all"), k * sum(size > 0 for size in sizes)
    for row in g.reshape(-1, g.shape[-1]):
        parts = [part for part in row.split(sizes) if len(part)]
        kept = sum(int((part.abs() >= part.abs().sort().values[-k]).sum()) for part in parts)
        whole = operator(row, sizes=sizes)
        message = operator.encode(row, sizes=sizes)
        entries, rest = divmod(len(message), row.element_size() + 4)
        assert rest == 0
        assert entries == max(least, int((whole.view(INTEGERS[row.element_size()]) != 0).sum()))
        assert least <= entries <= max(least, kept)
        assert operator.wire_bytes(len(row), row.element_size(), sizes) == least * (row.element_size() + 4)
        assert_identical(operator.decode(message, len(row), row.dtype, sizes=sizes), whole)


def test_as_many_bytes_as_there_are_ties():
    ties = torch.tensor([1.0, -1.0, 0.5, 1.0, 0.0])
    for operator, count in ((TopK(2), 2), (TopK(2, ties="all"), 3), (TopK(4, ties="all"), 4), (TopK(5, ties="all"), 5)):
        assert len(operator.encode(ties)) == 8 * count
    with pytest.raises(ValueError, match=r"sends 16 bytes or more for 5 entries of torch\.float32; got"):
        TopK(2, ties="all").decode(torch.zeros(20, dtype=torch.uint8), 5, torch.float32)
    with pytest.raises(ValueError, match="sends 16 bytes or more"):
        TopK(2, ties="all").decode(torch.zeros(8, dtype=torch.uint8), 5, torch.float32)


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_bytes_written_out(element_size):
    size = element_size
    for dense in (Identity(), Clip(1.0), Clip(1.0, per_tensor=True)):
        assert dense.wire_bytes(10, size, [3, 7]) == 10 * size
    for sparse in (TopK(3), RandK(3), TopK(ratio=0.3), Compose(Sign(), TopK(3))):
        assert sparse.wire_bytes(10, size) == 3 * (size + 4)
    assert TopK(2, per_tensor=True).wire_bytes(10, size, [3, 0, 7]) == 2 * 2 * (size + 4)
    assert Sign().wire_bytes(11, size) == size + 3  # five digits of three values in a byte
    assert QSGD(1).wire_bytes(11, size) == max(4, size) + 3
    assert QSGD(7).wire_bytes(11, size) == max(4, size) + 6  # two of 15 values
    assert QSGD(8).wire_bytes(11, size) == max(4, size) + 11
    assert QSGD(127).wire_bytes(11, size) == max(4, size) + 11
    assert QSGD(128).wire_bytes(11, size) == max(4, size) + 22
    assert QSGD(2**15).wire_bytes(11, size) == max(4, size) + 44


@each(FEEDBACK)
def test_feedback_costs_what_its_operator_does(operator):
    mark = isinstance(operator, MARINA)  # a byte that says whether the gradient is whole
    assert operator.wire_bytes(10, 4, cut(10)) == operator.operator.wire_bytes(10, 4, cut(10)) + mark


@settings(deadline=None, max_examples=50)
@given(
    base=st.sampled_from([2, 3, 4, 5, 6, 7, 15, 16, 17, 255, 256, 257, 2**16 - 1, 2**16 + 1, 2**31 - 1]), data=st.data()
)
def test_digits_survive_packing(base, data):
    digits = torch.tensor(data.draw(st.lists(st.integers(0, base - 1), min_size=1, max_size=30)))
    message = pack(digits, base)
    assert message.dtype is torch.uint8
    assert len(message) == packed_bytes(len(digits), base)
    assert torch.equal(unpack(message, len(digits), base), digits)


@pytest.mark.parametrize(("base", "digits"), [(2, 8), (3, 5), (4, 4), (6, 3), (7, 2), (16, 2), (17, 1), (256, 1)])
def test_as_many_digits_in_a_byte_as_fit(base, digits):
    assert digits_in_byte(base) == digits
    assert base**digits <= 256 < base ** (digits + 1)
