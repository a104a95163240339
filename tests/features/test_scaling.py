from __future__ import annotations

import json

import numpy as np
import pytest

from rcnn_svm.errors import ConfigError, NotFittedError
from rcnn_svm.features.scaling import FeatureScaler


class Blocks:
    def __init__(self, *blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def features(self, i):
        return self.blocks[i]


@pytest.fixture
def rows(rng):
    return rng.normal(size=(50, 8)).astype(np.float16)


def test_none_leaves_rows_alone(rows):
    got = FeatureScaler("none")(rows)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("scaling", ["l2", "sqrt-l2"])
def test_rows_of_length_one(rows, scaling):
    got = FeatureScaler(scaling)(rows)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(np.sign(got), np.sign(rows))


def test_values():
    row = np.array([[-9.0, 16.0, 0.0]], np.float32)
    np.testing.assert_allclose(FeatureScaler("sqrt-l2")(row), [[-0.6, 0.8, 0]], rtol=1e-6)
    np.testing.assert_array_equal(FeatureScaler("l2")(np.zeros((2, 3))), np.zeros((2, 3)))


def test_mean_norm_is_twenty_on_training_rows(rows):
    blocks = Blocks(rows, rows[:3] * 2)
    scaler = FeatureScaler("mean-norm-20").fit(blocks)
    scaled = np.concatenate([scaler(b) for b in blocks.blocks])
    assert np.linalg.norm(scaled, axis=1).mean() == pytest.approx(20, rel=1e-3)
    restored = FeatureScaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(restored(rows), scaler(rows))


def test_errors(rows):
    with pytest.raises(ConfigError) as caught:
        FeatureScaler("l1")
    assert str(caught.value) == (
        "FeatureScaler: scaling must be one of none, l2, sqrt-l2, mean-norm-20, got 'l1'."
    )
    with pytest.raises(NotFittedError, match="call fit before scaling to a mean norm of 20"):
        FeatureScaler("mean-norm-20")(rows)
    with pytest.raises(ConfigError, match="the training regions must have features other than zero"):
        FeatureScaler("mean-norm-20").fit(Blocks(np.zeros((0, 4)), np.zeros((3, 4))))
