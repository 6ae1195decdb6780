"""The speed benchmark: peers that compute the same are timed, others are not."""

from __future__ import annotations

import json

import pytest
import torch

from metamom.experiments.speed import __main__ as speed
from metamom.experiments.speed import measure, peers
from metamom.experiments.speed.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

PEERS = "learn2learn,higher,torchopt,metamom"


@pytest.mark.parametrize("row", ["sinusoid", "sinusoid-5-steps", "omniglot-first-order"])
def test_peers_compute_what_metamom_computes(row, capsys):
    assert speed.main(["--rows", row, "--contenders", PEERS, "--check"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PEERS.split(","))


def test_all_are_timed_in_turn(capsys):
    assert speed.main(["--rows", "sinusoid", "--contenders", PEERS, "--seconds", "0", "--rounds", "5", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"]["sinusoid"]
    assert set(row["contenders"]) == set(PEERS.split(","))
    for values in row["contenders"].values():
        assert 0 < values["milliseconds"]["low_quartile"] <= values["milliseconds"]["median"]


def test_who_computes_something_else_is_not_timed(monkeypatch):
    row = ROWS["sinusoid"]().to(torch.device("cpu"), torch.float32)
    makers = peers.makers

    def with_a_cheat(row):
        made = dict(makers(row))
        honest = made["metamom"]
        made["metamom"] = lambda: honest()._replace(
            outcome=lambda: {n: p.data for n, p in row.model.named_parameters()}
        )
        return made

    monkeypatch.setattr(measure, "makers", with_a_cheat)
    measured = measure.measure(row, ["learn2learn", "metamom"], torch.device("cpu"), 0.0, 2)
    assert measured.refused == ["metamom"]
    assert list(measured.milliseconds) == ["learn2learn"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "pendulum"], "'pendulum' not among sinusoid"),
        (["--contenders", "keras"], "'keras' not among learn2learn"),
        (["--rounds", "0"], "--rounds must be >= 1; got 0"),
        (["--seconds", "-1"], "--seconds must be >= 0"),
        (["--check", "--memory"], "leave out --memory"),
    ],
)
def test_wrong_flags(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(words)
    assert message in capsys.readouterr().err
