"""Detections in the files of other tools, one writer for each format.

A writer is told of image after image, and at the end of all of them. What a format keeps in a file of its own
for each image is written as images come, so that an interruption loses nothing; the rest is written at the
end. Boxes are half-open pixels; writers convert to what the format has.

Scores are margins or log-odds. Where a format has a confidence between 0 and 1, `confidences` says what goes
there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.datasets.write import coco_records, voc_xml, yolo_rows
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.exchange import write_coco_results, write_detections
from rcnn_svm.files import bytes_digest, csv_text, inside, write_text
from rcnn_svm.structures import Detections, Sample

__all__ = [
    "FORMATS",
    "CocoWriter",
    "CsvWriter",
    "DetectionWriter",
    "JsonWriter",
    "LabelStudioWriter",
    "VocWriter",
    "YoloWriter",
    "confidences",
    "label_studio_prediction",
    "write_coco_files",
]


class DetectionWriter(Protocol):
    """Writes detections in one format."""

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the files that are written for these images.

        Raises:
            ConfigError: the format cannot hold one of them.
        """

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the files of one image.

        Raises:
            DataError: the folder cannot be written to, or the image not be read.
            DiskSpaceError: the disk is full.
        """

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write the files that all images share; `images` are all, those of an earlier run too.

        Raises:
            DataError: the folder cannot be written to.
            DiskSpaceError: the disk is full.
        """


def confidences(found: Detections) -> NDArray[np.float64]:
    """Return (M,) confidences in [0, 1]: probabilities, else the logistic function of the scores.

    Of a softmax, whose scores are log-odds, the latter is its own probability; of an SVM it is the order of
    its margins and no more.
    """
    if found.probabilities is not None:
        return found.probabilities.astype(np.float64)
    sure: NDArray[np.float64] = (1 + np.tanh(found.scores.astype(np.float64) / 2)) / 2  # never overflows
    return sure


@dataclass(frozen=True)
class _Writer:
    """What the writers have in common: nothing is written for an image, and nothing at the end."""

    folder: Path
    classes: Sequence[str]

    def add(self, sample: Sample, found: Detections) -> None:
        pass

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        pass


@dataclass(frozen=True)
class JsonWriter(_Writer):
    """`detections.json`, as `read_detections` reads it.

    Attributes:
        folder: where it goes.
        classes: K names.
    """

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the one file."""
        return [self.folder / "detections.json"]

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write the file."""
        write_detections(self.files([])[0], [found for _, found in images], self.classes)


@dataclass(frozen=True)
class CsvWriter(_Writer):
    """`detections.csv`: a line a detection, the surest of an image first; boxes are `x1 y1 x2 y2`.

    Attributes:
        folder: where it goes.
        classes: K names.
    """

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the one file."""
        return [self.folder / "detections.csv"]

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write the file; without any detection it has the line of names alone."""
        columns = ("image", "class", "score", "confidence", "x1", "y1", "x2", "y2")
        rows = [
            dict(zip(columns, (str(sample.path), self.classes[label], score, sure, *box), strict=True))
            for sample, found in images
            for label, score, sure, box in zip(
                found.labels.tolist(),
                (float(str(score)) for score in found.scores),  # with no more digits than it has
                confidences(found).round(6).tolist(),
                found.boxes.astype(np.float64).round(3).tolist(),
                strict=True,
            )
        ]
        write_text(self.files([])[0], csv_text(rows, columns))


@dataclass(frozen=True)
class CocoWriter(_Writer):
    """`coco/results.json`, COCO's results, and `coco/data.json`, which says what its numbers mean.

    Attributes:
        folder: where they go.
        classes: K names; label k is category k + 1.
    """

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return results and data."""
        return [self.folder / "coco" / "results.json", self.folder / "coco" / "data.json"]

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write both files; file names are told from the folder that holds all images."""
        results, data = self.files([])
        write_coco_files(results, data, images, self.classes)


def write_coco_files(
    results: Path, data: Path, images: Sequence[tuple[Sample, Detections]], classes: Sequence[str]
) -> None:
    """Write COCO's results, and the data file that names images, categories and the labels of the images.

    Images are numbered from 1 in their order, label k is category k + 1. File names are relative to the
    folder that holds all images.

    Args:
        results: the file of results.
        data: the file with images, annotations and categories; images without labels have no annotation.
        images: with what was found in them.
        classes: K names.

    Raises:
        DataError: a file cannot be written.
        ShapeError: an infinite score, or a label that is no class.
    """
    samples = [sample for sample, _ in images]
    content = coco_records(samples, _relative_names(samples), classes)
    write_text(data, json.dumps(content) + "\n")
    numbers: dict[str, int | str] = {sample.image_id: i for i, sample in enumerate(samples, start=1)}
    categories = range(1, len(classes) + 1)
    write_coco_results(results, [found for _, found in images], categories, numbers)


def _relative_names(samples: Sequence[Sample]) -> list[str]:
    """Return the file name of each image from the folder that holds all; its id where it has no file."""
    folders = {os.path.abspath(s.path.parent) for s in samples if s.path is not None}
    base = os.path.commonpath(folders) if folders else ""
    return [
        Path(os.path.relpath(s.path, base)).as_posix() if s.path is not None else f"{s.image_id}.png"
        for s in samples
    ]


@dataclass(frozen=True)
class YoloWriter(_Writer):
    """`yolo/labels/IMAGE.txt` with lines `class cx cy w h confidence`, and `yolo/classes.txt`.

    Attributes:
        folder: where they go.
        classes: K names; their order is that of the numbers.
    """

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the text of each image, and the names of the classes."""
        return [*map(self._labels, samples), self.folder / "yolo" / "classes.txt"]

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the text of an image, which is empty where nothing was found."""
        text = yolo_rows(found.boxes, found.labels, sample.size, confidences(found))
        write_text(self._labels(sample), text)

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write the names."""
        write_text(self.files([])[0], "".join(f"{name}\n" for name in self.classes))

    def _labels(self, sample: Sample) -> Path:
        return inside(self.folder / "yolo" / "labels", sample.image_id, ".txt")


@dataclass(frozen=True)
class VocWriter(_Writer):
    """`voc/IMAGE.xml`: whole pixels, and `confidence` as one more element of an object.

    Attributes:
        folder: where they go.
        classes: K names.
    """

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return the XML of each image."""
        return [inside(self.folder / "voc", sample.image_id, ".xml") for sample in samples]

    def add(self, sample: Sample, found: Detections) -> None:
        """Write the XML of an image."""
        name = sample.path.name if sample.path is not None else f"{sample.image_id}.png"
        names = [self.classes[label] for label in found.labels]
        more = [{"confidence": f"{sure:.6g}"} for sure in confidences(found)]
        write_text(self.files([sample])[0], voc_xml(name, sample.size, found.boxes, names, more))


@dataclass(frozen=True)
class LabelStudioWriter(_Writer):
    """`labelstudio/tasks.json`, images with pre-annotations, and `labelstudio/config.xml`, the labels.

    Attributes:
        folder: where they go.
        classes: K names.
        model: what made the detections, as `model_version`.
        root: the folder whose files Label Studio serves (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT).
    """

    model: str
    root: Path

    def files(self, samples: Sequence[Sample]) -> list[Path]:
        """Return tasks and labels.

        Raises:
            ConfigError: an image does not lie below `root`.
        """
        for sample in samples:
            self._address(sample)
        return [self.folder / "labelstudio" / "tasks.json", self.folder / "labelstudio" / "config.xml"]

    def finish(self, images: Sequence[tuple[Sample, Detections]]) -> None:
        """Write both files."""
        tasks, config = self.files([])
        write_text(config, self._config())
        lines = [json.dumps(self._task(sample, found), allow_nan=False) for sample, found in images]
        write_text(tasks, "[" + ",\n ".join(lines) + "]\n")

    def _config(self) -> str:
        labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in self.classes)
        return (
            '<View>\n  <Image name="image" value="$image"/>\n'
            f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
        )

    def _address(self, sample: Sample) -> str:
        """Return where Label Studio finds an image."""
        path = os.path.realpath(sample.path or "")
        root = os.path.realpath(self.root)
        if os.path.commonpath([path, root]) != root:
            raise ConfigError(
                f"{sample.path}: must lie below {self.root}, whose files Label Studio is to serve. Name a "
                f"folder that holds all images with --label-studio-root."
            )
        return "/data/local-files/?d=" + quote(Path(os.path.relpath(path, root)).as_posix())

    def _task(self, sample: Sample, found: Detections) -> dict[str, Any]:
        """Return an image with its pre-annotation."""
        made = label_studio_prediction(sample, found, self.classes, self.model)
        return {"data": {"image": self._address(sample)}, "predictions": [made]}


def label_studio_prediction(
    sample: Sample,
    found: Detections,
    classes: Sequence[str],
    model: str,
    *,
    label: str = "label",
    image: str = "image",
) -> dict[str, Any]:
    """Return detections as a prediction of Label Studio: places in percent, the surest first.

    Args:
        sample: the image.
        found: in it.
        classes: K names.
        model: what made the detections, as `model_version`.
        label: name of the `RectangleLabels` of the labelling interface.
        image: name of the `Image` that they are drawn on.
    """
    height, width = sample.size
    sure = confidences(found).round(6).tolist()
    places = 100 * found.boxes.astype(np.float64) / (width, height, width, height)
    result = [
        {
            "id": bytes_digest(f"{sample.image_id} {i}".encode())[:10],
            "type": "rectanglelabels",
            "from_name": label,
            "to_name": image,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {
                "x": x1,
                "y": y1,
                "width": x2 - x1,
                "height": y2 - y1,
                "rotation": 0,
                "rectanglelabels": [classes[k]],
            },
            "score": sure[i],
        }
        for i, ((x1, y1, x2, y2), k) in enumerate(zip(places.tolist(), found.labels.tolist(), strict=True))
    ]
    return {"model_version": model, "score": sum(sure) / max(len(sure), 1), "result": result}


Make = Callable[[Path, Sequence[str]], DetectionWriter]

FORMATS: Mapping[str, Make] = {"coco": CocoWriter, "yolo": YoloWriter, "voc": VocWriter, "csv": CsvWriter}
"""What makes the writer of a format that needs to know no more than folder and classes."""
