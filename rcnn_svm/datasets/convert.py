"""From one format of boxes to another: the same boxes, classes and splits; what is lost is said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from rcnn_svm.boxes import area
from rcnn_svm.datasets.layout import role_of
from rcnn_svm.datasets.loading import Classes, load_all_splits
from rcnn_svm.datasets.write import BoxFormat, whole_pixels, write_dataset
from rcnn_svm.errors import ConfigError
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset

__all__ = ["convert_dataset", "require_boxes"]

_SAME_AREA = 1e-3  # relative: files round areas


def convert_dataset(
    path: str | Path,
    to: BoxFormat,
    out: str | Path,
    *,
    format: str | None = None,
    classes: Classes = None,
    drop_bad_boxes: bool = False,
    allow_outside: bool = False,
) -> dict[str, Dataset]:
    """Write a data set in another format; what that format cannot hold is said.

    Every split keeps its name and its images. Where YOLO, whose tools know train, val and test, would not
    find a split, it gets the name of the part that it plays. Image files are copied byte for byte. Of the
    label files all is kept that this package reads: boxes, classes, difficult, crowd, area, and
    VOC's flags within VOC; outlines of segments, key points and attributes are not.

    Args:
        path: as in `load_dataset`.
        to: `voc`, `coco` or `yolo`.
        out: a folder that is absent or empty.
        format: of `path`, as in `load_dataset`.
        classes: as in `load_dataset`.
        drop_bad_boxes: as in `load_dataset`.
        allow_outside: as in `load_dataset`.

    Returns:
        The splits, as they were written.

    Raises:
        ConfigError: labels are of whole images, splits that YOLO has no name for, or as `write_dataset`.
        DataError: as `load_dataset` and `write_dataset`.
    """
    parts = load_all_splits(
        path, format=format, classes=classes, drop_bad_boxes=drop_bad_boxes, allow_outside=allow_outside
    )
    require_boxes(parts, path)
    if to == "yolo":
        parts = _as_yolo_names(parts, path)
    for sentence in _lost(parts, to):
        say(sentence)
    if {"train", "val"} <= parts.keys():
        parts.pop("trainval", None)  # readers put it together from the two
    write_dataset(parts, out, to)
    return parts


def require_boxes(parts: Mapping[str, Dataset], path: str | Path) -> None:
    """Refuse data without boxes.

    Raises:
        ConfigError: labels are of whole images.
    """
    if any(part.whole for part in parts.values()):
        raise ConfigError(
            f"{path}: must label boxes to be written as VOC, COCO or YOLO, labels whole images. Files "
            f"in a folder for each class, or a CSV, hold those."
        )


def _as_yolo_names(parts: Mapping[str, Dataset], path: str | Path) -> dict[str, Dataset]:
    """Return the splits under the names that YOLO's tools look for; others are said.

    Raises:
        ConfigError: several splits would have the same name, or one that plays no part is not alone.
    """
    named: dict[str, Dataset] = {}
    for old, part in parts.items():
        role = role_of(old)
        alone = len(parts) == 1
        new = "train" if (role == "trainval" and "train" not in parts) or (role is None and alone) else role
        if new is None or new in named:
            raise ConfigError(
                f"{path}: YOLO knows the splits train, val and test, must have one for each at most, has "
                f"{', '.join(parts)}. `rcnn-svm data split` makes such splits."
            )
        if new != old:
            say(f"The split {old} becomes {new}, which tools that read YOLO look for.")
        named[new] = replace(part, split=new)
    return named


def _lost(parts: Mapping[str, Dataset], to: BoxFormat) -> list[str]:
    """Say what the format does not hold, `write_dataset`'s own words on flags aside."""
    samples = list({sample.image_id: sample for part in parts.values() for sample in part}.values())
    n = sum(len(sample.truth) for sample in samples)
    lost = []
    renamed = [one.image_id for one in samples if "/" in one.image_id or "\\" in one.image_id]
    if renamed:
        lost.append(
            f"{len(renamed)} images of folders get flat names: the first, {renamed[0]}, becomes "
            f"{renamed[0].replace('/', '_')}."
        )
    if {"train", "val", "trainval"} <= parts.keys():
        kept = {sample.image_id for name in ("train", "val") for sample in parts[name]}
        more = sum(sample.image_id not in kept for sample in parts["trainval"])
        if more:
            lost.append(f"{more} images of trainval are in neither train nor val and are left out.")
    if to != "voc":
        told = [np.stack([*one.truth.flags.values()]) for one in samples if one.truth.flags]
        flagged = sum(int(flags.any(axis=0).sum()) for flags in told)
        if flagged:
            lost.append(
                f"{to.upper()} has no flags such as truncated: those of {flagged} of {n} objects are lost."
            )
    if to == "coco":
        return lost
    segments = sum(
        int((np.abs(one.truth.area - area(one.truth.boxes)) > _SAME_AREA * area(one.truth.boxes)).sum())
        for one in samples
    )
    if segments:
        lost.append(f"{to.upper()} has no area but the box's: that of {segments} of {n} objects is lost.")
    if to == "voc":
        moves = [np.abs(whole_pixels(one) - one.truth.boxes).max(axis=1, initial=0) for one in samples]
        moved = np.concatenate([np.zeros(0), *moves])
        if (moved > 0).any():
            lost.append(
                f"VOC has whole pixels: {(moved > 0).sum()} of {n} boxes are rounded, by {moved.max():.2g} "
                f"pixels at most."
            )
        crowds = sum(int(one.truth.crowd.sum()) for one in samples)
        if crowds:
            lost.append(f"VOC has no crowds: {crowds} become difficult objects.")
    return lost
