"""Seeded draws of images that keep every class where they can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rcnn_svm.structures import Dataset, Sample

__all__ = ["classes_to_train", "draw_folds", "draw_parts"]


def classes_to_train(dataset: Dataset) -> list[str]:
    """Return the classes with an object that can be a positive, in the order of their labels.

    Difficult objects can, crowds cannot.
    """
    present = set().union(*map(_labels, dataset.samples))
    return [name for k, name in enumerate(dataset.classes) if k in present]


def draw_parts(dataset: Dataset, sizes: Sequence[int], rng: np.random.Generator) -> list[Dataset]:
    """Draw disjoint parts of a data set, none of which lacks a class by chance.

    Classes go first, those of few images before those of many; only classes of fewer images than there are
    parts, which cannot be in all, go last. The first part takes an image of each class that it does not show
    yet, as far as it has room, then the second part does with what is left, and so on. Then all parts are
    filled at random, with whole images so that each class has its share of every part. A first part of at
    least as many images as there are classes thus shows every class that the data set shows.

    Args:
        dataset: to draw from.
        sizes: images of each part, in order of who chooses first; together at most those of the data set.
        rng: of the draw.

    Returns:
        One data set for each size, its images in the order of `dataset`.
    """
    order = rng.permutation(len(dataset)).tolist()
    labels = [_labels(sample) for sample in dataset]
    images_of: dict[int, list[int]] = {}
    for i in order:
        for label in labels[i]:
            images_of.setdefault(label, []).append(i)
    rarest_first = sorted(
        images_of, key=lambda label: (len(images_of[label]) < len(sizes), len(images_of[label]), label)
    )
    taken: set[int] = set()
    parts: list[list[int]] = []
    for size in sizes:
        part: list[int] = []
        shown: set[int] = set()
        for label in rarest_first:
            free = (i for i in images_of[label] if i not in taken)
            if label not in shown and len(part) < size and (found := next(free, None)) is not None:
                part.append(found)
                taken.add(found)
                shown |= labels[found]
        parts.append(part)
    left = [i for i in order if i not in taken]
    if dataset.whole:
        left = _spread(left, [min(own, default=-1) for own in labels])
    for part, size in zip(parts, sizes, strict=True):
        n = size - len(part)
        part += left[:n]
        left = left[n:]
    return [replace(dataset, samples=tuple(dataset.samples[i] for i in sorted(part))) for part in parts]


def draw_folds(dataset: Dataset, n: int, rng: np.random.Generator) -> list[Dataset]:
    """Draw `n` disjoint parts of a data set, each of which leaves every class in the rest.

    The images of a class are dealt out in turn, those of the rarest class first. An image that is the only
    one of some class is in no part, nor is the last one of a part that would take a whole class with it.

    Args:
        dataset: to draw from.
        n: number of parts, at least 2; there are fewer where there are not so many images to deal out.
        rng: of the draw.

    Returns:
        The parts that have an image, their images in the order of `dataset`.
    """
    labels = [_labels(sample) for sample in dataset]
    counts = Counter(label for own in labels for label in own)
    order = [
        i for i in rng.permutation(len(dataset)).tolist() if all(counts[label] > 1 for label in labels[i])
    ]
    parts: list[list[int]] = [[] for _ in range(n)]
    shown = [Counter[int]() for _ in range(n)]
    left = dict.fromkeys(order)
    # None stands for the images without objects, which come last.
    for label in (*sorted(counts, key=lambda label: (counts[label], label)), None):
        for i in [i for i in left if label is None or label in labels[i]]:
            k = min(range(n), key=lambda k: (shown[k][label] if label is not None else 0, len(parts[k]), k))
            parts[k].append(i)
            shown[k].update(labels[i])
            del left[i]
    for part, own in zip(parts, shown, strict=True):
        for i in reversed(part.copy()):
            if any(own[label] == counts[label] for label in labels[i]):
                part.remove(i)
                own.subtract(labels[i])
    return [
        replace(dataset, samples=tuple(dataset.samples[i] for i in sorted(part))) for part in parts if part
    ]


def _spread(images: Sequence[int], label: Sequence[int]) -> list[int]:
    """Return images in an order of which every stretch holds each label in its share of all."""
    of_label: dict[int, list[int]] = {}
    for i in images:
        of_label.setdefault(label[i], []).append(i)
    place = {i: (n + 0.5) / len(own) for own in of_label.values() for n, i in enumerate(own)}
    return sorted(images, key=lambda i: (place[i], label[i]))


def _labels(sample: Sample) -> set[int]:
    return set(sample.truth.labels[~sample.truth.crowd].tolist())
