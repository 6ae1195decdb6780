"""Errors of the library name arguments; those of the command name flags."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command import the_error
from image_files import write_splits
from PIL import Image
from safetensors.torch import load_file, save_file

import metamom
from metamom.cli.app import parsed, parser
from metamom.cli.flag_names import PHRASES, in_flags
from metamom.common.numbers import counted, plural

TRAIN = ["train", "images", "--root", "photos"]


@pytest.mark.parametrize(
    ("command", "python", "said"),
    [
        (TRAIN, "leave them out: on_broken='skip'.", "leave them out: --on-broken skip."),
        (TRAIN, 'such as the head: skip=["head"].', "such as the head: --init-except head."),
        (TRAIN, 'pass augment=["crop", "flip"].', "pass --augment crop,flip."),
        (TRAIN, "or CLASS/*.png with splits=.", "or CLASS/*.png with --splits."),
        (TRAIN, "needs ways=6 different classes", "needs --ways 6 different classes"),
        (TRAIN, "(lr=-0.5, beta=1e3)", "(--lr -0.5, --beta 1e3)"),
        (TRAIN, "resume it (--resume, or resume=True), or", "resume it (--resume), or"),
        (TRAIN, "pass normalize=True", "pass --normalize"),
        (TRAIN, "Leave out compile=True (--compile).", "Leave out --compile."),
        (TRAIN, 'with learn_inner_lr="tensor" (--learn-inner-lr tensor), or', "with --learn-inner-lr tensor, or"),
        (TRAIN, "bias='topk:5%' (--bias qsgd:4)", "--bias topk:5% (--bias qsgd:4)"),
        (TRAIN, "pass adapt=None", None),
        (TRAIN, "image_size must be at most 1,024", "--image-size must be at most 1,024"),
        (TRAIN, "lr is the step size", "--lr is the step size"),
        (TRAIN, "device=cuda, but PyTorch sees no GPU", "--device cuda, but PyTorch sees no GPU"),
        (TRAIN, "normalize needs 3 means", "--standardize data needs 3 means"),
        (["train", "omniglot"], "name the folder: root=, or", "name the folder: --data-root, or"),
        (["data", "check", "omniglot"], "name the folder: root=, or", "name the folder: --root, or"),
        (["evaluate", "run"], 'Use norm="batch", or norm="support" for', "Use --norm batch, or --norm support for"),
        # unchanged: calls, arguments that are not flags of the command, words within others, what users typed
        (["evaluate", "run"], "metamom.load(RUN, model=Net())", None),
        (["evaluate", "run"], "pass it, as metamom.load(RUN, loss_fn=...)", None),
        (["evaluate", "run"], "on_broken='skip'", "--on-broken skip"),
        (["export", "run", "file"], "on_broken='skip'", None),
        (TRAIN, "the settings of run: inner_lr should be a number", None),
        (TRAIN, "/data/ways=5/photos does not exist", None),
        (TRAIN, "vectorize='loop' does so", None),
    ],
)  # fmt: skip
def test_arguments_and_flags(command, python, said):
    assert in_flags(python, parsed(parser(), command)) == (python if said is None else said)


def test_every_phrase_is_one_of_the_library():
    root = Path(metamom.__file__).parent
    sources = [path.read_text() for folder in (root, root.parent / "tasks") for path in folder.rglob("*.py")]
    joined = ["".join(line.strip().removeprefix("f").strip('"') for line in text.splitlines()) for text in sources]
    for pairs in PHRASES.values():
        for python, _ in pairs:
            assert any(python in text for text in (*joined, *sources)), python


def test_what_the_command_says_of_images(metamom, tmp_path):
    root = write_splits(tmp_path / "photos", train=3, validation=3, test=3)
    arguments = ["train", "images", "--root", root, "--ways", "2", "--queries", "1", "--image-size", "16"]
    arguments += ["--run-dir", tmp_path / "run"]
    assert "--ways 9 different classes; the data has 3" in the_error(metamom(*arguments, "--ways", "9"))
    tree = the_error(metamom(*arguments, "--root", root / "train"))
    assert "which of them make each split: --splits DIR, with train.csv and test.csv of lines filename,label" in tree
    (root / "train" / "class00" / "0.png").write_bytes(b"")
    assert "or leave broken files out: --on-broken skip" in the_error(metamom(*arguments))
    for file in (root / "train").rglob("*.png"):
        Image.new("L", (16, 16), 7).save(file)
    flat = the_error(metamom(*arguments))
    assert "--standardize data needs" in flat
    assert "pass --standardize none" in flat


@pytest.mark.parametrize(("n", "said"), [(1, "1 class"), (0, "0 classes"), (2000, "2,000 classes")])
def test_words_for_one_and_many(n, said):
    assert counted(n, "class", "classes") == said
    assert plural(n, "step") == ("step" if n == 1 else "steps")


def test_what_the_command_says_of_weights(metamom, trained, tmp_path):
    assert "name the file w.safetensors; got 'w.pt'" in the_error(metamom("export", trained, tmp_path / "w.pt"))
    assert metamom("export", trained, tmp_path / "w.safetensors").code == 0
    init = ["train", "sinusoid", "--init", tmp_path / "w.safetensors", "--run-dir", tmp_path / "run"]
    assert "has no tail to skip" in the_error(metamom(*init, "--init-except", "tail"))
    state = load_file(tmp_path / "w.safetensors")
    first = next(iter(state))
    save_file({**state, first: torch.full_like(state[first], math.nan)}, tmp_path / "nan.safetensors")
    said = the_error(metamom(*init, "--init", tmp_path / "nan.safetensors"))
    assert f"nan.safetensors are not finite: {first} ({state[first].numel()} values of {state[first].numel()})" in said
    save_file({**state, first: torch.zeros(3)}, tmp_path / "odd.safetensors")
    said = the_error(metamom(*init, "--init", tmp_path / "odd.safetensors"))
    assert f"odd.safetensors do not fit the model. In the file, of other shapes: {first} [3] for" in said
    assert "such as the head: --init-except head." in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--down-bias", "ef21:topk:1%"], "--down-bias is an operator without error feedback"),
        (["--local-lr", "0.1"], "--local-lr is the step size of local steps"),
        (["--worker-weights", "1,2", "--workers", "3"], "--worker-weights are 3 positive, finite numbers"),
        (["--optimizer", "adam", "--beta-schedule", "power:0.5"], "--beta-schedule belongs to the optimizer momentum"),
    ],
)
def test_names_of_several_words_are_flags_before_any_verb(words, said, metamom, tmp_path):
    assert said in metamom("train", "sinusoid", *words, "--run-dir", tmp_path / "run").err
