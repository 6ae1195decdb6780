"""The loop of a run, with its directory: metrics, checkpoints, interrupts, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from metamom.bias import BiasOperator, NonFiniteError, TopK, parse
from metamom.common.checks import MOST, check_whole
from metamom.common.files import write_atomically
from metamom.common.numbers import plural
from metamom.experiments.defaults import EPOCHS as EPOCHS
from metamom.experiments.paper.protocol import Protocol, protocol
from metamom.experiments.paper.training import Row, Training
from metamom.experiments.recipes import find_device
from metamom.tasks.checks import check_seed
from metamom.tasks.locate import PathLike
from metamom.training.directory import RunDirectory, read_log
from metamom.training.progress import Progress
from metamom.training.session import Session

HEADER = ",".join(("", *Row._fields))
SAVE_AFTER = 10.0  # seconds of work (or one epoch) that a crash may cost
REMEDIES = ""  # for divergence: only the step size and the operator can be changed


def reproduce(
    dataset: str,
    *,
    run_dir: str | Path,
    nodes: int = 100,
    lr: float = 0.5,
    beta: float = 0.1,
    bias: BiasOperator | str = "none",
    seed: int = 0,
    epochs: int | None = None,
    chunk: int | None = None,
    device: str = "cpu",
    root: PathLike | None = None,
    resume: bool = False,
) -> list[Row]:
    """Run one of the paper's experiments as its authors ran it.

    Besides the usual files, ``run_dir`` gets ``metrics.csv`` with the columns of the authors' files, one line per
    epoch. Ctrl-C and SIGTERM finish the current epoch, save and raise.

    Args:
        dataset: ``"mnist"`` or ``"fashion"``.
        run_dir: the run's directory.
        nodes: n; must divide 60,000.
        lr: gamma > 0.
        beta: weight of the new gradient, 0 < beta <= 1; 1 is SGD.
        bias: the operator on each node's gradient, or its SPEC (see `metamom.bias.parse`). Top-K keeps ties here, all
            entries of at least the K-th largest magnitude, as the authors' does.
        seed: of the weights and of the flips.
        epochs: total number of updates, including those before a resume; ``None`` for the authors' (200, 300).
        chunk: nodes computed at a time, without effect on results; ``None`` for as many as fit the run in 2 GB, its
            data, the operator's state and checkpoints included.
        device: ``"cpu"``, ``"cuda"``.
        root: data root; else ``$METAMOM_DATA``, else the per-user data folder.
        resume: continue from the newest good checkpoint, or start from the beginning if there is none.

    Returns:
        All epochs' metrics, those before a resume included.

    Raises:
        ValueError: for an argument out of range, missing or damaged data, a directory in use, with a run in it while
            ``resume`` is false, or with a run of other settings; without a chunk, for a run that takes more than 2 GB.
        DivergedError: when the training loss is no longer finite.
        TrainingInterrupted: by a signal, after saving.

    Reference:
        arXiv 2403.00853, experiments on MNIST and Fashion-MNIST.
    """
    kind = protocol(dataset)
    epochs = EPOCHS[dataset] if epochs is None else epochs
    check_whole("epochs", epochs, 1, MOST)
    check_seed(seed)
    operator = parse(bias) if isinstance(bias, str) else bias
    training = Training(
        kind,
        kind.data("train", root),
        kind.data("test", root),
        nodes=nodes,
        lr=lr,
        beta=beta,
        bias=_as_the_authors(operator),
        seed=seed,
        chunk=chunk,
        device=find_device(device),
    )
    settings = _settings(kind, training, lr=lr, beta=beta, bias=operator, seed=seed)
    length = {"epochs": epochs, "chunk": training.chunk, "device": device}
    with RunDirectory(run_dir, settings, length=length, resume=resume) as run:
        return _epochs(training, epochs, run, dataset)


def _epochs(training: Training, epochs: int, run: RunDirectory, label: str) -> list[Row]:
    """Do the remaining epochs, and return the metrics of all."""
    seconds = _restored(training, run)
    if epochs < training.epochs:
        raise ValueError(
            f"the run in {run.path} has done {training.epochs} {plural(training.epochs, 'epoch')}, more than the total "
            f"of {epochs}. Pass epochs (--epochs) above {training.epochs} to go on, or take another directory for a "
            "shorter run."
        )
    rows = _rows_before(training.epochs, run.path)
    # the copy first: after a crash, metrics.jsonl still shows that the file is this run's
    write_atomically(run.path / "metrics.csv", "".join(f"{line}\n" for line in [HEADER, *_lines(rows)]).encode())
    run.forget_metrics_from(training.epochs)
    run.write_config()
    session = Session(
        Progress(training.epochs, seconds, None),
        epochs,
        _Store(training, run),
        run=run,
        path=run.path,
        label=label,
        unit="epoch",
        hidden=None,
        due=lambda done, since: since >= SAVE_AFTER,
        remedies=REMEDIES,
    )
    with (run.path / "metrics.csv").open("a", encoding="utf-8") as csv, session:
        for epoch in session:
            try:
                row = training.epoch()
            except NonFiniteError as error:
                raise session.diverged("a node's gradient") from error
            session.check_finite({"the training loss": row.train_loss})
            session.stepped()
            rows.append(row)
            csv.writelines(f"{line}\n" for line in _lines([row], epoch))
            csv.flush()
            shown = {"train_loss": f"{row.train_loss:.4f}", "test_acc": f"{row.test_acc:.4f}"}
            session.finish(_metrics(epoch, row, training), shown)
    return rows


def _as_the_authors(operator: BiasOperator) -> BiasOperator:
    if not isinstance(operator, TopK):
        return operator
    return TopK(operator.k, ratio=operator.ratio, per_tensor=operator.per_tensor, ties="all")


def _settings(
    kind: Protocol, training: Training, *, lr: float, beta: float, bias: BiasOperator, seed: int
) -> dict[str, Any]:
    return {
        "experiment": "paper",
        "dataset": kind.dataset,
        "model": kind.description,
        "parameters": training.parameters,
        "nodes": training.nodes,
        "lr": lr,
        "beta": beta,
        "first_step": "gradient",
        "bias": bias.spec,
        "seed": seed,
        "dtype": "float32",
    }


def _metrics(epoch: int, row: Row, training: Training) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` without its seconds: the names that every run has, and those of ``metrics.csv``."""
    wire = training.operator.wire_bytes(training.parameters, sizes=training.sizes)
    line = {"step": epoch, "loss": row.train_loss, "accuracy": row.train_acc, **row._asdict()}
    return {**line, "world_size": 1, "wire_bytes": training.nodes * wire}


def _lines(rows: list[Row], first: int = 0) -> list[str]:
    return [",".join(map(repr, (epoch, *row))) for epoch, row in enumerate(rows, first)]


def _rows_before(epoch: int, folder: Path) -> list[Row]:
    """Epochs 0 to ``epoch - 1`` of ``metrics.jsonl``; damaged lines are taken from the copy, or are NaN."""
    copy = folder / "metrics.csv"
    lines = copy.read_bytes().split(b"\n")[:-1] if copy.is_file() else []  # without a truncated line
    found: dict[str, list[Any]] = {}
    for number, *values in (line.decode(errors="replace").split(",") for line in lines):
        found[number] = values
    for line in read_log(folder).lines:
        found[str(line["step"])] = [line.get(name) for name in Row._fields]
    return [_row(found.get(str(number), [])) for number in range(epoch)]


def _row(values: list[Any]) -> Row:
    try:
        return Row(*map(float, values))
    except (TypeError, ValueError):
        return Row(*[math.nan] * len(Row._fields))


def _refuse_copy(path: Path) -> None:
    """Refuse to overwrite a ``metrics.csv`` that has no run next to it: it may be a copy of the authors'."""
    if path.exists() and len(path.read_bytes().splitlines()) > 1:
        raise ValueError(f"{path} holds results, but no run; choose another directory.")


def _restored(training: Training, run: RunDirectory) -> float:
    """Load the newest good checkpoint into the training, and return the seconds spent before it."""
    state = run.newest_state()
    if state is None:
        _refuse_copy(run.path / "metrics.csv")
        return 0.0
    training.load_state_dict(state, f"the checkpoints in {run.path}")
    return float(state["seconds"])


class _Store:
    """A training's checkpoints; there is no best epoch."""

    def __init__(self, training: Training, run: RunDirectory) -> None:
        self.training = training
        self.run = run

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write a checkpoint."""
        state = {**self.training.state_dict(), "seconds": progress.seconds}
        self.run.checkpoints.save(progress.done, state, best=is_best)
