"""Damaged checkpoints are noticed, and a run resumes from the newest sound one."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from endings import assert_same, assert_same_ending, contents
from training_runs import go, momentum

from metamom.training.checkpoints import CheckpointError, Checkpoints, load

pytestmark = pytest.mark.usefixtures("global_state")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_resume_behind_a_checkpoint_cut_short(kept, started, uninterrupted, tmp_path):
    run = tmp_path / "another-format"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data))])
    with pytest.warns(UserWarning, match=r"step-00000008\.pt is cut short or damaged .* Going back to the one before"):
        result = go(momentum(), run, resume=True)
    assert result.resumed_from == 4
    assert_same_ending(run, uninterrupted("from zero"))


def test_resume_behind_a_checkpoint_with_a_flipped_bit(started, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    data = bytearray(checkpoint.read_bytes())
    weight = load(checkpoint)["learner"]["model.0.weight"].numpy().tobytes()
    data[data.index(weight) + 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.warns(UserWarning, match="wrong checksum"):
        assert go(momentum(), run, resume=True).resumed_from == 4
    assert_same_ending(run, uninterrupted("from zero"))


def test_no_damage_goes_unnoticed(started, tmp_path):
    """A cut is always seen; a flipped bit is either seen or in a place that carries nothing."""
    data = (started / "checkpoints" / "step-00000004.pt").read_bytes()
    whole = load(started / "checkpoints" / "step-00000004.pt")
    damaged = tmp_path / "damaged.pt"
    for kept in range(0, len(data), 173):
        damaged.write_bytes(data[:kept])
        with pytest.raises(CheckpointError, match=r"damaged\.pt is cut short or damaged"):
            load(damaged)
    seen = 0
    draw = random.Random(0)
    for place in draw.sample(range(len(data)), 300):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        try:
            state = load(damaged)
        except CheckpointError:
            seen += 1
        else:
            assert_same(state, whole)
    assert seen > 100


def test_all_checkpoints_damaged(started, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    before = contents(run)
    with (
        pytest.warns(UserWarning, match="Going back"),
        pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints can be used: .*start a new run"),
    ):
        go(momentum(), run, resume=True)
    assert contents(run) == before


def test_checkpoint_of_another_format(started, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(started, run)
    checkpoint = run / "checkpoints" / "step-00000008.pt"
    torch.save({**load(checkpoint), "format": 99}, checkpoint)
    before = contents(run)
    with pytest.raises(CheckpointError, match=r"step-00000008\.pt has format 99; this version of metamom reads format"):
        go(momentum(), run, resume=True)
    assert contents(run) == before  # config.json, which names the version that wrote it, among them
    torch.save([1, 2], checkpoint)
    with pytest.raises(CheckpointError, match="has format None"):
        load(checkpoint)


def test_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*none\.pt"):
        load(tmp_path / "none.pt")


def test_damaged_later_checkpoints_do_not_displace_the_good_one(tmp_path):
    for keep, step in ((3, 4), (3, 8), (3, 12), (1, 5)):
        Checkpoints(tmp_path, keep).save(step, {})
    assert Checkpoints(tmp_path).steps() == [5, 8, 12]
