"""The speed benchmark: peers that compute the same are timed, others are not."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from installed import LEARN2LEARN

from metamom.experiments.speed import __main__ as speed
from metamom.experiments.speed import measure, networks, peers, report, rows
from metamom.experiments.speed.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own

PEERS = "learn2learn," * LEARN2LEARN + "higher,torchopt,metamom"


@pytest.mark.parametrize("row", ["sinusoid", "sinusoid-5-steps", "omniglot-first-order", "lstm"])
def test_peers_compute_what_metamom_computes(row, capsys):
    assert speed.main(["--rows", row, "--contenders", PEERS, "--check"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in PEERS.split(","))


def test_all_are_timed_in_turn(capsys):
    assert speed.main(["--rows", "sinusoid", "--contenders", PEERS, "--seconds", "0", "--rounds", "2", "--json"]) == 0
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
    measured = measure.measure(row, ["higher", "metamom"], torch.device("cpu"), 0.0, 2)
    assert measured.refused == ["metamom"]
    assert list(measured.milliseconds) == ["higher"]


def test_adapted_heads_are_compared_with_features_computed_once():
    """A smaller ResNet-18 row: the others compute features once for each task, as metamom does."""
    row = rows._images(partial(networks.resnet18, 3), "ResNet-18", (3, 32, 32), 2, ways=3, inner_steps=2, head="fc")
    measured = measure.check(row, PEERS.split(","), torch.device("cpu"))
    assert not measured.refused
    assert set(measured.differences) == set(PEERS.split(","))
    forwards = measure.flops(row) / measure.flops(row._replace(inner_steps=1))
    assert forwards < 1.05


def test_a_contender_that_cannot_run_a_row_says_so(monkeypatch, capsys):
    def failing(row):
        def make():
            raise RuntimeError("no recurrent layers here")

        return {**made(row), "higher": make}

    made = peers.makers
    for module in (measure, speed):
        monkeypatch.setattr(module, "makers", failing)
    assert "no recurrent layers here" in timed(["--contenders", "higher,metamom"], capsys)
    assert "cannot run this row" in timed(["--contenders", "higher"], capsys)
    found = json.loads(timed(["--contenders", "higher,metamom", "--json"], capsys))["rows"]["sinusoid"]
    assert found["cannot_run"] == {"higher": "RuntimeError: no recurrent layers here"}
    assert found["contenders"]["metamom"]["cpu_milliseconds"]["median"] > 0
    assert json.loads(timed(["--contenders", "higher", "--json"], capsys))["rows"]["sinusoid"]["contenders"] == {}


def timed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert speed.main(["--rows", "sinusoid", "--seconds", "0", "--rounds", "3", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("row", ["sinusoid", "omniglot-first-order"])
def test_bfloat16_is_reported_to_be_off(row, capsys):
    """In float32, by what eight bits explain; were it float32 itself, it would be off by nothing."""
    words = ["--rows", row, "--contenders", "metamom,metamom-bfloat16", "--seconds", "0", "--rounds", "2", "--json"]
    assert speed.main(words) == 0
    contenders = json.loads(capsys.readouterr().out)["rows"][row]["contenders"]
    assert contenders["metamom"]["float32_difference"] == 0
    assert 1e-4 < contenders["metamom-bfloat16"]["float32_difference"] < measure.ROUGH_TOLERANCE
    assert contenders["metamom-bfloat16"]["milliseconds"]["median"] > 0


def test_bfloat16_takes_part_where_it_is_asked_for(capsys):
    assert "metamom-bfloat16" in peers.ROUGH
    assert "metamom-bfloat16" not in speed.parse([]).contenders
    assert set(speed.parse([]).contenders) == set(peers.NAMES) - set(peers.ROUGH)


def test_numbers_from_garbage_are_reported_of_bfloat16_too():
    measured = measure.Measured(ROWS["sinusoid"](), differences={"metamom": 0.0, "metamom-bfloat16": 0.5})
    assert measured.refused == []
    measured.float32_differences = {"metamom-bfloat16": float("nan")}
    assert measured.refused == ["metamom-bfloat16"]


def test_medians_and_quartiles_of_known_times():
    """Of times 2, 4, 6, 8 beside 8, 8, 12, 24: ratios 4, 2, 2, 3 of the same rounds; in the table as in JSON."""
    measured = measure.Measured(ROWS["sinusoid"](), flops=10**9)
    for name, times in (("learn2learn", [8.0, 8.0, 12.0, 24.0]), ("metamom", [2.0, 4.0, 6.0, 8.0])):
        measured.differences[name] = measured.float32_differences[name] = 0.0
        measured.first_calls[name] = 0.5
        measured.milliseconds[name] = times
        measured.cpu_milliseconds[name] = [2 * time for time in times]
        measured.alone[name] = {"peak": 300.0, "imports": 200.0, "first_call": 0.25}
    measured.gemm = {1000: [10.0, 10.0]}  # 200 GFLOP/s, metamom has 1 GFLOP in 5 ms
    values = report.as_json(measured)["contenders"]["metamom"]
    assert values["milliseconds"] == {"median": 5.0, "low_quartile": 3.5, "high_quartile": 6.5}
    assert values["speed"] == {"median": 2.5, "low_quartile": 2.0, "high_quartile": 3.25}
    assert values["percent_of_gemm"] == pytest.approx(100)
    assert values["cpu_milliseconds"]["median"] == 10.0
    assert (values["first_call_seconds"], values["second_first_call_seconds"]) == (0.5, 0.25)
    line = list(report.timed(measured))[-1]
    expected = "metamom 5.00 (3.50 to 6.50) 10.0 2.50 (2.00 to 3.25) 200.00 100.0 % 0e+00 0.50 s 0.25 s 300 (200)"
    assert " ".join(line.split()) == expected


def test_a_contender_alone(capsys):
    """In a process of its own, whose first call comes second."""
    found = json.loads(timed(["--contenders", "metamom", "--alone", "--json"], capsys))
    values = found["rows"]["sinusoid"]["contenders"]["metamom"]
    assert 0 < values["memory_mib"]["imports"] <= values["memory_mib"]["peak"]
    assert values["second_first_call_seconds"] > 0
    assert "kernels_seconds" not in found


@pytest.mark.parametrize("named", [None, "/somewhere"])
def test_caches_are_empty_while_measuring_and_as_they_were_after_it(named, monkeypatch):
    compiler, own = "TORCHINDUCTOR_CACHE_DIR", "METAMOM_CACHE"
    monkeypatch.setenv(own, "/mine")
    monkeypatch.delenv(compiler, raising=False)
    if named is not None:
        monkeypatch.setenv(compiler, named)
    with measure.empty_caches():
        assert os.environ[own] == "/mine"
        assert (os.environ[compiler] == named) == (named is not None)
    with measure.empty_caches(kernels=True):
        folders = [Path(os.environ[name]) for name in (compiler, own)]
        assert len(set(folders)) == 2
        assert not any(folder.exists() for folder in folders)
        assert folders[0].parent.is_dir()
    assert not folders[0].parent.exists()
    assert (os.environ.get(compiler), os.environ[own]) == (named, "/mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "pendulum"], "'pendulum' not among sinusoid"),
        (["--contenders", "keras"], "'keras' not among learn2learn"),
        (["--rounds", "0"], "--rounds: wanted a whole number from 1 to 2,147,483,647; got '0'"),
        (["--seconds", "-1"], "--seconds must be >= 0"),
        (["--check", "--memory"], "leave out --memory"),
        (["--check", "--cold"], "leave out --memory, --alone and --cold"),
    ],
)
def test_wrong_flags(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed.main(words)
    assert message in capsys.readouterr().err
