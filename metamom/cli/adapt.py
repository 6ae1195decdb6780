"""``metamom adapt``: adapt a trained meta-learner to one's own classes, from a few images of each."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path

from metamom.cli.flags import add_checkpoint, add_device, add_model, flag, switch
from metamom.cli.parser import Parser
from metamom.common.choices import NORMS
from metamom.common.flag_types import path, step_count


def add(kinds: argparse._SubParsersAction[Parser]) -> None:
    """Add the command to the parser."""
    leaf = kinds.add_parser(
        "adapt",
        help="adapt a trained meta-learner to your own classes, and classify images",
        usage="%(prog)s RUN --support DIR --predict PATH [PATH ...] [options]",
        examples=(
            "metamom adapt runs/photos --support examples --predict inbox",
            "metamom adapt runs/photos --support examples --predict a.jpg b.jpg --out predictions.csv",
        ),
    )
    leaf.set_defaults(run=run, leaf=leaf)
    task = leaf.add_argument_group("task")
    task.add_argument(
        "--support", required=True, type=path, metavar="DIR", help="DIR/CLASS/*.jpg: a few images of each (required)"
    )
    task.add_argument(
        "--predict",
        type=path,
        nargs="+",
        metavar="PATH",
        help="image files to classify, and folders, of which all images count, also those in folders below "
        "(default: none, with --save alone)",
    )
    learner = leaf.add_argument_group("learner")
    flag(learner, "--steps", "inner steps", "as in training", type=step_count)
    flag(
        learner,
        "--norm",
        "statistics that normalise: of the support set (support), the model's running ones (frozen), or of the images "
        "that are classified together (batch)",
        "frozen if so trained, else support",
        choices=NORMS,
    )
    own = leaf.add_argument_group("run")
    own.add_argument("run_path", type=path, metavar="RUN", help="the run directory, of a run on image files")
    add_checkpoint(own)
    add_model(own)
    add_device(own, default="cpu")
    flag(own, "--out", "a CSV file for the predictions", "print them", type=path, metavar="FILE")
    flag(own, "--save", "a safetensors file for the adapted weights", "do not", type=path, metavar="FILE")
    switch(own, "--json", "print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its flags; the result is its exit status."""
    from metamom.common.files import write_atomically
    from metamom.experiments.adapted import adapt_to_folder, reader_of, save
    from metamom.loading import load
    from metamom.tasks.preprocessing import image_paths

    if arguments.out and Path(arguments.out).suffix.lower() != ".csv":  # it might be one of the images
        raise ValueError(f"--out writes a CSV file: name it NAME.csv; got {arguments.out}.")
    if not arguments.predict and not arguments.save:
        raise ValueError("nothing to do: give images to classify (--predict), or a file for the weights (--save).")
    if arguments.predict:
        image_paths(arguments.predict)  # a file that is not there is noticed before the work
    trained = load(arguments.run_path, arguments.checkpoint, arguments.model, device=arguments.device)
    reader = reader_of(trained.recipe, trained.settings)
    adapted = adapt_to_folder(reader, trained.learner, arguments.support, steps=arguments.steps, norm=arguments.norm)
    predictions = adapted.predict(arguments.predict or ())
    if arguments.save:
        save(adapted, arguments.save, trained.card())
    if arguments.json:
        print(
            json.dumps(
                {
                    "classes": adapted.classes,
                    "steps": adapted.steps,
                    "norm": adapted.norm,
                    "predictions": [each.as_json(adapted.classes) for each in predictions],
                }
            )
        )
    if arguments.out:
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("file", "class", "probability"))
        rows.writerows((each.file, each.name, f"{each.probability:.6f}") for each in predictions)
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(arguments.out), text.getvalue().encode())
    if arguments.json:
        return 0
    print(f"adapted to {len(adapted.classes)} classes, {adapted.images} images, in {adapted.steps} step(s)")
    if arguments.out:
        print(f"{len(predictions)} predictions: {arguments.out}")
    elif predictions:
        width = min(60, max(len(each.file) for each in predictions))
        print(f"{'file':<{width}}  probability  class")
        for each in predictions:
            print(f"{each.file:<{width}}  {each.probability:<11.3f}  {each.name}")
    if arguments.save:
        print(f"weights: {arguments.save}")
    return 0
