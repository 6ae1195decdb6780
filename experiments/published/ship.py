"""Turn a finished run of ``metamom reproduce omniglot`` into weights that come with metamom.

    python -m metamom.experiments.published.ship RUN [--into metamom/nets/weights]

Writes ``omniglot-ROW.safetensors`` and its card, ``omniglot-ROW.json``, for `metamom.nets.pretrained`. Runs below 97 %
are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from torch import Tensor

from metamom.common.checks import check_number
from metamom.common.files import write_atomically
from metamom.common.flag_types import folder
from metamom.common.schema import read_record
from metamom.experiments.published.outcome import FILE, Outcome
from metamom.experiments.published.recipes import OMNIGLOT, ROWS
from metamom.experiments.saved import load_run
from metamom.nets.models import Conv4
from metamom.nets.shipped import STEP_SIZES
from metamom.weights import write_tensors

LEAST = 0.97
DATA = "Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 350, 2015), 1,100 training characters turned four ways"
LICENCE_OF_DATA = "MIT, github.com/brendenlake/omniglot"


def ship(run: str | Path, into: str | Path, *, least: float = LEAST) -> Path:
    """Write the weights of a run on Omniglot, and their card.

    Args:
        run: the directory of a finished run of ``metamom reproduce omniglot``.
        into: the folder of the weights.
        least: the transductive accuracy below which the run is refused, in [0, 1].

    Returns:
        The path of the weights.

    Raises:
        ValueError: for another run, one below ``least``, and one whose checkpoint is not the tested one.
    """
    check_number("least", least)
    outcome = read_record(Outcome, Path(run) / FILE)
    if outcome.row is None:
        raise ValueError(f"ship takes runs of `metamom reproduce omniglot`; the one in {run} is on sinusoids.")
    ways, shots = ROWS[outcome.row]
    published = OMNIGLOT[outcome.recipe]
    steps = published.test_steps[ways].value
    reached, _ = outcome.named("batch").at(steps)
    if reached < least:
        raise ValueError(
            f"the run in {run} has an accuracy of {100 * reached:.1f} %; at least {100 * least:g} % is wanted."
        )
    saved = load_run(run)
    model, step_size = saved.learner.model, saved.learner.inner_lr
    learned = {name: x for name, x in step_size.items() if isinstance(x, Tensor)} if isinstance(step_size, dict) else {}
    by_entry = all(name in learned and learned[name].shape == p.shape for name, p in model.named_parameters())
    if not isinstance(model, Conv4) or not (isinstance(step_size, float) or by_entry):
        raise ValueError("only a Conv4 with one inner step size, or one for each entry of its weights, can be shipped.")
    if saved.step != outcome.checkpoint:
        raise ValueError(f"the run in {run} went on after its test: run `metamom reproduce omniglot --resume` again.")
    path = Path(into) / f"omniglot-{outcome.row}.safetensors"
    write_tensors(path, model.state_dict() | {f"{STEP_SIZES}{name}": alpha for name, alpha in learned.items()})
    options = {"inner_steps": steps} if learned else {"inner_lr": step_size, "inner_steps": steps}
    about = card(outcome, ways, shots, steps, options, hashlib.sha256(path.read_bytes()).hexdigest())
    write_atomically(path.with_suffix(".json"), (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def card(outcome: Outcome, ways: int, shots: int, steps: int, options: dict[str, Any], digest: str) -> dict[str, Any]:
    """What the card says, as JSON values."""
    tested = {
        each.name: {"mean": each.at(steps)[0], "halfwidth": each.at(steps)[1], "tasks": each.tasks}
        for each in outcome.tested
    }
    command = [*outcome.environment.get("command", [])[1:]]
    return {
        "architecture": "Conv4",
        "arguments": {"ways": ways},
        "options": options,
        "tasks": f"{ways}-way {shots}-shot Omniglot; images [1, 28, 28] in [0, 1], strokes 1 on 0",
        "trained": {
            "recipe": OMNIGLOT[outcome.recipe].title,
            "paper": OMNIGLOT[outcome.recipe].paper,
            "budget": outcome.budget,
            "optimizer": outcome.optimizer,
            "lr": outcome.lr,
            "iterations": outcome.checkpoint,
            "meta_batch": outcome.meta_batch,
            "seed": outcome.seed,
            "flags": shlex.join(_without_paths(command)),
        },
        "accuracy": {"split": "423 test characters", "adaptation_steps": steps, **tested},
        "data": DATA,
        "licence_of_data": LICENCE_OF_DATA,
        "licence": "MIT",
        "versions": {name: outcome.environment.get(name) for name in ("metamom", "torch", "python")},
        "sha256": digest,
    }


def _without_paths(words: list[str]) -> list[str]:
    """A command's words without the places on the machine where it ran."""
    found, skip = [], False
    for word in words:
        if not (skip or word in ("--run-dir", "--data-root", "--resume") or "/" in word):
            found.append(word)
        skip = word in ("--run-dir", "--data-root")
    return found


def main() -> None:
    """Write the weights of the run that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.published.ship",
        description="Ship the weights of a run on Omniglot.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=folder, metavar="RUN", help="a finished run of metamom reproduce omniglot")
    parser.add_argument("--into", type=folder, default=Path("metamom/nets/weights"), help="the folder of the weights")
    arguments = parser.parse_args()
    try:
        print(ship(arguments.run, arguments.into))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
