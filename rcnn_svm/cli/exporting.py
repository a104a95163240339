"""The verb that takes a detector to another runtime: `export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import say

__all__ = ["add_export"]


def add_export(export: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
    from rcnn_svm.runtime import Precision

    export.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    export.add_argument("--format", choices=_FORMATS, default=_FORMATS[0], help="default: %(default)s")
    export.add_argument("--out", type=Path, metavar="DIR", help="default: DETECTOR/onnx")
    export.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the weights: fp16 halves the files, int8 makes them a quarter and costs accuracy",
    )
    export.add_argument(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="images that int8 takes the ranges of maps from, a few dozen of those that were trained on; "
        "without them the learned layers alone are brought to 8 bits",
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images
    from rcnn_svm.detector import load_detector
    from rcnn_svm.runtime.export import export_detector

    if options.calibrate is not None and options.precision != "int8":
        raise ConfigError(f"--calibrate is for --precision int8, got {options.precision}.")
    detector = load_detector(options.detector)
    images = [] if options.calibrate is None else open_images([options.calibrate])[:_MOST_IMAGES]
    folder = options.detector / options.format if options.out is None else options.out
    done = export_detector(detector, folder, precision=options.precision, calibrate=images)
    say(
        f"{done.folder}: {done.n_bytes / 1e6:.1f} MB of {options.precision}; in float32 it says what torch "
        f"says within {done.difference:.1g}. Read it with `rcnn-svm detect --runtime onnx` or "
        f"rcnn_svm.runtime.load; requirements.txt names what that needs instead of torch."
    )


_FORMATS = ("onnx",)
_MOST_IMAGES = 64
"""To calibrate on: they show the ranges, and each takes a second or two."""
