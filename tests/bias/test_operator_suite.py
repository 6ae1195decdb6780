"""The suite that every operator and error feedback goes through as part of a run, by `operators.EVERY`.

Shapes, dtypes, zeros and what is not finite: test_bias.py. Messages: test_wire.py. Purity: test_transitions.py.
"""

from __future__ import annotations

import copy
import io
import math

import torch
from operators import EVERY, RANDOM, STATELESS, assert_identical, cut, each, rounding

from metamom.bias import BiasOperator, Layout, NonFiniteError

N, D = 4, 7


def gradients(step, n=N, d=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def fresh(operator):
    again = copy.deepcopy(operator)
    again.reset()
    return again


def saved(state):
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Processes:
    """P processes, each with an operator of its own that sends its workers' messages; the server decodes all."""

    def __init__(self, operator: BiasOperator, count: int) -> None:
        self.operators = [fresh(operator) for _ in range(count)]
        self.blocks = [range(i * N // count, (i + 1) * N // count) for i in range(count)]

    def step(self, k, rows):
        sent = []
        for operator, block in zip(self.operators, self.blocks, strict=True):
            sent += operator.send(rows[list(block)], step=k, workers=block, sizes=cut(D))
        outs = [operator.receive(sent, D, rows.dtype, sizes=cut(D), each=True) for operator in self.operators]
        for out in outs[1:]:
            assert_identical(outs[0], out)  # every process moves by the same estimate
        for operator in self.operators:
            operator.advance()
        return outs[0]


@each(EVERY)
def test_any_number_of_processes_gives_the_same_trajectory(operator):
    """Two steps on four processes, a checkpoint, and two on two: as four steps on one.

    Norms of one row and of a batch may round differently, and MARINA's server has the estimates up to rounding.
    """
    alone, before = fresh(operator), Processes(operator, 4)
    expected = []
    for k in range(4):
        expected.append(alone(gradients(k), step=k, sizes=cut(D)))
        alone.advance()
    for k in range(2):
        torch.testing.assert_close(before.step(k, gradients(k)), expected[k], rtol=1e-12, atol=1e-12)
    state = saved(operator.gather([process.state_dict() for process in before.operators]))
    after = Processes(operator, 2)
    for process, block in zip(after.operators, after.blocks, strict=True):
        process.load_state_dict(state)
        process.shard(block, each=True)
    for k in range(2, 4):
        torch.testing.assert_close(after.step(k, gradients(k)), expected[k], rtol=1e-12, atol=1e-12)


@each(EVERY)
def test_a_checkpoint_goes_on_bit_for_bit_and_draws_by_the_counter_alone(operator):
    """Not by torch's generator, nor by calls of another operator."""
    whole, first, second = fresh(operator), fresh(operator), fresh(operator)
    expected = [whole(gradients(k), sizes=cut(D)) for k in range(4)]
    for k in range(2):
        first(gradients(k), sizes=cut(D))
    torch.rand(3)
    fresh(RANDOM[0])(gradients(9))
    second.load_state_dict(saved(first.state_dict()))
    for k in range(2, 4):
        assert_identical(expected[k], second(gradients(k), sizes=cut(D)))


@each(EVERY)
def test_messages_are_as_long_as_stated(operator):
    for dtype in (torch.float64, torch.float32):
        sender = fresh(operator)
        for k in range(3):
            stated = sender.step_bytes(k, D, dtype.itemsize, cut(D))
            lengths = {len(m) for m in sender.send(gradients(k, dtype=dtype), step=k, workers=range(N), sizes=cut(D))}
            assert lengths == {stated}
            assert sender.varies or stated == sender.wire_bytes(D, dtype.itemsize, cut(D))


@each(EVERY)
def test_few_entries_and_workers(operator):
    """It works, or says how many entries it needs, and its state is as before; with one layer of no entries."""
    for n, d in ((1, 1), (2, 1), (1, 2), (2, 3)):
        runs = fresh(operator)
        failed = ""
        for k in range(2):
            try:
                out = runs(gradients(k, n, d), step=k, sizes=Layout([(0,), (d,)]))
            except ValueError as error:
                failed = str(error)
                continue
            assert out.shape == (n, d)
            assert bool(out.isfinite().all())
        if failed:
            assert any(word in failed for word in ("K", "k=", "entries")), failed
            assert runs.state_dict() == fresh(operator).state_dict()


@each(EVERY)
def test_huge_and_tiny_gradients(operator):
    """The result is finite, or the error is `NonFiniteError` and the state is as before."""
    for dtype in (torch.float64, torch.float32):
        finfo = torch.finfo(dtype)
        for scale in (finfo.max / 4, 1e-30, finfo.smallest_normal):
            runs = fresh(operator)
            for k in range(2):
                before = str(runs.state_dict())
                try:
                    out = runs(gradients(k).clamp(-2, 2).to(dtype) * scale, step=k, sizes=cut(D))
                except NonFiniteError:
                    assert scale > 1
                    assert str(runs.state_dict()) == before
                    break
                assert out.dtype is dtype
                assert bool(out.isfinite().all())


OWN_DRAWS = [operator for operator in STATELESS if "shared" not in operator.spec]


@each([operator for operator in OWN_DRAWS if operator.contraction(D, cut(D)) is not None])
def test_contractions_are_bounds(operator):
    """``E ||C(g) - g||^2 <= (1 - alpha) ||g||^2``: the mean over the draws of 200 workers."""
    alpha, eye, draws = operator.contraction(D, cut(D)), torch.eye(D, dtype=torch.float64), 200
    for step, g in enumerate([gradients(0)[0], torch.ones_like(eye[0]), eye[2]]):
        rows, size = g.expand(draws, D), float(g.square().sum())
        error = (operator(rows, step=step, sizes=cut(D)) - rows).square().sum(-1)
        spread = 5 * float(error.std()) / math.sqrt(draws)
        assert float(error.mean()) <= (1 - alpha) * size + spread + rounding(g.dtype, D) * size


def promises(operator):
    """The largest relative noise M of an operator that its constants call unbiased, else ``None``."""
    try:
        constants = operator.constants(D, sizes=cut(D))
    except ValueError:
        return None
    return None if constants.B or constants.b2 else constants.M


@each([operator for operator in OWN_DRAWS if operator in RANDOM and promises(operator) is not None])
def test_unbiased_operators_are_within_their_noise(operator):
    """``B = b2 = 0`` promises an unbiased mean with noise ``M ||g||^2``; over 400 workers' draws."""
    g = gradients(0)[0]
    away = operator(g.expand(400, D), step=1, sizes=cut(D)) - g
    assert float((away.mean(0) / (away.std(0) / 20).clamp_min(1e-12)).abs().max()) < 5
    noise = away.square().sum(-1)
    assert float(noise.mean()) <= promises(operator) * float(g.square().sum()) + 5 * float(noise.std()) / 20 + 1e-12
