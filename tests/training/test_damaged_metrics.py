"""Metrics that are damaged, missing or out of order: reported, and what can be read is kept."""

from __future__ import annotations

import re

import pytest
from endings import assert_same, assert_same_ending, newest, without_seconds
from training_runs import go, momentum

from metamom.training.checkpoints import Checkpoints
from metamom.training.directory import read_log, read_metrics

pytestmark = pytest.mark.usefixtures("global_state")


def test_last_metrics_line_cut_short(uninterrupted, tmp_path):
    go(momentum(), tmp_path, iterations=8)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for kept in (1, 30, len(whole) // 8 - 3):
        (tmp_path / "metrics.jsonl").write_bytes(whole + whole[:kept])
        go(momentum(), tmp_path, iterations=8, resume=True)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-1])  # only the end of the line is missing
    go(momentum(), tmp_path, resume=True)
    assert_same_ending(tmp_path, uninterrupted("from zero"))


def test_a_hole_in_the_metrics_is_reported_and_what_can_be_read_is_kept(uninterrupted, tmp_path):
    go(momentum(), tmp_path, iterations=8)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\0\xff\n", lines[3], b"[" * 5000 + b"\n", *lines[5:]]))
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3 is not a JSON object with a step"):
        read_metrics(tmp_path)
    with pytest.warns(UserWarning, match="metrics") as caught:
        go(momentum(), tmp_path, resume=True)
    assert [re.sub(r".*metrics\.jsonl ", "", str(each.message)) for each in caught] == [
        "was damaged in line 3, 5: all that can be read is kept, and a copy of the damaged file is "
        "metrics.jsonl.damaged.",
        "has no metrics of step 2, 4.",
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    whole = without_seconds(read_metrics(uninterrupted("from zero")))
    assert without_seconds(read_metrics(tmp_path)) == [line for line in whole if line["step"] not in (2, 4)]
    assert_same(newest(tmp_path)["learner"], newest(uninterrupted("from zero"))["learner"])


def test_metrics_lost_at_the_end_are_reported(tmp_path):
    """Those of steps that a checkpoint is behind, so that they are not done again."""
    go(momentum(), tmp_path, iterations=8)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:3]) + lines[3][:10]
    (tmp_path / "metrics.jsonl").write_bytes(cut)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl") as caught:
        go(momentum(), tmp_path, resume=True)
    assert [re.sub(r".*metrics\.jsonl ", "", str(each.message)) for each in caught] == [
        "was cut short in line 4, and that step will not be repeated: a copy of the original file is "
        "metrics.jsonl.damaged.",
        "has no metrics of step 3 to 7.",
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == cut
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 8, 9, 10, 11]


def test_a_line_cut_short_beyond_the_end_is_kept(tmp_path):
    """The run goes back to step 4 and ends before the step that the line is of."""
    go(momentum(), tmp_path, iterations=8)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:6]) + lines[6][:10]
    (tmp_path / "metrics.jsonl").write_bytes(cut)
    Checkpoints(tmp_path / "checkpoints").path(8).unlink()
    with pytest.warns(UserWarning, match=r"was cut short in line 7, .*metrics\.jsonl\.damaged\.$"):
        go(momentum(), tmp_path, iterations=6, resume=True)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == cut
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_metrics_file_that_is_missing_or_empty_is_reported(tmp_path):
    go(momentum(), tmp_path, iterations=8)
    path = tmp_path / "metrics.jsonl"
    path.unlink()
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has no metrics of step 0 to 7\.$"):
        go(momentum(), tmp_path, iterations=10, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path)] == [8, 9]
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"metrics\.jsonl has no metrics of step 0 to 9\.$"):
        go(momentum(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([0, 1, 2, 93, 4], [0, 1, 2, 4]),
        ([0, 1, 2, 1, 4], [0, 1, 2, 4]),
        ([0, 1, 2, 2, 3], [0, 1, 2, 3]),
        ([3, 0, 1, 2], [0, 1, 2]),
        ([], []),
    ],
)
def test_metrics_out_of_order_are_damaged(steps, kept, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    log = read_log(tmp_path)
    assert [line["step"] for line in log.lines] == kept
    assert len(log.damaged) == len(steps) - len(kept)
