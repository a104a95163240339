"""Verbs on detectors as things that are handed on and grow: `info`, `add-class`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rcnn_svm.cli import options as shared
from rcnn_svm.cli import words
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import say

if TYPE_CHECKING:
    from rcnn_svm.datasets import Splits
    from rcnn_svm.detector import Detector
    from rcnn_svm.experiment.config import ExperimentConfig

__all__ = ["add_add_class", "add_info", "settings_of"]


def add_info(info: argparse.ArgumentParser) -> None:
    """Add the options of `info`."""
    info.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    info.set_defaults(run=_info)


def add_add_class(add: argparse.ArgumentParser) -> None:
    """Add the options of `add-class`."""
    add.add_argument("detector", type=Path, help="a folder that `rcnn-svm train --head linear-svm` made")
    add.add_argument("data", help=shared.DATA_HELP + "; the new classes are learned from it")
    add.add_argument("--out", type=Path, metavar="DIR", help="the detector goes here (default: where it is)")
    add.add_argument(
        "--negatives",
        action="store_true",
        help="train the classes that it has again, on their own images and the new ones, in which all their "
        "objects must be labelled",
    )
    shared.add_data_options(add)
    shared.add_run_options(add)
    add.set_defaults(run=_add_class)


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


def _add_class(options: argparse.Namespace) -> None:
    from rcnn_svm.datasets import SplitRecord
    from rcnn_svm.detector import load_detector
    from rcnn_svm.experiment.data import load_data
    from rcnn_svm.experiment.joining import add_classes, digest_of, more_images, require_joinable
    from rcnn_svm.report.card import added_figures, figures_of, remove_card, write_card
    from rcnn_svm.report.provenance import provenance

    out = options.out or options.detector
    detector = load_detector(options.detector, device=shared.device_of(options))
    require_joinable(detector, str(options.detector))
    if options.negatives and "added" in detector.info:
        raise ConfigError(
            f"{options.detector}: --negatives reads all images again that its classes were learned from, "
            f"and classes have joined it before from others. Join new ones without, or train it anew."
        )
    config, record = settings_of(options.detector), SplitRecord.read(options.detector)
    if options.seed is not None:
        config = replace(config, seed=options.seed)
    run = shared.run_of(options)
    data = load_data(shared.data_config(options, options.data), seed=config.seed)
    new = _new_classes(options, detector, data)
    before, n = digest_of(detector, len(detector.classes)), len(detector.classes)
    source = provenance(seed=config.seed, command=words.command(options))
    kept = detector
    if options.negatives:
        own = load_data(config.data, seed=config.seed).with_classes(detector.classes)
        again = more_images(detector, own, data.with_classes(detector.classes), config, run)
        n_images = len(own.trainval) + len(data.trainval)
        figures = figures_of(
            again, n_images, seed=config.seed, n_bootstrap=config.n_bootstrap, provenance=source
        )
        kept = replace(again.detector, info={**again.detector.info, "figures": figures})
    fresh = data.with_classes(new)
    result = add_classes(kept, fresh, config, run)
    grown = replace(result.detector, info=added_figures(kept, result, fresh, config, source))
    SplitRecord.remove(out)  # it must never lie beside another detector
    remove_card(out)
    grown.save(out)
    if record is not None:
        own_record = SplitRecord.of(fresh, seed=config.seed)
        replace(record, added=(*record.added, own_record)).write(out)
    if out.resolve() != options.detector.resolve():
        from rcnn_svm.files import write_text

        write_text(out / "config.json", (options.detector / "config.json").read_text(encoding="utf-8"))
    write_card(out, grown)
    after = digest_of(load_detector(out), n)
    if not options.negatives and after != before:
        raise AssertionError(f"{out}: weights of the classes {', '.join(detector.classes)} have changed.")
    for line in words.closing_of_joining(grown, result, n, out, None if options.negatives else after):
        say(line)


def settings_of(folder: Path) -> ExperimentConfig:
    """Return the settings that a detector was trained with, which lie beside it.

    Raises:
        DataError: they do not.
    """
    from rcnn_svm.config import from_dict
    from rcnn_svm.experiment.config import ExperimentConfig
    from rcnn_svm.files import read_json

    path = folder / "config.json"
    if not path.exists():
        raise DataError(
            f"{path}: no such file; it holds the settings that the detector was trained with, as `rcnn-svm "
            f"train` wrote them. Put it back, or train the detector again."
        )
    return from_dict(ExperimentConfig, read_json(path), where=str(path))


def _new_classes(options: argparse.Namespace, detector: Detector, data: Splits) -> tuple[str, ...]:
    """Return the classes that the detector does not have.

    Raises:
        ConfigError: there is none, or one that it has is labelled and is not to be trained again.
    """
    known = [name for name in data.train.classes if name in detector.classes]
    new = tuple(name for name in data.train.classes if name not in detector.classes)
    if known and not options.negatives:
        raise ConfigError(
            f"{options.data}: labels {', '.join(known[:5])}{' and others' if len(known) > 5 else ''}, which "
            f"{options.detector} knows already. Name the new ones with --classes, or train those that it has "
            f"again, on these images as well, with --negatives."
        )
    if not new:
        raise ConfigError(
            f"{options.data}: must label a class that {options.detector} does not know, got "
            f"{', '.join(data.train.classes)}."
        )
    return new
