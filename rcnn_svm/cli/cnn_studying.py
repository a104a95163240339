"""`study cnn`: what each part of a small network is worth, on the embedded digits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rcnn_svm.cli import options as shared
from rcnn_svm.progress import emit, say

__all__ = ["study_cnn"]


def study_cnn(words: Sequence[str]) -> None:
    """Run the study.

    Args:
        words: of the command line, `study` first. An option of `study` that this one does not have is
            refused.
    """
    parser = argparse.ArgumentParser(prog="rcnn-svm study cnn")
    for known in ("verb", "data"):
        parser.add_argument(known, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    shared.add_jobs_option(parser)
    options = parser.parse_args(words)

    from rcnn_svm.experiment.cnn_study import QUICK, CnnDesign, run_cnn_study
    from rcnn_svm.report.cnn_study import write_cnn_study
    from rcnn_svm.report.provenance import typed

    design = replace(QUICK if options.quick else CnnDesign(), seed=options.seed)
    study = run_cnn_study(options.out, design, n_jobs=shared.n_jobs_of(options))
    command = " ".join(["rcnn-svm", *map(typed, words)])
    for sentence in write_cnn_study(options.out, study, command=command):
        emit(sentence)
    say(f"Tables and figures: {options.out}")
