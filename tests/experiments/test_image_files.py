"""The measurements of image files, on few of them."""

from __future__ import annotations

import json

import pytest
from image_files import write_splits

from metamom.experiments import images


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(images, "PER_CLASS", 4)
    monkeypatch.setattr(images, "BATCH", 4)
    monkeypatch.setattr(images, "SECONDS", 0.01)


def test_files_as_pytorch_reads_them(few, tmp_path):
    images.write_files(tmp_path, 20, 12)
    assert len(list(tmp_path.glob("train/*/*.jpg"))) == 20
    dataset = images._Files(tmp_path, 8)
    assert len(dataset) == 20
    x, label = dataset[19]
    assert x.shape == (3, 8, 8)
    assert label == 4
    assert images.loading(str(tmp_path), 0, 8)[0] > 0


def test_measurements(monkeypatch, tmp_path):
    monkeypatch.setenv("METAMOM_CACHE", "restored at the end")
    monkeypatch.setattr(images, "SECONDS", 0.01)
    root = write_splits(tmp_path / "images", images=16, train=5)
    seconds, _, before, peak, _, _ = images.building(str(root), str(tmp_path / "cache"), 8)
    assert seconds > 0
    assert 0 < before <= peak
    opened, rate, *_ = images.sampling(str(root), str(tmp_path / "cache"), 8)
    assert opened > 0
    assert rate > 0


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(images, "measure", lambda *given: images.Measured({"decoding, s": float(sum(given))}))
    images.main(["--images", "3000"])
    assert capsys.readouterr().out.split() == ["decoding,", "s", "3,168.0"]
    images.main(["--images", "3000", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"decoding, s": 3168.0}
    assert found["images"] == 3000
    with pytest.raises(SystemExit):
        images.main(["--images", "10"])
    assert "--images must be >= 3000" in capsys.readouterr().err
