"""A model in DDP, on real processes: its aggregate is that of the same gradients in one process, or in plain loops."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ddp_cases import (
    AGGREGATES,
    BY_BUCKET,
    OPERATORS,
    SAVED,
    SCOPES,
    SHAPES,
    SIZES,
    STEPS,
    all_cases,
    flat,
    gradient_of,
    rows_of,
)
from forked import run_forked
from torch import Tensor

from metamom.bias import BiasOperator, Layout, parse
from metamom.server.aggregate import aggregate

pytestmark = pytest.mark.xdist_group("ddp")
PROCESSES = (2, 3, 1)  # in this order: two save what one and three go on with
WHOLE = ((0, 1, 2, 3),)
ENDS = torch.tensor(SIZES).cumsum(0).tolist()
each_size = pytest.mark.parametrize("size", PROCESSES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("ddp")
    for size in PROCESSES:
        ended = run_forked(all_cases, size, folder / f"said-{size}", folder)
        assert [status for status, _ in ended] == [0] * size, ended
    return {n: [torch.load(folder / f"found by {rank} of {n}") for rank in range(n)] for n in PROCESSES}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def in_one_process(rows: Sequence[Tensor], bias: BiasOperator | str, how: str = "mean") -> Tensor:
    """Our own aggregation of each step's gradients ``[n, d]``."""
    operator = parse(bias) if isinstance(bias, str) else copy.deepcopy(bias)
    return torch.stack([aggregate(each, operator, how, sizes=Layout(SHAPES))[0] for each in rows])


def all_rows(size: int) -> list[Tensor]:
    return [rows_of(size, number) for number in range(STEPS)]


def in_plain_loops(
    spec: str, rows: Sequence[Tensor], groups: Sequence[Any], draws: Sequence[int] = range(STEPS)
) -> Tensor:
    """Each group's operator on each worker's part, with error feedback by its definition.

    Args:
        spec: the operator.
        rows: each step's gradients ``[n, d]``; workers that come late start at zero.
        groups: each step's groups of parameters.
        draws: the number of the call that each step is.
    """
    around, _, inner = spec.partition(":") if spec.startswith(("ef", "clip21")) else ("", "", spec)
    operator = parse(f"clip:{inner}" if around == "clip21" else inner)
    most, d = max(map(len, rows)), sum(SIZES)
    kept, momentum, out = torch.zeros(most, d), torch.zeros(most, d), []
    for number, gradients, parts in zip(draws, rows, groups, strict=True):
        sent = torch.zeros_like(gradients)
        for group in parts:
            at = torch.cat([torch.arange(ENDS[i] - SIZES[i], ENDS[i]) for i in group])
            for worker, gradient in enumerate(gradients):
                g = gradient[at]
                if around == "ef21-sgdm(0.2)":
                    momentum[worker, at] = g = 0.8 * momentum[worker, at] + 0.2 * g
                wanted = {"": g, "ef14": g + kept[worker, at]}.get(around, g - kept[worker, at])
                c = operator(wanted, step=number, workers=[worker], sizes=Layout(SHAPES[i] for i in group))
                if around == "ef14":
                    kept[worker, at] = wanted - c
                elif around:
                    kept[worker, at] = c = kept[worker, at] + c
                sent[worker, at] = c
        out.append(sent.mean(0))
    return torch.stack(out)


@each_size
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_our_own_aggregation(name, size, found):
    wanted = in_one_process(all_rows(size), OPERATORS[name])
    for process in found[size]:
        assert_close(process["every"][name], wanted)


@each_size
@pytest.mark.parametrize("spec", BY_BUCKET)
def test_each_bucket_by_itself_also_once_ddp_has_made_them_again(spec, size, found):
    for process in found[size]:
        out, groups = zip(*process["buckets"][spec], strict=True)
        assert [len(each) for each in groups] == [1, 3, 3, 3]
        assert_close(torch.stack(out), in_plain_loops(spec, all_rows(size), groups))


@pytest.mark.parametrize("how", AGGREGATES)
@pytest.mark.parametrize("spec", ["none", "ef21:topk:30%"])
def test_robust_aggregates(how, spec, found):
    wanted = in_one_process(all_rows(3), spec, how)
    for process in found[3]:
        assert_close(process["robust"][f"{how} {spec}"], wanted)


@each_size
def test_without_an_operator_it_is_ddp(size, found):
    for process in found[size]:
        got, wanted = process["torch"]["mean"]
        assert_close(got, wanted)
        assert_close(wanted, in_one_process(all_rows(size), "none"))


@each_size
def test_in_float16_it_is_the_fp16_compress_hook(size, found):
    """Torch divides before the sum and we do after it: the same bits, unless the number of processes is odd."""
    for process in found[size]:
        got, wanted = process["torch"]["float16"]
        assert not torch.equal(got, in_one_process(all_rows(size), "none"))
        torch.testing.assert_close(got, wanted, rtol=2e-3 * (size == 3), atol=1e-3 * (size == 3))


@each_size
def test_accumulated_gradients_are_one_gradient(size, found):
    rows = [rows_of(size, number) + rows_of(size, number + 1) for number in range(0, 2 * STEPS, 2)]
    for process in found[size]:
        assert_close(process["accumulated"], in_one_process(rows, "ef21:topk:30%"))


@each_size
@pytest.mark.parametrize("case", ["partly used", "static graph"])
def test_parameters_that_a_process_does_not_use_have_zero_gradients(case, size, found):
    rows = all_rows(size)
    for each in rows:
        each[1:, 11] = 0
        each[:, 12:] = 0
    for process in found[size]:
        assert_close(process[case], in_one_process(rows, "ef21:topk:30%")[:, :12])


@each_size
def test_gradients_that_are_views_of_buckets(size, found):
    for process in found[size]:
        assert_close(process["views"], in_one_process(all_rows(size), "ef21:topk:30%"))


@each_size
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits_have_a_state_of_32(dtype, size, found):
    rows = [
        torch.stack([flat(gradient_of(rank, number, dtype)) for rank in range(size)]).float() for number in range(STEPS)
    ]
    wanted = in_one_process(rows, "ef21:topk:30%").to(dtype)
    for process in found[size]:
        eps = torch.finfo(dtype).eps  # sums in another order may round to the next number
        torch.testing.assert_close(process["16 bits"][str(dtype)], wanted, rtol=eps, atol=0)


@each_size
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_that_a_gradient_scaler_skips_did_not_happen(scope, size, found):
    for process in found[size]:
        weights, scales, groups = process["scaled"][scope]
        assert scales == [128, 64, 64, 128]
        taken = [0, 2, 3]
        rows, parts = all_rows(size), [groups[number] for number in taken]
        moves = in_plain_loops("ef21:topk:30%", [rows[number] for number in taken], parts, range(3))
        wanted = -moves.cumsum(0)
        assert_close(weights, torch.stack([wanted[0], wanted[0], wanted[1], wanted[2]]))


@each_size
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("spec", SAVED)
def test_a_saved_state_goes_on(spec, scope, size, found):
    for process in found[size]:
        wanted = process["saved"][f"{spec} {scope}"]
        assert torch.equal(process["resumed"][f"{spec} {scope}"], wanted)
        assert torch.equal(process["resumed"][f"{spec} {scope}, own"], wanted)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("spec", SAVED)
def test_a_state_of_two_processes_goes_on_on_another_number(spec, scope, size, found):
    """Workers that there still are keep theirs; the third starts at zero."""
    rows = [rows_of(2 if number < 2 else size, number) for number in range(STEPS)]
    groups = [WHOLE] * STEPS if scope == "model" else [g for _, g in found[size][0]["buckets"]["none"]]
    wanted = in_plain_loops(spec, rows, groups)[2:]
    for process in found[size]:
        assert_close(process["resumed"][f"{spec} {scope}, from 2"], wanted)


@each_size
def test_a_state_of_buckets_is_one_of_the_model(size, found):
    spec = "ef21:topk:30%"
    groups = [g for _, g in found[size][0]["buckets"]["none"]][:2] + [WHOLE] * 2
    wanted = in_plain_loops(spec, all_rows(size), groups)[2:]
    for process in found[size]:
        assert_close(process["resumed"]["bucket to model"], wanted)


@each_size
def test_what_is_reported_is_what_is_sent(size, found):
    for process in found[size]:
        report, sent = process["reported"]
        message = parse("topk:30%").wire_bytes(sum(SIZES))
        norm = torch.linalg.vector_norm(in_one_process(all_rows(size), "topk:30%")[2])
        assert report == {
            "grad_norm": pytest.approx(float(norm), rel=1e-5),
            "bias_error": None,
            "wire_bytes": report["wire_bytes"],
        }
        if size > 1:
            assert report["wire_bytes"] == size * message
            assert sent == size * (size - 1) * (message + 24)  # the messages, and the agreement


@each_size
def test_processes_that_have_run_out_of_data_have_zero_gradients(size, found):
    rows = all_rows(size)
    rows[-1][1:] = 0
    wanted = in_one_process(rows, "topk:30%")
    assert_close(found[size][0]["uneven"], wanted)
    for process in found[size][1:]:
        assert_close(process["uneven"], wanted[:-1])


def test_a_group_of_some_processes(found):
    rows = [rows_of(2, number) for number in range(STEPS)]
    wanted = in_one_process(rows, "ef21:topk:30%")
    assert found[3][0]["group"] is None
    for process in found[3][1:]:
        assert_close(process["group"], wanted)


@each_size
def test_the_optimizer_does_not_average_again(size, found):
    for process in found[size]:
        assert "ef21-sgdm(0.2):topk:30% carries the momentum on the workers" in process["momentum"]


@each_size
def test_a_model_with_a_hook_can_be_copied_and_pickled(size, found):
    for process in found[size]:
        for state in process["copied"]:
            assert torch.equal(state["workers"][0]["estimate"], process["copied"][0]["workers"][0]["estimate"])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("generator", "ValueError: randk:2 draws from a generator .* make it with seed="),
        ("bare", "TypeError: register takes a model in torch.nn.parallel.DistributedDataParallel.*; got a Linear"),
        ("k", r"ValueError: TopK needs 1 <= k <= 16 .*got k=17"),
        ("scope", "ValueError: scope .*model.*bucket.*layer"),
        ("aggregate", "ValueError: trimmed:0.1 of 2 workers leaves out none"),
        ("dtype", "TypeError: dtype is a floating-point dtype.*int8"),
        ("scaler", "TypeError: scaler is the torch.amp.GradScaler"),
        ("twice", "ValueError: this DDP model has a communication hook already"),
        ("sparse", "TypeError: operators act on dense gradients; make 0 with sparse=False"),
        ("nan", "NonFiniteError: the gradient of weights.0 on process 1 has infinite .* pass it as scaler="),
        ("another's", "ValueError: the state is of worker [01], and this process is worker [01]"),
        ("count", "ValueError: the state has error feedback of 5 workers, and each of these 2 processes is a worker"),
        ("names", "ValueError: the state is of a model with other parameters: weights.0 differs"),
        ("no state", "ValueError: this is not a state of BiasedReduction: it has no aggregate, operator"),
    ],
)
def test_what_is_refused_is_refused_by_all(case, said, found):
    for process in found[2]:
        assert re.search(said, process["refused"][case]), process["refused"][case]
