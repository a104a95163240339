"""Graph-based segmentation of Felzenszwalb and Huttenlocher (IJCV 2004), on integer edge weights.

Needs numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rcnn_svm.proposals.compiled import kernel

__all__ = ["WEIGHT_UNIT", "segment", "sort_edges"]

WEIGHT_UNIT = 16
"""Edge weights are colour distances times 16, rounded."""

_HALF = np.float32(0.5)
_SCALE = np.float32(0.5)  # WEIGHT_UNIT / planes.SMOOTH_UNIT


@kernel("(f4[:,:,::1], i4[::1], i4[::1])")
def sort_edges(planes: Any, edges: Any, starts: Any) -> None:
    """Sort the 8-neighbour edges of (C, H, W) planes by weight.

    Edge `4 * pixel + d` joins a pixel to its right, lower, lower right or lower left neighbour
    (d = 0 .. 3). Ties keep the order of these numbers.

    Args:
        planes: smoothed planes.
        edges: filled with the edges that exist, by rising weight; at least 4 H W long.
        starts: filled so that edges of weight w are `edges[starts[w]:starts[w + 1]]`.
    """
    channels, height, width = planes.shape
    n_weights = len(starts) - 1
    weights = np.empty((height, width, 4), np.uint16)
    starts[:] = 0
    zero = np.zeros(width, np.float32)
    for y in range(height):
        y1 = min(y + 1, height - 1)
        a0, b0 = planes[0, y], planes[0, y1]
        if channels == 3:
            a1, b1, a2, b2 = planes[1, y], planes[1, y1], planes[2, y], planes[2, y1]
        else:
            a1, b1, a2, b2 = zero, zero, zero, zero
        row = weights[y]
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            p0, p1, p2 = a0[x], a1[x], a2[x]
            d0, d1, d2 = p0 - a0[right], p1 - a1[right], p2 - a2[right]
            row[x, 0] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _SCALE + _HALF))
            d0, d1, d2 = p0 - b0[x], p1 - b1[x], p2 - b2[x]
            row[x, 1] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _SCALE + _HALF))
            d0, d1, d2 = p0 - b0[right], p1 - b1[right], p2 - b2[right]
            row[x, 2] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _SCALE + _HALF))
            d0, d1, d2 = p0 - b0[left], p1 - b1[left], p2 - b2[left]
            row[x, 3] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _SCALE + _HALF))
        # edges that leave the image get the weight one past the last
        outside = np.uint16(n_weights)
        row[width - 1, 0] = outside
        row[width - 1, 2] = outside
        row[0, 3] = outside
        if y == height - 1:
            for x in range(width):
                row[x, 1] = outside
                row[x, 2] = outside
                row[x, 3] = outside
    flat = weights.reshape(height * width * 4)
    counts = np.zeros(n_weights + 1, np.int32)
    for e in range(len(flat)):
        counts[flat[e]] += 1
    total = 0
    for w in range(n_weights):
        starts[w] = total
        total += counts[w]
        counts[w] = starts[w]
    starts[n_weights] = total
    counts[n_weights] = total
    for e in range(len(flat)):
        w = flat[e]
        edges[counts[w]] = e
        counts[w] += 1


@kernel("i8(i4[::1], i4[::1], i8, i8, i8, i8, i4[::1])")
def segment(edges: Any, starts: Any, height: int, width: int, k: int, min_size: int, labels: Any) -> int:
    """Label the segments of one image, given its sorted edges.

    Two components merge over an edge of weight w when `w <= Int(C) + k / |C|` for both (Int is the
    heaviest edge inside; weights are integers, so the threshold is rounded down). Then every
    edge, by rising weight, merges a component smaller than `min_size` into its neighbour.

    Returns:
        The number n of segments; `labels` (H W) holds 0 .. n-1, numbered in raster order.
    """
    n_pixels = height * width
    parent = np.empty(n_pixels, np.int32)
    size = np.empty(n_pixels, np.int32)
    limit = np.empty(n_pixels, np.int32)
    for p in range(n_pixels):
        parent[p] = p
        size[p] = 1
        limit[p] = k * 16
    offsets = np.array([1, width, width + 1, width - 1])
    for w in range(len(starts) - 1):
        for i in range(starts[w], starts[w + 1]):
            e = edges[i]
            a = e >> 2
            b = a + offsets[e & 3]
            while parent[a] != a:
                parent[a] = parent[parent[a]]
                a = parent[a]
            while parent[b] != b:
                parent[b] = parent[parent[b]]
                b = parent[b]
            if a != b and w <= limit[a] and w <= limit[b]:
                if size[a] < size[b]:
                    a, b = b, a
                parent[b] = a
                size[a] += size[b]
                limit[a] = w + k * 16 // size[a]
    for i in range(starts[len(starts) - 1]):
        e = edges[i]
        a = e >> 2
        b = a + offsets[e & 3]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a != b and (size[a] < min_size or size[b] < min_size):
            if size[a] < size[b]:
                a, b = b, a
            parent[b] = a
            size[a] += size[b]
    n = 0
    for p in range(n_pixels):
        size[p] = -1
    for p in range(n_pixels):
        a = p
        while parent[a] != a:
            a = parent[a]
        if size[a] < 0:
            size[a] = n
            n += 1
        labels[p] = size[a]
    return n
