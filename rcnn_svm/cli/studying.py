"""The verb `study`: which difference between the heads makes the difference."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rcnn_svm.cli import options as shared
from rcnn_svm.progress import emit, say

__all__ = ["add_study"]

_FACTORS = ("label", "negatives", "loss")
"""What is studied where nothing else is said: what R-CNN and Fast R-CNN changed at once."""


def add_study(study: argparse.ArgumentParser) -> None:
    """Add the options of `study`."""
    study.add_argument(
        "data",
        help="a VOC, COCO or YOLO data set, or `digits`; `cnn` studies the parts of a small network instead, "
        "with --out, --seed, --jobs and --quick as its only options",
    )
    study.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and figures go here")
    study.add_argument(
        "--factors",
        default=",".join(_FACTORS),
        metavar="A,B",
        help=f"some of label, negatives, loss, kernel, rows (default {','.join(_FACTORS)})",
    )
    shared.add_experiment_options(study, without=("choice",))
    study.set_defaults(run=_study, resumes=True)


def _study(options: argparse.Namespace) -> None:
    if options.data == "cnn":
        from rcnn_svm.cli.cnn_studying import study_cnn

        study_cnn(options.words)
        return
    from rcnn_svm.cli.training import configured
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.study import design, run_study
    from rcnn_svm.report.provenance import typed
    from rcnn_svm.report.study import write_study

    names = tuple(name.strip() for name in options.factors.split(",") if name.strip())
    config = replace(configured(options, choose=True), choose=True)
    cells = design(names, seed=config.seed)
    parts, run = config.build(), shared.run_of(options)
    n_cells = sum(cell.recipe is not None for cell in cells)
    say(
        f"{n_cells} heads, each with five costs to choose from; {len(cells) - n_cells} combinations are none."
    )
    splits = load_data(config.data, seed=config.seed)
    study = run_study(parts, splits, run, names)
    command = " ".join(["rcnn-svm", *map(typed, options.words)])
    for sentence in write_study(options.out, study, command=command):
        emit(sentence)
    say(f"Tables and figures: {options.out}")
