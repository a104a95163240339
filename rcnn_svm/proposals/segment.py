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
from numpy.typing import NDArray

from rcnn_svm.compiled import kernel

__all__ = ["WEIGHT_UNIT", "contract", "segment"]

WEIGHT_UNIT = 128
"""Edge weights are colour distances times 128, rounded: the finest that 16 bits can hold."""

_N_WEIGHTS = 56536  # more than sqrt(3) * 255 * 128 = 56534.8
_CAP = 16 * WEIGHT_UNIT  # `contract` leaves edges of 16 grey levels and more to `segment`
_BAND_PIXELS = 24576
_BAND_ROWS = 32  # at least: every border between bands cuts components short
_CHUNK = 256  # edges that are looked up before the first of them is acted on

_HALF = np.float32(0.5)
_UNIT = np.float32(WEIGHT_UNIT)
_NONE = np.uint16(0xFFFF)  # the weight of an edge that would leave the image
_DONE = np.int32(-0x80000000)  # flag in a parent link: nothing merges with this component any more
_LINK = np.int32(0x7FFFFFFF)
_LINK_64 = np.int64(0x7FFFFFFF)
_LOW_64 = np.int64(0xFFFFFFFF)
_U1, _U2, _U3, _U32 = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(32)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B1), np.uint64(0x85EBCA77)
_SHIFT = np.uint64(10)


@kernel("(f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[::1], u2[::1])")
def _distances(a0: Any, a1: Any, a2: Any, b0: Any, b1: Any, b2: Any, out: Any) -> None:
    """Fill `out` with the weights of the edges between the pixels of a and b, channel by channel."""
    for x in range(len(a0)):
        d0, d1, d2 = a0[x] - b0[x], a1[x] - b1[x], a2[x] - b2[x]
        out[x] = np.uint16(np.int32(np.sqrt(d0 * d0 + d1 * d1 + d2 * d2) * _UNIT + _HALF))


def contract(planes: NDArray[np.float32], k: int) -> tuple[NDArray[np.int32], ...]:
    """Merge pixels into components that every threshold of `k` or more makes as well.

    Neighbours are the eight around a pixel. Edges of equal weight go by row, then direction
    (right, down, lower right, lower left), then column of their upper or left pixel.

    Args:
        planes: (C, H, W) smoothed planes, C = 1 or 3.
        k: the smallest threshold.

    Returns:
        clusters: (H, W), the component of each pixel, numbered 0 .. n-1 in raster order.
        sizes: (n,) their pixels.
        inner: (n,) the heaviest edge each was made with.
        left, right: the edges between components in order, parallel ones thinned out.
        starts: edges of weight w are `starts[w] .. starts[w + 1] - 1`.
    """
    _, height, width = planes.shape
    rows = min(height, max(_BAND_ROWS, _BAND_PIXELS // width))
    # row r of a band is image row top - 1 + r: one row of other bands above and below
    weights = np.empty((rows + 2, 4, width), np.uint16)
    parent, size_of, limit = np.empty((3, (rows + 2) * width), np.int32)
    edges = np.empty(4 * (rows + 2) * width, np.int32)
    ends = np.empty(_CAP + 1, np.int32)
    share = np.concatenate([[0], k * WEIGHT_UNIT // np.arange(1, k * WEIGHT_UNIT + 2)]).astype(np.int32)

    clusters = np.empty((height, width), np.int32)
    sizes, inner = np.empty((2, height * width), np.int32)
    ends_of_edges = np.empty((2, height * width), np.int32)
    weight = np.empty(height * width, np.uint16)
    slots = 1 << max(10, (8 * width - 1).bit_length())  # enough to remember the pairs of some rows
    seen_pair = np.full(slots, -1, np.int64)
    seen_weight = np.zeros(slots, np.uint16)
    n = m = 0
    for top in range(0, height, rows):
        used = min(rows, height - top)
        _weigh_band(planes, top, used, weights)
        _sort_band(weights, used, edges, ends)
        _merge_band(edges, ends, used, width, share, parent, size_of, limit)
        n = _number_band(top, used, share, parent, size_of, limit, n, clusters, sizes, inner)
        if m + 4 * width * (used + 1) > len(weight):
            more = max(len(weight), 4 * width * (used + 1))
            ends_of_edges = np.concatenate([ends_of_edges[:, :m], np.empty((2, more), np.int32)], axis=1)
            weight = np.concatenate([weight[:m], np.empty(more, np.uint16)])
        m = _list_edges(clusters, top, used, weights, seen_pair, seen_weight, m, ends_of_edges, weight)
    left, right = np.empty((2, m), np.int32)
    starts = np.zeros(_N_WEIGHTS + 1, np.int32)
    _sort_edges(ends_of_edges, weight, m, left, right, starts)
    return clusters, sizes[:n].copy(), inner[:n].copy(), left, right, starts


@kernel("(f4[:,:,::1], i8, i8, u2[:,:,::1])")
def _weigh_band(planes: Any, top: int, used: int, weights: Any) -> None:
    """Fill `weights` (rows + 2, 4, W) with the weights of the edges that start in rows top - 1 and on."""
    channels, height, width = planes.shape
    zero = np.zeros(width, np.float32)
    for r in range(used + 1):
        y = top - 1 + r
        row = weights[r]
        if y < 0:
            row.fill(_NONE)
            continue
        y1 = min(y + 1, height - 1)
        a0, b0 = planes[0, y], planes[0, y1]
        a1, b1, a2, b2 = zero, zero, zero, zero
        if channels == 3:
            a1, b1, a2, b2 = planes[1, y], planes[1, y1], planes[2, y], planes[2, y1]
        _distances(a0[:-1], a1[:-1], a2[:-1], a0[1:], a1[1:], a2[1:], row[0])
        _distances(a0, a1, a2, b0, b1, b2, row[1])
        _distances(a0[:-1], a1[:-1], a2[:-1], b0[1:], b1[1:], b2[1:], row[2])
        _distances(a0[1:], a1[1:], a2[1:], b0[:-1], b1[:-1], b2[:-1], row[3, 1:])
        row[0, width - 1] = _NONE
        row[2, width - 1] = _NONE
        row[3, 0] = _NONE
        if y == height - 1:
            for x in range(width):
                row[1, x] = _NONE
                row[2, x] = _NONE
                row[3, x] = _NONE


@kernel("(u2[:,:,::1], i8, i4[::1], i4[::1])")
def _sort_band(weights: Any, used: int, edges: Any, ends: Any) -> None:
    """Fill `edges` with 4 * pixel + direction by rising weight; those of weight w stop at `ends[w]`."""
    width = weights.shape[2]
    ends.fill(0)
    for r in range(used + 1):
        for d in range(1 if r == 0 else 0, 4):
            row = weights[r, d]
            for x in range(width):
                ends[min(row[x], _CAP)] += 1
    total = 0
    for w in range(_CAP + 1):
        count = ends[w]
        ends[w] = total
        total += count
    for r in range(used + 1):
        for d in range(1 if r == 0 else 0, 4):
            row = weights[r, d]
            for x in range(width):
                w = min(row[x], _CAP)
                edges[ends[w]] = 4 * (r * width + x) + d
                ends[w] += 1


@kernel("(i4[::1], i4[::1], i8, i8, i4[::1], i4[::1], i4[::1], i4[::1])")
def _merge_band(
    edges: Any, ends: Any, used: int, width: int, share: Any, parent: Any, size_of: Any, limit: Any
) -> None:
    """Merge the pure components of a band: trees in `parent` (links point to lower pixels)."""
    offsets = np.empty(4, np.uint64)
    offsets[0], offsets[1], offsets[2], offsets[3] = 1, width, width + 1, width - 1
    pending = np.empty(_CHUNK, np.int64)
    for i in range((used + 2) * width):
        parent[i] = i
        size_of[i] = 1
        limit[i] = share[1]
    for x in range(width):  # other bands' pixels end whatever they touch
        parent[x] |= _DONE
        parent[(used + 1) * width + x] |= _DONE
    at = 0
    for w in range(_CAP):
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
                p = np.uint64((pending[i] >> 32) & _LINK_64)
                q = np.uint64(pending[i] & _LINK_64)
                link = np.uint64(parent[p] & _LINK)
                while link != p:
                    p = link
                    link = np.uint64(parent[p] & _LINK)
                link = np.uint64(parent[q] & _LINK)
                while link != q:
                    q = link
                    link = np.uint64(parent[q] & _LINK)
                if p == q:
                    continue
                if (parent[p] | parent[q]) < 0 or w > limit[p] or w > limit[q]:
                    parent[p] |= _DONE
                    parent[q] |= _DONE
                else:
                    low = min(p, q)
                    size = size_of[p] + size_of[q]
                    parent[p] = np.int32(low)
                    parent[q] = np.int32(low)
                    size_of[low] = size
                    limit[low] = w + share[min(size, len(share) - 1)]


@kernel("i8(i8, i8, i4[::1], i4[::1], i4[::1], i4[::1], i8, i4[:,::1], i4[::1], i4[::1])")
def _number_band(
    top: int,
    used: int,
    share: Any,
    parent: Any,
    size_of: Any,
    limit: Any,
    n: int,
    clusters: Any,
    sizes: Any,
    inner: Any,
) -> int:
    """Number a band's components from `n` on and note what they are; return the next number."""
    width = clusters.shape[1]
    for r in range(1, used + 1):
        for x in range(width):
            p = r * width + x
            a = parent[p] & _LINK
            if a == p:
                sizes[n] = size_of[p]
                inner[n] = limit[p] - share[min(size_of[p], len(share) - 1)]
                limit[p] = n  # from here on the component's number
                n += 1
            else:
                a = parent[a] & _LINK  # links point down, so that `a` was resolved before
                parent[p] = a
            clusters[top - 1 + r, x] = limit[a]
    return n


@kernel("u8(u8, u8, u8)")
def _slot(a: Any, b: Any, mask: Any) -> Any:
    """Return where in a hash table of `mask + 1` places to look for a pair."""
    return ((a * _MIX_1 + b * _MIX_2) >> _SHIFT) & mask


@kernel("i8(i4[:,::1], i8, i8, u2[:,:,::1], i8[::1], u2[::1], i8, i4[:,::1], u2[::1])")
def _list_edges(
    clusters: Any,
    top: int,
    used: int,
    weights: Any,
    seen_pair: Any,
    seen_weight: Any,
    m: int,
    ends: Any,
    weight: Any,
) -> int:
    """Append the edges between components from row `m` on; return the number of rows.

    Those from the band's last row are left to the next band, whose components they reach.
    """
    height, width = clusters.shape
    left, right = ends[0], ends[1]
    slots = np.uint64(len(seen_pair) - 1)
    for r in range(used + 1):
        y = top - 1 + r
        if y < 0 or (r == used and y < height - 1):
            continue
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
                a, b, w = left[i], right[i], weight[i]
                pair = (np.int64(a) << 32) | np.int64(b)
                slot = _slot(np.uint64(a), np.uint64(b), slots)
                known = seen_pair[slot] == pair
                left[np.uint64(m)] = a
                right[np.uint64(m)] = b
                weight[np.uint64(m)] = w
                m += (not known) | (w < seen_weight[slot])
                seen_weight[slot] = min(w, seen_weight[slot]) if known else w
                seen_pair[slot] = pair
    return m


@kernel("(i4[:,::1], u2[::1], i8, i4[::1], i4[::1], i4[::1])")
def _sort_edges(ends: Any, weight: Any, m: int, left: Any, right: Any, starts: Any) -> None:
    """Sort the first `m` listed edges by weight; `starts` comes in as zeros."""
    for i in range(m):
        starts[np.uint64(weight[i]) + _U1] += 1
    for w in range(_N_WEIGHTS):
        starts[w + 1] += starts[w]
    for i in range(m):  # starts[w] serves as the cursor of weight w and ends as starts[w + 1]
        cursor = np.uint64(weight[i])
        j = np.uint64(starts[cursor])
        starts[cursor] += 1
        left[j] = ends[0, i]
        right[j] = ends[1, i]
    for w in range(_N_WEIGHTS, 0, -1):
        starts[w] = starts[w - 1]
    starts[0] = 0


@kernel()
def _merge(
    left: Any, right: Any, starts: Any, unit: int, parent: Any, size_of: Any, limit: Any, open_left: Any,
    open_right: Any,
) -> int:  # fmt: skip
    """Merge components by rising weight; list the edges that were open when met, and return how many."""
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
                    limit[a] = w + unit // size_of[a]
    return n_open


@kernel()
def _merge_small(
    open_left: Any, open_right: Any, n_open: int, min_size: int, parent: Any, size_of: Any
) -> None:
    """Merge what is smaller than `min_size` over the open edges, which this uses up."""
    for p in range(len(parent)):
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


@kernel()
def _number(parent: Any, number: Any) -> None:
    """Number the segments by their first cluster."""
    n = 0
    for p in range(len(parent)):
        a = parent[p]
        if a == p:
            number[p] = n
            n += 1
        else:
            a = parent[a]
            parent[p] = a
            number[p] = number[a]


@kernel()
def _touching(left: Any, right: Any, number: Any, open_left: Any, open_right: Any) -> Any:
    """Return who touches whom: an edge between two clusters of different segments says so."""
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
        slot = _slot(np.uint64(open_left[i]), np.uint64(open_right[i]), np.uint64(mask))
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
                slot = _slot(a, b, np.uint64(mask))
                while table[slot] != -1:
                    slot = (slot + _U1) & np.uint64(mask)
                table[slot] = pairs[j]
    return pairs[:n_pairs].copy()


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
    parent = np.arange(len(sizes)).astype(np.int32)
    size_of = sizes.copy()
    limit = np.empty(len(sizes), np.int32)
    for p in range(len(sizes)):
        limit[p] = inner[p] + k * WEIGHT_UNIT // sizes[p]
    open_left, open_right = np.empty(len(left), np.int32), np.empty(len(left), np.int32)
    n_open = _merge(left, right, starts, k * WEIGHT_UNIT, parent, size_of, limit, open_left, open_right)
    _merge_small(open_left, open_right, n_open, min_size, parent, size_of)
    numbers = limit
    _number(parent, numbers)
    return numbers, _touching(left, right, numbers, open_left, open_right)
