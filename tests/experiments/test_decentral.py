"""The floors without a server are the predicted ones, and the report has them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from metamom.experiments.decentral.problem import METHODS, DecentralFloors, biases
from metamom.experiments.decentral.report import report
from metamom.experiments.decentral.runs import exact_floor, noisy_floor

SMALL = DecentralFloors(side=2, d=3, steps=200, last=120, runs=6, noise=0.1, lrs=(0.1, 0.2), scales=(0.5, 1.0))


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
@pytest.mark.parametrize("bias", ["none", "constant, sum zero", "constant", "relative, the same for all", "relative"])
def test_floors_are_the_predicted_ones(bias, method):
    gradients = biases(SMALL)[bias]
    law = gradients.floor(method, SMALL, 0.1)
    assert exact_floor(SMALL, gradients, method, 0.1) == pytest.approx(law, rel=1e-3, abs=1e-6)
    if method.tracking:
        by_hand = {"constant": 3 * 0.1**2, "relative": None}.get(bias, 0.0)  # ||mean b||^2
        assert by_hand is None or law == pytest.approx(by_hand, abs=1e-15)


def test_averaging_alone_has_a_floor_that_grows_with_lr():
    gradients = biases(SMALL)["none"]
    floors = [gradients.floor(METHODS[3], SMALL, lr) for lr in (0.05, 0.1, 0.2)]
    assert 1e-6 < floors[0] < floors[1] < floors[2]


def test_with_noise_within_five_standard_errors():
    gradients = biases(SMALL)["relative"]
    for method in METHODS:
        found = noisy_floor(SMALL, gradients, method)
        assert abs(found.value - gradients.floor(method, SMALL, SMALL.lr)) < 2.5 * found.halfwidth


def test_the_report(tmp_path):
    short = replace(SMALL, steps=30, last=20, runs=3)
    text = report(short, tmp_path).read_text(encoding="utf-8")
    found = json.loads((tmp_path / "floors.json").read_text())
    assert (tmp_path / "figures" / "decentral.png").stat().st_size > 10_000
    assert found["config"]["side"] == 2
    assert len(found["floors"]) == len(biases(SMALL)) * len(METHODS)
    for row in found["floors"]:
        assert f"| {row['bias']} | {row['method']} |" in text
        assert (row["predicted"] is None) == ("topk" in row["bias"])
    assert "4 quadratics in 3 dimensions" in text
