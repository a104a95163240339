"""The verb `explain`: why detections score as they do."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rcnn_svm.cli import options as shared
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.progress import emit, say

if TYPE_CHECKING:
    from rcnn_svm.detector import Detector
    from rcnn_svm.evidence import Evidence
    from rcnn_svm.structures import Detections, Image

__all__ = ["add_explain"]


def add_explain(explain: argparse.ArgumentParser) -> None:
    """Add the options of `explain`."""
    explain.add_argument("detector", type=Path, help="a folder that `rcnn-svm train` made")
    explain.add_argument("image", type=Path, help="an image file")
    explain.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="index.html, pictures and evidence.json go here",
    )
    explain.add_argument("--top", type=int, default=5, metavar="N", help="the N surest (default 5)")
    explain.add_argument("--class", dest="name", metavar="NAME", help="detections of this class alone")
    explain.add_argument(
        "--threshold",
        type=float,
        metavar="S",
        help="what scores at least this (default: the threshold of each class that training chose)",
    )
    explain.add_argument(
        "--data",
        type=Path,
        help="what a detector with a kernel was trained on: its training regions are shown from there",
    )
    shared.add_compute_options(explain)
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.detector import load_detector
    from rcnn_svm.evidence import explain
    from rcnn_svm.files import file_digest
    from rcnn_svm.report.evidence import Explained, evidence_files, write_evidence

    if options.top < 1:
        raise ConfigError(f"--top must be at least 1, got {options.top}.")
    if options.image.is_dir():
        raise ConfigError(f"{options.image}: must be an image file, got a folder. Name one image.")
    (sample,) = open_images([options.image])
    refuse_to_overwrite(evidence_files(options.out, options.top), [options.image])
    detector = load_detector(options.detector, device=shared.device_of(options))
    pixels = sample.read()
    found, boxes = detector.trace(pixels, sample.image_id)
    rows = _chosen(options, detector, found)
    evidence = explain(detector, pixels, boxes[rows], found.labels[rows])
    explained = [
        Explained(found.boxes[i], float(found.scores[i]), each)
        for i, each in zip(rows, evidence, strict=True)
    ]
    write_evidence(
        options.out,
        pixels,
        explained,
        detector.classes,
        {
            "image": sample.image_id,
            "head": detector.head,
            "detector": file_digest(options.detector / "detector.json"),
        },
        regions=detector.model.support,
        crops=_crops(options, detector, evidence),
    )
    for each in explained:
        emit(f"{detector.classes[each.evidence.label]} {each.score:.3f}")
    say(f"Why: {options.out / 'index.html'}")


def _chosen(options: argparse.Namespace, detector: Detector, found: Detections) -> Sequence[int]:
    """Return the rows of the detections that are to be explained, surest first."""
    from rcnn_svm.cli.using import least_scores

    if options.name is not None and options.name not in detector.classes:
        raise ConfigError(
            f"--class must be one of {', '.join(detector.classes)}, the classes of {options.detector}, got "
            f"{options.name}."
        )
    asked = np.ones(len(found), bool)
    if options.name is not None:
        asked = found.labels == detector.classes.index(options.name)
    enough = found.scores >= least_scores(options.threshold, detector)[found.labels]
    rows = np.flatnonzero(asked & enough)[: options.top]
    if len(rows):
        return [int(row) for row in rows]
    what = options.name or "object"
    if not asked.any():
        raise DataError(f"{options.image}: must show something to explain, got no detection of any {what}.")
    surest = np.flatnonzero(asked)[0]
    name, score = detector.classes[found.labels[surest]], found.scores[surest]
    raise DataError(
        f"{options.image}: must show something that is believed, got no {what} that scores enough; "
        f"the surest is {name} at {score:.3f}. Lower --threshold."
    )


def _crops(
    options: argparse.Namespace, detector: Detector, evidence: Sequence[Evidence]
) -> Mapping[int, Image]:
    """Return the pixels of the training regions that spoke loudest, by support vector."""
    from rcnn_svm.datasets import SplitRecord, images_to_measure
    from rcnn_svm.report.evidence import crops_of, strongest

    if evidence[0].support is None:
        if options.data is not None:
            say(f"--data is not needed: {detector.head} has no support vectors to show.")
        return {}
    regions = detector.model.support
    if regions is None:
        say("This detector does not know its training regions, only what they add: train it again.")
        return {}
    if options.data is None:
        say("Training regions are named, not shown: --data DATA shows them.")
        return {}
    rows = sorted({s for each in evidence for side in strongest(each) for s in side})
    record = SplitRecord.read(options.detector)
    part = "all" if record is None else "trainval"
    # Labels are not looked at here: those that training left out are no reason to stop.
    dataset, _ = images_to_measure(options.data, part, record, drop_bad_boxes=True)
    samples = {sample.image_id: sample for sample in dataset}
    wanted = list(dict.fromkeys(regions.image_ids[s] for s in rows))
    missing = [name for name in wanted if name not in samples]
    if missing:
        raise DataError(
            f"{options.data}: must hold the images that {options.detector} was trained on, got none of "
            f"{', '.join(missing)}. Name those data, or leave --data out."
        )
    return crops_of({name: samples[name].read() for name in wanted}, regions, rows)
