from __future__ import annotations

import numpy as np

from rcnn_svm.evaluation.errors import CORRECT, ERROR_TYPES, false_positive_types
from rcnn_svm.evaluation.voc import match
from rcnn_svm.structures import Detections, GroundTruth

CAT, FAR = [0, 0, 100, 100], [300, 300, 320, 320]
CLASSES = ("cat", "dog", "car")


def kinds(rows, truth, classes=CLASSES):
    """Sort (box, label) rows, given by falling score, and return their types in that order."""
    boxes, labels = zip(*rows, strict=True)
    found = [Detections("a", list(boxes), -np.arange(len(rows)), list(labels))]
    result = false_positive_types(match(found, [truth], classes), found, [truth])
    by_row = dict(zip(result.row.tolist(), result.kind.tolist(), strict=True))
    return [by_row.get(i) for i in range(len(rows))], result


def test_each_type_in_its_order():
    objects = [CAT, [200, 0, 300, 100], [0, 200, 100, 300], FAR, FAR]
    truth = GroundTruth(objects, [0, 1, 2, 0, 0])
    rows = [
        (CAT, 0),  # found
        ([0, 0, 40, 100], 0),  # loose: IoU 0.4
        ([200, 0, 300, 100], 0),  # a dog: similar to cat
    ]
    assert kinds(rows, truth)[0] == [CORRECT, 0, 1]
    assert kinds([([0, 200, 100, 300], 0), ([400, 400, 410, 410], 0)], truth)[0] == [2, 3]
    assert ERROR_TYPES == ("localisation", "similar class", "other class", "background")


def test_a_duplicate_is_a_localisation_error():
    truth = GroundTruth([CAT, FAR], [0, 0])
    assert kinds([(CAT, 0), (CAT, 0)], truth)[0] == [CORRECT, 0]


def test_touching_at_exactly_a_tenth_counts():
    truth = GroundTruth([[0, 0, 10, 10], FAR], [0, 0])
    assert kinds([([0, 0, 10, 1], 0)], truth)[0] == [0]
    assert kinds([([0, 0, 9, 1], 0)], truth)[0] == [3]


def test_only_as_many_as_there_are_objects_are_looked_at():
    truth = GroundTruth([CAT], [0])
    sorted_kinds, result = kinds([(FAR, 0), (CAT, 0), (FAR, 1)], truth)
    assert sorted_kinds == [3, None, None]
    assert result.counts.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert result.n_correct.tolist() == [0, 0, 0]
    assert result.to_json()["cat"] == {
        "correct": 0,
        "localisation": 0,
        "similar class": 0,
        "other class": 0,
        "background": 1,
    }


def test_other_names_have_no_similar_classes():
    truth = GroundTruth([CAT, [200, 0, 300, 100], FAR], [0, 1, 0])
    assert kinds([([200, 0, 300, 100], 0)], truth, ("apple", "pear", "car"))[0] == [2]


def test_ignored_detections_make_room():
    truth = GroundTruth([CAT, FAR], [0, 0], difficult=np.array([True, False]))
    assert kinds([(CAT, 0), (FAR, 0)], truth)[0] == [None, CORRECT]


def test_nothing_found():
    result = false_positive_types(
        match([Detections.empty("a")], [GroundTruth.empty()], CLASSES),
        [Detections.empty("a")],
        [GroundTruth.empty()],
    )
    assert result.counts.sum() == 0
    assert len(result.kind) == 0
