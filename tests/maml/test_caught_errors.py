"""Models and losses that catch errors of PyTorch, which a loop over tasks raises for other tasks, or never."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from problems import assert_close
from slow_maml import meta_gradient_by_copies
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.under_vmap.caught_errors import handles_errors

ALPHA = 1e-3


class Net(nn.Module):
    """A hidden layer, a function of it and of the inputs, and an output."""

    def __init__(self, then: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.then = nn.Linear(1, 4), nn.Linear(4, 1), then

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.then(torch.tanh(self.body(x)), x))


def with_jitter(z: Tensor, x: Tensor) -> Tensor:
    """The Cholesky factor of a kernel that is singular where all inputs are 0, as of Gaussian processes."""
    kernel = z @ z.mT + x.abs().sum() * torch.eye(len(x), dtype=x.dtype)
    for jitter in (0.0, 1e-2):
        try:
            factor = torch.linalg.cholesky(kernel + jitter * torch.eye(len(x), dtype=x.dtype))
        except RuntimeError:
            continue
        return factor[:, :4]
    raise AssertionError("the second one has a factor")


def scaled(z: Tensor, x: Tensor) -> Tensor:
    try:
        return z / float(z.detach().norm())
    except RuntimeError:
        return z


def suppressed(z: Tensor, x: Tensor) -> Tensor:
    scale = 1.0
    with suppress(Exception):
        scale = z.detach().mean().item()
    return z * scale


def masked(z: Tensor, x: Tensor) -> Tensor:
    try:
        return z + z[x[:, 0] > 0].sum()
    except RuntimeError:
        return z


def probed(z: Tensor, x: Tensor) -> Tensor:
    try:
        shift = float(z.detach().numpy().max())
    except Exception:  # noqa: BLE001
        shift = 0.0
    return z + shift


def asserted(z: Tensor, x: Tensor) -> Tensor:
    try:
        torch._assert((z.detach().sum() > 0), "negative")
    except Exception:  # noqa: BLE001
        return -z
    return z


CATCHING = [with_jitter, scaled, suppressed, masked, probed, asserted]


def batch() -> TaskBatch:
    """Three tasks; all inputs of the second one are 0 in its query set."""
    generator = torch.Generator().manual_seed(3)
    fields = torch.randn(4, 3, 5, 1, generator=generator, dtype=torch.float64)
    found = TaskBatch(*fields)
    found.query_x[1] = 0
    return found


def gradients(learner: MAML, tasks: TaskBatch) -> dict[str, Tensor]:
    return {name: g.squeeze(0) for name, g in learner.meta_gradient(tasks).grads.items()}


@pytest.mark.parametrize("then", CATCHING)
def test_models_that_catch_errors_run_task_by_task(then):
    torch.manual_seed(2)
    model, tasks = Net(then).double(), batch()
    wanted = meta_gradient_by_copies(model, F.mse_loss, tasks, inner_lr=ALPHA)
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    with pytest.warns(UserWarning, match=r"the model catches an error of PyTorch.* runs task by task"):
        assert_close(gradients(learner, tasks), wanted)
    for _ in range(2):
        assert_close(gradients(learner, tasks), wanted)
    with pytest.raises(ValueError, match="the model catches an error of PyTorch, which may be that of another task"):
        MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="vmap").meta_gradient(tasks)


def test_an_error_that_comes_later_is_noticed():
    """On the fast path of the steps after the first."""
    torch.manual_seed(2)
    model, harmless = Net(with_jitter).double(), batch()
    harmless.query_x[1] = 1.0
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA)
    for _ in range(3):
        assert_close(gradients(learner, harmless), meta_gradient_by_copies(model, F.mse_loss, harmless, inner_lr=ALPHA))
    with pytest.warns(UserWarning, match="catches an error of PyTorch"):
        found = gradients(learner, batch())
    assert_close(found, meta_gradient_by_copies(model, F.mse_loss, batch(), inner_lr=ALPHA))


def test_code_that_catches_nothing_runs_on_all_tasks_at_once():
    def careful(z: Tensor, x: Tensor) -> Tensor:
        try:
            return z * 2
        except RuntimeError:
            return z

    torch.manual_seed(2)
    model, tasks = Net(careful).double(), batch()
    learner = MAML(model, F.mse_loss, inner_lr=ALPHA, vectorize="vmap")
    for _ in range(3):
        assert_close(gradients(learner, tasks), meta_gradient_by_copies(model, F.mse_loss, tasks, inner_lr=ALPHA))


def weighted(predictions: Tensor, targets: Tensor) -> Tensor:
    try:
        weight = float(predictions.detach().abs().mean())
    except RuntimeError:
        weight = 5.0
    return weight * F.mse_loss(predictions, targets)


def of_trees(predictions: Tensor, targets: dict[str, Tensor]) -> Tensor:
    return weighted(predictions, targets["y"])


@pytest.mark.parametrize("loss", [weighted, of_trees])
def test_losses_that_catch_errors_run_task_by_task(loss):
    torch.manual_seed(2)
    model, tasks = Net(lambda z, x: z).double(), batch()
    wanted = meta_gradient_by_copies(model, weighted, tasks, inner_lr=ALPHA)
    if loss is of_trees:
        tasks = tasks._replace(support_y={"y": tasks.support_y}, query_y={"y": tasks.query_y})
    learner = MAML(model, loss, inner_lr=ALPHA)
    with pytest.warns(UserWarning, match=r"the loss catches an error of PyTorch.* the loss runs task by task"):
        assert_close(gradients(learner, tasks), wanted)
    assert_close(gradients(learner, tasks), wanted)


def test_a_graph_is_refused_where_tracing_raises_the_error():
    torch.manual_seed(2)
    for vectorize in ("auto", "loop"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner = MAML(Net(suppressed).double(), F.mse_loss, inner_lr=ALPHA, vectorize=vectorize, compile=True)
            with pytest.raises(ValueError, match="the model catches an error of PyTorch"):
                learner.meta_gradient(batch())


def test_handlers_are_found_in_code():
    def nothing(x):
        with torch.no_grad():
            return [each + 1 for each in x]

    def final(x):
        try:
            return x
        finally:
            x.zero_()

    found = {f: handles_errors(Net(f)) for f in (*CATCHING, nothing, final)}
    assert found == {**dict.fromkeys(CATCHING, True), nothing: False, final: True}
