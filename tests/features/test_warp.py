from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features.warp import warp_crops, warp_geometry

# 1-based inclusive: box, mode, expanded, clipped, pad x y, resized w h; image 500 x 375, S = 227, p = 16.
# Computed by hand from the published rule (rbgirshick/rcnn, rcnn_im_crop.m).
GOLDEN = [
    ((101, 101, 295, 295), "warp", (85, 85, 312, 312), (85, 85, 312, 312), (0, 0), (227, 227)),
    ((1, 1, 195, 195), "warp", (-15, -15, 212, 212), (1, 1, 212, 212), (16, 16), (211, 211)),
    ((1, 1, 500, 375), "warp", (-40, -30, 542, 407), (1, 1, 500, 375), (16, 16), (195, 194)),
    ((1, 1, 500, 375), "square", (-40, -103, 542, 480), (1, 1, 500, 375), (16, 40), (195, 146)),
    ((10, 20, 59, 219), "warp", (6, 4, 64, 236), (6, 4, 64, 236), (0, 0), (227, 227)),
    ((10, 20, 59, 219), "square", (-81, 4, 151, 236), (1, 4, 151, 236), (80, 0), (147, 227)),
    ((400, 300, 500, 375), "warp", (392, 294, 509, 382), (392, 294, 500, 375), (0, 0), (210, 209)),
]


def half_open(box):
    return np.array([[box[0] - 1, box[1] - 1, box[2], box[3]]])


@pytest.mark.parametrize(("box", "mode", "expanded", "clipped", "offset", "extent"), GOLDEN)
def test_golden_geometry(box, mode, expanded, clipped, offset, extent):
    got = warp_geometry(half_open(box), (375, 500), 227, padding=16, mode=mode)
    np.testing.assert_array_equal(got.expanded, half_open(expanded))
    np.testing.assert_array_equal(got.source, half_open(clipped))
    np.testing.assert_array_equal(got.offset, [offset])
    np.testing.assert_array_equal(got.extent, [extent])


@given(
    st.tuples(st.integers(0, 80), st.integers(0, 60), st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 18),
    st.sampled_from(["warp", "square"]),
)
@settings(deadline=None, max_examples=80)
def test_windows_hold_the_box_and_land_inside_the_crop(place, padding, mode):
    x, y, w, h = place
    box = np.array([[x, y, x + w, y + h]], np.float32)
    got = warp_geometry(box, (100, 120), 40, padding=padding, mode=mode)
    assert (got.expanded[0, :2] <= box[0, :2]).all()
    assert (got.expanded[0, 2:] >= box[0, 2:]).all()
    assert (got.source[0, :2] >= 0).all()
    assert (got.source[0, 2:] <= [120, 100]).all()
    assert (got.offset >= 0).all()
    assert (got.offset + got.extent <= 40).all()


def test_whole_image_without_context_is_a_plain_resize(rng):
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    crop = warp_crops(image, [[0, 0, 90, 60]], 32, padding=0)[0]
    np.testing.assert_array_equal(crop, cv2.resize(image, (32, 32), interpolation=cv2.INTER_LINEAR))


def test_outside_is_filled_and_inside_is_the_image(rng):
    image = rng.integers(100, 256, (50, 50, 3)).astype(np.float32)
    crop = warp_crops(image, [[0, 0, 50, 50]], 40, padding=8, fill=(1, 2, 3))[0]
    assert (crop[:8] == [1, 2, 3]).all()
    assert (crop[:, :8] == [1, 2, 3]).all()
    assert (crop[8:31, 8:31] >= 100).all()


def test_square_mode_keeps_proportions():
    image = np.zeros((100, 100, 3), np.uint8)
    image[45:55, 20:80] = 255
    crop = warp_crops(image, [[20, 45, 80, 55]], 60, padding=0, mode="square")[0]
    assert 9 <= (crop[:, 30, 0] > 128).sum() <= 11
    assert (warp_crops(image, [[20, 45, 80, 55]], 60, padding=0)[0] == 255).all()


def test_a_box_outside_the_image_is_all_fill():
    crops = warp_crops(np.full((20, 20, 3), 9, np.uint8), [[40, 40, 60, 60]], 16, padding=2, fill=7)
    assert (crops == 7).all()


def test_no_boxes():
    assert warp_crops(np.zeros((20, 20, 3), np.uint8), np.zeros((0, 4)), 16, padding=2).shape == (
        0,
        16,
        16,
        3,
    )


def test_writes_into_out(rng):
    image = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    boxes = [[0, 0, 12, 30], [5, 5, 25, 25]]
    out = np.full((2, 20, 20, 3), 77, np.uint8)
    assert warp_crops(image, boxes, 20, padding=2, out=out) is out
    np.testing.assert_array_equal(out, warp_crops(image, boxes, 20, padding=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"padding": 20},
            "warp_geometry: padding must be at least 0 and below half the crop's 40 pixels, got 20.",
        ),
        ({"mode": "tight"}, "warp_geometry: mode must be 'warp' or 'square', got 'tight'."),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ConfigError) as caught:
        warp_geometry([[0, 0, 9, 9]], (20, 20), 40, **arguments)
    assert str(caught.value) == message


def test_bad_image():
    with pytest.raises(ShapeError, match=r"image must have shape \(H, W, 3\), got \(20, 20\)"):
        warp_crops(np.zeros((20, 20), np.uint8), [[0, 0, 9, 9]], 16)
    with pytest.raises(ShapeError, match=r"out must have shape \(1, 16, 16, 3\), got \(1, 8, 8, 3\)"):
        warp_crops(
            np.zeros((20, 20, 3), np.uint8),
            [[0, 0, 9, 9]],
            16,
            padding=1,
            out=np.zeros((1, 8, 8, 3), np.uint8),
        )
