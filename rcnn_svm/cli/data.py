"""The verb `data`: write the embedded digits, look at any data set, convert, divide, label better."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rcnn_svm.cli import options as shared
from rcnn_svm.cli.labelling import add_next, add_review
from rcnn_svm.config import choices
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import DataConfig
from rcnn_svm.experiment.data import DIGITS_IMAGES
from rcnn_svm.progress import emit, say

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

    convert = actions.add_parser("convert", help="write as VOC, COCO or YOLO, and say what is lost")
    convert.add_argument("path", type=Path)
    convert.add_argument("--to", choices=("voc", "coco", "yolo"), required=True)
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="absent or empty")
    shared.add_label_options(convert, "write these classes, in this order")
    convert.set_defaults(run=_convert)

    divide = actions.add_parser(
        "split", help="divide into train, val and test: by groups and classes, copies on one side"
    )
    divide.add_argument("path", type=Path)
    divide.add_argument("--out", type=Path, required=True, metavar="DIR", help="absent or empty")
    divide.add_argument(
        "--shares", default="60,20,20", metavar="A,B,C", help="of train, val and test (default 60,20,20)"
    )
    together = divide.add_mutually_exclusive_group()
    together.add_argument(
        "--group-by",
        metavar="PATTERN",
        help="a regular expression: images whose ids give the same match, or first group of it, stay together"
        "",
    )
    together.add_argument(
        "--groups", type=Path, metavar="CSV", help="with the columns image and group: the same, as listed"
    )
    divide.add_argument(
        "--column", default="group", metavar="NAME", help="the column of --groups to go by (default group)"
    )
    divide.add_argument(
        "--copy", action="store_true", help="copy images (default: hard links, which take no room)"
    )
    divide.add_argument("--seed", type=int, default=0)
    shared.add_label_options(divide, "write these classes, in this order")
    divide.set_defaults(run=_split)

    add_review(actions)
    add_next(actions)


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


def _labels(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_label_options` as the readers take them."""
    return {
        "format": None if options.format in (None, "auto") else options.format,
        "classes": shared.names_of(options) or None,
        "drop_bad_boxes": bool(options.drop_bad_boxes),
        "allow_outside": bool(options.allow_outside),
    }


def _convert(options: argparse.Namespace) -> None:
    from rcnn_svm.datasets.convert import convert_dataset

    parts = convert_dataset(options.path, options.to, options.out, **_labels(options))
    counts = ", ".join(f"{name} {len(part)}" for name, part in parts.items())
    say(f"{options.out}: {options.to.upper()}, images: {counts}")


def _split(options: argparse.Namespace) -> None:
    from rcnn_svm.datasets.convert import require_boxes
    from rcnn_svm.datasets.dividing import divide_dataset, groups_by_pattern, groups_in_table
    from rcnn_svm.datasets.loading import detect_format, load_all_splits
    from rcnn_svm.datasets.write import write_dataset
    from rcnn_svm.files import write_text

    shares = _shares(options.shares)
    labels = _labels(options)
    given = load_all_splits(options.path, **labels)
    require_boxes(given, options.path)
    samples = {sample.image_id: sample for part in given.values() for sample in part}
    whole = replace(next(iter(given.values())), split="all", samples=tuple(samples.values()))
    groups = {}
    if options.group_by is not None:
        groups = groups_by_pattern(whole, options.group_by)
    elif options.groups is not None:
        groups = groups_in_table(whole, options.groups, options.column)
    division = divide_dataset(whole, shares, groups, seed=options.seed)
    if options.group_by is not None and len(groups) < len(whole):
        say(f"{len(whole) - len(groups)} images do not match {options.group_by!r} and are alone.")
    if n := len(division.duplicates):
        say(f"{n} pair{'s' * (n > 1)} of copies or near copies {'stay' if n > 1 else 'stays'} together.")
    kind: Any = labels["format"] or detect_format(options.path, allow_outside=labels["allow_outside"])
    write_dataset(division.parts, options.out, kind, link=not options.copy)
    write_text(options.out / "splits.csv", division.table())
    for line in division.lines():
        emit(line)
    say(f"{options.out}: {kind.upper()}; splits.csv there says where each image went.")


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--shares must be three numbers for train, val and test, such as 60,20,20, got {text}."
        ) from error
