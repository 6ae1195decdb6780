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
        ({"beta": 1.0}, False),
    ],
    ids=str,
)
def test_one_graph_and_the_same_steps(options, tensors):
    params, twins = make_params(), make_params()
    lr, beta = (torch.tensor(0.05), torch.tensor(0.25)) if tensors else (0.05, 0.25)
    compiled = CompositeMomentum(params, **{"lr": lr, "beta": beta, **options})
    plain = CompositeMomentum(twins, **{"lr": 0.05, "beta": 0.25, **options})
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


@pytest.mark.parametrize("options", [{}, {"decoupled_weight_decay": True}, {"normalize": True}], ids=str)
def test_options_in_tensors_do_not_compile_again(options):
    """The step that makes the momenta, and one graph for all others, with whatever the tensors hold."""
    params, twins = make_params(), make_params()
    tensors = {name: torch.tensor(0.0) for name in ("lr", "beta", "weight_decay")}
    compiled = CompositeMomentum(params, **{**tensors, "beta": torch.tensor(1.0)}, **options)
    compiled.param_groups[0]["beta"] = tensors["beta"]
    plain = CompositeMomentum(twins, 0.0, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(compiled.step, backend="aot_eager", fullgraph=True)
    for k in range(6):
        for name, value in (("lr", 0.1 / (k + 1)), ("beta", 0.8 / (k + 1)), ("weight_decay", 0.3 / (k + 1))):
            tensors[name].fill_(value)
            plain.param_groups[0][name] = value
        for group in (params, twins):
            set_gradients(group, k)
        with torch._dynamo.config.patch(error_on_recompile=k > 1):
            step()
        plain.step()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
