"""Calls outside of vmap on the tensors of all tasks, and the cross entropy and dropout that use them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.checks.loss_readings import LossReadings, is_cross_entropy
from metamom.maml.under_vmap import batched, losses_by_task
from metamom.maml.under_vmap.batched import on_all_tasks, over_tasks
from metamom.maml.under_vmap.losses_by_task import cross_entropy

SCORES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each call was made outside of vmap."""
    found = []

    def noting(function, *args):
        out = on_all_tasks(function, *args)
        found.append(out is not None)
        return out

    monkeypatch.setattr(losses_by_task, "on_all_tasks", noting)
    return found


class TestOnAllTasks:
    def test_the_whole_tensors_arrive(self):
        def one(x: Tensor) -> Tensor:
            found = on_all_tasks(lambda whole: whole * len(whole), x)
            assert found is not None
            return found.sum()

        torch.testing.assert_close(over_tasks(one)(SCORES), 3 * SCORES.sum((1, 2)))

    def test_none_without_vmap_or_for_tensors_that_do_not_differ(self):
        def one(x: Tensor) -> Tensor:
            assert on_all_tasks(lambda a, b: a, x, torch.ones(3)) is None
            assert over_tasks(lambda y: self._none(x, y))(torch.ones(2, 2)).shape == (2,)
            return x.sum()

        over_tasks(one)(SCORES)
        assert on_all_tasks(lambda x: x, SCORES) is None
        assert torch.func.grad(lambda x: (self._none(x, x), x.sum())[1])(torch.ones(2)).tolist() == [1, 1]

    @staticmethod
    def _none(*tensors: Tensor) -> Tensor:
        assert on_all_tasks(lambda *whole: whole[0], *tensors) is None
        return tensors[-1].sum()

    def test_errors_leave_the_level(self):
        def refuse(x: Tensor) -> Tensor:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            over_tasks(lambda x: on_all_tasks(refuse, x))(SCORES)
        assert not torch._C._are_functorch_transforms_active()


class TestCrossEntropy:
    @pytest.mark.parametrize("ignored", [-100, 2])
    def test_first_and_second_derivatives_are_pytorchs(self, calls, ignored):
        results = []
        for of_tasks in (
            lambda scores: over_tasks(lambda x, y: cross_entropy(x, y, ignore_index=ignored))(scores, LABELS),
            lambda scores: torch.stack(
                [F.cross_entropy(x, y, ignore_index=ignored) for x, y in zip(scores, LABELS, strict=True)]
            ),
        ):
            scores = SCORES.clone().requires_grad_()
            losses = of_tasks(scores)
            (grad,) = torch.autograd.grad(losses.sum(), scores, create_graph=True)
            results.append((losses, grad, torch.autograd.grad(grad.sin().sum(), scores)[0]))
        assert calls == [True]
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

    def test_no_label_that_counts_is_nan(self):
        labels = torch.tensor([[-100, -100], [0, -100]])
        losses = over_tasks(cross_entropy)(torch.zeros(2, 2, 4), labels)
        assert losses[0].isnan()
        assert losses[1].item() == pytest.approx(torch.tensor(4.0).log().item())

    @pytest.mark.parametrize(
        "options", [{"reduction": "sum"}, {"label_smoothing": 0.1}, {"weight": torch.ones(5).double()}]
    )
    def test_other_options_are_left_to_vmap(self, calls, options):
        losses = over_tasks(lambda x, y: cross_entropy(x, y, **options))(SCORES, LABELS)
        expected = [F.cross_entropy(x, y, **options) for x, y in zip(SCORES, LABELS, strict=True)]
        assert calls == []
        torch.testing.assert_close(losses, torch.stack(expected))

    def test_images_and_probabilities_are_left_to_vmap(self, calls):
        pixels, probabilities = torch.zeros(3, 2, 5, 4), SCORES.softmax(-1)
        assert over_tasks(cross_entropy)(pixels, torch.zeros(3, 2, 4).long()).shape == (3,)
        torch.testing.assert_close(
            over_tasks(cross_entropy)(SCORES, probabilities),
            torch.stack([F.cross_entropy(x, y) for x, y in zip(SCORES, probabilities, strict=True)]),
        )
        assert not any(calls)


class TestSeenBefore:
    """A cross entropy that was watched before runs without the mode that watches it."""

    def test_which_losses(self):
        module, hooked, own = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
        hooked.register_forward_hook(lambda *_: None)
        own.forward = lambda x, y: x.sum()
        assert [*map(is_cross_entropy, [F.cross_entropy, module, hooked, own, F.nll_loss, nn.MSELoss()])] == [
            True,
            True,
            False,
            False,
            False,
            False,
        ]

    @pytest.mark.parametrize("once", [False, True])
    def test_changes_of_the_module_are_followed(self, once):
        loss, readings = nn.CrossEntropyLoss(), LossReadings()
        for ignored in (-100, -100, 1, 1):
            loss.ignore_index = ignored
            found = readings.watched(loss, once)(SCORES[0], LABELS[0])
            assert found.item() == pytest.approx(F.cross_entropy(SCORES[0], LABELS[0], ignore_index=ignored).item())
            assert readings.of(loss, SCORES, LABELS).ignored == ignored


class Drawing(nn.Sequential):
    """Dropout between two layers."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(nn.Linear(5, 6), nn.Dropout(0.4), nn.Linear(6, 5))
        self.double()


def test_pytorch_without_these_private_names_gives_the_same(monkeypatch):
    """Then its own vmap runs, and its own cross entropy under it; dropout draws the same numbers."""
    batch, found = TaskBatch(SCORES, LABELS, SCORES.flip(1), LABELS.flip(1)), []
    for has in (True, False):
        monkeypatch.setattr(batched, "_HAS_PARTS", has)
        monkeypatch.setattr(batched, "_HAS_LAYERS", has)
        learner = MAML(Drawing(), F.cross_entropy, inner_lr=0.1, inner_steps=2, vectorize="vmap")
        for _ in range(3):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                found.append(learner.meta_gradient(batch).grads)
    for other in found[1:]:
        for name, grad in found[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-12, atol=1e-14)
