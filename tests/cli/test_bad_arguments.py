"""Arguments that the command refuses: one line that says why, and nothing on the disk."""

from __future__ import annotations

import re

import pytest
from command import the_error
from endings import contents

BAD_ARGUMENTS = {
    "negative lr": (["train", "sinusoid", "--lr", "-0.1"], r"lr is the step size and must be > 0 .*; got -0\.1"),
    "zero lr": (["train", "sinusoid", "--lr", "0"], "lr is the step size and must be > 0"),
    "lr no number": (["train", "sinusoid", "--lr", "nan"], "argument --lr: wanted a number, .* got 'nan'"),
    "lr no word": (["train", "sinusoid", "--lr", "fast"], "argument --lr: wanted a number, .* got 'fast'"),
    "zero lr of Adam": (["train", "sinusoid", "--optimizer", "adam", "--lr", "0"], "lr is the step size"),
    "negative inner lr": (["train", "sinusoid", "--inner-lr", "-1"], r"--inner-lr must be > 0 and finite; got -1\.0"),
    "zero inner lr": (["train", "sinusoid", "--inner-lr", "0"], "--inner-lr must be > 0"),
    "beta 0": (["train", "sinusoid", "--beta", "0"], r"must be in \(0, 1\]; got 0\.0.*--beta 0\.1"),
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
    "feedback twice": (["train", "sinusoid", "--bias", "ef14:ef21:sign"], "error feedback may appear once"),
    "momentum twice": (["train", "sinusoid", "--bias", "ef21-sgdm(0.1):topk:1%"], r"carries the momentum.*--beta 1"),
    "aggregate": (["train", "sinusoid", "--aggregate", "mode"], "mean, median, geomedian or trimmed:SHARE .*'mode'"),
    "attack": (["train", "sinusoid", "--attack", "little:2"], "attack must be sign-flip:F, .* got 'little:2'"),
    "attack of all": (["train", "sinusoid", "--attack", "ipm:1"], "needs 1 faulty workers and at least 1 honest"),
    "krum of few": (["train", "sinusoid", "--aggregate", "krum:1"], "needs at least 5 workers; got 1"),
    "aggregate of nothing": (["train", "sinusoid", "--aggregate", "trimmed:0.5"], "SHARE < 0.5; got 'trimmed:0.5'"),
    "order of endless tasks": (["train", "sinusoid", "--order", "reshuffle"], "--order reshuffle is of a fixed set"),
    "unknown order": (["train", "sinusoid", "--fixed-tasks", "8", "--order", "sorted"], "invalid choice: 'sorted'"),
    "no fixed tasks": (["train", "sinusoid", "--fixed-tasks", "0"], "n must be >= 1; got 0"),
    "workers": (["train", "sinusoid", "--workers", "3"], "must divide the meta-batch of 8 tasks; got 3"),
    "no workers": (["train", "sinusoid", "--workers", "0"], "must divide the meta-batch"),
    "no tasks": (["train", "sinusoid", "--meta-batch", "0"], "--meta-batch must be >= 1"),
    "no shots": (["train", "sinusoid", "--shots", "0"], "shots must be >= 1"),
    "no inner steps": (["train", "sinusoid", "--inner-steps", "0"], "--inner-steps must be >= 1"),
    "no number of tasks": (["train", "sinusoid", "--chunk-size", "few"], "a number of tasks, or auto: .* got 'few'"),
    "compile": (["train", "sinusoid", "--compile", "always"], "wanted auto, or nothing after --compile; got 'always'"),
    "dtype": (["train", "sinusoid", "--dtype", "float16"], "invalid choice: 'float16'.*bfloat16"),
    "schedule": (["train", "sinusoid", "--schedule", "linear"], "constant, or cosine:N .*; got 'linear'"),
    "schedule of no length": (["train", "sinusoid", "--schedule", "cosine:0"], "cosine:N .*; got 'cosine:0'"),
    "no chunk": (["train", "sinusoid", "--chunk-size", "0"], "--chunk-size"),
    "no iterations": (["train", "sinusoid", "--iterations", "0"], "iterations must be >= 1"),
    "no checkpoints": (["train", "sinusoid", "--checkpoint-every", "0"], "--checkpoint-every must be >= 1"),
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
        (["--ways", "5000"], r"needs --ways 5000 different classes; the data has 4400"),
        (["--shots", "15", "--queries", "6"], r"needs shots \+ queries = 15 \+ 6 images of each class.*has 20"),
        (["--ways", "0"], "ways must be >= 2, since one class leaves nothing to distinguish; got 0"),
        (["--ways", "1"], "ways must be >= 2, since one class leaves nothing to distinguish; got 1"),
        (["--shots", "0"], "shots must be >= 1; got 0"),
        (["--queries", "0"], "queries must be >= 1; got 0"),
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
