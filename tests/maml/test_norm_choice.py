"""Which normalisation a learner uses by default, and the choices that are refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from as_in_a_loop import Given, state_of
from normalised_models import MAKE, TASKS, case
from problems import WAYS, labelled_batch, randomised
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, evaluate
from metamom.common.choices import NORMS
from metamom.nets.models import Conv4, use_batch_statistics


def test_the_model_says_which():
    model, batch = case("2d")
    frozen, by_batch = (MAML(model, F.cross_entropy, norm=n).meta_gradient(batch).losses for n in ("frozen", "batch"))
    learner = MAML(model, F.cross_entropy)
    assert learner.norm is None
    assert torch.equal(learner.meta_gradient(batch).losses, by_batch)
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(1,)).norm == "batch"  # though that runs in eval()
    model.eval()
    assert torch.equal(learner.meta_gradient(batch).losses, frozen)
    assert evaluate(learner, Given(batch), tasks=TASKS, steps=(1,)).norm == "frozen"
    use_batch_statistics(model)
    assert torch.equal(learner.meta_gradient(batch).losses, by_batch)
    learner.norm = "support"
    assert not torch.allclose(learner.meta_gradient(batch).losses, by_batch)
    assert learner.describe()["norm"] == "support"
    assert copy.deepcopy(learner).norm == learner.like(estimator="first-order").norm == "support"
    learner.norm = None
    assert "norm" not in learner.describe()


def test_a_hand_written_frozen_layer_stays_frozen_unless_asked():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAYS)
            self.register_buffer("mean", torch.full((5,), 0.5))
            self.register_buffer("variance", torch.full((5,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(self.body(x), self.mean, self.variance))

    model, batch = randomised(Fixed()), labelled_batch(4)
    default, frozen, by_batch = (
        MAML(model, F.cross_entropy, norm=norm).meta_gradient(batch).losses for norm in (None, "frozen", "batch")
    )
    torch.testing.assert_close(default, frozen)
    assert not torch.allclose(default, by_batch)


@pytest.mark.parametrize(
    ("make", "norm", "message"),
    [
        (lambda: Conv4(WAYS), "frozen", r"layers do not have: features\.0\.1, features\.1\.1.*norm=\"batch\""),
        (lambda: use_batch_statistics(case("2d")[0]), "frozen", r"do not have: 1, 5\."),
        (lambda: case("2d")[0], "running", r'"batch", "frozen", "support", or None.*got \'running\''),
        (lambda: case("2d")[0], True, r"got True"),
    ],
)
def test_choices_that_are_refused(make, norm, message):
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        MAML(model, F.cross_entropy, norm=norm)
    assert state_of(model) == before


def test_an_attribute_and_an_evaluation_are_checked_as_the_constructor_is():
    learner, batch = MAML(Conv4(WAYS), F.cross_entropy), labelled_batch(1, 28, 28, dtype=torch.float32)
    for norm, message in (("frozen", "layers do not have: features"), ("mine", "got 'mine'")):
        with pytest.raises(ValueError, match=message):
            learner.norm = norm
        with pytest.raises(ValueError, match=message):
            evaluate(learner, Given(batch), tasks=TASKS, norm=norm)
    assert learner.norm is None


def test_a_mixed_model_takes_a_choice_for_all_of_its_layers():
    model, batch = case("2d")
    model[1].eval()
    frozen = MAML(model, F.cross_entropy, norm="frozen").meta_gradient(batch).losses
    assert torch.equal(frozen, MAML(model.eval(), F.cross_entropy).meta_gradient(batch).losses)


def test_frozen_functions_need_statistics():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(x, None, None, training=True))

    learner = MAML(Bare().double(), F.cross_entropy, norm="frozen")
    with pytest.raises(ValueError, match="calls batch_norm without them"):
        learner.backward(labelled_batch(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_scripted_normalisation_is_refused_with_a_choice():
    model = nn.Sequential(torch.jit.script(MAKE["1d"][0]().eval()), nn.Linear(WAYS, WAYS))
    for norm in NORMS:
        with pytest.raises(ValueError, match=r"cannot in scripted code: 0, 0\.1\. Pass the model"):
            MAML(model, F.cross_entropy, norm=norm)
    MAML(model, F.cross_entropy)


def test_support_statistics_need_the_support_set():
    model, batch = case("1d")
    learner = MAML(model, F.cross_entropy, norm="support")
    params = learner.adapt(batch.support_x, batch.support_y)
    with pytest.raises(ValueError, match=r"predict\(params, x, support_x=\.\.\.\)"):
        learner.predict(params, batch.query_x)
    with pytest.raises(ValueError, match="tasks"):
        learner.predict(params, batch.query_x, support_x=batch.support_x[:1])


@pytest.mark.parametrize("more", ["support", "queries"])
def test_support_statistics_need_the_same_calls(more):
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            extra = (len(x) > WAYS * 2) == (more == "queries")
            return self.head(self.norm(self.norm(x)) if extra else self.norm(x))

    batch = labelled_batch(4, queries=9)
    with pytest.raises(ValueError, match="more often on one of them"):
        MAML(Uneven().double(), F.cross_entropy, norm="support").backward(batch)


def test_names_are_listed_in_short():
    model = nn.Sequential(*[nn.BatchNorm1d(4, track_running_stats=False) for _ in range(7)])
    with pytest.raises(ValueError, match=re.escape("0, 1, 2, 3, 4 and 2 more.")):
        MAML(model, F.cross_entropy, norm="frozen")
