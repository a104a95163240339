"""The verb `data`: write the embedded digits, look at any data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from rcnn_svm.cli import options as shared
from rcnn_svm.config import choices
from rcnn_svm.experiment.config import DataConfig
from rcnn_svm.experiment.data import DIGITS_IMAGES
from rcnn_svm.progress import say

__all__ = ["add_data"]


def add_data(data: argparse.ArgumentParser) -> None:
    """Add the options of `data`."""
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    formats = choices(DataConfig, "format")
    digits = actions.add_parser("digits", help="render digits in scenes to a folder")
    digits.add_argument("--out", type=Path, required=True, metavar="DIR")
    digits.add_argument("--format", choices=("voc", "coco", "yolo"), default="voc")
    digits.add_argument("--encoding", choices=("png", "jpg"), default="png")
    for split, n in DIGITS_IMAGES.items():
        digits.add_argument(f"--{split}", type=int, default=n, metavar="N", help=f"scenes (default {n})")
    digits.add_argument("--seed", type=int, default=0)
    digits.set_defaults(run=_digits)

    check = actions.add_parser(
        "check", help="counts, sizes and defects of a data set, in words and a picture"
    )
    check.add_argument("path", type=Path)
    check.add_argument("--format", choices=formats, default="auto")
    check.add_argument("--classes", metavar="A,B,C", default="")
    shared.add_outside_option(check)
    check.add_argument("--plot", type=Path, metavar="FILE", help="a PNG with counts, sizes and examples")
    check.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    check.set_defaults(run=_check)


def _digits(options: argparse.Namespace) -> None:
    from rcnn_svm.datasets.digits import digits_splits
    from rcnn_svm.datasets.write import write_dataset

    splits = digits_splits(options.train, options.val, options.test, seed=options.seed)
    parts = (splits.train, splits.val, splits.test)
    write_dataset(parts, options.out, options.format, encoding=options.encoding)
    say(f"{sum(map(len, parts))} scenes in {options.out}. Try `rcnn-svm data check {options.out}`.")


def _check(options: argparse.Namespace) -> None:
    from rcnn_svm.datasets.check import check_dataset
    from rcnn_svm.errors import DataError, printable
    from rcnn_svm.files import write_json

    names = [name.strip() for name in options.classes.split(",") if name.strip()]
    report = check_dataset(
        options.path,
        format=None if options.format == "auto" else options.format,
        classes=names or None,
        allow_outside=bool(options.allow_outside),
    )
    print("\n".join(map(printable, report.to_text().split("\n"))))
    if options.json is not None:
        write_json(options.json, report.to_json())
    if options.plot is not None:
        from rcnn_svm.report.dataset import write_dataset_picture

        write_dataset_picture(options.plot, report)
        say(f"Picture: {options.plot}")
    if report.errors:
        n = len(report.errors)
        raise DataError(
            f"{options.path}: {n} error{'s' * (n > 1)} {'were' if n > 1 else 'was'} found, see the report."
        )
