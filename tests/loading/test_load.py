"""`metamom.load`: from a run directory to its learner, for runs of the command and from Python."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metamom
from metamom import MAML, CompositeMomentum, cli, evaluate, train
from metamom.nets import Conv4, SinusoidMLP
from metamom.tasks import Episodes, FixedTasks, LinearRegression, Sinusoid
from metamom.training.checkpoints import Checkpoints


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(1, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def odd_loss(predicted: Tensor, y: Tensor) -> Tensor:
    return (predicted - y).abs().mean()


def trained(run: Path, learner: MAML, sampler: object | None = None, **options: object) -> MAML:
    optimizer = CompositeMomentum(learner.parameters(), lr=0.01)
    sampler = Sinusoid(5, 5, seed=1) if sampler is None else sampler
    train(learner, optimizer, sampler, iterations=3, meta_batch=4, run_dir=run, **options)
    return learner


def assert_same(found: MAML, expected: MAML) -> None:
    assert found.describe() == expected.describe()
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, w in found.state_dict().items():
        torch.testing.assert_close(w, theirs[name], rtol=0, atol=0)
    assert found.autocast == expected.autocast


def test_a_run_of_the_command(tmp_path):
    flags = ["--iterations", "4", "--meta-batch", "4", "--evaluate-every", "2", "--evaluate-tasks", "4"]
    assert cli.main(["train", "sinusoid", "--run-dir", str(tmp_path / "run"), *flags]) == 0
    run = metamom.load(tmp_path / "run", "newest")
    assert run.step == 4
    assert run.path == tmp_path / "run"
    assert run.settings["task"] == run.recipe.task == "sinusoid"
    assert [line["step"] for line in run.metrics] == [0, 1, 2, 3]
    assert repr(run).startswith("LoadedRun('")
    assert "step=4, learner=MAML(SinusoidMLP of" in repr(run)
    found = evaluate(run.learner, run.sampler("validation"), tasks=4, steps=(1,), stream="validation")
    assert found.mean[0] == run.metrics[-1]["validation"]
    assert run.sampler(shots=3).sample(0, 1).support_x.shape == (1, 3, 1)
    assert metamom.load(str(tmp_path / "run")).step in (2, 4)  # the best


def with_statistics(norm: str | None = None) -> MAML:
    return MAML(Net().eval(), F.mse_loss, norm=norm, inner_lr=0.1)


PYTHON: dict[str, tuple[Callable[[], MAML], Callable[[], nn.Module] | None]] = {
    "metamom's model": (lambda: MAML(SinusoidMLP((7, 3)), F.mse_loss, inner_lr=0.05, inner_steps=2), None),
    "float64": (lambda: MAML(SinusoidMLP().double(), nn.MSELoss(reduction="sum")), None),
    "a loss with options": (lambda: MAML(SinusoidMLP(), nn.HuberLoss(delta=0.5), estimator="first-order"), None),
    "a partial loss": (lambda: MAML(Net(), functools.partial(F.mse_loss, reduction="sum")), Net),
    "a model of one's own": (lambda: MAML(Net(), F.mse_loss, adapt=["last"]), Net),
    "step sizes by parameter": (
        lambda: MAML(nn.Linear(1, 1), F.mse_loss, inner_lr={"weight": 0.1, "bias": torch.tensor([0.3])}),
        lambda: nn.Linear(1, 1),
    ),
    "running statistics": (with_statistics, Net),
    "statistics of the support set": (lambda: with_statistics("support"), lambda: Net().eval()),
    "bfloat16": (lambda: MAML(SinusoidMLP(), F.mse_loss, autocast=torch.bfloat16), None),
    **{
        f"learned by {kind}": (lambda kind=kind: MAML(SinusoidMLP(), F.mse_loss, learn_inner_lr=kind), None)
        for kind in ("entry", "tensor", "scalar")
    },
}


@pytest.mark.parametrize("name", PYTHON)
def test_a_run_from_python(name, tmp_path):
    make, model = PYTHON[name]
    torch.manual_seed(0)  # some initial weights diverge, and NaN is not equal to itself
    expected = trained(tmp_path / "run", make())
    given = {} if "partial" not in name else {"loss_fn": functools.partial(F.mse_loss, reduction="sum")}
    run = metamom.load(tmp_path / "run", model=model, **given)
    assert run.step == 3
    assert run.recipe is None
    if name != "running statistics":
        assert_same(run.learner, expected)
    tasks = run.sampler("test")
    ours, theirs = (evaluate(each, tasks, tasks=10, steps=(0, 2)) for each in (run.learner, expected))
    assert bool(theirs.values.isfinite().all())
    assert torch.equal(ours.values, theirs.values)
    assert ours.norm == theirs.norm
    by_learner = metamom.load(tmp_path / "run", model=make())
    assert_same(by_learner.learner, expected)


def test_tracked_estimators_and_fixed_tasks(tmp_path):
    def make() -> MAML:
        return MAML(SinusoidMLP(), F.mse_loss, estimator="moml", tracking=0.3)

    expected = trained(tmp_path / "run", make(), FixedTasks(Sinusoid(6, 5, seed=1), 8))
    run = metamom.load(tmp_path / "run")
    assert_same(run.learner, expected)
    assert run.learner.memory.tracking == 0.3
    tasks = run.sampler("test")
    assert tasks.describe() == Sinusoid(3, 5, seed=1).describe()
    assert tasks.stream == "test"


def test_a_module_is_loaded_in_place(tmp_path):
    expected = trained(tmp_path / "run", MAML(Net(), F.mse_loss))
    model = Net()
    run = metamom.load(tmp_path / "run", model=model)
    assert run.learner.model is model
    assert torch.equal(model.last.weight, expected.model.last.weight)


def test_a_model_by_name(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text("from torch import nn\ndef tiny():\n    return nn.Linear(1, 1)\n")
    monkeypatch.chdir(tmp_path)
    expected = trained(tmp_path / "run", MAML(nn.Linear(1, 1), F.mse_loss))
    monkeypatch.syspath_prepend(tmp_path)
    run = metamom.load("run", model="their_models:tiny")
    assert_same(run.learner, expected)


@pytest.fixture(scope="module")
def of_net(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("loading") / "run"
    trained(run, MAML(Net(), odd_loss))
    return run


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"a model that metamom cannot make \(Net\): pass it, as metamom\.load\(RUN, model=Net\(\)\)"),
        ({"model": Net}, ValueError, r"a loss that metamom cannot make \(odd_loss\)"),
        (
            {"model": lambda: Net(5), "loss_fn": odd_loss},
            ValueError,
            r"the one given\. In the checkpoint, of other shapes: first\.weight \[6, 1\] for \[5, 1\]",
        ),
        (
            {"model": nn.Sequential(nn.Linear(1, 6)), "loss_fn": odd_loss},
            ValueError,
            r"missing: 0\.weight \[6, 1\], 0\.bias \[6\]; unexpected: first\.weight \[6, 1\]",
        ),
        ({"model": MAML(Net(4), odd_loss)}, ValueError, r"model\.first\.weight \[6, 1\] for \[4, 1\]"),
        ({"model": 3}, TypeError, "a module, or a function or class that makes it; got an int"),
        ({"model": lambda: 3}, TypeError, r"must return a torch\.nn\.Module; it returned an int"),
        ({"model": "nowhere_at_all:Net"}, ValueError, "there is no module nowhere_at_all"),
        ({"model": Net, "loss_fn": odd_loss, "device": "abacus"}, ValueError, "unknown device"),
        ({"checkpoint": "oldest"}, ValueError, 'must be "best" or "newest"'),
    ],
)
def test_misfits(arguments, error, message, of_net):
    with pytest.raises(error, match=message):
        metamom.load(of_net, **arguments)


def test_misfits_leave_a_given_learner_alone(of_net):
    learner = MAML(Net(4), odd_loss)
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match="another model"):
        metamom.load(of_net, model=learner)
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        metamom.load(tmp_path / "nothing")


def test_settings_of_ones_own_need_the_learner(tmp_path):
    expected = trained(tmp_path / "run", MAML(SinusoidMLP(), F.mse_loss), settings={"mine": 1})
    with pytest.raises(ValueError, match="pass the whole learner"):
        metamom.load(tmp_path / "run", model=SinusoidMLP())
    run = metamom.load(tmp_path / "run", model=MAML(SinusoidMLP(), F.mse_loss))
    assert_same(run.learner, expected)
    with pytest.raises(ValueError, match="cannot recreate"):
        run.sampler()


def test_tasks_that_cannot_be_made(tmp_path):
    images, labels = torch.rand(60, 1, 28, 28), torch.arange(60) % 6
    trained(
        tmp_path / "a", MAML(Conv4(3, hidden=4), F.cross_entropy), Episodes(images, labels, ways=3, shots=1, queries=2)
    )
    run = metamom.load(tmp_path / "a")
    assert isinstance(run.learner.model, Conv4)
    with pytest.raises(ValueError, match=r"cannot recreate \(Episodes\)"):
        run.sampler()
    trained(tmp_path / "b", MAML(nn.Linear(3, 1), F.mse_loss), LinearRegression(3, 4, seed=2))
    run = metamom.load(tmp_path / "b", model=nn.Linear(3, 1))
    assert run.sampler(queries=7).sample(0, 2).query_x.shape == (2, 7, 3)
    with pytest.raises(ValueError, match="LinearRegression have no ways"):
        run.sampler(ways=3)


def test_estimators_that_split_their_support_set(tmp_path):
    learner = MAML(SinusoidMLP(), F.mse_loss, estimator="independent")
    trained(tmp_path / "run", learner, Sinusoid(10, 5))
    assert metamom.load(tmp_path / "run").sampler().sample(0, 1).support_x.shape == (1, 5, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_inner_steps_that_were_set_later(steps, tmp_path):
    """Step sizes and normalisations by step are as many as when the learner was made."""
    options = {"learn_inner_lr": "tensor-step", "step_norms": True, "multi_step": 2}
    learner = MAML(Net(), F.mse_loss, inner_steps=2, **options)
    learner.inner_steps = steps
    trained(tmp_path / "run", learner)
    assert_same(metamom.load(tmp_path / "run", model=Net).learner, learner)


def test_step_sizes_of_several_kinds(tmp_path):
    """Some are learned in place, of a number or of the parameter's shape, and others are fixed."""
    model = Net()
    kinds = (lambda p: torch.tensor(0.02), lambda p: torch.full_like(p, 0.03), None, lambda p: torch.tensor(0.04))
    sizes = {
        name: 0.05 if (kind := kinds[i % 4]) is None else nn.Parameter(kind(p.detach()))
        for i, (name, p) in enumerate(model.named_parameters())
    }
    learner = trained(tmp_path / "run", MAML(model, F.mse_loss, inner_lr=sizes))
    assert_same(metamom.load(tmp_path / "run", model=Net).learner, learner)


def test_a_parameter_that_was_frozen_later(tmp_path):
    """The others keep their step size."""

    def frozen() -> nn.Module:
        net = Net()
        net.first.weight.requires_grad_(False)
        return net

    learner = MAML(Net(), F.mse_loss, inner_lr=0.2)
    learner.model.first.weight.requires_grad_(False)
    trained(tmp_path / "run", learner)
    found = metamom.load(tmp_path / "run", model=frozen).learner
    assert found.inner_lr == learner.inner_lr == 0.2
    assert found.adapted == learner.adapted


@pytest.mark.parametrize("learned", [False, "tensor", "entry"])
def test_a_parameter_with_a_step_size_of_its_own_that_was_frozen_later(learned, tmp_path):
    def frozen() -> nn.Module:
        net = Net()
        net.first.weight.requires_grad_(False)
        return net

    model = Net()
    sizes = {name: torch.full_like(p.detach(), 0.1 + i / 100) for i, (name, p) in enumerate(model.named_parameters())}
    learner = MAML(model, F.mse_loss, inner_lr=0.2 if learned else sizes, learn_inner_lr=learned)
    learner.model.first.weight.requires_grad_(False)
    trained(tmp_path / "run", learner)
    found = metamom.load(tmp_path / "run", model=frozen).learner
    assert found.adapted == learner.adapted
    batch = Sinusoid().sample(0, 2)
    theirs = learner.adapt(batch.support_x, batch.support_y)
    for name, w in found.adapt(batch.support_x, batch.support_y).items():
        torch.testing.assert_close(w, theirs[name])


def test_a_run_of_a_changed_config(of_net, tmp_path):
    import shutil

    run = Path(shutil.copytree(of_net, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    del config["settings"]["learner"]["inner_steps"]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not describe a learner of this version"):
        metamom.load(run, model=Net, loss_fn=odd_loss)


def test_a_resumed_run_must_normalise_alike(tmp_path):
    trained(tmp_path / "run", MAML(Net().eval(), F.mse_loss))
    learner = MAML(Net(), F.mse_loss)
    with pytest.raises(ValueError, match="normalisation is 'frozen' there and 'batch' here"):
        trained(tmp_path / "run", learner, resume=True)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 3


def test_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    trained(tmp_path / "run", MAML(SinusoidMLP(), F.mse_loss))
    table = pandas.DataFrame(metamom.load(tmp_path / "run").metrics)
    assert list(table["step"]) == [0, 1, 2]
    assert table["loss"].dtype == "float64"


# the command


def test_the_command_evaluates_a_run_from_python(tmp_path, capsys, monkeypatch):
    expected = trained(tmp_path / "run", MAML(nn.Linear(1, 1), F.mse_loss))
    flags = ["--tasks", "10", "--steps", "0,1", "--json"]
    assert cli.main(["evaluate", str(tmp_path / "run"), *flags]) == 2
    assert "--model on the command line" in capsys.readouterr().err
    (tmp_path / "models_of_mine.py").write_text("from torch import nn\nclass Tiny(nn.Linear):\n    pass\n"
                                                "def tiny():\n    return nn.Linear(1, 1)\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["evaluate", "run", *flags, "--model", "models_of_mine:tiny"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["mean"]) == evaluate(expected, Sinusoid(5, 5, seed=1), tasks=10, steps=(0, 1)).mean
    assert cli.main(["evaluate", "run", *flags[:-1], "--model", "models_of_mine:tiny"]) == 0
    assert capsys.readouterr().out.startswith("Sinusoid 5-shot, split test, 10 tasks, trained for 3 iterations")
    bias = ["bias", "run", "--tasks", "6", "--inner-batch", "1,2", "--json"]
    assert cli.main([*bias, "--model", "models_of_mine:tiny"]) == 0
    assert "bias" in capsys.readouterr().out
    for wrong, said in (("models_of_mine:tinny", "did you mean tiny"), ("models_of_mine", "wanted PACKAGE")):
        try:
            code = cli.main(["evaluate", "run", "--model", wrong])
        except SystemExit as exit:
            code = exit.code
        assert code == 2
        assert said in capsys.readouterr().err
