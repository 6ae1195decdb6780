"""What every robust mean and attack has in common: shapes, dtypes, state, draws, symmetries, bounds and spellings."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES
from robust_means import ATTACKS, BOUNDED, BY_ENTRIES, DRAWING, RULES, STATEFUL, STEADY, crowds, slack, spread2, vectors

from metamom.common import choices
from metamom.server.attacks import ATTACKS as ATTACK_KINDS
from metamom.server.attacks import parse_attack
from metamom.server.robust import Memory, RobustMean, as_robust_mean, check_aggregate, parse_rule, robust_mean
from metamom.server.rules import base
from metamom.server.rules.base import MIXERS, load_all
from metamom.server.rules.base import RULES as RULE_KINDS
from metamom.server.rules.mixing import NearestNeighbours
from metamom.server.spelling import Argument, Kind, spelled

each_rule = pytest.mark.parametrize("how", RULES)
each_attack = pytest.mark.parametrize("attack", ATTACKS)


def test_the_lists_have_every_kind():
    load_all()
    said = " ".join(RULES)
    assert all(f"{name}:" in said or name in RULES for name in [*RULE_KINDS, *MIXERS])
    assert {attack.partition(":")[0] for attack in ATTACKS} == set(ATTACK_KINDS)
    spellings = [spelled(name, kind) for name, kind in RULE_KINDS.items()]
    mixers = [f"{spelled(name, kind)}>RULE" for name, kind in MIXERS.items()]
    assert set(choices.AGGREGATES) == {*spellings, *mixers}
    assert set(choices.ATTACKS) == {spelled(name, kind) for name, kind in ATTACK_KINDS.items()}


def test_a_rule_is_added_in_one_place(monkeypatch):
    load_all()

    @dataclass(frozen=True)
    class First(base.Rule):
        skipped: int = 0

        @property
        def spec(self) -> str:
            return f"first:{self.skipped}"

        def combine(self, rows, memory=base.START):
            return rows[self.skipped].clone()

    monkeypatch.setitem(RULE_KINDS, "first", Kind(First, (Argument("skipped", int, "K"),)))
    assert torch.equal(robust_mean(vectors(), "nnm:2>first:1"), NearestNeighbours(2).mix(vectors())[1])
    with pytest.raises(ValueError, match=r"aggregate must be mean, .* first:K, "):
        parse_rule("second:1")


@each_rule
def test_a_rule_is_a_value_that_its_text_names(how):
    rule = parse_rule(how)
    assert rule.spec == how
    assert rule == parse_rule(rule.spec)
    assert hash(rule) == hash(parse_rule(how))
    assert rule == copy.deepcopy(rule)
    assert check_aggregate(how, 9) == rule
    assert parse_rule(f" {how} ") == rule
    assert (how in STATEFUL) == (rule.keeps or rule.draws)
    assert (how in DRAWING) == rule.draws


@each_attack
def test_an_attack_is_a_value_that_its_text_names(attack):
    made = parse_attack(attack)
    assert made.spec == attack
    assert made == parse_attack(made.spec)
    assert made.draws == attack.startswith("gaussian")


@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype(how, dtype):
    x = vectors(dtype=dtype)
    before = x.clone()
    y = robust_mean(x, how)
    assert y.shape == (5,)
    assert y.dtype is dtype
    assert torch.equal(x, before)
    y += 1  # it is the caller's
    assert torch.equal(x, before)
    if dtype in DTYPES[:2]:
        torch.testing.assert_close(y.double() - 1, robust_mean(x.double(), how), rtol=0, atol=1e-5)


@each_rule
def test_equal_vectors_and_zeros(how):
    same = vectors(1).expand(9, -1)
    torch.testing.assert_close(robust_mean(same, how), same[0], rtol=1e-14, atol=1e-14)
    assert robust_mean(torch.zeros(9, 3), how).tolist() == [0, 0, 0]


@each_rule
@pytest.mark.parametrize(("size", "dtype"), [(1e37, torch.float32), (1e300, torch.float64), (1e-30, torch.float32)])
def test_huge_and_tiny_vectors_stay_in_range(how, size, dtype):
    """Squares of their distances are out of range."""
    x = vectors().to(dtype) * size / 4
    y = robust_mean(x, how.replace(":0.7", f":{0.7 * size}"))
    assert bool(y.isfinite().all())
    if "clip" not in how and not ("geomedian" in how and size < 1):  # whose extrapolation needs squares in range
        torch.testing.assert_close(y / size, robust_mean(vectors().to(dtype) / 4, how), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", STEADY)
def test_the_order_of_the_vectors_plays_no_part(how):
    x = vectors()
    for seed in range(4):
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(robust_mean(x[order], how), robust_mean(x, how), rtol=1e-9, atol=1e-9)


@each_rule
def test_a_shift_moves_the_result_and_a_rotation_turns_it(how):
    x, shift = vectors(), 10 * vectors(1, seed=1)[0]
    y = robust_mean(x, how)
    torch.testing.assert_close(robust_mean(x + shift, how), y + shift, rtol=1e-8, atol=1e-8)
    if how not in BY_ENTRIES:
        turn = torch.linalg.qr(vectors(5, seed=2))[0]
        torch.testing.assert_close(robust_mean(x @ turn, how), y @ turn, rtol=1e-7, atol=1e-7)


@each_rule
def test_a_factor_multiplies_the_result(how):
    if "clip" in how:
        return  # its radius has the gradient's units
    x = vectors()
    torch.testing.assert_close(robust_mean(-3 * x, how), -3 * robust_mean(x, how), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("how", BOUNDED)
@pytest.mark.parametrize("size", [1e3, 1e9, 1e15])
def test_two_faulty_vectors_of_nine_do_not_move_it_far_and_move_the_mean(how, size):
    if how == "trimmed:0.25":
        how = "trimmed:0.3"
    x = vectors()
    honest = x[:7]
    radius = float((honest - honest.mean(0)).norm(dim=1).max())
    for bad in (torch.full((2, 5), size), torch.tensor([[size], [-size]]).expand(2, 5), size * vectors(2, seed=3)):
        x[7:] = bad
        moved = float((robust_mean(x, how) - honest.mean(0)).norm())
        assert moved <= 4 * radius, how
        if bool((bad.sum(0) != 0).any()):
            assert float((robust_mean(x, "mean") - honest.mean(0)).norm()) > size / 20


@settings(deadline=None, max_examples=25)
@given(x=crowds(), data=st.data())
def test_the_robustness_of_every_rule(x, data):
    """For each set S of n - f vectors: ``||y - x_S||^2 <= kappa spread(S)``."""
    n = len(x)
    faulty = data.draw(st.integers(1, (n - 1) // 2))
    names = ["median", "geomedian", f"trimmed:{(faulty + 0.1) / n}"]
    if n >= 2 * faulty + 3:
        chosen = data.draw(st.integers(1, n - faulty))
        names += [f"krum:{faulty}", f"multi-krum:{faulty}:{chosen}", f"multi-krum:{faulty}"]
    names += [f"nnm:{faulty}>{name}" for name in names]
    for name in names:
        rule = parse_rule(name)
        kappa, y = rule.kappa(n, faulty), rule.combine(x)
        assert kappa < math.inf
        for held in itertools.combinations(range(n), n - faulty):
            some = x[list(held)]
            distance = float((y - some.mean(0)).square().sum())
            assert distance <= kappa * spread2(some) * (1 + 1e-6) + slack(x), (name, held)


@each_rule
def test_no_bound_for_too_many_faulty(how):
    rule = parse_rule(how)
    assert rule.kappa(9, 5) == math.inf
    assert (rule.kappa(9, 1) == math.inf) == (how in ("mean", *STATEFUL))


@each_rule
def test_state_round_trip_and_draws_by_counter(how):
    """Five steps; or two, a saved state and three more: the same bit for bit."""
    steps = [vectors(seed=seed) for seed in range(5)]
    whole, first = RobustMean(how), RobustMean(how)
    wanted = [_step(whole, x) for x in steps]
    for x in steps[:2]:
        _step(first, x)
    state = copy.deepcopy(first.state_dict())
    assert bool(state) == (how in STATEFUL)
    second = RobustMean(how)
    second.load_state_dict(state)
    second.check_loaded(5, 2 if how in STATEFUL else None)
    assert all(torch.equal(_step(second, x), y) for x, y in zip(steps[2:], wanted[2:], strict=True))
    whole.reset()
    assert torch.equal(_step(whole, steps[0]), wanted[0])


def _step(robust: RobustMean, x: torch.Tensor) -> torch.Tensor:
    before = copy.deepcopy(robust.memory)
    total = robust.combine(x)
    assert torch.equal(total, robust.combine(x))  # nothing has changed
    assert robust.memory.step == before.step
    robust.commit(total)
    return total.clone()


@pytest.mark.parametrize("how", STATEFUL)
def test_a_name_with_state_is_refused_for_a_single_step(how):
    with pytest.raises(ValueError, match=r"carries a state from step to step .*RobustMean\("):
        as_robust_mean(how)
    robust = RobustMean(how)
    assert as_robust_mean(robust) is robust


@pytest.mark.parametrize("how", STATEFUL)
def test_states_that_do_not_fit(how):
    robust = RobustMean(how)
    kept = torch.zeros(4) if robust.rule.keeps else None
    bad = [
        {},
        {"step": -1},
        {"step": 1.0},
        {"step": 1, "previous": 3},
        {"step": 1, "previous": torch.tensor([math.nan])},
    ]
    if kept is None:
        bad.append({"step": 1, "previous": torch.zeros(4)})
    for state in bad:
        with pytest.raises(ValueError, match=r"whole number|last aggregate"):
            robust.load_state_dict(state)
    assert robust.memory == Memory()
    robust.load_state_dict({"step": 3, **({} if kept is None else {"previous": kept})})
    with pytest.raises(ValueError, match="'step' should be 4, one for each step; got 3"):
        robust.check_loaded(4, 4)
    if kept is not None:
        with pytest.raises(ValueError, match="'previous' should be a tensor of 5 entries; got 4"):
            robust.check_loaded(5, 3)


@each_attack
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_attack_replaces_the_last_vectors_alone(attack, dtype):
    made, x = parse_attack(attack), vectors(dtype=dtype)
    before = x.clone()
    out = made(x, 3)
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.dtype is dtype
    honest = 9 - made.faulty
    assert torch.equal(out[:honest], x[:honest])
    assert not torch.equal(out[honest:], x[honest:])
    assert torch.equal(out, made(x, 3))
    assert made.draws == (not torch.equal(out, made(x, 4)))
    ignored = x.clone()
    ignored[honest:] = 7.0  # a faulty worker's own vector matters to one attack
    assert torch.equal(made(ignored, 3), out) == (not attack.startswith("sign-flip"))


@each_attack
def test_an_attack_needs_honest_workers(attack):
    made = parse_attack(attack)
    with pytest.raises(ValueError, match=r"needs . faulty workers and at least . honest; got"):
        made.check(made.faulty)
    with pytest.raises(ValueError, match="honest"):
        RobustMean("mean", attack).check(made.faulty)


@each_rule
def test_too_few_workers(how):
    least = next((n for n in range(1, 12) if _accepts(how, n)), None)
    assert least is not None
    assert least <= 9
    if any(name in how for name in ("krum", "nnm", "bucketing")):
        with pytest.raises(ValueError, match=r"more workers|M <= n - F"):
            check_aggregate(how, least - 1)


def _accepts(how: str, n: int) -> bool:
    try:
        check_aggregate(how, n)
    except ValueError:
        return False
    return True


BAD = {
    "krum": "krum needs F after a colon", "krum:0": "F >= 1; got 0", "krum:1.5": "whole number", "krum:x": "whole",
    "krum:1:2": "takes 1 numbers", "multi-krum:1:0": "M >= 1", "centred-clip:0": "RADIUS > 0",
    "centred-clip:1:iterations=0": "iterations from 1", "centred-clip:1:steps=3": "iterations=N; got 'steps=3'",
    "centred-clip:1:iterations=2:iterations=3": "twice", "centred-clip:inf": "wanted a number",
    "bucketing:1>median": "S >= 2", "bucketing:2:seed=-1>median": "seed", "nnm:0>median": "F >= 1",
    "nnm:1": "Other rules are centred-clip:RADIUS", "median>nnm:1": "got 'median>nnm:1'", "nnm:1>": "got 'nnm:1>'",
    "nnm:1>mode": "got 'nnm:1>mode'", "krumm:1": "did you mean krum",
    ">".join(["nnm:1"] * 6 + ["median"]): "at most 5 mixers",
}  # fmt: skip


@pytest.mark.parametrize("how", BAD)
def test_bad_spellings_of_rules(how):
    with pytest.raises(ValueError, match=BAD[how]):
        parse_rule(how)


BAD_ATTACKS = {
    "alie": "alie needs F after a colon", "alie:0": "F >= 1; got 0", "alie:1:z=inf": "wanted a number",
    "little:2": "attack must be sign-flip:F, ipm:F", "ipm:1:eps=0": "eps > 0", "gaussian:1:std=0": "std > 0",
    "gaussian:1:seed=-1": "seed", "mimic:1:worker=-1": "I >= 0", "": "attack must be", "allie:2": "did you mean alie",
}  # fmt: skip


@pytest.mark.parametrize("attack", BAD_ATTACKS)
def test_bad_spellings_of_attacks(attack):
    with pytest.raises(ValueError, match=BAD_ATTACKS[attack]):
        parse_attack(attack)


def test_an_attack_beyond_the_range_of_the_dtype():
    with pytest.raises(ValueError, match=r"sends numbers beyond the range of torch\.float16: weaken it"):
        parse_attack("gaussian:2:std=1e9")(vectors(dtype=torch.float16))


def test_another_type():
    with pytest.raises(TypeError, match=r"attack is a name .* got 3"):
        parse_attack(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="aggregate is a name"):
        RobustMean(None)  # type: ignore[arg-type]
    assert parse_rule("centered-clip:2") == parse_rule("centred-clip:2")
    with pytest.raises(ValueError, match="copies an honest worker, 0 to 2 of 4; got 3"):
        parse_attack("mimic:1:worker=3").check(4)
