"""What a run directory takes and refuses before anything is written, and records of the wrong type."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from directory_runs import FLAGS, go, refused
from endings import contents

from metamom import Clip, Compose, TopK, cli, files
from metamom.bias import EF14, RandK
from metamom.experiments.recipes import Recipe
from metamom.training.directory import RunDirectory, read_config

# refused before anything is written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": Compose(TopK(10**6), Clip(1.0))}, r"TopK needs 1 <= k <= "),
        ({"bias": Compose(Clip(1.0), RandK(10**6), TopK(3))}, r"RandK needs 1 <= k <= "),
        ({"bias": EF14(Compose(TopK(10**6), Clip(1.0)))}, r"TopK needs 1 <= k <= "),
        ({"workers": 2, "aggregate": "trimmed:0.1"}, "leaves out none"),
    ],
)
def test_an_operator_is_refused_before_the_directory_is_made(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        go(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_no_tensorboard(resume, run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    place = run if resume else tmp_path / "none"
    refused(place, "needs TensorBoard: pip install", lambda: go(place, resume=resume, iterations=6, tensorboard=True))


@pytest.mark.parametrize(
    "wrong",
    [
        ["--device", "cuda:99"], ["--device", "toaster"], ["--bias", "topk:1000000+clip:1"], ["--inner-steps", "0"],
        ["--adapt", "nothing"], ["--track-bias", "every=2", "--shots", "1", "--queries", "0"], ["--lr", "-1"],
        ["--estimator", "moml"], ["--schedule", "cosine:0"], ["--evaluate-tasks", "1"], ["--checkpoint-every", "0"],
    ],
)  # fmt: skip
def test_bad_flags_make_no_directory(wrong, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", "sinusoid", "--iterations", "1", "--run-dir", str(run), *wrong]) == 2
    assert "metamom: error: " in capsys.readouterr().err
    assert not run.exists()


def test_what_a_killed_process_has_left_goes_once_the_run_goes_on(run):
    half = run / "checkpoints" / ".step-00000004.pt.abc.tmp"
    half.write_bytes(b"half")
    refused(run, "more than the total of 1", lambda: go(run, iterations=1, resume=True))
    assert half.exists()
    go(run, iterations=5, resume=True)
    assert not half.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664), (0o022, 0o644)])
def test_modes_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "file", b"")
        go(tmp_path / "run", iterations=2)
    finally:
        os.umask(before)
    made = [tmp_path / "file", *(path for path in (tmp_path / "run").rglob("*") if path.is_file())]
    assert {path.name for path in made} >= {"config.json", "metrics.jsonl", "step-00000002.pt"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {mode}
    folders = [tmp_path / "run", tmp_path / "run" / "checkpoints"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}


# records of the wrong type


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("settings", [], r"config\.json: settings should be an object|settings should be"),
        ("length", 3, "length should be"),
        ("environment", None, "environment should be"),
        ("history", {"a": 1}, "history should be"),
        ("history", [1], r"history\.0 should be"),
    ],
)
def test_parts_of_a_configuration_of_the_wrong_type(name, value, message, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, name: value}))
    refused(run, message, lambda: go(run, resume=True))


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"settings": ' * 10**5, "\0", "", "null", '"\\ud800"', "{" + " " * 10**6]
)
def test_a_configuration_that_is_no_json(text, run):
    (run / "config.json").write_text(text)
    refused(run, r"the run.s configuration cannot be read\. .*config\.json", lambda: go(run, resume=True))


def folder(place: Path) -> None:
    place.mkdir()


def self_link(place: Path) -> None:
    place.symlink_to(place)


def dangling(place: Path) -> None:
    place.symlink_to("nowhere")


def device(place: Path) -> None:
    place.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [folder, self_link, dangling, device, os.mkfifo], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", [".lock", "config.json", "metrics.jsonl"])
def test_files_that_are_none(name, make, run):
    (run / name).unlink(missing_ok=True)
    make(run / name)
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ValueError, match=rf"{name} is .*, where a run keeps a file of its own\. Move it away"):
        go(run, resume=True)
    assert sorted(path.name for path in run.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", "0.1", "lr should be a valid number; got '0.1'"),
        ("shots", 1.5, "shots should be a valid integer; got 1.5"),
        ("workers", True, "workers should be a valid integer; got True"),
        ("adapt", ["0", 1], "adapt.1 should be a valid string"),
        ("chunk_size", "all", "chunk_size should be a valid integer or 'auto'|chunk_size should be"),
        ("estimator", "exactly", "estimator must be one of exact, independent"),
        ("task", None, "task should be 'sinusoid', 'omniglot' or 'images'"),
        ("fixed_tasks", 2**40, "fixed_tasks must be at most 2,147,483,647"),
        ("beta", 7.0, None),  # of the optimizer, which evaluation does not make
    ],
)
def test_settings_of_the_wrong_type(name, value, message, commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    config = read_config(run)
    config["settings"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    status = cli.main(["evaluate", str(run), "--tasks", "4"])
    said = capsys.readouterr().err
    if message is None:
        assert status == 0
    else:
        assert status == 2
        assert any(each in said for each in message.split("|")), said
        bias = ["bias", str(run), "--tasks", "3", "--inner-batch", "1", "--out", str(tmp_path / "bias")]
        assert cli.main(bias) == 2
        assert not (tmp_path / "bias").exists()
    resume = ["train", "sinusoid", *FLAGS, "--iterations", "5", "--run-dir", str(run), "--resume"]
    if name not in Recipe.free():
        assert cli.main(resume) == 2
        assert f"{name} is {value!r} there and" in capsys.readouterr().err or name == "adapt"
    assert contents(run) == before


def test_lock_without_a_run(tmp_path):
    with RunDirectory(tmp_path, {}) as directory:
        directory.write_config()
    assert read_config(tmp_path)["history"][0]["environment"]["torch"] == torch.__version__


def test_a_file_in_place_of_the_report_is_refused_before_the_bias_is_measured(commanded, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("metamom.experiments.bias_report.measure", lambda *_, **__: pytest.fail("measured"))
    assert cli.main(["bias", str(commanded), "--out", str(tmp_path / "file")]) == 2
    assert "is a file; the report needs a directory" in capsys.readouterr().err


def test_a_setting_that_an_earlier_record_lacks_is_not_changed_in_silence(commanded, tmp_path, capsys):
    run = Path(shutil.copytree(commanded, tmp_path / "run"))
    config = read_config(run)
    del config["settings"]["aggregate"], config["settings"]["tracking"]
    (run / "config.json").write_text(json.dumps(config))
    command = ["train", "sinusoid", *FLAGS, "--workers", "1", "--iterations", "5", "--run-dir", str(run), "--resume"]
    assert cli.main([*command, "--aggregate", "median"]) == 2
    assert "aggregate is None there and 'median' here" in capsys.readouterr().err
