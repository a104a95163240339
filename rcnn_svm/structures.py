"""The records that travel between the stages: validated on construction, never changed after.

Names of sizes: N boxes, G ground-truth objects, R regions, K classes, H W image size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.boxes import Boxes, area, as_boxes
from rcnn_svm.errors import DataError, DependencyError, ShapeError
from rcnn_svm.files import bytes_digest

__all__ = [
    "Dataset",
    "Detections",
    "GroundTruth",
    "Image",
    "RegionSet",
    "Sample",
    "TrainingRegions",
    "require_finite",
]

Image = NDArray[np.uint8]
"""uint8 (H, W, 3), RGB."""

_Scalar = TypeVar("_Scalar", bound=np.generic)


def _column(value: ArrayLike, n: int, dtype: type[_Scalar], where: str) -> NDArray[_Scalar]:
    array: NDArray[_Scalar] = np.asarray(value, dtype=dtype)
    if array.shape != (n,):
        raise ShapeError(f"{where} must have shape ({n},) like the boxes, got {array.shape}.")
    return array


def require_image(where: str, image: NDArray[Any]) -> None:
    """Check that an array is an image: uint8 (H, W, 3) RGB, of a pixel or more.

    Raises:
        ShapeError: it is not; `where` stands before what is said.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ShapeError(f"{where}: an image must be uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}.")


def require_finite(where: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Check that what was learned holds neither NaN nor infinity; no later product would tell.

    Args:
        where: what the arrays belong to.
        arrays: of numbers, by the name that the message gives them.

    Raises:
        DataError: names the first array that is not finite.
    """
    for name, array in arrays.items():
        n_bad = array.size - int(np.isfinite(array).sum())
        if n_bad:
            raise DataError(
                f"{where}: {name} must be finite, got {n_bad} of {array.size} numbers that are NaN or "
                f"infinite. Its training diverged: train again with a lower learning rate or cost."
            )


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The labelled objects of one image.

    Attributes:
        boxes: (G, 4) half-open pixels, every one of positive area.
        labels: (G,) int64 in 0 .. K-1.
        difficult: (G,) bool, VOC's flag: ignored by the evaluation.
        crowd: (G,) bool, COCO's `iscrowd`: a region of many objects, never a positive.
        area: (G,) float64 square pixels, by which COCO sorts objects into small, medium and large: that of
            the segment where COCO's annotations state it, of the box by default.
        flags: (G,) bool each, what else the labels say of an object, by name: VOC's `truncated` (it goes on
            beyond its box) and `occluded`; a name that they say nothing of is absent.
    """

    boxes: Boxes
    labels: NDArray[np.int64]
    difficult: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    crowd: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    area: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    flags: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        boxes = as_boxes(self.boxes, where="GroundTruth")
        n = len(boxes)
        if (area(boxes) <= 0).any():
            row = int(np.flatnonzero(area(boxes) <= 0)[0])
            raise ShapeError(
                f"GroundTruth: every box must have a positive area, got {boxes[row]} in row {row}."
            )
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "labels", _column(self.labels, n, np.int64, "GroundTruth: labels"))
        for name in ("difficult", "crowd"):
            value = getattr(self, name)
            value = np.zeros(n, bool) if len(value) == 0 else value
            object.__setattr__(self, name, _column(value, n, np.bool_, f"GroundTruth: {name}"))
        value = area(boxes) if len(self.area) == 0 else self.area
        areas = _column(value, n, np.float64, "GroundTruth: area")
        if not ((areas >= 0) & (areas < np.inf)).all():
            raise ShapeError(f"GroundTruth: area must be finite and not negative, got {areas.tolist()}.")
        object.__setattr__(self, "area", areas)
        flags = {name: _column(v, n, np.bool_, f"GroundTruth: {name}") for name, v in self.flags.items()}
        object.__setattr__(self, "flags", flags)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: NDArray[np.generic] | slice) -> GroundTruth:
        return GroundTruth(
            self.boxes[rows],
            self.labels[rows],
            self.difficult[rows],
            self.crowd[rows],
            self.area[rows],
            {name: flag[rows] for name, flag in self.flags.items()},
        )

    @classmethod
    def empty(cls) -> Self:
        """Return the truth of an image without objects."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True, eq=False)
class Sample:
    """One image and its labels; pixels are read when asked for and never kept.

    Attributes:
        image_id: unique within the data set, without extension.
        size: (height, width) of the image as `read` returns it.
        truth: its labelled objects; empty where there are none.
        path: the image file, or None where pixels are rendered.
        render: makes the pixels where there is no file.
        reader: decodes `path`; set by the data set's reader.
    """

    image_id: str
    size: tuple[int, int]
    truth: GroundTruth
    path: Path | None = None
    render: Callable[[], Image] | None = None
    reader: Callable[[Path], Image] | None = None

    def read(self) -> Image:
        """Return the pixels, uint8 (H, W, 3) RGB.

        Raises:
            DataError: the file is missing or damaged, or its size is not the one announced.
        """
        if self.path is not None and self.reader is not None:
            image = self.reader(self.path)
        elif self.render is not None:
            image = self.render()
        else:
            raise DataError(f"Sample({self.image_id!r}): has neither a file nor a renderer.")
        if image.shape[:2] != self.size:
            raise DataError(
                f"{self.path or self.image_id}: the labels say {self.size[1]} x {self.size[0]} pixels, "
                f"the image has {image.shape[1]} x {image.shape[0]}. One of the two is wrong."
            )
        return image

    def digest(self) -> str:
        """Return a hash of the image's content: of the file's bytes, or of rendered pixels.

        It is made once: an image is taken not to change while it is worked on.

        Raises:
            DataError: the file cannot be read.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        if self.path is not None:
            try:
                return bytes_digest(self.path.read_bytes())
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read ({error.strerror}).") from error
        image = self.read()
        return bytes_digest(repr(image.shape).encode(), image.tobytes())


def _labels_by_name(labels: NDArray[np.int64], old: Sequence[str], new: Sequence[str]) -> NDArray[np.int64]:
    """Return labels of the classes `old` as labels of the classes `new`, -1 where `new` has no such name."""
    position = {name: k for k, name in enumerate(new)}
    return np.array([position.get(name, -1) for name in old], np.int64)[labels]


def _whole_truth(truth: GroundTruth, size: tuple[int, int]) -> GroundTruth:
    """Return the classes of an image's objects, each with a box that covers the image."""
    ignored = truth.difficult | truth.crowd
    first = dict.fromkeys(truth.labels[np.lexsort((-truth.area, ignored))].tolist())
    labels = np.array(list(first), np.int64)
    boxes = np.tile(np.array([0, 0, size[1], size[0]], np.float32), (len(labels), 1))
    return GroundTruth(boxes, labels, np.array([ignored[truth.labels == k].all() for k in labels], bool))


def mirror_image(image: Image) -> Image:
    """Return the (H, W, 3) mirror image, contiguous."""
    return np.ascontiguousarray(image[:, ::-1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a labelled data set.

    Attributes:
        name: what reports call it.
        split: `train`, `val`, `test`, ...
        classes: K class names; labels index them.
        samples: the images in file order.
        whole: labels are of whole images: the only region of an image is the image, and each of its classes
            has one box, which covers it.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {self.split!r}: {len(self)} images, {len(self.classes)} classes)"

    def counts(self) -> NDArray[np.int64]:
        """Return (K,) the number of objects of each class, difficult ones included."""
        counts = np.zeros(len(self.classes), np.int64)
        for sample in self.samples:
            counts += np.bincount(sample.truth.labels, minlength=len(self.classes))
        return counts

    def relative_sides(self) -> NDArray[np.float64]:
        """Return (G,) of each object the root of its area, as a share of its image's longer side.

        Objects that are difficult or crowds are left out.
        """
        sides = [np.zeros(0)]
        for sample in self.samples:
            boxes = sample.truth[~(sample.truth.difficult | sample.truth.crowd)].boxes.astype(np.float64)
            sides.append(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)) / max(sample.size))
        return np.concatenate(sides)

    def as_whole_images(self) -> Dataset:
        """Return the same images, each labelled as a whole with the classes of its objects.

        A class is difficult in an image all of whose objects of it are difficult or crowds, which evaluation
        leaves out as VOC's classification task does. Classes that are not come first, those of the largest
        objects before others: what trains on one class an image trains on the first.
        """
        if self.whole:
            return self
        samples = tuple(replace(s, truth=_whole_truth(s.truth, s.size)) for s in self.samples)
        return replace(self, samples=samples, whole=True)

    def with_classes(self, names: Sequence[str]) -> Dataset:
        """Return the same images with the objects of the classes `names` alone, labelled in their order.

        A class that this data set does not have gets no object.
        """
        if tuple(names) == self.classes:
            return self
        samples = []
        for sample in self.samples:
            labels = _labels_by_name(sample.truth.labels, self.classes, names)
            truth = replace(sample.truth, labels=labels)[labels >= 0]
            samples.append(replace(sample, truth=truth))
        return replace(self, classes=tuple(names), samples=tuple(samples))


@dataclass(frozen=True, eq=False)
class RegionSet:
    """The region proposals of one image, best first.

    Attributes:
        image_id: of the image.
        size: (height, width).
        boxes: (R, 4) inside the image, of positive area, no two alike.
        priority: (R,) float32, rising: the smaller, the earlier a box should be looked at.
    """

    image_id: str
    size: tuple[int, int]
    boxes: Boxes
    priority: NDArray[np.float32]

    def __post_init__(self) -> None:
        boxes = as_boxes(self.boxes, where=f"RegionSet({self.image_id!r})")
        object.__setattr__(self, "boxes", boxes)
        priority = _column(self.priority, len(boxes), np.float32, f"RegionSet({self.image_id!r}): priority")
        object.__setattr__(self, "priority", priority)
        height, width = self.size
        outside = (boxes[:, :2] < 0).any(1) | (boxes[:, 2] > width) | (boxes[:, 3] > height)
        bad = np.flatnonzero(outside | (area(boxes) <= 0))
        if len(bad):
            raise ShapeError(
                f"RegionSet({self.image_id!r}): boxes must lie inside the {width} x {height} image and "
                f"have a positive area, got {len(bad)} bad rows (first: row {bad[0]}, {boxes[bad[0]]})."
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def top(self, n: int) -> RegionSet:
        """Return the `n` best regions, as a copy that does not keep the others in memory."""
        return RegionSet(self.image_id, self.size, self.boxes[:n].copy(), self.priority[:n].copy())


@dataclass(frozen=True, eq=False)
class TrainingRegions:
    """Regions that a head was trained on, told by where they lie: those of its support vectors.

    Attributes:
        image_ids: S ids of images.
        boxes: (S, 4) half-open pixels.
        labels: (S,) int64, class of the object that each overlaps most; -1 where it overlaps none.
        overlaps: (S,) float32, the IoU with that object.
    """

    image_ids: tuple[str, ...]
    boxes: Boxes
    labels: NDArray[np.int64]
    overlaps: NDArray[np.float32]

    def __post_init__(self) -> None:
        boxes = as_boxes(self.boxes, where="TrainingRegions")
        n = len(boxes)
        if len(self.image_ids) != n:
            raise ShapeError(f"TrainingRegions: must have {n} image ids, got {len(self.image_ids)}.")
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "labels", _column(self.labels, n, np.int64, "TrainingRegions: labels"))
        overlaps = _column(self.overlaps, n, np.float32, "TrainingRegions: overlaps")
        object.__setattr__(self, "overlaps", overlaps)

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return f"TrainingRegions({len(self)} of {len(set(self.image_ids))} images)"

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return named arrays that `from_arrays` turns back into the same record; ids are kept as JSON."""
        names = list(dict.fromkeys(self.image_ids))
        place = {name: i for i, name in enumerate(names)}
        return {
            "ids": np.frombuffer(json.dumps(names).encode(), np.uint8),
            "image": np.array([place[name] for name in self.image_ids], np.int64),
            "boxes": self.boxes,
            "labels": self.labels,
            "overlaps": self.overlaps,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Restore the record from `to_arrays`.

        Raises:
            KeyError: an array is missing.
            ValueError: the ids cannot be read.
            ShapeError: the arrays do not fit together.
        """
        names = json.loads(arrays["ids"].tobytes().decode())
        ids = tuple(str(names[i]) for i in arrays["image"].tolist())
        return cls(ids, arrays["boxes"], arrays["labels"], arrays["overlaps"])


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one image, surest first.

    Attributes:
        image_id: of the image.
        boxes: (M, 4).
        scores: (M,) float32, falling; scales of different heads are not comparable.
        labels: (M,) int64 in 0 .. K-1.
        probabilities: (M,) float32 in [0, 1], that the detection is right, on one scale for all classes and
            heads; None where the detector is not calibrated.
    """

    image_id: str
    boxes: Boxes
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        where = f"Detections({self.image_id!r})"
        boxes = as_boxes(self.boxes, where=where)
        scores = _column(self.scores, len(boxes), np.float32, f"{where}: scores")
        labels = _column(self.labels, len(boxes), np.int64, f"{where}: labels")
        if np.isnan(scores).any():
            raise ShapeError(f"{where}: scores must not be NaN.")
        order = np.argsort(-scores, kind="stable")
        object.__setattr__(self, "boxes", boxes[order])
        object.__setattr__(self, "scores", scores[order])
        object.__setattr__(self, "labels", labels[order])
        if self.probabilities is not None:
            likely = _column(self.probabilities, len(boxes), np.float32, f"{where}: probabilities")
            if not ((likely >= 0) & (likely <= 1)).all():
                raise ShapeError(f"{where}: probabilities must lie in [0, 1], got {likely.tolist()!r:.80}.")
            object.__setattr__(self, "probabilities", likely[order])

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, rows: NDArray[np.generic] | slice) -> Detections:
        likely = None if self.probabilities is None else self.probabilities[rows]
        return Detections(self.image_id, self.boxes[rows], self.scores[rows], self.labels[rows], likely)

    def __repr__(self) -> str:
        best = f", scores {self.scores[0]:.3g} to {self.scores[-1]:.3g}" if len(self) else ""
        return f"Detections({self.image_id!r}: {len(self)} boxes{best})"

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Return boxes (M, 4), labels and scores (M,) under torchvision's names, background not counted.

        torchvision's detectors count it: their first class is 1, ours 0.
        """
        return {"boxes": self.boxes, "labels": self.labels, "scores": self.scores}

    def to_supervision(self, classes: Sequence[str] = ()) -> Any:
        """Return the same as `supervision.Detections`.

        Args:
            classes: names, which go into `data["class_name"]`; none leaves them out.

        Raises:
            DependencyError: the package supervision is not installed.
        """
        try:
            from supervision import Detections as Theirs
        except ImportError as error:
            raise DependencyError(
                "Detections.to_supervision: needs the package supervision. Run `pip install supervision`."
            ) from error
        names: dict[str, Any] = {"class_name": np.array(list(classes))[self.labels]} if classes else {}
        return Theirs(xyxy=self.boxes, confidence=self.scores, class_id=self.labels, data=names)

    def with_classes(self, old: Sequence[str], new: Sequence[str]) -> Detections:
        """Return the detections of the classes `new` alone, labelled in their order; labels were of `old`."""
        labels = _labels_by_name(self.labels, old, new)
        return replace(self, labels=labels)[labels >= 0]

    @classmethod
    def empty(cls, image_id: str) -> Self:
        """Return the record of an image in which nothing was found."""
        return cls(image_id, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
