"""The memory that the paper's experiments take."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
import textwrap
import tracemalloc

import pytest
import torch
from forked import run_script
from paper_runs import SMALL, made

from metamom.bias import parse
from metamom.experiments.paper import memory
from metamom.experiments.paper.training import Training
from metamom.training import checkpoints

FULL = memory.Needs(
    nodes=100, parameters=669_706, data=219_800_000, images=600, activations=4000, together=True, kept=0, element_size=4
)


def test_chunks_within_the_limit():
    for n, kept in itertools.product((1, 10, 100, 1000), (0, 1, 2)):
        needs = FULL._replace(nodes=n, images=60_000 // n, kept=kept)
        if needs.fixed + needs.of_a_node > memory.LIMIT:
            with pytest.raises(ValueError, match="this run takes about"):
                memory.largest_chunk(needs)
            continue
        chunk = memory.largest_chunk(needs)
        assert 1 <= chunk <= n
        assert needs.fixed + chunk * needs.of_a_node <= memory.LIMIT
    for kept in (0, 1, 2):  # the paper's setting always fits, and not node by node
        assert memory.largest_chunk(FULL._replace(kept=kept)) >= 5


def test_what_cannot_fit_is_said_and_can_be_had(monkeypatch):
    message = r"takes about .* GB, 4\.5 GB of it the operator's state for 100 nodes, .*2 GB .*--chunk 1"
    with pytest.raises(ValueError, match=message):
        memory.largest_chunk(FULL._replace(parameters=11_181_642, kept=1))
    monkeypatch.setattr(memory, "LIMIT", 0)
    keys = {"nodes": 6, "lr": 0.1, "beta": 0.5, "bias": parse("ef21:topk:20"), "seed": 0}
    with pytest.raises(ValueError, match=r"limit for an automatic chunk\. Pass chunk=1"):
        Training(SMALL, made(24, 1), made(6, 2), **keys)
    assert Training(SMALL, made(24, 1), made(6, 2), chunk=1, **keys).epoch().train_loss > 0


def test_what_operators_keep_for_each_node():
    """As many numbers an entry as they say, whatever they are."""
    for spec in ("topk:20", "clip:1+topk:20", "ef14:topk:20", "ef21:topk:20", "ef21-sgdm(0.1):topk:20", "clip21:1"):
        operator = parse(spec)
        operator(torch.ones(3, 50))
        kept = [tensor for worker in operator.state_dict().get("workers", {}).values() for tensor in worker.values()]
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 4 * 3 * 50 * len(operator.names), spec


def test_saving_copies_no_tensor(tmp_path):
    state = {"workers": {i: {"estimate": torch.full((1 << 20,), float(i))} for i in range(16)}}
    tracemalloc.start()  # torch's own memory is not in it, but buffers of bytes are
    try:
        checkpoints.save(tmp_path / "a.pt", state)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # one tensor's bytes; there are 16
    again = checkpoints.load(tmp_path / "a.pt")["workers"]
    assert all(torch.equal(again[i]["estimate"], kept["estimate"]) for i, kept in state["workers"].items())


FULL_DISK = """
    import resource, sys, torch
    from pathlib import Path
    from metamom.training.checkpoints import save
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        save(Path(sys.argv[1]), {"a": torch.ones(1000)})
    except OSError as error:
        print(error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_checkpoint_for_which_there_is_no_room(tmp_path):
    path = tmp_path / "checkpoints" / "a.pt"
    path.parent.mkdir()
    checkpoints.save(path, {"a": torch.zeros(1)})
    said = run_script(FULL_DISK, tmp_path / "said", str(path))
    assert int(said) in (errno.EFBIG, errno.ENOSPC)
    assert [each.name for each in path.parent.iterdir()] == ["a.pt"]
    assert checkpoints.load(path)["a"].tolist() == [0]


PEAK = """
    import sys
    from metamom import cli
    from metamom.experiments.shared.peak import peak_mib
    assert cli.main(sys.argv[1:]) == 0
    print(peak_mib())
"""


HEAVIEST = (
    "none", "topk:33500", "ef21:topk:33500", "ef14:topk:33500", "ef21-sgdm(0.1):topk:33500", "clip21:1", "qsgd:4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bias", HEAVIEST)
def test_no_run_takes_more_than_2_gb(bias, data_root, tmp_path):
    """Begun, saved, resumed and saved again, with the default chunk."""
    common = ["--beta", "1", "--bias", bias, "--run-dir", str(tmp_path), "--data-root", str(data_root)]
    peaks = []
    for more in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
        command = [sys.executable, "-c", textwrap.dedent(PEAK), "reproduce", "mnist", *common, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]) * 2**20 / 1e6)
    print(f"{bias}: {peaks[0]:.0f} MB, resumed {peaks[1]:.0f} MB")
    assert max(peaks) < 2000
