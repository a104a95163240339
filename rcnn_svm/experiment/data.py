"""The splits of an experiment, from a folder or rendered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from rcnn_svm.datasets import Splits, load_splits
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.experiment.config import DataConfig
from rcnn_svm.progress import say
from rcnn_svm.structures import Dataset

__all__ = ["DIGITS_IMAGES", "absent_classes", "load_data", "too_small"]

DIGITS_IMAGES = {"train": 400, "val": 100, "test": 200}
"""Scenes of each split of the embedded data set."""


def load_data(config: DataConfig, *, seed: int) -> Splits:
    """Return the splits that the configuration names; what was not as given is said.

    Raises:
        ConfigError: an option that the data set does not know.
        DataError: the data set is missing or broken.
    """
    if config.path == "digits":
        sizes = (min(n, config.max_images or n) for n in DIGITS_IMAGES.values())
        return digits_splits(*sizes, seed=seed)
    splits = load_splits(
        config.path,
        format=None if config.format == "auto" else config.format,
        classes=config.classes or None,
        drop_bad_boxes=config.drop_bad_boxes,
        skip_bad=config.skip_bad,
        seed=seed,
        max_images=config.max_images,
    )
    for note in splits.notes:
        say(note)
    absent = absent_classes(splits)
    if absent and config.skip_absent_classes:
        say(f"{splits.train.name}: without an object to train on, left out: {', '.join(absent)}.")
        kept = [name for name in splits.train.classes if name not in absent]
        train, val, trainval, test = (
            _only(part, kept) for part in (splits.train, splits.val, splits.trainval, splits.test)
        )
        return Splits(train, val, trainval, test, splits.notes)
    return splits


def too_small(dataset: Dataset, min_size: int) -> str | None:
    """Say how many objects no region of `min_size` pixels a side reaches with IoU 0.5, and what would.

    Returns:
        A sentence, or None where they are less than one in ten.
    """
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.truth.boxes for sample in dataset)])
    sides = boxes[:, 2:] - boxes[:, :2]
    reach = sides.prod(axis=1) / np.maximum(sides, min_size).prod(
        axis=1
    )  # IoU of the smallest region around it
    small = reach < 0.5
    if not small.any() or small.mean() < 0.1:
        return None
    fitting = max(int(np.percentile(sides[small].min(axis=1), 10)), 1)
    return (
        f"{dataset.name}: {small.sum()} of {len(boxes)} training objects are smaller than proposals.min_size "
        f"= {min_size} and out of reach of any region. Try --set proposals.min_size={fitting}."
    )


def absent_classes(splits: Splits) -> list[str]:
    """Return the classes without an object in `train` that could be a positive."""
    present: set[int] = set()
    for sample in splits.train:
        present |= set(sample.truth.labels[~sample.truth.crowd].tolist())
    return [name for k, name in enumerate(splits.train.classes) if k not in present]


def _only(dataset: Dataset, names: Collection[str]) -> Dataset:
    """Return the data set with the objects of some of its classes."""
    new = {dataset.classes.index(name): k for k, name in enumerate(names)}
    samples = []
    for sample in dataset:
        truth = sample.truth[np.isin(sample.truth.labels, list(new))]
        labels = np.array([new[int(label)] for label in truth.labels], np.int64)
        samples.append(replace(sample, truth=replace(truth, labels=labels)))
    return replace(dataset, classes=tuple(names), samples=tuple(samples))
