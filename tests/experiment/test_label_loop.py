"""Labels to look at again, and images to label next."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.datasets import digits_splits
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.next_images import Doubt, choose_images, doubt_of
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.review import review_labels
from rcnn_svm.report.review import review_table, write_review
from rcnn_svm.structures import Dataset, GroundTruth, RegionSet, Sample

ROOT = Path(__file__).parents[2]
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 70, 220]], np.uint8)
SIDE, PLACES = 64, ((4, 4), (36, 4), (4, 36), (36, 36))


class Colour:
    """Mean colour of a region, and of a rim around it, as features."""

    n_features = 6

    @property
    def key(self):
        return {"name": "colour"}

    def __call__(self, image, boxes):
        rows = []
        for box in np.asarray(boxes):
            x1, y1, x2, y2 = np.round(box).astype(int)
            inside = image[y1:y2, x1:x2].reshape(-1, 3).mean(axis=0) / 255
            rim = image[max(y1 - 4, 0) : y2 + 4, max(x1 - 4, 0) : x2 + 4].reshape(-1, 3).mean(axis=0) / 255
            rows.append(np.concatenate([inside, rim]))
        return np.array(rows, np.float32).reshape(-1, 6)

    def of_image(self, image):
        return lambda boxes: self(image, boxes)


def squares(n: int, seed: int = 0) -> Dataset:
    """Images of four places, some with a coloured square of 24 pixels; its colour is its class."""
    rng, samples = np.random.default_rng(seed), []
    for i in range(n):
        pixels = rng.integers(100, 130, (SIDE, SIDE, 3), np.uint8)
        boxes, labels = [], []
        for x, y in PLACES:
            if (k := rng.integers(5)) < 3:
                pixels[y : y + 24, x : x + 24] = COLOURS[k] + rng.integers(0, 20, (24, 24, 3), np.uint8)
                boxes.append([x, y, x + 24, y + 24])
                labels.append(k)
        truth = GroundTruth(np.array(boxes, np.float32).reshape(-1, 4), labels)
        samples.append(Sample(f"im{i}", (SIDE, SIDE), truth, render=lambda pixels=pixels: pixels))
    return Dataset("squares", "train", ("red", "green", "blue"), tuple(samples))


class Windows:
    """Every window of 24 pixels, 4 apart."""

    def propose(self, image):
        corners = np.arange(0, SIDE - 23, 4)
        boxes = np.array([[x, y, x + 24, y + 24] for y in corners for x in corners], np.float32)
        return RegionSet("", image.shape[:2], boxes, np.arange(len(boxes), dtype=np.float32))


def parts():
    config = ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("linear-svm",), linear_costs=(10.0,)))
    return config.build(proposer=Windows(), featurizer=Colour())


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory):
    """A review of squares with one label of each kind spoilt, and one image twice."""
    clean = squares(30)
    samples = list(clean.samples)

    def change(i, **how):
        samples[i] = replace(samples[i], truth=replace(samples[i].truth, area=np.zeros(0), **how))

    first = [i for i, s in enumerate(samples) if len(s.truth) >= 2]
    swapped, moved, removed = first[:3]
    labels = samples[swapped].truth.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    change(swapped, labels=labels)
    boxes = samples[moved].truth.boxes.copy()
    boxes[0] += [9, 0, 9, 0]
    change(moved, boxes=boxes)
    samples[removed] = replace(samples[removed], truth=samples[removed].truth[1:])
    test = replace(clean, split="test", samples=(replace(samples[4], image_id="again"),))
    train = replace(clean, samples=tuple(samples))
    run = Run(tmp_path_factory.mktemp("cache"))
    review = review_labels(parts(), [train, test], run, n_folds=3)
    return review, {"swapped": swapped, "moved": moved, "removed": removed}, clean


def test_spoilt_labels_come_first(reviewed):
    review, places, clean = reviewed
    kinds = {"swapped": "class", "moved": "box", "removed": "unlabelled"}
    top = [one for one in review.findings if one.other is None][:3]
    assert {(one.image, one.kind) for one in top} == {(places[name], kinds[name]) for name in places}
    for one in top:
        truth = clean.samples[one.image].truth
        if one.kind == "class":
            assert (one.row, one.suggested) == (0, truth.labels[0])
        if one.kind == "box":
            assert np.abs(one.better_box - truth.boxes[0]).max() <= 4
        if one.kind == "unlabelled":
            assert one.suggested == truth.labels[0]
            assert np.abs(one.box - truth.boxes[0]).max() <= 4
    assert [one.suspicion for one in review.findings] == sorted(
        (o.suspicion for o in review.findings), reverse=True
    )


def test_every_object_is_judged_once_and_leakage_is_told(reviewed):
    review, _, _ = reviewed
    judged = [(one.image, one.row) for one in review.findings if one.row is not None]
    assert len(judged) == len(set(judged)) == sum(len(s.truth) for s in review.images) - review.n_unjudged
    (leak,) = [one for one in review.findings if one.other is not None]
    assert (leak.kind, leak.reason, leak.suspicion) == ("leakage", "the same image as again of test", 1.0)


def test_the_page_and_the_table(reviewed, tmp_path):
    review, places, _ = reviewed
    write_review(tmp_path, review, {"data": "squares", "command": "rcnn-svm data review squares"})
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert 'src="http' not in page
    assert "an object without a label" in page
    with open(tmp_path / "review.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["rank"]) for row in rows] == list(range(1, len(review.findings) + 1))
    (swapped,) = [row for row in rows if row["image"] == f"im{places['swapped']}" and row["kind"] == "class"]
    assert swapped["suggested_class"] in review.images.classes
    assert float(swapped["other"]) - float(swapped["own"]) == pytest.approx(
        float(swapped["suspicion"]), abs=2e-4
    )
    assert list(csv.DictReader(io.StringIO(review_table(review)))) == rows


def test_one_fold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="folds must be 2 or more"):
        review_labels(parts(), [squares(4)], Run(tmp_path), n_folds=1)
    learned = ExperimentConfig(heads=HeadsConfig(names=("linear-svm",))).build()
    kernel = ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("rbf-svm",))).build()
    with pytest.raises(ConfigError, match="must be a linear SVM, got rbf-svm"):
        review_labels(kernel, [squares(4)], Run(tmp_path))
    with pytest.raises(ConfigError, match="Set learn=nothing"):
        review_labels(learned, [squares(4)], Run(tmp_path))


def test_whole_images_are_judged_by_class(tmp_path):
    clean = squares(40, seed=2)
    samples = [replace(s, truth=s.truth[:1]) for s in clean if len(s.truth)]
    samples = [
        replace(s, render=lambda s=s: np.tile(COLOURS[s.truth.labels[0]], (SIDE, SIDE, 1))) for s in samples
    ]
    whole = replace(clean, samples=tuple(samples)).as_whole_images()
    wrong = replace(samples[3].truth, labels=(samples[3].truth.labels + 1) % 3, area=np.zeros(0))
    spoilt = list(whole.samples)
    spoilt[3] = replace(spoilt[3], truth=replace(spoilt[3].truth, labels=wrong.labels))
    config = ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("linear-svm",)))
    config = replace(config, data=replace(config.data, whole_images=True))
    review = review_labels(
        config.build(featurizer=Colour()), [replace(whole, samples=tuple(spoilt))], Run(tmp_path)
    )
    first = next(one for one in review.findings if one.other is None)
    assert (first.image, first.kind, first.suggested) == (3, "class", samples[3].truth.labels[0])


def doubts(values, features):
    none = np.zeros(0)
    return [
        Doubt(float(v), np.array(f, np.float32), none.reshape(0, 4), none, none, none.astype(bool))
        for v, f in zip(values, features, strict=True)
    ]


def test_doubt_is_nearness_to_the_threshold():
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [0, 20, 10, 30], [1, 0, 11, 10]], np.float32)
    scores = np.array([[0.5, -2], [-0.75, -1.0], [-3, -1.2], [0.4, -2]], np.float32)
    found = doubt_of(boxes, np.eye(4, dtype=np.float32), scores, [0.5, -1.0])
    # On its threshold, on its threshold by the other class, within the band; the last is suppressed.
    assert found.value == pytest.approx(1 + 1 + 0.6)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.near.all()
    assert np.linalg.norm(found.feature) == pytest.approx(1)
    assert found.feature[3] == 0


def test_like_images_wait():
    same = doubts([3, 2.9, 1], [[1, 0], [1, 0], [0, 1]])
    assert choose_images(same, 2) == [0, 2]
    assert choose_images(doubts([0, 0, 0], [[1, 0], [1, 0], [0, 1]]), 3) == [0, 2, 1]
    assert choose_images([], 3) == []
    with pytest.raises(ConfigError, match="n must be at least 1"):
        choose_images(same, 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 15))
def test_choices_are_distinct_and_a_longer_list_begins_as_a_shorter_one(seed, n_images, n):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_images, 3))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    some = doubts(rng.random(n_images), features)
    chosen = choose_images(some, n)
    assert len(chosen) == len(set(chosen)) == min(n, n_images)
    assert choose_images(some, max(1, n - 1)) == chosen[: max(1, n - 1)]


def benchmark():
    spec = importlib.util.spec_from_file_location("label_loop", ROOT / "benchmarks" / "label_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_planted_errors_are_as_they_say():
    loop, dataset = benchmark(), digits_splits(12, 2, 2, seed=1).train
    spoilt, errors = loop.spoil(dataset, 0.5, np.random.default_rng(0))
    n_removed = sum(error["kind"] == "removed" for error in errors)
    assert spoilt.counts().sum() == dataset.counts().sum() - n_removed
    assert {error["kind"] for error in errors} == set(loop.SPOILT)
    for error in errors:
        truth = spoilt.samples[error["image"]].truth
        if error["row"] is None:
            assert not (truth.boxes == error["box"]).all(axis=1).any()
            continue
        overlap = loop.iou(truth.boxes[error["row"]][None], error["box"][None])[0, 0]
        same_class = truth.labels[error["row"]] == error["label"]
        assert (overlap == 1, bool(same_class)) == (
            (False, True) if error["kind"] == "moved" else (True, False)
        )


def test_the_page_of_the_results_says_what_they_hold():
    folder = ROOT / "results" / "label-loop"
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    page = benchmark().page(sorted(results, key=lambda one: one["part"] == "next"))
    assert (folder / "README.md").read_text(encoding="utf-8") == page
    for result in results:
        assert not result["provenance"]["commit"].endswith("-dirty")
