"""A refiner of boxes: learned from regions around objects, in numpy what it is in torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rcnn_svm.boxes import clip, decode_deltas, encode_deltas, iou
from rcnn_svm.errors import DataError, ShapeError
from rcnn_svm.heads.assign import RegionTruth, describe_regions
from rcnn_svm.heads.base import ALL, Rows
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.structures import GroundTruth
from rcnn_svm.training.config import RefineConfig
from rcnn_svm.training.refine import train_refiner

SIZE = (100, 120)
CONFIG = RefineConfig(hidden=64, dropout=0.0, weight_decay=0.0, n_steps=250, batch_size=64)


class Scenes:
    """Images of one or two objects whose rows tell, with noise, where the object of a region lies."""

    classes = ("red", "green", "never seen")
    n_features = 7

    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.truths, self._rows = [], []
        for _ in range(n):
            corner, side = rng.uniform(5, 40, 2), rng.uniform(25, 55, 2)
            truth = GroundTruth(np.array([[*corner, *(corner + side)]], np.float32), rng.integers(0, 2, 1))
            moves = rng.uniform(-0.3, 0.3, (30, 4)) * np.tile(side, 2)
            boxes = np.concatenate([truth.boxes, clip(truth.boxes + moves.astype(np.float32), SIZE)])
            told = describe_regions(boxes, truth, 3, 1)
            deltas = encode_deltas(told.boxes, told.target) + rng.normal(0, 0.01, (len(boxes), 4))
            noise = rng.normal(0, 1, (len(boxes), 3))
            self.truths.append(told)
            self._rows.append(np.concatenate([deltas * 5, noise], axis=1).astype(np.float16))

    def __len__(self) -> int:
        return len(self.truths)

    def features(self, i: int, rows: Rows = ALL) -> np.ndarray:
        return self._rows[i][rows]

    def truth(self, i: int) -> RegionTruth:
        return self.truths[i]

    def regions(self) -> Iterator[tuple[np.ndarray, RegionTruth]]:
        for i in range(len(self)):
            rows = np.arange(1, len(self.truths[i]))
            yield self.features(i, rows).astype(np.float32), self.truths[i].rows(rows)


def test_it_moves_boxes_nearer_and_tells_how_well_they_lie() -> None:
    refiner = train_refiner(Scenes(40, 0), CONFIG, seed=0)
    before, after, told = [], [], []
    for rows, truth in Scenes(20, 1).regions():
        deltas, overlaps = refiner(rows, truth.label)
        moved = decode_deltas(truth.boxes, deltas)
        after += np.diag(iou(moved, truth.target)).tolist()
        before += truth.best_iou.tolist()
        told += overlaps.tolist()
        assert ((overlaps > 0) & (overlaps < 1)).all()
    assert np.mean(before) < 0.75
    assert np.mean(after) > 0.9
    assert np.corrcoef(before, told)[0, 1] > 0.5


def test_equal_seeds_give_equal_refiners_and_arrays_give_them_back() -> None:
    short = RefineConfig(hidden=8, n_steps=3, batch_size=16)
    one, two, other = (train_refiner(Scenes(4, 0), short, seed=seed) for seed in (1, 1, 2))
    for name, array in one.to_arrays().items():
        np.testing.assert_array_equal(array, two.to_arrays()[name])
    assert not np.array_equal(one.weight, other.weight)
    rows, labels = np.ones((3, 7), np.float32), np.array([0, 2, 1])
    for first, second in zip(
        one(rows, labels), BoxRefiner.from_arrays(one.to_arrays())(rows, labels), strict=True
    ):
        np.testing.assert_array_equal(first, second)
    # A class is read by its own weights, whatever the others are.
    np.testing.assert_allclose(one(rows[:1], labels[1:2])[0], one(rows, labels)[0][1:2], rtol=1e-5)


def test_memory_is_bounded_by_the_rows_of_all_classes_alike() -> None:
    few = RefineConfig(hidden=8, n_steps=2, batch_size=16, max_rows=40)

    class Counting(Scenes):
        n_read = 0

        def features(self, i: int, rows: Rows = ALL) -> np.ndarray:
            found = super().features(i, rows)
            self.n_read += len(found)
            return found

    scenes = Counting(10, 0)
    train_refiner(scenes, few, seed=0)
    assert scenes.n_read == 40


def test_nothing_to_learn_from_is_said() -> None:
    class Far(Scenes):
        def truth(self, i: int) -> RegionTruth:
            return self.truths[i].rows(np.zeros(0, np.int64))

    with pytest.raises(
        DataError, match=r"^BoxRefiner: needs regions with IoU >= 0\.3 to an object, got none in 4"
    ):
        train_refiner(Far(4, 0), CONFIG)


def test_rows_of_another_length_and_arrays_of_no_refiner_are_refused() -> None:
    refiner = train_refiner(Scenes(4, 0), RefineConfig(hidden=8, n_steps=1, batch_size=16))
    with pytest.raises(ShapeError):
        refiner(np.ones((1, 6), np.float32), np.array([0]))
    with pytest.raises(ShapeError, match="fit together"):
        BoxRefiner(refiner.hidden_weight, refiner.hidden_bias, refiner.weight[:, :4], refiner.bias)
