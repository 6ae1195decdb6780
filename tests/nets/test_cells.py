"""Recurrent cells under vmap: values and three derivatives against PyTorch's own in a loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from derivatives import derivatives, draw
from torch import Tensor, nn
from torch.nn import functional as F

from metamom import MAML, TaskBatch
from metamom.maml.under_vmap.functions_by_task import FunctionsByTask

TASKS, POINTS, INPUTS, HIDDEN = 3, 4, 2, 5
CELLS = {torch.rnn_tanh_cell: 1, torch.rnn_relu_cell: 1, torch.gru_cell: 3}  # by the number of their gates


def check(model, *args: Tensor) -> None:
    functions = FunctionsByTask()

    def run(*all_tasks: Tensor) -> Tensor:
        with functions:
            return torch.func.vmap(model)(*all_tasks)

    def looped(*all_tasks: Tensor) -> Tensor:
        return torch.stack([model(*own) for own in zip(*all_tasks, strict=True)])

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where vmap falls back to a loop of its own
        ours = derivatives(run, list(args))
    for i, (a, b) in enumerate(zip(ours, derivatives(looped, list(args)), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda said, i=i: f"derivative {i}: {said}")
    assert functions.seen


def weights(gates: int, bias: bool) -> list[Tensor]:
    shapes = [(gates * HIDDEN, INPUTS), (gates * HIDDEN, HIDDEN), *[(gates * HIDDEN,)] * (2 * bias)]
    return [draw(TASKS, *shape, seed=10 + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
@pytest.mark.parametrize("points", [(POINTS,), ()], ids=["batch", "one point"])
def test_cells_with_one_state(cell, bias, points):
    x, h = draw(TASKS, *points, INPUTS, seed=1), draw(TASKS, *points, HIDDEN, seed=2)
    if points == ():  # as the modules call it
        check(lambda x, h, *w: cell(x.unsqueeze(0), h.unsqueeze(0), *w).squeeze(0), x, h, *weights(CELLS[cell], bias))
    else:
        check(cell, x, h, *weights(CELLS[cell], bias))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_cell_with_two_states(bias):
    x, h, c = draw(TASKS, POINTS, INPUTS, seed=1), *(draw(TASKS, POINTS, HIDDEN, seed=i) for i in (2, 3))
    check(lambda x, h, c, *w: torch.cat(torch.lstm_cell(x, (h, c), *w), -1), x, h, c, *weights(4, bias))


@pytest.mark.parametrize(
    "shapes",
    [((4, 2), (1, 5), (15, 2), (15, 5)), ((4, 2), (4, 6), (15, 2), (15, 5)), ((4, 2), (4, 5), (12, 2), (15, 5))],
    ids=["one state for all points", "another width", "other gates"],
)
def test_sizes_that_do_not_fit_are_errors_of_pytorch(shapes):
    args = [draw(TASKS, *shape, seed=i) for i, shape in enumerate(shapes)]
    with FunctionsByTask(), pytest.raises(RuntimeError) as ours:
        torch.func.vmap(torch.gru_cell)(*args)
    with pytest.raises(RuntimeError) as theirs:
        torch.gru_cell(*(x[0] for x in args))
    assert str(ours.value) == str(theirs.value)


class Recurrent(nn.Module):
    """Reads a sequence ``[N, L, 2]``, cell by cell."""

    def __init__(self, cell: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = cell(INPUTS, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_meta_gradients_are_those_of_a_loop_without_a_warning(cell):
    torch.manual_seed(0)
    model = Recurrent(cell).double()
    batch = TaskBatch(
        draw(TASKS, POINTS, 3, INPUTS, seed=1),
        draw(TASKS, POINTS, 1, seed=2),
        draw(TASKS, POINTS, 3, INPUTS, seed=3),
        draw(TASKS, POINTS, 1, seed=4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = MAML(model, F.mse_loss, inner_lr=0.1, inner_steps=2).meta_gradient(batch).grads
    plain = dict(model.named_parameters())
    total = 0.0
    for x, y, query_x, query_y in zip(*batch[:4], strict=True):
        own = dict(plain)
        for _ in range(2):
            loss = F.mse_loss(torch.func.functional_call(model, own, (x,)), y)
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: w - 0.1 * g for (name, w), g in zip(own.items(), grads, strict=True)}
        total = total + F.mse_loss(torch.func.functional_call(model, own, (query_x,)), query_y) / TASKS
    expected = torch.autograd.grad(total, list(plain.values()))
    for (name, g), wanted in zip(ours.items(), expected, strict=True):
        torch.testing.assert_close(g[0], wanted, rtol=1e-10, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")
