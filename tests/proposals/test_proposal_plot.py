"""The pictures hold what they should; how they look is for eyes."""

from __future__ import annotations

import io

import numpy as np
import pytest

from rcnn_svm.proposals import SelectiveSearchConfig, proposal_recall, selective_search
from rcnn_svm.proposals.plot import boxes_figure, levels_figure, recall_figure
from rcnn_svm.proposals.selective_search import groupings
from rcnn_svm.structures import GroundTruth


@pytest.fixture
def image(rng):
    image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(12, 0).repeat(12, 1)
    return image


def is_drawn(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=40)
    return len(stream.getvalue()) > 1000


def test_levels(image):
    figure = levels_figure(image, levels=(5, 2))
    assert len(figure.axes) == 2 * 4
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "image"
    assert titles[2:4] == ["5 regions", "2 regions"]
    assert is_drawn(figure)


def test_levels_of_a_grouping_have_as_many_regions_as_asked(image):
    found = next(groupings(image, SelectiveSearchConfig()))
    n = len(found.segment_boxes)
    assert n > 8
    for level, expected in ((None, n), (n + 3, n), (n, n), (5, 5), (1, 1), (0, 1)):
        labels = found.labels(level)
        assert len(np.unique(labels)) == expected
        assert labels.shape == image.shape[:2]
    # the last two regions together make the box of the merge before
    two = found.labels(2)
    low, high = found.parents[-1]
    assert set(np.unique(two)) == {low, high}


def test_boxes_with_and_without_truth(image):
    regions = selective_search(image)
    assert is_drawn(boxes_figure(image, regions, budgets=(3, 50)))
    figure = boxes_figure(image, regions, np.array([[10, 10, 40, 50]], np.float32), budgets=(4,))
    assert figure.axes[0].get_title() == f"first 4 of {len(regions)} boxes"
    assert len(figure.axes[0].patches) == 4 + 3
    assert len(figure.axes[0].texts) == 1
    assert is_drawn(figure)


def test_recall_curves_stop_where_the_boxes_do(image):
    truth = GroundTruth(np.array([[10, 10, 40, 50]], np.float32), np.array([0]))
    boxes = selective_search(image).boxes[:30]
    result = proposal_recall([boxes], [truth], 1, budgets=(10, 20, 50, 100))
    figure = recall_figure({"fast": result, "grid": result})
    assert len(figure.axes) == 4
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 20, 50]
    assert is_drawn(figure)
