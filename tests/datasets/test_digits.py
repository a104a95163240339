from __future__ import annotations

import itertools

import numpy as np
import pytest

from rcnn_svm.boxes import iou
from rcnn_svm.datasets import digits, digits_in_scenes, digits_splits
from rcnn_svm.errors import ConfigError


def test_scenes_are_what_they_announce():
    data = digits_in_scenes("train", 30)
    assert data.classes == tuple("0123456789")
    assert [sample.image_id for sample in data][:2] == ["train-00000", "train-00001"]
    assert {1, 6} <= {len(sample.truth) for sample in data} <= set(range(1, 7))
    assert (data.counts() > 0).all()
    for sample in data.samples[:4]:
        image = sample.read()
        assert image.shape == (*sample.size, 3) == (240, 320, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10
    for sample in data:
        boxes = sample.truth.boxes
        assert (boxes == boxes.round()).all()
        assert boxes.min() >= 1
        assert (boxes[:, 2] <= 319).all()
        assert (boxes[:, 3] <= 239).all()
        overlap = iou(boxes, boxes) - np.eye(len(boxes))
        assert overlap.max() < 0.2


def test_an_image_depends_on_seed_split_and_number_only():
    short, long = digits_in_scenes("val", 2, seed=5), digits_in_scenes("val", 4, seed=5)
    for one, other in zip(short, long, strict=False):
        np.testing.assert_array_equal(one.truth.boxes, other.truth.boxes)
        np.testing.assert_array_equal(one.truth.labels, other.truth.labels)
        digest = one.digest()
        digits._render.cache_clear()  # rendered anew
        assert other.digest() == digest
    again = [long.samples[i].digest() for i in (3, 0, 3)]
    assert again[0] == again[2] != again[1]
    others = [digits_in_scenes("val", 1, seed=6), digits_in_scenes("test", 1, seed=5)]
    assert len({short.samples[0].digest(), *(data.samples[0].digest() for data in others)}) == 3


def test_a_scene_is_rendered_once_and_pixels_are_the_readers_own(monkeypatch):
    digits._render.cache_clear()
    sample = digits_in_scenes("test", 1).samples[0]
    first = sample.read()
    expected = first.copy()
    monkeypatch.setattr(digits, "_background", lambda *_: pytest.fail("rendered again"))
    first[:] = 0
    np.testing.assert_array_equal(sample.read(), expected)


def test_boxes_are_the_tight_boxes_of_the_ink():
    for index in range(25):
        glyphs, truth = digits._layout("train", 0, index)
        for glyph, box in zip(glyphs[len(glyphs) - len(truth) :], truth.boxes, strict=True):
            rows, columns = np.nonzero(glyph.alpha() > 0.5)
            x, y = glyph.corner
            tight = [x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1]
            np.testing.assert_array_equal(box, tight)


def test_a_painted_digit_changes_pixels_in_its_box_only(rng):
    glyphs, truth = digits._layout("train", 0, 3)
    scene = np.full((240, 320, 3), 128, np.float32)
    digits._paint(scene, glyphs[-1], rng)
    rows, columns = np.nonzero(np.abs(scene - 128).max(axis=2) > 30)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(found - truth.boxes[-1]).max() <= 1


def test_splits_share_neither_digits_nor_background():
    parts = list(digits._PARTS.values())
    digit_ranges = sorted(part.digits for part in parts)
    bands = sorted(part.band for part in parts)
    assert digit_ranges[0][0] == 0
    assert digit_ranges[-1][1] == len(digits._assets().labels)
    for ranges in (digit_ranges, bands):
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    for name, part in digits._PARTS.items():
        mine = {ink.tobytes() for ink in digits._assets().ink[slice(*part.digits)]}
        for index in range(20):
            glyphs, truth = digits._layout(name, 1, index)
            assert all(glyph.ink.tobytes() in mine for glyph in glyphs[len(glyphs) - len(truth) :])


def test_labels_are_those_of_the_handwriting():
    assets = digits._assets()
    label_of = {ink.tobytes(): label for ink, label in zip(assets.ink, assets.labels, strict=True)}
    for index in range(10):
        glyphs, truth = digits._layout("test", 0, index)
        placed = glyphs[len(glyphs) - len(truth) :]
        assert [label_of[glyph.ink.tobytes()] for glyph in placed] == truth.labels.tolist()


def test_all_splits_at_once():
    splits = digits_splits(3, 2, 1)
    assert [len(part) for part in (splits.train, splits.val, splits.trainval, splits.test)] == [3, 2, 5, 1]
    assert splits.trainval.samples == splits.train.samples + splits.val.samples


@pytest.mark.parametrize(
    ("arguments", "seed", "message"),
    [
        (("trainval", 3), 0, "split must be one of train, val, test, got 'trainval'."),
        (("train", 0), 0, "n_images must be 1 or more, got 0."),
        (("train", 3), -1, "seed must be 0 or more, got -1."),
    ],
)
def test_bad_arguments(arguments, seed, message):
    with pytest.raises(ConfigError) as caught:
        digits_in_scenes(*arguments, seed=seed)
    assert str(caught.value) == f"digits_in_scenes: {message}"
