"""The verbs `study`: which difference between the heads makes the difference; `curve`: what images bring."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import emit, say

__all__ = ["add_curve", "add_study"]

_FACTORS = ("label", "negatives", "loss", "kernel", "rows", "layer", "proposals")
_OF_REGIONS = ("label", "negatives", "proposals")
"""What says nothing of whole images, each a positive of its class and a negative of all others."""


def add_study(study: argparse.ArgumentParser) -> None:
    """Add the options of `study`."""
    study.add_argument(
        "data",
        help=f"{shared.DATA_HELP}; `cnn` studies the parts of a small network instead, with --out, --seed, "
        f"--jobs and --quick as its only options",
    )
    study.add_argument("--out", type=Path, required=True, metavar="DIR", help="tables and figures go here")
    study.add_argument(
        "--factors",
        metavar="A,B",
        help=f"some of {', '.join(_FACTORS)} (default all that there are; label, negatives and loss with "
        f"--quick)",
    )
    study.add_argument(
        "--seeds", type=int, metavar="N", help="train everything so many times (default 3, 1 with --quick)"
    )
    study.add_argument(
        "--thorough",
        action="store_true",
        help="levels that take many times as long, too: negatives mined once, the intersection kernel, and a "
        "grid of 10,000 boxes",
    )
    study.add_argument(
        "--curve",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="learning curves of three heads as well, as `rcnn-svm curve` draws them (default: yes)",
    )
    _add_draws(study)
    shared.add_experiment_options(study, without=("choice",))
    shared.add_cluster_option(study)
    study.set_defaults(run=_study, resumes=True)


def add_curve(curve: argparse.ArgumentParser) -> None:
    """Add the options of `curve`."""
    curve.add_argument("data", help=shared.DATA_HELP)
    curve.add_argument("--out", type=Path, required=True, metavar="DIR", help="table and figure go here")
    _add_draws(curve)
    shared.add_experiment_options(curve, without=("choice", "learn"))
    curve.set_defaults(run=_curve, resumes=True)


def _add_draws(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draws", type=int, metavar="N", help="draw each size so many times (default 10, 3 with --quick)"
    )


def _n_draws(options: argparse.Namespace) -> int:
    quick = options.preset == "quick"
    n: int = options.draws if options.draws is not None else 3 if quick else 10
    if n < 1:
        raise ConfigError(f"--draws must be 1 or more, got {n}.")
    return n


def _curve(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.training import configured
    from rcnn_svm.experiment.curve import learning_curve
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.design import three_heads
    from rcnn_svm.report.curve import write_curve
    from rcnn_svm.report.provenance import typed

    config = replace(configured(options, choose=True), learn="nothing")
    config = replace(config, data=for_these_data(config.data))
    n_draws, splits = _n_draws(options), load_data(config.data, seed=config.seed)
    curve = learning_curve(config.build(), splits, shared.run_of(options), three_heads(), n_draws=n_draws)
    command = " ".join(["rcnn-svm", *map(typed, options.words)])
    for sentence in write_curve(options.out, curve, splits.test, command=command, seed=config.seed):
        emit(sentence)
    say(f"Table and figure: {options.out}")


def _study(options: argparse.Namespace) -> None:
    if options.data == "cnn":
        from rcnn_svm.cli.cnn_studying import study_cnn

        study_cnn(options.words)
        return
    from rcnn_svm.cli.training import configured
    from rcnn_svm.experiment.curve import learning_curve
    from rcnn_svm.experiment.data import for_these_data, load_data
    from rcnn_svm.experiment.design import design, factors_of, three_heads
    from rcnn_svm.experiment.study import run_study
    from rcnn_svm.report.provenance import typed
    from rcnn_svm.report.study import write_study

    quick = options.preset == "quick"
    config = configured(options, choose=True)
    config = replace(config, data=for_these_data(config.data))
    parts = config.build()
    n_seeds = options.seeds if options.seeds is not None else 1 if quick else 3
    if n_seeds < 1:
        raise ConfigError(f"--seeds must be 1 or more, got {n_seeds}.")
    n_draws = _n_draws(options)
    there = [name for name, factor in factors_of(parts).items() if len(factor.levels) > 1]
    if whole := config.data.whole_images:
        there = [name for name in there if name not in _OF_REGIONS]
    names = tuple(there)
    if quick:
        names = tuple(name for name in names if name in ("label", "negatives", "loss"))
    if options.factors is not None:
        names = tuple(name.strip() for name in options.factors.split(",") if name.strip())
    if whole and (none := [name for name in names if name in _OF_REGIONS]):
        raise ConfigError(
            f"--factors: must make a difference on whole images, each a positive of its class and a negative "
            f"of the others, got {' and '.join(none)}. Some of {', '.join(there)} do."
        )
    plan = design(names, parts, thorough=options.thorough)
    n_cells = len(plan.trained)
    say(
        f"{n_cells} cells, each with six settings to choose from, "
        f"{f'{n_seeds} times' if n_seeds > 1 else 'once'}; {len(plan.cells) - n_cells} combinations are none."
    )
    splits = load_data(config.data, seed=parts.seed)
    run, curve = shared.run_of(options), None
    study = run_study(parts, splits, run, plan, n_seeds=n_seeds)
    if options.curve:
        curve = learning_curve(parts, splits, run, three_heads(), n_draws=n_draws)
    command = " ".join(["rcnn-svm", *map(typed, options.words)])
    for sentence in write_study(options.out, study, curve, command=command):
        emit(sentence)
    say(f"Tables and figures: {options.out}")
