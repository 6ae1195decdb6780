"""The command: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from tiny_omniglot import TINY, members, pixels, png, write_zip

from metamom import TaskBatch, cli
from metamom.bias.spec import spec_help
from metamom.tasks import Sinusoid, fetch
from metamom.training.checkpoints import Checkpoints, load
from metamom.training.directory import read_config, read_metrics

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE = 120  # seconds
SMALL = ["--meta-batch", "4", "--shots", "5", "--evaluate-tasks", "4"]


class Said(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def metamom(capsys) -> Callable[..., Said]:
    """Run the command in this process."""

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of ``metamom train sinusoid``."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert (
        cli.main(["train", "sinusoid", "--iterations", "6", "--checkpoint-every", "3", "--run-dir", str(run), *SMALL])
        == 0
    )
    return run


@pytest.fixture(scope="module")
def trained_omniglot(tmp_path_factory, data_root) -> Path:
    """A run of ``metamom train omniglot`` on the real data."""
    run = tmp_path_factory.mktemp("trained") / "omniglot"
    arguments = ["--ways", "3", "--iterations", "2", "--meta-batch", "2", "--evaluate-tasks", "4", "--seed", "1"]
    root = ["--data-root", str(data_root)]
    assert cli.main(["train", "omniglot", "--run-dir", str(run), *arguments, *root]) == 0
    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def the_error(said: Said) -> str:
    """The one line that tells what is wrong; argparse puts its usage before it."""
    assert said.code == 2, said
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("metamom")]
    assert len(lines) == 1, said.err
    assert said.err.endswith(lines[0] + "\n"), "the error comes last"
    assert re.match(r"metamom[a-z ]*: error: \S", lines[0])
    assert "Traceback" not in said.err
    return lines[0]


# bad input

BAD_ARGUMENTS = {
    "negative lr": (["train", "sinusoid", "--lr", "-0.1"], r"lr is the step size and must be > 0 .*; got -0\.1"),
    "zero lr": (["train", "sinusoid", "--lr", "0"], "lr is the step size and must be > 0"),
    "lr no number": (["train", "sinusoid", "--lr", "nan"], "argument --lr: wanted a number, .* got 'nan'"),
    "lr no word": (["train", "sinusoid", "--lr", "fast"], "argument --lr: wanted a number, .* got 'fast'"),
    "zero lr of Adam": (["train", "sinusoid", "--optimizer", "adam", "--lr", "0"], "lr is the step size"),
    "negative inner lr": (["train", "sinusoid", "--inner-lr", "-1"], r"inner_lr must be > 0 and finite; got -1\.0"),
    "zero inner lr": (["train", "sinusoid", "--inner-lr", "0"], "inner_lr must be > 0"),
    "beta 0": (["train", "sinusoid", "--beta", "0"], r"must be in \(0, 1\]; got 0\.0.*beta=0\.1"),
    "beta 1.5": (["train", "sinusoid", "--beta", "1.5"], r"must be in \(0, 1\]; got 1\.5"),
    "beta of SGD": (["train", "sinusoid", "--optimizer", "sgd", "--beta", "0.5"], "--beta, --first-step and"),
    "normalised Adam": (["train", "sinusoid", "--optimizer", "adam", "--normalize"], "--beta, --first-step and --norm"),
    "unknown task": (["train", "pendulum"], "invalid choice: 'pendulum'.*sinusoid"),
    "unknown command": (["fly"], "invalid choice: 'fly'"),
    "no command": ([], "required: COMMAND"),
    "unknown flag": (["train", "sinusoid", "--momentum", "0.9"], "unrecognized arguments: --momentum"),
    "flag cut short": (["train", "sinusoid", "--iter", "5"], "unrecognized arguments: --iter"),
    "ways of sinusoids": (["train", "sinusoid", "--ways", "5"], "unrecognized arguments: --ways"),
    "unknown bias": (["train", "sinusoid", "--bias", "bottomk:3"], "unknown .* 'bottomk:3'; wanted none, clip:TAU"),
    "bias without number": (["train", "sinusoid", "--bias", "topk:"], "bias operator 'topk:'"),
    "bias over 100 %": (["train", "sinusoid", "--bias", "topk:150%"], "0 < ratio <= 1"),
    "bias of no entry": (["train", "sinusoid", "--bias", "topk:0"], "k >= 1"),
    "bias beyond the model": (["train", "sinusoid", "--bias", "topk:99999"], "the number of parameters"),
    "negative clip": (["train", "sinusoid", "--bias", "clip:-1"], "a norm tau > 0 and finite"),
    "bias by percent": (["train", "sinusoid", "--bias", "clip:1+randk:101%"], "RandK needs a share 0 < ratio <= 1"),
    "bias option": (["train", "sinusoid", "--bias", "sign:all"], "bias operator 'sign:all': sign has no option 'all'"),
    "bias of no level": (["train", "sinusoid", "--bias", "qsgd:0"], "levels"),
    "feedback of nothing": (["train", "sinusoid", "--bias", "ef21:"], "bias operator 'ef21:': unknown operator ''"),
    "feedback twice": (["train", "sinusoid", "--bias", "ef14:ef21:sign"], "error feedback stands once, in front"),
    "momentum twice": (["train", "sinusoid", "--bias", "ef21-sgdm(0.1):topk:1%"], r"carries the momentum.*--beta 1"),
    "aggregate": (["train", "sinusoid", "--aggregate", "mode"], "mean, median, geomedian or trimmed:SHARE .*'mode'"),
    "aggregate of nothing": (["train", "sinusoid", "--aggregate", "trimmed:0.5"], "SHARE < 0.5; got 'trimmed:0.5'"),
    "order of endless tasks": (["train", "sinusoid", "--order", "reshuffle"], "order='reshuffle' is of a fixed set"),
    "unknown order": (["train", "sinusoid", "--fixed-tasks", "8", "--order", "sorted"], "invalid choice: 'sorted'"),
    "no fixed tasks": (["train", "sinusoid", "--fixed-tasks", "0"], "n must be >= 1; got 0"),
    "workers": (["train", "sinusoid", "--workers", "3"], "must divide the meta-batch of 8 tasks; got 3"),
    "no workers": (["train", "sinusoid", "--workers", "0"], "must divide the meta-batch"),
    "no tasks": (["train", "sinusoid", "--meta-batch", "0"], "meta_batch must be >= 1"),
    "no shots": (["train", "sinusoid", "--shots", "0"], "shots must be >= 1"),
    "no inner steps": (["train", "sinusoid", "--inner-steps", "0"], "inner_steps must be >= 1"),
    "no number of tasks": (["train", "sinusoid", "--chunk-size", "few"], "a number of tasks, or auto: .* got 'few'"),
    "compile": (["train", "sinusoid", "--compile", "always"], "wanted auto, or nothing after --compile; got 'always'"),
    "dtype": (["train", "sinusoid", "--dtype", "float16"], "invalid choice: 'float16'.*bfloat16"),
    "schedule": (["train", "sinusoid", "--schedule", "linear"], "constant, or cosine:N .*; got 'linear'"),
    "schedule of no length": (["train", "sinusoid", "--schedule", "cosine:0"], "cosine:N .*; got 'cosine:0'"),
    "no chunk": (["train", "sinusoid", "--chunk-size", "0"], "chunk_size"),
    "no iterations": (["train", "sinusoid", "--iterations", "0"], "iterations must be >= 1"),
    "no checkpoints": (["train", "sinusoid", "--checkpoint-every", "0"], "checkpoint_every must be >= 1"),
    "one task for validation": (["train", "sinusoid", "--evaluate-tasks", "1"], "at least 2 tasks"),
    "unknown parameter": (["train", "sinusoid", "--adapt", "tail"], "tail"),
    "negative seed": (["train", "sinusoid", "--seed", "-1"], "seed must be in 0 <= seed"),
    "seed too large": (["train", "sinusoid", "--seed", str(2**70)], "seed must be in 0 <= seed"),
    "unknown device": (["train", "sinusoid", "--device", "abacus"], "unknown device 'abacus'"),
    "no run to evaluate": (["evaluate", "nowhere"], r"nowhere holds no run: there is no nowhere/config\.json"),
    "steps that are no numbers": (["evaluate", "nowhere", "--steps", "a,b"], "wanted a whole number, .* got 'a'"),
    "repeated lrs": (["compare", "sinusoid", "--lrs", "0.1,0.1"], "lrs must differ"),
    "compare beta 0": (["compare", "sinusoid", "--betas", "1,0"], r"must be in \(0, 1\]"),
    "compare no seeds": (["compare", "sinusoid", "--seeds", "0"], "at least one seed"),
    "compare one test task": (["compare", "sinusoid", "--tasks", "1"], "at least 2 test tasks"),
    "compare negative steps": (["compare", "sinusoid", "--steps", "1,-1"], "inner steps >= 0"),
    "compare unknown first step": (["compare", "sinusoid", "--first-steps", "one"], "first_step must be"),
    "compare workers": (["compare", "sinusoid", "--workers", "3"], "must divide the meta-batch"),
    "unknown data set": (["data", "check", "imagenet"], "invalid choice: 'imagenet'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments(what, metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD_ARGUMENTS[what]
    if arguments[:1] == ["train"] and what not in ("unknown task",):
        arguments = [*arguments, "--run-dir", "run"]
    assert re.search(message, the_error(metamom(*arguments)))
    assert not [name for name in contents(tmp_path) if "metrics" in name or "checkpoint" in name]
    if arguments[:1] != ["compare"]:  # where the directory is made before the first run is
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "5000"], r"needs ways=5000 different classes; the data has 4400"),
        (["--shots", "15", "--queries", "6"], r"needs shots \+ queries = 15 \+ 6 images of each class.*has 20"),
        (["--ways", "0"], "ways must be >= 1; got 0"),
    ],
)
def test_more_than_the_data_has(flags, message, metamom, data_root, tmp_path):
    run = tmp_path / "run"
    said = metamom("train", "omniglot", *flags, "--data-root", data_root, "--run-dir", run)
    assert re.search(message, the_error(said))
    assert not run.exists()


@pytest.mark.parametrize("command", [["train", "omniglot", "--data-root"], ["data", "check", "omniglot", "--root"]])
def test_missing_data(command, metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = the_error(metamom(*command, tmp_path / "none"))
    assert f"no omniglot data: wanted {tmp_path}/none/omniglot/images_background.zip" in message
    assert f"metamom data fetch omniglot --root {tmp_path}/none" in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiny_root(tmp_path, monkeypatch) -> Path:
    """A root with small archives, and the command believing that Omniglot is that small."""
    for part in ("background", "evaluation"):
        monkeypatch.setitem(fetch.PUBLISHED, part, TINY)
        write_zip(tmp_path / "root" / "omniglot" / f"images_{part}.zip", members(part))
    return tmp_path / "root"


def test_data_check_of_sound_archives(metamom, tiny_root):
    said = metamom("data", "check", "omniglot", "--root", tiny_root)
    assert said.code == 0
    assert said.out.count("6 characters, 24 drawings, all sound") == 2


@pytest.mark.parametrize("kept", [0, 10, 1000, -1, -30])
def test_truncated_archive(kept, metamom, tiny_root):
    archive = tiny_root / "omniglot" / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:kept])
    before = contents(tiny_root)
    message = the_error(metamom("data", "check", "omniglot", "--root", tiny_root))
    assert str(archive) in message
    assert "no whole zip archive" in message
    assert contents(tiny_root) == before


def test_drawing_of_the_wrong_size(metamom, tiny_root):
    wrong = members("evaluation")
    name = sorted(wrong)[5]
    wrong[name] = png(pixels(0, 0, 14))
    archive = write_zip(tiny_root / "omniglot" / "images_evaluation.zip", wrong)
    message = the_error(metamom("data", "check", "omniglot", "--root", tiny_root))
    assert str(archive) in message
    assert f"{name} of 14x14 pixels instead of 12x12" in message


def test_truncated_real_archive_in_training(metamom, data_root, tmp_path):
    folder = tmp_path / "root" / "omniglot"
    folder.mkdir(parents=True)
    for archive in (data_root / "omniglot").glob("*.zip"):
        (folder / archive.name).write_bytes(archive.read_bytes()[:100_000])
    said = metamom("train", "omniglot", "--data-root", tmp_path / "root", "--run-dir", tmp_path / "run")
    assert "images_background.zip" in the_error(said)
    assert not (tmp_path / "run").exists()


# bad runs


def test_directory_with_a_run(metamom, trained):
    before = contents(trained)
    message = the_error(metamom("train", "sinusoid", "--run-dir", trained, *SMALL))
    assert f"{trained} holds a run already" in message
    assert "--resume" in message
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0.5"], r"lr is 0\.03 there and 0\.5 here"),
        (["--beta", "1"], r"beta is 0\.1 there and 1\.0 here"),
        (["--seed", "1", "--bias", "clip:1"], "bias is 'none' there and 'clip:1' here; seed is 0 there and 1 here"),
    ],
)
def test_resume_with_other_settings(flags, message, metamom, trained):
    before = contents(trained)
    said = metamom("train", "sinusoid", "--run-dir", trained, *SMALL, *flags, "--resume")
    assert re.search(message, the_error(said))
    assert contents(trained) == before


def test_resume_as_another_task(metamom, trained, data_root):
    said = metamom("train", "omniglot", "--run-dir", trained, "--resume", "--data-root", data_root)
    assert "task is 'sinusoid' there and 'omniglot' here" in the_error(said)


def test_run_of_another_model(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        state = load(file)
        state["learner"] = {name: w[:3] for name, w in state["learner"].items()}
        torch.save(state, file)
    before = contents(run)
    for command in (["evaluate", run], ["train", "sinusoid", "--run-dir", run, *SMALL, "--resume", "--iterations", 9]):
        message = the_error(metamom(*command))
        assert str(run) in message
        assert "of another model" in message
        assert contents(run) == before


def test_checkpoint_cut_short(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(file.read_bytes()[:-1000])
    before = contents(run)
    assert "best.pt is cut short or damaged" in the_error(metamom("evaluate", run))
    assert contents(run) == before


@pytest.mark.filterwarnings("default")
def test_newest_checkpoint_cut_short(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = Checkpoints(run / "checkpoints").path(6)
    newest.write_bytes(newest.read_bytes()[:-1000])
    said = metamom(
        "train", "sinusoid", "--run-dir", run, *SMALL, "--checkpoint-every", 3, "--iterations", 6, "--resume"
    )
    assert said.code == 0
    assert said.err.startswith("metamom: warning: checkpoint ")
    assert said.err.endswith("Going back to the one before.\n")
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(trained)]


def test_checkpoint_of_another_version(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for file in (run / "checkpoints").iterdir():
        torch.save({**load(file), "format": 99}, file)
    before = contents(run)
    for command in (["evaluate", run], ["train", "sinusoid", "--run-dir", run, *SMALL, "--resume", "--iterations", 9]):
        assert "has format 99; this version of metamom reads format 1" in the_error(metamom(*command))
        assert contents(run) == before


def test_run_of_another_version(metamom, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = read_config(run)
    config["settings"]["flavour"] = "sweet"
    (run / "config.json").write_text(json.dumps(config))
    assert "its settings differ in flavour" in the_error(metamom("evaluate", run))
    del config["settings"]["flavour"], config["settings"]["tracking"]  # as a version wrote that knew no tracking
    (run / "config.json").write_text(json.dumps(config))
    assert metamom("evaluate", run, "--json").out == metamom("evaluate", trained, "--json").out != ""
    (run / "config.json").write_text("{")
    assert "the run's configuration cannot be read" in the_error(metamom("evaluate", run))
    del config["settings"]["shots"]
    (run / "config.json").write_text(json.dumps(config))
    assert f"the settings of the run in {run} lack shots, which every version" in the_error(metamom("evaluate", run))


def test_file_in_place_of_a_directory(metamom, tmp_path):
    (tmp_path / "file").write_text("mine")
    said = metamom("train", "sinusoid", "--run-dir", tmp_path / "file", *SMALL, "--iterations", "1")
    assert "is a file; a run needs a directory" in the_error(said)
    assert (tmp_path / "file").read_text() == "mine"


def test_divergence_has_an_exit_code_of_its_own(metamom, tmp_path):
    said = metamom("train", "sinusoid", "--run-dir", tmp_path / "run", *SMALL, "--lr", "1e9", "--iterations", "20")
    assert said.code == 1
    assert re.fullmatch(r"metamom: diverged: the \w+ is not finite at step \d+\. Try a smaller lr, .*\n", said.err)


# train and evaluate


EVERY_FLAG = {
    "--inner-lr": "0.02", "--inner-steps": "2", "--first-step": "gradient", "--adapt": "2,4",
    "--learn-inner-lr": "tensor", "--estimator": "first-order", "--chunk-size": "2", "--dtype": "float64",
    "--inner-batches": "fresh",
    "--device": "cpu", "--workers": "2", "--bias": "topk:5%", "--aggregate": "median", "--optimizer": "momentum",
    "--fixed-tasks": "8", "--order": "reshuffle",
    "--lr": "0.0001", "--beta": "0.5", "--seed": "3", "--iterations": "4", "--meta-batch": "4",
    "--checkpoint-every": "2", "--shots": "4", "--queries": "3", "--evaluate-every": "2", "--evaluate-tasks": "5",
}  # fmt: skip


def test_train_with_every_flag(metamom, tmp_path):
    run = tmp_path / "run"
    flags = [word for flag in EVERY_FLAG.items() for word in flag]
    said = metamom("train", "sinusoid", *flags, "--normalize", "--run-dir", run, "--resume", "--tensorboard")
    assert said.code == 0, said
    assert said.err == ""
    assert f"trained for 4 iterations, in {run}" in said.out
    assert "validation loss after 2 step(s): " in said.out
    config = read_config(run)
    assert config["settings"] == {
        "task": "sinusoid", "ways": None, "shots": 4, "queries": 3, "inner_lr": 0.02, "inner_steps": 2,
        "estimator": "first-order", "inner_batches": "fresh", "tracking": None,
        "learn_inner_lr": "tensor", "adapt": ["2", "4"], "chunk_size": 2, "compile": False, "norm": None,
        "optimizer": "momentum", "lr": 0.0001, "beta": 0.5, "first_step": "gradient", "normalize": True,
        "schedule": "constant",
        "meta_batch": 4, "workers": 2,
        "bias": "topk:5%", "aggregate": "median", "fixed_tasks": 8, "order": "reshuffle",
        "seed": 3, "dtype": "float64", "device": "cpu",
    }  # fmt: skip
    assert config["length"] == {
        "iterations": 4, "checkpoint_every": 2, "evaluate_every": 2, "evaluate_tasks": 5,
        "processes": 1, "server": "replicated",
    }  # fmt: skip
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert ["validation" in line for line in lines] == [False, True, False, True]
    state = load(Checkpoints(run / "checkpoints").path(4))
    assert state["learner"]["model.0.weight"].dtype == torch.float64
    assert {"step_sizes.alpha:2:weight", "step_sizes.alpha:4:bias"} <= state["learner"].keys()
    group = state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["beta"], group["first_step"], group["normalize"]) == (0.0001, 0.5, "gradient", True)
    assert list((run / "tensorboard").iterdir())
    again = metamom("train", "sinusoid", *flags, "--normalize", "--run-dir", run, "--resume", "--tensorboard")
    assert again.code == 0
    assert f"{run} is trained for 4 iterations already" in again.out


def test_estimators_with_inner_batches_of_their_own(metamom, tmp_path, monkeypatch):
    """--shots is one inner batch: training tasks have as many as the estimator takes, others one."""
    seen = []
    sample = Sinusoid.sample

    def noting(self: Sinusoid, step: int, num_tasks: int, **where: int) -> TaskBatch:
        batch = sample(self, step, num_tasks, **where)
        seen.append((self.stream, batch.support_x.shape[1]))
        return batch

    monkeypatch.setattr(Sinusoid, "sample", noting)
    run = tmp_path / "run"
    flags = ["--shots", 5, "--meta-batch", 4, "--evaluate-tasks", 4, "--run-dir", run]
    train = ["train", "sinusoid", *flags, "--iterations"]
    assert metamom(*train, 3, "--estimator", "independent").code == 0
    assert dict(seen) == {"train": 10, "validation": 5}
    seen.clear()
    assert metamom("evaluate", run, "--tasks", 4).code == 0
    assert set(seen) == {("test", 5)}
    seen.clear()
    assert metamom("evaluate", run, "--tasks", 4, "--split", "train").code == 0
    assert set(seen) == {("train", 5)}
    before = contents(run)
    for other in (["--estimator", "cross-fit"], [], ["--estimator", "independent", "--inner-batches", "fresh"]):
        said = the_error(metamom(*train, 6, *other, "--resume"))
        assert ("inner_batches" if "fresh" in other else "estimator") in said
        assert contents(run) == before
    assert metamom(*train, 6, "--estimator", "independent", "--resume").code == 0
    assert len(read_metrics(run)) == 6


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("rmsprop", "RMSprop")])
def test_other_optimizers(name, kind, metamom, tmp_path):
    run = tmp_path / "run"
    said = metamom("train", "sinusoid", "--optimizer", name, "--iterations", 2, "--run-dir", run, *SMALL)
    assert said.code == 0
    settings = read_config(run)["settings"]
    assert (settings["optimizer"], settings["lr"]) == (name, 0.03 if kind == "SGD" else 0.001)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bias", "randk:5%:scaled"],
        ["--bias", "clip:1+topk:5%:tensor"],
        ["--bias", "qsgd:16+sign"],
        ["--bias", "ef14:normalize"],
        ["--bias", "ef21-sgdm(0.1):topk:1%", "--beta", "1"],
        ["--bias", "clip21:1", "--aggregate", "geomedian"],
        ["--aggregate", "median"],
        ["--fixed-tasks", "8", "--order", "reshuffle"],
        ["--fixed-tasks", "8", "--order", "replacement"],
    ],
    ids=" ".join,
)
def test_sources_of_bias_and_going_on(flags, metamom, tmp_path):
    """Trained in one go and in two, to the same weights; evaluated by what the directory says."""
    ends = []
    for name, legs in (("one", [4]), ("two", [3, 4])):
        run = tmp_path / name
        for iterations in legs:
            arguments = ("--workers", 4, *flags, "--iterations", iterations, "--run-dir", run, "--resume")
            assert metamom("train", "sinusoid", *arguments, *SMALL).code == 0
        ends.append(load(Checkpoints(run / "checkpoints").path(4))["learner"])
        assert all(line["bias_error"] > 0 or "--fixed-tasks" in flags for line in read_metrics(run))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert metamom("evaluate", tmp_path / "one", "--tasks", 4).code == 0


def test_cosine_schedule_goes_on_where_it_stood(metamom, tmp_path):
    ends = []
    for name, legs in (("one", [4]), ("two", [2, 4])):
        run = tmp_path / name
        for iterations in legs:
            flags = ("--lr", "0.01", "--schedule", "cosine:4", "--iterations", iterations, "--run-dir", run, "--resume")
            assert metamom("train", "sinusoid", *flags, *SMALL).code == 0
            lr = load(Checkpoints(run / "checkpoints").path(iterations))["optimizer"]["param_groups"][0]["lr"]
            assert lr == pytest.approx(0.005 if iterations == 2 else 0, abs=1e-8)
        ends.append(load(Checkpoints(run / "checkpoints").path(4))["learner"])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_what_only_changes_how_it_is_computed(metamom, tmp_path):
    losses = []
    for number, flags in enumerate(([], ["--compile", "auto", "--chunk-size", "auto"], ["--dtype", "bfloat16"])):
        run = tmp_path / str(number)
        assert metamom("train", "sinusoid", "--iterations", 3, "--run-dir", run, *SMALL, *flags).code == 0
        losses.append([line["loss"] for line in read_metrics(run)])
        assert metamom("evaluate", run, "--tasks", 4).code == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] != losses[0]


def test_the_seed_decides_everything(metamom, tmp_path):
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        run = tmp_path / str(number)
        assert metamom("train", "sinusoid", "--seed", seed, "--iterations", 3, "--run-dir", run, *SMALL).code == 0
        losses.append([line["loss"] for line in read_metrics(run)])
    assert losses[0] == losses[1]
    assert not set(losses[0]) & set(losses[2])


def test_run_directory_of_its_own(metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = metamom("train", "sinusoid", "--iterations", 1, *SMALL)
    assert said.code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"sinusoid-\d{8}-\d{6}", run.name)
    assert f"metamom evaluate runs/{run.name}" in said.out
    assert metamom("evaluate", f"runs/{run.name}", "--tasks", 4).code == 0


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
    assert head == ("sinusoid 7-shot, split test, 10 tasks, trained for 6 iterations; statistics of the batch at hand")
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
        (["--norm", "running"], "invalid choice: 'running'"),
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
    assert 'norm="frozen" normalises by running statistics' in message
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
    assert "tells 3 classes apart; got --ways 5" in message
    message = the_error(metamom("evaluate", trained_omniglot, "--split", "tset", "--data-root", data_root))
    assert "tset" in message


def test_data_check_of_the_real_data(metamom, data_root):
    said = metamom("data", "check", "omniglot", "--root", data_root)
    assert (said.code, said.err) == (0, "")
    background, evaluation = said.out.splitlines()
    assert "images_background.zip: 964 characters, 19,280 drawings, all sound" in background
    assert "images_evaluation.zip: 659 characters, 13,180 drawings, all sound" in evaluation


# compare

COMPARE = ["compare", "sinusoid", "--seeds", "2", "--lrs", "0.01,0.03", "--iterations", "30", "--evaluate-every", "15",
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
        ["SGD (β = 1)", "0.01"], ["SGD (β = 1)", "0.03"],
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
    assert said.out == f"report: {compared}/report.md\n"
    assert len(rows((compared / "report.md").read_text())) == 4
    assert {p: p.stat().st_mtime_ns for p in (compared / "runs").rglob("*") if p.is_file()} == times


def test_comparison_is_refused_a_directory_in_use(metamom, compared):
    before = contents(compared)
    assert "holds a run already" in the_error(metamom(*COMPARE, "--run-dir", compared))
    changed = ["20" if before == "--tasks" else word for before, word in zip(["", *COMPARE], COMPARE, strict=False)]
    other = metamom(*changed, "--run-dir", compared, "--resume")
    assert "test_tasks is 10 there and 20 here" in the_error(other)
    assert "settings differ" in the_error(metamom("evaluate", compared))
    assert contents(compared) == before


def test_two_processes_give_the_same_outcomes(compared, metamom, tmp_path):
    said = metamom(*COMPARE, "--run-dir", tmp_path / "run", "--jobs", "2")
    assert said.code == 0
    assert outcomes(tmp_path / "run") == outcomes(compared)
    assert rows((tmp_path / "run" / "report.md").read_text()) == rows((compared / "report.md").read_text())


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


def test_step_size_that_diverges_is_counted(metamom, tmp_path):
    flags = ["--seeds", "2", "--lrs", "0.01,1e12", "--betas", "1", "--iterations", "10", "--tasks", "4", *SMALL]
    said = metamom("compare", "sinusoid", *flags, "--run-dir", tmp_path)
    assert said.code == 0, said
    good, bad = rows((tmp_path / "report.md").read_text())
    assert good[-1] == "0 of 2"
    assert bad == ["SGD (β = 1)", "1e+12", "—", "—", "—", "—", "never", "2 of 2"]
    ends = {name: json.loads(text)["diverged"] for name, text in outcomes(tmp_path).items()}
    assert [ends[f"beta1-zero_lr0.01_seed{seed}"] for seed in (0, 1)] == [None, None]
    assert all(0 < ends[f"beta1-zero_lr1e+12_seed{seed}"] < 10 for seed in (0, 1))


def test_comparison_in_which_everything_diverges(metamom, tmp_path):
    flags = ["--seeds", "1", "--lrs", "1e11,1e12", "--iterations", "10", "--tasks", "4", *SMALL]
    assert metamom("compare", "sinusoid", *flags, "--run-dir", tmp_path).code == 0
    assert [row[-1] for row in rows((tmp_path / "report.md").read_text())] == ["1 of 1"] * 4


# the program


def test_version(metamom):
    assert metamom("--version") == (0, f"metamom {metadata.version('metamom')}\n", "")


@pytest.mark.parametrize(
    "command", [[], ["train"], ["train", "sinusoid"], ["evaluate"], ["compare", "omniglot"], ["data"]]
)
def test_help(command, metamom):
    said = metamom(*command, "--help")
    assert said.code == 0
    assert said.out.startswith(" ".join(["usage: metamom", *command]))


@pytest.mark.parametrize(
    "command", [["train", "sinusoid"], ["compare", "omniglot"], ["reproduce", "mnist"], ["reproduce", "fashion"]]
)
def test_help_on_specs(command, metamom, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    said = metamom(*command, "--help").out
    assert spec_help() in said
    assert max(map(len, said.splitlines())) <= 100


def test_module_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "metamom", "train", "sinusoid", "--iterations", "1", "--run-dir", "run", *SMALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained for 1 iterations, in run" in done.stdout
    assert done.stderr == ""  # no bars where there is no terminal
    assert (tmp_path / "run" / "config.json").exists()


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
