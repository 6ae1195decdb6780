"""The demo: its verdicts, its search, runs that stop at the target, and its report."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from forked import demo, forked

from metamom.common.intervals import Interval
from metamom.experiments.demo import __main__ as demo_command
from metamom.experiments.demo import report, search, training
from metamom.experiments.demo.report import Result
from metamom.experiments.demo.settings import METHODS, Case, Choice, Demo, Tuned, recipe, tuned
from metamom.experiments.demo.training import Arm, Ending, StopAtTarget, curve, steps_done, train_to_target
from metamom.experiments.demo.verdict import Ratio, gain, quotient
from metamom.experiments.report import can_write_page
from metamom.experiments.saved import load_run
from metamom.training.loop import train

SMALL = Demo(
    cases=(
        Case("a", "4 tasks a step", 4, "none", 1, 6, 0.05),
        Case("b", "2 tasks a step", 2, "topk:50%", 2, 6, 0.05, below="a"),
    ),
    seeds=2, target=1e9, every=2, validation=3,
)  # fmt: skip
BEST = {name: {"sgd": Choice(0.01, 1.0, 4.0), "momentum": Choice(0.02, 0.3, 2.0)} for name in "ab"}
FOUND = Tuned(
    "COMMAND", {"platform": "P", "torch": "T"}, {"seeds": [7], "lrs": [0.01, 0.02], "patience": 1.5},
    {name: tuple(both.values()) for name, both in BEST.items()}, BEST,
)  # fmt: skip


def one_by_one(
    function: Callable[..., object], calls: Sequence[tuple[Any, ...]], *_: object, **progress: object
) -> None:
    """`run_in_processes` in this process."""
    for call in calls:
        function(*call)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (demo_command, search):
        monkeypatch.setattr(module, "run_in_processes", one_by_one)


def test_momentum_that_needs_a_third_of_the_steps_is_faster():
    ratio = gain([300, 330, 270], [100, 110, 90], cap=1000)
    assert ratio.mean == pytest.approx((3, 3, 3))
    assert (ratio.verdict, gain([100, 110, 90], [300, 330, 270], cap=1000).verdict) == ("above", "below")


def test_the_interval_is_student_s_on_the_logarithms():
    ratio = gain([100, 200], [100, 100], cap=1000)
    half = 12.7062 * math.log(2) / 2  # two values, one degree of freedom: their mean is as far from each as the error
    assert ratio.mean == pytest.approx((2**0.5, 2**0.5 / math.exp(half), 2**0.5 * math.exp(half)), rel=1e-4)
    assert ratio.verdict == "unclear"
    assert str(ratio).startswith("1.41, 95 % interval 0.0")


def test_a_run_that_gave_up_counts_as_the_cap_and_two_count_for_nothing():
    assert gain([None, 300], [100, 100], cap=300).logs == pytest.approx([math.log(3)] * 2)
    assert gain([100, 100], [None, 300], cap=300).logs == pytest.approx([-math.log(3)] * 2)
    nothing = gain([None, 300], [None, 100], cap=300)
    assert math.isnan(nothing.logs[0])
    assert nothing.verdict == "unclear"
    assert str(nothing) == "unknown, since too few seeds reached the target"
    assert gain([None, 300, 300], [None, 100, 100], cap=300).mean == pytest.approx((3, 3, 3))


def test_two_gains_are_compared_seed_by_seed():
    large, small = gain([300, 600], [100, 100], 1000), gain([150, 300], [100, 100], 1000)
    assert quotient(large, small).mean == pytest.approx((2, 2, 2))
    assert quotient(large, gain([None, 300], [None, 100], 1000)).verdict == "unclear"


def result(case: Case, low: float, high: float, logs: tuple[float, ...]) -> Result:
    return Result(case, {}, {}, Ratio(Interval((low + high) / 2, low, high), logs))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (1.5, 3.0, "momentum is faster, as predicted"),
        (0.3, 0.9, "momentum is slower, against the prediction"),
        (0.9, 2.0, "which is faster cannot be told; the prediction stays open"),
    ],
)
def test_verdicts_follow_the_intervals(low, high, says):
    a, b = SMALL.cases
    first, second, *gains = report.verdicts([result(a, low, high, (1.0, 1.1)), result(b, low, high, (0.5, 0.6))])
    assert first.startswith(f"(a) 4 tasks a step: {says}.\n")
    assert second.startswith(f"(b) 2 tasks a step: {re.split('[,;]', says)[0]}.\n")  # the prediction is of the gains
    assert len(gains) == 1
    assert "momentum gains less with 2 tasks a step, as predicted" in gains[0]
    assert "Ratio of gains: 1.65, 95 % interval 1.65 to 1.65" in gains[0]


def test_a_run_stops_at_the_first_validation_at_the_target(tmp_path):
    errors = []
    for target in (0.0, 1e9):
        demo = replace(SMALL, target=target)
        errors.append(train_to_target(demo, demo.cases[0], 0.01, 1.0, 0, 6, tmp_path / f"{target}"))
    assert errors == [Ending(None, None), Ending(2, None)]
    assert train_to_target(SMALL, SMALL.cases[0], 1e30, 1.0, 0, 6).diverged is not None


def test_a_run_that_has_stopped_stays_so(tmp_path):
    """It may have been killed before its outcome was written."""
    case = SMALL.cases[0]
    for _ in range(2):
        assert train_to_target(SMALL, case, 0.01, 1.0, 0, 6, tmp_path / "run") == Ending(2, None)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_new_run_forgets_the_target_of_the_last():
    plan = recipe(SMALL, SMALL.cases[0], 0.01, 1.0, 0)
    callback = StopAtTarget(1e9)
    for _ in range(2):
        learner = plan.learner()
        found = train(
            learner, plan.make_optimizer(learner), plan.sampler(), iterations=6, meta_batch=2, callbacks=callback,
            validation=plan.sampler("validation"), evaluate_every=2, evaluate_tasks=2, label=None,
        )  # fmt: skip
        assert len(found.metrics) == 2
        assert found.stopped == "the error is at most 1e+09 after 2 steps"


def test_both_methods_have_the_same_tasks_and_initial_weights():
    sgd, momentum = (recipe(SMALL, SMALL.cases[0], lr, beta, 3) for lr, beta in ((0.01, 1.0), (0.1, 0.3)))
    assert replace(sgd, lr=momentum.lr, beta=momentum.beta) == momentum


def test_the_demo_from_its_runs_to_its_report(tmp_path, capsys, here):
    path = demo_command.run(SMALL, FOUND, tmp_path, jobs=1, threads=1, resume=False)
    shown = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert path == tmp_path / ("report.html" if can_write_page() else "report.md")
    assert shown.rstrip().endswith(f"Report: {path}")
    assert [line for line in shown.splitlines() if len(line) > 100 and str(path) not in line] == []
    for line in report.verdicts(
        report.results(SMALL, [arm for pair in demo_command.pairs(SMALL, FOUND) for arm in pair], tmp_path)
    ):
        assert line in shown
        assert line.replace("\n    ", " ") in text
    assert "| (b) 2 tasks a step | momentum | 0.02 | 0.3 | 2 | 2 to 2 | 2 of 2 |" in text
    for picture in re.findall(r"\]\((figures/\S+)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["cases"]["a"]["momentum"]["steps"] == [2, 2]
    assert data["cases"]["a"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {"python", "torch", "platform", "command"} <= set(data["environment"])
    assert load_run(tmp_path / "runs" / "a-momentum-seed1", "newest").recipe.lr == 0.02

    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/*")}
    demo_command.run(replace(SMALL, seeds=3), FOUND, tmp_path, jobs=1, threads=1, resume=True)
    assert "8 of 12 runs were finished before, and not repeated." in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == at for file, at in before.items())


def test_the_page_has_every_run(tmp_path, here):
    demo_command.run(SMALL, FOUND, tmp_path, jobs=1, threads=1, resume=False)
    found = report.results(SMALL, [arm for pair in demo_command.pairs(SMALL, FOUND) for arm in pair], tmp_path)
    shown = report.page(SMALL, FOUND, found, tmp_path)
    assert [section.title for section in shown.sections] == ["(a) 4 tasks a step", "(b) 2 tasks a step"]
    for section in shown.sections:
        assert section.target == SMALL.target
        assert [method.label for method in section.methods] == [
            "plain meta-SGD, γ = 0.01",
            "momentum, γ = 0.02, β = 0.3",
        ]
        for method in section.methods:
            assert [(run.seed, run.curve[-1][0]) for run in method.runs] == [(0, 2), (1, 2)]


def test_folders_of_others_are_refused(tmp_path, here):
    (tmp_path / "config.json").write_text('{"settings": {"base": {}}}')
    (tmp_path / "report.md").touch()
    with pytest.raises(ValueError, match=r"holds the runs of another command\. Move it away, or choose another folder"):
        demo_command.run(SMALL, FOUND, tmp_path, jobs=1, threads=1, resume=True)
    demo_command.run(SMALL, FOUND, tmp_path / "demo", jobs=1, threads=1, resume=False)
    with pytest.raises(ValueError, match="already holds a run"):
        demo_command.run(SMALL, FOUND, tmp_path / "demo", jobs=1, threads=1, resume=False)
    with pytest.raises(ValueError, match=r"made with other settings: demo\.target"):
        demo_command.run(replace(SMALL, target=2.0), FOUND, tmp_path / "demo", jobs=1, threads=1, resume=True)


def test_damaged_outcomes_are_refused(tmp_path):
    arm = Arm(SMALL.cases[0], "sgd", 0.01, 1.0, 0, 10)
    arm.folder(tmp_path).mkdir(parents=True)
    (arm.folder(tmp_path) / "outcome.json").write_text('{"steps": 7, "diverged": null}')
    with pytest.raises(ValueError, match="is damaged: a run reaches the target after 1 to 6 steps; got 7"):
        training.ending(arm, tmp_path)


def test_progress_counts_steps(tmp_path):
    arm = Arm(SMALL.cases[0], "sgd", 0.01, 1.0, 0, 10)
    assert steps_done(arm, tmp_path) == 0
    arm.folder(tmp_path).mkdir(parents=True)
    log = arm.folder(tmp_path) / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {step}, "validation": {step}.5}}\n' for step in range(4)) + '{"step": 4')
    assert steps_done(arm, tmp_path) == 4
    log.write_text(f'{{"step": 99, "validation": {"NaN"}}}\n')
    assert steps_done(arm, tmp_path) == 9  # not at its end
    assert curve(arm, tmp_path) == []
    (arm.folder(tmp_path) / "outcome.json").touch()
    assert steps_done(arm, tmp_path) == 10


def test_the_search_extends_the_betas_and_skips_what_is_stored(tmp_path, monkeypatch, here):
    asked = []

    class Bench:
        """Fastest at gamma = 0.1 and beta = 0.2."""

        def __init__(self, config: Any) -> None:
            assert config.workers in (1, 2)

        def run(self, tasks: int, operator: str, lr: float, beta: float, seed: int, cap: int) -> float:
            asked.append((tasks, beta))
            steps = 100 + 40 * abs(math.log2(lr / 0.1)) + 40 * abs(math.log2(beta / 0.2))
            return round(steps) if steps <= cap else math.inf

    monkeypatch.setattr(search, "SinusoidBench", Bench)
    grid = search.Search(lrs=(0.025, 0.05, 0.1, 0.2, 0.4), betas=(1.0, 0.4, 0.3), more=(0.2, 0.1), seeds=(7, 8))
    demo = replace(SMALL, cases=tuple(replace(case, cap=1000) for case in SMALL.cases))
    found = search.search(demo, grid, tmp_path / "search", 1, False)
    assert found.best["a"]["sgd"] == Choice(0.1, 1.0, 193.0)
    assert found.best["b"]["momentum"] == Choice(0.1, 0.2, 100.0)
    assert (4, 0.1) in asked  # for 0.2 would be the end
    assert tuned(tmp_path / "search" / "tuned.json") == found
    lines = search.search_table(demo, found)
    assert "| (a) 4 tasks a step | momentum | **0.2** | **0.1** | 100 | 140 | 140 |" in lines
    asked.clear()
    assert search.search(demo, grid, tmp_path / "search", 1, True).best == found.best
    assert not asked
    with pytest.raises(ValueError, match=r"is fastest at γ = 0\.1, β = 1, the end of the grid\. Extend it"):
        search.search(demo, replace(grid, lrs=(0.025, 0.05, 0.1)), tmp_path / "short", 1, False)
    low = tuple(replace(case, cap=110) for case in SMALL.cases)
    with pytest.raises(ValueError, match="plain meta-SGD never reached the target"):
        search.search(replace(demo, cases=low), grid, tmp_path / "low", 1, False)


def test_the_stored_search_is_what_the_demo_runs():
    demo, found = Demo(), tuned()
    grid = json.loads(json.dumps(search.Search().__dict__))
    assert found.search == grid
    assert set(found.best) == set(found.cells) == {case.name for case in demo.cases}
    assert min(grid["seeds"]) >= 1000
    for case in demo.cases:
        betas = {cell.beta for cell in found.cells[case.name]}
        for method in METHODS:
            best = found.best[case.name][method]
            cells = [cell for cell in found.cells[case.name] if (cell.beta == 1) == (method == "sgd") and cell.steps]
            assert best == min(cells, key=lambda cell: cell.steps or math.inf)
            lrs = [cell.lr for cell in found.cells[case.name] if cell.beta == best.beta]
            assert min(lrs) < best.lr < max(lrs)
            assert method == "sgd" or min(betas) < best.beta
            assert (best.steps or math.inf) < case.cap / 1.5


def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def command(*words: str) -> SystemExit:
        monkeypatch.setattr(sys, "argv", ["demo", *words, "--run-dir", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as ended:
            demo_command.main()
        assert not (tmp_path / "run").exists()
        return ended.value

    error = "metamom: error: seeds (--seeds), of which an interval needs two, must be >= 2; got 1."
    assert command("--seeds", "1").code == error
    assert command("--jobs", "0").code == 2
    assert "argument --jobs: wanted a whole number from 1 to" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_demo_says_how_to_go_on(tmp_path):
    words = ["--run-dir", str(tmp_path / "run"), "--jobs", "1"]
    with forked(demo, 1, tmp_path / "said", *words) as (started,):
        until = time.monotonic() + 120
        while not list(tmp_path.glob("run/runs/*/metrics.jsonl")):
            assert started.process.is_alive(), started.ended()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(started.pid, signal.SIGINT)
        status, said = started.ended()
    assert status == 130
    assert "Interrupted: 0 of 30 runs are finished, and kept" in said
    assert f"To continue: python -m metamom.experiments.demo --run-dir {tmp_path / 'run'} --jobs 1 --resume" in said
    assert "Traceback" not in said
