"""Freed memory stays in the process from the first meta-gradient on, unless the user has set glibc's thresholds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from metamom.common import allocator
from metamom.common.allocator import has_glibc, keep_freed_memory, reuse_freed_memory, set_by_user

# Without thresholds of the user.
PLAIN = {name: value for name, value in os.environ.items() if not set_by_user({name: value})}
# Page faults of allocating, writing and freeing COUNT x 1 MiB several times, before and after the call.
FAULTS = """
import ctypes, resource
from metamom.common.allocator import keep_freed_memory, reuse_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        blocks = [libc.malloc(2**20) for _ in range(COUNT)]
        for block in blocks:
            ctypes.memset(block, 1, 2**20)
        for block in reversed(blocks):
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
tried = CALL()
faults()
print(int(tried), before, faults())
"""


def test_the_heap_keeps_what_one_meta_gradient_frees_unless_the_user_has_set_thresholds() -> None:
    if not has_glibc():
        pytest.skip("needs glibc")
    tried, before, after = _faults(PLAIN)
    assert tried == 1
    assert before > 10_000  # 3 x 40 MiB in pages of 4 KiB are 30,720
    assert after < before / 20
    tried, before, after = _faults({**PLAIN, "MALLOC_TRIM_THRESHOLD_": "131072"})
    assert tried == 0
    assert before > 10_000
    assert after > before / 2


def test_commands_keep_more_than_a_gibibyte() -> None:
    if not has_glibc():
        pytest.skip("needs glibc")
    took_effect, before, after = _faults(PLAIN, "keep_freed_memory", mebibytes=1100, times=1)
    assert took_effect == 1
    assert before > 100_000
    assert after < before / 20


def _faults(
    environment: dict[str, str], call: str = "reuse_freed_memory", *, mebibytes: int = 40, times: int = 3
) -> list[int]:
    code = FAULTS.replace("COUNT", str(mebibytes)).replace("CALL", call).replace("TIMES", str(times))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_"]
)
def test_a_threshold_of_the_user_is_respected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = f"glibc.malloc.{name.removeprefix('MALLOC_').rstrip('_').lower()}=131072"
    assert set_by_user({name: "131072"})
    assert set_by_user({"GLIBC_TUNABLES": tunable})
    assert set_by_user({"GLIBC_TUNABLES": f"glibc.malloc.arena_max=2:{tunable}"})
    monkeypatch.setenv(name, "131072")
    assert not reuse_freed_memory.__wrapped__()
    assert not keep_freed_memory()


def test_other_settings_are_not_thresholds() -> None:
    assert not set_by_user({})
    assert not set_by_user({"GLIBC_TUNABLES": "", "MALLOC_ARENA_MAX": "2", "MALLOC_PERTURB_": "1"})
    assert not set_by_user({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=2"})
    assert not set_by_user({"MALLOC_TRIM_THRESHOLD_": ""})  # as glibc takes it


def test_other_systems_and_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(allocator.torch, "empty", refuse)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not reuse_freed_memory.__wrapped__()
    monkeypatch.setattr(sys, "platform", "linux")
    for confstr in (lambda name: None, lambda name: "", _unknown):
        monkeypatch.setattr(os, "confstr", confstr)
        assert not reuse_freed_memory.__wrapped__()


def _unknown(name: str) -> str:
    raise ValueError("unrecognized configuration name")
