"""``--learner``, ``--head`` and ``--within-alphabet``."""

from __future__ import annotations

import json

import pytest
from command import the_error

from metamom import load
from metamom.experiments.recipes import Recipe
from metamom.maml.learners.kinds import KINDS

SMALL = ["--meta-batch", "2", "--workers", "2", "--bias", "topk:5%", "--inner-steps", "2", "--evaluate-tasks", "4"]


@pytest.mark.parametrize("kind", ["boil", "reptile", "protomaml"])
def test_a_run_of_each_kind_resumes_and_is_evaluated(metamom, tmp_path, data_root, kind):
    run = tmp_path / "run"
    words = ["train", "omniglot", "--learner", kind, *SMALL, "--data-root", data_root, "--run-dir", run]
    assert metamom(*words, "--iterations", "1")[0] == 0
    assert metamom(*words, "--iterations", "2", "--resume")[0] == 0
    assert json.loads((run / "config.json").read_text())["settings"]["learner_kind"] == kind
    refused = metamom(*words[:2], *words[4:], "--iterations", "3", "--resume")
    assert f"learner_kind is '{kind}' there and None here" in the_error(refused)
    loaded = load(run, "newest")
    assert type(loaded.learner) is KINDS[kind]
    assert loaded.step == 2
    evaluated = metamom("evaluate", run, "--tasks", "4", "--steps", "0,2", "--json", "--data-root", data_root)
    assert json.loads(evaluated[1])["steps"] == [0, 2]


def test_runs_within_alphabets(metamom, tmp_path, data_root):
    run = tmp_path / "run"
    words = [
        "train",
        "omniglot",
        "--meta-batch",
        "2",
        "--evaluate-tasks",
        "4",
        "--data-root",
        data_root,
        "--run-dir",
        run,
    ]
    assert metamom(*words, "--iterations", "1", "--within-alphabet")[0] == 0
    assert metamom(*words, "--iterations", "2", "--resume")[0] == 0  # the tasks need not be named again
    options = ["--tasks", "4", "--steps", "1", "--data-root", data_root]
    within, across = (metamom("evaluate", run, *options, *more)[1] for more in ([], ["--no-within-alphabet"]))
    assert "each task within one of 40 alphabets" in within
    assert "alphabet" not in across
    assert within.splitlines()[-2:] != across.splitlines()[-2:]


def test_mistakes(metamom, tmp_path):
    words = ["train", "omniglot", "--run-dir", tmp_path / "run"]
    found = the_error(metamom(*words, "--learner", "reptile", "--estimator", "first-order"))
    assert "the learner reptile has no estimator" in found
    assert "--head zz is of learners with a head, boil and protomaml; got maml" in the_error(
        metamom(*words, "--head", "zz")
    )
    assert "'zz' is none of 'features.0.0'" in the_error(metamom(*words, "--learner", "boil", "--head", "zz"))
    sine = ["train", "sinusoid", "--run-dir", tmp_path / "run", "--learner", "protomaml"]
    assert "sinusoids have no classes, so no prototypes; got --learner protomaml" in the_error(metamom(*sine))


def test_maml_is_the_default_of_earlier_runs():
    assert Recipe("omniglot", learner_kind="maml") == Recipe("omniglot")
    with pytest.raises(ValueError, match="learner_kind must be"):
        Recipe("omniglot", learner_kind="mamll")  # type: ignore[arg-type]
