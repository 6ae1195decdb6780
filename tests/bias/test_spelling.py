"""How operators are spelled: `spec`, `parse` and its errors."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import (
    EVERY,
    each,
)

import metamom.bias
from metamom import QSGD, Clip, ClipValue, Compose, Identity, Normalize, RandK, Sign, TopK
from metamom.bias import (
    DASHA,
    DIANA,
    EF14,
    EF21,
    EF21SGD2M,
    EF21SGDM,
    MARINA,
    MLMCQSGD,
    Block8,
    Clip21,
    Clip21SGD2M,
    GaussianNoise,
    MLMCTopK,
    Natural,
    PowerSGD,
    TernGrad,
    parse,
)
from metamom.bias.spec import spec_help, spellings
from metamom.bias.spelling import AROUND, SPELLINGS


@each(EVERY)
def test_spec_names_the_operator(operator):
    assert parse(operator.spec) == operator
    assert parse(f" {operator.spec} ") == operator


@each(EVERY)
def test_operators_are_values(operator):
    again = eval(repr(operator), vars(metamom.bias))
    assert again == operator
    assert hash(again) == hash(operator)
    assert [other == operator for other in EVERY].count(True) == 1
    assert len({*EVERY, again}) == len(EVERY)
    assert operator != operator.spec


@settings(deadline=None, max_examples=30)
@given(ratio=st.floats(1e-12, 1.0, exclude_min=True), x=st.floats(1e-300, 1e300), n=st.integers(1, 2**30 - 1))
def test_specs_lose_no_digit(ratio, x, n):
    for operator in (
        TopK(ratio=ratio),
        RandK(ratio=ratio, seed=n),
        TopK(n),
        Clip(x),
        ClipValue(x),
        QSGD(n),
        Clip21(x),
        EF21SGDM(Compose(Clip(x), TopK(n)), eta=ratio),
    ):
        assert parse(operator.spec) == operator


@pytest.mark.parametrize(
    ("spec", "operator"),
    [
        ("none", Identity()),
        ("topk:33500", TopK(33500)),
        ("topk:5%", TopK(ratio=0.05)),
        ("topk:0.1%", TopK(ratio=0.001)),
        ("topk:7%", TopK(ratio=0.07)),
        ("topk:100%", TopK(ratio=1.0)),
        ("topk:5%:tensor", TopK(ratio=0.05, per_tensor=True)),
        ("topk:5:all:tensor", TopK(5, per_tensor=True, ties="all")),
        ("randk:1%", RandK(ratio=0.01)),
        ("randk:7:scaled:shared:seed=3", RandK(7, scaled=True, shared=True, seed=3)),
        ("clip:1.0", Clip(1)),
        ("clip:1e-3", Clip(0.001)),
        ("clip:1e+3+topk:5%", Compose(Clip(1000), TopK(ratio=0.05))),
        ("clipvalue:0.01", ClipValue(0.01)),
        ("normalize", Normalize()),
        ("normalize:tensor", Normalize(per_tensor=True)),
        ("sign", Sign()),
        ("sign:tensor", Sign(per_tensor=True)),
        ("qsgd:16", QSGD(16)),
        ("clip:1+topk:5%", Compose(Clip(1.0), TopK(ratio=0.05))),
        ("clip:1+topk:5%+sign", Compose(Clip(1.0), TopK(ratio=0.05), Sign())),
        ("mlmc:topk:1%", MLMCTopK(ratio=0.01)),
        ("mlmc:topk:3:geometric=0.5:tensor:seed=7", MLMCTopK(3, geometric=0.5, per_tensor=True, seed=7)),
        ("mlmc:qsgd", MLMCQSGD()),
        ("clip:1+mlmc:qsgd:bits=4:geometric=1", Compose(Clip(1.0), MLMCQSGD(4, geometric=1))),
        ("natural", Natural()),
        ("natural:nearest", Natural(nearest=True)),
        ("natural:seed=7", Natural(seed=7)),
        ("terngrad:clip=2.5:tensor", TernGrad(clip=2.5, per_tensor=True)),
        ("block8", Block8()),
        ("powersgd:2:fresh:seed=7", PowerSGD(2, fresh=True, seed=7)),
        ("ef14:powersgd:2", EF14(PowerSGD(2))),
        ("ef21:block8:block=256:dynamic", EF21(Block8(256, dynamic=True))),
        ("clip:1+block8:random:seed=7", Compose(Clip(1.0), Block8(random=True, seed=7))),
        ("ef14:topk:1%", EF14(TopK(ratio=0.01))),
        ("ef21:topk:1%", EF21(TopK(ratio=0.01))),
        ("ef21-sgdm(0.1):topk:1%", EF21SGDM(TopK(ratio=0.01), eta=0.1)),
        ("ef21-sgdm(1):clip:1+topk:1%", EF21SGDM(Compose(Clip(1.0), TopK(ratio=0.01)), eta=1)),
        ("clip21:1", Clip21(1.0)),
        ("ef21-sgd2m(0.3):topk:1%", EF21SGD2M(TopK(ratio=0.01), eta=0.3)),
        ("clip21-sgd2m:1", Clip21SGD2M(1.0)),
        ("clip21-sgd2m:1:eta=0.5:server=0.5:noise=0.1:seed=7", Clip21SGD2M(1.0, 0.5, 0.5, noise=0.1, seed=7)),
        ("clip:1+noise:0.1:seed=7", Compose(Clip(1.0), GaussianNoise(0.1, seed=7))),
        ("diana(0.1):mlmc:topk:1%", DIANA(MLMCTopK(ratio=0.01), alpha=0.1)),
        ("marina(0.1):randk:1%:scaled", MARINA(RandK(ratio=0.01, scaled=True), p=0.1)),
        ("dasha(0.1):qsgd:4", DASHA(QSGD(4), a=0.1)),
        ("dasha(0.1,0.3):qsgd:4", DASHA(QSGD(4), a=0.1, eta=0.3)),
    ],
)
def test_parse(spec, operator):
    assert parse(spec) == operator


@pytest.mark.parametrize(
    ("operator", "spec"),
    [
        (TopK(ratio=0.07), "topk:7%"),
        (TopK(ratio=0.5), "topk:50%"),
        (Clip(2), "clip:2"),
        (Clip(0.5), "clip:0.5"),
        (EF21SGDM(Sign(), 1), "ef21-sgdm(1):sign"),
        (Clip21(2), "clip21:2"),
        (Compose(Compose(Clip(1), Sign()), TopK(1)), "clip:1+sign+topk:1"),
    ],
)
def test_specs_are_short(operator, spec):
    assert operator.spec == spec
    assert parse(spec) == operator


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "unknown operator ''; wanted none, clip:TAU, clip21:TAU, clip21-sgd2m:TAU,"),
        ("none:1", "none has no option '1'"),
        ("TopK:3", "unknown operator 'TopK:3'"),
        ("topq:3", "unknown operator 'topq:3'; did you mean topk? Wanted none, clip:TAU"),
        ("topk", "topk needs a number after a colon"),
        ("topk:", "topk needs a number after a colon"),
        ("topk:1.5", "'1.5' does not fit topk"),
        ("topk:0", "does not fit topk: TopK needs a whole number k >= 1; got k=0"),
        ("topk:-3", "whole number k >= 1; got k=-3"),
        ("topk:%", "'%' does not fit topk"),
        ("topk:0%", "0 < ratio <= 1; got ratio=0.0"),
        ("topk:101%", "0 < ratio <= 1; got ratio=1.01"),
        ("topk:nan%", "'nan%' does not fit topk"),
        ("topk:5%:scaled", "topk has no option 'scaled'"),
        ("topk:5%:tensor=no", "topk has no option 'tensor=no'"),
        ("topk:5%:", "topk has no option ''"),
        ("randk:150%", "RandK needs a share 0 < ratio <= 1; got ratio=1.5"),
        ("randk:5:all", "randk has no option 'all'"),
        ("randk:5:seed", "randk has no option 'seed'"),
        ("randk:5:seed=x", "'x'"),
        ("topk:1e99999999999999999999%", "topk's percentage must be a number; wanted a number, such as 5, 0.1 or 1e-3"),
        ("topk:1e-99999999999999999999%", "0 < ratio <= 1; got ratio=0.0"),
        ("randk:5:seed=-1", "'seed=-1' does not fit randk: a seed is a whole number, 0 <= seed < 2^64; got -1"),
        ("qsgd:4:seed=-1", "'seed=-1' does not fit qsgd: a seed is a whole number, 0 <= seed < 2^64; got -1"),
        (f"qsgd:4:tensor:seed={2**64}", f"'seed={2**64}' does not fit qsgd: a seed is"),
        ("randk:1%:seed=", "randk's seed must be a whole number; wanted a whole number, in the digits 0 to 9; got ''"),
        ("clip", "clip needs a number after a colon"),
        ("clip:one", "'one' does not fit clip"),
        ("clip:0", "does not fit clip: Clip needs a norm tau > 0 and finite; got 0.0"),
        ("clip:-1", "tau > 0 and finite; got -1.0"),
        ("clip:inf", "'inf' does not fit clip: clip's TAU must be a number"),
        ("clip:nan", "'nan' does not fit clip: clip's TAU must be a number"),
        ("clipvalue:0", "does not fit clipvalue: ClipValue needs a bound c > 0 and finite; got 0.0"),
        ("normalize:1", "normalize has no option '1'"),
        ("sign:all", "sign has no option 'all'"),
        ("qsgd:0", "does not fit qsgd: QSGD needs a whole number of levels, 1 <= levels < 2^30; got 0"),
        ("qsgd:2.5", "'2.5' does not fit qsgd"),
        ("clip:1+", "unknown operator ''"),
        ("clip:1++sign", "unknown operator ''"),
        ("clip:1+bottomk:3", "bias operator 'clip:1+bottomk:3': unknown operator 'bottomk:3'"),
        ("clip:1+ef14:sign", "error feedback may appear once, as the outermost operator; got 'ef14:sign'"),
        ("ef14:ef21:sign", "error feedback may appear once, as the outermost operator; got 'ef21:sign'"),
        ("ef14:", "unknown operator ''"),
        ("ef21", "unknown operator 'ef21'"),
        ("ef21:topk:0", "k >= 1; got k=0"),
        ("ef21-sgdm:sign", "unknown operator 'ef21-sgdm:sign'"),
        ("ef21-sgdm(0):sign", "0 < eta <= 1; got 0.0"),
        ("ef21-sgdm(1.5):sign", "0 < eta <= 1; got 1.5"),
        ("ef21-sgdm(x):sign", "'x'"),
        ("mlmc", "unknown operator 'mlmc'; did you mean mlmc:topk?"),
        ("mlmc:sign", "unknown operator 'mlmc:sign'"),
        ("mlmc:topk", "mlmc:topk needs a number after a colon: mlmc:topk:K or mlmc:topk:P%"),
        ("mlmc:topk:0", "MLMCTopK needs a whole number k >= 1; got k=0"),
        ("mlmc:topk:1:geometric=0", "0 < geometric <= 1, or None for adaptive ones; got 0.0"),
        ("mlmc:topk:1:geometric=x", "mlmc:topk's geometric must be a number"),
        ("mlmc:qsgd:bits=0", "MLMCQSGD needs a whole number of bits, 1 <= bits <= 30; got 0"),
        ("mlmc:qsgd:bits=2.5", "mlmc:qsgd's bits must be a whole number"),
        ("mlmc:qsgd:shared", "mlmc:qsgd has no option 'shared'; it has :bits=N :geometric=N :tensor :seed=N"),
        ("ef21-sgd2m(0):sign", "0 < eta <= 1; got 0.0"),
        ("clip21-sgd2m:0", "tau > 0 and finite; got 0.0"),
        ("clip21-sgd2m:1:server=2", "0 < server <= 1; got 2.0"),
        ("clip21-sgd2m:1:noise=-1", "noise >= 0 and finite; got -1.0"),
        ("natural:scaled", "natural has no option 'scaled'; it has :nearest :seed=N"),
        ("powersgd:0", "PowerSGD's rank must be >= 1; got 0"),
        ("clip:1+powersgd:2", "got PowerSGD(rank=2). Take it with fresh=True, to keep nothing: powersgd:2:fresh."),
        ("terngrad:clip=0", "TernGrad needs clip > 0 and finite, or None not to clip; got 0.0"),
        ("block8:block=0", "whole number of entries in a block, block >= 1; got 0"),
        ("noise:0", "standard deviation sigma > 0 and finite; got 0.0"),
        ("diana(2):sign", "DIANA needs a weight 0 < alpha <= 1; got 2.0"),
        ("marina(0):sign", "MARINA needs a weight 0 < p <= 1; got 0.0"),
        ("dasha(0.1,0.3,0.5):sign", "dasha takes the numbers (W,ETA); got (0.1,0.3,0.5)"),
        ("dasha(0.1,):sign", "dasha's ETA must be a number"),
        ("dasha(0.1,2):sign", "DASHA needs a weight 0 < eta <= 1; got 2.0"),
        ("clip21:0", "tau > 0 and finite; got 0.0"),
        ("clip21:1:tensor", "clip21 has no option 'tensor'"),
        ("ef14:clip21:1", "an operator without it; got Clip21(1.0)"),
        ("randk:5:seed=1:seed=2", "randk has an option twice: 'seed=2'"),
        ("topk:1_000", "got '1_000'"),
        ("topk:١٢", r"printable ASCII; got '\u0661' as its character 6"),
        ("topk:5%\u2028", r"printable ASCII; got '\u2028' as its character 8"),
        ("topk:5%\n", r"printable ASCII; got '\n' as its character 8"),
    ],
)
def test_parse_says_which_part_is_wrong(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse(spec)
    assert str(caught.value).startswith(f"bias operator {spec!r}: ")


LATER = {"ALPHA": "0.5", "SIGMA": "0.5", "W": "0.5", "RANK": "2", "A": "sign", "B": "sign", "P": "0.5"}  # long first


def test_the_help_lists_what_the_parser_takes():
    """Each operator with each option: those in its line of the table are taken, the others refused."""
    table = spec_help().splitlines()
    assert max(map(len, table)) <= 100
    examples = {"K": "3", "P%": "5%", "TAU": "0.5", "C": "0.5", "LEVELS": "4", "ETA": "0.1", **LATER}
    values = {"tensor": "", "all": "", "scaled": "", "shared": "", "geometric": "=0.5", "bits": "=3"}
    values |= {"eta": "=0.3", "server": "=0.5", "noise": "=0.5", "nearest": "", "clip": "=2.5", "block": "=256"}
    values |= {"dynamic": "", "random": "", "fresh": "", "seed": "=7"}
    assert [line.split()[0] for line in table[-len(values) :]] == [f":{o}" + "=N" * bool(v) for o, v in values.items()]
    for spelling in spellings():
        (line,) = [line for line in table if f"  {spelling} " in line]
        example = re.sub("|".join(examples), lambda match: examples[match[0]], spelling)
        assert parse(example).spec == example
        listed = set(re.findall(r" :(\w+)", line))
        assert listed <= set(values)
        for option, value in values.items():
            if option in listed:
                assert parse(f"{example}:{option}{value}").spec == f"{example}:{option}{value}"
            elif not spelling.endswith((":A", "+B")):  # what stands around A leaves the options to it
                with pytest.raises(ValueError, match=f"has no option '{option}{value}'"):
                    parse(f"{example}:{option}{value}")


def test_every_spelling_is_in_the_suites():
    """An operator that can be spelled has an instance in tests/support/operators.py."""
    spelled = " ".join(operator.spec for operator in EVERY)
    missing = [name for name in {**SPELLINGS, **AROUND} if not re.search(rf"(^|[ :+]){name}($|[ :+(])", spelled)]
    assert not missing
