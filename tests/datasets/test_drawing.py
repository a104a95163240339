"""Draws that keep every class where they can: whatever images show, whatever the sizes and the seed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.datasets import load_splits, loading
from rcnn_svm.datasets.drawing import classes_to_train, draw_folds, draw_parts
from rcnn_svm.datasets.loading import divide
from rcnn_svm.structures import Dataset, GroundTruth, Sample

CLASSES = tuple("abcd")
SEEDS = st.integers(0, 2**32 - 1)


def data_of(images, classes=CLASSES):
    """Return a data set whose images show the given labels."""
    samples = []
    for i, labels in enumerate(images):
        boxes = np.tile(np.array([[0, 0, 5, 5]], np.float32), (len(labels), 1))
        samples.append(Sample(f"{i:03d}", (9, 9), GroundTruth(boxes, np.array(labels, np.int64))))
    return Dataset("set", "all", classes, tuple(samples))


def ids(dataset):
    return [sample.image_id for sample in dataset]


def n_images_of(dataset, name):
    label = dataset.classes.index(name)
    return sum(label in sample.truth.labels for sample in dataset)


many_labels = st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=3, max_size=30).map(data_of)
one_label = st.lists(st.integers(0, 11), min_size=3, max_size=40).map(
    lambda labels: data_of([[label] for label in labels], tuple("abcdefghijkl"))
)


@settings(deadline=None)
@given(many_labels, st.data(), SEEDS)
def test_parts_are_disjoint_of_the_right_size_and_the_same_for_a_seed(dataset, data, seed):
    sizes, left = [], len(dataset)
    for _ in range(data.draw(st.integers(1, 3))):
        sizes.append(data.draw(st.integers(0, left)))
        left -= sizes[-1]
    parts = draw_parts(dataset, sizes, np.random.default_rng(seed))
    assert [len(part) for part in parts] == sizes
    drawn = [image for part in parts for image in ids(part)]
    assert len(set(drawn)) == len(drawn)
    for part in parts:
        assert ids(part) == sorted(ids(part))
    again = draw_parts(dataset, sizes, np.random.default_rng(seed))
    assert list(map(ids, again)) == list(map(ids, parts))
    if sizes[0] >= len(dataset.classes):
        assert classes_to_train(parts[0]) == classes_to_train(dataset)


@settings(deadline=None)
@given(st.one_of(many_labels, one_label), SEEDS)
def test_a_single_split_is_divided_with_every_class_in_train(dataset, seed):
    splits = divide(dataset, seed=seed)
    n = len(dataset)
    n_test = max(round(0.2 * n), 1)
    n_val = max(round(0.25 * (n - n_test)), 1)
    assert len(splits.test) == n_test
    together = set_aside_or_together(splits)
    if not together:
        assert [len(splits.train), len(splits.val)] == [n - n_test - n_val, n_val]
    assert sorted(ids(splits.trainval) + ids(splits.test)) == ids(dataset)
    shown = classes_to_train(splits.train)
    assert {name for name in dataset.classes if n_images_of(dataset, name) >= 3} <= set(shown)
    lost = [name for name in classes_to_train(dataset) if name not in shown]
    assert [name for name in dataset.classes if name not in lost] == list(splits.train.classes)
    assert len(splits.notes) == 1 + together + bool(lost)
    if n - n_test - n_val >= len(dataset.classes):
        assert not lost
        assert not together


@settings(deadline=None)
@given(many_labels, SEEDS)
def test_validation_takes_no_class_from_train(dataset, seed):
    splits = divide(dataset, test=dataset, seed=seed)
    together = set_aside_or_together(splits)
    assert ids(splits.trainval) == ids(dataset)
    assert splits.train.classes == dataset.classes
    assert classes_to_train(splits.train) == classes_to_train(dataset)
    if len(dataset) - max(round(0.2 * len(dataset)), 1) >= len(CLASSES):
        assert not together


def set_aside_or_together(splits):
    """Return whether train is val as well, for the sake of a class; else they are two parts of trainval."""
    together = ids(splits.train) == ids(splits.val) == ids(splits.trainval)
    if together:
        assert sum("which would leave none of" in note for note in splits.notes) == 1
    else:
        assert sorted(ids(splits.train) + ids(splits.val)) == ids(splits.trainval)
    return together


@settings(deadline=None)
@given(many_labels, many_labels, many_labels, st.integers(1, 12), SEEDS)
def test_a_quick_look_loses_no_class_that_it_has_room_for(train, val, test, n, seed):
    whole = loading._complete({"train": train, "val": val, "test": test}, seed, "here")
    splits = loading._limit(whole, n, seed)
    for part in ("train", "val", "test"):
        before, after = getattr(whole, part), getattr(splits, part)
        assert len(after) == min(n, len(before))
        assert set(ids(after)) <= set(ids(before))
        if len(before) <= n:
            assert ids(after) == ids(before)
        assert after.classes == splits.train.classes
    lost = [name for name in CLASSES if name not in splits.train.classes]
    assert set(classes_to_train(train)) - set(lost) == set(classes_to_train(splits.train))
    if n >= len(CLASSES) or n >= len(train):
        assert not lost
    assert all(name in splits.notes[-1] for name in lost)
    labels = {sample.image_id: [train.classes[k] for k in sample.truth.labels] for sample in train}
    for sample in splits.train:
        kept = [name for name in labels[sample.image_id] if name not in lost]
        assert [splits.train.classes[k] for k in sample.truth.labels] == kept


def test_a_crowd_is_nothing_to_train_on():
    dataset = data_of([[0, 1], [1], [1], [2]])
    first = dataset.samples[0]
    crowd = replace(first.truth, crowd=np.array([True, False]))
    dataset = replace(dataset, samples=(replace(first, truth=crowd), *dataset.samples[1:]))
    assert classes_to_train(dataset) == ["b", "c"]


def test_classes_of_too_few_images_give_way_to_those_that_can_be_everywhere():
    """Eight images: four would be drawn for train, and five classes have one image each."""
    dataset = data_of([[0], [1], [2], [3], [4], [5], [5], [5]], tuple("abcdef"))
    for seed in range(20):
        splits = divide(dataset, seed=seed)
        assert len(splits.train) == 6
        assert ids(splits.train) == ids(splits.val) == ids(splits.trainval)
        assert all("f" in classes_to_train(part) for part in (splits.train, splits.test))
        assert "which would leave none of" in splits.notes[1]


@pytest.mark.parametrize("seed", range(5))
def test_what_a_draw_has_lost_is_left_out_and_the_draw_is_blamed(make_voc, xml, seed):
    names = ["dog", "dog", "dog", "cat", "dog", "cow"]
    root = make_voc(
        {f"{i}": xml([(name, 1, 1, 9, 9)]) for i, name in enumerate(names)},
        {"train": ["0", "1", "2", "3"], "val": ["4"], "test": ["4", "5"]},
    )
    splits = load_splits(root, max_images=2, seed=seed)
    assert "3" in ids(splits.train)  # the only cat
    assert splits.train.classes == ("cat", "cow", "dog")  # train never had a cow to lose
    splits = load_splits(root, max_images=1, seed=seed)
    assert ids(splits.train) == ["3"]
    assert splits.notes[-1] == (
        "The draw of 1 from 4 images for train has no object of dog, though the data have: "
        "this class is left out, a larger draw keeps more."
    )
    for part in (splits.train, splits.val, splits.trainval, splits.test):
        assert part.classes == ("cat", "cow")
    assert [len(sample.truth) for sample in splits.val] == [0]


@given(
    labels=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=2, max_size=25),
    n=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_every_fold_leaves_every_class_in_the_rest(labels, n, seed):
    samples = [
        Sample(f"{i}", (9, 9), GroundTruth(np.tile([[0, 0, 5, 5]], (len(own), 1)), np.array(own, int)))
        for i, own in enumerate(labels)
    ]
    dataset = Dataset("d", "trainval", tuple("abcde"), tuple(samples))
    folds = draw_folds(dataset, n, np.random.default_rng(seed))
    held = [sample.image_id for fold in folds for sample in fold]
    assert len(held) == len(set(held))
    assert all(len(fold) for fold in folds)
    everything = set(itertools.chain(*labels))
    for fold in folds:
        out = {sample.image_id for sample in fold}
        assert set(itertools.chain(*(own for i, own in enumerate(labels) if f"{i}" not in out))) == everything
    alone = {k for k in everything if sum(k in own for own in labels) == 1}
    able = {f"{i}" for i, own in enumerate(labels) if not alone & set(own)}
    assert set(held) <= able
    assert len(held) >= len(able) - n * len(everything)
    again = draw_folds(dataset, n, np.random.default_rng(seed))
    assert [[s.image_id for s in fold] for fold in again] == [[s.image_id for s in fold] for fold in folds]
