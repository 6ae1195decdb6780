"""Meta-batches for a `torch.utils.data.DataLoader`."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from metamom.interop import MetaBatches
from metamom.tasks import Sinusoid


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one core
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_the_samplers_in_order(processes):
    tasks = Sinusoid(seed=3)
    loader = DataLoader(MetaBatches(tasks, meta_batch=4, steps=5, start=7), batch_size=None, num_workers=processes)
    batches = list(loader)
    assert len(batches) == 5
    for step, batch in enumerate(batches, 7):
        for ours, theirs in zip(batch[:4], tasks.sample(step, 4)[:4], strict=True):
            assert torch.equal(ours, theirs)


def test_each_pass_asks_where_to_start():
    done = [0]
    batches = MetaBatches(Sinusoid(), meta_batch=2, steps=2, start=lambda: done[0], stream="validation")
    first = [batch.support_x for batch in batches]
    done[0] = 1
    second = [batch.support_x for batch in batches]
    assert torch.equal(first[1], second[0])
    assert torch.equal(first[0], Sinusoid().with_stream("validation").sample(0, 2).support_x)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="MetaBatches needs a sampler, which"):
        MetaBatches([1, 2], meta_batch=2, steps=2)
    with pytest.raises(ValueError, match="meta_batch"):
        MetaBatches(Sinusoid(), meta_batch=0, steps=2)
