"""Which labelled images a detector is measured on: those that it has not seen, where that is known."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rcnn_svm.datasets.loading import Chooser, find_split, list_splits, load_chosen, load_dataset
from rcnn_svm.datasets.records import LabelledImage
from rcnn_svm.datasets.split_record import SplitRecord
from rcnn_svm.errors import DataError
from rcnn_svm.structures import Dataset, GroundTruth, Sample

__all__ = ["images_to_measure"]

_ALL = "all"
"""Every image of the data, where they have no split of this name."""


def images_to_measure(
    path: Path,
    split: str | None,
    record: SplitRecord | None,
    *,
    format: str | None = None,
    drop_bad_boxes: bool = False,
    allow_outside: bool = False,
) -> tuple[Dataset, tuple[str, ...]]:
    """Choose the images of a data set on which a detector is measured.

    * A split that the data name is that split.
    * `all`, where the data name no such split, is every image, once.
    * Another part that training made of these data, such as `test` of a single split, is that part.
    * Without a name it is the test part of training: what was held out from the detector. Where the detector
      knows none of the images, it is the test split of the data, and all images where they have none.

    Args:
        path: the folder of the data, or YOLO's YAML file.
        split: the name, or None.
        record: which images the detector was trained with; None where that is not known.
        format: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Returns:
        The images, labelled with all classes of the data; and sentences on which images these are and how
        many of them the detector was trained on.

    Raises:
        DataError: as `load_dataset`; or an image of the part is missing, or its content has changed.
        ConfigError: as `load_dataset`.
    """
    data = _Data(path, format, drop_bad_boxes, allow_outside)
    notes = []
    if split is not None and (split == _ALL or data.names(split)):
        dataset = data.read(split)
    elif part := data.part(split or "test", record):
        dataset = part
        notes.append(f"{path}: measured on the {_images(len(part))} {_role(part.split)}.")
    else:
        dataset = data.read(split or ("test" if data.names("test") else _ALL))
        size = _images(len(dataset))
        which = (
            f"its test split, {size}" if data.names("test") else f"all of its {size}, as it has no test split"
        )
        why = (
            "none of its images is known to the detector"
            if record is not None
            else "the detector has no splits.json that tells which images it was trained on"
        )
        notes.append(f"{path}: {why}; measured on {which}.")
    if record is not None:
        n = sum(sample.digest() in record.learned_from for sample in dataset)
        if n or dataset.split == _ALL:
            notes.append(_overlap(n, len(dataset)))
    return dataset, tuple(notes)


def _role(part: str) -> str:
    return "held out from the detector" if part == "test" else f"that were {part} in its training"


def _overlap(n: int, n_images: int) -> str:
    counted = f"{n} of {_images(n_images)} {'was' if n == 1 else 'were'} trained on"
    if n == 0:
        return f"{counted}."
    return f"{counted}: this AP {'says nothing about' if 2 * n >= n_images else 'is not that of'} new images."


def _images(n: int) -> str:
    return f"{n} image{'s' if n != 1 else ''}"


@dataclass(frozen=True)
class _Data:
    """A data set on disk and how to read it."""

    path: Path
    format: str | None
    drop_bad_boxes: bool
    allow_outside: bool

    def names(self, split: str) -> bool:
        """Return whether the data name this split."""
        splits = list_splits(self.path, format=self.format, allow_outside=self.allow_outside)
        return find_split(splits, split) is not None

    def read(self, split: str) -> Dataset:
        """Return a split by the name that it was asked for."""
        if split == _ALL and not self.names(split):
            return self._chosen(split, _each_once)
        dataset = load_dataset(
            self.path,
            split,
            format=self.format,
            drop_bad_boxes=self.drop_bad_boxes,
            allow_outside=self.allow_outside,
        )
        return replace(dataset, split=split)

    def part(self, name: str, record: SplitRecord | None) -> Dataset | None:
        """Return a part of training, or None where there is none or the images are others.

        Raises:
            DataError: some of the images are those of the training, and one of the part is not as it was.
        """
        for one in () if record is None else (record, *record.added):
            if name in one.parts and (found := self._chosen(name, functools.partial(self._find, name, one))):
                return found
        return None

    def _chosen(self, name: str, choose: Chooser) -> Dataset:
        return load_chosen(
            self.path,
            name,
            choose,
            format=self.format,
            drop_bad_boxes=self.drop_bad_boxes,
            allow_outside=self.allow_outside,
        )

    def _find(
        self, name: str, record: SplitRecord, splits: Mapping[str, Sequence[LabelledImage]]
    ) -> list[LabelledImage]:
        digest = functools.cache(_digest)
        by_id: dict[str, list[LabelledImage]] = {}
        for image in (image for split in splits.values() for image in split):
            by_id.setdefault(image.image_id, []).append(image)
        found: list[LabelledImage] = []
        missing: list[str] = []
        changed: list[str] = []
        for image_id, content in record.parts[name].items():
            others = by_id.get(image_id, [])
            same = next((image for image in others if digest(image.path) == content), None)
            if same is not None:
                found.append(same)
            else:
                (changed if others else missing).append(image_id)
        if not (missing or changed):
            return found
        paths = {image.path for images in by_id.values() for image in images}
        if not any(digest(path) in record.known for path in sorted(paths)):
            return []
        raise DataError(
            f"{self.path}: must hold the {_images(len(record.parts[name]))} {_role(name)}, got "
            f"{len(missing)} missing and {len(changed)} changed (the first: {(missing + changed)[0]!r}). "
            f"Put them back, or name a split with --split; all is every image."
        )


def _digest(path: Path) -> str:
    return Sample("", (1, 1), GroundTruth.empty(), path=path).digest()


def _each_once(splits: Mapping[str, Sequence[LabelledImage]]) -> list[LabelledImage]:
    """Return the images of all splits."""
    return list({image.path: image for listed in splits.values() for image in listed}.values())
