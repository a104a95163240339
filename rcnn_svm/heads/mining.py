"""Hard-negative mining: which negatives a linear SVM is trained on, and when.

Two schedules. `FixedPointMining`, ours, ends with a proof: a last pass over all regions at fixed
weights bounds how far the SVM is from the one trained on every region. `PaperMining` is R-CNN's
schedule to the letter: one pass in image order, nothing proved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from rcnn_svm.config import Count, Interval, check
from rcnn_svm.engine import Engine
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.heads.assign import LabelRule
from rcnn_svm.heads.base import RegionBlocks, engine_of, read_features, reading
from rcnn_svm.heads.solver.rows import Part
from rcnn_svm.progress import track

__all__ = ["BlocksSource", "FixedPointMining", "MiningLog", "PaperMining", "mine_as_in_the_paper"]


@dataclass(frozen=True)
class FixedPointMining:
    """Mine until the SVM over the mined regions is the SVM over all of them.

    Attributes:
        max_passes: passes over the features before giving up on the tolerance.
        max_bytes: bound of the cache of mined regions. Regions that had to leave it keep their
            dual variables, so that a small cache costs passes, never accuracy.
    """

    max_passes: Count = 50
    max_bytes: Count = 1 << 30

    def __post_init__(self) -> None:
        check(self, where="FixedPointMining")


@dataclass(frozen=True)
class PaperMining:
    """R-CNN's schedule.

    Images are visited in order. The first one trains every class; of each later one a class keeps
    the negatives that score above `hard`. A class retrains once more than `retrain_after` were
    added (strictly), and at the end; then cached negatives that score below `evict` are dropped.
    Positives stay for ever. The cache has no bound.

    Attributes:
        hard: a negative is kept when its score is above this.
        evict: a cached negative is dropped when its score is below this.
        retrain_after: additions of one class that it takes, strictly more, to retrain it.
        epochs: passes over the images.

    Raises:
        ConfigError: a value out of range, or `evict` above `hard`.

    References:
        rbgirshick/rcnn, rcnn_train.m and init_cache.
    """

    hard: float = -1.0001
    evict: float = -1.2
    retrain_after: Annotated[int, Interval(0)] = 2000
    epochs: Count = 1

    def __post_init__(self) -> None:
        check(self, where="PaperMining")
        if self.evict > self.hard:
            raise ConfigError(
                f"PaperMining.evict must be at most PaperMining.hard, {self.hard}, got {self.evict}."
            )


@dataclass(frozen=True)
class MiningLog:
    """What mining did.

    Attributes:
        passes: rows read, over rows there are.
        trainings: how often a class was trained, in the mean.
        n_cached: (K,) rows in each class's cache at the end; its positives included.
    """

    passes: float
    trainings: float
    n_cached: NDArray[np.int64]


class BlocksSource:
    """Region blocks as a `solver.RowSource`: images are its parts, a rule gives the labels.

    Raises:
        DataError: a class has no positive or no negative; the message names it.
    """

    matrix: NDArray[np.float32] | None = None

    def __init__(self, blocks: RegionBlocks, rule: LabelRule) -> None:
        self._blocks = blocks
        self.engine: Engine = engine_of(blocks)
        self.n_features = int(blocks.n_features)
        self.n_classes = len(blocks.classes)
        self._labels = [rule.per_class(blocks.truth(i)) for i in range(len(blocks))]
        self._first = np.concatenate([[0], np.cumsum([len(labels) for labels in self._labels])])
        counts = np.zeros((2, self.n_classes), np.int64)
        for labels in self._labels:
            counts += np.stack([(labels > 0).sum(axis=0), (labels < 0).sum(axis=0)])
        for sign, count in zip(("positive", "negative"), counts, strict=True):
            if (count == 0).any():
                names = ", ".join(np.array(blocks.classes)[count == 0])
                raise DataError(
                    f"SVM: every class needs a {sign} region, got none for {names} in "
                    f"{len(blocks)} images. Leave the class out, or label some of it."
                )

    def __len__(self) -> int:
        return len(self._labels)

    def first_row(self, part: int) -> int:
        """Return the number of rows before image `part`."""
        return int(self._first[part])

    def labels(self, part: int) -> NDArray[np.int8]:
        """Return (R, K) labels of an image."""
        return self._labels[part]

    def sample_weight(self, part: int) -> NDArray[np.float32]:
        """Return (R,) ones."""
        return np.ones(len(self._labels[part]), np.float32)

    def features(self, part: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return (R, D) float32 features of an image, or of some of its rows."""
        return read_features(self._blocks, part, slice(None) if rows is None else rows)

    def part(self, part: int) -> Part:
        """Return an image on its own."""
        return Part(self._labels[part], self.sample_weight(part), reading(self._blocks, part))


TrainOne = Callable[[int, NDArray[np.float32], NDArray[np.int8]], tuple[NDArray[np.float32], float]]
"""(class, (n, D) rows, (n,) labels +-1) -> (D,) coefficients and intercept."""


class _RowPool:
    """Rows shared by the caches of all classes, each row once."""

    def __init__(self, n_features: int) -> None:
        self._rows = np.empty((0, n_features), np.float32)
        self._free: list[int] = []
        self._slot: dict[tuple[int, int], int] = {}
        self._key: dict[int, tuple[int, int]] = {}
        self._users: dict[int, int] = {}

    def use(self, part: int, row: int, features: NDArray[np.float32]) -> int:
        """Return the slot of a row, storing it where it is new, and count one more user."""
        slot = self._slot.get((part, row))
        if slot is None:
            if not self._free:
                n = len(self._rows)
                grown = np.empty((max(1024, n * 3 // 2), self._rows.shape[1]), np.float32)
                grown[:n] = self._rows
                self._rows = grown
                self._free = list(range(len(grown) - 1, n - 1, -1))
            slot = self._free.pop()
            self._rows[slot] = features
            self._slot[part, row], self._key[slot], self._users[slot] = slot, (part, row), 0
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Take one user off a row, and its place with the last."""
        self._users[slot] -= 1
        if self._users[slot] == 0:
            del self._users[slot]
            del self._slot[self._key.pop(slot)]
            self._free.append(slot)

    def rows(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._rows[slots]


class _ClassCache:
    """The rows one class trains on: positives first and for ever, then negatives that come and go."""

    def __init__(self) -> None:
        self.positives: list[int] = []
        self.negatives: dict[tuple[int, int], int] = {}  # (image, row) -> slot, in order of arrival
        self.n_added = 0


def mine_as_in_the_paper(
    source: BlocksSource, schedule: PaperMining, train_one: TrainOne, *, n_jobs: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32], MiningLog]:
    """Train one SVM per class by R-CNN's schedule.

    Args:
        source: labelled rows, image by image.
        schedule: the constants.
        train_one: the solver of a single class.
        n_jobs: processes that share the classes due for training.

    Returns:
        (K, D) coefficients, (K,) intercepts and a log.
    """
    n_classes = source.n_classes
    coef = np.zeros((n_classes, source.n_features), np.float32)
    intercept = np.zeros(n_classes, np.float32)
    pool, caches = _RowPool(source.n_features), [_ClassCache() for _ in range(n_classes)]
    rows_read = trainings = 0
    for i in range(len(source)):
        rows = np.flatnonzero((source.labels(i) > 0).any(axis=1))
        features = source.features(i, rows)
        rows_read += len(rows)
        for row, vector in zip(rows.tolist(), features, strict=True):
            for k in np.flatnonzero(source.labels(i)[row] > 0).tolist():
                caches[k].positives.append(pool.use(i, row, vector))

    def training_set(k: int) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        cache = caches[k]
        x = pool.rows(np.array(cache.positives + list(cache.negatives.values())))
        return x, np.where(np.arange(len(x)) < len(cache.positives), 1, -1).astype(np.int8)

    first_time = True
    for epoch in range(schedule.epochs):
        for i in track(range(len(source)), "mining"):
            features, labels = source.features(i), source.labels(i)
            rows_read += len(features)
            scores = features @ coef.T + intercept
            last = epoch == schedule.epochs - 1 and i == len(source) - 1
            due = []
            for k, cache in enumerate(caches):
                hard = labels[:, k] < 0
                if not first_time:
                    hard &= scores[:, k] > schedule.hard
                for row in np.flatnonzero(hard).tolist():
                    if (i, row) not in cache.negatives:
                        cache.negatives[i, row] = pool.use(i, row, features[row])
                        cache.n_added += 1
                if cache.negatives and (first_time or last or cache.n_added > schedule.retrain_after):
                    due.append(k)
            first_time = False
            # Processes, not threads: liblinear draws from one random generator per process.
            models = Parallel(n_jobs=n_jobs)(delayed(train_one)(k, *training_set(k)) for k in due)
            trainings += len(due)
            for k, (coef[k], intercept[k]) in zip(due, models, strict=True):
                cache = caches[k]
                cache.n_added = 0
                margins = pool.rows(np.array(list(cache.negatives.values()))) @ coef[k] + intercept[k]
                for key in [
                    key for key, z in zip(cache.negatives, margins, strict=True) if z < schedule.evict
                ]:
                    pool.release(cache.negatives.pop(key))
    log = MiningLog(
        passes=rows_read / max(1, source.first_row(len(source))),
        trainings=trainings / n_classes,
        n_cached=np.array([len(c.positives) + len(c.negatives) for c in caches]),
    )
    return coef, intercept, log
