"""``--config``: flags from a file, which the command line overrides."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from metamom import cli
from metamom.cli.app import parsed, parser
from metamom.experiments.recipes import Recipe
from metamom.training.directory import read_config, read_metrics

SMALL = ["--iterations", "3", "--meta-batch", "2", "--shots", "3", "--evaluate-tasks", "4"]


def arguments(file: Path, text: str, *words: str, command: str = "train sinusoid") -> dict[str, Any]:
    """What a command takes from a file with this text."""
    file.write_text(text, encoding="utf-8")
    return vars(parsed(parser(), [*command.split(), "--config", str(file), *words]))


EXAMPLE = """
lr: 1e-3          # a number that YAML takes for a word
inner-lr: 0.02
inner_steps: 2
beta: 1
estimator: first-order
adapt: [head, body]
compile: auto
learn-inner-lr: true
chunk_size: 4
normalize: true
resume: false
tensorboard: true
run_dir: runs/here
track-bias: every=20
seed: 18446744073709551615
device: null
task: sinusoid
"""


def test_flags_by_name(tmp_path):
    found = arguments(tmp_path / "run.yaml", EXAMPLE, "--beta", "0.5", "--seed=3")
    expected = {
        "lr": 0.001, "inner_lr": 0.02, "inner_steps": 2, "estimator": "first-order", "adapt": ("head", "body"),
        "compile": "auto", "learn_inner_lr": "entry", "chunk_size": 4, "normalize": True, "resume": False,
        "tensorboard": True, "run_dir": "runs/here", "track_bias": 20, "device": None,
        "beta": 0.5, "seed": 3,  # of the command line
        "checkpoint_every": 500,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_json_and_lists(tmp_path):
    text = json.dumps({"lrs": [0.1, 1e-5], "betas": "1,0.5", "steps": 3, "first-steps": ["zero", "gradient"]})
    found = arguments(tmp_path / "run.json", text, command="compare sinusoid")
    assert (found["lrs"], found["betas"], found["steps"]) == ((0.1, 1e-5), (1.0, 0.5), (3,))
    assert found["first_steps"] == ("zero", "gradient")
    assert arguments(tmp_path / "empty.yaml", "")["lr"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk-sise: 3", "unknown flag 'chunk-sise'; did you mean chunk-size?"),
        ("config: other.yaml", "unknown flag 'config'"),
        ("help: true", "unknown flag 'help'"),
        ("run: x", "unknown flag 'run'"),
        ("leaf: x", "unknown flag 'leaf'"),
        ("3: x", "unknown flag '3'"),
        ("lr: fast", "lr: wanted a number, such as 5, 0.1 or 1e-3, in the digits 0 to 9; got 'fast'"),
        ("lr: .nan", "lr: wanted a number, such as 5, 0.1 or 1e-3, in the digits 0 to 9; got 'nan'"),
        ("lr: true", "lr: wanted a value; got true"),
        ("lr: [0.1]", "lr: wanted one value; got a list"),
        ("lr: {a: 1}", "lr: wanted a number or a word; got a mapping"),
        ("lr: 2020-01-01", "lr: wanted a number or a word; got a date"),
        ("shots: 1.5", "shots: wanted a whole number"),
        ("shots: 1000000", "shots: wanted a whole number of at most 100,000; got '1000000'"),
        ("adapt: []", "adapt: wanted names with commas between; got ''"),
        ("adapt: [[a]]", "adapt: wanted a number or a word; got a list"),
        ("normalize: 3", "normalize: wanted true or false; got '3'"),
        (
            "order: reshufle",
            "order: invalid choice: 'reshufle' (choose from replacement, reshuffle); did you mean resh",
        ),
        ("compile: always", "compile: wanted auto, or nothing after --compile; got 'always'"),
        ("inner_lr: 1\ninner-lr: 1", "'inner-lr' is given twice"),
        ("task: omniglot", "is for task 'omniglot'; got the command metamom train sinusoid"),
        ("[1, 2]", "wanted flags by name, such as lr: 0.1; got a list"),
        ("just words", "wanted flags by name, such as lr: 0.1; got 'just words'"),
        ("a: [1", "cannot be read: not YAML: expected ',' or ']', but got '<stream end>', line 1"),
        ("a: \x07", "cannot be read: not YAML: a character that YAML does not allow"),
        ("a: &x [1]\nb: *x", "cannot be read: aliases (*name) are not allowed"),
        ("!!python/object/apply:os.system ['touch bad']", "cannot be read: not YAML: could not determine a constr"),
        ("lr: " + "[" * 1000 + "]" * 1000, "is nested too deeply"),
        ("lr: " + "9" * 5000, "cannot be read: "),
        ("#" * (1 << 20) + "#", "has 1,048,577 bytes; a file of flags has at most 1,048,576"),
    ],
)
def test_what_is_refused(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "sinusoid", "--config", "run.yaml"])
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("metamom train sinusoid: error: run.yaml")
    assert message in line
    assert len(line) < 400
    assert os.listdir() == ["run.yaml"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.yaml", None, "there is no file nowhere.yaml"),
        (".", None, ". is not a file"),
        ("run.json", b"{", "run.json is not JSON: Expecting property name"),
        ("run.json", b"[" * 100_000, "run.json is nested too deeply"),
        ("run.json", b'{"lrs": NaN}', "run.json: lrs: wanted a number"),
        ("run.yaml", b"\xff\xfe", "run.yaml is not text in UTF-8"),
        ("a\0b", None, "error: "),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", "sinusoid", "--config", name])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_again(tmp_path, capsys):
    """Its own config.json gives the same run; the command line overrides it."""
    first, again, other = (str(tmp_path / name) for name in ("first", "again", "other"))
    flags = ["--inner-lr", "0.02", "--adapt", "2,4", "--learn-inner-lr", "--seed", "7", "--evaluate-every", "2"]
    assert cli.main(["train", "sinusoid", *SMALL, *flags, "--run-dir", first]) == 0
    config = ["train", "sinusoid", "--config", f"{first}/config.json"]
    assert cli.main([*config, "--run-dir", again]) == 0
    assert read_config(again)["settings"] == read_config(first)["settings"]
    assert read_config(again)["length"] == read_config(first)["length"]
    assert [each["loss"] for each in read_metrics(again)] == [each["loss"] for each in read_metrics(first)]
    assert cli.main([*config, "--run-dir", other, "--seed", "8", "--iterations", "1"]) == 0
    assert read_config(other)["settings"] == {**read_config(first)["settings"], "seed": 8}
    assert len(read_metrics(other)) == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "omniglot", *config[2:]])
    assert "is for task 'sinusoid'" in capsys.readouterr().err


def test_a_run_that_tracks_its_bias_again(tmp_path):
    flags = ["--track-bias", "every=2", "--run-dir", str(tmp_path / "run")]
    assert cli.main(["train", "sinusoid", *SMALL, *flags]) == 0
    text = (tmp_path / "run" / "config.json").read_text(encoding="utf-8")
    assert arguments(tmp_path / "config.json", text)["track_bias"] == 2
    assert "track_bias" not in arguments(tmp_path / "config.json", text, command="compare sinusoid")


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("task", ["sinusoid", "omniglot"])
def test_settings_of_any_run(task, command, optimizer, tmp_path):
    """Each command takes those that it has flags for."""
    recipe = Recipe(task, optimizer=optimizer, bias="topk:5%", compile=True, learn_inner_lr="tensor", adapt=("2",))
    length = {"iterations": 5, "evaluate_every": None, "processes": 2, "server": "rank0", "checkpoint_every": 9}
    text = json.dumps({"settings": recipe.settings(), "length": length, "environment": {"python": "3"}})
    found = arguments(tmp_path / "config.json", text, command=f"{command} {task}")
    assert (found["bias"], found["compile"], found["learn_inner_lr"]) == ("topk:5%", True, "tensor")
    assert (found["adapt"], found["iterations"], found["meta_batch"]) == (("2",), 5, recipe.meta_batch)
    if command == "train":
        assert (found["optimizer"], found["lr"]) == (optimizer, recipe.lr)
        assert (found["beta"], found["server"]) == (None if optimizer == "adam" else 0.1, "rank0")


def test_a_comparison_again(tmp_path):
    base = Recipe("sinusoid", workers=2).settings()
    settings = {
        "base": base, "betas": [1.0, 0.5], "first_steps": ["zero"], "lrs": [0.1], "seeds": 2, "iterations": 7,
        "evaluate_every": 3, "validation_tasks": 11, "test_tasks": 12, "steps": [0, 1], "target": 0.5,
    }  # fmt: skip
    file = tmp_path / "config.json"
    found = arguments(file, json.dumps({"settings": settings}), command="compare sinusoid")
    assert (found["workers"], found["betas"], found["lrs"], found["seeds"]) == (2, (1.0, 0.5), (0.1,), 2)
    assert (found["evaluate_tasks"], found["tasks"], found["steps"], found["target"]) == (11, 12, (0, 1), 0.5)
    of_images = json.dumps({"settings": {**settings, "base": Recipe("omniglot", ways=20).settings()}})
    assert arguments(file, of_images, command="compare omniglot")["ways"] == 20
    with pytest.raises(SystemExit, match="2"):
        arguments(file, json.dumps({"settings": settings}), command="train sinusoid")
