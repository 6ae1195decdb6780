"""Options, parameter groups, closures and state dicts of the optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from optimizers import make_params, run, scalar, set_gradients, step_once
from torch import Tensor, nn

from metamom import CompositeMomentum


def test_groups_have_their_own_options():
    params = make_params()
    options = [
        {"lr": 0.1, "beta": 1.0},
        {"lr": 0.01, "first_step": "gradient", "foreach": False},
        {"maximize": True, "beta": 0.7},
        {"weight_decay": 0.5, "foreach": True},
    ]
    optimizer = CompositeMomentum([{"params": [p], **o} for p, o in zip(params, options, strict=True)], lr=0.03)
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
    alone = make_params()
    for i, o in enumerate(options):
        single = CompositeMomentum([alone[i]], **{"lr": 0.03, **o})
        for step in range(5):
            set_gradients(alone, step)
            single.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


BAD_OPTIONS = [
    ({"lr": -0.1}, "lr is the step size"),
    ({"lr": math.nan}, "lr is the step size"),
    ({"lr": math.inf}, "lr is the step size"),
    ({"lr": torch.tensor([0.1, 0.1])}, "one element"),
    ({"lr": torch.tensor(-0.1)}, "lr is the step size"),
    ({"beta": 0}, "beta is the weight of the new gradient"),
    ({"first_step": "grad"}, "first_step must be"),
    ({"first_step": None}, "first_step must be"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"weight_decay": math.nan}, "weight_decay must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([scalar()], **{"lr": 0.1, **options})
    with pytest.raises(ValueError, match=message):
        CompositeMomentum([{"params": [scalar()], **options}], lr=0.1)
    optimizer = CompositeMomentum([scalar()], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [scalar()], **options})
    assert len(optimizer.param_groups) == 1


def test_an_added_group_takes_the_constructors_options():
    optimizer = CompositeMomentum([scalar()], lr=0.1, beta=0.25, first_step="gradient", weight_decay=0.5)
    step_once(optimizer, 1.0)
    optimizer.add_param_group({"params": [late := scalar(2.0)], "lr": 1.0})
    step_once(optimizer, 1.0)
    assert late.item() == 2 - 1.0 * (1 + 0.5 * 2)  # its first step, though the optimizer's second
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [late]})


def test_closure_runs_once_before_the_step_with_gradients():
    optimizer = CompositeMomentum([w := scalar(3.0)], lr=0.1, beta=1.0)
    calls = []

    def closure() -> Tensor:
        calls.append(w.item())
        optimizer.zero_grad()
        loss = w.square()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [3.0]
    assert loss.item() == 9.0
    assert w.item() == pytest.approx(3 - 0.1 * 6)
    assert optimizer.step() is None


@pytest.mark.parametrize("first_step", ["zero", "gradient"])
def test_state_dict_goes_on_where_it_stood(first_step):
    def make(params: list[nn.Parameter]) -> CompositeMomentum:
        return CompositeMomentum(params, 0.02, 0.1, first_step=first_step, weight_decay=0.01)

    expected = run(make, 20)
    params = make_params()
    optimizer = make(params)
    for step in range(10):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [nn.Parameter(p) for p in saved["params"]]
    optimizer = CompositeMomentum(params, lr=5.0)  # every option comes from the saved groups
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(10, 20):
        set_gradients(params, step)
        optimizer.step()
        for p, q in zip(params, expected[step], strict=True):
            assert torch.equal(p, q)


def test_state_dict_loads_into_another_dtype():
    params = make_params(torch.float64)
    optimizer = CompositeMomentum(params, 0.02)
    set_gradients(params, 0)
    optimizer.step()
    other = make_params(torch.float32)
    loaded = CompositeMomentum(other, 0.02)
    loaded.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other, strict=True):
        buf = loaded.state[q]["momentum"]
        assert buf.dtype == torch.float32
        assert torch.equal(buf, optimizer.state[p]["momentum"].float())
    set_gradients(other, 1)
    loaded.step()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_alike_and_apart(duplicate):
    params = make_params()
    optimizer = CompositeMomentum(params, 0.02)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    twin = duplicate(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    set_gradients(theirs, 1)
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))  # the original stays
    set_gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


LATER = {
    "maximize": False,
    "foreach": None,
    "normalize": False,
    "nesterov": False,
    "decoupled_weight_decay": False,
    "fused": None,
    "differentiable": False,
    "variant": None,
}


@pytest.mark.parametrize("missing", [list(LATER), *([name] for name in LATER)], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["state dict", "pickled"])
def test_states_that_lack_later_options_load(whole, missing):
    """A state of a version without an option goes on with what that version did, as in torch.optim."""
    w = scalar()
    optimizer = CompositeMomentum([w], lr=0.1, beta=0.5)
    step_once(optimizer, 1.0)
    old = optimizer.__getstate__() if whole else optimizer.state_dict()
    old = {**old, "param_groups": [{k: v for k, v in g.items() if k not in missing} for g in old["param_groups"]]}
    other = CompositeMomentum([w], lr=0.1, beta=0.5, nesterov=True, normalize=True)
    if whole:
        other.__setstate__(old)
    else:
        other.load_state_dict(old)
    assert {name: other.param_groups[0][name] for name in missing} == {name: LATER[name] for name in missing}
    step_once(other, 1.0)
    assert w.item() == pytest.approx(1 - 0.05 - 0.075)


@pytest.mark.parametrize("missing", ["lr", "beta", "first_step", "weight_decay"])
def test_states_that_lack_what_every_version_had_are_refused(missing):
    optimizer = CompositeMomentum([scalar()], lr=0.1)
    state = optimizer.state_dict()
    del state["param_groups"][0][missing]
    with pytest.raises(ValueError, match=f"the state of CompositeMomentum lacks {missing} in a parameter group"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"momentum": 0.9}, r"no option 'momentum': momentum=0\.9 is beta=0\.1 here"),
        ({"momentum": 0}, r"momentum=0 is beta=1 here"),
        ({"momentum": None}, r"a momentum of 0\.9 elsewhere is beta=0\.1 here"),
        ({"dampening": 0.9}, 'first_step="gradient" is SGD with dampening'),
        ({"betas": (0.9, 0.999)}, r"beta=0\.1 here.*no second moment"),
        ({"eps": 1e-8}, "no second moment"),
        ({"learning_rate": 0.1}, "the step size is lr"),
        ({"capturable": True}, "as in SGD, a step keeps no counter"),
    ],
)
def test_other_optimizers_options(option, message):
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match=message):
        CompositeMomentum([w], 0.1, **option)
    with pytest.raises(TypeError, match=message):  # torch would keep it in the group, where nothing reads it
        CompositeMomentum([{"params": [w], **option}], 0.1)


def test_an_unknown_option():
    w = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="no option 'bata'; its options are lr, beta, first_step"):
        CompositeMomentum([w], 0.1, bata=0.1)
    assert CompositeMomentum([{"params": [w], "name": "head"}], 0.1).param_groups[0]["name"] == "head"
