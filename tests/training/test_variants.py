"""Runs with a momentum that follows the weights: by `train` and by the command, resumed, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from metamom import MAML, CompositeMomentum, LambdaBeta, cli, nets, train
from metamom.bias import LambdaEta, parse
from metamom.common.choices import VARIANTS
from metamom.experiments.recipes import Recipe
from metamom.experiments.schedules import parse_schedule
from metamom.tasks import Sinusoid
from metamom.theory import variant_powers, variant_step, variant_weight
from metamom.training.checkpoints import CheckpointError, Checkpoints
from metamom.training.directory import read_metrics

SMALL = ["--meta-batch", "4", "--workers", "2", "--evaluate-tasks", "4", "--checkpoint-every", "2"]


def learner_of(**options) -> MAML:
    model = nets.SinusoidMLP((8,), generator=torch.Generator().manual_seed(0))
    return MAML(model, F.mse_loss, inner_lr=0.01, **options)


def run(learner, optimizer, iterations, run_dir=None, **options):
    schedulers = [LambdaBeta(optimizer, lambda k: (k + 1) ** -0.5)] if optimizer.param_groups[0]["beta"] < 1 else []
    options = {"meta_batch": 4, "workers": 2, "schedulers": schedulers, "label": None, **options}
    return train(learner, optimizer, Sinusoid(), iterations=iterations, run_dir=run_dir, **options)


@pytest.mark.parametrize(
    ("variant", "bias"), [*((variant, None) for variant in VARIANTS), ("storm", "ef21-sgdm(0.3):topk:10%")]
)
def test_a_resumed_run_ends_with_the_same_bits(variant, bias, tmp_path):
    ended = {}
    for name, stops in {"whole": [4], "resumed": [2, 4]}.items():
        for stop in stops:
            learner = learner_of()
            options = {"beta": 0.5 if bias is None else 1.0, "variant": variant, "normalize": True}
            optimizer = CompositeMomentum(learner.parameters(), lr=0.05, **options)
            operator = None if bias is None else parse(bias)
            run(learner, optimizer, stop, tmp_path / name, resume=stop > 2, bias=operator, checkpoint_every=2)
        ended[name] = [p.detach().clone() for p in learner.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*ended.values(), strict=True))


def test_the_loop_is_backward_with_the_optimizer():
    learner, twin = learner_of(), learner_of()
    run(learner, CompositeMomentum(learner.parameters(), lr=0.05, variant="storm"), 3, schedulers=())
    optimizer = CompositeMomentum(twin.parameters(), lr=0.05, variant="storm")
    for step in range(3):
        optimizer.zero_grad()
        twin.backward(Sinusoid().sample(step, 4), workers=2, momentum=optimizer)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("storm", {"clip_grad": 1.0}, r"clip_grad \(--clip-grad\) scales one gradient a step, and variant='storm'"),
        ("storm", {"bias": "ef21:topk:10%"}, "put the momentum on the workers"),
        ("hessian", {"bias": "topk:10%"}, "no second gradient that topk:10% could act on"),
    ],
)
def test_refused_before_anything_is_written(variant, options, message, tmp_path):
    learner = learner_of()
    with pytest.raises(ValueError, match=message):
        run(learner, CompositeMomentum(learner.parameters(), lr=0.1, variant=variant), 2, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_the_previous_weights_is_not_used(tmp_path):
    learner = learner_of()
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05, variant="igt")
    run(learner, optimizer, 2, tmp_path, schedulers=())
    path = Checkpoints(tmp_path / "checkpoints").path(2)
    state = torch.load(path, weights_only=True)
    del state["optimizer"]["state"][0]["previous"]
    torch.save(state, path)
    again = learner_of()
    optimizer = CompositeMomentum(again.parameters(), lr=0.05, variant="igt")
    with pytest.raises(CheckpointError, match=r"state\[0\] has no previous"):
        run(again, optimizer, 3, tmp_path, resume=True, schedulers=())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_command_with_the_schedules_of_the_variant(variant, tmp_path):
    flags = ["--variant", variant, "--normalize", "--beta", "1", "--lr", "0.2"]
    flags += ["--schedule", "power", "--beta-schedule", "power"]
    command = ["train", "sinusoid", "--iterations", "3", *flags, *SMALL, "--run-dir", str(tmp_path)]
    assert cli.main(command) == 0
    group = Checkpoints(tmp_path / "checkpoints").load_newest()["optimizer"]["param_groups"][0]
    assert group["variant"] == variant
    assert group["lr"] == pytest.approx(variant_step(variant, 4, 0.2), rel=1e-12)
    assert group["beta"] == pytest.approx(variant_weight(variant, 4), rel=1e-12)
    sizes = [line["wire_bytes"] for line in read_metrics(tmp_path)]
    twice = variant in ("storm", "hessian")
    assert sizes == [sizes[0], *[sizes[0] * (2 if twice else 1)] * 2]
    command[command.index("3")] = "5"
    assert cli.main([*command, "--resume"]) == 0


@pytest.mark.parametrize("variant", ["igt", "storm"])
def test_the_papers_method_resumed(variant, tmp_path):
    """Normalised EF21 of the workers' momenta, whose eta follows the schedule; and the same bits after a stop."""
    flags = ["--variant", variant, "--normalize", "--beta", "1", "--lr", "0.2", "--bias", "ef21-sgdm(1):topk:10%"]
    flags += ["--schedule", "power", "--beta-schedule", "power", *SMALL]
    ended = []
    for name, stops in {"whole": ["4"], "resumed": ["2", "4"]}.items():
        for stop in stops:
            command = ["train", "sinusoid", "--iterations", stop, *flags, "--run-dir", str(tmp_path / name), "--resume"]
            assert cli.main(command) == 0
        ended.append(Checkpoints(tmp_path / name / "checkpoints").load_newest())
    assert all(torch.equal(a, ended[1]["learner"][name]) for name, a in ended[0]["learner"].items())
    lines = read_metrics(tmp_path / "whole")
    assert len({line["wire_bytes"] for line in lines}) == 1
    assert ended[0]["scheduler1"] == {"last_step": 4, "base_eta": 1.0}


def test_eta_is_scheduled_as_a_loop_does():
    learner, twin, C = learner_of(), learner_of(), "ef21-sgdm(0.5):topk:10%"
    operator, other = parse(C), parse(C)
    schedule = LambdaEta(operator, lambda k: (k + 1) ** -0.5)
    run(learner, CompositeMomentum(learner.parameters(), lr=0.05, beta=1.0), 3, bias=operator, schedulers=[schedule])
    assert operator.eta == 0.25
    optimizer = CompositeMomentum(twin.parameters(), lr=0.05, beta=1.0)
    for step in range(3):
        other.eta = 0.5 * (step + 1) ** -0.5
        optimizer.zero_grad()
        twin.backward(Sinusoid().sample(step, 4), workers=2, bias=other)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters(), twin.parameters(), strict=True))


def test_wrong_schedules_of_eta():
    learner = learner_of()
    optimizer = CompositeMomentum(learner.parameters(), lr=0.05, beta=1.0)
    schedule = LambdaEta(parse("ef21-sgdm(0.5):topk:10%"), lambda k: 1.0)
    with pytest.raises(ValueError, match="LambdaEta schedules another operator than the run's"):
        run(learner, optimizer, 1, bias="ef21-sgdm(0.5):topk:10%", schedulers=[schedule])
    with pytest.raises(TypeError, match="needs an operator with an eta, such as EF21SGDM; got"):
        LambdaEta(parse("topk:10%"), lambda k: 1.0)
    with pytest.raises(ValueError, match=r"eta must stay in \(0, 1\]; got 1.5 after 0 steps"):
        LambdaEta(parse("ef21-sgdm(0.5):topk:10%"), lambda k: 3.0)
    recipe = Recipe("sinusoid", beta=1.0, beta_schedule="power:1/2", bias="clip21-sgd2m:1")
    with pytest.raises(ValueError, match="the workers' momentum, which clip21-sgd2m:1 does not have"):
        recipe.schedulers(recipe.make_optimizer(recipe.learner()), recipe.operator())


def test_powers_of_recipes():
    powers = variant_powers("igt")
    recipe = Recipe("sinusoid", variant="igt", schedule="power", beta_schedule="power")
    assert (recipe.schedule, recipe.beta_schedule) == (f"power:{powers.step}", f"power:{powers.weight}")
    assert parse_schedule("power:3/4").power == parse_schedule("power:0.75").power == 0.75
    recipe = Recipe("sinusoid", schedule="power:1/2", warmup=2, lr=0.5)
    optimizer = recipe.make_optimizer(recipe.learner())
    (moved,) = recipe.schedulers(optimizer)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        moved.step()
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5 * 2**-0.5, 0.5 * 3**-0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "power"}, r"takes its P from the variant: choose one \(--variant\), or write power:P"),
        ({"schedule": "power:2"}, r"power:3/4; got 'power:2' \(P must be in \(0, 1\]; got 2\)"),
        ({"schedule": "power:1/0"}, "P must be in"),
        ({"schedule": "power:x"}, "wanted a number"),
        ({"beta_schedule": "cosine:3"}, "the schedule of beta is constant, or power:P"),
        ({"variant": "igt", "optimizer": "adam"}, "variant belongs to the optimizer momentum; got 'igt' with adam"),
        ({"beta_schedule": "power:1", "optimizer": "sgd"}, "beta_schedule belongs to the optimizer momentum"),
    ],
)
def test_wrong_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe("sinusoid", **options)
