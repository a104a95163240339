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
    unit = np.int64(SIMILARITY_UNIT)
    boxes = first_boxes.copy()
    counts = first_counts.copy()
    # `shares` are histograms as fractions of 2^20; only the bins low .. high count in this mix
    low = 0 if mix & 1 else 25 * channels
    high = 105 * channels if mix & 2 else 25 * channels
    shares = np.empty((n, high - low), np.int32)
    sizes = np.zeros(n, np.int64)
    colour_bins = 25 * channels - low
    colour_unit = unit / channels
    texture_unit = unit / (8 * channels)
    for r in range(n):
        for b in range(25):
            sizes[r] += counts[r, b]
        for b in range(high - low):
            factor = (colour_unit if b < colour_bins else texture_unit) / sizes[r]
            shares[r, b] = np.int32(counts[r, low + b] * factor)

    # neighbours: half-edges in doubly linked rings; h and h ^ 1 are the two ends of one pair
    n_half = 2 * len(pairs)
    ends = np.empty(n_half, np.int32)
    after = np.empty(n_half, np.int32)
    before = np.empty(n_half, np.int32)
    first = np.full(n, np.int32(-1))
    likeness = np.empty(len(pairs), np.int64)
    best = np.full(n, np.int64(-1))  # similarity to the best neighbour
    partner = np.full(n, np.int32(-1))
    seen = np.full(n, np.int32(-1))
    for i in range(len(pairs)):
        for side in range(2):
            h = 2 * i + side
            r = pairs[i] >> 32 if side == 0 else pairs[i] & 0xFFFFFFFF
            ends[h] = pairs[i] & 0xFFFFFFFF if side == 0 else pairs[i] >> 32
            after[h] = first[r]
            before[h] = -1
            if first[r] >= 0:
                before[first[r]] = h
            first[r] = h

    # tournament over the regions: the root holds the best similarity and its lowest region
    n_leaves = 1
    while n_leaves < n:
        n_leaves *= 2
    tree = np.full(2 * n_leaves, np.int64(-1))

    a = -1  # the region whose neighbours are looked at; -1: all, before the first merge
    for step in range(n):
        if step > 0:
            a = np.int64(0xFFFFFFFF) - (tree[1] & 0xFFFFFFFF)
            b = partner[a]
            for j in range(2):
                boxes[a, j] = min(boxes[a, j], boxes[b, j])
                boxes[a, 2 + j] = max(boxes[a, 2 + j], boxes[b, 2 + j])
            for j in range(4):
                merged[step - 1, j] = boxes[a, j]
            parents[step - 1, 0] = a
            parents[step - 1, 1] = b
            sizes[a] += sizes[b]
            for j in range(high - low):
                counts[a, low + j] += counts[b, low + j]
            colour_factor = colour_unit / sizes[a]
            texture_factor = texture_unit / sizes[a]
            for j in range(colour_bins):
                shares[a, j] = np.int32(counts[a, low + j] * colour_factor)
            for j in range(max(colour_bins, 0), high - low):
                shares[a, j] = np.int32(counts[a, low + j] * texture_factor)
            # hand b's neighbours to a
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
                    after[h] = first[a]
                    before[h] = -1
                    if first[a] >= 0:
                        before[first[a]] = h
                    first[a] = h
                    seen[y] = h
                h = following
            seen[b] = -1
            best[b] = -1
            best[a] = -1
            partner[a] = -1
            node = n_leaves + b
            tree[node] = -1
            while node > 1:
                node >>= 1
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
        for r in range(n if step == 0 else 1):
            x = r if step == 0 else a
            mine = shares[x]
            h = first[x]
            while h >= 0:
                y = ends[h]
                seen[y] = -1
                if step > 0 or x < y:
                    s = np.int64(0)
                    total = np.int32(0)
                    yours = shares[y]
                    for j in range(high - low):
                        total = np.int32(total + min(mine[j], yours[j]))
                    s += total
                    both = sizes[x] + sizes[y]
                    if mix & 4:
                        s += unit - unit * both // n_pixels
                    if mix & 8:
                        w = max(boxes[x, 2], boxes[y, 2]) - min(boxes[x, 0], boxes[y, 0])
                        t = max(boxes[x, 3], boxes[y, 3]) - min(boxes[x, 1], boxes[y, 1])
                        s += unit - unit * (np.int64(w) * np.int64(t) - both) // n_pixels
                    likeness[h >> 1] = s
                    if s > best[x] or (s == best[x] and y < partner[x]):
                        best[x] = s
                        partner[x] = y
                    changed = False
                    if step > 0 and (partner[y] == a or partner[y] == parents[step - 1, 1]):
                        best[y] = -1
                        partner[y] = -1
                        g = first[y]
                        while g >= 0:
                            t2 = likeness[g >> 1]
                            if t2 > best[y] or (t2 == best[y] and ends[g] < partner[y]):
                                best[y] = t2
                                partner[y] = ends[g]
                            g = after[g]
                        changed = True
                    elif s > best[y] or (s == best[y] and x < partner[y]):
                        best[y] = s
                        partner[y] = x
                        changed = True
                    if changed and step > 0:
                        node = n_leaves + y
                        tree[node] = (best[y] << 32) | (np.int64(0xFFFFFFFF) - y)
                        while node > 1:
                            node >>= 1
                            tree[node] = max(tree[2 * node], tree[2 * node + 1])
                h = after[h]
        if step == 0:
            for r in range(n):
                tree[n_leaves + r] = (best[r] << 32) | (np.int64(0xFFFFFFFF) - r)
            for node in range(n_leaves - 1, 0, -1):
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
        else:
            node = n_leaves + a
            tree[node] = (best[a] << 32) | (np.int64(0xFFFFFFFF) - a) if best[a] >= 0 else np.int64(-1)
            while node > 1:
                node >>= 1
                tree[node] = max(tree[2 * node], tree[2 * node + 1])
