"""From image files to inputs: as a sampler has them, and as a card lets anyone make them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import pixels, write_splits
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

import metamom
from metamom import MAML, CompositeMomentum, train
from metamom.tasks import ImageFolder, from_dataset
from metamom.tasks.locate import DataError, DataNotFoundError
from metamom.tasks.normalize import Constants, normalised
from metamom.tasks.preprocessing import Preprocessing

SIDE = 8
SOME = Constants((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def by_hand(file: Path, card: dict) -> Tensor:
    """What the card says, with Pillow and PyTorch alone."""
    size = card["image_size"]
    with Image.open(file) as image:
        image.draft(None, (2 * size, 2 * size))
        image = ImageOps.exif_transpose(image.convert("RGB" if card["channels"] == 3 else "L"))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    x = torch.from_numpy(np.array(image)).view(size, size, -1).permute(2, 0, 1) / 255
    if card["mean"] is None:
        return x
    mean, std = (torch.tensor(card[name])[:, None, None] for name in ("mean", "std"))
    return (x - mean) / std


@pytest.fixture
def odd_files(tmp_path) -> list[Path]:
    """Files of several kinds: turned by EXIF, large, with alpha, grey."""
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth = Image.fromarray(pixels(1)).resize((300, 200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", exif=turned, quality=95)
    Image.fromarray(pixels(2, 20, 30)).save(tmp_path / "b.png", exif=turned)
    Image.fromarray(pixels(3, 16, 9, 4)).save(tmp_path / "c.png")
    Image.fromarray(pixels(4)[:, :, 0]).save(tmp_path / "d.bmp")
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("constants", [None, SOME])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_card_says_enough(channels, constants, odd_files):
    if constants is not None and channels == 1:
        constants = Constants((0.4,), (0.2,))
    preprocessing = Preprocessing(SIDE, channels, constants)
    card = json.loads(json.dumps(preprocessing.as_json()))
    assert card["value_range"] == [0, 1]
    assert any("mean" in step for step in card["steps"]) == (constants is not None)
    assert f"image.convert({'RGB' if channels == 3 else 'L'!r}), which drops alpha" in card["steps"]
    found = preprocessing.read(odd_files)
    assert found.shape == (4, channels, SIDE, SIDE)
    level = 1 / 255 / (1 if constants is None else min(constants.std))  # one step of 8 bits
    for x, file in zip(found, odd_files, strict=True):
        torch.testing.assert_close(x, by_hand(file, card), atol=1.01 * level, rtol=0)


def test_files_and_folders(tmp_path, odd_files):
    preprocessing = Preprocessing(SIDE, 3, None)
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "more" / ".hidden.png").touch()
    (tmp_path / "more" / "notes.txt").touch()
    Image.fromarray(pixels(9)).save(tmp_path / "more" / "deep" / "x.png")
    whole = preprocessing.read(tmp_path)
    assert len(whole) == 5
    assert torch.equal(whole, preprocessing.read([*odd_files, str(tmp_path / "more")]))
    assert torch.equal(whole[:1], preprocessing.read(str(odd_files[0])))
    with pytest.raises(DataNotFoundError, match=r"no file or folder .*none\.png"):
        preprocessing.read(tmp_path / "none.png")
    with pytest.raises(DataError, match="wanted image files or folders; got an empty list"):
        preprocessing.read([])
    with pytest.raises(TypeError, match="wanted a file, a folder, or a list of them; got 3"):
        preprocessing.read(3)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare has no images"):
        preprocessing.read(tmp_path / "bare")
    (tmp_path / "bare" / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png is empty \(0 bytes\)\. Repair it, or leave it out"):
        preprocessing.read(tmp_path / "bare")


def test_normalisation_in_place():
    x = torch.rand(2, 5, 3, 4, 4)
    expected = normalised(x, SOME)
    again = x.clone()
    assert normalised(again, SOME, in_place=True) is again
    assert torch.equal(again, expected)
    data = [(x[0, i], i) for i in range(5)]  # floating point: the data set's own tensors
    before = x[0].clone()
    tasks = from_dataset([*data, *data], ways=5, normalize=SOME)
    assert float(tasks.sample(0, 4).query_x.sum()) != 0
    assert torch.equal(x[0], before)


@pytest.mark.parametrize("normalize", [None, "dataset"])
def test_images_of_a_run_from_python(normalize, tmp_path):
    """`LoadedRun.images` gives what the sampler drew, element for element; the card has what it takes."""
    root = write_splits(tmp_path / "data", train=3)
    tasks = ImageFolder(root, ways=3, shots=1, queries=3, image_size=SIDE, normalize=normalize)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    learner = MAML(model, F.cross_entropy)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, tasks, iterations=1, meta_batch=1, run_dir=tmp_path / "run")
    run = metamom.load(tmp_path / "run", model=model)
    batch = tasks.sample(0, 1)
    drawn = torch.cat([batch.support_x[0], batch.query_x[0]])
    read = run.images(root)
    assert read.shape == drawn.shape == (12, 3, SIDE, SIDE)
    assert {tuple(x.flatten().tolist()) for x in read} == {tuple(x.flatten().tolist()) for x in drawn}
    card = json.loads(run.save_weights(tmp_path / "w.safetensors").with_suffix(".json").read_text())["preprocessing"]
    level = 1.01 / 255 / min(card["std"] or [1])
    for x, file in zip(read, sorted(root.rglob("*.png")), strict=True):
        torch.testing.assert_close(x, by_hand(file, card), atol=level, rtol=0)


def test_runs_on_other_tasks_have_no_images(tmp_path):
    learner = MAML(metamom.nets.SinusoidMLP(), F.mse_loss)
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    train(learner, optimizer, metamom.tasks.Sinusoid(), iterations=1, meta_batch=1, run_dir=tmp_path / "run")
    run = metamom.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"runs on image files .*the run in .* was trained on other tasks"):
        run.images(tmp_path)
    assert "preprocessing" not in run.card()
