from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rcnn_svm.errors import DataError, ShapeError
from rcnn_svm.structures import Dataset, Detections, GroundTruth, RegionSet, Sample

BOXES = [[0, 0, 10, 10], [5, 5, 20, 20]]


def grey(height=4, width=6):
    return np.full((height, width, 3), 128, np.uint8)


def test_ground_truth_fills_its_flags():
    truth = GroundTruth(BOXES, [1, 0])
    assert len(truth) == 2
    assert truth.boxes.dtype == np.float32
    assert truth.labels.dtype == np.int64
    assert truth.difficult.tolist() == truth.crowd.tolist() == [False, False]
    assert truth.area.tolist() == [100, 225]
    part = GroundTruth(BOXES, [1, 0], difficult=np.array([True, False]))[np.array([0])]
    assert (part.labels.tolist(), part.difficult.tolist(), part.area.tolist()) == ([1], [True], [100])
    assert GroundTruth(BOXES, [1, 0], area=[0, 7.5])[1:].area.tolist() == [7.5]
    assert len(GroundTruth.empty()) == 0


def test_flags_go_with_their_objects():
    truth = GroundTruth(BOXES, [0, 1], flags={"truncated": [True, False]})
    assert truth[np.array([1])].flags["truncated"].tolist() == [False]
    assert replace(truth, labels=[1, 1]).flags["truncated"].tolist() == [True, False]
    with pytest.raises(
        ShapeError, match=r"^GroundTruth: occluded must have shape \(2,\) like the boxes, got"
    ):
        GroundTruth(BOXES, [0, 1], flags={"occluded": [True]})


def test_ground_truth_messages():
    with pytest.raises(
        ShapeError, match=r"^GroundTruth: every box must have a positive area, got .* in row 1\.$"
    ):
        GroundTruth([[0, 0, 1, 1], [5, 5, 5, 9]], [0, 0])
    with pytest.raises(
        ShapeError, match=r"^GroundTruth: labels must have shape \(2,\) like the boxes, got \(1,\)\.$"
    ):
        GroundTruth(BOXES, [0])
    with pytest.raises(ShapeError, match=r"^GroundTruth: crowd must have shape \(2,\)"):
        GroundTruth(BOXES, [0, 0], crowd=np.array([True]))
    with pytest.raises(
        ShapeError, match=r"^GroundTruth: area must be finite and not negative, got \[1\.0, -1\.0\]\.$"
    ):
        GroundTruth(BOXES, [0, 0], area=[1, -1])


def test_detections_are_sorted_surest_first_and_stable():
    found = Detections("a", [*BOXES, [1, 1, 2, 2]], [0.5, 0.9, 0.5], [0, 1, 2])
    assert found.labels.tolist() == [1, 0, 2]
    assert found.scores.dtype == np.float32
    assert found.boxes[0].tolist() == BOXES[1]
    assert found[found.scores < 0.6].labels.tolist() == [0, 2]
    assert found[:1].labels.tolist() == [1]
    assert len(Detections.empty("a")) == 0


def test_detections_messages():
    with pytest.raises(ShapeError, match=r"^Detections\('a'\): scores must not be NaN\.$"):
        Detections("a", BOXES, [0.5, np.nan], [0, 0])
    with pytest.raises(
        ShapeError, match=r"^Detections\('a'\): labels must have shape \(2,\) like the boxes, got \(3,\)"
    ):
        Detections("a", BOXES, [0.5, 0.4], [0, 0, 0])


def test_region_set_is_checked_and_cut():
    regions = RegionSet("a", (20, 20), BOXES, [0.1, 0.2])
    assert len(regions.top(1)) == 1
    assert len(regions.top(9)) == 2
    assert RegionSet("a", (20, 20), [], []).boxes.shape == (0, 4)
    with pytest.raises(
        ShapeError,
        match=r"^RegionSet\('a'\): boxes must lie inside the 20 x 19 image and have a positive area, "
        r"got 1 bad rows \(first: row 1, ",
    ):
        RegionSet("a", (19, 20), BOXES, [0, 0])


def test_sample_renders_and_checks_its_size():
    sample = Sample("a", (4, 6), GroundTruth.empty(), render=grey)
    assert sample.read().shape == (4, 6, 3)
    with pytest.raises(
        DataError, match=r"^a: the labels say 9 x 4 pixels, the image has 6 x 4\. One of the two is wrong\.$"
    ):
        Sample("a", (4, 9), GroundTruth.empty(), render=grey).read()
    with pytest.raises(DataError, match=r"^Sample\('a'\): has neither a file nor a renderer\.$"):
        Sample("a", (4, 6), GroundTruth.empty()).read()


def test_sample_digest_follows_content(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")

    def opened() -> Sample:
        return Sample("a", (4, 6), GroundTruth.empty(), path=path, reader=lambda _: grey())

    sample = opened()
    first = sample.digest()
    assert sample.read().shape == (4, 6, 3)
    path.write_bytes(b"two")
    assert opened().digest() != first
    assert sample.digest() == first, "an image is taken not to change while it is worked on"
    path.unlink()
    with pytest.raises(DataError, match=r"a\.bin: cannot be read"):
        opened().digest()
    rendered = [Sample("a", (4, w), GroundTruth.empty(), render=lambda w=w: grey(4, w)) for w in (6, 6, 3)]
    digests = [each.digest() for each in rendered]
    assert digests[0] == digests[1] != digests[2]


def test_dataset_counts_objects():
    truths = [GroundTruth(BOXES, [0, 2], difficult=np.array([True, False])), GroundTruth.empty()]
    dataset = Dataset(
        "d",
        "train",
        ("x", "y", "z"),
        tuple(Sample(str(i), (20, 20), t, render=grey) for i, t in enumerate(truths)),
    )
    assert len(dataset) == len(list(dataset)) == 2
    assert dataset.counts().tolist() == [1, 0, 1]


def test_classes_are_matched_by_name():
    boxes = np.array([[0, 0, 2, 2], [1, 1, 4, 4], [2, 2, 5, 5]], np.float32)
    truth = GroundTruth(boxes, [0, 2, 1], difficult=[True, False, False], crowd=[False, False, True])
    dataset = Dataset("set", "test", ("cat", "dog", "cow"), (Sample("a", (9, 9), truth),))
    few = dataset.with_classes(["cow", "bee", "cat"])
    assert few.classes == ("cow", "bee", "cat")
    (sample,) = few.samples
    np.testing.assert_array_equal(sample.truth.boxes, boxes[:2])
    assert sample.truth.labels.tolist() == [2, 0]
    assert sample.truth.difficult.tolist() == [True, False]
    assert dataset.with_classes(dataset.classes) is dataset
    found = Detections("a", boxes, [0.9, 0.5, 0.7], [0, 2, 1]).with_classes(dataset.classes, few.classes)
    assert found.scores.tolist() == [np.float32(0.9), 0.5]
    assert found.labels.tolist() == [2, 0]
    assert len(Detections.empty("a").with_classes((), ("cat",))) == 0


def test_detections_as_supervision_has_them():
    supervision = pytest.importorskip("supervision")
    found = Detections("a", [[1, 2, 3, 4], [5, 6, 9, 9]], [0.5, 2.0], [1, 0])
    theirs = found.to_supervision(("cat", "dog"))
    assert isinstance(theirs, supervision.Detections)
    np.testing.assert_array_equal(theirs.xyxy, found.boxes)
    np.testing.assert_array_equal(theirs.confidence, found.scores)
    np.testing.assert_array_equal(theirs.class_id, found.labels)
    assert theirs.data["class_name"].tolist() == ["cat", "dog"]
    assert len(Detections.empty("b").to_supervision(("cat",))) == 0
    assert repr(found) == "Detections('a': 2 boxes, scores 2 to 0.5)"


def test_an_error_of_ours_is_scikit_learns_where_it_is_loaded():
    import sklearn.exceptions

    from rcnn_svm.errors import ConfigError, NotFittedError
    from rcnn_svm.heads.linear_svm import LinearSVMHead

    with pytest.raises(sklearn.exceptions.NotFittedError) as caught:
        LinearSVMHead().decision_function(np.zeros((1, 2)))
    assert isinstance(caught.value, NotFittedError)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2
    assert type(caught.value).__name__ == "NotFittedError"


def test_the_surface_is_listed():
    import rcnn_svm

    assert set(rcnn_svm.__all__) <= set(dir(rcnn_svm))
    assert rcnn_svm.__all__ == sorted(rcnn_svm.__all__)
