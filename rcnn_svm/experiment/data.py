"""The splits of an experiment, from a folder or rendered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rcnn_svm.datasets import Splits, labels_whole_images, load_splits
from rcnn_svm.datasets.digits import digits_images, digits_in_scenes, digits_splits
from rcnn_svm.datasets.drawing import classes_to_train
from rcnn_svm.errors import DataError
from rcnn_svm.experiment.config import DataConfig
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset

__all__ = [
    "DIGITS_IMAGES",
    "absent_classes",
    "for_these_data",
    "load_data",
    "require_measurable",
    "too_small",
]

DIGITS_IMAGES = {"train": 400, "val": 100, "test": 200}
"""Scenes of each split of the embedded data set."""


def for_these_data(config: DataConfig) -> DataConfig:
    """Return the configuration with `whole_images` where the data have no boxes.

    Raises:
        ConfigError: as `load_data`.
        DataError: as `load_data`.
    """
    embedded = {"digits": False, "digits-images": True}
    whole = embedded.get(config.path)
    if whole is None:
        whole = labels_whole_images(config.path, format=None if config.format == "auto" else config.format)
    return replace(config, whole_images=config.whole_images or whole)


def load_data(config: DataConfig, *, seed: int) -> Splits:
    """Return the splits that the configuration names; what was not as given is said.

    Raises:
        ConfigError: an option that the data set does not know.
        DataError: the data set is missing or broken.
    """
    if config.path == "digits":
        sizes = (min(n, config.max_images or n) for n in DIGITS_IMAGES.values())
        splits = digits_splits(*sizes, seed=seed)
        if absent_classes(splits):  # a few scenes do not show every digit
            whole = digits_in_scenes("train", DIGITS_IMAGES["train"], seed=seed)
            splits = splits.without_lost_classes(whole)
    elif config.path == "digits-images":
        splits = digits_images(seed=seed, max_images=config.max_images)
    else:
        splits = load_splits(
            config.path,
            format=None if config.format == "auto" else config.format,
            classes=config.classes or None,
            drop_bad_boxes=config.drop_bad_boxes,
            skip_bad=config.skip_bad,
            allow_outside=config.allow_outside,
            seed=seed,
            max_images=config.max_images,
        )
    if config.whole_images:
        splits = splits.as_whole_images()
    for note in splits.notes:
        say(note)
    absent = absent_classes(splits)
    if absent and config.skip_absent_classes:
        say(f"{splits.train.name}: without an object to train on, left out: {', '.join(absent)}.")
        return splits.with_classes([name for name in splits.train.classes if name not in absent])
    return splits


def too_small(dataset: Dataset, min_size: int) -> str | None:
    """Say how many objects no region of `min_size` pixels a side reaches with IoU 0.5, and what would.

    Returns:
        A sentence, or None where they are less than one in ten, or the images themselves.
    """
    if dataset.whole:
        return None
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.truth.boxes for sample in dataset)])
    sides = boxes[:, 2:] - boxes[:, :2]
    smallest_region = np.maximum(sides, min_size)
    small = sides.prod(axis=1) < 0.5 * smallest_region.prod(axis=1)
    if not small.any() or small.mean() < 0.1:
        return None
    fitting = max(int(np.percentile(sides[small].min(axis=1), 10)), 1)
    return (
        f"{dataset.name}: {small.sum()} of {len(boxes)} training objects are smaller than proposals.min_size "
        f"= {min_size} and out of reach of any region. Try --set proposals.min_size={fitting}."
    )


def require_measurable(test: Dataset) -> None:
    """Check that a split has something to be measured on, before anything is trained.

    Raises:
        DataError: it has no object but difficult ones and crowds.
    """
    if not any((~(s.truth.difficult | s.truth.crowd)).any() for s in test):
        raise DataError(
            f"{test.name}: the split {test.split!r} must have an object to be measured on, got none that is "
            f"neither difficult nor a crowd in {len(test)} images. Label some, or name another split."
        )


def absent_classes(splits: Splits) -> list[str]:
    """Return the classes without an object in `train` that could be a positive."""
    present = classes_to_train(splits.train)
    return [name for name in splits.train.classes if name not in present]
