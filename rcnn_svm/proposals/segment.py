"""Graph-based segmentation of Felzenszwalb and Huttenlocher (IJCV 2004), on integer edge weights.

Two components merge over an edge of weight w when `w <= Int(C) + k / |C|` holds for both, with
edges taken by rising weight; Int is the heaviest edge that a component was made with. As weights
are whole numbers, the right side is rounded down.

The work is done in two steps that together give exactly that. `contract` runs once per colour
space. It merges what the smallest k merges as long as a component has met nothing but merges
("pure"): every larger k makes the same merges, so that all of them can start from there. A pure
component depends on its surroundings only, hence it can be found in a band of rows that fits the
L1 cache. `segment` then finishes the job on the small graph of pure components. Needs numba.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rcnn_svm.proposals.compiled import kernel

__all__ = ["WEIGHT_UNIT", "contract", "segment"]

WEIGHT_UNIT = 128
"""Edge weights are colour distances times 128, rounded: the finest that 16 bits can hold."""

_N_WEIGHTS = 56536  # more than sqrt(3) * 255 * 128 = 56534.8
_CAP = 16 * WEIGHT_UNIT  # `contract` leaves edges of 16 grey levels and more to `segment`
_BAND_PIXELS = 24576
_CHUNK = 256  # edges that are looked up before the first of them is acted on
_REMEMBERED = 4096  # slots of the filter against parallel edges

_HALF = np.float32(0.5)
_UNIT = np.float32(WEIGHT_UNIT)
_NONE = np.uint16(0xFFFF)  # the weight of an edge that would leave the image
_DONE = np.int32(-0x80000000)  # flag in a parent link: nothing merges with this component any more
_LINK = np.int32(0x7FFFFFFF)
_LINK_64 = np.int64(0x7FFFFFFF)
_LOW_64 = np.int64(0xFFFFFFFF)
_U1, _U2, _U3, _U32 = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(32)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77)
_SHIFT, _SLOTS = np.uint64(10), np.uint64(_REMEMBERED - 1)


@kernel("(f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], u2[::1])")
def _distances(a0: Any, a1: Any, a2: Any, b0: Any, b1: Any, b2: Any, out: Any) -> None:
    """Fill `out` with the weights of the edges between the pixels of a and b, channel by channel."""
    for x in range(len(a0)):
        d0, d1, d2 = a0[x] - b0[x], a1[x] - b1[x], a2[x] - b2[x]
        out[x] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _UNIT + _HALF))


@kernel("Tuple((i4[:,::1], i4[::1], i4[::1], i4[::1], i4[::1], i4[::1]))(f4[:,:,::1], i8)")
def contract(planes: Any, k: int) -> Any:
    """Merge pixels into components that every threshold of `k` or more makes as well.

    Neighbours are the eight around a pixel. Edges of equal weight go by row, then direction
    (right, down, lower right, lower left), then column of their upper or left pixel.

    Args:
        planes: (C, H, W) smoothed planes.
        k: the smallest threshold.

    Returns:
        clusters: (H, W), the component of each pixel, numbered 0 .. n-1 in raster order.
        sizes: (n,) their pixels.
        inner: (n,) the heaviest edge each was made with.
        left, right: the edges between components in order, parallel ones thinned out.
        starts: edges of weight w are `starts[w] .. starts[w + 1] - 1`.
    """
    channels, height, width = planes.shape
    limit_of_one = k * WEIGHT_UNIT
    share = np.zeros(limit_of_one + 2, np.int32)
    for size in range(1, limit_of_one + 1):
        share[size] = limit_of_one // size
    n_rows = max(1, min(height, _BAND_PIXELS // width))
    # local row r is image row top - 1 + r: one row of other bands above and below
    weights = np.empty((n_rows + 2, 4, width), np.uint16)
    parent = np.empty((n_rows + 2) * width, np.int32)  # links point to lower pixels
    size_of = np.empty((n_rows + 2) * width, np.int32)
    limit = np.empty((n_rows + 2) * width, np.int32)
    edges = np.empty(4 * (n_rows + 2) * width, np.int32)  # 4 * pixel + direction
    begin = np.empty(_CAP + 1, np.int32)
    ends = np.empty(_CAP + 1, np.int32)
    offsets = np.empty(4, np.uint64)
    offsets[0], offsets[1], offsets[2], offsets[3] = 1, width, width + 1, width - 1
    pending = np.empty(_CHUNK, np.int64)
    zero = np.zeros(width, np.float32)

    clusters = np.empty((height, width), np.int32)
    sizes = np.empty(height * width, np.int32)
    inner = np.empty(height * width, np.int32)
    n = 0
    capacity = height * width + 4 * width
    left = np.empty(capacity, np.int32)
    right = np.empty(capacity, np.int32)
    weight = np.empty(capacity, np.uint16)
    m = 0
    seen_pair = np.full(_REMEMBERED, np.int64(-1))
    seen_weight = np.zeros(_REMEMBERED, np.uint16)

    for top in range(0, height, n_rows):
        last = min(n_rows, height - top)
        for r in range(last + 1):
            y = top - 1 + r
            to_right, to_below = weights[r, 0], weights[r, 1]
            to_lower_right, to_lower_left = weights[r, 2], weights[r, 3]
            if y < 0:
                weights[r].fill(_NONE)
                continue
            if channels == 3:
                a0, a1, a2 = planes[0, y], planes[1, y], planes[2, y]
            else:
                a0, a1, a2 = planes[0, y], zero, zero
            _distances(a0[:-1], a1[:-1], a2[:-1], a0[1:], a1[1:], a2[1:], to_right)
            if y < height - 1:
                if channels == 3:
                    b0, b1, b2 = planes[0, y + 1], planes[1, y + 1], planes[2, y + 1]
                else:
                    b0, b1, b2 = planes[0, y + 1], zero, zero
                _distances(a0, a1, a2, b0, b1, b2, to_below)
                _distances(a0[:-1], a1[:-1], a2[:-1], b0[1:], b1[1:], b2[1:], to_lower_right)
                _distances(a0[1:], a1[1:], a2[1:], b0[:-1], b1[:-1], b2[:-1], to_lower_left[1:])
            to_right[width - 1] = _NONE
            to_lower_right[width - 1] = _NONE
            to_lower_left[0] = _NONE
            if y == height - 1:
                to_below.fill(_NONE)
                to_lower_right.fill(_NONE)
                to_lower_left.fill(_NONE)

        # sort the band's edges by counting
        ends.fill(0)
        for r in range(last + 1):
            for d in range(1 if r == 0 else 0, 4):
                row = weights[r, d]
                for x in range(width):
                    ends[min(row[x], _CAP)] += 1
        total = 0
        for w in range(_CAP + 1):
            begin[w] = total
            total += ends[w]
            ends[w] = begin[w]
        for r in range(last + 1):
            for d in range(1 if r == 0 else 0, 4):
                row = weights[r, d]
                for x in range(width):
                    w = min(row[x], _CAP)
                    edges[ends[w]] = 4 * (r * width + x) + d
                    ends[w] += 1

        for p in range((last + 2) * width):
            parent[p] = p
            size_of[p] = 1
            limit[p] = limit_of_one
        for x in range(width):  # other bands' pixels end whatever they touch
            parent[x] |= _DONE
            parent[(last + 1) * width + x] |= _DONE
        for w in range(_CAP):
            at = begin[w]
            while at < ends[w]:
                stop = min(at + _CHUNK, ends[w])
                n_pending = 0
                for i in range(at, stop):  # without branches: most edges need no more than this
                    e = np.uint64(edges[i])
                    u = e >> _U2
                    v = u + offsets[e & _U3]
                    a = parent[np.uint64(parent[u] & _LINK)]
                    b = parent[np.uint64(parent[v] & _LINK)]
                    parent[u] = a
                    parent[v] = b
                    pending[np.uint64(n_pending)] = (np.int64(a) << 32) | (np.int64(b) & _LOW_64)
                    n_pending += (((a ^ b) & _LINK) != 0) & ((a & b) >= 0)
                at = stop
                for i in range(n_pending):
                    a = np.uint64((pending[i] >> 32) & _LINK_64)
                    b = np.uint64(pending[i] & _LINK_64)
                    while np.uint64(parent[a] & _LINK) != a:
                        a = np.uint64(parent[a] & _LINK)
                    while np.uint64(parent[b] & _LINK) != b:
                        b = np.uint64(parent[b] & _LINK)
                    if a == b:
                        continue
                    if (parent[a] | parent[b]) < 0 or w > limit[a] or w > limit[b]:
                        parent[a] |= _DONE
                        parent[b] |= _DONE
                    else:
                        if b < a:
                            a, b = b, a
                        parent[b] = np.int32(a)
                        size_of[a] += size_of[b]
                        limit[a] = w + share[min(size_of[a], limit_of_one + 1)]

        for r in range(1, last + 1):
            for x in range(width):
                p = r * width + x
                a = parent[p] & _LINK
                if a == p:
                    sizes[n] = size_of[p]
                    inner[n] = limit[p] - share[min(size_of[p], limit_of_one + 1)]
                    limit[p] = n  # from here on the component's number
                    n += 1
                else:
                    a = parent[a] & _LINK  # links point down, so that `a` was resolved before
                    parent[p] = a
                clusters[top - 1 + r, x] = limit[a]

        # list the edges between components, those from the band's last row with the next band
        for r in range(last + 1):
            y = top - 1 + r
            if y < 0 or (r == last and y < height - 1):
                continue
            if m + 4 * width > capacity:
                capacity = 2 * capacity
                more_left = np.empty(capacity, np.int32)
                more_right = np.empty(capacity, np.int32)
                more_weight = np.empty(capacity, np.uint16)
                for i in range(m):
                    more_left[i], more_right[i], more_weight[i] = left[i], right[i], weight[i]
                left, right, weight = more_left, more_right, more_weight
            here = clusters[y]
            for d in range(1 if y == height - 1 else 4):
                row = weights[r, d]
                there = here if d == 0 else clusters[y + 1]
                shift = -1 if d == 3 else (0 if d == 1 else 1)
                first = m
                for x in range(max(0, -shift), width - max(0, shift)):
                    a, b = here[x], there[x + shift]
                    left[np.uint64(m)] = min(a, b)
                    right[np.uint64(m)] = max(a, b)
                    weight[np.uint64(m)] = row[x]
                    m += a != b
                # of two parallel edges the later one never acts: drop it where it is cheap to see
                listed = m
                m = first
                for i in range(first, listed):
                    a, b, w16 = left[i], right[i], weight[i]
                    pair = (np.int64(a) << 32) | np.int64(b)
                    slot = ((np.uint64(a) * _MIX_1 + np.uint64(b) * _MIX_2) >> _SHIFT) & _SLOTS
                    known = seen_pair[slot] == pair
                    left[np.uint64(m)] = a
                    right[np.uint64(m)] = b
                    weight[np.uint64(m)] = w16
                    m += (not known) | (w16 < seen_weight[slot])
                    seen_weight[slot] = min(w16, seen_weight[slot]) if known else w16
                    seen_pair[slot] = pair

    starts = np.zeros(_N_WEIGHTS + 1, np.int32)
    for i in range(m):
        starts[np.uint64(weight[i]) + _U1] += 1
    for w in range(_N_WEIGHTS):
        starts[w + 1] += starts[w]
    cursor = starts.copy()
    sorted_left = np.empty(m, np.int32)
    sorted_right = np.empty(m, np.int32)
    for i in range(m):
        j = cursor[np.uint64(weight[i])]
        cursor[np.uint64(weight[i])] = j + 1
        sorted_left[np.uint64(j)] = left[i]
        sorted_right[np.uint64(j)] = right[i]
    return clusters, sizes[:n].copy(), inner[:n].copy(), sorted_left, sorted_right, starts


@kernel("Tuple((i4[::1], i8[::1]))(i4[::1], i4[::1], i4[::1], i4[::1], i4[::1], i8, i8)")
def segment(
    sizes: Any,
    inner: Any,
    left: Any,
    right: Any,
    starts: Any,
    k: int,
    min_size: int,
) -> Any:
    """Finish the segmentation for one k, then merge segments smaller than `min_size`.

    In that last pass every edge, by rising weight, merges two segments of which at least one is
    smaller than `min_size`.

    Args:
        sizes: with the next four, what `contract` returned for a threshold of at most `k`.
        inner: see `contract`.
        left: see `contract`.
        right: see `contract`.
        starts: see `contract`.
        k: threshold.
        min_size: in pixels.

    Returns:
        numbers: the segment of each cluster, 0 .. n-1 in raster order of the image.
        pairs: the segments that touch, each pair once, as low << 32 | high.
    """
    n_clusters = len(sizes)
    limit_of_one = k * WEIGHT_UNIT
    parent = np.empty(n_clusters, np.int32)
    size_of = sizes.copy()
    limit = np.empty(n_clusters, np.int32)
    for p in range(n_clusters):
        parent[p] = p
        limit[p] = inner[p] + limit_of_one // sizes[p]
    open_left = np.empty(len(left), np.int32)
    open_right = np.empty(len(left), np.int32)
    n_open = 0
    pending = np.empty(_CHUNK, np.int64)
    for w in range(len(starts) - 1):
        at = starts[w]
        while at < starts[w + 1]:
            stop = min(at + _CHUNK, starts[w + 1])
            n_pending = 0
            for i in range(at, stop):
                u, v = np.uint64(left[i]), np.uint64(right[i])
                a = parent[np.uint64(parent[u] & _LINK)]
                b = parent[np.uint64(parent[v] & _LINK)]
                parent[u] = a
                parent[v] = b
                open_left[np.uint64(n_open)] = left[i]
                open_right[np.uint64(n_open)] = right[i]
                apart = ((a ^ b) & _LINK) != 0
                n_open += apart
                pending[np.uint64(n_pending)] = (np.int64(a) << 32) | (np.int64(b) & _LOW_64)
                n_pending += apart & ((a | b) >= 0)
            at = stop
            for i in range(n_pending):
                a = np.uint64((pending[i] >> 32) & _LINK_64)
                b = np.uint64(pending[i] & _LINK_64)
                while np.uint64(parent[a] & _LINK) != a:
                    a = np.uint64(parent[a] & _LINK)
                while np.uint64(parent[b] & _LINK) != b:
                    b = np.uint64(parent[b] & _LINK)
                if a == b:
                    continue
                if w > limit[a]:  # too heavy for a: so is every edge to come
                    parent[a] |= _DONE
                if w > limit[b]:
                    parent[b] |= _DONE
                if w <= limit[a] and w <= limit[b]:
                    if b < a:
                        a, b = b, a
                    parent[b] = np.int32(a)
                    size_of[a] += size_of[b]
                    limit[a] = w + limit_of_one // size_of[a]

    for p in range(n_clusters):
        parent[p] = parent[np.uint64(parent[p] & _LINK)] & _LINK
    n_small = 0
    for i in range(n_open):
        a = parent[np.uint64(open_left[i])]
        b = parent[np.uint64(open_right[i])]
        open_left[np.uint64(n_small)] = a
        open_right[np.uint64(n_small)] = b
        small = (size_of[np.uint64(a)] < min_size) | (size_of[np.uint64(b)] < min_size)
        n_small += (a != b) & small
    for i in range(n_small):
        a, b = np.uint64(open_left[i]), np.uint64(open_right[i])
        while np.uint64(parent[a]) != a:
            parent[a] = parent[np.uint64(parent[a])]
            a = np.uint64(parent[a])
        while np.uint64(parent[b]) != b:
            parent[b] = parent[np.uint64(parent[b])]
            b = np.uint64(parent[b])
        if a != b and (size_of[a] < min_size or size_of[b] < min_size):
            if b < a:
                a, b = b, a
            parent[b] = np.int32(a)
            size_of[a] += size_of[b]

    n = 0
    number = limit
    for p in range(n_clusters):
        a = parent[p]
        if a == p:
            number[p] = n
            n += 1
        else:
            a = parent[a]
            parent[p] = a
            number[p] = number[a]
    # who touches whom: an edge between two clusters of different segments says so
    n_open = 0
    for i in range(len(left)):
        a = number[np.uint64(left[i])]
        b = number[np.uint64(right[i])]
        open_left[np.uint64(n_open)] = min(a, b)
        open_right[np.uint64(n_open)] = max(a, b)
        n_open += a != b
    mask = 8191
    table = np.full(mask + 1, np.int64(-1))
    pairs = np.empty(2048, np.int64)
    n_pairs = 0
    for i in range(n_open):
        pair = (np.int64(open_left[i]) << 32) | np.int64(open_right[i])
        slot = ((np.uint64(open_left[i]) * _MIX_1 + np.uint64(open_right[i]) * _MIX_2) >> _SHIFT) & np.uint64(
            mask
        )
        while table[slot] != pair and table[slot] != -1:
            slot = (slot + _U1) & np.uint64(mask)
        if table[slot] == pair:
            continue
        table[slot] = pair
        pairs[n_pairs] = pair
        n_pairs += 1
        if n_pairs == len(pairs):  # a table stays at most a quarter full
            more = np.empty(2 * n_pairs, np.int64)
            for j in range(n_pairs):
                more[j] = pairs[j]
            pairs = more
            mask = 8 * n_pairs - 1
            table = np.full(mask + 1, np.int64(-1))
            for j in range(n_pairs):
                a = np.uint64(pairs[j] >> 32)
                b = np.uint64(pairs[j] & _LOW_64)
                slot = ((a * _MIX_1 + b * _MIX_2) >> _SHIFT) & np.uint64(mask)
                while table[slot] != -1:
                    slot = (slot + _U1) & np.uint64(mask)
                table[slot] = pairs[j]
    return number, pairs[:n_pairs].copy()
