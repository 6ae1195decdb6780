"""Whether to compile: `compile="auto"`, and machines without a compiler."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch._inductor
from problems import (
    conv4,
    image_batch,
    relative_error,
    small,
    small_batch,
)
from processes import with_support
from torch.fx.experimental import proxy_tensor
from torch.nn import functional as F

import metamom.compile.graph
import metamom.maml.gradient
from metamom import MAML
from metamom.nets.kernels.build import CompilerError, find_compiler, load

pytestmark = pytest.mark.xdist_group("compile")  # while one process builds the kernels, others need not wait


@pytest.fixture
def clock(monkeypatch) -> None:
    """Every plain meta-gradient takes a second, and compiling is taken to be 12: 3 layers, 2 passes, 2 seconds each."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(metamom.compile.graph, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(metamom.maml.gradient, "COMPILE_SECONDS", 2.0)
    monkeypatch.setattr(metamom.compile.graph, "SPEED_UP", 2.0)
    monkeypatch.setattr(metamom.compile.graph, "FIRST_CALLS", 3)


def plain_calls(learner: MAML, traced: list[int], most: int = 60) -> int:
    """How many meta-gradients come before the first compiled one; ``most`` where there is none."""
    expected = small().meta_gradient(small_batch()).grads
    for i in range(most):
        assert relative_error(learner.meta_gradient(small_batch()).grads, expected) < 1e-12
        if traced:
            return i
    return most


@pytest.mark.parametrize(("iterations", "plain"), [(0, 25), (5, 25), (26, 26), (28, 3), (1000, 3)])
def test_auto_goes_by_the_iterations_to_come(clock, traced, iterations, plain):
    """After three calls, a second each: compiling saves half of the rest, and costs 12. Then nothing is known."""
    learner = small(compile="auto")
    learner.expect(iterations)
    assert plain_calls(learner, traced) == plain
    for _ in range(3):
        learner.meta_gradient(small_batch())
    assert len(traced) == (plain < 60)


def test_auto_expects_as_many_calls_as_there_have_been(clock, traced):
    """25 seconds were spent, of which compiling would have saved half: more than its 12."""
    assert plain_calls(small(compile="auto"), traced) == 25


def test_auto_counts_the_chunks_of_an_iteration(clock, traced):
    learner = small(compile="auto", chunk_size=1)
    learner.expect(10)
    learner.meta_gradient(small_batch(tasks=6))  # 60 calls to come, of which three are watched
    assert len(traced) == 1


def test_auto_judges_each_shape_by_itself(clock, traced):
    learner = small(compile="auto")
    learner.expect(1000)
    for tasks in (2, 4, 6):
        for _ in range(3):
            learner.meta_gradient(small_batch(tasks=tasks))
    assert traced == []
    learner.meta_gradient(small_batch(tasks=4))
    assert len(traced) == 1


def test_a_short_run_is_not_compiled_by_the_real_clock(traced):
    learner = MAML(conv4(), F.cross_entropy, compile="auto")
    learner.expect(5)
    for seed in range(5):
        learner.meta_gradient(image_batch(seed))
    assert traced == []


@pytest.fixture(params=["no compiler", "a failing one"])
def no_compiler(request, monkeypatch, tmp_path) -> Iterator[str]:
    """What the error says."""
    if request.param == "no compiler":
        monkeypatch.setenv("CXX", "/nonexistent")
        yield r"there is no /nonexistent on the path\. Install one .* or run without compiling"
        return
    failing = tmp_path / "cxx"
    failing.write_text("#!/bin/sh\necho 'error: no' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path))
    load.cache_clear()
    yield "cxx cannot build metamom's kernels: error: no"
    load.cache_clear()


def test_auto_goes_on_without_a_compiler_and_warns_once(clock, traced, no_compiler):
    learner = small(compile="auto")
    learner.expect(1000)
    expected = small().meta_gradient(small_batch()).grads
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tasks in (2, 2, 2, 2, 2, 4, 4, 4, 4, 4):
            grads = learner.meta_gradient(small_batch(tasks=tasks)).grads
            assert tasks != 2 or relative_error(grads, expected) < 1e-15
    (warning,) = caught
    with pytest.raises(UserWarning, match=rf'compile="auto" continues without compiling: .*{no_compiler}'):
        raise warning.message
    assert traced == []


def test_compile_true_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(CompilerError, match=r"Install one \(Debian: apt install g\+\+\), name it in \$CXX") as raised:
        small(compile=True)
    assert isinstance(raised.value, ValueError)


def test_a_compiler_that_fails_is_an_error_where_compiling_was_asked_for(traced, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path))
    load.cache_clear()
    with pytest.raises(CompilerError, match="cannot build metamom's kernels"):
        small(compile=True).meta_gradient(small_batch())
    load.cache_clear()


BROKEN = """#!/bin/sh
[ "$1" = --version ] && exec {compiler} --version
echo "kernel.cpp:7: error: no space left on device" >&2
exit 1
"""

FAILING = """
import json, warnings
from problems import relative_error, small, small_batch
from metamom.nets.kernels.build import CompilerError, load

load()
expected = small().meta_gradient(small_batch()).grads
auto = small(compile="auto")
auto.expect(10**9)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    error = max(relative_error(auto.meta_gradient(small_batch()).grads, expected) for _ in range(8))
said = [str(warning.message) for warning in caught if warning.category is UserWarning]
try:
    small(compile=True).meta_gradient(small_batch())
except CompilerError as failure:
    print(json.dumps([error, said, str(failure), type(failure.__cause__).__name__]))
"""


@pytest.mark.slow
def test_a_compiler_that_breaks_after_the_kernels_were_built(tmp_path):
    """A real one: it still tells its version, by which the kernels are found, but TorchInductor's code fails in it."""
    load()
    broken = tmp_path / "c++"
    broken.write_text(BROKEN.format(compiler=find_compiler()))
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAILING],
        env={**with_support(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    error, warned, raised, cause = json.loads(done.stdout)
    assert error < 1e-15
    assert warned == [f'compile="auto" continues without compiling: {raised}']
    assert raised == (
        "TorchInductor cannot compile this meta-gradient: CppCompileError: kernel.cpp:7: error: no space left on "
        "device. Check that the compiler works and the disk has space, or run without compiling."
    )
    assert cause in ("InductorError", "CppCompileError")


@pytest.fixture(params=["tracing", "TorchInductor"])
def failing(request, monkeypatch) -> str:
    """A stage of compiling that does not work, by no fault of the compiler's."""

    def fails(*args: object, **options: object) -> None:
        raise NotImplementedError("aten::pairs has no lowering")

    if request.param == "tracing":
        monkeypatch.setattr(proxy_tensor, "make_fx", lambda function: fails)
    else:
        monkeypatch.setattr(torch._inductor, "compile", fails)
    return request.param


def test_auto_goes_on_whatever_fails(clock, failing):
    learner = small(compile="auto")
    learner.expect(1000)
    with pytest.warns(UserWarning, match="NotImplementedError: aten::pairs has no lowering") as caught:
        assert plain_calls(learner, [], most=8) == 8
    assert len(caught) == 1


def test_compile_true_tells_what_failed(failing):
    """TorchInductor's failures become metamom's errors, with the cause; those of tracing are the model's own."""
    wanted, cause = (CompilerError, NotImplementedError) if failing == "TorchInductor" else (NotImplementedError, None)
    with pytest.raises(wanted, match="aten::pairs has no lowering") as raised:
        small(compile=True).meta_gradient(small_batch())
    assert cause is None or isinstance(raised.value.__cause__, cause)


def test_ctrl_c_while_compiling_is_no_failure(clock, monkeypatch):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch._inductor, "compile", interrupted)
    learner = small(compile="auto")
    learner.expect(1000)
    with pytest.raises(KeyboardInterrupt):
        plain_calls(learner, [], most=8)


@pytest.mark.parametrize("mode", [5, "always", None, "True", -1])
def test_compile_is_a_bool_or_auto(mode):
    with pytest.raises(ValueError, match=rf'compile must be True, False or "auto"; got {mode!r}\.'):
        small(compile=mode)


def test_a_negative_number_of_iterations_to_come():
    with pytest.raises(ValueError, match=r"the number of remaining iterations must be >= 0; got -1\."):
        small().expect(-1)
