"""Regions drawn for training: positives and background in a fixed ratio, uniformly and with replacement."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import encode_deltas
from rcnn_svm.errors import DataError
from rcnn_svm.heads.assign import LabelRule, RegionTruth

__all__ = ["Draw", "RegionIndex", "split_batch"]


@dataclass(frozen=True, eq=False)
class Draw:
    """Regions drawn for training.

    Attributes:
        image: (n,) int64.
        row: (n,) int64, its row within the image.
        label: (n,) int64 in 0 .. K, K is background.
        delta: (n, 4) float32 box targets; zeros for background.
    """

    image: NDArray[np.int64]
    row: NDArray[np.int64]
    label: NDArray[np.int64]
    delta: NDArray[np.float32]


class RegionIndex:
    """All positives and all background regions of a training split, to draw from.

    Holds a few bytes a region; the regions' boxes and features stay where they are.

    Args:
        regions: of each image.
        rule: which are positives and which background.
        n_classes: K.
        where: what is trained, for errors.
        positive_share: of what will be drawn; 1 needs no background.

    Raises:
        DataError: there is no positive, or no background that is needed.
    """

    def __init__(
        self,
        regions: Iterable[RegionTruth],
        rule: LabelRule,
        n_classes: int,
        where: str,
        positive_share: float = 0.5,
    ) -> None:
        self.n_classes = n_classes
        self._background: list[NDArray[np.uint32]] = []
        image, row, label, delta = [], [], [], []
        for i, truth in enumerate(regions):
            labels = rule.multiclass(truth)
            self._background.append(np.flatnonzero(labels == n_classes).astype(np.uint32))
            positive = np.flatnonzero((labels >= 0) & (labels < n_classes))
            image.append(np.full(len(positive), i))
            row.append(positive)
            label.append(labels[positive])
            targets = encode_deltas(truth.boxes[positive], truth.target[positive])
            delta.append(targets.astype(np.float32))
        self._ends = np.cumsum([len(rows) for rows in self._background])
        if not image or not sum(map(len, row)) or not (self._ends[-1] or positive_share == 1):
            kind = "background region" if image and sum(map(len, row)) else "positive region"
            raise DataError(
                f"{where}: there is no {kind} to train on, got {len(image)} images. "
                f"Check that the data set has labelled objects and the images have proposals."
            )
        self._image, self._row, self._label = map(np.concatenate, (image, row, label))
        self._delta = np.concatenate(delta)
        self._by_class = [rows for k in range(n_classes) if len(rows := np.flatnonzero(self._label == k))]

    def draw(self, rng: np.random.Generator, n_positive: int, n_background: int, balanced: bool) -> Draw:
        """Draw positives, then background, uniformly with replacement (or evenly over classes)."""
        if balanced:
            classes = rng.integers(len(self._by_class), size=n_positive)
            at = rng.random(n_positive)
            sizes = np.array([len(rows) for rows in self._by_class])
            picked = np.array(
                [
                    self._by_class[k][j]
                    for k, j in zip(classes, (at * sizes[classes]).astype(int), strict=True)
                ],
                np.int64,
            )
        else:
            picked = rng.integers(len(self._label), size=n_positive)
        place = rng.integers(max(self._ends[-1], 1), size=n_background)
        image = np.searchsorted(self._ends, place, side="right")
        first = self._ends[image] - np.array([len(rows) for rows in self._background])[image]
        row = np.array([self._background[i][j] for i, j in zip(image, place - first, strict=True)], np.int64)
        background = np.full(n_background, self.n_classes)
        return Draw(
            np.concatenate([self._image[picked], image]),
            np.concatenate([self._row[picked], row]),
            np.concatenate([self._label[picked], background]),
            np.concatenate([self._delta[picked], np.zeros((n_background, 4), np.float32)]),
        )

    def draw_from_one_image(self, rng: np.random.Generator, n_positive: int, n_background: int) -> Draw:
        """Draw an image with a class, all classes alike, then regions of it with replacement.

        Half of the positives are of that class, the others of any class in the image, all alike. An image
        without background gives positives only.
        """
        members = self._by_class[rng.integers(len(self._by_class))]
        images = np.unique(self._image[members])
        image = int(images[rng.integers(len(images))])
        first, last = np.searchsorted(self._image, (image, image + 1))
        own = np.arange(first, last)
        labels = self._label[own]
        wanted = np.full(n_positive, self._label[members[0]])
        wanted[n_positive // 2 :] = rng.choice(np.unique(labels), n_positive - n_positive // 2)
        picked = np.array([rng.choice(own[labels == k]) for k in wanted], np.int64)
        background = self._background[image]
        n_background = n_background if len(background) else 0
        row = background[rng.integers(max(len(background), 1), size=n_background)].astype(np.int64)
        return Draw(
            np.full(n_positive + n_background, image),
            np.concatenate([self._row[picked], row]),
            np.concatenate([self._label[picked], np.full(n_background, self.n_classes)]),
            np.concatenate([self._delta[picked], np.zeros((n_background, 4), np.float32)]),
        )


def split_batch(batch_size: int, positive_share: float) -> tuple[int, int]:
    """Return how many positives and background a batch has, at least one of each unless the share is 1."""
    if positive_share == 1:
        return batch_size, 0
    n_positive = min(max(1, round(batch_size * positive_share)), batch_size - 1)
    return n_positive, batch_size - n_positive
