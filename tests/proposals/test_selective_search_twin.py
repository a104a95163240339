"""A second selective search, slow and plain, that must give exactly the same boxes.

It shares no code with the package: no union-find, no contraction, no counting sort, no heap. What
it does share are the definitions: float32 planes, whole-number edge weights, the order of ties.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.proposals import SelectiveSearchConfig, grouping, selective_search
from rcnn_svm.proposals import segment as segmentation

F = np.float32
SETTINGS = {
    "fast": (["hsv", "lab"], [50, 100], ["ctsf", "tsf"]),
    "quality": (["hsv", "lab", "rgi", "h", "intensity"], [50, 100, 150, 300], ["ctsf", "tsf", "f", "s"]),
}


def hsv(r, g, b):
    high, low = max(r, g, b), min(r, g, b)
    spread = F(high - low)
    part = F(1) / max(spread, F(1))
    if r == high:
        hue = F(g - b) * part
        hue = hue + F(6) if hue < 0 else hue
    elif g == high:
        hue = F(2) + F(b - r) * part
    else:
        hue = F(4) + F(r - g) * part
    saturation = spread * F(255) / F(max(high, 1))
    return int(hue * F(255 / 6) + F(0.5)), int(saturation + F(0.5)), high


def linear_light(level):
    v = level / 255
    return round((v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) * 2048)


def cube_root(t):
    t /= 2048
    return round((t ** (1 / 3) if t > 216 / 24389 else t * (24389 / 27) / 116 + 16 / 116) * 4096)


def lab(r, g, b):
    light = [linear_light(v) for v in (r, g, b)]
    rows = [(1777, 1541, 778), (871, 2929, 296), (73, 448, 3575)]
    x, y, z = (
        cube_root((sum(m * v for m, v in zip(row, light, strict=True)) + 2048) // 4096) for row in rows
    )

    def opponent(value):  # 128.5 + value / 4096, cut to a byte
        return min(max((value + 526336) // 4096, 0), 255)

    lightness = int(F(y) * F(2.55 * 116 / 4096) - F(2.55 * 16 - 0.5))
    return lightness, opponent(500 * (x - y)), opponent(200 * (y - z))


def rgi(r, g, b):
    total = F(max(r + g + b, 1))
    return (
        int(F(r) * F(255) / total + F(0.5)),
        int(F(g) * F(255) / total + F(0.5)),
        (77 * r + 150 * g + 29 * b + 128) // 256,
    )


def planes_of(image, name):
    convert = {"hsv": hsv, "h": hsv, "lab": lab, "rgi": rgi, "intensity": rgi}[name]
    pixels = [[convert(*(int(v) for v in pixel)) for pixel in row] for row in image]
    planes = np.array(pixels, np.int64).transpose(2, 0, 1)
    return {"h": planes[:1], "intensity": planes[2:]}.get(name, planes)


def smooth(plane, sigma):
    radius = math.ceil(4 * sigma)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)] if sigma else [1.0]
    taps = [F(w / sum(weights)) for w in weights]

    def along_rows(values):
        padded = np.pad(values, ((0, 0), (radius, radius)), mode="edge")
        total = np.zeros(values.shape, F)
        for i, tap in enumerate(taps):
            total = total + tap * padded[:, i : i + values.shape[1]]
        return total

    return along_rows(along_rows(plane.astype(F)).T).T


def sorted_edges(smoothed):
    _, height, width = smoothed.shape
    edges = []
    for y in range(height):
        for d, (dy, dx) in enumerate([(0, 1), (1, 0), (1, 1), (1, -1)]):
            for x in range(width):
                if not (y + dy < height and 0 <= x + dx < width):
                    continue
                squares = [(p[y, x] - p[y + dy, x + dx]) ** 2 for p in smoothed]
                total = squares[0]
                for square in squares[1:]:
                    total = total + square
                weight = int(np.sqrt(total) * F(128) + F(0.5))
                edges.append((weight, y, d, x, y * width + x, (y + dy) * width + x + dx))
    return sorted(edges)


def segment(edges, n_pixels, k, min_size):
    label = list(range(n_pixels))
    members = {p: [p] for p in range(n_pixels)}
    inner = dict.fromkeys(range(n_pixels), 0)

    def merge(a, b, weight):
        for p in members[b]:
            label[p] = a
        members[a] += members.pop(b)
        inner[a] = weight

    for weight, *_, p, q in edges:
        a, b = label[p], label[q]
        if a != b and all(weight <= inner[c] + 128 * k // len(members[c]) for c in (a, b)):
            merge(a, b, weight)
    for weight, *_, p, q in edges:
        a, b = label[p], label[q]
        if a != b and min(len(members[a]), len(members[b])) < min_size:
            merge(a, b, weight)
    order = {}
    return np.array([order.setdefault(v, len(order)) for v in label])


def texture_bins(smoothed):
    height, width = smoothed.shape
    p = np.pad(smoothed, 1, mode="edge")

    def at(dy, dx):
        return p[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    across = [F(3) * (at(-1, dx) + at(1, dx)) + F(10) * at(0, dx) for dx in (-1, 0, 1)]
    along = [at(1, dx) - at(-1, dx) for dx in (-1, 0, 1)]
    gx = across[2] - across[0]
    gy = F(3) * (along[0] + along[2]) + F(10) * along[1]
    step = 0.4 * 255 * 32 / 10
    result = []
    for slope, scale in ((gx, 1), (gx + gy, math.sqrt(2)), (gy, 1), (gy - gx, math.sqrt(2))):
        size = np.minimum((np.abs(slope) * F(1 / (step * scale))).astype(np.int64), 9)
        result += [np.where(slope >= 0, size, 0), np.where(slope < 0, size, 0)]
    return result  # 8 orientations of (H, W)


def histograms(labels, planes, smoothed):
    n, channels = labels.max() + 1, len(planes)
    colour = np.zeros((n, channels, 25), np.int64)
    texture = np.zeros((n, channels, 8, 10), np.int64)
    for c in range(channels):
        for r, value in zip(labels, planes[c].ravel(), strict=True):
            colour[r, c, value * 25 // 256] += 1
        for o, bins in enumerate(texture_bins(smoothed[c])):
            for r, b in zip(labels, bins.ravel(), strict=True):
                texture[r, c, o, b] += 1
    return colour.reshape(n, -1), texture.reshape(n, -1)


def neighbours(labels, height, width):
    grid = labels.reshape(height, width)
    pairs = set()
    for y, x in itertools.product(range(height), range(width)):
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            if y + dy < height and 0 <= x + dx < width and grid[y, x] != grid[y + dy, x + dx]:
                pairs.add(frozenset((int(grid[y, x]), int(grid[y + dy, x + dx]))))
    return pairs


def likeness(a, b, mix, channels, n_pixels):
    unit, total = 2**20, 0

    def shares(counts, size, per_pixel):
        return (counts * (unit / per_pixel / size)).astype(np.int64)

    if "c" in mix:
        total += np.minimum(
            shares(a["colour"], a["size"], channels), shares(b["colour"], b["size"], channels)
        ).sum()
    if "t" in mix:
        total += np.minimum(
            shares(a["texture"], a["size"], 8 * channels), shares(b["texture"], b["size"], 8 * channels)
        ).sum()
    both = a["size"] + b["size"]
    if "s" in mix:
        total += unit - unit * both // n_pixels
    if "f" in mix:
        x1, y1, x2, y2 = join(a["box"], b["box"])
        total += unit - unit * ((x2 - x1) * (y2 - y1) - both) // n_pixels
    return int(total)


def join(a, b):
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def group(regions, pairs, mix, channels, n_pixels):
    """Return the boxes of the merges, first merge first."""
    regions, pairs, boxes = dict(regions), set(pairs), []
    known = {}
    while pairs:
        for pair in pairs - known.keys():
            a, b = (regions[r] for r in pair)
            known[pair] = likeness(a, b, mix, channels, n_pixels)
        low, high = min((sorted(p) for p in pairs), key=lambda p: (-known[frozenset(p)], p))
        a, b = regions[low], regions.pop(high)
        regions[low] = {
            "size": a["size"] + b["size"],
            "box": join(a["box"], b["box"]),
            "colour": a["colour"] + b["colour"],
            "texture": a["texture"] + b["texture"],
        }
        boxes.append(regions[low]["box"])
        known = {p: s for p, s in known.items() if low not in p and high not in p}
        pairs = {frozenset(low if r == high else r for r in p) for p in pairs}
        pairs = {p for p in pairs if len(p) == 2}
    return boxes


def random_numbers(n, seed):
    mask = 2**64 - 1
    for i in range(1, n + 1):
        z = (i * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        yield ((z >> 11) + 1) * 2.0**-53


def twin(image, config):
    height, width, _ = image.shape
    found = []  # (box, position in its grouping)
    colours, thresholds, mixes = SETTINGS[config.mode]
    for colour in colours:
        planes = planes_of(image, colour)
        smoothed = np.stack([smooth(p, config.sigma) for p in planes])
        edges = sorted_edges(smoothed)
        for k in thresholds:
            labels = segment(edges, height * width, k, k)
            colour_counts, texture_counts = histograms(labels, planes, smoothed)
            regions = {}
            for r in range(labels.max() + 1):
                ys, xs = np.nonzero(labels.reshape(height, width) == r)
                regions[r] = {
                    "size": len(ys),
                    "box": (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1),
                    "colour": colour_counts[r],
                    "texture": texture_counts[r],
                }
            pairs = neighbours(labels, height, width)
            for mix in mixes:
                merged = group(regions, pairs, mix, len(planes), height * width)
                assert len(merged) == len(regions) - 1
                found += [(box, len(merged) - i) for i, box in enumerate(merged)]
            found += [(region["box"], len(regions)) for region in regions.values()]
    numbers = random_numbers(len(found), config.seed)
    ranked = sorted(
        ((level * u, i, box) for i, ((box, level), u) in enumerate(zip(found, numbers, strict=True))),
    )
    result, seen = [], set()
    for priority, _, box in ranked:
        sides = box[2] - box[0], box[3] - box[1]
        if min(sides) >= config.min_size and box not in seen:
            seen.add(box)
            result.append((*box, priority))
    return np.array(result, np.float64).reshape(-1, 5)


def patchwork(rng, height, width, noise):
    """Patches of colour under noise: segments of many sizes on few pixels."""
    image = np.zeros((height, width, 3))
    for _ in range(rng.integers(2, 9)):
        y, x = rng.integers(0, height), rng.integers(0, width)
        image[y : y + rng.integers(1, height + 1), x : x + rng.integers(1, width + 1)] = rng.integers(
            0, 256, 3
        )
    return np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def assert_same(image, config):
    ours, theirs = selective_search(image, config), twin(image, config)
    np.testing.assert_array_equal(ours.boxes, theirs[:, :4].astype(np.float32))
    np.testing.assert_array_equal(ours.priority, theirs[:, 4].astype(np.float32))


@pytest.mark.parametrize("noise", [0, 3, 12, 60])
def test_fast_mode_equals_the_twin(rng, noise):
    assert_same(patchwork(rng, 34, 41, noise), SelectiveSearchConfig(min_size=2, seed=5))


@pytest.mark.parametrize("noise", [4, 30])
def test_quality_mode_equals_the_twin(rng, noise):
    assert_same(patchwork(rng, 26, 33, noise), SelectiveSearchConfig("quality", min_size=3, seed=1))


@given(st.integers(0, 2**32), st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.0, 2.0, 8.0, 40.0]))
@settings(deadline=None, max_examples=25)
def test_any_small_image_equals_the_twin(seed, height, width, noise):
    image = patchwork(np.random.default_rng(seed), height + 1, width + 1, noise)
    assert_same(image, SelectiveSearchConfig(min_size=1, seed=seed, sigma=seed % 3 * 0.6))


@pytest.mark.parametrize(("height", "width"), [(110, 260), (2, 20000), (20000, 2), (1, 300)])
def test_segmentation_across_bands_equals_the_twin(rng, height, width):
    """Larger than one band of rows; k below the contraction's own shows many small segments."""
    image = patchwork(rng, height, width, 10)
    planes = np.ascontiguousarray([smooth(p, 0.8) for p in planes_of(image, "rgi")])
    clusters, *graph = segmentation.contract(planes, 4)
    edges = sorted_edges(planes)
    for k, min_size in ((4, 1), (9, 12)):
        numbers, pairs = segmentation.segment(*graph, k, min_size)
        labels = segment(edges, height * width, k, min_size)
        np.testing.assert_array_equal(numbers[clusters].ravel(), labels)
        found = {frozenset((int(p) >> 32, int(p) & 0xFFFFFFFF)) for p in pairs}
        assert found == neighbours(labels, height, width)
        assert len(found) == len(pairs)


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(2, 40),
    channels=st.sampled_from([1, 3]),
    mix=st.sampled_from(["ctsf", "tsf", "f", "s"]),
    alike=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_grouping_of_any_graph_equals_the_twin(seed, n, channels, mix, alike):
    """`alike` regions make nearly every comparison a tie."""
    rng = np.random.default_rng(seed)
    pairs = {frozenset((i, int(rng.integers(0, i)))) for i in range(1, n)}
    pairs |= {frozenset(p) for p in rng.integers(0, n, (3 * n, 2)).tolist() if p[0] != p[1]}
    side = 40
    sizes = np.full(n, 20) if alike else rng.integers(1, 60, n)
    corners = np.zeros((n, 2), int) if alike else rng.integers(0, 30, (n, 2))
    boxes = np.concatenate([corners, corners + (8 if alike else 10)], axis=1).astype(np.int32)
    counts = np.zeros((n, 105 * channels), np.int32)
    for r in range(n):
        for c in range(channels):
            bins = np.zeros(sizes[r], int) if alike else rng.integers(0, 25, sizes[r])
            counts[r, 25 * c : 25 * c + 25] = np.bincount(bins, minlength=25)
            for o in range(8):
                low = 25 * channels + 80 * c + 10 * o
                counts[r, low : low + 10] = np.bincount(
                    rng.integers(0, 2 if alike else 10, sizes[r]), minlength=10
                )
    regions = {
        r: {
            "size": int(sizes[r]),
            "box": tuple(int(v) for v in boxes[r]),
            "colour": counts[r, : 25 * channels].astype(np.int64),
            "texture": counts[r, 25 * channels :].astype(np.int64),
        }
        for r in range(n)
    }
    merged, parents = np.empty((n - 1, 4), np.int32), np.empty((n - 1, 2), np.int32)
    keys = np.array([min(p) << 32 | max(p) for p in pairs])
    bits = sum({"c": 1, "t": 2, "s": 4, "f": 8}[m] for m in mix)
    grouping.group(rng.permutation(keys), boxes, counts, channels, side * side, bits, merged, parents)
    expected = group(regions, pairs, mix, channels, side * side)
    np.testing.assert_array_equal(merged, np.array(expected, np.int32).reshape(-1, 4))
    # every region but the last is merged into a lower one exactly once
    assert (parents[:, 0] < parents[:, 1]).all()
    assert sorted(parents[:, 1]) == list(range(1, n))
