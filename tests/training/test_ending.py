"""How a run ended is in its directory, for whoever reads it later."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from endings import assert_same_ending
from training_runs import AtStep, CrashError, crash, go, momentum

from metamom.common.diverged import DivergedError
from metamom.training import Callback
from metamom.training.directory import read_config
from metamom.training.ending import how_ended
from metamom.training.interrupts import TrainingInterrupted

pytestmark = pytest.mark.usefixtures("global_state")


class StopAt(Callback):
    """Stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step(self, state):
        if state.step == self.steps:
            state.stop("enough")


def test_finished(tmp_path):
    go(momentum(), tmp_path / "run")
    ended = how_ended(tmp_path / "run")
    assert (ended.kind, ended.step, ended.reason) == ("finished", 12, None)


def test_stopped_by_a_callback(tmp_path):
    go(momentum(), tmp_path / "run", callbacks=StopAt(5))
    assert how_ended(tmp_path / "run")[:3] == ("stopped", 5, "enough")


def test_diverged(tmp_path):
    with pytest.raises(DivergedError, match="at step") as raised:
        go(momentum(lr=1e30), tmp_path / "run")
    ended = how_ended(tmp_path / "run")
    assert ended[:3] == ("diverged", raised.value.step, str(raised.value))


def test_interrupted_and_resumed(tmp_path, uninterrupted):
    def interrupt(batch):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        go(momentum(), tmp_path / "run", tasks=AtStep(6, interrupt))
    ended = how_ended(tmp_path / "run")
    assert ended[:2] == ("interrupted", 7)
    assert "stopped after step 7 of 12" in ended.reason
    go(momentum(), tmp_path / "run", resume=True)
    assert how_ended(tmp_path / "run")[:2] == ("finished", 12)
    assert [start["ended"]["kind"] for start in read_config(tmp_path / "run")["history"]] == ["interrupted", "finished"]
    assert_same_ending(tmp_path / "run", uninterrupted("from zero"))


def test_failed(tmp_path):
    with pytest.raises(CrashError):
        go(momentum(), tmp_path / "run", tasks=AtStep(6, crash))
    assert how_ended(tmp_path / "run")[:2] == ("failed", 6)


def test_unknown_while_under_way_and_in_records_of_earlier_versions(tmp_path):
    seen = []
    go(momentum(), tmp_path / "run", tasks=AtStep(3, lambda batch: seen.append(how_ended(tmp_path / "run"))))
    assert seen == [None]
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    for history in ([], [{"began": "2026-01-01T00:00:00Z"}], [{"ended": {"kind": "of another version", "step": 1}}]):
        file.write_text(json.dumps({**config, "history": history}))
        assert how_ended(tmp_path / "run") is None


def test_a_record_that_cannot_be_written_does_not_lose_the_run(tmp_path):
    def in_the_way(batch):
        (tmp_path / "run" / "config.json").unlink()
        (tmp_path / "run" / "config.json").mkdir()

    with pytest.warns(UserWarning, match="could not record in .*run how the run ended: "):
        result = go(momentum(), tmp_path / "run", tasks=AtStep(9, in_the_way))
    assert result.metrics[-1]["step"] == 11
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in result.metrics)
