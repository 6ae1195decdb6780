"""`metamom evaluate`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from command import the_error
from endings import contents

from metamom.training.directory import read_config, read_metrics


def test_evaluate_prints_json_and_nothing_else(metamom, trained):
    said = metamom("evaluate", trained, "--tasks", 20, "--steps", "0,3", "--json")
    assert (said.code, said.err) == (0, "")
    assert said.out.count("\n") == 1
    answer = json.loads(said.out)
    assert list(answer) == ["steps", "mean", "halfwidth", "tasks"]
    assert answer["steps"] == [0, 3]
    assert answer["tasks"] == 20
    assert len(answer["mean"]) == len(answer["halfwidth"]) == 2
    assert all(value > 0 for value in answer["mean"] + answer["halfwidth"])
    assert answer == json.loads(metamom("evaluate", trained, "--tasks", 20, "--steps", "0,3", "--json").out)
    other = json.loads(metamom("evaluate", trained, "--tasks", 20, "--steps", "0,3", "--seed", 1, "--json").out)
    assert other["mean"] != answer["mean"]


def test_evaluate_prints_a_table(metamom, trained):
    before = contents(trained)
    said = metamom("evaluate", trained, "--tasks", 10, "--steps", "0,1", "--shots", 7)
    assert said.code == 0
    head, columns, *rows = said.out.splitlines()
    assert head == ("sinusoid 7-shot, split test, 10 tasks, trained for 6 iterations")
    assert columns.split() == ["steps", "loss", "±", "95", "%"]
    answer = json.loads(metamom("evaluate", trained, "--tasks", 10, "--steps", "0,1", "--shots", 7, "--json").out)
    assert [row.split() for row in rows] == [
        [str(s), f"{m:.4f}", f"{h:.4f}"]
        for s, m, h in zip(answer["steps"], answer["mean"], answer["halfwidth"], strict=True)
    ]
    assert contents(trained) == before


def test_validation_split_is_what_training_saw(metamom, trained):
    flags = ("--split", "validation", "--tasks", 4, "--steps", "1", "--checkpoint", "newest", "--json")
    answer = json.loads(metamom("evaluate", trained, *flags).out)
    assert answer["mean"] == [read_metrics(trained)[-1]["validation"]]
    test = json.loads(metamom("evaluate", trained, "--tasks", 4, "--steps", "1", "--json").out)
    assert test["mean"] != answer["mean"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "tset"], "splits train, validation and test; got 'tset'"),
        (["--ways", "5"], "sinusoids have no classes"),
        (["--norm", "support"], "the network for sinusoids has no normalisation"),
        (["--norm", "running"], "'running'"),
        (["--tasks", "1"], "at least 2 tasks"),
        (["--steps", "-1"], "inner steps >= 0"),
        (["--checkpoint", "oldest"], "invalid choice: 'oldest'"),
        (["--device", "abacus"], "unknown device"),
    ],
)
def test_bad_evaluations(flags, message, metamom, trained):
    assert re.search(message, the_error(metamom("evaluate", trained, *flags)))


def test_omniglot_trained_and_evaluated(metamom, trained_omniglot, data_root):
    lines = read_metrics(trained_omniglot)
    assert len(lines) == 2
    assert all(0 <= line["accuracy"] <= 1 for line in lines)
    root = ("--data-root", data_root)
    said = metamom("evaluate", trained_omniglot, "--tasks", 10, "--steps", "0,1", "--json", *root)
    assert (said.code, said.err) == (0, "")
    assert list(json.loads(said.out)) == ["steps", "mean", "halfwidth", "tasks"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        table = metamom("evaluate", trained_omniglot, "--tasks", 10, "--steps", "1", "--split", "evaluation", *root)
    assert table.err.startswith("metamom: warning: the learner was trained on split train, and evaluation shares")
    assert table.out.startswith("omniglot 3-way 1-shot, split evaluation, 10 tasks, trained for 2 iterations")
    seen = metamom("evaluate", trained_omniglot, "--tasks", 4, "--steps", "1", "--split", "validation", "--json", *root)
    assert json.loads(seen.out)["mean"] == [lines[-1]["validation"]]


def test_omniglot_by_the_statistics_of_the_support_set(metamom, trained_omniglot, data_root, tmp_path):
    options = ("--tasks", 10, "--steps", "0,1", "--data-root", data_root)
    by_batch, support = (
        json.loads(metamom("evaluate", trained_omniglot, *options, "--json", "--norm", norm).out)
        for norm in ("batch", "support")
    )
    assert support.pop("norm") == "support"
    assert list(support) == list(by_batch) == ["steps", "mean", "halfwidth", "tasks"]
    assert support["mean"] != by_batch["mean"]
    head = metamom("evaluate", trained_omniglot, *options, "--norm", "support").out.splitlines()[0]
    assert head.endswith("trained for 2 iterations; statistics of each task's support set")
    message = the_error(metamom("evaluate", trained_omniglot, *options, "--norm", "frozen"))
    assert "--norm frozen normalises by running statistics" in message
    run = tmp_path / "run"
    flags = ["--ways", 3, "--meta-batch", 2, "--evaluate-tasks", 4, "--data-root", data_root, "--run-dir", run]
    train = ["train", "omniglot", *flags, "--iterations"]
    assert metamom(*train, 1, "--norm", "support").code == 0
    assert read_config(run)["settings"]["norm"] == "support"
    assert "norm is 'support' there and None here" in the_error(metamom(*train, 2, "--resume"))
    assert metamom(*train, 2, "--norm", "support", "--resume").code == 0
    newest = ("--split", "validation", "--checkpoint", "newest", "--data-root", data_root)
    seen = metamom("evaluate", run, "--tasks", 4, "--steps", "1", "--json", *newest)
    answer = json.loads(seen.out)
    assert (answer["mean"], answer["norm"]) == ([read_metrics(run)[-1]["validation"]], "support")
    assert "layers do not have" in the_error(metamom(*train, 1, "--norm", "frozen"))


def test_omniglot_evaluated_with_other_ways(metamom, trained_omniglot, data_root):
    message = the_error(metamom("evaluate", trained_omniglot, "--ways", 5, "--data-root", data_root))
    assert "distinguishes 3 classes; got --ways 5" in message
    message = the_error(metamom("evaluate", trained_omniglot, "--split", "tset", "--data-root", data_root))
    assert "tset" in message
