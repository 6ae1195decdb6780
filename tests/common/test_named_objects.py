"""Objects by the name that a user gives on the command line."""

from __future__ import annotations

import sys

import pytest

from metamom.common.named_objects import created, module_folder, named_callable


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "nets_of_mine.py").write_text(
        "class Net:\n    @staticmethod\n    def make():\n        return 1\nnumber = 3\n"
        "def fails(ways): return {}[ways]\n"
    )
    (tmp_path / "needs_more.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "misspelt.py").write_text("x = 1\ny = = 2\n")
    (tmp_path / "breaks.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    yield tmp_path
    for name in ("nets_of_mine", "needs_more", "breaks", "package", "package.inner"):
        sys.modules.pop(name, None)


def test_what_is_found(here):
    assert named_callable("nets_of_mine:Net").__name__ == "Net"
    assert named_callable("nets_of_mine:Net.make")() == 1
    assert named_callable("collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nets_of_mine", r"is named as PACKAGE\.MODULE:CALLABLE, such as my_models:Net; got 'nets_of_mine'"),
        ("nets_of_mine:", "is named as"),
        (":Net", "is named as"),
        ("nets_of_mine.py:Net", r"there is no module nets_of_mine\.py"),
        ("nets-of-mine:Net", "is named as"),
        ("nowhere:Net", r"there is no module nowhere, here in .*"),
        ("nets_of_mine:Nett", "nets_of_mine has no Nett; did you mean Net?"),
        ("nets_of_mine:number", "must be a class or a function that returns it; got an int"),
        ("needs_more:Net", "needs_more imports nothing_of_this_name, which is not installed"),
    ],
)
def test_what_is_refused(text, message, here):
    with pytest.raises(ValueError, match=message):
        named_callable(text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", r"the import of breaks raised RuntimeError: at import \(.*breaks\.py, line 1\)$"),
        ("misspelt", r"the import of misspelt raised SyntaxError: .* \(.*misspelt\.py, line 2\)$"),
    ],
)
def test_errors_of_the_module(name, message, here):
    with pytest.raises(ValueError, match=message):
        named_callable(f"{name}:Net")


def test_errors_of_the_callable(here):
    create = named_callable("nets_of_mine:fails")
    with pytest.raises(ValueError, match=r"the model nets_of_mine:fails\(ways=3\) raised KeyError: 3 \(.*, line 6\)$"):
        created("nets_of_mine:fails", create, {"ways": 3})
    with pytest.raises(ValueError, match=r"the model nets_of_mine:fails\(\) raised TypeError: .* 'ways'$"):
        created("nets_of_mine:fails", create)


def test_the_folder_of_a_module(here):
    (here / "package" / "inner").mkdir(parents=True)
    (here / "package" / "inner" / "__init__.py").write_text("def net():\n    pass\n")
    named_callable("package.inner:net")
    assert module_folder("package.inner:net") == str(here)
    assert module_folder("never_imported:net") is None
    with pytest.raises(ValueError, match=r"It was in /else before: start from there \(cd /else\), or set PYTHONPATH"):
        named_callable("nowhere:Net", folder="/else")
