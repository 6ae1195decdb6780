"""Public reports about optimizers and wrapped models: what happened there comes out right here.

The table of all reports is in ``tests/test_bugs_of_the_field.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_cases import Case, run
from forked import run_forked
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from metamom import CompositeMomentum
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


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_that_lacks_a_parameter(flat):
    """pytorch 192224: a flattened one ended in a TypeError about a dict, far from what was missing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    optimizer = CompositeMomentum(model.parameters(), lr=0.1)
    model(torch.ones(3, 2)).square().sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    model.zero_grad()
    model[1].weight.requires_grad_(True)  # it was frozen when the checkpoint was written
    fresh = CompositeMomentum(model.parameters(), lr=5.0)
    said = "has no momentum for parameter 1 of group 0" if flat else "Missing optimizer state for parameter '1.weight'"
    with pytest.raises((ValueError, RuntimeError), match=said):
        set_optimizer_state_dict(model, fresh, state, options=options)
    assert fresh.param_groups[0]["lr"] == 5.0
    assert not any(each["momentum"].any() for each in fresh.state.values())
