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
    from rcnn_svm.boxes import Boxes
    from rcnn_svm.cli.using import Shown
    from rcnn_svm.detector import Detector
    from rcnn_svm.evidence import Evidence
    from rcnn_svm.report.evidence import Explained
    from rcnn_svm.structures import Detections, Image, Sample

__all__ = ["EvidenceWriter", "Explainer", "add_explain"]


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


class EvidenceWriter:
    """A `formats.DetectionWriter` of the evidence for the surest detections of each image, a folder an image.

    Args:
        folder: holds the folders of images.
        detector: that found them.
        made_by: its folder.
        shown: which detections are shown.
        top: the evidence of so many is written.
    """

    def __init__(self, folder: Path, detector: Detector, made_by: Path, shown: Shown, top: int) -> None:
        self._folder, self._shown, self._top = folder, shown, top
        self._explainer = Explainer(detector, made_by)

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the page, pictures and numbers of each image."""
        from rcnn_svm.report.evidence import evidence_files

        return [path for sample in samples for path in evidence_files(self._place(sample), self._top)]

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the evidence of an image; nothing where nothing is shown."""
        from rcnn_svm.files import remove_marker

        remove_marker(self._place(sample) / "evidence.json")
        if not len(found):
            return
        pixels = sample.read()
        everything, boxes = self._explainer.detector.trace(pixels, sample.image_id)
        rows = self._shown.rows(everything)[: self._top]
        self._explainer.write(self._place(sample), pixels, everything, boxes, rows.tolist())

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write nothing."""

    def _place(self, sample: Sample) -> Path:
        from rcnn_svm.files import inside

        return inside(self._folder, sample.image_id, "")


class Explainer:
    """Writes why detections score as they do.

    Args:
        detector: that found them.
        folder: of the detector.
        data: what it was trained on, from where its training regions are shown; None only names them.
    """

    def __init__(self, detector: Detector, folder: Path, data: Path | None = None) -> None:
        from rcnn_svm.files import file_digest

        self.detector = detector
        self._folder, self._data, self._digest = folder, data, file_digest(folder / "detector.json")
        self._said: set[str] = set()

    def write(
        self, out: Path, pixels: Image, found: Detections, boxes: Boxes, rows: Sequence[int]
    ) -> list[Explained]:
        """Write page, pictures and numbers of some detections of an image, and return the evidence.

        Args:
            out: a folder of its own.
            pixels: of the image.
            found: all its detections,
            boxes: and their regions, as `Detector.trace` returns both.
            rows: of the detections that are explained, one or more.

        Raises:
            DataError: the folder cannot be written to, or the data not be read.
        """
        from rcnn_svm.evidence import explain
        from rcnn_svm.report.evidence import Explained, write_evidence

        evidence = explain(self.detector, pixels, boxes[rows], found.labels[rows])
        explained = [
            Explained(found.boxes[i], float(found.scores[i]), each)
            for i, each in zip(rows, evidence, strict=True)
        ]
        about = {"image": found.image_id, "head": self.detector.head, "detector": self._digest}
        regions, crops = self.detector.model.support, self._crops(evidence)
        write_evidence(out, pixels, explained, self.detector.classes, about, regions=regions, crops=crops)
        return explained

    def _crops(self, evidence: Sequence[Evidence]) -> Mapping[int, Image]:
        """Return the pixels of the training regions that spoke loudest, by support vector."""
        from rcnn_svm.datasets import SplitRecord, images_to_measure
        from rcnn_svm.report.evidence import crops_of, strongest

        if evidence[0].support is None:
            if self._data is not None:
                self._say(f"--data is not needed: {self.detector.head} has no support vectors to show.")
            return {}
        regions = self.detector.model.support
        if regions is None:
            self._say("This detector does not know its training regions, only what they add: train it again.")
            return {}
        if self._data is None:
            self._say("Training regions are named, not shown: explain's --data DATA shows them.")
            return {}
        rows = sorted({s for each in evidence for side in strongest(each) for s in side})
        record = SplitRecord.read(self._folder)
        part = "all" if record is None else "trainval"
        # Labels are not looked at here: those that training left out are no reason to stop.
        dataset, _ = images_to_measure(self._data, part, record, drop_bad_boxes=True)
        samples = {sample.image_id: sample for sample in dataset}
        wanted = list(dict.fromkeys(regions.image_ids[s] for s in rows))
        missing = [name for name in wanted if name not in samples]
        if missing:
            raise DataError(
                f"{self._data}: must hold the images that {self._folder} was trained on, got none of "
                f"{', '.join(missing)}. Name those data, or leave --data out."
            )
        return crops_of({name: samples[name].read() for name in wanted}, regions, rows)

    def _say(self, words: str) -> None:
        """Say something once, however many images it is true of."""
        if words not in self._said:
            self._said.add(words)
            say(words)


def _explain(options: argparse.Namespace) -> None:
    from rcnn_svm.cli.images import open_images, refuse_to_overwrite
    from rcnn_svm.detector import load_detector
    from rcnn_svm.report.evidence import evidence_files

    if options.top < 1:
        raise ConfigError(f"--top must be at least 1, got {options.top}.")
    if options.image.is_dir():
        raise ConfigError(f"{options.image}: must be an image file, got a folder. Name one image.")
    samples = open_images([options.image])
    if len(samples) != 1:
        raise ConfigError(f"{options.image}: must be one image file, got {len(samples)}. Name one image.")
    (sample,) = samples
    refuse_to_overwrite(evidence_files(options.out, options.top), [sample.path])
    detector = load_detector(options.detector, device=shared.device_of(options))
    pixels = sample.read()
    found, boxes = detector.trace(pixels, sample.image_id)
    rows = _chosen(options, detector, found)
    explainer = Explainer(detector, options.detector, options.data)
    for each in explainer.write(options.out, pixels, found, boxes, rows):
        emit(f"{detector.classes[each.evidence.label]} {each.score:.3f}")
    say(f"Why: {options.out / 'index.html'}")


def _chosen(options: argparse.Namespace, detector: Detector, found: Detections) -> Sequence[int]:
    """Return the rows of the detections that are to be explained, surest first."""
    from rcnn_svm.cli.using import Shown, least_scores

    if options.name is not None and options.name not in detector.classes:
        raise ConfigError(
            f"--class must be one of {', '.join(detector.classes)}, the classes of {options.detector}, got "
            f"{options.name}."
        )
    known = np.array([options.name in (None, name) for name in detector.classes])
    least = np.where(known, least_scores(options.threshold, detector), np.inf)
    rows = Shown(least, options.top).rows(found)
    if len(rows):
        return [int(row) for row in rows]
    what = options.name or "object"
    asked = np.flatnonzero(known[found.labels])
    if not len(asked):
        raise DataError(f"{options.image}: must show something to explain, got no detection of any {what}.")
    name, score = detector.classes[found.labels[asked[0]]], found.scores[asked[0]]
    raise DataError(
        f"{options.image}: must show something that is believed, got no {what} that scores enough; "
        f"the surest is {name} at {score:.3f}. Lower --threshold."
    )
