"""`metamom compare`: its report, and going on with it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command import SMALL, the_error
from endings import contents
from forked import CONTEXT
from PIL import Image

from metamom import cli, evaluate
from metamom.experiments import compare as comparisons
from metamom.experiments.report import can_write_page
from metamom.experiments.shared import processes

COMPARE = ["compare", "sinusoid", "--seeds", "2", "--lrs", "0.01,0.03", "--iterations", "12", "--evaluate-every", "6",
           "--tasks", "10", "--target", "4", "--steps", "0,1", *SMALL]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """A small comparison."""
    path = tmp_path_factory.mktemp("compared") / "run"
    assert cli.main([*COMPARE, "--run-dir", str(path)]) == 0
    return path


def outcomes(path: Path) -> dict[str, str]:
    return {file.parent.name: file.read_text() for file in path.glob("runs/*/outcome.json")}


def rows(report: str) -> list[list[str]]:
    """The cells of the first table, without its head."""
    lines = report[report.index("| method") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_comparison_leaves_a_report(compared):
    assert set(outcomes(compared)) == {
        f"beta{beta}-zero_lr{lr}_seed{seed}" for beta in ("1", "0.1") for lr in ("0.01", "0.03") for seed in (0, 1)
    }
    report = (compared / "report.md").read_text()
    table = rows(report)
    assert [row[:2] for row in table] == [
        ["plain meta-SGD (β = 1)", "0.01"], ["plain meta-SGD (β = 1)", "0.03"],
        ["momentum, β = 0.1, v₋₁ = 0", "0.01"], ["momentum, β = 0.1, v₋₁ = 0", "0.03"],
    ]  # fmt: skip
    assert all(row[-1] == "0 of 2" for row in table)
    ends = [json.loads(outcomes(compared)[f"beta1-zero_lr0.03_seed{seed}"])["test"][1] for seed in (0, 1)]
    mean, width = table[1][3].split(" ± ")
    assert mean == f"{sum(ends) / 2:.3f}"
    # Student's t with one degree of freedom, 12.706, times s / sqrt(2) = |a - b| / 2
    assert float(width) == pytest.approx(12.7062 * abs(ends[0] - ends[1]) / 2, abs=0.002)
    assert "Each method at its own best step size" in report
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", report)
    assert pictures == ["figures/curves.png", "figures/step_sizes.png", "figures/adaptation.png"]
    for picture in pictures:
        with Image.open(compared / picture) as image:
            assert image.format == "PNG"
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 20) or range(100)) > 20, "an empty picture"


def test_finished_runs_are_not_done_again(metamom, compared):
    times = {p: p.stat().st_mtime_ns for p in (compared / "runs").rglob("*") if p.is_file()}
    assert len(times) > 8 * 3
    (compared / "report.md").unlink()
    said = metamom(*COMPARE, "--run-dir", compared, "--resume")
    assert said.code == 0
    title, head, *methods, blank, report, page = said.out.splitlines()
    assert (title, blank, report) == (
        "sinusoids: each method at its best step size",
        "",
        f"report: {compared}/report.md",
    )
    assert head.split("  ")[0] == "method"
    assert [line.split(",")[0].split("  ")[0] for line in methods] == ["plain meta-SGD (β = 1)", "momentum"]
    assert max(map(len, [head, *methods])) <= 100
    assert page == f"page: {compared}/report.html" or (not can_write_page() and "metamom[report]" in page)
    assert len(rows((compared / "report.md").read_text())) == 4
    assert {p: p.stat().st_mtime_ns for p in (compared / "runs").rglob("*") if p.is_file()} == times


def test_comparison_is_refused_a_directory_in_use(metamom, compared):
    before = contents(compared)
    assert "already holds a run" in the_error(metamom(*COMPARE, "--run-dir", compared))
    changed = ["20" if before == "--tasks" else word for before, word in zip(["", *COMPARE], COMPARE, strict=False)]
    other = metamom(*changed, "--run-dir", compared, "--resume")
    assert "test_tasks is 10 there and 20 here" in the_error(other)
    assert "settings differ" in the_error(metamom("evaluate", compared))
    assert contents(compared) == before


@pytest.mark.xdist_group("processes")
def test_two_processes_give_the_same_outcomes(metamom, tmp_path, monkeypatch):
    """Of three runs: two at a time, and one that waits for them. Forked, since a spawned one spends seconds on imports.

    tests/experiments/test_processes.py spawns.
    """
    monkeypatch.setattr(processes, "get_context", lambda start_method: CONTEXT)
    three = [*COMPARE, "--seeds", "1", "--lrs", "0.01,0.03,0.1", "--betas", "0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert metamom(*three, "--run-dir", one).code == 0
    assert metamom(*three, "--run-dir", two, "--jobs", "2").code == 0
    assert len(outcomes(one)) == 3
    assert outcomes(two) == outcomes(one)
    assert rows((two / "report.md").read_text()) == rows((one / "report.md").read_text())


def test_an_interrupted_comparison_goes_on(metamom, compared, tmp_path):
    """As a kill leaves it: one run finished, one in the middle, no report."""
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    (run / "report.md").unlink()
    _kept, *others = sorted((run / "runs").iterdir())
    (others[0] / "outcome.json").unlink()
    for other in others[1:]:
        shutil.rmtree(other)
    assert metamom(*COMPARE, "--run-dir", run, "--resume").code == 0
    assert outcomes(run) == outcomes(compared)
    assert rows((run / "report.md").read_text()) == rows((compared / "report.md").read_text())


@pytest.mark.parametrize("named", [True, False])
def test_ctrl_c_shows_what_is_finished_and_how_to_go_on(named, metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def evaluated(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options)

    monkeypatch.setattr(comparisons, "evaluate", evaluated)
    words = [*COMPARE, "--seeds", "1", "--lrs", "0.01,1e12", "--betas", "1,0.1"]
    said = metamom(*words, *(["--run-dir", "run"] if named else []))
    assert said.code == 130
    (run,) = [Path("run")] if named else Path("runs").glob("compare-sinusoid-*")
    test = json.loads(outcomes(run)["beta1-zero_lr0.01_seed0"])
    first, head, finished, diverged, command = said.out.splitlines()
    assert first == "2 of 4 runs are finished"
    assert head.split("  ")[0] == "run"
    assert finished.endswith(f"{test['test'][1]:.3f} ± {test['halfwidth'][1]:.3f}")
    assert re.fullmatch(r"beta1-zero_lr1e\+12_seed0 .* diverged at step \d+", diverged)
    assert command == f"continue: metamom {' '.join(words)} --run-dir {run} --resume"
    assert metamom(*command.split()[2:]).code == 0
    assert len(outcomes(run)) == 4


def test_step_size_that_diverges_is_counted(metamom, tmp_path):
    flags = ["--seeds", "2", "--lrs", "0.01,1e12", "--betas", "1", "--iterations", "10", "--tasks", "4", *SMALL]
    said = metamom("compare", "sinusoid", *flags, "--run-dir", tmp_path)
    assert said.code == 0, said
    good, bad = rows((tmp_path / "report.md").read_text())
    assert good[-1] == "0 of 2"
    assert bad == ["plain meta-SGD (β = 1)", "1e+12", "—", "—", "—", "—", "never", "2 of 2"]
    ends = {name: json.loads(text)["diverged"] for name, text in outcomes(tmp_path).items()}
    assert [ends[f"beta1-zero_lr0.01_seed{seed}"] for seed in (0, 1)] == [None, None]
    assert all(0 < ends[f"beta1-zero_lr1e+12_seed{seed}"] < 10 for seed in (0, 1))


def test_comparison_in_which_everything_diverges(metamom, tmp_path):
    flags = ["--seeds", "1", "--lrs", "1e11,1e12", "--iterations", "10", "--tasks", "4", *SMALL]
    assert metamom("compare", "sinusoid", *flags, "--run-dir", tmp_path).code == 0
    assert [row[-1] for row in rows((tmp_path / "report.md").read_text())] == ["1 of 1"] * 4


@pytest.mark.parametrize(
    "wrong",
    [
        ["--evaluate-every", "0"],
        ["--workers", "3"],
        ["--jobs", "-1"],
        ["--bias", "topk:99999"],
        ["--evaluate-tasks", "1"],
        ["--aggregate", "trimmed:0.5"],
        ["--aggregate", "trimmed:0.2", "--workers", "4"],  # leaves out nobody
    ],
)
def test_a_comparison_refuses_before_it_begins(wrong, tmp_path, capsys):
    there = tmp_path / "run"
    assert cli.main(["compare", "sinusoid", "--iterations", "4", *wrong, "--run-dir", str(there)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not there.exists()
