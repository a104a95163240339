"""The verb `study`: which difference between the heads makes the difference."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import emit, say

__all__ = ["add_study"]

_FACTORS = ("label", "negatives", "loss")
"""What is studied where nothing else is said: what R-CNN and Fast R-CNN changed at once."""
_OF_REGIONS = ("label", "negatives")
"""What says nothing of whole images, each a positive of its class and a negative of all others."""
_FACTORS_OF_IMAGES = ("loss", "kernel", "rows")
"""What is studied of them."""


def add_study(study: argparse.ArgumentParser) -> None:
    """Add the options of `study`."""
    study.add_argument("data", help=shared.DATA_HELP)
    study.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and figures go here")
    study.add_argument(
        "--factors",
        metavar="A,B",
        help=f"some of label, negatives, loss, kernel, rows (default {','.join(_FACTORS)}, of whole images "
        f"{','.join(_FACTORS_OF_IMAGES)})",
    )
    shared.add_experiment_options(study, without=("choice",))
    study.set_defaults(run=_study, resumes=True)


def _study(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.training import configured
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.study import design, run_study
    from rcnn_svm.report.provenance import typed
    from rcnn_svm.report.study import write_study

    config = replace(configured(options, choose=True), choose=True)
    config = replace(config, data=for_these_data(config.data))
    whole = config.data.whole_images
    names = _FACTORS_OF_IMAGES if whole else _FACTORS
    if options.factors is not None:
        names = tuple(name.strip() for name in options.factors.split(",") if name.strip())
    if whole and (none := [name for name in names if name in _OF_REGIONS]):
        raise ConfigError(
            f"--factors: must make a difference on whole images, each a positive of its class and a negative "
            f"of the others, got {' and '.join(none)}. Some of {', '.join(_FACTORS_OF_IMAGES)} do."
        )
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
