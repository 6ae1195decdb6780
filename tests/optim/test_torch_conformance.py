"""torch's own tests of optimizers, in our words, over `CompositeMomentum`: steps, implementations, groups and errors.

Each test asserts what the test of the same name does in class TestOptimRenewed of PyTorch's test/test_optim.py. State
dicts and hooks are in test_torch_conformance_state.py. Every test runs for each first step in the plain, Nesterov's and
the normalised form (six `OptimizerInfo`), for every list of options in tests/support/torch_infos.py, and with the
implementations that torch's test takes: single-tensor, foreach, fused, differentiable. Of the 44 tests (torch 2.6),

- 36 apply and run here, on a CPU. Four of these are for GPUs in torch; here they run on the CPU, and on a GPU if there
  is one: mixed_device_dtype, fused_does_not_step_if_foundinf, cpu_load_state_dict and state_dict_with_cuda_params.
  set_default_dtype_works_with_foreach, which torch runs on a GPU alone, runs on the CPU alone.
- 4 apply and do not run, since they need hardware: forloop_goes_right_direction_multigpu (two GPUs),
  peak_memory_foreach (a GPU's allocator), foreach_large_tensor and fused_large_tensor (72 and 64 GB).
- 2 are expressed otherwise: fused_cpu_matches_cuda (fused steps are compared with single tensors on each device), and
  defaults_changed_to_foreach (it mocks torch's modules; test_optim.py compares foreach=None with both forms).
- 2 do not apply: rosenbrock_sparse (sparse gradients are refused), and second_order_optims_return_consistent_types (for
  LBFGS).

What differs: two errors, in wording only (`WORDING` in torch_infos.py). lr has no default, so all lists of options have
one. Parameters on the meta device are a TypeError in the fused kernel, where torch has a RuntimeError. SGD has no
`capturable`, so neither has CompositeMomentum.

test/test_optim.py also imports TestDifferentiableOptimizer. Its sgd and derivatives by lr and weight decay apply, and
are test_optim_options.py::test_three_steps_can_be_differentiated. TestLRScheduler and TestSWAUtils test schedulers and
averages of weights, on SGD; schedulers that cycle a momentum are in test_optim_options.py.
"""

from __future__ import annotations

import itertools
import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch_infos import (
    FLAGS,
    Affine,
    advance,
    assert_right_direction,
    assert_same_params,
    common,
    every_fused_info,
    every_info,
    options_of,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@every_info
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info):
    given = info.optim_inputs_func(device="cpu")
    assert len(given) == 10
    assert not any(flag in each.kwargs for each in given for flag in FLAGS)


@every_info
def test_errors(info):
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        assert error.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        expect = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expect(error.error_type, match=error.error_regex):
            info.optim_cls(given.params, **given.kwargs)


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@every_info
def test_forloop_goes_right_direction(info, contiguous, scheduled):
    for constructors in info.scheduler_inputs if scheduled else [[]]:
        for given in info.optim_inputs_func(device="cpu"):
            problem = Affine(contiguous=contiguous)
            assert problem.weight.is_contiguous() == contiguous
            optimizer = info.optim_cls(problem.params, **given.kwargs, foreach=False)
            schedulers = [make(optimizer) for make in constructors]
            before = problem.backward()
            for _ in range(20):
                loss = problem.backward()
                optimizer.step()
                advance(schedulers, loss)
            assert_right_direction(before, problem.backward(), given.kwargs)


@every_info
def test_param_group_with_lrscheduler_goes_right_direction(info):
    for constructors in info.scheduler_inputs:
        for flag in info.supported_impls:
            problem = Affine()
            kwargs = {**info.optim_inputs_func(device="cpu")[0].kwargs, flag: flag != "differentiable"}
            groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
            optimizer = info.optim_cls(groups, **kwargs)
            schedulers = [make(optimizer) for make in constructors]
            before = problem.backward()
            for _ in range(20):
                advance(schedulers, optimizer.step(problem.backward))
            assert problem.backward() < before


@pytest.mark.parametrize("shape", [(), (1,)])
@every_info
def test_tensor_lr(info, shape):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem = Affine()
        twin = problem.copy()
        kwargs["lr"] = 1e-3
        number = info.optim_cls(problem.params, **kwargs)
        tensor = info.optim_cls(twin.params, **{**kwargs, "lr": torch.full(shape, 1e-3, dtype=torch.float64)})
        for _ in range(5):
            problem.backward()
            twin.backward()
            number.step()
            tensor.step()
            assert_same_params(problem.params, twin.params)


@every_info
def test_complex(info):
    """A complex parameter is moved as its real and imaginary parts, and may stand beside real ones."""
    generator = torch.Generator().manual_seed(0)
    for kwargs in options_of(info, skip=("differentiable", "fused")):
        parts = [torch.randn(10, 5, 2, generator=generator), torch.randn(10, 2, generator=generator)]
        real = [nn.Parameter(x) for x in (*parts, torch.randn(10, 5, generator=generator))]
        complex_ = [nn.Parameter(torch.view_as_complex(x.clone())) for x in parts]
        complex_.append(nn.Parameter(real[2].detach().clone()))
        optimizers = [info.optim_cls(params, **kwargs) for params in (real, complex_)]
        for _ in range(3):
            for p, q in zip(real, complex_, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = torch.view_as_complex(p.grad.clone()) if q.is_complex() else p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            assert_same_params(real, [torch.view_as_real(q.detach()) if q.is_complex() else q for q in complex_])


@every_info
def test_complex_2d(info):
    """Two real parameters that make up a complex one follow its path down Rosenbrock's function."""

    def rosenbrock(z: Tensor) -> Tensor:
        return ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs()

    for kwargs in options_of(info, skip=("differentiable", "fused")):
        start = torch.randn(2, dtype=torch.complex64, generator=torch.Generator().manual_seed(3)) / 4
        whole = nn.Parameter(start.clone())
        real, imaginary = nn.Parameter(start.real.clone()), nn.Parameter(start.imag.clone())
        one, two = info.optim_cls([whole], **kwargs), info.optim_cls([real, imaginary], **kwargs)
        for _ in range(3):
            one.zero_grad()
            two.zero_grad()
            losses = rosenbrock(whole), rosenbrock(torch.complex(real, imaginary))
            torch.testing.assert_close(*losses)
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(whole.grad, torch.complex(real.grad, imaginary.grad))
            one.step()
            two.step()
            assert_same_params([whole], [torch.complex(real, imaginary)])


def network(dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)


def compare_with_single_tensors(info, flag: str, dtype: torch.dtype, **tolerances: float) -> None:
    """Parameters and states of seven steps, with a step without gradients and a layer frozen for two."""
    x = torch.linspace(0.1, 0.6, 6).reshape(3, 2).to(dtype)
    for given in info.optim_inputs_func(device="cpu", dtype=dtype):
        models = [network(dtype), network(dtype)]
        extra = [torch.full((), 0.5, dtype=dtype, requires_grad=True) for _ in models]
        empty = [torch.empty(0, dtype=dtype, requires_grad=True) for _ in models]
        params = [[*model.parameters(), e, n] for model, e, n in zip(models, extra, empty, strict=True)]
        single = info.optim_cls(params[0], **{**deepcopy(given.kwargs), flag: False})
        optimizers = [single, info.optim_cls(params[1], **{**deepcopy(given.kwargs), flag: True})]
        for step in range(7):
            for model, ps, optimizer in zip(models, params, optimizers, strict=True):
                optimizer.zero_grad()
                model[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    model(x).sum().backward()
                    for p in ps[-2:]:
                        p.grad = torch.full_like(p, 0.25)
                optimizer.step()
            assert_same_params(*params, **tolerances)
            for p, q in zip(*params, strict=True):
                ours, theirs = (o.state[each] for o, each in zip(optimizers, (p, q), strict=True))
                assert set(ours) == set(theirs)
                for name in ours:
                    torch.testing.assert_close(ours[name], theirs[name], **tolerances)


@every_info
def test_foreach_matches_forloop(info):
    compare_with_single_tensors(info, "foreach", torch.float64)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
@every_info
def test_set_default_dtype_works_with_foreach(info, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        compare_with_single_tensors(info, "foreach", torch.float64)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_fused_info
def test_fused_matches_forloop(info, dtype):
    tolerances = {"rtol": 1e-2, "atol": 1e-3} if dtype.itemsize == 2 else {}
    compare_with_single_tensors(info, "fused", dtype, **tolerances)


@every_fused_info
def test_fused_error_on_params_on_meta(info):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1))
    optimizer = info.optim_cls(model.parameters(), 1e-3, fused=True)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    with pytest.raises(TypeError, match="fused=True needs floating-point parameters"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@every_fused_info
def test_fused_does_not_step_if_foundinf(info, device):
    for given, scaled in itertools.product(info.optim_inputs_func(device=device), (True, False)):
        params = [torch.ones(1, device=device) for _ in range(5)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = info.optim_cls(params, **given.kwargs, fused=True)
        optimizer.grad_scale = torch.ones(1, device=device) if scaled else None
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.step()
        assert_same_params(params, [torch.ones(1, device=device)] * 5)


@pytest.mark.parametrize("impl", ["foreach", "fused"])
@every_info
def test_mixed_device_dtype(info, impl):
    if impl not in info.supported_impls:  # there is no fused kernel
        return
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    for given in info.optim_inputs_func(device="cpu"):
        params = [torch.rand(2, 3, generator=generator).to(d, t) for d in DEVICES for t in dtypes]
        twins = [p.clone() for p in params]
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.rand(2, 3, generator=generator).to(p)
            q.grad = p.grad.clone()
        ours = info.optim_cls(params, **{**deepcopy(given.kwargs), impl: True})
        theirs = info.optim_cls(twins, **{**deepcopy(given.kwargs), impl: False})
        for _ in range(7 if impl == "foreach" else 1):
            ours.step()
            theirs.step()
        for p, q in zip(params, twins, strict=True):
            tolerances = {"rtol": 5e-2, "atol": 1e-4} if p.dtype is torch.bfloat16 else {"rtol": 5e-3, "atol": 5e-5}
            assert_same_params([p], [q], **tolerances)
            assert_same_params([ours.state[p]["momentum"]], [theirs.state[q]["momentum"]], **tolerances)


@every_info
def test_param_groups_weight_decay(info):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem = Affine()
        groups = [{"params": [problem.weight], **kwargs}, {"params": [problem.bias], **kwargs, "weight_decay": 0.0}]
        optimizer = info.optim_cls(groups, lr=1.0)
        before = problem.backward()
        for _ in range(20):
            problem.backward()
            optimizer.step()
        assert_right_direction(before, problem.backward(), kwargs)


@every_info
def test_param_groups_lr(info):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem, still = Affine(), nn.Parameter(torch.ones(2))
        optimizer = info.optim_cls([{"params": problem.params, **kwargs}, {"params": [still]}], lr=1e-28)
        before = problem.backward()
        for _ in range(20):
            problem.backward()
            still.grad = torch.rand_like(still)
            optimizer.step()
        assert_right_direction(before, problem.backward(), kwargs)
        assert torch.equal(still, torch.ones(2))


@every_info
def test_step_is_noop_when_params_have_no_grad(info):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    for kwargs in options_of(info):
        optimizer = info.optim_cls(params, **kwargs)
        assert optimizer.step(lambda: torch.tensor([1.0])).item() == 1
        assert_same_params(params, before, rtol=0, atol=0)
        assert not optimizer.state


@every_info
def test_step_is_noop_for_zero_grads(info):
    for kwargs in options_of(info):
        if kwargs.get("weight_decay"):
            continue
        p = torch.randn(5, 1, requires_grad=True)
        start, p = p.detach().clone(), p.clone() if kwargs.get("differentiable") else p
        optimizer = info.optim_cls([p], **kwargs)
        p.grad = torch.zeros(5, 1)
        optimizer.step()
        assert torch.equal(p.detach(), start)


@every_info
def test_optimizer_can_be_printed(info):
    for kwargs in options_of(info):
        assert "first_step: " in repr(info.optim_cls(Affine().params, **kwargs))


@every_info
def test_non_empty_state(info):
    for kwargs in options_of(info, skip=("differentiable",)):
        problem = Affine()
        optimizer = info.optim_cls(problem.params, **kwargs)
        problem.backward()
        optimizer.step()
        assert [set(state) for state in optimizer.state.values()] == [{"momentum"}] * 2
        assert all(math.isfinite(state["momentum"].sum()) for state in optimizer.state.values())
