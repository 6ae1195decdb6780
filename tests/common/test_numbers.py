"""Numbers as users write them, against those that only Python takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import loop_over

from metamom.common.numbers import real, shown, whole

NEITHER = [
    "", " ", "x", "1_000", "١٢", "１２", "²", "½", "1\n", "\t1", "1\u2028", "\u00a01", "1\u200b", "1\x00", "- 1", "--1",
    "+-1", "0x10", "1e", "e5", "1e1_0", ".", "1,000", "1 000", "nan", "inf", "-Infinity", "1" * 101, "1" * 1_000_000,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("-3", -3), ("+12", 12), ("007", 7), (" 5 ", 5), ("9" * 20, 10**20 - 1)]
)
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0),
        ("5", 5.0),
        ("-0.1", -0.1),
        (".5", 0.5),
        ("5.", 5.0),
        ("1e-3", 1e-3),
        ("1E+3", 1e3),
        (" 2 ", 2.0),
        ("1e-999", 0.0),
    ],
)
def test_real_numbers(text: str, value: float) -> None:
    assert real(text) == value


@loop_over(text=NEITHER, parse=(whole, real))
def test_what_is_no_plain_number_is_refused_in_few_words(text: str, parse: Callable[[str], float]) -> None:
    with pytest.raises(ValueError, match="digits 0 to 9") as caught:
        parse(text)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["1.0", "1e3", ".5"])
def test_a_whole_number_has_no_point_and_no_exponent(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        whole(text)


def test_a_number_beyond_a_float_is_refused() -> None:
    with pytest.raises(ValueError, match="1e999"):
        real("1e999")


def test_long_text_is_shown_by_its_ends() -> None:
    assert shown("a\u2028") == r"'a\u2028'"
    assert shown("a" * 500 + "b" * 500) == f"'{'a' * 30}'...'{'b' * 30}' (1000 characters)"
