from __future__ import annotations

import numpy as np
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rcnn_svm.features.roi_pool import roi_align, roi_align_matrix, roi_max_pool


@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)),
)
@settings(deadline=None, max_examples=60)
def test_equals_torchvision(seed, grid, sampling, shape):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=shape).astype(np.float32)
    rois = rng.uniform(-4, 12, (7, 4)).astype(np.float32)
    rois[:, 2:] = rois[:, :2] + rng.uniform(0.05, 9, (7, 2))
    got = roi_align(features, rois, grid, sampling=sampling)
    expected = torchvision.ops.roi_align(
        torch.from_numpy(features).permute(2, 0, 1)[None],
        [torch.from_numpy(rois)],
        grid,
        sampling_ratio=sampling or -1,
        aligned=True,
    )
    np.testing.assert_allclose(got, expected.flatten(1).numpy(), atol=3e-5)


def test_a_plane_is_read_at_the_cells_centres():
    y, x = np.mgrid[:10, :12] + 0.5
    features = np.stack([x, y], axis=2).astype(np.float32)
    got = roi_align(features, np.array([[2, 3, 6, 9]], np.float32), (2, 2)).reshape(2, 2, 2)
    np.testing.assert_allclose(got[0], [[3, 5], [3, 5]], atol=1e-5)
    np.testing.assert_allclose(got[1], [[4.5, 4.5], [7.5, 7.5]], atol=1e-5)


def test_orders_and_empty_input(rng):
    features = rng.normal(size=(4, 4, 3)).astype(np.float32)
    assert roi_align(features, np.zeros((0, 4), np.float32), (2, 2)).shape == (0, 12)
    rois = np.array([[0, 0, 4, 4], [1, 1, 2, 3]], np.float32)
    channels_first = roi_align(features, rois, (2, 1)).reshape(2, 3, 2)
    cells_first = roi_align(features, rois, (2, 1), cells_first=True).reshape(2, 2, 3)
    np.testing.assert_array_equal(cells_first, channels_first.transpose(0, 2, 1))
    out = np.zeros((2, 6), np.float32)
    assert roi_align(features, rois, (2, 1), out=out) is out
    np.testing.assert_array_equal(out.reshape(2, 3, 2), channels_first)


@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@settings(deadline=None, max_examples=60)
def test_the_matrix_does_the_same(seed, grid, sampling, size):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*size, 3)).astype(np.float32)
    rois = rng.uniform(-4, 12, (5, 4)).astype(np.float32)
    rois[:, 2:] = rois[:, :2] + rng.uniform(0.05, 9, (5, 2))
    matrix = roi_align_matrix(rois, size, grid, sampling=sampling)
    expected = roi_align(features, rois, grid, sampling=sampling, cells_first=True)
    np.testing.assert_allclose(matrix @ features.reshape(-1, 3), expected.reshape(-1, 3), atol=3e-5)


@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)),
    st.sampled_from([(13, 3, 2), (14, 2, 2), (5, 3, 1), (4, 4, 4), (1, 1, 1)]),
)
@settings(deadline=None, max_examples=60)
def test_max_pooling_is_that_of_torch_on_the_same_samples(seed, shape, pooling):
    side, kernel, stride = pooling
    rng = np.random.default_rng(seed)
    features = rng.normal(size=shape).astype(np.float32)
    rois = rng.uniform(-4, 12, (7, 4)).astype(np.float32)
    rois[:, 2:] = rois[:, :2] + rng.uniform(0.05, 9, (7, 2))
    # At the border a sample counts or not, and which it is hangs on the last bit of its place.
    centres = (np.arange(side) + 0.5) / side
    for axis, length in ((0, shape[1]), (1, shape[0])):
        places = rois[:, axis, None] - 0.5 + centres * (rois[:, axis + 2] - rois[:, axis])[:, None]
        assume((np.minimum(np.abs(places + 1), np.abs(places - length)) > 1e-4).all())
    got = roi_max_pool(features, rois, side, kernel, stride)
    samples = torchvision.ops.roi_align(
        torch.from_numpy(features).permute(2, 0, 1)[None],
        [torch.from_numpy(rois)],
        (side, side),
        sampling_ratio=1,
        aligned=True,
    )
    expected = torch.nn.functional.max_pool2d(samples, kernel, stride).numpy()
    np.testing.assert_allclose(got, expected, atol=3e-5)
    assert roi_max_pool(features, rois[:0], side, kernel, stride).shape == (0, *got.shape[1:])
