"""The grid keeps to its budget, stays inside the image and covers it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError
from rcnn_svm.proposals import GridConfig, dense_grid


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_keeps_to_the_budget_inside_the_image(height, width, n_boxes):
    regions = dense_grid((height, width), n_boxes)
    assert 1 <= len(regions) <= n_boxes
    np.testing.assert_array_equal(regions.boxes[0], [0, 0, width, height])
    assert len(np.unique(regions.boxes, axis=0)) == len(regions)
    assert (np.diff(regions.priority) > 0).all()


def test_uses_most_of_the_budget_and_large_boxes_first():
    regions = dense_grid((375, 500), 2000)
    assert len(regions) > 1500
    area = np.prod(regions.boxes[1:, 2:] - regions.boxes[1:, :2], axis=1)
    assert area[0] > 8 * area[-1]


def test_settings_make_the_same_grid():
    image = np.zeros((100, 140, 3), np.uint8)
    config = GridConfig(300, smallest=20)
    regions = config.propose(image)
    np.testing.assert_array_equal(regions.boxes, dense_grid((100, 140), 300, smallest=20).boxes)
    assert config.key() != GridConfig(301, smallest=20).key()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GridConfig(0), "GridConfig.n_boxes must be at least 1, got 0."),
        (lambda: GridConfig(smallest=0), "GridConfig.smallest must be at least 1, got 0."),
        (lambda: dense_grid((0, 5), 9), "dense_grid(''): size must be at least 1 x 1, got (0, 5)."),
    ],
)
def test_errors(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == message
