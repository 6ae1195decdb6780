"""Lightning's trainer makes the steps that `metamom.train` makes."""

from __future__ import annotations

import logging

import pytest
import torch
from forked import run_forked
from installed import need
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, evaluate, train
from metamom.nets.models import SinusoidMLP
from metamom.tasks import Sinusoid

need("lightning")
# packages that it imports use what others have deprecated
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = Sinusoid(shots=5, queries=5, seed=1)


def learner() -> MAML:
    return MAML(SinusoidMLP((8, 8), generator=torch.Generator().manual_seed(0)), F.mse_loss)


def momentum(parameters) -> CompositeMomentum:
    return CompositeMomentum(parameters, lr=0.02, beta=0.3)


def fitted(folder, steps: int, ckpt_path=None, bias=None, epoch: int = 5, **options):
    from metamom.interop.lightning import MetaModule, lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    made = learner()
    module = MetaModule(made, TASKS, momentum, meta_batch=8, epoch=epoch, bias=bias, **options.pop("module", {}))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return made, trainer


def by_train(steps: int, bias=None) -> MAML:
    made = learner()
    train(made, momentum(made.parameters()), TASKS, iterations=steps, meta_batch=8, bias=bias)
    return made


def assert_same_weights(ours: MAML, theirs: MAML, **tolerance) -> None:
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("bias", [None, "ef21:topk:20%"])
def test_steps_and_resumed_steps_are_those_of_train(bias, tmp_path):
    whole = by_train(12, bias)
    assert_same_weights(fitted(tmp_path, 12, bias=bias)[0], whole)
    _, trainer = fitted(tmp_path, 7, bias=bias)  # in the middle of an epoch
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert_same_weights(fitted(tmp_path, 12, tmp_path / "saved.ckpt", bias=bias)[0], whole)


def test_validation_is_that_of_evaluate(tmp_path):
    module = {"validation": TASKS, "validation_tasks": 40, "validation_block": 20}
    made, trainer = fitted(tmp_path, 10, module=module)
    found = evaluate(made, TASKS, tasks=40, steps=(1,), stream="validation")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["val_loss"] == pytest.approx(found.mean[-1], rel=1e-6)
    assert logged["val_loss_halfwidth"] == pytest.approx(found.halfwidth[-1], rel=1e-6)
    assert set(logged) == {"train_loss", "val_loss", "val_loss_halfwidth"}


def test_accumulated_steps(tmp_path):
    made, _ = fitted(tmp_path, 3, epoch=4, accumulate_grad_batches=2)
    other = learner()
    optimizer = momentum(other.parameters())
    for step in range(3):
        optimizer.zero_grad()
        for k in (2 * step, 2 * step + 1):
            other.backward(TASKS.sample(k, 8))
        for p in other.parameters():
            p.grad /= 2
        optimizer.step()
    assert_same_weights(made, other, rtol=1e-6, atol=1e-7)


def on_two_processes(folder) -> None:
    made, _ = fitted(folder, 6, devices=2, strategy="ddp", module={"validation": TASKS, "validation_tasks": 20})
    assert_same_weights(made, by_train(6), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"bias=topk:5% acts within one process, and there are 2\. .*ddp\.register"):
        fitted(folder, 1, devices=2, strategy="ddp", bias="topk:5%")


def test_ddp_strategy(tmp_path):
    for status, said in run_forked(on_two_processes, 2, tmp_path, tmp_path):
        assert status == 0, said


def test_wrong_arguments():
    from metamom.interop.lightning import MetaModule

    with pytest.raises(TypeError, match="MetaModule needs a learner"):
        MetaModule(SinusoidMLP(), TASKS, momentum)
    with pytest.raises(TypeError, match="a function that makes the optimizer"):
        MetaModule(made := learner(), TASKS, momentum(made.parameters()))
    with pytest.raises(TypeError, match="validation needs a sampler, which"):
        MetaModule(learner(), TASKS, momentum, validation=[1])
