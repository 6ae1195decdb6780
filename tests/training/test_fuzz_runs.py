"""Seeded damage to a run's directory: it goes on as it should, or one error says why and nothing is lost."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from endings import assert_same, contents, newest
from fuzzing import ODD_VALUES, bounded, campaign, damaged, odd_json

from metamom import cli
from metamom.experiments.compare import Comparison, Outcome
from metamom.experiments.compare import _run as finished
from metamom.experiments.recipes import Recipe
from metamom.experiments.saved import load_run
from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_log
from metamom.training.loop import train
from metamom.training.progress import DivergedError

DONE, TOTAL = 4, 5  # steps of the run as it stands, and after its resume
# with averages by task, error feedback and a schedule, so that a checkpoint holds something of every kind
RECIPE = Recipe(
    "sinusoid", shots=2, queries=2, meta_batch=2, workers=2, bias="ef14:topk:3",
    estimator="moml", fixed_tasks=2, schedule="cosine:9",
)  # fmt: skip
FLAGS = [
    "--shots", "2", "--queries", "2", "--meta-batch", "2", "--workers", "2", "--bias", "ef14:topk:3",
    "--estimator", "moml", "--fixed-tasks", "2", "--schedule", "cosine:9",
]  # fmt: skip


def go_on(run: Path, iterations: int = TOTAL) -> None:
    made = RECIPE.learner()
    optimizer = RECIPE.make_optimizer(made)
    train(
        made,
        optimizer,
        RECIPE.sampler(),
        iterations=iterations,
        meta_batch=2,
        workers=2,
        bias=RECIPE.operator(),
        schedulers=RECIPE.schedulers(optimizer),
        validation=RECIPE.sampler("validation"),
        evaluate_tasks=4,
        evaluate_every=2,
        run_dir=run,
        resume=True,
        checkpoint_every=100,
        settings=RECIPE.settings(),
        free=RECIPE.free(),
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint after its steps, and its best."""
    path = tmp_path_factory.mktemp("original") / "run"
    go_on(path, DONE)
    kept = Checkpoints(path / "checkpoints")
    for step in kept.steps()[:-1]:
        kept.path(step).unlink()
    return path


@pytest.fixture(scope="module")
def resumed(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How it goes on."""
    path = Path(shutil.copytree(original, tmp_path_factory.mktemp("resumed") / "run"))
    go_on(path)
    return path


Damage = Callable[[Path, random.Random], None]


def every_door(original: Path, seed: int, damage: Damage, tmp_path: Path) -> Path | None:
    """Resume a damaged copy of the run, read it for evaluation, and some by the command.

    Returns:
        The resumed run; ``None`` if it was refused.
    """
    run = Path(shutil.copytree(original, tmp_path / str(seed)))
    damage(run, random.Random(seed))
    before = contents(run)
    with warnings.catch_warnings(), bounded(20):
        warnings.simplefilter("ignore")
        with contextlib.suppress(ValueError):
            load_run(run, "best" if seed % 2 else "newest")
        if seed % 10 == 0:
            by_command(run)
        assert contents(run) == before
        try:
            go_on(run)
        except ValueError:
            assert contents(run) == before, "a refused resume has changed the run"
            return None
        except DivergedError:  # from numbers that are odd, and of the right type
            return None
    return run


def by_command(run: Path) -> None:
    """The same answers: a status, never a traceback."""
    command = ["train", "sinusoid", *FLAGS, "--iterations", "3", "--run-dir", str(run), "--resume"]  # too few
    assert cli.main(command) == 2
    assert cli.main(["evaluate", str(run), "--tasks", "2", "--steps", "1", "--json"]) in (0, 2)


@campaign(25, 1500)
def test_configurations(seeds, original, resumed, tmp_path, capfd):
    def damage(run: Path, rng: random.Random) -> None:
        file = run / "config.json"
        if rng.random() < 0.7:
            file.write_text(json.dumps(odd_json(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))

    refused = 0
    for seed in seeds:
        run = every_door(original, seed, damage, tmp_path)
        if run is None:
            refused += 1
        else:
            assert_same(newest(run)["learner"], newest(resumed)["learner"])
            assert_same(newest(run)["optimizer"], newest(resumed)["optimizer"])
            shutil.rmtree(run)
    assert 0 < refused < len(seeds)


@campaign(25, 1500)
def test_metrics(seeds, original, resumed, tmp_path):
    """Whatever the damage, the run continues, keeps whole lines, and reports what is lost."""
    for seed in seeds:
        rng = random.Random(seed)
        run = Path(shutil.copytree(original, tmp_path / str(seed)))
        file = run / "metrics.jsonl"
        whole = file.read_bytes()
        data = damaged(whole, rng)
        file.write_bytes(data)
        unreadable = read_log(run).damaged
        with warnings.catch_warnings(record=True) as caught, bounded(20):
            warnings.simplefilter("always")
            go_on(run)
        said = " ".join(str(each.message) for each in caught)
        assert_same(newest(run)["learner"], newest(resumed)["learner"])
        log = read_log(run)
        assert log.damaged == []
        missing = set(range(DONE)) - {line["step"] for line in log.lines}
        assert bool(missing) == ("has no metrics of step" in said)
        assert bool(unreadable) == ("was damaged in line" in said)
        intact = [json.loads(line) for line in whole.splitlines() if line in data.split(b"\n")]
        if unreadable:
            assert (run / "metrics.jsonl.damaged").read_bytes() == data
        else:
            assert all(line in log.lines for line in intact)
        shutil.rmtree(run)


def odd_state(value: Any, rng: random.Random) -> Any:
    """A copy of a checkpoint's state with one part replaced, left out, renamed, or one too many."""
    value = copy.deepcopy(value)
    places = list(places_in(value))
    container, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
    odd = rng.choice(
        (*ODD_VALUES, torch.zeros(3), torch.tensor(float("nan")), torch.zeros(0), torch.zeros(2, 2, dtype=torch.int64))
    )
    if kind == "replace" or isinstance(container, list):
        container[key] = odd
    elif kind == "remove":
        del container[key]
    elif kind == "rename":
        container[rng.choice(("other", 7, None))] = container.pop(key)
    else:
        container[rng.choice(("other", 7, None))] = odd
    return value


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested dicts and lists, as the container and its key or index."""
    found: list[tuple[Any, Any]] = []
    for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(entry, (dict, list)):
            found += places_in(entry)
    return found


@campaign(30, 500)
def test_checkpoints(seeds, original, resumed, tmp_path, capfd):
    def damage(run: Path, rng: random.Random) -> None:
        folder = run / "checkpoints"
        for path in folder.iterdir():
            if rng.random() < 0.7:
                torch.save(odd_state(load(path), rng), path)
            else:
                path.write_bytes(damaged(path.read_bytes(), rng))

    refused = 0
    for seed in seeds:
        run = every_door(original, seed, damage, tmp_path)
        refused += run is None
        if run is not None:
            assert newest(run)["step"] == TOTAL
            shutil.rmtree(run)
    assert 0 < refused < len(seeds)


COMPARISON = Comparison(
    Recipe("sinusoid", shots=2, queries=2, meta_batch=2), (0.1,), ("zero",), (0.01,), 1, 4, 2, 2, 2, (0, 1), 1.0
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A comparison's only run, finished, and how it ended."""
    path = tmp_path_factory.mktemp("compared")
    (arm,) = COMPARISON.arms()
    return path, finished(COMPARISON, arm, path, None)


@campaign(25, 1000)
def test_finished_runs_of_a_comparison(seeds, compared, tmp_path):
    """A damaged outcome or log is reported, or what is read from it has the shape that the report needs."""
    path, ended = compared
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        run_dir = Path(shutil.copytree(path, tmp_path / str(seed)))
        (folder,) = (run_dir / "runs").iterdir()
        file = folder / rng.choice(("outcome.json", "metrics.jsonl"))
        if file.name == "outcome.json" and rng.random() < 0.6:
            file.write_text(json.dumps(odd_json(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        before = contents(run_dir)
        with bounded(20):
            try:
                found = finished(COMPARISON, ended.recipe, run_dir, None)
            except ValueError as error:
                assert str(folder) in str(error)  # noqa: PT017
                refused += 1
            else:
                assert [len(found.test or ()), len(found.halfwidth or ())] in ([2, 2], [0, 0])
                assert found.diverged is not None or found.curve[-1][0] == 4
        assert contents(run_dir) == before
        shutil.rmtree(run_dir)
    assert 0 < refused < len(seeds)
