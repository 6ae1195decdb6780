"""The tests' own processes: forked from one that has imported what they need."""

from __future__ import annotations

from pathlib import Path

from forked import CONTEXT, run_forked
from imported import write_modules
from processes import SUPPORT


def test_a_forked_process_imports_nothing_but_the_tests_support(tmp_path: Path) -> None:
    """Those of `forked` itself take half a second, in each of them."""
    process = CONTEXT.Process(target=write_modules, args=(tmp_path / "before",))
    process.start()
    process.join()
    ((status, said),) = run_forked(write_modules, 1, tmp_path, tmp_path / "after")
    assert status == 0, said
    before, after = ((tmp_path / name).read_text().split("\n") for name in ("before", "after"))
    assert "metamom.cli.app" in before
    support = {file.stem for file in SUPPORT.glob("*.py")}
    assert {"forked"} <= set(after) - set(before) <= support
