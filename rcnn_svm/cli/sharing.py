"""Verbs on detectors as things that are handed on: `info`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rcnn_svm.cli import words

__all__ = ["add_info"]


def add_info(info: argparse.ArgumentParser) -> None:
    """Add the options of `info`."""
    info.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    """Print what a detector is, can and promises."""
    from rcnn_svm.detector import load_detector
    from rcnn_svm.report.card import about, class_table, quality_words
    from rcnn_svm.report.tables import markdown_table

    detector = load_detector(options.detector)
    print(markdown_table(*class_table(detector)))
    print("\n".join(words.paragraph(one) for one in quality_words(detector)))
    print()
    for label, text in about(detector, options.detector):
        print(words.paragraph(f"{label}: {text}"))
