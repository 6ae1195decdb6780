"""metamom beside the real learn2learn: the same gradients, its loops with our optimizer, its task sets."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Callable

import numpy as np
import pytest
import torch
from forked import run_forked, script
from installed import need_learn2learn
from problems import image_batch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from metamom import MAML, BiasedAccumulator, CompositeMomentum, TopK, train
from metamom.batch import Sampler
from metamom.experiments import learn2learn_omniglot
from metamom.experiments.learn2learn_loop import adapted_loss, meta_iteration, split_task, tasks_of
from metamom.experiments.learn2learn_parity import MODELS, STEPS, parity, problem
from metamom.interop.learn2learn import AsTaskset, FromTaskset, from_maml, import_learn2learn
from metamom.nets.models import SinusoidMLP, use_batch_statistics
from metamom.tasks import Episodes, Sinusoid

need_learn2learn()
l2l = import_learn2learn()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(classes: int = 8, each: int = 6, side: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(classes * each, 1, side, side, generator=generator(1), dtype=torch.float64)
    return x, torch.arange(classes).repeat_interleave(each)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name, steps, first_order):
    assert parity(name, steps, first_order).absolute < 1e-9


def test_parity_would_see_another_inner_step():
    model, loss_fn, batch = problem("MLP")
    one, three = (from_maml(l2l.algorithms.MAML(model, lr=0.05), loss_fn, inner_steps=j) for j in (1, 3))
    gap = one.meta_gradient(batch).grads["0.weight"] - three.meta_gradient(batch).grads["0.weight"]
    assert gap.abs().max() > 1e-3


def test_training_one_moves_the_other():
    model, loss_fn, batch = problem("MLP")
    learner = l2l.algorithms.MAML(model, lr=0.05)
    ours = from_maml(learner, loss_fn)
    before = [p.detach().clone() for p in learner.parameters()]
    train(
        ours,
        CompositeMomentum(ours.parameters(), lr=0.01),
        Sinusoid(5, 5, dtype=torch.float64),
        iterations=2,
        meta_batch=2,
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
    assert {id(p) for p in ours.parameters()} == {id(p) for p in learner.parameters()}
    here = [p.detach().clone() for p in ours.parameters()]
    meta_iteration(learner, CompositeMomentum(learner.parameters(), lr=0.01), tasks_of(batch), loss_fn)
    assert all(not torch.equal(a, b) for a, b in zip(here, ours.parameters(), strict=True))


def test_from_maml_wants_a_learner_and_takes_running_statistics():
    with pytest.raises(TypeError, match=r"learn2learn.algorithms.MAML; got Linear"):
        from_maml(nn.Linear(1, 1), F.mse_loss)
    theirs = l2l.algorithms.MAML(l2l.vision.models.OmniglotCNN(5), lr=0.4)
    before = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
    assert any("running_mean" in name for name in before)
    learner, batch = from_maml(theirs, F.cross_entropy), image_batch(dtype=torch.float32)
    found = learner.meta_gradient(batch).losses
    assert all(torch.equal(buffer, before[name]) for name, buffer in theirs.named_buffers())
    use_batch_statistics(theirs)
    torch.testing.assert_close(learner.meta_gradient(batch).losses, found)


def anil(model: nn.Sequential):
    """An ANIL-style loop's learner: only the head is learn2learn's, the body is shared."""
    return nn.Sequential(*model[:-1]), l2l.algorithms.MAML(model[-1], lr=0.05)


LOOPS = ["MAML", "FOMAML", "MetaSGD", "GBML", "ANIL"]


def loop(kind: str):
    """Parameters of a real learn2learn loop, and its loss on one task."""
    model = SinusoidMLP((16, 16), generator=generator())
    if kind == "ANIL":
        body, head = anil(model)

        def loss_of(task):
            clone = head.clone()
            clone.adapt(F.mse_loss(clone(body(task.support_x)), task.support_y))
            return F.mse_loss(clone(body(task.query_x)), task.query_y)

        return [*body.parameters(), *head.parameters()], loss_of
    if kind == "MetaSGD":
        learner = l2l.algorithms.MetaSGD(model, lr=0.05)
    elif kind == "GBML":
        transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
        learner = l2l.algorithms.GBML(model, transform=transform, lr=0.05, adapt_transform=False)
    else:
        learner = l2l.algorithms.MAML(model, lr=0.05, first_order=kind == "FOMAML")
    return list(learner.parameters()), lambda task: adapted_loss(learner, task, F.mse_loss, 1)


def run(kind: str, make_optimizer, iterations: int = 40):
    params, loss_of = loop(kind)
    optimizer, losses = make_optimizer(params), []
    for step in range(iterations):
        optimizer.zero_grad()
        loss = torch.stack([loss_of(task) for task in tasks_of(Sinusoid().sample(step % 4, 4))]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return params, losses


@pytest.mark.parametrize("kind", LOOPS)
def test_the_optimizer_in_their_loops(kind):
    """Bit for bit what torch's SGD does in the same loop, where theory says that the two are one."""
    ours, losses = run(kind, lambda p: CompositeMomentum(p, lr=0.02, beta=0.5, first_step="gradient"))
    theirs, _ = run(kind, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5, dampening=0.5))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert np.mean(losses[-4:]) < np.mean(losses[:4])


@pytest.mark.parametrize("kind", LOOPS)
def test_the_accumulator_in_their_loops(kind):
    params, loss_of = loop(kind)
    accumulator = BiasedAccumulator(params, bias=TopK(ratio=0.1), workers=4)
    tasks = tasks_of(Sinusoid().sample(0, 4))
    for task in tasks:
        loss_of(task).backward()
        accumulator.add()
    accumulator.finish()
    used = [p for p in params if p.grad is not None]
    assert used
    rows = []
    for task in tasks:
        grads = torch.autograd.grad(loss_of(task), accumulator.params, allow_unused=True, materialize_grads=True)
        rows.append(TopK(ratio=0.1)(torch.cat([g.flatten() for g in grads])))
    got = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in accumulator.params])
    torch.testing.assert_close(got, torch.stack(rows).mean(0))


def taskset(num_tasks: int = -1, *, k: int = 2, consecutive: bool = True):
    x, y = images(classes=8, each=6, side=2)
    x = y.double()[:, None] * 100 + torch.arange(len(x)).double()[:, None] % 6  # each sample tells its class and number
    data = l2l.data.MetaDataset(TensorDataset(x, y))
    transforms = [
        l2l.data.transforms.NWays(data, n=3),
        l2l.data.transforms.KShots(data, k=k),
        l2l.data.transforms.LoadData(data),
        l2l.data.transforms.RemapLabels(data),
    ]
    if consecutive:
        transforms.append(l2l.data.transforms.ConsecutiveLabels(data))
    return l2l.data.Taskset(data, task_transforms=transforms, num_tasks=num_tasks)


@pytest.mark.parametrize("num_tasks", [-1, 5])
def test_a_taskset_as_a_sampler(num_tasks):
    sampler = FromTaskset(taskset(num_tasks), shots=1, queries=1, seed=3)
    assert isinstance(sampler, Sampler)
    whole = sampler.sample(7, 4)
    assert whole.support_x.shape == (4, 3, 1)
    assert whole.support_y.tolist() == whole.query_y.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(whole.support_x // 100, whole.query_x // 100)  # the same classes
    assert not (whole.support_x == whole.query_x).any()  # other samples of them
    again = FromTaskset(taskset(num_tasks), shots=1, queries=1, seed=3)
    parts = [again.sample(7, 4, rank=r, world_size=2) for r in (1, 0)]  # another order of asking
    assert torch.equal(whole.query_x, torch.cat([parts[1].query_x, parts[0].query_x]))
    assert not torch.equal(whole.query_x, sampler.with_stream("test").sample(7, 4).query_x)


def test_it_splits_as_fast_adapt_does():
    tasks = taskset(1, k=4)
    sampler = FromTaskset(tasks, shots=2, queries=2)
    batch = sampler.sample(0, 1)
    theirs = split_task(*tasks[0], shots=2, ways=3)
    for c in range(3):
        assert batch.support_x[0][batch.support_y[0] == c].tolist() == theirs.support_x[theirs.support_y == c].tolist()
        assert batch.query_x[0][batch.query_y[0] == c].tolist() == theirs.query_x[theirs.query_y == c].tolist()


def test_tasks_in_any_order_with_other_counts():
    batch = FromTaskset(taskset(k=4, consecutive=False), shots=1, queries=3).sample(0, 2)
    assert batch.support_y.tolist() == [[0, 1, 2]] * 2
    assert batch.query_y.tolist() == [[0, 1, 2] * 3] * 2
    with pytest.raises(ValueError, match=r"shots \+ queries = 1 \+ 1 samples of each class; got \[4, 4, 4\].*k=2"):
        FromTaskset(taskset(k=4), shots=1, queries=1).sample(0, 1)
    with pytest.raises(TypeError, match="got list"):
        FromTaskset([], shots=1, queries=1)
    data = l2l.data.MetaDataset(TensorDataset(*images(classes=4, each=2, side=2)))
    bare = l2l.data.Taskset(data, task_transforms=[l2l.data.transforms.NWays(data, n=2)])
    with pytest.raises(ValueError, match="Add LoadData to"):
        FromTaskset(bare, shots=1, queries=1).sample(0, 1)


def test_a_taskset_tells_how_it_is_drawn_from():
    one, other = (FromTaskset(taskset(5), shots=1, queries=1, seed=seed).describe() for seed in (0, 1))
    assert one != other
    assert one["num_tasks"] == 5


def test_drawing_leaves_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    FromTaskset(taskset(), shots=1, queries=1).sample(0, 3)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_sampler_as_tasks_and_back():
    sampler = Episodes(*images(), ways=3, shots=2, queries=2)
    tasks = AsTaskset(sampler, num_tasks=4)
    assert len(tasks) == len(list(tasks)) == 4
    for i, (data, labels) in enumerate(tasks):
        batch = sampler.sample(i, 1)
        task = split_task(data, labels, shots=2, ways=3)
        for got, wanted in zip(task, batch[:4], strict=True):
            assert torch.equal(got, wanted[0])
    drawn = [tasks.sample()[0] for _ in range(5)]
    assert torch.equal(drawn[0], drawn[4])
    assert torch.equal(drawn[1], tasks[1][0])
    with pytest.raises(IndexError):
        tasks[4]
    with pytest.raises(TypeError, match="unlimited"):
        len(AsTaskset(sampler))
    with pytest.raises(ValueError, match="Use more queries"):
        AsTaskset(Episodes(*images(), ways=3, shots=3, queries=1))[0]


def test_their_loop_on_our_tasks_equals_ours():
    """Ten steps of learn2learn's loop on our tasks end at the weights of ten steps of MAML.backward."""
    sampler = Sinusoid(5, 5, dtype=torch.float64)
    theirs = l2l.algorithms.MAML(SinusoidMLP((16,), generator=generator()).double(), lr=0.05)
    ours = MAML(SinusoidMLP((16,), generator=generator()).double(), F.mse_loss, inner_lr=0.05)
    their_opt = CompositeMomentum(theirs.parameters(), lr=0.02)
    our_opt = CompositeMomentum(ours.parameters(), lr=0.02)
    for step in range(10):
        batch = sampler.sample(step, 4)
        meta_iteration(theirs, their_opt, tasks_of(batch), F.mse_loss)
        our_opt.zero_grad()
        ours.backward(batch)
        our_opt.step()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.fixture
def python(tmp_path) -> Callable[[str], str]:
    """The output of a script in a process that has imported neither learn2learn nor torchvision."""

    def run(code: str) -> str:
        path = tmp_path / "script.py"
        path.write_text(NEITHER + textwrap.dedent(code))
        ((status, said),) = run_forked(script, 1, tmp_path / "said", path)
        assert status == 0, said
        return said.strip()

    return run


NEITHER = "import sys\nassert not {'learn2learn', 'torchvision'} & set(sys.modules)\n"


def test_without_learn2learn_only_its_use_fails(python):
    """A finder that knows no learn2learn stands in for an environment without it."""
    said = python(
        """
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "learn2learn":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import metamom, metamom.interop.learn2learn as interop
        try:
            interop.import_learn2learn()
        except ImportError as error:
            print(error)
        """
    )
    assert f"{sys.executable} -m pip install learn2learn==0.2.0" in said
    assert ('--config-settings="--build-option=build_ext"' in said) == (sys.version_info >= (3, 11))


def test_schemas_are_declared_only_where_they_are_missing(python):
    """A torchvision whose operators load, or that fails for another reason, is left alone."""
    said = python(
        """
        import sys, types
        from metamom.interop import imports
        fine = types.ModuleType("torchvision")
        sys.modules["torchvision"] = fine
        assert imports.import_torchvision() is fine
        assert not imports._declared
        del sys.modules["torchvision"]
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "torchvision":
                    raise RuntimeError("another reason")
        sys.meta_path.insert(0, Broken())
        try:
            imports.import_torchvision()
        except RuntimeError as error:
            print(error, len(imports._declared))
        """
    )
    assert said == "another reason 0"


def test_the_example_in_both_loops(data_root):
    """From the same weights, on the same tasks, one step of either loop ends at the same place."""
    config = learn2learn_omniglot.OmniglotExample(1, meta_batch=3, test_tasks=4)
    outcomes = {
        (optimizer, trainer): learn2learn_omniglot.run(config, trainer, optimizer, str(data_root))
        for optimizer in ("Adam", "CompositeMomentum")
        for trainer in ("learn2learn", "metamom")
    }
    theirs, ours = (outcomes["CompositeMomentum", trainer].weights[1] for trainer in ("learn2learn", "metamom"))
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    assert "| CompositeMomentum | 1 |" in learn2learn_omniglot.report(config, outcomes)
