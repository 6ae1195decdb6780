"""`metamom evaluate` with baselines, metrics and files, and `metamom compare` of existing runs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import warnings

import numpy as np
import pytest
from command import SMALL, the_error
from endings import contents

import metamom as library
from metamom import evaluate
from metamom.baselines import standard_baselines
from metamom.ensemble import ensemble_of

FEW = ("--tasks", 12, "--steps", "0,1")


@pytest.fixture(scope="module")
def second(tmp_path_factory, trained):
    """Another run on the same tasks."""
    from metamom import cli

    run = tmp_path_factory.mktemp("second") / "run"
    arguments = ["--iterations", "6", "--checkpoint-every", "3", *SMALL, "--lr", "0.1", "--beta", "1"]
    assert cli.main(["train", "sinusoid", "--run-dir", str(run), *arguments]) == 0
    return run


def test_baselines_are_evaluated_on_the_same_tasks(metamom, trained):
    before = contents(trained)
    assert "--per-task is a part of --json" in the_error(metamom("evaluate", trained, *FEW, "--per-task"))
    said = metamom("evaluate", trained, *FEW, "--baselines", "--baseline-steps", 3, "--json", "--per-task")
    assert (said.code, said.err) == (0, "")
    answer = json.loads(said.out)
    assert list(answer) == ["steps", "mean", "halfwidth", "tasks", "values", "baselines"]
    assert list(answer["baselines"]) == ["fine-tuning", "from scratch"]
    run = library.load(trained)
    for name, baseline in standard_baselines(run.learner, classes=False, make=run.new_model).items():
        found = answer["baselines"][name]
        values = evaluate(baseline, run.sampler(), tasks=12, steps=(3,)).values.numpy()
        np.testing.assert_allclose(found["values"], values)
        paired = values[0] - np.array(answer["values"][1])
        np.testing.assert_allclose(found["difference"], paired.mean())
        np.testing.assert_allclose(
            found["difference_halfwidth"], 1.959964 * paired.std(ddof=1) / np.sqrt(12), rtol=1e-6
        )
    table = metamom("evaluate", trained, *FEW, "--baselines", "--baseline-steps", 3).out.splitlines()
    assert table[5].startswith("baseline               loss      ± 95 %  minus the learner's after 1 step")
    assert table[6].startswith("fine-tuning, 3 steps ")
    assert contents(trained) == before


def test_baselines_of_classes(metamom, trained_omniglot, data_root):
    options = ("--tasks", 6, "--steps", "1", "--baselines", "--baseline-steps", 2, "--data-root", data_root)
    answer = json.loads(metamom("evaluate", trained_omniglot, *options, "--json").out)
    assert list(answer["baselines"]) == ["nearest centroid", "linear probe", "fine-tuning", "from scratch"]
    assert all(0 <= each["mean"][0] <= 1 for each in answer["baselines"].values())


def test_metrics_and_step_sizes(metamom, trained, tmp_path, monkeypatch):
    run = library.load(trained)
    answer = json.loads(metamom("evaluate", trained, *FEW, "--json", "--metric", "rmse", "--inner-lr", 0.05).out)
    expected = evaluate(run.learner, run.sampler(), tasks=12, steps=(0, 1), metric="rmse", inner_lr=0.05)
    assert answer["metric"] == "rmse"
    assert tuple(answer["mean"]) == expected.mean
    (tmp_path / "measures_of_mine.py").write_text("def largest(p, y):\n    return (p - y).abs().max()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    table = metamom("evaluate", trained, *FEW, "--metric", "measures_of_mine:largest").out
    assert "steps  largest" in table
    plain = json.loads(metamom("evaluate", trained, *FEW, "--json").out)
    assert list(plain) == ["steps", "mean", "halfwidth", "tasks"]


def test_every_tasks_value_as_csv(metamom, trained, tmp_path):
    file = tmp_path / "values.csv"
    assert metamom("evaluate", trained, *FEW, "--csv", file).code == 0
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    run = library.load(trained)
    values = evaluate(run.learner, run.sampler(), tasks=12, steps=(0, 1)).values
    assert [float(row["loss"]) for row in rows] == values.flatten().tolist()
    assert [(row["learner"], row["steps"], row["task"]) for row in rows[11:13]] == [
        ("learner", "0", "11"),
        ("learner", "1", "0"),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric", "acuracy"], "did you mean accuracy?"),
        (["--metric", "accuracy"], "accuracy compares class scores with class indices"),
        (["--metric", "nowhere_at_all:f"], "there is no module nowhere_at_all"),
        (["--inner-lr", "-1"], "--inner-lr must be > 0"),
        (["--inner-lr", "much"], "--inner-lr"),
    ],
)
def test_bad_flags(flags, message, metamom, trained):
    assert message in the_error(metamom("evaluate", trained, *FEW, *flags))


# metamom compare RUN RUN


def test_existing_runs_are_compared_on_the_same_tasks(metamom, trained, second):
    said = metamom("compare", trained, second, *FEW, "--json")
    assert (said.code, said.err) == (0, "")
    answer = json.loads(said.out)
    assert answer["tasks"] == 12
    runs = [library.load(each) for each in (trained, second)]
    first, other = (evaluate(run.learner, runs[0].sampler(), tasks=12, steps=(0, 1)) for run in runs)
    found = answer["runs"]
    assert list(found) == [str(trained), str(second)]
    assert tuple(found[str(trained)]["mean"]) == first.mean
    paired = (other.values - first.values).numpy()
    np.testing.assert_allclose(found[str(second)]["difference"], paired.mean(1))
    expected = 1.959964 * paired.std(1, ddof=1) / np.sqrt(12)
    np.testing.assert_allclose(found[str(second)]["difference_halfwidth"], expected, rtol=1e-6)
    table = metamom("compare", trained, second, *FEW).out.splitlines()
    assert table[0] == "sinusoid 5-shot, split test"
    assert len(table) == 7
    assert metamom("compare", "runs", trained, second, *FEW).out.splitlines() == table


def test_compared_runs_take_the_flags_of_an_evaluation(metamom, trained, second, tmp_path):
    file = tmp_path / "values.csv"
    flags = ("--inner-lr", 0.05, "--metric", "rmse", "--json", "--per-task")
    said = metamom("compare", trained, second, *FEW, *flags, "--csv", file)
    assert (said.code, said.err) == (0, "")
    with file.open() as opened:
        rows = list(csv.DictReader(opened))
    for run in (trained, second):
        alone = json.loads(metamom("evaluate", run, *FEW, *flags).out)
        found = json.loads(said.out)["runs"][str(run)]
        assert [found[name] for name in ("mean", "halfwidth", "values")] == [
            alone[name] for name in ("mean", "halfwidth", "values")
        ]
        values = [float(row["rmse"]) for row in rows if row["learner"] == str(run)]
        assert values == [value for of_steps in alone["values"] for value in of_steps]
    assert "--per-task is a part of --json" in the_error(metamom("compare", trained, second, "--per-task"))


def test_the_normalisation_of_compared_runs(metamom, trained_omniglot, data_root, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained_omniglot, other)
    options = ("--tasks", 4, "--steps", "1", "--norm", "support", "--data-root", data_root, "--json")
    alone = json.loads(metamom("evaluate", trained_omniglot, *options).out)
    found = json.loads(metamom("compare", trained_omniglot, other, *options).out)["runs"][str(other)]
    assert (found["mean"], found["norm"], found["difference"]) == (alone["mean"], "support", [0.0])
    message = the_error(metamom("compare", trained_omniglot, other, *options, "--ways", 2))
    assert "distinguishes 3 classes; got --ways 2" in message
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warned = metamom("compare", trained_omniglot, other, *options, "--split", "background").err
    assert warned.count("no accuracy on new characters") == 1


@pytest.mark.parametrize(
    ("command", "flags", "advice"),
    [
        (["compare", "RUN", "RUN"], ["--baselines"], "metamom evaluate RUN --baselines"),
        (["compare", "RUN", "RUN"], ["--image-size", "28"], "it belongs to training, and a run is used as it was"),
        (["evaluate", "RUN"], ["--standardize", "none"], "it belongs to training, and a run is used as it was"),
        (["evaluate", "RUN"], ["--root", "photos"], "the folder of images is --data-root DIR"),
        (["bias", "images"], ["--shots", "3"], "in shots: --inner-batch M,M,..."),
    ],
)
def test_flags_of_other_commands(command, flags, advice, metamom, trained):
    words = [str(trained) if word == "RUN" else word for word in command]
    message = the_error(metamom(*words, *flags))
    assert f"unrecognized arguments: {' '.join(flags)}; " in message
    assert advice in message
    assert "did you mean" not in message


def test_bad_comparisons(metamom, trained, second, tmp_path):
    assert "got both:" in the_error(metamom("compare", trained, "sinusoid"))
    assert "got both:" in the_error(metamom("compare", "sinusoid", trained, second))
    assert "at least two different runs" in the_error(metamom("compare", trained))
    assert "at least two different runs" in the_error(metamom("compare", trained, trained))
    assert "holds no run" in the_error(metamom("compare", trained, tmp_path / "none"))
    assert "holds no run" in the_error(metamom("compare", tmp_path / "none", trained))
    assert "invalid choice" in the_error(metamom("compare", "sinusoids"))
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / "config.json").read_text())
    config["settings"] |= {"shots": 7, "seed": 3}
    (other / "config.json").write_text(json.dumps(config))
    message = the_error(metamom("compare", trained, other, *FEW))
    assert (
        f"{other} was trained on other tasks than {trained}: shots 7 for 5. Choose the same for all: --shots" in message
    )
    assert metamom("compare", trained, other, *FEW, "--shots", 5).code == 0


def test_a_folder_of_a_tasks_name_is_still_the_task(metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("sinusoid")
    message = the_error(metamom("compare", "sinusoid", "--seeds", 0))
    assert "at least one seed" in message


@pytest.mark.parametrize("name", ["csv", "record"])
def test_files_of_results(name, metamom, trained, tmp_path):
    file = tmp_path / "new" / "folder" / "values"
    assert metamom("evaluate", trained, *FEW, f"--{name}", file).code == 0
    assert file.stat().st_size > 100
    said = metamom("evaluate", trained, *FEW, f"--{name}", tmp_path)
    assert f"--{name} needs the name of a file; {tmp_path} is a folder." in said.err
    said = metamom("evaluate", trained, *FEW, f"--{name}", file / "below")
    assert f"{file} is not a folder that you can write to." in said.err
    said = metamom("evaluate", tmp_path / "no run", *FEW, f"--{name}", tmp_path / "other" / "values")
    assert said.code == 2
    assert not (tmp_path / "other").exists()


def test_an_ensemble_of_a_run(metamom, tmp_path):
    """Of the checkpoints with the best validations; the record says which."""
    run, record = tmp_path / "run", tmp_path / "record.json"
    every = ("--iterations", 6, "--evaluate-every", 2, "--checkpoint-every", 2)
    assert metamom("train", "sinusoid", "--run-dir", run, *every, *SMALL).code == 0
    ensemble, members = ensemble_of(library.load(run), 2)
    said = metamom("evaluate", run, *FEW, "--ensemble", 2, "--json", "--record", record)
    assert said.code == 0
    sampler = library.load(run).sampler("test")
    assert json.loads(said.out)["mean"] == list(evaluate(ensemble, sampler, tasks=12, steps=(0, 1)).mean)
    written = json.loads(record.read_text())
    assert written["evaluated"]["iterations of training"] == members
    assert written["evaluated"]["checkpoint"] == "ensemble of the 2 best"
    message = the_error(metamom("evaluate", run, *FEW, "--ensemble", 2, "--checkpoint", "newest"))
    assert "--ensemble 2 takes the best checkpoints by validation; got --checkpoint newest too" in message
