"""Each reason to try something else, its edge, and silence without a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.proposals import SelectiveSearchConfig, proposal_recall
from rcnn_svm.report.advice import (
    TrainingObjects,
    WeakClass,
    advice,
    few_objects,
    missed_objects,
    small_objects,
    weak_class,
)
from rcnn_svm.structures import Dataset, GroundTruth, Sample

CONFIG = ExperimentConfig()


def objects(
    n: int = 100,
    *,
    classes: tuple[str, ...] = ("apple", "banana"),
    labels: list[int] | None = None,
    missed: int = 0,
    small: int = 0,
    short: float = 50.0,
    n_proposals: float = 500.0,
) -> TrainingObjects:
    """Return objects without any reason for advice, but for what is asked for."""
    overlaps = np.full(n, 0.5)
    overlaps[:missed] = 0.49
    relative = np.full(n, 0.1)  # of 480 pixels: 48
    relative[:small] = 0.0999
    return TrainingObjects(
        classes,
        np.arange(n) % len(classes) if labels is None else np.array(labels, np.int64),
        np.full(n, short),
        relative,
        overlaps,
        n_proposals,
    )


def test_good_data_get_no_advice() -> None:
    assert advice(objects(), None, CONFIG) == []


def test_objects_that_no_proposal_reaches() -> None:
    config = SelectiveSearchConfig(max_regions=1000)
    assert missed_objects(objects(missed=10), config) is None
    assert missed_objects(objects(missed=11), config) == (
        "--set proposals.mode=quality: no proposal reaches 11 % of the training objects"
    )
    assert missed_objects(objects(missed=11), replace(config, mode="quality")) is None


def test_missed_objects_below_the_smallest_proposal() -> None:
    line = missed_objects(objects(missed=30, short=12), SelectiveSearchConfig(min_size=20))
    assert line is not None
    assert line.startswith("--set proposals.min_size=10: no proposal reaches 30 %")
    line = missed_objects(objects(missed=30, short=12), SelectiveSearchConfig(min_size=12))
    assert line is not None
    assert "min_size" not in line


def test_missed_objects_where_proposals_are_cut_off() -> None:
    config = SelectiveSearchConfig(max_regions=300)
    line = missed_objects(objects(missed=30, n_proposals=299.0), config)
    assert line is not None
    assert line.startswith("--set proposals.max_regions=600: no proposal reaches 30 %")
    line = missed_objects(objects(missed=30, n_proposals=200.0), config)
    assert line is not None
    assert "max_regions" not in line


def test_few_objects_of_a_class() -> None:
    assert few_objects(objects(40)) is None  # 20 of each
    line = few_objects(objects(39))
    assert line == "more labels of banana (19): fewer than 20 training objects teach little"


def test_of_many_rare_classes_the_rarest_are_named() -> None:
    line = few_objects(
        objects(15, classes=tuple("abcde"), labels=[0] + 2 * [1] + 3 * [2] + 4 * [3] + 5 * [4])
    )
    assert line is not None
    assert "a (1), b (2), c (3) and 2 others" in line


def test_small_objects() -> None:
    features = FeatureConfig(longer_sides=(480,))
    assert small_objects(objects(small=9), features) is None
    assert small_objects(objects(small=10), features) == (
        "--set features.longer_sides=[480,960], slower: 10 % of the training objects are below 48 of 480 "
        "pixels"
    )
    assert small_objects(objects(small=100), FeatureConfig(longer_sides=(640,))) is None
    line = small_objects(objects(small=100), FeatureConfig(longer_sides=(240, 480)))
    assert line is not None
    assert "[240,480,960]" in line


def test_a_warped_region_is_as_large_as_any_other() -> None:
    assert small_objects(objects(small=100), FeatureConfig(path="warped")) is None


def test_a_class_far_weaker_than_the_others() -> None:
    n = {"a": 10, "b": 10, "c": 10, "d": 9, "e": 10}
    ap: dict[str, float | None] = {"a": 80.0, "b": 60.0, "c": 50.0, "d": 0.0, "e": None}
    assert weak_class(ap, n) == WeakClass("c", 50.0, 70.0)
    assert weak_class(ap | {"c": 50.1}, n) is None
    assert weak_class({"a": 80.0, "d": 0.0}, n) is None
    assert weak_class({}, {}) is None


def test_a_weak_class_is_named_unless_its_rareness_is() -> None:
    weak = WeakClass("banana", 12.34, 60.0)
    (line,) = advice(objects(), weak, CONFIG)
    assert "banana" in line
    assert "12.3 AP" in line
    (line,) = advice(objects(39), weak, CONFIG)
    assert line == few_objects(objects(39))


def test_at_most_three_lines_and_none_too_long() -> None:
    bad = objects(39, missed=20, small=39, short=5)
    lines = advice(bad, WeakClass("apple", 1.0, 99.0), CONFIG)
    assert len(lines) == 3
    assert ["min_size" in lines[0], "banana" in lines[1], "longer_sides" in lines[2]] == [True] * 3
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("n", [0, 3])
def test_objects_are_those_that_count(n: int) -> None:
    boxes = [[0, 0, 20, 80], [0, 0, 40, 10], [0, 0, 9, 9]][:n]
    flags = [False, False, True][:n]
    truth = GroundTruth(np.reshape(boxes, (-1, 4)), [1, 0, 0][:n], difficult=flags)
    dataset = Dataset("d", "trainval", ("apple", "banana"), (Sample("i", (100, 200), truth),))
    coverage = proposal_recall([np.array([[0, 0, 20, 40]], np.float32)], [truth], 2, budgets=(5,))
    found = TrainingObjects.of(dataset, coverage)
    expected = [(1, 20.0, 0.2, 0.5), (0, 10.0, 0.1, 0.2)][:n]
    rows = zip(found.labels, found.short_sides, found.relative_sides, found.overlaps, strict=True)
    assert [tuple(row) for row in rows] == [pytest.approx(row) for row in expected]
    assert found.n_proposals == 1.0
    assert few_objects(found) is not None  # without any object all classes are rare
