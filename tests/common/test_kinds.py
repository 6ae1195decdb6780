"""Types as errors name them."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from torch import nn

from metamom.common.kinds import named_type, with_article


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "an int"),
        ([], "a list"),
        (OrderedDict(), "an OrderedDict"),
        (None, "a NoneType"),
        (nn.LSTM(1, 1), "an LSTM"),
        (nn.GRU(1, 1), "a GRU"),
        (nn.Linear, "the class Linear itself"),
    ],
    ids=str,
)
def test_types_have_their_article(value, text):
    assert named_type(value) == text


@pytest.mark.parametrize("name", ["MAML", "Module", "UNet", "SGDM"])
def test_acronyms_are_spelled_out_if_they_have_no_vowel(name):
    assert with_article(name) == ("an SGDM" if name == "SGDM" else f"a {name}")
