"""The loop of a run, with its directory: metrics, checkpoints, interrupts, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from metamom.bias import BiasOperator, NonFiniteError, TopK, parse
from metamom.common.checks import MOST, check_whole
from metamom.common.files import write_atomically
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
SAVE_AFTER = 10.0  # seconds of work that a crash may cost, or an epoch
REMEDIES = ""  # for divergence: nothing but the step size and the operator is there to be changed


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

    ``run_dir`` gets ``metrics.csv`` with the columns of the authors' files, a line as soon as its epoch is done, beside
    what every run directory holds. Ctrl-C and SIGTERM finish the epoch at hand, save and raise.

    Args:
        dataset: ``"mnist"`` or ``"fashion"``.
        run_dir: where it goes.
        nodes: n, must divide 60,000.
        lr: gamma > 0.
        beta: weight of the new gradient, 0 < beta <= 1; 1 is SGD.
        bias: the operator on each node's gradient, or its SPEC (see `metamom.bias.parse`). Top-K keeps ties here, all
            entries of at least the K-th largest magnitude, as the authors' does.
        seed: of the weights and of the flips.
        epochs: total number of updates, including those before a resume; the authors' (200, 300) if ``None``.
        chunk: nodes computed at a time, which changes no result; if ``None``, as many as keep the run within 2 GB, its
            data, the operator's state and checkpoints included.
        device: ``"cpu"``, ``"cuda"``.
        root: data root; else ``$METAMOM_DATA``, else the per-user data folder.
        resume: go on from the newest good checkpoint, or start afresh where there is none.

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
    """Do the epochs that are left, and give the metrics of all."""
    seconds = _restored(training, run)
    if epochs < training.epochs:
        raise ValueError(
            f"the run in {run.path} has done {training.epochs} epochs, more than the {epochs} asked for in all. "
            f"Pass epochs (--epochs) above {training.epochs} to go on, or take another directory for a shorter run."
        )
    rows = _rows_before(training.epochs, run.path)
    # first the copy: a crash behind it leaves the metrics that tell it from a stranger's
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
    """A line of ``metrics.jsonl``, but for its seconds: the names of every run's, and those of ``metrics.csv``."""
    wire = training.operator.wire_bytes(training.parameters, sizes=training.sizes)
    line = {"step": epoch, "loss": row.train_loss, "accuracy": row.train_acc, **row._asdict()}
    return {**line, "world_size": 1, "wire_bytes": training.nodes * wire}


def _lines(rows: list[Row], first: int = 0) -> list[str]:
    return [",".join(map(repr, (epoch, *row))) for epoch, row in enumerate(rows, first)]


def _rows_before(epoch: int, folder: Path) -> list[Row]:
    """Epochs 0 to ``epoch - 1`` of ``metrics.jsonl``; what damage has taken there is found in its copy, or NaN."""
    copy = folder / "metrics.csv"
    lines = copy.read_bytes().split(b"\n")[:-1] if copy.is_file() else []  # without one cut short
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


def _refuse_strangers(path: Path) -> None:
    """What stands in ``metrics.csv`` without a run beside it, perhaps a copy of the authors', is not written over."""
    if path.exists() and len(path.read_bytes().splitlines()) > 1:
        raise ValueError(f"{path} holds results, but there is no run beside them; choose another directory.")


def _restored(training: Training, run: RunDirectory) -> float:
    """Put the newest good checkpoint into the training; the seconds that were spent before it."""
    state = run.newest_state()
    if state is None:
        _refuse_strangers(run.path / "metrics.csv")
        return 0.0
    training.load_state_dict(state, f"the checkpoints in {run.path}")
    return float(state["seconds"])


class _Store:
    """The checkpoints of a training; of epochs none is the best."""

    def __init__(self, training: Training, run: RunDirectory) -> None:
        self.training = training
        self.run = run

    def save(self, progress: Progress, is_best: bool = False) -> None:
        """Write a checkpoint."""
        state = {**self.training.state_dict(), "seconds": progress.seconds}
        self.run.checkpoints.save(progress.done, state, best=is_best)
