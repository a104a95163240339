"""Greedy grouping of segments into a hierarchy of regions. Needs numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from rcnn_svm.compiled import kernel

__all__ = ["CHANNEL_BINS", "SIMILARITY_UNIT", "assemble", "describe", "group", "refine"]

SIMILARITY_UNIT = 1 << 20
"""Each of the four similarities is an integer in 0 .. 2^20."""

CHANNEL_BINS = 105
"""Histogram bins of one channel: 25 of colour, 10 for each of 8 orientations."""

_5, _10, _15, _20, _40, _60 = (np.uint64(n) for n in (5, 10, 15, 20, 40, 60))
_FIVE_BITS = np.uint64(31)


@kernel("i8(i4[::1], i8, i4[::1])")
def refine(cells: Any, n_cells: int, numbers: Any) -> int:
    """Split cells wherever `numbers` differ inside one, in place; return how many there are then."""
    first = np.full(n_cells, np.int32(-1))  # of the new cells made from an old one, a linked list
    following = np.empty(len(cells), np.int32)
    number_of = np.empty(len(cells), np.int32)
    n = 0
    for i in range(len(cells)):
        cell = first[cells[i]]
        while cell >= 0 and number_of[cell] != numbers[i]:
            cell = following[cell]
        if cell < 0:
            cell = n
            n += 1
            number_of[cell] = numbers[i]
            following[cell] = first[cells[i]]
            first[cells[i]] = cell
        cells[i] = cell
    return n


@kernel("(i4[:,::1], i4[::1], u4[:,:,::1], i4[:,::1], i4[:,::1])")
def describe(clusters: Any, cells: Any, codes: Any, boxes: Any, counts: Any) -> None:
    """Fill the bounding boxes (n, 4) and the histograms (n, 105 C) of n cells of clusters.

    A row of `counts` holds C x 25 bins of colour, then C x 8 x 10 bins of texture.

    Args:
        clusters: (H, W), the cluster of each pixel.
        cells: the cell of each cluster, 0 .. n-1.
        codes: (C, H, W), see `planes.plane_codes`.
        boxes: half-open pixels.
        counts: of pixels.
    """
    channels, height, width = codes.shape
    for r in range(len(boxes)):
        boxes[r, 0], boxes[r, 1], boxes[r, 2], boxes[r, 3] = width, height, 0, 0
    counts.fill(0)
    flat = counts.reshape(counts.size)
    stride = np.uint64(counts.shape[1])
    texture = np.uint64(25 * channels)
    row = np.empty(width, np.int32)
    for y in range(height):
        for x in range(width):
            row[x] = cells[np.uint64(clusters[y, x])]
        for c in range(channels):
            row_codes = codes[c, y]
            to_texture, to_colour = texture + np.uint64(80 * c), np.uint64(25 * c)
            for x in range(width):
                base = np.uint64(row[x]) * stride
                code = np.uint64(row_codes[x])
                axes = base + to_texture
                flat[axes + (code & _FIVE_BITS)] += 1
                flat[axes + _20 + ((code >> _5) & _FIVE_BITS)] += 1
                flat[axes + _40 + ((code >> _10) & _FIVE_BITS)] += 1
                flat[axes + _60 + ((code >> _15) & _FIVE_BITS)] += 1
                flat[base + to_colour + (code >> _20)] += 1
        x = 0
        while x < width:
            region = np.uint64(row[x])
            start = x
            x += 1
            while x < width and row[x] == row[start]:
                x += 1
            boxes[region, 0] = min(boxes[region, 0], start)
            boxes[region, 1] = min(boxes[region, 1], y)
            boxes[region, 2] = max(boxes[region, 2], x)
            boxes[region, 3] = y + 1
    # so far a pixel is counted on one side of each axis; on the other its response is 0
    for r in range(len(boxes)):
        for axis in range(4 * channels):
            base = texture + np.uint64(20 * axis)
            positive, negative = 0, 0
            for b in range(10):
                positive += counts[r, base + np.uint64(b)]
                negative += counts[r, base + np.uint64(10 + b)]
            counts[r, base] += negative
            counts[r, base + _10] += positive


@kernel("(i4[::1], i4[::1], i4[:,::1], i4[:,::1], i4[:,::1], i4[:,::1])")
def assemble(cells: Any, numbers: Any, cell_boxes: Any, cell_counts: Any, boxes: Any, counts: Any) -> None:
    """Fill the boxes (n, 4) and histograms (n, 105 C) of n segments from those of their cells.

    Args:
        cells: the cell of each cluster; every cell lies in one segment.
        numbers: the segment of each cluster.
        cell_boxes: see `describe`.
        cell_counts: see `describe`.
        boxes: half-open pixels.
        counts: of pixels.
    """
    home = np.empty(len(cell_boxes), np.int32)
    for i in range(len(cells)):
        home[cells[i]] = numbers[i]
    for r in range(len(boxes)):
        boxes[r, 0] = np.int32(0x7FFFFFFF)
        boxes[r, 1] = np.int32(0x7FFFFFFF)
        boxes[r, 2] = 0
        boxes[r, 3] = 0
    counts.fill(0)
    for cell in range(len(home)):
        r = home[cell]
        for j in range(2):
            boxes[r, j] = min(boxes[r, j], cell_boxes[cell, j])
            boxes[r, 2 + j] = max(boxes[r, 2 + j], cell_boxes[cell, 2 + j])
        total, part = counts[r], cell_counts[cell]
        for j in range(len(part)):
            total[j] += part[j]


@kernel()
def _take_shares(r: Any, counts: Any, size: int, low: int, channels: int, shares: Any) -> None:
    """Fill the shares of region r from its bins, from `low` on; the first 25 C of all bins are of colour."""
    colour_bins = max(25 * channels - low, 0)
    unit = np.int64(SIMILARITY_UNIT)
    colour_factor = unit / channels / size
    texture_factor = unit / (8 * channels) / size
    for j in range(colour_bins):
        shares[r, j] = np.int32(counts[r, low + j] * colour_factor)
    for j in range(colour_bins, shares.shape[1]):
        shares[r, j] = np.int32(counts[r, low + j] * texture_factor)


@kernel()
def _put_first(h: Any, r: Any, after: Any, before: Any, first: Any) -> None:
    """Put a half-edge into the ring of region r."""
    after[h] = first[r]
    before[h] = -1
    if first[r] >= 0:
        before[first[r]] = h
    first[r] = h


@kernel()
def _link(pairs: Any, ends: Any, after: Any, before: Any, first: Any) -> None:
    """Fill the rings of neighbours; that of region r starts at `first[r]`, -1 if it has none."""
    for i in range(len(pairs)):
        low, high = pairs[i] >> 32, pairs[i] & 0xFFFFFFFF
        ends[2 * i] = high
        _put_first(2 * i, low, after, before, first)
        ends[2 * i + 1] = low
        _put_first(2 * i + 1, high, after, before, first)


@kernel()
def _hand_over(a: Any, b: Any, ends: Any, after: Any, before: Any, first: Any, seen: Any) -> None:
    """Make the neighbours of b those of a, each once; leaves a mark in `seen` of each."""
    h = first[a]
    while h >= 0:
        seen[ends[h]] = h
        h = after[h]
    h = first[b]
    while h >= 0:
        following = after[h]
        y = ends[h]
        twin = h ^ 1
        if y == a or seen[y] >= 0:  # a knows y: forget this pair at y's end
            if before[twin] >= 0:
                after[before[twin]] = after[twin]
            else:
                first[y] = after[twin]
            if after[twin] >= 0:
                before[after[twin]] = before[twin]
        else:
            ends[twin] = a
            _put_first(h, a, after, before, first)
            seen[y] = h
        h = following
    seen[b] = -1


@kernel()
def _compare(
    x: Any, lowest: Any, ends: Any, after: Any, first: Any, shares: Any, sizes: Any, boxes: Any,
    n_pixels: int, mix: int, likeness: Any,
) -> None:  # fmt: skip
    """Fill in how alike region x and its neighbours from `lowest` on are: the sum over the mix."""
    unit = np.int64(SIMILARITY_UNIT)
    mine = shares[x]
    h = first[x]
    while h >= 0:
        y = ends[h]
        if y >= lowest:
            yours = shares[y]
            total = np.int32(0)
            for j in range(shares.shape[1]):
                total = np.int32(total + min(mine[j], yours[j]))
            s = np.int64(total)
            both = sizes[x] + sizes[y]
            if mix & 4:
                s += unit - unit * both // n_pixels
            if mix & 8:
                w = max(boxes[x, 2], boxes[y, 2]) - min(boxes[x, 0], boxes[y, 0])
                t = max(boxes[x, 3], boxes[y, 3]) - min(boxes[x, 1], boxes[y, 1])
                s += unit - unit * (np.int64(w) * np.int64(t) - both) // n_pixels
            likeness[h >> 1] = s
        h = after[h]


@kernel()
def _choose(r: Any, ends: Any, after: Any, first: Any, likeness: Any, best: Any, partner: Any) -> None:
    """Make the most similar neighbour of r its partner, the lowest of several."""
    best[r], partner[r] = -1, -1
    h = first[r]
    while h >= 0:
        s = likeness[h >> 1]
        if s > best[r] or (s == best[r] and ends[h] < partner[r]):
            best[r], partner[r] = s, ends[h]
        h = after[h]


@kernel()
def _enter(r: Any, best: Any, tree: Any) -> None:
    """Update the tournament for region r; its root holds the best similarity and its lowest region."""
    node = len(tree) // 2 + r
    tree[node] = (best[r] << 32) | (np.int64(0xFFFFFFFF) - r) if best[r] >= 0 else np.int64(-1)
    while node > 1:
        node >>= 1
        tree[node] = max(tree[2 * node], tree[2 * node + 1])


@kernel("(i8[::1], i4[:,::1], i4[:,::1], i8, i8, i8, i4[:,::1], i4[:,::1])")
def group(
    pairs: Any,
    first_boxes: Any,
    first_counts: Any,
    channels: int,
    n_pixels: int,
    mix: int,
    merged: Any,
    parents: Any,
) -> None:
    """Merge the two most similar neighbours until one region is left.

    A merged region takes the smaller number of its two parents. Among equal similarities the
    pair with the smallest lower, then the smallest higher number goes first.

    Args:
        pairs: neighbours, see `segment.segment`.
        first_boxes: (n, 4) of the segments.
        first_counts: (n, 105 C) of the segments.
        channels: C.
        n_pixels: of the image.
        mix: sum of 1 colour, 2 texture, 4 size, 8 fill: the similarities that are added up.
        merged: filled with the box of each merge, (n - 1, 4).
        parents: filled with the two numbers of each merge, (n - 1, 2), lower first.
    """
    n = len(first_boxes)
    boxes = first_boxes.copy()
    counts = first_counts.copy()
    # `shares` are histograms as fractions of 2^20; only the bins low .. high count in this mix
    low = 0 if mix & 1 else 25 * channels
    high = 105 * channels if mix & 2 else 25 * channels
    shares = np.empty((n, high - low), np.int32)
    sizes = np.zeros(n, np.int64)
    for r in range(n):
        for j in range(25):
            sizes[r] += counts[r, j]
        _take_shares(r, counts, sizes[r], low, channels, shares)
    # neighbours: half-edges in doubly linked rings; h and h ^ 1 are the two ends of one pair
    ends, after, before = np.empty((3, 2 * len(pairs)), np.int32)
    first = np.full(n, np.int32(-1))
    _link(pairs, ends, after, before, first)
    likeness = np.empty(len(pairs), np.int64)
    best = np.full(n, np.int64(-1))  # similarity to the best neighbour
    partner = np.full(n, np.int32(-1))
    for r in range(n):
        _compare(r, r + 1, ends, after, first, shares, sizes, boxes, n_pixels, mix, likeness)
    n_leaves = 1
    while n_leaves < n:
        n_leaves *= 2
    tree = np.full(2 * n_leaves, np.int64(-1))
    for r in range(n):
        _choose(r, ends, after, first, likeness, best, partner)
        _enter(r, best, tree)

    seen = np.full(n, np.int32(-1))
    for step in range(n - 1):
        a = np.int64(0xFFFFFFFF) - (tree[1] & 0xFFFFFFFF)
        b = np.int64(partner[a])
        parents[step, 0] = a
        parents[step, 1] = b
        for j in range(2):
            boxes[a, j] = min(boxes[a, j], boxes[b, j])
            boxes[a, 2 + j] = max(boxes[a, 2 + j], boxes[b, 2 + j])
        for j in range(4):
            merged[step, j] = boxes[a, j]
        sizes[a] += sizes[b]
        for j in range(high - low):
            counts[a, low + j] += counts[b, low + j]
        _take_shares(a, counts, sizes[a], low, channels, shares)
        _hand_over(a, b, ends, after, before, first, seen)
        best[b] = -1
        _enter(b, best, tree)
        _compare(a, 0, ends, after, first, shares, sizes, boxes, n_pixels, mix, likeness)
        _choose(a, ends, after, first, likeness, best, partner)
        _enter(a, best, tree)
        h = first[a]
        while h >= 0:
            y = ends[h]
            s = likeness[h >> 1]
            seen[y] = -1
            lost = partner[y] == a or partner[y] == b
            better = s > best[y] or (s == best[y] and a < partner[y])
            if lost:
                _choose(y, ends, after, first, likeness, best, partner)
            elif better:
                best[y], partner[y] = s, a
            if lost or better:
                _enter(y, best, tree)
            h = after[h]
