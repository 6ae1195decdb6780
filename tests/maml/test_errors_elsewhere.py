"""Errors of compiled learners, wrapped models, devices and other code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forked import run_forked
from mistakes import Q, Returns, S, T, V, classes, classifier, embedder, flat, regressor, values
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch, evaluate
from metamom.distributed import start
from metamom.maml.checks.misfits import inputs_explained, targets_explained

# compiled learners answer alike


@pytest.mark.parametrize("name", ["labels too large", "features", "targets without an axis", "float64", "two outputs"])
def test_a_compiled_learner_says_the_same(name, traced):
    make, batch = {
        "labels too large": (classifier, classes()._replace(query_y=classes().query_y + 4)),
        "features": (regressor, values(3)),
        "targets without an axis": (regressor, flat(V)),
        "float64": (regressor, V.to(dtype=torch.float64)),
        "two outputs": (lambda **options: MAML(Returns(lambda out: (out, out)), F.mse_loss, **options), V),
    }[name]
    said = []
    for options in ({}, {"compile": True}):
        with pytest.raises((ValueError, TypeError)) as caught:
            make(**options).backward(batch)
        # but for torch's own words, which count the tasks that run at a time
        said.append((type(caught.value), str(caught.value).partition(": Expected size")[0]))
    assert said[0] == said[1]


def test_a_graph_that_fails_says_what_the_eager_one_says(traced):
    """Labels that go wrong once it is compiled."""
    learner, batch = classifier(compile=True), classes()
    learner.backward(batch)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2; got 1\.\.3"):
        learner.backward(batch._replace(query_y=batch.query_y + 1))
    learner.backward(batch)
    assert len(traced) == 1
    words = V._replace(support_x=torch.zeros(T, S, 1).long(), query_x=torch.zeros(T, Q, 1).long())
    learner = embedder(compile=True)
    learner.backward(words)
    with pytest.raises(ValueError, match=r"index 12 is out of bounds.*must be in 0\.\.n-1"):
        learner.backward(words._replace(query_x=words.query_x + 12))


# models that are wrapped for several processes


def test_data_parallel_is_refused():
    for model in (nn.DataParallel(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1), nn.DataParallel(nn.Linear(1, 1)))):
        with pytest.raises(ValueError, match=r"\(DataParallel\).*\.module.*backward\(batch, world=world\)"):
            MAML(model, F.mse_loss)


def say_of_wrapped_models() -> None:
    """What MAML says of models that torch has wrapped."""
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # before torch 2.6
        from torch.distributed._composable.fsdp import fully_shard

    with start(timeout=60):
        mesh, cpu = init_device_mesh("cpu", (1,)), torch.device("cpu")
        for model in (
            nn.parallel.DistributedDataParallel(nn.Linear(1, 1)),
            nn.Sequential(nn.Linear(1, 1), nn.parallel.DistributedDataParallel(nn.Linear(1, 1))),
            FullyShardedDataParallel(nn.Linear(1, 1), device_id=cpu),
            fully_shard(nn.Linear(1, 1), mesh=mesh),
            fully_shard(nn.Sequential(nn.Linear(1, 1)), mesh=mesh)[0],  # whose parameters alone show it
            replicate(nn.Linear(1, 1)),
        ):
            try:
                MAML(model, F.mse_loss)
            except ValueError as error:
                print(error)


@pytest.mark.filterwarnings("ignore")
def test_models_wrapped_for_processes_are_refused(tmp_path):
    ((status, said),) = run_forked(say_of_wrapped_models, 1, tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("MAML needs the plain model")]
    assert status == 0, said
    found = [line.partition("found ")[2].partition(". Pass")[0] for line in lines]
    assert found == [
        "the model (DistributedDataParallel)",
        "1 (DistributedDataParallel)",
        "the model (FullyShardedDataParallel)",
        "the model (FSDPLinear), weight, bias",
        "weight, bias",
        "the model (DDPLinear)",
    ], said
    assert all("world=world" in line for line in lines)


def test_another_device_is_named():
    """A tensor without data stands for one on a GPU."""
    there = V.query_x.to("meta")
    model = nn.Sequential(nn.Linear(1, 1))
    said = r"inputs are on meta, the weights on cpu: use batch\.to\('cpu'\)"
    with pytest.raises(ValueError, match=said), inputs_explained(model, there, dict(model.named_parameters())):
        torch.ones(2) + torch.ones(3)  # an error of torch's, whichever
    said = "Targets are on meta, predictions on cpu: move the batch"
    with pytest.raises(ValueError, match=said), targets_explained(V.query_y, there):
        torch.ones(2) + torch.ones(3)  # an error of torch's, whichever


def test_an_assertion_on_a_gpu_says_what_it_may_be():
    """Which comes at any time after the label that it is about."""

    class Lost:
        def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> TaskBatch:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def lost(g: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    for call in (lambda: regressor().backward(V, bias=lost), lambda: evaluate(regressor(), Lost(), tasks=T)):
        with pytest.raises(ValueError, match=r"Labels must be in 0\.\.C-1.*Run this batch on the CPU"):
            call()


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
        ValueError("my own words"),
        RuntimeError("my own words"),
        IndexError("my own index 3 is out of bounds"),
        KeyError("name"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["model", "loss"])
def test_errors_of_other_kinds_pass_unchanged(error, place):
    def fail(*args: Any) -> Any:
        raise error

    learner = MAML(Returns(fail), F.mse_loss) if place == "model" else regressor(fail)
    with pytest.raises(type(error)) as caught:
        learner.backward(V)
    assert caught.value is error


@pytest.mark.parametrize("place", ["model", "loss"])
def test_the_index_of_a_list_passes_unchanged(place):
    def fail(*args: Any) -> Any:
        return list(args)[3]

    learner = MAML(Returns(fail), F.mse_loss) if place == "model" else regressor(fail)
    with pytest.raises(IndexError, match=r"^list index out of range$"):
        learner.backward(V)


@pytest.mark.parametrize("vectorize", ["auto", "loop"])
def test_an_assertion_of_a_loss_by_torch_passes_unchanged(vectorize):
    """torch._assert raises what the loss says, from a line of PyTorch's."""

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        torch._assert(False, "sensor 3 is offline")
        return F.mse_loss(predictions, targets)

    with pytest.raises(AssertionError, match=r"^sensor 3 is offline$"):
        MAML(nn.Linear(V.support_x.shape[2], 1), loss, vectorize=vectorize).backward(V)
