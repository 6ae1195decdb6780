"""Image files in folders, from ``metamom train images`` to their use, by the command and in another process."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from command import SMALL_IMAGES as SMALL
from command import the_error
from forked import in_folder, run_forked
from image_files import write_class, write_splits
from safetensors.torch import load_file

from metamom import cli
from metamom import load as metamom_load
from metamom.experiments.saved import load_run
from metamom.interop.imports import import_torchvision
from metamom.nets import Conv4
from metamom.tasks import ImageFolder
from metamom.training.directory import read_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos) -> Path:
    """A short run of the default network on small images."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", "images", "--root", str(photos), *SMALL, "--run-dir", str(folder)]) == 0
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_a_run_keeps_what_its_images_are_normalised_by(run, photos):
    settings = read_config(run)["settings"]
    tasks = ImageFolder(photos, image_size=28, normalize="dataset")
    assert tasks.constants is not None
    assert settings["constants"] == [list(tasks.constants.mean), list(tasks.constants.std)]
    assert settings["root"] == str(photos)
    pixels = torch.cat([tasks.sample(step, 8).support_x.flatten(0, 1) for step in range(20)])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=0.1, rtol=0)


def test_images_of_a_run_are_those_of_training(run, photos):
    loaded = metamom_load(run)
    tasks = ImageFolder(photos, split="test", ways=5, image_size=28, normalize=loaded.settings["constants"])
    files = sorted((photos / "test" / tasks.classes[0]).iterdir())
    assert torch.equal(loaded.images(photos / "test" / tasks.classes[0]), loaded.images(files))
    drawn = {tuple(x.flatten().tolist()) for x in tasks.sample(0, 200).support_x.flatten(0, 1)}
    assert {tuple(x.flatten().tolist()) for x in loaded.images(photos / "test")} == drawn
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*none\.jpg"):
        loaded.images([files[0], photos / "none.jpg"])


def test_evaluation_on_classes_that_were_not_seen(run, photos, metamom, tmp_path):
    before = snapshot(photos)
    said = metamom("evaluate", run, "--tasks", "6", "--steps", "0,1", "--json")
    assert said.code == 0, said
    answer = json.loads(said.out)
    assert answer["tasks"] == 6
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    again = metamom("evaluate", run, "--tasks", "6", "--steps", "0,1", "--json", "--data-root", moved)
    assert json.loads(again.out) == answer, "the same images in another place"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert "shares classes with it" in metamom("evaluate", run, "--tasks", "4", "--split", "train").err
    assert snapshot(photos) == before, "the folder of images is never changed"


def test_a_run_goes_on_and_is_repeated(photos, metamom, tmp_path):
    arguments = ["train", "images", "--root", photos, *SMALL]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert metamom(*arguments, "--run-dir", whole).code == 0
    assert metamom(*arguments, "--iterations", "2", "--run-dir", parts).code == 0
    assert metamom(*arguments, "--run-dir", parts, "--resume").code == 0
    repeated = metamom("train", "images", "--config", whole / "config.json", "--run-dir", tmp_path / "repeated")
    assert repeated.code == 0, repeated
    weights = [load_run(each, "newest").learner.state_dict() for each in (whole, parts, tmp_path / "repeated")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    refused = metamom(*arguments, "--image-size", "32", "--run-dir", parts, "--resume")
    assert "image_size is 28 there and 32 here" in the_error(refused)


def test_images_are_adapted_to_and_classified(run, photos, metamom, tmp_path):
    support, inbox = tmp_path / "support", tmp_path / "inbox"
    classes = sorted(path.name for path in (photos / "test").iterdir())[:3]
    for name in classes:
        (support / name).mkdir(parents=True)
        (inbox / name).mkdir(parents=True)
        for i in range(5):
            shutil.copy(photos / "test" / name / f"{i:02}.jpg", support / name)
        shutil.copy(photos / "test" / name / "10.jpg", inbox / name)
    (inbox / ".hidden.jpg").write_bytes(b"")
    out = tmp_path / "predictions.csv"
    arguments = ["adapt", run, "--support", support, "--predict", inbox, "--steps", "5"]
    said = metamom(*arguments, "--out", out)
    assert said.code == 0, said
    assert "adapted to 3 classes, 15 images, in 5 step(s)" in said.out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]) for row in rows] == [inbox / name / "10.jpg" for name in classes]
    assert {row["class"] for row in rows} <= set(classes)
    answer = json.loads(metamom(*arguments, "--json").out)
    assert answer["classes"] == classes
    assert [each["class"] for each in answer["predictions"]] == [row["class"] for row in rows]
    for each, row in zip(answer["predictions"], rows, strict=True):
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert each["probability"] == pytest.approx(float(row["probability"]), abs=1e-6)
        alone = json.loads(
            metamom("adapt", run, "--support", support, "--predict", each["file"], "--steps", "5", "--json").out
        )
        assert alone["predictions"][0]["probability"] == pytest.approx(each["probability"], rel=1e-4), (
            "a prediction does not depend on the other images"
        )


def test_another_process_uses_the_run(run, photos, metamom, tmp_path, monkeypatch):
    """The command in a process of its own, and in this one from another folder."""
    support = tmp_path / "support"
    for name in sorted(path.name for path in (photos / "test").iterdir())[:2]:
        shutil.copytree(photos / "test" / name, support / name)
    words = ["adapt", str(run), "--support", str(support), "--predict", str(photos / "validation"), "--json"]
    ((status, said),) = run_forked(in_folder, 1, tmp_path / "said", tmp_path, *words)
    assert status == 0, said
    monkeypatch.chdir(photos)
    assert json.loads(metamom(*words).out) == json.loads(said)
    assert len(json.loads(said)["predictions"]) == 8 * 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--support", "nowhere", "--predict", "{photos}"], "--support must be a folder"),
        (["--support", "{photos}/test", "--predict", "{photos}"], "tells 5 classes apart"),
        (["--support", "{photos}/test"], "nothing to do"),
        (["--support", "{photos}/test", "--predict", "a.jpg", "--out", "a.jpg"], "--out writes a CSV file"),
        (["--support", "{photos}", "--predict", "nowhere.jpg"], "no file or folder nowhere.jpg"),
        (["--support", "{photos}", "--predict", "{photos}"], "has folders of images: "),
        (["--support", "{empty}", "--predict", "{photos}"], "two classes or more"),
        (["--support", "{empty}/one", "--predict", "{photos}"], "it has 1 folder of classes."),
    ],
)
def test_what_adapt_refuses(arguments, message, run, photos, metamom, tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "one" / "dog").mkdir(parents=True)
    shutil.copy(next((photos / "test").glob("*/*.jpg")), tmp_path / "empty" / "one" / "dog")
    given = [each.format(photos=photos, empty=tmp_path / "empty") for each in arguments]
    assert message in the_error(metamom("adapt", run, *given))


def test_adapt_takes_runs_on_images(trained, photos, metamom):
    said = metamom("adapt", trained, "--support", photos / "test", "--predict", photos)
    assert "adapt takes runs on image files" in the_error(said)


def test_images_need_a_folder(metamom, tmp_path):
    assert "--root DIR" in the_error(metamom("train", "images", "--run-dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-size", "100000"], r"at most 1,024 pixels a side; got 100000: one image .* 114,441 MiB"),
        (["--image-size", "0"], "must be >= 1; got 0"),
        (["--channels", "2"], r"channels must be 3 \(RGB\) or 1 \(grey\); got 2"),
        (["--augment", "crop,crop"], "augment has 'crop' 2 times"),
        (["--augment", "crop,flipp"], "got 'flipp'; did you mean flip"),
        (["--ways", "1"], "ways must be >= 2"),
        (["--ways", "25"], "different classes; the data has 24"),
        (["--shots", "0"], "shots must be >= 1"),
        (["--queries", "0"], "queries must be >= 1"),
    ],
)
def test_flags_that_are_refused_before_anything_is_made(flags, message, photos, metamom, tmp_path):
    said = metamom("train", "images", "--root", photos, *flags, "--run-dir", tmp_path / "run")
    assert re.search(message, the_error(said))
    assert not (tmp_path / "run").exists()


def test_images_that_have_changed(metamom, tmp_path, monkeypatch):
    """A run does not go on with other images; it is evaluated on them if their folder is named."""
    monkeypatch.chdir(tmp_path)
    root = write_splits(Path("photos"), train=3, validation=3, test=3)
    shutil.copytree(root, "before")
    small = ["--ways", "2", "--meta-batch", "2", "--queries", "2", "--image-size", "16", "--evaluate-tasks", "4"]
    for standardize in ("none", "data"):
        arguments = ["train", "images", "--root", root, *small, "--standardize", standardize]
        run = ["--run-dir", f"run-{standardize}"]
        assert metamom(*arguments, *run, "--iterations", "1").code == 0
        assert set(read_config(run[1])["settings"]["data_sha256"]) == {"train", "validation"}
        (root / "train" / "class00" / "0.png").write_bytes((root / "train" / "class01" / "0.png").read_bytes())
        before = snapshot(Path(run[1]))
        said = the_error(metamom(*arguments, *run, "--iterations", "2", "--resume"))
        assert f"the data of the run in {run[1]} have changed since it began (data_sha256.train): a resumed run" in said
        assert "constants" not in said
        assert {name: found for name, found in snapshot(Path(run[1])).items() if name in before} == before
        said = the_error(metamom(*arguments, *run, "--iterations", "2", "--resume", "--image-size", "17"))
        assert "image_size is 16 there and 17 here" in said
        evaluated = ["evaluate", run[1], "--tasks", "4", "--steps", "1"]
        assert metamom(*evaluated).code == 0, "the test images are the same"
        assert metamom(*evaluated, "--split", "validation").code == 0, "and those of validation"
        shutil.rmtree(root)
        shutil.copytree("before", root)
        assert metamom(*arguments, *run, "--iterations", "2", "--resume").code == 0
    (root / "validation" / "class03" / "0.png").unlink()
    few = ["--tasks", "4", "--steps", "1", "--split", "validation", "--queries", "1"]
    said = the_error(metamom("evaluate", "run-none", *few))
    assert "the images of the split 'validation' in" in said
    assert said.rstrip().endswith("on purpose, name their folder with --data-root.")
    assert "the images of the split 'validation' in" in the_error(metamom("compare", "run-none", "run-none/.", *few))
    for folder in ("before", root):
        assert metamom("evaluate", "run-none", *few, "--data-root", folder).code == 0


def test_an_evaluation_says_which_images_it_drew_from(metamom, tmp_path, monkeypatch):
    """Test images are not kept with a run: classes that were added, and files that were skipped, are seen here."""
    monkeypatch.chdir(tmp_path)
    root = write_splits(Path("photos"), train=3, validation=3, test=3)
    small = ["--ways", "2", "--meta-batch", "2", "--queries", "1", "--image-size", "16", "--evaluate-tasks", "4"]
    assert metamom("train", "images", "--root", root, *small, "--iterations", "1", "--run-dir", "run").code == 0
    evaluated = ["evaluate", "run", "--tasks", "4", "--steps", "1"]
    assert "; 12 images of 3 classes\n" in metamom(*evaluated).out
    found = json.loads(metamom(*evaluated, "--json").out)["data_sha256"]
    assert found == ImageFolder(root, split="test", ways=2, image_size=20).data_sha256
    write_class(root / "test" / "new", 9)
    (root / "test" / "new" / "0.png").write_bytes(b"broken")
    assert "leave broken files out: --on-broken skip" in the_error(metamom(*evaluated))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        said = metamom(*evaluated, "--on-broken", "skip")
    assert "skipped 1 of 16 images" in said.err
    assert "; 15 images of 4 classes\n" in said.out


def test_lists_of_splits_are_found_from_another_folder(metamom, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = write_splits(Path("photos"), train=9) / "train"
    Path("lists").mkdir()
    for i, split in enumerate(("train", "validation", "test")):
        Path(f"lists/{split}.txt").write_text("".join(f"class{3 * i + j:02}\n" for j in range(3)))
    arguments = ["train", "images", "--root", tree, "--ways", "2", "--meta-batch", "2", "--queries", "1"]
    arguments += ["--image-size", "16", "--evaluate-tasks", "4", "--run-dir", tmp_path / "run"]
    assert metamom(*arguments, "--splits", "lists", "--iterations", "1").code == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    evaluated = ["evaluate", tmp_path / "run", "--tasks", "4", "--steps", "1", "--json"]
    before = metamom(*evaluated)
    assert before.code == 0, before
    monkeypatch.chdir(tmp_path)
    shutil.move("lists", "moved")
    assert "--splits must be a folder" in the_error(metamom(*evaluated))
    assert metamom(*evaluated, "--splits", "moved").out == before.out
    assert metamom(*arguments, "--splits", "moved", "--iterations", "2", "--resume").code == 0, "the same images"


def test_nothing_is_written_among_the_images_or_over_files_of_others(photos, run, metamom, tmp_path, monkeypatch):
    before = snapshot(photos)
    said = metamom("train", "images", "--root", photos, *SMALL, "--run-dir", photos / "run")
    assert "would be written into the folder of images" in the_error(said)
    monkeypatch.chdir(photos)
    assert "name another folder with --run-dir" in the_error(metamom("train", "images", "--root", ".", *SMALL))
    assert snapshot(photos) == before
    (tmp_path / "weights.json").write_text("mine")
    assert "would be overwritten" in the_error(metamom("export", run, tmp_path / "weights.safetensors"))
    assert (tmp_path / "weights.json").read_text() == "mine"
    for _ in range(2):  # its own files are replaced
        assert metamom("export", run, tmp_path / "others.safetensors").code == 0


@pytest.mark.parametrize("command", ["compare", "bias"])
def test_the_other_commands_take_images(command, photos, metamom, tmp_path):
    arguments = ["images", "--root", photos, "--image-size", "16", "--queries", "2"]
    if command == "compare":
        arguments += ["--iterations", "2", "--meta-batch", "2", "--seeds", "1", "--lrs", "0.03"]
        arguments += ["--evaluate-tasks", "4", "--tasks", "4", "--steps", "0,1", "--run-dir", tmp_path / "compared"]
    else:
        arguments += ["--inner-batch", "1,2", "--ways", "3", "--tasks", "3", "--out", tmp_path / "bias"]
    said = metamom(command, *arguments)
    assert said.code == 0, said
    assert "report: " in said.out


BACKBONE = '''
import torch

from metamom.interop.imports import import_torchvision


def resnet(num_classes):
    """A ResNet-18 whose head alone learns, over features of other data."""
    model = import_torchvision().models.resnet18(weights=None)
    model.load_state_dict(torch.load("resnet18.pt", weights_only=True))
    model.requires_grad_(False)
    model.fc = torch.nn.Linear(512, num_classes)
    return model.eval()
'''

USE = """
import json, sys
from pathlib import Path

import torch
from metamom import load_weights
from metamom.tasks.decode import decode
from my_backbone import resnet

model = load_weights(resnet(5), "adapted.safetensors").eval()
mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
found = []
for file in sys.argv[1:]:
    image = torch.from_numpy(decode(Path(file), 96, 3).pixels) / 255
    scores = model(((image - mean) / std)[None])[0]
    found.append(torch.softmax(scores[:3].double(), 0).tolist())
print(json.dumps(found))
"""


def test_a_frozen_backbone_from_training_to_its_use_elsewhere(photos, metamom, tmp_path, monkeypatch):
    """ANIL on a pretrained ResNet-18, whose weights are random here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pretrained = import_torchvision().models.resnet18(weights=None).state_dict()
    torch.save(pretrained, "resnet18.pt")
    Path("my_backbone.py").write_text(BACKBONE)
    arguments = ["--model", "my_backbone:resnet", "--image-size", "96", "--standardize", "imagenet", "--adapt", "fc"]
    arguments += ["--iterations", "1", "--meta-batch", "1", "--queries", "1", "--evaluate-tasks", "2"]
    said = metamom("train", "images", "--root", photos, *arguments, "--run-dir", "run")
    assert said.code == 0, said
    model = load_run("run").learner.model
    assert all(torch.equal(model.state_dict()[name], w) for name, w in pretrained.items() if not name.startswith("fc."))
    for name in sorted(path.name for path in (photos / "test").iterdir())[:3]:
        folder = tmp_path / "support" / name
        folder.mkdir(parents=True)
        for i in range(3):
            shutil.copy(photos / "test" / name / f"{i:02}.jpg", folder)
    files = [str(file) for file in sorted((photos / "validation").rglob("0[01].jpg"))][:4]
    answer = metamom(
        "adapt", "run", "--support", "support", "--predict", *files, "--json", "--save", "adapted.safetensors"
    )
    predictions = json.loads(answer.out)
    assert predictions["norm"] == "frozen"
    expected = [list(each["probabilities"].values()) for each in predictions["predictions"]]
    Path("use.py").write_text(USE)
    done = subprocess.run([sys.executable, "use.py", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), torch.tensor(expected), atol=1e-5, rtol=1e-4)
    card = json.loads(Path("adapted.json").read_text())
    assert card["adapted_to"]["classes"] == predictions["classes"]


def test_exported_weights_in_a_plain_network(run, photos, metamom, tmp_path):
    """The plain PyTorch network with the weights of the file predicts what the run's model does."""
    file = tmp_path / "weights.safetensors"
    said = metamom("export", run, file, "--licence", "CC-BY-4.0", "--tasks", "4")
    assert said.code == 0, said
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["licence"] == "CC-BY-4.0"
    assert card["validation"]["iterations"] == 4
    assert card["evaluation"]["tasks"] == 4
    constants = read_config(run)["settings"]["constants"]
    assert [card["preprocessing"][name] for name in ("image_size", "channels", "mean", "std")] == [28, 3, *constants]
    assert str(photos) not in json.dumps(card), "the card says what the weights are, not where the data was"
    batch = ImageFolder(photos, split="test", image_size=28, seed=3).sample(0, 1)
    model = Conv4(5, 3, 32, image_size=28, pooling="max")
    model.load_state_dict(load_file(file))
    assert torch.equal(model(batch.query_x[0]), load_run(run).learner.model(batch.query_x[0]))


def test_adapt_with_the_statistics_of_the_images_that_are_classified_together(run, photos, metamom, tmp_path):
    files = sorted((photos / "test").rglob("0[01].jpg"))[:6]
    classes = sorted({file.parent for file in files})
    assert len(classes) == 3
    support = tmp_path / "support"
    for folder in classes:
        shutil.copytree(folder, support / folder.name)
    arguments = ["adapt", run, "--support", support, "--norm", "batch", "--json"]
    together = json.loads(metamom(*arguments, "--predict", *files).out)
    alone = json.loads(metamom(*arguments, "--predict", files[0]).out)
    assert together["norm"] == "batch"
    assert together["predictions"][0]["probability"] != pytest.approx(alone["predictions"][0]["probability"], rel=1e-3)


def test_a_folder_that_has_moved_and_few_images_of_a_class(run, photos, metamom, tmp_path):
    """The error names the flag; the bias meter draws at most four queries of a class, for classes of 20 images."""
    copy, gone = tmp_path / "run", tmp_path / "gone"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["settings"].update(root=str(gone), queries=20)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = metamom("evaluate", copy, "--tasks", "4")
    assert said.code == 2
    assert f"{gone} does not exist" in said.err
    assert said.err.endswith("Name it with --data-root.\n")
    said = metamom("evaluate", run, "--tasks", "4", "--split", "tset")
    assert the_error(said).endswith(
        "has no folder 'tset' for the split; it has test, train, validation. Name one of these."
    )
    measured = metamom("bias", copy, "--data-root", photos, "--tasks", "3", "--inner-batch", "1", "--json")
    assert measured.code == 0, measured.err


@pytest.mark.filterwarnings("always:skipped 1 of")
@pytest.mark.parametrize("command", ["train", pytest.param("compare", marks=pytest.mark.slow)])
def test_how_images_are_read_need_not_be_repeated(command, metamom, tmp_path, monkeypatch):
    """A resumed run takes the options of its data and network from its directory, unless they are given."""
    monkeypatch.chdir(tmp_path)
    write_splits(Path("photos"), train=3, validation=3, test=3)
    (tmp_path / "photos" / "train" / "class00" / "empty.png").write_bytes(b"")
    small = ["--ways", "2", "--meta-batch", "2", "--queries", "2", "--evaluate-tasks", "4"]
    small += ["--seeds", "1", "--lrs", "0.1", "--betas", "0.1", "--tasks", "4"] if command == "compare" else []
    own = ["--root", "photos", "--on-broken", "skip", "--image-size", "16", "--channels", "1", "--augment", "flip"]
    own += ["--model", "conv4-64", "--standardize", "none", "--rotations", "train"]
    words = [command, "images", *small, "--run-dir", "run", "--iterations"]
    assert metamom(*words, "1", *own).code == 0
    more = "1" if command == "compare" else "2"
    assert "image_size is 16 there and 17 here" in metamom(*words, more, "--image-size", "17", "--resume").err
    assert metamom(*words, more, "--resume").code == 0
    assert read_config("run")["history"][1]["length"] == read_config("run")["length"]
    Path("photos").rename("moved")
    assert "photos" in metamom(*words, more, "--resume").err
    assert metamom(*words, more, "--resume", "--root", "moved").code == 0
