"""TIDE's error types: against the package tidecv, and by hand where it has no word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm.errors import ShapeError
from rcnn_svm.evaluation.tide import SPECIAL_TYPES, TIDE_TYPES, evaluate_tide
from rcnn_svm.structures import Detections, GroundTruth

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tide.json").read_text())["cases"]
THEIR_NAMES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FalsePos", "FalseNeg")
NAMES = dict(zip(THEIR_NAMES, TIDE_TYPES + SPECIAL_TYPES, strict=True))
CAT, DOG, FAR = [0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]


def records(images):
    detections, truths = [], []
    for i, image in enumerate(images):
        objects = np.array(image["objects"], float).reshape(-1, 6)
        found = np.array(image["detections"], float).reshape(-1, 6)
        truths.append(GroundTruth(objects[:, :4], objects[:, 4], crowd=objects[:, 5] > 0))
        detections.append(Detections(str(i), found[:, :4], found[:, 5], found[:, 4]))
    return detections, truths


def kinds(rows, truth):
    """Return the type of each (box, label) row, by falling score, or None, and the result."""
    boxes, labels = zip(*rows, strict=True)
    found = Detections("a", list(boxes), -np.arange(len(rows)), list(labels))
    result = evaluate_tide([found], [truth], ("cat", "dog"))
    of_row = {
        row: TIDE_TYPES[kind]
        for row, kind in zip(result.row.tolist(), result.kind.tolist(), strict=True)
        if TIDE_TYPES[kind] != "missed"
    }
    return [of_row.get(i) for i in range(len(rows))], result


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_equals_tidecv(case):
    result = evaluate_tide(*records(case["images"]), "abc")
    own = result.to_json()
    assert own["mAP"] == pytest.approx(case["mAP"])
    assert own["dAP"] == pytest.approx({NAMES[name]: cost for name, cost in case["dAP"].items()}, abs=1e-9)
    counts = dict(zip(TIDE_TYPES, result.counts.sum(axis=0).tolist(), strict=True))
    assert counts == {NAMES[name]: count for name, count in case["counts"].items()}
    assert np.bincount(result.kind, minlength=6).tolist() == result.counts.sum(axis=0).tolist()


def test_the_golden_splits_hold_every_type():
    for name in THEIR_NAMES:
        assert max(case["dAP"][name] for case in GOLDEN) > 1


def test_each_type_by_hand():
    truth = GroundTruth([CAT, DOG], [0, 1])
    rows = [
        (CAT, 0),  # found
        (CAT, 0),  # again
        ([20, 0, 30, 4], 1),  # a dog, loose
        (DOG, 0),  # a dog, called cat
        ([20, 0, 30, 4], 0),  # loose and called cat
        (FAR, 0),
    ]
    types = [None, "duplicate", "localisation", "classification", "both", "background"]
    sorted_kinds, result = kinds(rows, truth)
    assert sorted_kinds == types
    assert result.counts.tolist() == [[1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    # The surest mistake about the dog is the loose one: named anew, the other could not bring anything.
    assert result.costs()["localisation"] == pytest.approx(0.5)
    assert result.costs()["classification"] == 0
    assert result.map() == pytest.approx(0.5)


@pytest.mark.parametrize("edge", [0.1, 0.5])
def test_ious_at_the_edges_are_localisation(edge):
    truth = GroundTruth([CAT], [0])
    loose = [0, 0, 10, 10 * edge]
    assert kinds([(CAT, 0), (loose, 0)], truth)[0] == [None, "localisation"]
    assert kinds([(loose, 0)], truth)[0] == [None if edge == 0.5 else "localisation"]


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_what_lies_on_a_spared_object_of_its_class_is_left_out(flag):
    truth = GroundTruth([CAT, DOG], [0, 0], **{flag: np.array([False, True])})
    half = [20, 0, 30, 5]
    sorted_kinds, result = kinds([(half, 0), (DOG, 0), (DOG, 1), (CAT, 0)], truth)
    assert sorted_kinds == [None, None, "background", None]
    assert result.map() == 1.0
    part = [20, 0, 22, 2]  # within the object, but a small part of it
    assert kinds([(part, 0)], truth)[0] == ["background" if flag == "difficult" else None]


def test_a_class_without_objects_is_left_out_of_the_mean():
    sorted_kinds, result = kinds([(CAT, 0), (FAR, 1)], GroundTruth([CAT], [0]))
    assert sorted_kinds == [None, "background"]
    assert np.isnan(result.ap[1])
    assert result.map() == 1.0
    assert set(result.costs().values()) == {0.0}


def test_only_the_hundred_surest_of_an_image_take_part():
    rows = [(FAR, 0)] * 100 + [(CAT, 0)]
    _, result = kinds(rows, GroundTruth([CAT], [0]))
    assert result.counts.tolist() == [[0, 0, 0, 0, 100, 1], [0] * 6]
    assert result.map() == 0


def test_nothing_found_and_nothing_there():
    result = evaluate_tide([Detections.empty("a")], [GroundTruth([CAT], [1])], ("cat", "dog"))
    assert result.to_json()["counts"]["dog"]["missed"] == 1
    assert (result.image.tolist(), result.row.tolist()) == ([0], [0])
    nothing = evaluate_tide([], [], ("cat",)).to_json()
    assert nothing["mAP"] is None
    assert set(nothing["dAP"].values()) == {None}


def test_bad_input():
    with pytest.raises(ShapeError, match="one record per image, got 1 detections and 0 truths"):
        evaluate_tide([Detections.empty("a")], [], ("cat",))
    with pytest.raises(ShapeError, match=r"labels of image 'a' must lie in 0 \.\. 0, got 1"):
        evaluate_tide([Detections.empty("a")], [GroundTruth([CAT], [1])], ("cat",))
