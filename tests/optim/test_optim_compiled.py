"""A compiled step: one graph, the same result, and no recompilation when a step size in a tensor changes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from optimizers import make_params, set_gradients

from metamom import CompositeMomentum


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({}, False),
        ({"normalize": True}, False),
        ({"first_step": "gradient"}, True),
        ({"nesterov": True, "weight_decay": 0.1}, True),
        ({"foreach": False}, True),
    ],
    ids=str,
)
def test_one_graph_and_the_same_steps(options, tensors):
    params, twins = make_params(), make_params()
    lr, beta = (torch.tensor(0.05), torch.tensor(0.25)) if tensors else (0.05, 0.25)
    compiled, plain = CompositeMomentum(params, lr, beta, **options), CompositeMomentum(twins, 0.05, 0.25, **options)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, backend=counter, fullgraph=True)
    for k in range(5):
        if tensors:
            lr.fill_(0.05 / (k + 1))
            plain.param_groups[0]["lr"] = float(lr)
        for group in (params, twins):
            set_gradients(group, k)
        step()
        plain.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= 2  # the step that makes the momenta, and all others
