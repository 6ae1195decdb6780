"""``metamom reproduce``: the paper's two experiments, and our runs beside the authors'."""

from __future__ import annotations

import argparse

from metamom.cli.flags import with_specs
from metamom.common.allocator import keep_freed_memory
from metamom.common.flag_types import long_count, number, path, seed, task_count


def add(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    from metamom.experiments.paper.run import EPOCHS

    experiments = kinds.add_parser("reproduce", help="the paper's experiments, run by run").add_subparsers(
        required=True, metavar="EXPERIMENT"
    )
    for dataset, epochs in EPOCHS.items():
        leaf = experiments.add_parser(dataset, help=f"on {dataset}", allow_abbrev=False, **with_specs())
        leaf.set_defaults(run=run, dataset=dataset)
        leaf.add_argument(
            "--nodes", type=task_count, default=100, help="workers, each with a part of the images (default: 100)"
        )
        leaf.add_argument("--lr", type=number, default=0.5, help="step size γ (default: 0.5)")
        leaf.add_argument(
            "--beta", type=number, default=0.1, help="weight of the new gradient, 1 for SGD (default: 0.1)"
        )
        leaf.add_argument(
            "--bias", default="none", metavar="SPEC", help="operator on each gradient, see below (default: none)"
        )
        leaf.add_argument("--seed", type=seed, default=0, help="of the initial weights (default: 0)")
        leaf.add_argument("--epochs", type=long_count, help=f"total number of updates (default: {epochs})")
        leaf.add_argument(
            "--chunk", type=task_count, metavar="N", help="nodes at a time (default: what fits into 2 GB in all)"
        )
        leaf.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
        leaf.add_argument(
            "--data-root",
            type=path,
            metavar="DIR",
            help="where the data is (default: $METAMOM_DATA, else the user's data folder)",
        )
        leaf.add_argument("--run-dir", type=path, metavar="RUN", required=True, help="where it goes")
        leaf.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, or start it")
    table = experiments.add_parser("table", help="our runs beside the authors'", allow_abbrev=False)
    table.set_defaults(run=run_table)
    table.add_argument("--paper", type=path, metavar="RESULTS_DIR", required=True, help="the authors' results")
    table.add_argument(
        "--run-dir", type=path, metavar="RUN", required=True, help="with our runs; the report goes there"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.experiments.paper.run import reproduce

    keep_freed_memory()
    rows = reproduce(
        arguments.dataset,
        run_dir=arguments.run_dir,
        nodes=arguments.nodes,
        lr=arguments.lr,
        beta=arguments.beta,
        bias=arguments.bias,
        seed=arguments.seed,
        epochs=arguments.epochs,
        chunk=arguments.chunk,
        device=arguments.device,
        root=arguments.data_root,
        resume=arguments.resume,
    )
    last = rows[-1]
    print(f"after epoch {len(rows)}: train loss {last.train_loss:.4f}, test accuracy {last.test_acc:.4f}")
    print(f"next: metamom reproduce table --paper RESULTS_DIR --run-dir {arguments.run_dir}")
    return 0


def run_table(arguments: argparse.Namespace) -> int:
    """Compare our runs with the published ones; the result is an exit status."""
    from metamom.experiments.paper.table import table

    print(f"report: {table(arguments.paper, arguments.run_dir)}")
    return 0
