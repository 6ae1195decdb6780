"""Where training under attack stops: `experiments.attacks` on few steps."""

from __future__ import annotations

import pytest

from metamom.experiments import attacks
from metamom.experiments.attacks import ATTACKS, METHODS, RULES, Entry, Method, report, stops_at, workers
from metamom.server.robust import RobustMean


def test_the_settings_fit_each_other():
    for rule in RULES:
        for attack in ATTACKS:
            RobustMean(rule, attack).check(attacks.N)
            assert RobustMean(rule, attack).faulty in (0, attacks.FAULTY)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.bias)
def test_an_attack_stops_the_mean_far_away_and_robust_means_closer(method):
    far = stops_at(method, "mean", "ipm:2:eps=4", 0, steps=100, last=20)
    assert far > 3
    for rule in ("median", "centred-clip:1"):
        assert stops_at(method, rule, "ipm:2:eps=4", 0, steps=100, last=20) < 0.5 * far


def test_a_floor_is_that_of_a_loop(monkeypatch):
    """Without noise and attack the mean of all is exact, and the honest workers' gradient there is known."""
    monkeypatch.setattr(attacks, "NOISE", 0.0)
    problem = workers()
    honest = problem.gradients(problem.optimum)[:-2].mean(0)
    found = stops_at(Method("", 1.0, "none"), "mean", None, 0, steps=400, last=1)
    assert found == pytest.approx(float(honest.square().sum()), rel=1e-6)  # e^(-400 * 0.1 * 3/4) away


def test_the_tables():
    entries = [Entry("SGD", rule, attack, 0.5, 0.01) for rule in RULES for attack in ATTACKS]
    text = report(entries)
    assert "**SGD**" in text
    assert "| aggregate | honest | sign-flip:2 |" in text
    assert text.count("| 0.5 ± 0.01 ") == len(entries)


def test_one_seed_has_no_interval(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attacks", "--seeds", "1"])
    with pytest.raises(SystemExit):
        attacks.main()
    assert "--seeds needs 2 or more, for an interval; got 1." in capsys.readouterr().err
