"""The notebooks run from top to bottom, what their text claims holds, and their outputs are stored.

Their code cells are executed as plain Python, so that tests need no Jupyter. To store new outputs after a change:
``pip install nbclient ipykernel``, then ``jupyter execute --inplace docs/notebooks/NAME.ipynb`` in an environment that
has metamom, and remove everything but the kernel from the notebook's metadata.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MOST_BYTES = 300_000
SOMEBODYS_PATH = re.compile(r"/(home|Users|work|tmp|root|var|usr|opt)/|[A-Z]:\\\\")

Namespace = dict[str, Any]

SMALL: dict[str, Namespace] = {  # in place of the settings in the notebook's cell of that tag
    "sinusoids": {"ITERATIONS": 100, "SEEDS": (1,), "STEP_SIZES": {1.0: (0.06,), 0.1: (0.25,)}},
    "images": {"ITERATIONS": 20, "TEST_TASKS": 10},
    "compression": {"ITERATIONS": 150, "SINUSOID_ITERATIONS": 20},
}


def notebook(name: str) -> dict[str, Any]:
    """The JSON of a notebook."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return found


def code_cells(name: str) -> list[dict[str, Any]]:
    """Its code cells."""
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]


def executed(name: str, settings: Namespace) -> Namespace:
    """Run all code cells in order; these settings replace those of the cell tagged ``parameters``."""
    namespace: Namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(name)):
        exec(compile("".join(cell["source"]), f"{name}, code cell {number}", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            unknown = settings.keys() - namespace.keys()
            assert not unknown, f"{name} has no settings {sorted(unknown)}"
            namespace.update(settings)
    return namespace


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder with a cache of its own, without a screen, and put torch's seed and the figures back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    plt.switch_backend("Agg")
    with torch.random.fork_rng():
        yield
    plt.close("all")
    plt.switch_backend(before)


def sinusoids_learn(after: Namespace) -> None:
    """Training lowers the error, and one inner step on the trained weights helps more than ten on untrained ones."""
    for errors in after["curves"].values():
        assert errors[-1] < errors[0]
    trained, untrained = after["results"]["meta-trained"], after["results"]["untrained"]
    assert trained.mean[1] < trained.mean[0]
    assert trained.mean[1] < untrained.mean[3]


def images_adapt(after: Namespace) -> None:
    """Training raises the accuracy after one step, and the loaded weights are the saved ones."""
    assert after["trained"].mean[1] > after["untrained"].mean[1]
    assert after["losses"][-1] < after["losses"][0]
    assert after["same"]


def compression_biases(after: Namespace) -> None:
    """Top-K ends above both kinds of error feedback, which send as few bytes; no compression sends 50 times as many."""
    ends, sent = after["ends"], {name: sent[-1] for name, (_, sent) in after["quadratics"].items()}
    assert ends["Top-K 1 %"] > 3 * max(ends["EF21"], ends["EF21-SGDM"])
    assert sent["no compression"] == 50 * sent["Top-K 1 %"] == 50 * sent["EF21"] == 50 * sent["EF21-SGDM"]


def sinusoids_text(after: Namespace) -> None:
    """Momentum uses the larger step size and, in the mean over the seeds, ends lower."""
    sinusoids_learn(after)
    assert after["chosen"][0.1] > after["chosen"][1.0]
    ends = {beta: sum(after["curves"][beta, seed][-1] for seed in after["SEEDS"]) for beta in (1.0, 0.1)}
    assert ends[0.1] < ends[1.0]


def images_text(after: Namespace) -> None:
    """The learner is ahead of the baselines that leave the features as they are, and of chance with five images."""
    images_adapt(after)
    for name in ("nearest centroid", "linear probe"):
        assert after["trained"].mean[-1] > after["found"][name].mean[0]
    assert (after["guesses"] == after["truth"]).float().mean() > 0.4


def compression_text(after: Namespace) -> None:
    """The floors are in the order that the text gives, the uncompressed one on its law, and the bound is no guide."""
    compression_biases(after)
    ends = after["ends"]
    assert ends["no compression"] == pytest.approx(after["law"], rel=0.5)
    assert ends["EF21-SGDM"] < ends["EF21"] / 3
    assert ends["Top-K, larger step"] > 5 * ends["EF21"]
    assert after["bound"] > after["quadratics"]["EF21"][0][0]
    for errors, _ in after["sinusoids"].values():
        assert errors[-1] < errors[0]
        assert errors[-1] >= after["sinusoids"]["no compression"][0][-1]


Check = Callable[[Namespace], None]
SMALL_CLAIMS: dict[str, Check] = {
    "sinusoids": sinusoids_learn,
    "images": images_adapt,
    "compression": compression_biases,
}
CLAIMS: dict[str, Check] = {"sinusoids": sinusoids_text, "images": images_text, "compression": compression_text}


@pytest.mark.parametrize("name", NAMES)
def test_runs_with_small_settings(name: str) -> None:
    SMALL_CLAIMS[name](executed(name, SMALL[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_the_text_says_holds_with_the_settings_shown(name: str) -> None:
    CLAIMS[name](executed(name, {}))


@pytest.mark.parametrize("name", NAMES)
class TestStored:
    """What is committed."""

    def test_outputs_of_a_run_from_top_to_bottom_without_errors(self, name: str) -> None:
        cells = code_cells(name)
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert any(output["output_type"] == "stream" for output in outputs)
        for output in outputs:
            assert output["output_type"] in ("stream", "display_data", "execute_result")
            assert output.get("name") != "stderr", output["text"]

    def test_no_paths_of_the_machine(self, name: str) -> None:
        stored = notebook(name)
        for cell in stored["cells"]:
            text = [cell["source"], cell["metadata"]]
            for output in cell.get("outputs", []):
                data = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
                text += [output.get("text"), data]
            assert not (found := SOMEBODYS_PATH.search(json.dumps(text))), found
        assert stored["metadata"]["kernelspec"]["name"] == "python3"
        assert stored["metadata"].keys() == {"kernelspec", "language_info"}

    def test_small(self, name: str) -> None:
        assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES

    def test_every_picture_has_a_text_alternative(self, name: str) -> None:
        for cell in code_cells(name):
            if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
                assert len(cell["metadata"].get("alt", "")) > 20, "".join(cell["source"])[:80]

    def test_page_shows_text_code_and_pictures(self, name: str) -> None:
        stored = notebook(name)
        page = pages().as_page(stored, name)
        assert page.markdown.startswith("# ")
        assert f"({name}.ipynb)" in page.markdown
        assert page.markdown.count("```python") == len(code_cells(name))
        for picture, content in page.pictures.items():
            assert f"]({picture})" in page.markdown
            assert content.startswith(b"\x89PNG")


def test_page_refuses_a_notebook_with_an_error() -> None:
    cell = {"cell_type": "code", "source": ["1/0"], "metadata": {}, "outputs": [{"output_type": "error"}]}
    with pytest.raises(ValueError, match=r"broken\.ipynb has 'error'"):
        pages().as_page({"cells": [{"cell_type": "markdown", "source": ["# Broken"]}, cell]}, "broken")


def test_page_names_pictures_by_number() -> None:
    picture = {"output_type": "display_data", "data": {"image/png": base64.b64encode(b"\x89PNG").decode()}}
    cell = {"cell_type": "code", "source": ["plot()"], "metadata": {"alt": "A line."}, "outputs": [picture, picture]}
    page = pages().as_page({"cells": [{"cell_type": "markdown", "source": ["# Two"]}, cell]}, "two")
    assert list(page.pictures) == ["two-1.png", "two-2.png"]
    assert "![A line.](two-2.png)" in page.markdown


def test_page_joins_what_a_cell_prints() -> None:
    printed = [{"output_type": "stream", "name": "stdout", "text": [f"{word}\n"]} for word in ("one", "two")]
    cell = {"cell_type": "code", "source": ["talk()"], "metadata": {}, "outputs": printed}
    page = pages().as_page({"cells": [{"cell_type": "markdown", "source": ["# Words"]}, cell]}, "words")
    assert '```text title="Output"\none\ntwo\n```' in page.markdown


def pages() -> Any:
    """The module that makes the pages."""
    spec = importlib.util.spec_from_file_location("notebook_pages", ROOT / ".ci" / "notebook_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
