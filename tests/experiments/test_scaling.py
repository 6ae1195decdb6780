"""The scaling experiment: its model by hand and against real processes, its fits, simulation and command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from forked import run_forked

from metamom.bias.spec import parse
from metamom.experiments.scaling import constants, fit, measuring, model, pictures, planning, simulate, step
from metamom.experiments.scaling.__main__ import main
from metamom.experiments.scaling.clock import Clock, TimedOperator
from metamom.experiments.scaling.loopback import loopback_bytes
from metamom.experiments.scaling.model import Exchange, Kind, Line, Link, Plan
from metamom.experiments.scaling.planning import Case
from metamom.experiments.scaling.problems import QUICK, Problem
from metamom.experiments.scaling.simulate import Run
from metamom.experiments.shared.peak import alone
from metamom.server.aggregate import Aggregation

pytestmark = pytest.mark.xdist_group("scaling")  # the fixture takes long: once
LINK = Link(latency=1e-3, bandwidth=1e6)
DENSE, SPARSE = Kind(1000, dense=True), Kind(20, dense=False, apply=0.5, encode=2.0, decode=Line(3.0, 0.25))
SERVERS = ["replicated", "rank0"]
COLLECTIVES = [model.all_reduce, model.all_gather, model.gather, model.broadcast, model.reduce]


SAID = [
    "strong scaling: 4 tasks of 2 workers",
    "weak scaling: 4 tasks in each process",
    "| sent_bytes |",
    "loopback between 2 processes",
    "predicted / measured",
    "1 Gbit/s",
    "100 Gbit/s",
    "ef21:topk:1%, rank0",
]


def plan(n: int, server: str = "replicated", workers: int = 1) -> Plan:
    return Plan(n, workers, tasks=4, gradient=1000, outcome=8, server=server)  # type: ignore[arg-type]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_process_sends_nothing(collective):
    assert collective(1, 1000) == Exchange(0, 0, 0)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_a_step_of_one_worker_is_what_it_computes(server, kind):
    assert model.exchange(plan(1, server), kind) == Exchange(0, 0, 0)
    found = model.seconds(plan(1, server), kind, Line(1.0, 10.0), LINK)
    assert found == (41.0, kind.apply, 0.0, 0.0)


@pytest.mark.parametrize("n", [2, 3, 8, 10_000])
def test_what_a_ring_sends(n):
    """Dense, 2 (n-1)/n of the gradient from each process; messages, (n-1) of them from each."""
    summed, gathered = model.all_reduce(n, 8000), model.all_gather(n, 8000)
    assert summed.path == pytest.approx(2 * (n - 1) / n * 8000)
    assert summed.sent == pytest.approx(n * summed.path)
    assert gathered.path == (n - 1) * 8000
    assert gathered.sent == n * gathered.path
    assert (summed.hops, gathered.hops) == (2 * (n - 1), n - 1)


@pytest.mark.parametrize(
    ("server", "kind", "expected"),
    [
        # agreement and outcomes: 3 + 3 hops, 3 * 24 + 3 * 8 bytes of a process, 12 * 32 of all
        ("replicated", DENSE, Exchange(6 + 6, 96 + 1500, 384 + 6000)),
        ("replicated", SPARSE, Exchange(6 + 3, 96 + 60, 384 + 240)),
        # with a second agreement, 3 hops and 3 * 24 bytes, and a broadcast in 2 rounds
        ("rank0", DENSE, Exchange(9 + 4 + 2, 168 + 1500 + 2000, 672 + 3000 + 3000)),
        ("rank0", SPARSE, Exchange(9 + 1 + 2, 168 + 60 + 2000, 672 + 60 + 3000)),
    ],
)
def test_a_step_of_four_processes_by_hand(server, kind, expected):
    found = model.exchange(plan(4, server), kind)
    assert found == pytest.approx(expected)
    assert found.seconds(LINK) == pytest.approx(1e-3 * expected.hops + 1e-6 * expected.path)


def test_the_parts_of_a_step_by_hand():
    found = model.seconds(plan(4, workers=2), SPARSE, Line(1.0, 10.0), LINK, cores=2)
    assert (found.compute, found.encode) == (2 * 41.0, 2 * 2 * 2.0)  # four processes in two turns
    assert found.decode == 2 * (3.0 + 8 * 0.25)
    alone_decodes = model.seconds(plan(4, "rank0", workers=2), SPARSE, Line(1.0, 10.0), LINK, cores=2)
    assert alone_decodes.decode == 3.0 + 8 * 0.25
    assert model.wire_bytes(plan(4, workers=2), SPARSE) == 160


@pytest.mark.parametrize("tree", [False, True], ids=["ring", "tree"])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_more_is_never_faster(server, kind, tree):
    def total(n: int, of: Kind = kind, link: Link = LINK) -> float:
        return model.seconds(plan(n, server), of, Line(0.0, 0.0), link, tree=tree).total

    several = [2, 3, 4, 10, 100, 1000, 10_000]
    times = [total(n) for n in several]
    assert times == sorted(times)
    for n in several:
        assert total(n, link=Link(LINK.latency, 2 * LINK.bandwidth)) < total(n)
        assert total(n, link=Link(LINK.latency / 2, LINK.bandwidth)) < total(n)
        if not kind.dense:
            assert total(n, of=kind._replace(message=21)) > total(n)


def test_a_tree_takes_fewer_hops_for_the_same_bytes():
    for collective in (model.all_reduce, model.all_gather, model.reduce):
        ring, tree = collective(1000, 64), collective(1000, 64, tree=True)
        assert tree[1:] == ring[1:]
        assert tree.hops < ring.hops / 40


def case(message: int, **options: float) -> Case:
    kinds = {"none": Kind(4000, dense=True), "some": Kind(message, dense=False, **options)}  # type: ignore[arg-type]
    return Case("by hand", 1000, 1, 4, Line(0.0, 0.0), kinds)


def test_where_compression_pays_by_bytes_alone():
    """All gathered, n messages of m bytes; summed, 2 D bytes: they cross at n = 2 D / m, here 80."""
    link = Link(0.0, 1e9)
    assert case(100).speedup(79, "some", "replicated", link) > 1
    assert case(100).speedup(80, "some", "replicated", link) == pytest.approx(1.0)
    assert case(100).speedup(81, "some", "replicated", link) < 1
    last = max(n for n in planning.WORKERS if n < 80)
    assert planning.pays(case(100), "some", "replicated", link) == f"2 to {last}"
    assert planning.pays(case(100, encode=1.0), "some", "replicated", link) == "never"


def test_ranges():
    assert planning.ranges(range(10), lambda n: n in (0, 1, 5, 8, 9)) == [(0, 1), (5, 5), (8, 9)]
    assert planning.ranges([3, 4], lambda n: False) == []


def test_faster_workers_wait_for_the_same_network():
    slow = case(100, encode=2.0)
    assert slow.seconds(4, "some", "replicated", LINK) - slow._replace(faster=4.0).seconds(
        4, "some", "replicated", LINK
    ) == pytest.approx(1.5)


def test_fits_recover_known_constants():
    found = fit.line([(x, 3e-4 + 2e-9 * x) for x in (1e3, 1e4, 1e6, 1e7)])
    assert found == pytest.approx((3e-4, 2e-9), rel=1e-9)
    exchanges = [collective(3, size) for collective in COLLECTIVES for size in (16, 10_000, 4_000_000)]
    assert fit.link([(each, each.seconds(Link(7e-5, 2e9))) for each in exchanges]) == pytest.approx((7e-5, 2e9))


def test_fits_with_noise_are_near_and_never_negative():
    noise = 1 + 0.1 * torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = [(10.0 ** (1 + i % 6), 0.0) for i in range(40)]
    noisy = [(x, (1e-5 + 1e-9 * x) * float(factor)) for (x, _), factor in zip(points, noise, strict=True)]
    assert fit.line(noisy) == pytest.approx((1e-5, 1e-9), rel=0.1)
    assert fit.line([(1.0, 1.0), (2.0, 4.0)]).fixed == 0.0  # plain least squares say -2


@pytest.mark.parametrize(
    ("fitted", "timings", "message"),
    [
        (fit.line, [(1.0, 2.0), (1.0, 3.0)], "two or more sizes"),
        (fit.link, [(Exchange(1, 2, 3), 1.0)], "two or more different exchanges"),
        (fit.link, [(Exchange(1, 10, 0), 1.0), (Exchange(1, 100, 0), 0.5)], "larger messages"),
    ],
)
def test_timings_that_tell_nothing(fitted, timings, message):
    with pytest.raises(ValueError, match=message):
        fitted(timings)


def test_operators_by_their_own_bytes():
    timings = constants.of_operators(replace(QUICK, repeats=1))
    for spec in QUICK.planned:
        kind = constants.kind_of(timings, spec, 5000)
        assert kind.message == parse(spec).wire_bytes(5000)
        assert kind.dense == (spec == "none")
        assert kind.dense or min(kind.apply, kind.encode, kind.decode(1)) > 0


def test_strong_scaling_has_one_batch_for_all():
    problem = Problem("any", None, strong=10, weak=3)
    assert {problem.deal("strong", n, (1, 2, 3)) for n in (1, 2, 3)} == {(6, 12)}
    assert [problem.deal("weak", n, (1, 2, 3)) for n in (1, 2, 3)] == [(1, 3), (2, 6), (3, 9)]


@pytest.mark.parametrize("spec", ["topk:5%", "qsgd:4", "sign", "ef21:topk:5%"])
def test_a_timed_operator_does_the_same(spec):
    clock, rows = Clock(), torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    plain, timed = Aggregation(3, parse(spec)), Aggregation(3, TimedOperator(parse(spec), clock))
    for each in (plain, timed):
        each.add(rows, range(3))
    (wanted, report), (found, timed_report) = plain.finish(), timed.finish()
    assert torch.equal(found, wanted)
    assert timed_report == report
    assert set(clock.read()) == {"encode"}
    assert clock.read() == {}


def test_an_inner_part_counts_as_the_outer_one():
    clock = Clock()
    with clock.part("outer"), clock.part("inner"):
        pass
    assert list(clock.read()) == ["outer"]


def test_the_kernels_counter(tmp_path):
    counters = tmp_path / "dev"
    assert loopback_bytes(counters) is None
    counters.write_text("Inter-| Receive\n face |bytes packets\n  eth0: 5 1\n    lo: 1234 7 0\n")
    assert loopback_bytes(counters) == 1234
    counters.write_text("  eth0: 5 1\n")
    assert loopback_bytes(counters) is None


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Quick measurements on two real processes, and the model on them; of its figures, which take long, the first.

    The processes are forked; in a slow test below torchrun starts them.
    """
    path, draw = tmp_path_factory.mktemp("scaling"), pictures.pays

    def on_forked(module: str, n: int, plan: dict[str, Any]) -> Any:
        assert module == step.__name__
        said, found = path / "plan.json", path / "found.json"
        said.write_text(json.dumps(plan))
        ended = run_forked(step.main, n, path / "said", [str(said), str(found)])
        assert [status for status, _ in ended] == [0] * n, ended
        return json.loads(found.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "on_processes", on_forked)
        patch.setattr(pictures, "pays", lambda file, *given: draw(file, *given) if file.stem == "pays-0" else None)
        main(["--quick", "--processes", "2", "--only", "measure", "--run-dir", str(path)])
        measured = json.loads((path / "measured.json").read_text())
        assert all(min(each["seconds"]) > 0 for each in measured["collectives"])
        for each in measured["collectives"]:  # a busy machine's may not grow with the bytes: a link that does
            each["seconds"] = [planning.cost(each["kind"], 2, each["size"]).seconds(LINK)]
        (path / "measured.json").write_text(json.dumps(measured))
        main(["--quick", "--processes", "2", "--only", "model", "--run-dir", str(path)])
    return path


def test_the_models_bytes_are_those_of_real_processes(run_dir):
    measured = json.loads((run_dir / "measured.json").read_text())
    problems = {problem.name: problem for problem in QUICK.problems}
    assert len(measured["cells"]) == 2 * 2 * 2 * len(QUICK.operators)
    for cell in measured["cells"]:
        n, outcome = cell["processes"], problems[cell["problem"]].outcomes * cell["tasks"]
        step = Plan(n, cell["workers"] // n, cell["tasks"], 4 * cell["entries"], outcome, cell["server"])
        operator = parse(cell["operator"])
        kind = Kind(operator.wire_bytes(cell["entries"]), dense=not operator.compresses)
        assert model.exchange(step, kind).sent == cell["sent_bytes"], cell["operator"]
        assert model.wire_bytes(step, kind) == cell["wire_bytes"], cell["operator"]
        assert cell["kernel"] is None or cell["kernel"]["counted"] > 0
        assert all(
            sum(parts.values()) == pytest.approx(t) for parts, t in zip(cell["parts"], cell["seconds"], strict=True)
        )


@pytest.mark.slow
def test_torchrun_starts_the_processes(tmp_path):
    main(["--quick", "--processes", "2", "--only", "measure", "--run-dir", str(tmp_path)])
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert {cell["processes"] for cell in measured["cells"]} == {2}


def test_the_report_has_what_was_asked_for(run_dir):
    text = (run_dir / "report.md").read_text()
    for said in SAID:
        assert said in text
    for name in ("measured", "pays-0", "pays-1", "pays-2"):
        assert f"](figures/{name}.png)" in text
    for name in ("measured", "pays-0"):
        assert (run_dir / "figures" / f"{name}.png").stat().st_size > 10_000


def test_a_second_run_keeps_the_parts_of_the_first(run_dir, monkeypatch):
    monkeypatch.setattr(pictures, "pays", lambda path, case, latency: None)
    before = (run_dir / "parts" / "measure.md").read_text()
    main(["--quick", "--only", "model", "--latency", "7", "--run-dir", str(run_dir)])
    text = (run_dir / "report.md").read_text()
    assert before.strip() in text
    assert "latency 7 µs" in text
    assert "latency 50 µs" not in text


def test_the_models_misses_are_of_every_step(run_dir):
    found = planning.misses(json.loads((run_dir / "measured.json").read_text()), QUICK)
    assert len(found) == 2 * 2 * 2 * len(QUICK.operators)
    assert all(miss.predicted > 0 and math.isfinite(miss.error) for miss in found)
    (_, _, middle, size, worst, _), *_ = planning.summary(found)
    assert abs(middle) <= size <= abs(worst)


@pytest.mark.parametrize("run", simulate.runs(QUICK), ids=str)
def test_simulated_workers_log_the_models_bytes(run):
    seconds, _, _, logged, predicted = simulate.simulate(run)
    assert seconds > 0
    assert logged == predicted > 0


def test_the_simulations_are_reported(monkeypatch):
    """In processes of their own they take longer: one of them here, the others in this process."""
    assert alone(simulate.simulate, Run(None, 4, "topk:1%", 2))[3] == 4 * 18 * 8
    monkeypatch.setattr(simulate, "alone", lambda function, run: function(run))
    lines = simulate.answer(QUICK).splitlines()
    assert sum(line.startswith("| sinusoid MLP") for line in lines) == 4
    assert sum(line.startswith("| Conv4-4, 4, ") for line in lines) == 3
    monkeypatch.setattr(simulate, "alone", lambda function, run: [1.0, 1.0, 1.0, 8.0, 9.0])
    with pytest.raises(RuntimeError, match=r"logged 8 bytes, but the model predicts 9"):
        simulate.answer(QUICK)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "1"], "one above 1"),
        (["--processes", "2,none"], "wanted a whole number, in the digits 0 to 9; got 'none'"),
        (["--processes", "2,٣"], "digits 0 to 9"),
        (["--processes", f"2,{2**31}"], "from 1 to 1,000"),
        (["--latency", "-1"], "microseconds >= 0"),
        (["--latency", "nan"], "wanted a number"),
        (["--only", "model"], "run --only measure"),
        (["--only", "poetry"], "invalid choice"),
        (["--quic"], "unrecognized arguments"),
    ],
)
def test_words_that_mean_nothing(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--run-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_measurements_of_something_else(tmp_path, capsys):
    (tmp_path / "measured.json").write_text(json.dumps({"compute": [{"problem": "another"}]}))
    with pytest.raises(SystemExit):
        main(["--only", "model", "--run-dir", str(tmp_path)])
    assert "holds measurements of another" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"compute": 5}', '{"compute": [5]}', '{"compute": [{}]}'])
def test_damaged_measurements(damaged, tmp_path, capsys):
    (tmp_path / "measured.json").write_text(damaged)
    with pytest.raises(SystemExit):
        main(["--only", "model", "--run-dir", str(tmp_path)])
    assert f"{tmp_path / 'measured.json'} is damaged" in capsys.readouterr().err
