"""Several processes do what one does: the same weights, metrics, evaluations, checkpoints and bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import (
    CASES,
    EVALUATED,
    HANDED_OVER,
    META_BATCH,
    MORE_ON_FOUR,
    ON_FOUR,
    RESUMED,
    RESUMED_ON_FOUR,
    accumulated,
    all_cases,
    differ,
    run,
)
from forked import metamom, run_forked, script
from processes import REPOSITORY, free_port, torchrun

from metamom import BiasedAccumulator, evaluate
from metamom.bias import Layout, parse
from metamom.distributed import World, start
from metamom.tasks import Sinusoid
from metamom.training.checkpoints import load
from metamom.training.loop import MEASURE_EVERY

pytestmark = pytest.mark.xdist_group("processes")  # what the fixtures make takes a minute: once
SIZES = (2, 4)
EACH = [
    *((name, 2) for name in CASES),
    *((name, 4) for name in ON_FOUR),
    *(pytest.param(name, 4, marks=pytest.mark.slow) for name in MORE_ON_FOUR),
]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Every case on one process."""
    found = {name: run(case) for name, case in CASES.items()}
    return {name: ([p.detach() for p in learner.parameters()], metrics) for name, (learner, metrics) in found.items()}


def on_processes(size: int, folder: Path, *which: Sequence[str]) -> dict[str, Any]:
    """What processes found that did all of these cases."""
    ended = run_forked(all_cases, size, folder / f"said-{size}", folder, *which)
    assert [status for status, _ in ended] == [0] * size, ended
    found: dict[str, Any] = torch.load(folder / f"{size}.pt", weights_only=True)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Every case on 2 and many on 4 processes; runs go from 1 process to 2, some to 4, and end on 1."""
    folder = tmp_path_factory.mktemp("together")
    for name in RESUMED:
        run(CASES[name], iterations=HANDED_OVER[1], run_dir=folder / "handed over" / name)
    found = {
        2: on_processes(2, folder, list(CASES), RESUMED),
        4: on_processes(4, folder, ON_FOUR, RESUMED_ON_FOUR),
        1: {},
    }
    for name in RESUMED:
        learner, _ = run(CASES[name], run_dir=folder / "handed over" / name, resume=True)
        found[1][name] = [p.detach() for p in learner.parameters()]
    return found


@pytest.fixture(scope="module")
def more_on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The other cases on 4 processes."""
    return on_processes(4, tmp_path_factory.mktemp("more"), MORE_ON_FOUR, ())


@pytest.fixture
def result(name: str, size: int, request: pytest.FixtureRequest) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Weights and metrics of a case on several processes."""
    if size == 4 and name in MORE_ON_FOUR:
        return request.getfixturevalue("more_on_four")[name]  # type: ignore[no-any-return]
    return request.getfixturevalue("together")[size][name]  # type: ignore[no-any-return]


def assert_same_weights(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """To 1e-12 in float64 and 1e-5 in float32: only the order of sums may differ."""
    tolerance = 1e-12 if wanted[0].dtype is torch.float64 else 1e-5
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "size"), EACH)
def test_the_trajectory_does_not_depend_on_the_number_of_processes(name, size, alone, result):
    weights, metrics = result
    wanted, wanted_metrics = alone[name]
    assert_same_weights(weights, wanted)
    tolerance = 1e-9 if CASES[name].dtype is torch.float64 else 1e-4
    assert len(metrics) == CASES[name].steps
    for line, twin in zip(metrics, wanted_metrics, strict=True):
        assert (line["world_size"], twin["world_size"]) == (size, 1)
        assert line["wire_bytes"] == twin["wire_bytes"]
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(twin[key], rel=tolerance)
        if line["bias_error"] is not None:
            assert line["bias_error"] == pytest.approx(twin["bias_error"], rel=tolerance, abs=tolerance)
        free = CASES[name].bias == "none" and CASES[name].aggregate == "mean"
        shared = CASES[name].workers < size
        assert (line["bias_error"] is not None) == (free or shared or line["step"] % MEASURE_EVERY == 0)


def test_a_trajectory_moves(alone):
    start_weights = [p.detach() for p in run(CASES["sign"], iterations=1)[0].parameters()]
    for weights, _ in alone.values():
        assert float((weights[0] - start_weights[0].to(weights[0])).abs().max()) > 1e-5


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_on_more_processes_and_on_fewer(name, alone, together):
    """A step on one process, one on two, for some one on four, and the rest on one."""
    assert_same_weights(together[1][name], alone[name][0])


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_is_the_same_bit_for_bit(size, together):
    weights, values = together[size]["evaluated"]
    learner, _ = run(list(CASES.values())[-1], iterations=1)
    with torch.no_grad():
        for p, w in zip(learner.parameters(), weights, strict=True):
            p.copy_(w)
    for tasks, found in zip(EVALUATED, values, strict=True):
        assert torch.equal(evaluate(learner, Sinusoid(), tasks=tasks, steps=(0, 3)).values, found)


@pytest.mark.parametrize(("name", "size"), EACH)
def test_bytes_are_those_that_were_exchanged(name, size, result):
    """Of a step without measurements: an agreement, the tasks' losses, and messages or gradients."""
    case = CASES[name]
    if case.variant in ("storm", "hessian") and not case.bias.startswith("ef21"):
        pytest.skip("two gradients a step, or a gradient and a Hessian-vector product")
    if case.more:
        pytest.skip("workers are absent: their messages are counted in the next test")
    weights, metrics = result
    line = metrics[1]
    d, entry = sum(w.numel() for w in weights), weights[0].element_size()
    others = size - 1
    agreement, losses = others * size * 24, others * META_BATCH * entry
    if case.workers < size:
        gradients = 2 * others * case.workers * d * entry
    elif case.bias != "none" and parse(case.bias).compresses:
        messages = line["wire_bytes"]
        least = case.workers * parse(case.bias).wire_bytes(d, entry, Layout(w.shape for w in weights))
        assert messages == least
        gradients = others * messages if case.server == "replicated" else others * messages // size
        gradients += others * size * (case.workers // size) * 8 * parse(case.bias).varies  # their lengths
    else:
        assert line["wire_bytes"] == case.workers * d * entry
        if case.aggregate == "mean":
            gradients = others * d * entry * (2 if case.server == "replicated" else 1)
        else:
            gradients = others * case.workers * d * entry
    if case.server == "rank0" and case.workers >= size:
        gradients += agreement + others * d * entry  # the server's result
    memory = 0 if case.estimator == "exact" else others * META_BATCH * (8 + d * entry)
    assert line["sent_bytes"] == agreement + losses + gradients + memory


PRESENT = [name for name, case in CASES.items() if case.more]


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in PRESENT), *((name, 4) for name in PRESENT if name in ON_FOUR)]
)
def test_bytes_of_the_messages_of_those_who_are_present(name, size, result):
    case = CASES[name]
    weights, metrics = result
    d, entry = sum(w.numel() for w in weights), weights[0].element_size()
    present = max(1, round(case.more["participation"] * case.workers))
    operator = parse(case.bias)
    each = operator.wire_bytes(d, entry, Layout(w.shape for w in weights)) if operator.compresses else d * entry
    assert [line["wire_bytes"] for line in metrics] == [present * each] * len(metrics)
    assert all(line["sent_bytes"] > 0 for line in metrics)


@pytest.mark.parametrize("size", SIZES)
def test_an_accumulator_shares_its_workers(size, together):
    assert_same_weights(together[size]["accumulated"], accumulated(8))


def test_one_process_sends_nothing(alone):
    assert all(line["sent_bytes"] == 0 for _, metrics in alone.values() for line in metrics)


def test_the_command_line_on_two_processes(tmp_path):
    """Progress, prints and files are process 0's; an evaluation prints one JSON object."""
    command = ["train", "sinusoid", "--workers", "4", "--bias", "topk:5%", "--iterations", "6", "--run-dir"]
    ended = run_forked(metamom, 2, tmp_path / "said", *command, str(tmp_path / "run"), "--server", "rank0")
    assert [status for status, _ in ended] == [0, 0], ended
    assert "trained for 6 iterations" in ended[0][1]
    assert ended[1][1] == ""
    assert json.loads((tmp_path / "run" / "config.json").read_text())["length"]["processes"] == 2
    evaluation = ["evaluate", str(tmp_path / "run"), "--tasks", "20", "--steps", "0,1", "--json"]
    first, second = run_forked(metamom, 2, tmp_path / "shared", *evaluation)
    (one,) = run_forked(metamom, 1, tmp_path / "one", *evaluation)
    assert (first[0], second[0], one[0]) == (0, 0, 0)
    assert second[1] == ""
    assert json.loads(first[1]) == json.loads(one[1])


@pytest.mark.slow
def test_two_machines_are_two_torchruns(tmp_path):
    """The command for two boxes of docs/howto/many-machines.md, both of them this one."""
    port = free_port()
    train = ["-m", "metamom", "train", "sinusoid", "--workers", "4", "--bias", "topk:5%", "--iterations", "6"]
    train += ["--dtype", "float64", "--run-dir"]
    options = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "7"]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(torchrun, [*train, str(tmp_path / "both")], 2, *options) for _ in range(2)]
        ended = [each.result() for each in both]
    assert [each.returncode for each in ended] == [0, 0], [each.stderr for each in ended]
    assert "".join(each.stdout for each in ended).count("trained for 6 iterations") == 1
    ((status, said),) = run_forked(metamom, 1, tmp_path / "said", *train[2:], str(tmp_path / "one"))
    assert status == 0, said
    weights = [load(tmp_path / run / "checkpoints" / "step-00000006.pt")["learner"] for run in ("both", "one")]
    assert_same_weights(*([w for w in each.values() if isinstance(w, torch.Tensor)] for each in weights))


BEFORE = "import sys\nfrom pathlib import Path\n"
AFTER = """
assert "torch._dynamo" in sys.modules
if Path("/proc/self/task").exists():
    names = [thread.joinpath("comm").read_text() for thread in Path("/proc/self/task").iterdir()]
    assert not [name for name in names if "gloo" in name], names
"""


def test_the_script_of_the_documentation_under_torchrun(tmp_path):
    """On one process and on two: the same evaluation, to what the order of sums may change.

    In the end no thread of gloo's is left, although torch.compile's parts, which every optimizer imports, came in
    between: one that is alive when the interpreter shuts down may abort the process, whose work is done.
    """
    page = (REPOSITORY / "docs" / "howto" / "many-machines.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "distributed.start()" in block)
    assert "range(200)" in code
    path = tmp_path / "script.py"
    code = code.replace("range(200)", "range(8)") + "\nif world.first:\n    print(list(result.mean))\n"
    path.write_text(code)
    ((status, alone),) = run_forked(script, 1, tmp_path / "alone", path)
    assert status == 0, alone
    made, met = (next(line for line in code.splitlines() if line.startswith(word)) for word in ("opt =", "with dist"))
    code = code.replace(f"{made}\n{met}", f'{met}\n    assert "torch._dynamo" not in sys.modules\n    {made}')
    path.write_text(BEFORE + code + AFTER)
    ended = torchrun([str(path)], 2)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(alone) == pytest.approx(json.loads(ended.stdout), rel=1e-5)


def test_processes_that_do_not_fit_are_reported_what_to_do():
    world = World(rank=1, size=4)
    assert [*world.workers(8)] == [2, 3]
    assert [*world.workers(2)] == [0]
    with pytest.raises(ValueError, match=r"a multiple of 4, or divide it .*; got 6"):
        world.workers(6)
    with pytest.raises(TypeError, match="whole number"):
        world.workers(2.0)
    accumulator = BiasedAccumulator([torch.nn.Parameter(torch.ones(2))], workers=8, world=world)
    accumulator.params[0].grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"this process has \[2, 3\]: got worker 4"):
        accumulator.add(4)
    with pytest.raises(ValueError, match="pass workers="):
        BiasedAccumulator([torch.nn.Parameter(torch.ones(2))], world=world)
    with pytest.raises(ValueError, match="replicated, rank0; got 'rank1'"):
        start(server="rank1")
    with pytest.raises(ValueError, match=r"must be > 0 .* seconds; got 0"):
        start(timeout=0)


def test_a_process_alone_needs_no_others(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with start() as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.broadcast_object(lambda: 3) == 3
        assert world.gather(torch.ones(2)).shape == (1, 2)
        with pytest.raises(KeyError), world.together():
            raise KeyError("mine")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="torchrun should have set"):
        start()


def test_processes_that_differ_are_refused_by_all(tmp_path):
    first, second = run_forked(differ, 2, tmp_path)
    assert (first[0], second[0]) == (0, 0), first
    assert first[1] == second[1]
    weights, arguments, generator, number, trained, gradient = first[1].splitlines()
    assert "differ in what they do" in weights
    assert "at weights" in weights
    assert "torch.manual_seed" in weights
    assert "workers=2" in arguments
    assert "workers=4" in arguments
    assert "make it with seed=" in generator
    assert "a multiple of 2" in number
    assert "differ in iterations: 2 on process 0, 3 on process 1" in trained
    assert gradient == "[0.0, 0.0, 0.0, 6.0]"  # EF21's first step: the largest entries, 4 and 8, in the mean
