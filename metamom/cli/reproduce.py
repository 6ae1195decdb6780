"""``metamom reproduce``: the paper's two experiments next to the authors', and published recipes of the field."""

from __future__ import annotations

import argparse

from metamom.cli import reproduce_published
from metamom.cli.flags import add_data_root, add_device, flag, switch
from metamom.cli.parser import Parser
from metamom.common.flag_types import long_count, number, path, seed, task_count
from metamom.experiments.defaults import EPOCHS


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    experiments = kinds.add_parser("reproduce", help="published experiments, run by run").add_subparsers(
        required=True, metavar="EXPERIMENT"
    )
    for dataset, epochs in EPOCHS.items():
        leaf = experiments.add_parser(
            dataset,
            help=f"on {dataset}",
            usage="%(prog)s --run-dir RUN [options]",
            specs=True,
            examples=(
                f"metamom reproduce {dataset} --bias topk:33500 --run-dir runs/paper/topk",
                f"metamom reproduce {dataset} --beta 1 --seed 1 --run-dir runs/paper/sgd --resume",
            ),
        )
        leaf.set_defaults(run=run, dataset=dataset, leaf=leaf)
        add_data_root(leaf.add_argument_group("task"))
        operators = leaf.add_argument_group("bias")
        flag(operators, "--nodes", "workers, each with a part of the images", type=task_count, default=100)
        flag(operators, "--bias", "operator on each gradient, see below", default="none", metavar="SPEC")
        optimizer = leaf.add_argument_group("optimizer")
        flag(optimizer, "--lr", "step size γ", type=number, default=0.5)
        flag(optimizer, "--beta", "weight of the new gradient, 1 for SGD", type=number, default=0.1)
        own = leaf.add_argument_group("run")
        own.add_argument("--run-dir", type=path, metavar="RUN", required=True, help="run directory (required)")
        switch(own, "--resume", "continue the run in --run-dir, or start it")
        flag(own, "--epochs", "total number of updates", epochs, type=long_count)
        flag(own, "--seed", "of the initial weights", type=seed, default=0)
        add_device(own, default="cpu")
        flag(own, "--chunk", "nodes at a time", "as many as fit into 2 GB in all", type=task_count, metavar="N")
    reproduce_published.add(experiments)
    table = experiments.add_parser(
        "table",
        help="our runs next to the authors'",
        usage="%(prog)s --paper RESULTS_DIR --run-dir RUN",
        examples=(
            "metamom reproduce table --paper results --run-dir runs/paper",
            "metamom reproduce table --paper results --run-dir runs/paper/topk",
        ),
    )
    table.set_defaults(run=run_table, leaf=table)
    own = table.add_argument_group("run")
    own.add_argument("--paper", type=path, metavar="RESULTS_DIR", required=True, help="the authors' results (required)")
    own.add_argument(
        "--run-dir", type=path, metavar="RUN", required=True, help="with our runs; the report goes there (required)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.common.allocator import keep_freed_memory
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
