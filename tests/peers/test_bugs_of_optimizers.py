"""Public reports about optimizers and wrapped models: what happened there comes out right here.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_cases import Case, run
from forked import run_forked

from metamom.distributed import start

CASES = {
    f"{spec}, {server}": Case(spec, server=server, dtype=torch.bfloat16, steps=2)  # type: ignore[arg-type]
    for spec in ("none", "topk:20%")
    for server in ("replicated", "rank0")
}


def train_in_bfloat16(folder: Path) -> None:
    found = {}
    with start(timeout=60) as world:
        for name, case in CASES.items():
            world.server = case.server
            learner, _ = run(case, world)
            found[name] = [p.detach() for p in learner.parameters()]
        if world.first:
            torch.save(found, folder / "weights.pt")


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    ended = run_forked(train_in_bfloat16, 2, folder / "said", folder)
    assert [status for status, _ in ended] == [0, 0], ended
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_over_gloo(name, in_two_processes):
    """pytorch 111131, gloo 454: sums of bfloat16 were "Invalid scalar type" on the gloo backend."""
    learner, _ = run(CASES[name])
    for p, q in zip(learner.parameters(), in_two_processes[name], strict=True):
        assert q.dtype == torch.bfloat16
        eps = torch.finfo(q.dtype).eps  # sums in another order may round to the next number
        torch.testing.assert_close(q, p.detach(), rtol=2 * eps, atol=eps / 8)
