"""A learner prepared by Accelerate makes the steps that `metamom.train` makes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from forked import run_forked
from installed import need
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, train
from metamom.interop.imports import import_torchvision
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

need("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = Sinusoid(shots=5, queries=5, seed=1)


def learner() -> MAML:
    return MAML(SinusoidMLP((8, 8), generator=torch.Generator().manual_seed(0)), F.mse_loss)


def accelerated(accumulated: int) -> MAML:
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()  # which it imports too
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    made = learner()
    wrapped, optimizer = accelerator.prepare(made, CompositeMomentum(made.parameters(), lr=0.02, beta=0.3))
    for step in range(12):
        batch = TASKS.sample(step, 8, rank=accelerator.process_index, world_size=accelerator.num_processes)
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(batch.to(accelerator.device)))
            optimizer.step()
            optimizer.zero_grad()
    return made


def by_hand(accumulated: int) -> MAML:
    made = learner()
    optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3)
    for step in range(0, 12, accumulated):
        optimizer.zero_grad()
        for k in range(step, step + accumulated):
            made.backward(TASKS.sample(k, 8))
        for p in made.parameters():
            p.grad /= accumulated
        optimizer.step()
    return made


def test_steps_are_those_of_train():
    ours, theirs = accelerated(1), learner()
    train(theirs, CompositeMomentum(theirs.parameters(), lr=0.02, beta=0.3), TASKS, iterations=12, meta_batch=8)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_is_logged_and_a_saved_state(tmp_path):
    """The losses of each step reach a tracker, and a state saved halfway, with a schedule, goes on alike."""
    if importlib.util.find_spec("torchvision") is not None:
        import_torchvision()
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self) -> None:
            super().__init__()
            self.config: dict[str, float] = {}
            self.losses: list[float] = []

        tracker = property(lambda self: self)

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **options):
            assert step == len(self.losses)
            self.losses.append(values["loss"])

    def run(saved: int | None = None) -> tuple[MAML, Kept]:
        tracker = Kept()
        accelerator, made = Accelerator(cpu=True, log_with=tracker), learner()
        accelerator.init_trackers("sinusoids", {"lr": 0.02})
        optimizer = CompositeMomentum(made.parameters(), lr=0.02, beta=0.3, first_step="gradient")
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=8)
        wrapped, optimizer, schedule = accelerator.prepare(made, optimizer, schedule)
        if saved is not None:
            accelerator.load_state(tmp_path)
            tracker.losses += [0.0] * saved
        for step in range(saved or 0, 8):
            if step == 4 and saved is None:
                accelerator.save_state(tmp_path)
            loss = wrapped(TASKS.sample(step, 8))
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss.item()}, step=step)
        accelerator.end_training()
        return made, tracker

    (whole, logged), (rest, again) = run(), run(4)
    assert logged.config == {"lr": 0.02}
    assert logged.losses[4:] == again.losses[4:]
    assert logged.losses[0] == pytest.approx(float(learner().losses(TASKS.sample(0, 8)).mean()), rel=1e-6)
    for p, q in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(p, q)


def on_two_processes() -> None:
    for p, q in zip(accelerated(2).parameters(), by_hand(2).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_accumulated_on_two_processes(tmp_path):
    for status, said in run_forked(on_two_processes, 2, tmp_path):
        assert status == 0, said
