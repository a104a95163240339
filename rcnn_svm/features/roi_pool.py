"""RoIAlign for one image on the CPU: regions of a convolutional map onto a grid of cells.

The numbers are those of `torchvision.ops.roi_align(aligned=True)`. This version reads the map
channels-last, and merges the taps that neighbouring samples share, which makes it several times faster
where regions are many and small. It needs numpy and numba only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rcnn_svm import compiled

__all__ = ["roi_align", "roi_align_matrix", "roi_max_pool"]

_REORDERED = {"contract", "reassoc", "nsz"}
"""Sums may be taken in the order that vectors like best; NaN and infinity keep their meaning."""


@compiled.kernel(fastmath=_REORDERED)
def _taps(start, bin_size, sampling, length, index, weight):  # type: ignore[no-untyped-def]
    """Fill `index`, `weight` with the merged bilinear taps of one cell on one axis; return their number."""
    n = 0
    for s in range(sampling):
        at = start + (s + 0.5) * bin_size / sampling
        if at < -1.0 or at > length:
            continue  # a sample outside counts as zero
        at = max(at, 0.0)
        low = int(at)
        if low >= length - 1:
            low = length - 1
            high, fraction = low, 0.0
        else:
            high, fraction = low + 1, at - low
        for i, w in ((low, 1.0 - fraction), (high, fraction)):
            if w == 0.0:
                continue
            found = False
            for k in range(max(0, n - 2), n):  # samples advance: only the last two can be met again
                if index[k] == i:
                    weight[k] += w
                    found = True
                    break
            if not found:
                index[n], weight[n] = i, w
                n += 1
    for k in range(n):
        weight[k] /= sampling
    return n


@compiled.kernel(fastmath=_REORDERED)
def _roi_align(features, rois, rows, columns, sampling, most, cells_first, out):  # type: ignore[no-untyped-def]
    height, width, channels = features.shape
    y_index, x_index = np.empty((rows, 2 * most), np.int64), np.empty((columns, 2 * most), np.int64)
    y_weight, x_weight = np.empty((rows, 2 * most)), np.empty((columns, 2 * most))
    y_count, x_count = np.empty(rows, np.int64), np.empty(columns, np.int64)
    own_cells = np.empty((rows * columns, channels), np.float32)
    for r in range(len(rois)):
        x1, y1 = rois[r, 0] - 0.5, rois[r, 1] - 0.5
        bin_w, bin_h = (rois[r, 2] - 0.5 - x1) / columns, (rois[r, 3] - 0.5 - y1) / rows
        cells = out[r].reshape(rows * columns, channels) if cells_first else own_cells
        n_y = sampling if sampling else max(1, int(np.ceil(bin_h)))
        n_x = sampling if sampling else max(1, int(np.ceil(bin_w)))
        for i in range(rows):
            y_count[i] = _taps(y1 + i * bin_h, bin_h, n_y, height, y_index[i], y_weight[i])
        for j in range(columns):
            x_count[j] = _taps(x1 + j * bin_w, bin_w, n_x, width, x_index[j], x_weight[j])
        for i in range(rows):
            for j in range(columns):
                cell = cells[i * columns + j]
                cell[:] = 0.0
                for a in range(y_count[i]):
                    for b in range(x_count[j]):
                        weight = np.float32(y_weight[i, a] * x_weight[j, b])
                        source = features[y_index[i, a], x_index[j, b]]
                        for c in range(channels):
                            cell[c] += weight * source[c]
        if not cells_first:
            target = out[r]
            for c in range(channels):
                for k in range(rows * columns):
                    target[c * rows * columns + k] = cells[k, c]


def roi_align(
    features: NDArray[np.float32],
    rois: NDArray[np.float32],
    grid: tuple[int, int],
    *,
    sampling: int = 0,
    cells_first: bool = False,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Pool regions of one map onto a grid of cells.

    Each cell is the mean of `sampling` x `sampling` bilinear samples; samples more than one cell outside the
    map count as zero.

    Args:
        features: (h, w, C) float32, C-contiguous.
        rois: (R, 4) in units of cells of the map, half-open: cell i covers i .. i + 1.
        grid: rows and columns of the result.
        sampling: samples per cell and axis; 0 takes as many as a cell of the grid is cells of the map
            long, rounded up, so that large regions are averaged over all that they cover.
        cells_first: order a row by cell, then channel, instead of by channel, then cell.
        out: (R, C * rows * columns) C-contiguous float32 to write to.

    Returns:
        (R, C * rows * columns) float32.

    References:
        He et al., Mask R-CNN, arXiv 1703.06870, section 3.
    """
    rows, columns = grid
    if out is None:
        out = np.empty((len(rois), features.shape[2] * rows * columns), np.float32)
    places = np.asarray(rois, np.float64)
    sides = (places[:, 2:] - places[:, :2]) / (columns, rows)
    most = sampling or max(1, math.ceil(sides.max(initial=1.0)) + 1)  # one to spare for rounding
    _roi_align(features, places, rows, columns, sampling, most, cells_first, out)
    return out


@compiled.kernel()
def _sample(start, size, length):  # type: ignore[no-untyped-def]
    """Return both neighbours of one bilinear sample in the middle of a cell, and their weights."""
    at = start + 0.5 * size
    if at < -1.0 or at > length:
        return 0, 0, np.float32(0.0), np.float32(0.0)  # a sample outside counts as zero
    at = max(at, 0.0)
    low = min(int(at), length - 1)
    high = min(low + 1, length - 1)
    fraction = np.float32(at - low) if high > low else np.float32(0.0)
    return low, high, np.float32(1.0) - fraction, fraction


@compiled.kernel(fastmath=_REORDERED)
def _roi_max_pool(features, rois, side, kernel, stride, out):  # type: ignore[no-untyped-def]
    height, width, channels = features.shape
    n = (side - kernel) // stride + 1
    line = np.empty((width, channels), np.float32)  # the map between two of its rows
    samples = np.empty((side, channels), np.float32)  # one row of the region's samples
    cells = np.empty((n, n, channels), np.float32)
    for r in range(len(rois)):
        x1, y1 = rois[r, 0] - 0.5, rois[r, 1] - 0.5
        size_x, size_y = (rois[r, 2] - 0.5 - x1) / side, (rois[r, 3] - 0.5 - y1) / side
        first, last = width, -1
        for j in range(side):
            left, right, a, b = _sample(x1 + j * size_x, size_x, width)
            if a + b > 0:
                first, last = min(first, left), max(last, right)
        for i in range(side):
            top, bottom, a, b = _sample(y1 + i * size_y, size_y, height)
            for x in range(first, last + 1):
                for c in range(channels):
                    line[x, c] = a * features[top, x, c] + b * features[bottom, x, c]
            for j in range(side):
                left, right, a, b = _sample(x1 + j * size_x, size_x, width)
                for c in range(channels):
                    samples[j, c] = a * line[left, c] + b * line[right, c] if a + b > 0 else 0.0
            for row in range(n):
                if not row * stride <= i < row * stride + kernel:
                    continue
                starts = i == row * stride
                for column in range(n):
                    cell = cells[row, column]
                    at = column * stride
                    if starts:
                        cell[:] = samples[at]
                    for k in range(1 if starts else 0, kernel):
                        for c in range(channels):
                            cell[c] = max(cell[c], samples[at + k, c])
        target = out[r].reshape(channels, n * n)
        flat = cells.reshape(n * n, channels)
        for c in range(channels):
            for k in range(n * n):
                target[c, k] = flat[k, c]


def roi_max_pool(
    features: NDArray[np.float32], rois: NDArray[np.float32], side: int, kernel: int, stride: int
) -> NDArray[np.float32]:
    """Resample regions of one map onto a square of cells, then pool these by their maximum.

    The same as `roi_align(..., (side, side), sampling=1)` and max pooling without padding, but the samples
    of a region never leave the cache.

    Args:
        features: (h, w, C) float32, C-contiguous.
        rois: (R, 4) in units of cells of the map, half-open, as for `roi_align`.
        side: cells of the square and axis.
        kernel: side of the pooling window, at most `side`.
        stride: of the pooling.

    Returns:
        (R, C, n, n) float32 with n = (side - kernel) // stride + 1.

    References:
        Girshick, Fast R-CNN, arXiv 1504.08083, section 2.1 (RoI pooling).
    """
    n = (side - kernel) // stride + 1
    out = np.empty((len(rois), features.shape[2], n, n), np.float32)
    _roi_max_pool(features, np.asarray(rois, np.float64), side, kernel, stride, out)
    return out


@compiled.kernel()
def _axis_weights(low, high, cells, sampling, most, out):  # type: ignore[no-untyped-def]
    """Fill `out` (R, cells, length) with the weights of the map's rows, or columns, in each cell."""
    length = out.shape[2]
    index, weight = np.empty(2 * most, np.int64), np.empty(2 * most)
    out[:] = 0.0
    for r in range(len(low)):
        size = (high[r] - low[r]) / cells
        n = sampling if sampling else max(1, int(np.ceil(size)))
        for i in range(cells):
            count = _taps(low[r] - 0.5 + i * size, size, n, length, index, weight)
            for k in range(count):
                out[r, i, index[k]] = weight[k]


def roi_align_matrix(
    rois: NDArray[np.float32], size: tuple[int, int], grid: tuple[int, int], *, sampling: int = 0
) -> NDArray[np.float32]:
    """Return RoIAlign as the linear map that it is, for training: its gradient is the transposed product.

    Args:
        rois: (R, 4) as for `roi_align`.
        size: height and width of the map.
        grid: rows and columns of the result.
        sampling: as for `roi_align`.

    Returns:
        (R * rows * columns, height * width) float32: times the map, one row a place and channels last, it
        gives `roi_align(..., cells_first=True)`.
    """
    places = np.asarray(rois, np.float64)
    axes = []
    for axis in (0, 1):
        cells, low, high = grid[axis], places[:, 1 - axis], places[:, 3 - axis]
        most = sampling or max(1, math.ceil((high - low).max(initial=1.0) / cells) + 1)
        weights = np.empty((len(places), cells, size[axis]), np.float32)
        _axis_weights(low, high, cells, sampling, most, weights)
        axes.append(weights)
    y, x = axes
    joint = y[:, :, None, :, None] * x[:, None, :, None, :]
    return joint.reshape(-1, size[0] * size[1])
