"""FixedTasks and PerWorker: which tasks stay, whose they are, and their ids."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metamom.tasks import Episodes, FixedTasks, PerWorker, Sinusoid

SINUSOID = Sinusoid(shots=3, queries=4, dtype=torch.float64)


def amplitude_and_phase(batch) -> torch.Tensor:
    """``[T, 2]``: A sin p and A cos p, by least squares from each task's points."""
    x, y = torch.cat([batch.support_x, batch.query_x], 1), torch.cat([batch.support_y, batch.query_y], 1)
    return torch.linalg.lstsq(torch.cat([x.cos(), x.sin()], -1), y).solution.squeeze(-1)


def assert_same_tasks(a, b) -> None:
    torch.testing.assert_close(amplitude_and_phase(a), amplitude_and_phase(b), rtol=0, atol=1e-8)  # a fit to 7 points


def test_tasks_stay_and_points_move():
    tasks = FixedTasks(SINUSOID, 5)
    first, later = tasks.sample(0, 5), tasks.sample(9, 5)
    assert first.task_ids.tolist() == later.task_ids.tolist() == [0, 1, 2, 3, 4]
    assert_same_tasks(first, later)
    assert not torch.isin(first.support_x, later.support_x).any()
    for a, b in zip(first[:4], SINUSOID.sample(0, 5)[:4], strict=True):  # the family's own step 0
        assert torch.equal(a, b)


def test_another_stream_moves_points_alone():
    train, test = FixedTasks(SINUSOID, 5), FixedTasks(SINUSOID, 5).with_stream("test")
    assert_same_tasks(train.sample(0, 5), test.sample(0, 5))
    assert not torch.isin(train.sample(0, 5).support_x, test.sample(0, 5).support_x).any()


def test_points_can_stay_too():
    tasks = FixedTasks(SINUSOID, 5, fresh_data=False)
    assert torch.equal(tasks.sample(0, 5).support_x, tasks.sample(9, 5).support_x)
    assert not torch.equal(tasks.sample(0, 5).support_x, tasks.with_stream("test").sample(0, 5).support_x)


def test_a_smaller_batch_has_different_tasks_at_random():
    tasks = FixedTasks(SINUSOID, 6)
    batches = [tasks.sample(step, 4) for step in range(30)]
    ids = torch.stack([batch.task_ids for batch in batches])
    assert all(len(set(row)) == 4 for row in ids.tolist())
    assert len({tuple(row) for row in ids.tolist()}) > 15
    assert set(ids.flatten().tolist()) == set(range(6))
    assert ids[3].tolist() == [5, 4, 0, 1]  # on every platform
    # The points of a task depend on its id and the step alone, not on which others were chosen.
    everything = tasks.sample(3, 6)
    assert torch.equal(batches[3].support_x, everything.support_x[ids[3]])


def reshuffled(n: int = 6, **options) -> FixedTasks:
    return FixedTasks(SINUSOID, n, order="reshuffle", **options)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 30), size=st.integers(1, 29), shuffle=st.integers(0, 10**9))
def test_reshuffled_tasks_have_their_turn_once(n, size, shuffle):
    size = max(k for k in range(1, n) if n % k == 0 and k <= max(size, 1))
    turns = n // size
    ids = [reshuffled(n).sample(shuffle * turns + turn, size).task_ids for turn in range(turns)]
    assert sorted(torch.cat(ids).tolist()) == list(range(n))


def test_every_shuffle_is_a_new_one():
    tasks = reshuffled(6)
    orders = [tuple(torch.cat([tasks.sample(3 * k + i, 2).task_ids for i in range(3)]).tolist()) for k in range(40)]
    assert len(set(orders)) > 35
    for place in range(6):  # each task comes at each place
        assert {order[place] for order in orders} == set(range(6))
    assert orders[0] == (1, 4, 3, 5, 2, 0)  # on every platform
    assert [tasks.sample(s, 2).task_ids.tolist() for s in (7, 1)] == [list(orders[2][2:4]), list(orders[0][2:4])]
    other = FixedTasks(Sinusoid(shots=3, queries=4, seed=1), 6, order="reshuffle")
    assert tuple(torch.cat([other.sample(i, 2).task_ids for i in range(3)]).tolist()) != orders[0]


def test_all_orders_of_a_shuffle_are_equally_likely():
    tasks, draws = reshuffled(3), 3000
    counts = Counter(tuple(tasks._chosen(3 * k + i, 1).item() for i in range(3)) for k in range(draws))
    assert len(counts) == 6
    assert sum((c - draws / 6) ** 2 / (draws / 6) for c in counts.values()) < 5 + 5 * 10**0.5


@pytest.mark.parametrize("world_size", [2, 4])
def test_reshuffled_blocks_make_up_the_batch(world_size):
    for step in range(6):
        whole = reshuffled(12).sample(step, 4)
        parts = [reshuffled(12).sample(step, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
        for name in ("task_ids", "support_x", "query_y"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    everything = reshuffled(12).sample(5, 12)
    assert everything.task_ids.tolist() == list(range(12))
    assert torch.equal(whole.support_x, everything.support_x[whole.task_ids])


def test_members_reshuffle_independently():
    members = PerWorker([reshuffled(4), reshuffled(4)])
    ids = torch.stack([members.sample(step, 4).task_ids for step in range(20)])
    assert (ids[:, :2] != ids[:, 2:] - 4).any()
    for shuffle in ids.view(10, 2, 4):
        assert sorted(shuffle[:, :2].flatten().tolist()) == [0, 1, 2, 3]
        assert sorted(shuffle[:, 2:].flatten().tolist()) == [4, 5, 6, 7]


def test_bad_orders():
    with pytest.raises(ValueError, match="one of replacement, reshuffle; got 'shuffle'"):
        FixedTasks(SINUSOID, 5, order="shuffle")
    with pytest.raises(ValueError, match=r"must divide the n=6 fixed tasks.*; got 4\. .*replacement"):
        reshuffled(6).sample(0, 4)
    assert reshuffled(6).describe()["order"] == "reshuffle"
    assert FixedTasks(SINUSOID, 6).describe()["order"] == "replacement"


def test_fixed_episodes_keep_their_classes():
    images, labels = torch.arange(400, dtype=torch.float32), torch.arange(400) % 20
    tasks = FixedTasks(Episodes(images, labels, ways=4, shots=1, queries=2), 3)
    first, later = tasks.sample(0, 3), tasks.sample(1, 3)
    assert torch.equal(first.support_x % 20, later.support_x % 20)
    assert not torch.equal(first.support_x, later.support_x)


def test_more_tasks_than_there_are():
    with pytest.raises(ValueError, match="n=5 fixed tasks; got a meta-batch of 6"):
        FixedTasks(SINUSOID, 5).sample(0, 6)


@pytest.mark.parametrize("sampler", [PerWorker([SINUSOID]), FixedTasks(SINUSOID, 2), 3])
def test_only_families_have_tasks_to_fix(sampler):
    with pytest.raises(TypeError, match=r"PerWorker\(\[FixedTasks\(s, m\), \.\.\.\]\)"):
        FixedTasks(sampler, 2)


def test_each_worker_gets_its_own_family():
    bands = [(0.1, 1), (4, 5), (20, 21)]
    batch = PerWorker([Sinusoid(4, 8, amplitude=band, dtype=torch.float64) for band in bands]).sample(3, 12)
    for part, (low, high) in zip(batch.split(3), bands, strict=True):
        amplitude = amplitude_and_phase(part).norm(dim=-1)
        assert (amplitude > low - 1e-8).all()
        assert (amplitude < high + 1e-8).all()


def test_workers_of_one_family_get_the_family_s_own_batch():
    for a, b in zip(PerWorker([SINUSOID] * 3).sample(2, 6)[:4], SINUSOID.sample(2, 6)[:4], strict=True):
        assert torch.equal(a, b)


def test_each_worker_has_its_own_fixed_tasks():
    pair = PerWorker([FixedTasks(SINUSOID, 2), FixedTasks(Sinusoid(3, 4, amplitude=(8, 9), dtype=torch.float64), 2)])
    batch = pair.sample(4, 4)
    assert batch.task_ids.tolist() == [0, 1, 2, 3]
    low, high = (amplitude_and_phase(part).norm(dim=-1) for part in batch.split(2))
    assert (low < 5.1).all()
    assert (high > 7.9).all()


def test_fixed_tasks_of_workers_with_one_family_differ():
    split, whole = PerWorker([FixedTasks(SINUSOID, 2), FixedTasks(SINUSOID, 3)]), FixedTasks(SINUSOID, 5)
    ids = split.sample(1, 4).task_ids.tolist()
    assert ids[:2] == [0, 1]
    assert set(ids[2:]) < {2, 3, 4}
    assert torch.equal(split.sample(1, 4).query_x, whole.sample(1, 5).query_x[ids])


def test_members_choose_independently():
    ids = torch.cat([PerWorker([FixedTasks(SINUSOID, 8)] * 2).sample(s, 4).task_ids[None] for s in range(20)])
    assert (ids[:, :2] != ids[:, 2:] - 8).any()
    assert (ids[:, :2] < 8).all()
    assert (ids[:, 2:] >= 8).all()


def test_a_worker_asked_for_more_than_its_tasks():
    with pytest.raises(ValueError, match="n=2 fixed tasks; got a meta-batch of 3"):
        PerWorker([FixedTasks(SINUSOID, 2), FixedTasks(SINUSOID, 4)]).sample(0, 6)


def test_streams_reach_every_member_that_has_them():
    class Constant:
        def sample(self, step, num_tasks, *, rank=0, world_size=1):
            return Sinusoid(3, 4).sample(0, num_tasks, rank=rank, world_size=world_size)

    pair = PerWorker([Sinusoid(3, 4), Constant()])
    moved = pair.with_stream("test")
    assert not torch.equal(pair.sample(0, 4).support_x[:2], moved.sample(0, 4).support_x[:2])
    assert torch.equal(pair.sample(0, 4).support_x[2:], moved.sample(0, 4).support_x[2:])
    assert pair.describe()["samplers"][1]["family"].endswith("Constant")


@pytest.mark.parametrize(
    ("samplers", "error", "message"),
    [
        ([], ValueError, "a sampler for each worker; got none"),
        ([SINUSOID, 3], TypeError, r"samplers\[1\] must have a method .*got an int"),
        ([PerWorker([SINUSOID])], TypeError, "in one list"),
        ([SINUSOID, FixedTasks(SINUSOID, 2)], TypeError, "1 of the 2 samplers are FixedTasks"),
    ],
)
def test_bad_members(samplers, error, message):
    with pytest.raises(error, match=message):
        PerWorker(samplers)


def test_members_of_different_shapes():
    with pytest.raises(ValueError, match="support_x differs"):
        PerWorker([Sinusoid(3), Sinusoid(4)]).sample(0, 2)


def test_workers_must_divide_the_meta_batch():
    with pytest.raises(ValueError, match="equal blocks"):
        PerWorker([SINUSOID] * 3).sample(0, 4)
