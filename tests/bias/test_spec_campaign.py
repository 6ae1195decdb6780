"""Thousands of odd SPECs: each is an operator that its own spelling makes again, or one short ValueError."""

from __future__ import annotations

import random

import pytest
from fuzzing import bounded, campaign

from metamom.bias import EF14, BiasOperator, TopK, parse
from metamom.bias.spec import LONGEST, MOST
from metamom.cli.app import main

PIECES = (
    "none", "topk", "randk", "clip", "clipvalue", "normalize", "sign", "qsgd", "clip21", "ef14", "ef21", "ef21-sgdm",
    "ef21-sgdm(0.1)", ":", ":", ":", "+", "+", "%", "tensor", "all", "scaled", "shared", "seed=", "seed=7", "(", ")",
    "0", "1", "5", "5%", "0.1", "1e-3", "1e+3", "1e999", "1e-999", "-1", "1_000", "nan", "inf", "١٢", "５", "²", " ",
    "\n", "\u2028", "\u200b", "\u00a0", "\x00", "\x1b[31m", "\ud800", "-", "--", "=", ".", ",", "9" * 5000, "0" * 90,
)  # fmt: skip
WHOLE = ("topk:5%", "randk:7:scaled:seed=3", "clip:1+topk:5%", "ef14:sign", "ef21-sgdm(0.1):topk:1%", "qsgd:16:tensor")


def odd_spec(rng: random.Random) -> str:
    """Pieces of SPECs in any order, a good one with one fault, or one many times over."""
    kind = rng.choice(("pieces", "pieces", "fault", "fault", "longer"))
    if kind == "pieces":
        return "".join(rng.choices(PIECES, k=rng.randrange(8)))
    good = rng.choice(WHOLE)
    if kind == "longer":
        return rng.choice(("", "ef14:", "ef21:")) + rng.choice(("+", ":", "ef14:", "")).join(
            [good] * rng.choice((2, 19, 5000))
        )
    at = rng.randrange(len(good) + 1)
    return good[:at] + rng.choice(PIECES) + good[at + rng.randrange(2) :]


@campaign(few=60, many=9500)
def test_every_spec_is_an_operator_or_one_clear_error(seeds: range) -> None:
    with bounded(seconds=60):
        for seed in seeds:
            operator, said = parsed(odd_spec(random.Random(seed)))
            assert len(said) < 1500, seed
            assert said.isprintable(), seed
            if operator is not None:
                assert parse(operator.spec) == operator, seed
                assert operator.spec.isascii(), seed
                assert operator.spec.isprintable(), seed


def parsed(spec: str) -> tuple[BiasOperator | None, str]:
    """The operator, or what the ValueError says."""
    try:
        return parse(spec), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize(
    "spec", ["ef14:" * 5000 + "sign", "ef14:" + "sign+ef14:" * 200 + "sign", "sign+" * 5000 + "sign"]
)
def test_nothing_nests_without_end(spec: str) -> None:
    with pytest.raises(ValueError, match="bias operator") as caught:
        parse(spec)
    assert len(str(caught.value)) < 500


def test_the_longest_composition_parses_again() -> None:
    operator = parse(
        "+".join(["randk:0.00000000000000000001234567890123456%:scaled:shared:tensor:seed=18446744073709551615"] * MOST)
    )
    assert len(operator.spec) <= LONGEST
    assert parse(operator.spec) == operator
    with pytest.raises(ValueError, match=f"at most {MOST} operators; got {MOST + 1}"):
        parse(operator.spec + "+sign")


def test_the_smallest_shares_keep_a_short_spelling() -> None:
    operator = EF14(TopK(ratio=5e-324))
    assert operator.spec == "ef14:topk:5E-322%"
    assert parse(operator.spec) == operator


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--bias=--", "argument --bias: expected a value; got '--'"),
        ("--lr=--", "argument --lr: expected a value; got '--'"),
        ("--bias=topk:5%\u2028", r"'\u2028' as its character 8"),
        ("--bias=topk:\u0661\u0662", r"'\u0661' as its character 6"),
        ("--bias=topk:1_000", "got '1_000'"),
        ("--bias=" + "ef14:" * 5000 + "sign", "at most 3000 characters; got 25004"),
    ],
    ids=["dashes", "other dashes", "line separator", "other digits", "underscore", "nested"],
)
def test_the_command_line_refuses_odd_specs_in_a_line(flag, message, tmp_path, capsys):
    try:
        status = main(["train", "sinusoid", flag, "--iterations", "1", "--run-dir", str(tmp_path / "run")])
    except SystemExit as error:  # by argparse
        status = error.code
    assert status == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert len(said) < 600
    assert not (tmp_path / "run").exists()
