"""Workers on a graph do the same on 1, 2 and 4 processes, to the bit, and send to neighbours only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decentral_cases import CASES, STEPS, all_cases, one_fails, run, they_differ
from forked import run_forked

from metamom.decentral.graph import neighbours
from metamom.distributed import World

SIZES = (2, 4)
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("decentral")
    for size in SIZES:
        ended = run_forked(all_cases, size, folder / f"said-{size}", folder)
        assert [status for status, _ in ended] == [0] * size, ended
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SIZES}


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_same_to_the_bit(name, together):
    alone = run(CASES[name], World())
    assert alone["sent"] == 0
    for size in SIZES:
        parts = [each[name] for each in together[size]]
        assert torch.equal(torch.cat([part["weights"] for part in parts]), alone["weights"])
        for part in parts:
            assert torch.equal(part["mean"], alone["mean"])
            for number in ("wire_bytes", "edge_bytes", "disagreement"):
                assert part[number] == alone[number]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_what_crosses_between_processes(name, size, together):
    """A row for each pair of a worker and another process with neighbours of it."""
    case = CASES[name]
    n = len(case.mixing)
    home = [worker * size // n for worker in range(n)]
    rows = {(j, home[i]) for i, others in enumerate(neighbours(case.mixing)) for j in others if home[i] != home[j]}
    for part in together[size]:
        assert part[name]["sent"] == STEPS * len(rows) * part[name]["edge_bytes"]


def test_neighbours_of_a_process_that_stops_say_so_and_do_not_move(tmp_path):
    said = [output for _, output in run_forked(one_fails, 4, tmp_path / "said", tmp_path)]
    assert said[2] == ""
    for rank in (1, 3):
        assert "ProcessError: process" in said[rank]
        assert "could not exchange messages with its neighbours" in said[rank]
        assert "unmoved: True" in said[rank]


def test_processes_must_have_the_same_graph(tmp_path):
    for _, output in run_forked(they_differ, 2, tmp_path / "said", tmp_path):
        assert "the processes differ in the mixing matrix and options of DecentralizedMomentum" in output
        assert "1 worker on 2 processes do not divide" in output
