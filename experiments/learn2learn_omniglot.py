"""Claim: learn2learn's published Omniglot example and metamom's trainer learn the same at the same settings.

    python -m metamom.experiments.learn2learn_omniglot --iterations 1000 --run-dir runs/learn2learn

The example is learn2learn's `maml_omniglot.py`: 5-way 1-shot, its fully connected network, one inner step of 0.5,
32 tasks an iteration, Adam with 0.003. It runs on the real Omniglot in learn2learn's own loop and in metamom's, with
Adam and with `CompositeMomentum`, from the same weights and on the same tasks; so whatever differs is rounding, which
training amplifies, and the report says how large it is. The tasks are metamom's (`metamom.tasks.Omniglot`), not
the example's: its test tasks are rotated at random too, and its split is another, so the accuracy published for it is
not comparable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from metamom.common import flag_types, tables
from metamom.common.checks import MOST
from metamom.common.files import write_atomically
from metamom.evaluation import Evaluation, evaluate
from metamom.experiments.learn2learn_loop import meta_iteration, split_task
from metamom.interop.learn2learn import AsTaskset, from_maml, import_learn2learn, seeded
from metamom.optim import CompositeMomentum
from metamom.tasks import Omniglot
from metamom.training.directory import RunDirectory, environment


@dataclass(frozen=True)
class OmniglotExample:
    """The example's settings, except for the number of iterations (60,000 there)."""

    iterations: int
    ways: int = 5
    shots: int = 1
    meta_batch: int = 32
    inner_lr: float = 0.5
    inner_steps: int = 1
    adam_lr: float = 0.003
    momentum_lr: float = 0.3
    momentum_beta: float = 0.1
    test_tasks: int = 1000
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0


class Outcome(NamedTuple):
    """A trained learner's accuracy, and its weights along the way."""

    test: Evaluation
    weights: dict[int, torch.Tensor]


Step = Callable[[int], object]


def learner_and_optimizer(config: OmniglotExample, optimizer: str) -> tuple[Any, Optimizer]:
    """The example's learner around its network, with weights from the seed, and one of the two optimizers."""
    l2l = import_learn2learn()
    with seeded(f"initial weights {config.seed}"):
        model = l2l.vision.models.OmniglotFC(28**2, config.ways).to(dtype=getattr(torch, config.dtype))
    learner = l2l.algorithms.MAML(model, lr=config.inner_lr, first_order=False)
    if optimizer == "Adam":
        return learner, Adam(learner.parameters(), lr=config.adam_lr)
    momentum = CompositeMomentum(learner.parameters(), lr=config.momentum_lr, beta=config.momentum_beta)
    return learner, momentum


def run(config: OmniglotExample, trainer: str, optimizer: str, root: str | None) -> Outcome:
    """Train in one of the two loops, then evaluate."""
    tasks = Omniglot(root, ways=config.ways, shots=config.shots, queries=config.shots, seed=config.seed)
    learner, opt = learner_and_optimizer(config, optimizer)
    ours = from_maml(learner, F.cross_entropy, inner_steps=config.inner_steps)
    step = _their_step(config, learner, opt, tasks) if trainer == "learn2learn" else _our_step(config, ours, opt, tasks)
    weights = {}
    for k in tqdm(range(config.iterations), desc=f"{trainer}, {optimizer}", disable=None):
        step(k)
        if k + 1 in (1, 10, 100, config.iterations):
            weights[k + 1] = torch.nn.utils.parameters_to_vector(learner.parameters()).detach().clone()
    test = Omniglot(root, split="test", ways=config.ways, shots=config.shots, queries=config.shots, seed=config.seed)
    return Outcome(evaluate(ours, test, tasks=config.test_tasks, steps=(0, config.inner_steps)), weights)


def _their_step(config: OmniglotExample, learner: Any, optimizer: Optimizer, sampler: Omniglot) -> Step:
    """The example's loop, fed with learn2learn-style tasks ``(data, labels)``."""

    def meta_batch(k: int) -> Iterator[Any]:
        for i in range(config.meta_batch):
            one = _OneOf(sampler, k, config.meta_batch, i)
            data, labels = AsTaskset(one)[0]
            yield split_task(data.to(getattr(torch, config.dtype)), labels, config.shots, config.ways)

    return lambda k: meta_iteration(learner, optimizer, meta_batch(k), F.cross_entropy, config.inner_steps)


def _our_step(config: OmniglotExample, learner: Any, optimizer: Optimizer, sampler: Omniglot) -> Step:
    def step(k: int) -> None:
        optimizer.zero_grad()
        learner.backward(sampler.sample(k, config.meta_batch).to(dtype=getattr(torch, config.dtype)))
        optimizer.step()

    return step


class _OneOf(NamedTuple):
    """A sampler of a single task: the i-th of a meta-batch."""

    sampler: Omniglot
    step: int
    num_tasks: int
    which: int

    def sample(self, step: int, num_tasks: int, *, rank: int = 0, world_size: int = 1) -> Any:
        return self.sampler.sample(self.step, self.num_tasks, rank=self.which, world_size=self.num_tasks)


def report(config: OmniglotExample, outcomes: dict[tuple[str, str], Outcome]) -> str:
    """The report: accuracies side by side, and the distance between the weights."""
    rows = tables.head("optimizer", "loop", "test accuracy")
    for (optimizer, trainer), outcome in outcomes.items():
        accuracy = f"{100 * outcome.test.mean[-1]:.1f} ± {100 * outcome.test.halfwidth[-1]:.1f} %"
        rows.append(tables.row(optimizer, trainer, accuracy))
    gaps = tables.head("optimizer", "after iteration", "relative difference of the weights")
    for optimizer in dict.fromkeys(o for o, _ in outcomes):
        theirs, ours = outcomes[optimizer, "learn2learn"], outcomes[optimizer, "metamom"]
        for k, weights in theirs.weights.items():
            gap = float((weights - ours.weights[k]).norm() / weights.norm())
            gaps.append(tables.row(optimizer, f"{k:,}", f"{gap:.1e}"))
    env = environment()
    lines = [
        "# learn2learn's Omniglot example, in its own loop and in metamom's",
        "",
        f"{config.ways}-way {config.shots}-shot, {config.iterations:,} iterations of {config.meta_batch} tasks, "
        f"{config.inner_steps} inner step of {config.inner_lr}; Adam {config.adam_lr}, CompositeMomentum γ = "
        f"{config.momentum_lr}, β = {config.momentum_beta}; seed {config.seed}, {config.dtype}, "
        f"{config.test_tasks:,} test tasks, ± is the 95 % interval over them; batch statistics.",
        "",
        *rows,
        "",
        "Both loops start from the same weights and see the same tasks; they sum in a different order, and training "
        "amplifies the rounding:",
        "",
        *gaps,
        "",
        f"torch {env['torch']}, Python {env['python']}, {env['threads']} threads.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all four and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m metamom.experiments.learn2learn_omniglot",
        description=str(__doc__).splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--iterations", type=flag_types.count(MOST, 1), default=1000)
    parser.add_argument("--momentum-lr", type=flag_types.number, default=0.3)
    parser.add_argument("--seed", type=flag_types.seed, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--data-root", type=flag_types.path)
    parser.add_argument("--run-dir", type=flag_types.path, default="runs/learn2learn")
    arguments = parser.parse_args()
    config = OmniglotExample(
        arguments.iterations, momentum_lr=arguments.momentum_lr, seed=arguments.seed, dtype=arguments.dtype
    )
    with RunDirectory(arguments.run_dir, asdict(config)) as directory:
        directory.write_config()
        outcomes = {
            (optimizer, trainer): run(config, trainer, optimizer, arguments.data_root)
            for optimizer in ("Adam", "CompositeMomentum")
            for trainer in ("learn2learn", "metamom")
        }
        numbers = {
            f"{optimizer}, {trainer}": {"mean": o.test.mean, "halfwidth": o.test.halfwidth}
            for (optimizer, trainer), o in outcomes.items()
        }
        write_atomically(directory.path / "outcomes.json", json.dumps(numbers, indent=2).encode())
        path = directory.path / "report.md"
        write_atomically(path, report(config, outcomes).encode())
    print(Path(path).read_text())


if __name__ == "__main__":
    main()
