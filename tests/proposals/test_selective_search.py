"""What a selective search promises: known answers, invariants, odd images, determinism, errors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.proposals import SelectiveSearchConfig, grouping, planes, segment, selective_search


def scene(rng, height=120, width=160):
    """A picture with objects, texture and noise; returns it and the objects' boxes."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([120 + 40 * np.sin(x / 40), 130 + 30 * np.cos(y / 30), 90 + 0 * x], axis=2)
    image[30:80, 20:70] = (200, 40, 40)
    image[50:110, 90:150] = (30, 60, 190)
    image[60:90, 105:135] = (240, 240, 60)
    image += rng.normal(0, 4, image.shape)
    boxes = np.array([[20, 30, 70, 80], [90, 50, 150, 110], [105, 60, 135, 90]], np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), boxes


@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_finds_the_objects_of_a_synthetic_scene(rng, mode):
    image, objects = scene(rng)
    regions = selective_search(image, SelectiveSearchConfig(mode), image_id="scene")
    assert regions.image_id == "scene"
    assert regions.size == (120, 160)
    for box in objects:
        assert np.abs(regions.boxes - box).max(axis=1).min() <= 1


def test_two_halves_give_three_boxes():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 30:] = 255
    regions = selective_search(image)
    expected = {(0, 0, 30, 40), (30, 0, 60, 40), (0, 0, 60, 40)}
    assert {tuple(box) for box in regions.boxes.astype(int).tolist()} == expected


def test_boxes_are_ranked_unique_whole_and_large(rng):
    regions = selective_search(scene(rng)[0], SelectiveSearchConfig("quality", min_size=17))
    assert (np.diff(regions.priority) >= 0).all()
    assert len(np.unique(regions.boxes, axis=0)) == len(regions) > 20
    np.testing.assert_array_equal(regions.boxes, np.rint(regions.boxes))
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
    assert sides.min() >= 17
    assert (sides == 17).any() or sides.min() > 17


def test_a_side_of_min_size_stays():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 255
    assert len(selective_search(image, SelectiveSearchConfig(min_size=20))) == 3
    assert len(selective_search(image, SelectiveSearchConfig(min_size=21))) == 0


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (3, 3), (10, 20000), (20000, 10)]
)
def test_odd_shapes(rng, height, width):
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    regions = selective_search(image, SelectiveSearchConfig(min_size=1))
    assert (regions.boxes == (0, 0, width, height)).all(axis=1).any()


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_one_region(value):
    image = np.full((64, 50, 3), value, np.uint8)
    np.testing.assert_array_equal(
        selective_search(image, SelectiveSearchConfig("quality")).boxes, [[0, 0, 50, 64]]
    )


def test_a_grey_image_and_a_view_work(rng):
    grey = np.repeat(scene(rng)[0][:, :, :1], 3, axis=2)
    assert len(selective_search(grey)) > 3
    view = scene(rng)[0][::-1, ::2]
    np.testing.assert_array_equal(selective_search(view).boxes, selective_search(view.copy()).boxes)


def test_an_image_below_the_size_filter_gives_no_box():
    regions = selective_search(np.zeros((19, 100, 3), np.uint8))
    assert regions.boxes.shape == (0, 4)
    assert regions.priority.shape == (0,)


def test_same_bytes_in_any_thread_and_on_every_run(rng):
    images = [scene(rng, 100 + 7 * i, 140)[0] for i in range(6)]
    alone = [selective_search(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(selective_search, images * 3))
    for i, regions in enumerate(together):
        assert regions.boxes.tobytes() == alone[i % 6].boxes.tobytes()
        assert regions.priority.tobytes() == alone[i % 6].priority.tobytes()


def test_every_setting_changes_the_result(rng):
    image, _ = scene(rng)
    base = selective_search(image)
    changes = {
        "ranking": "diverse",
        "mode": "quality",
        "sigma": 2.0,
        "min_size": 40,
        "seed": 1,
        "max_width": 100,
        "max_regions": 7,
    }
    assert set(changes) == {f.name for f in dataclasses.fields(SelectiveSearchConfig)}
    for name, value in changes.items():
        config = SelectiveSearchConfig(**{name: value})
        assert selective_search(image, config).boxes.tobytes() != base.boxes.tobytes(), name
        assert config.key() != SelectiveSearchConfig().key(), name


def test_the_seed_changes_the_order_only(rng):
    image, _ = scene(rng)
    first, second = (selective_search(image, SelectiveSearchConfig(seed=s)) for s in (0, 1))
    assert not np.array_equal(first.boxes, second.boxes)
    assert {tuple(b) for b in first.boxes} == {tuple(b) for b in second.boxes}


def test_max_regions_keeps_the_best(rng):
    image, _ = scene(rng)
    np.testing.assert_array_equal(
        selective_search(image, SelectiveSearchConfig(max_regions=9)).boxes, selective_search(image).boxes[:9]
    )


def test_max_width_gives_boxes_of_the_original(rng):
    image, objects = scene(rng, 240, 320)
    regions = selective_search(image, SelectiveSearchConfig(max_width=160))
    assert regions.size == (240, 320)
    for box in objects:
        assert np.abs(regions.boxes - box).max(axis=1).min() <= 4
    wide = selective_search(image, SelectiveSearchConfig(max_width=320))
    np.testing.assert_array_equal(wide.boxes, selective_search(image).boxes)


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60), st.floats(0, 60))
@settings(deadline=None, max_examples=40)
def test_conservation(seed, height, width, noise):
    """Sizes add up to the image; histograms are conserved; the graph is connected."""
    rng = np.random.default_rng(seed)
    image = np.clip(rng.normal(128, noise, (height, width, 3)), 0, 255).astype(np.uint8)
    raw = np.empty((3, height, width), np.uint8)
    planes.colour_planes(image, 1, *planes.lab_tables(), raw)
    smoothed, codes = np.empty(raw.shape, np.float32), np.empty(raw.shape, np.uint32)
    for c in range(3):
        planes.smooth(raw[c], planes.smoothing_taps(0.8), smoothed[c])
        planes.plane_codes(raw[c], smoothed[c], codes[c])
    clusters, *graph = segment.contract(smoothed, 10)
    assert graph[0].sum() == height * width
    np.testing.assert_array_equal(np.bincount(clusters.ravel()), graph[0])
    coarse, _ = segment.segment(*graph, 30, 30)
    fine, pairs = segment.segment(*graph, 10, 10)
    cells = fine.copy()
    n_cells = grouping.refine(cells, int(fine.max()) + 1, coarse)
    assert len({(f, c) for f, c in zip(fine, coarse, strict=True)}) == n_cells == cells.max() + 1
    cell_boxes, cell_counts = np.empty((n_cells, 4), np.int32), np.empty((n_cells, 315), np.int32)
    grouping.describe(clusters, cells, codes, cell_boxes, cell_counts)
    n = int(fine.max()) + 1
    boxes, counts = np.empty((n, 4), np.int32), np.empty((n, 315), np.int32)
    grouping.assemble(cells, fine, cell_boxes, cell_counts, boxes, counts)
    sizes = np.bincount(fine[clusters].ravel())
    assert (sizes >= min(10, height * width)).all()
    for c in range(3):  # each pixel has one colour and eight responses in every channel
        np.testing.assert_array_equal(counts[:, 25 * c : 25 * c + 25].sum(axis=1), sizes)
        for o in range(8):
            low = 75 + 80 * c + 10 * o
            np.testing.assert_array_equal(counts[:, low : low + 10].sum(axis=1), sizes)
    assert len(pairs) >= n - 1
    merged, parents = np.empty((n - 1, 4), np.int32), np.empty((n - 1, 2), np.int32)
    grouping.group(pairs, boxes, counts, 3, height * width, 15, merged, parents)
    assert sorted(parents[:, 1]) == list(range(1, n))
    if n > 1:
        np.testing.assert_array_equal(merged[-1], [0, 0, width, height])


def covering(first, second):
    """Mean over pixels of the best overlap of a segment of `first` among those of `second`."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first.ravel(), second.ravel()), 1)
    union = table.sum(1, keepdims=True) + table.sum(0, keepdims=True) - table
    return float((table.sum(1) * (table / union).max(axis=1)).sum() / first.size)


def both_segmentations(image, k):
    """Return our segments of an RGB image and scikit-image's, with like parameters."""
    segmentation = pytest.importorskip("skimage.segmentation")
    raw = image.transpose(2, 0, 1).copy()
    smoothed = np.empty(raw.shape, np.float32)
    for c in range(3):
        planes.smooth(raw[c], planes.smoothing_taps(0.8), smoothed[c])
    clusters, *graph = segment.contract(smoothed, k)
    ours = segment.segment(*graph, k, k)[0][clusters]
    return ours, segmentation.felzenszwalb(image, scale=k, sigma=0.8, min_size=k)


@pytest.mark.parametrize("k", [50, 150])
def test_segmentation_of_patches_agrees_with_scikit_image(rng, k):
    image = np.zeros((180, 240, 3), np.uint8)
    for _ in range(12):
        y, x = rng.integers(0, 150), rng.integers(0, 200)
        image[y : y + rng.integers(20, 80), x : x + rng.integers(20, 80)] = rng.integers(0, 256, 3)
    ours, theirs = both_segmentations(image, k)
    assert covering(ours, theirs) > 0.97
    assert covering(theirs, ours) > 0.97


@pytest.mark.data
def test_segmentation_of_photographs_agrees_with_scikit_image(data_root):
    """Weights of 1/128 of a grey level against floats: edges nearly tied may fall either way."""
    from rcnn_svm.opencv import cv2

    paths = sorted((data_root / "voc2007-mini/VOC2007/JPEGImages").glob("*.jpg"))[:8]
    agreement = []
    for path in paths:
        ours, theirs = both_segmentations(np.ascontiguousarray(cv2.imread(str(path))[:, :, ::-1]), 50)
        agreement.append((covering(ours, theirs) + covering(theirs, ours)) / 2)
        assert 0.8 < (ours.max() + 1) / (theirs.max() + 1) < 1.25
    assert np.median(agreement) > 0.9


def test_smoothing_is_a_gaussian(rng):
    plane = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    smoothed = np.empty(plane.shape, np.float32)
    planes.smooth(plane, planes.smoothing_taps(0.8), smoothed)
    offsets = np.arange(-4, 5)
    weights = np.exp(-0.5 * (offsets / 0.8) ** 2)
    padded = np.pad(plane.astype(float), 4, mode="edge")
    rows = sum(w * padded[:, i : i + 50] for i, w in enumerate(weights)) / weights.sum()
    exact = sum(w * rows[i : i + 40] for i, w in enumerate(weights)) / weights.sum()
    assert np.abs(smoothed - exact).max() < 1e-4


def test_lab_agrees_with_opencv(rng):
    from rcnn_svm.opencv import cv2

    image = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    raw = np.empty((3, 30, 30), np.uint8)
    planes.colour_planes(image, 1, *planes.lab_tables(), raw)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).transpose(2, 0, 1)
    assert np.abs(raw.astype(int) - expected).max() <= 2
    planes.colour_planes(image, 0, *planes.lab_tables(), raw)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL).transpose(2, 0, 1).astype(int)
    difference = np.abs(raw.astype(int) - expected)
    assert np.minimum(difference[0], 256 - difference[0]).max() <= 2  # hue goes round
    assert difference[1:].max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "slow"}, "proposals.mode must be one of 'fast', 'quality', got 'slow'."),
        ({"ranking": "x"}, "proposals.ranking must be one of 'paper', 'diverse', got 'x'."),
        ({"sigma": -1}, "proposals.sigma must lie in [0, 10], got -1.0."),
        ({"min_size": 0}, "proposals.min_size must be at least 1, got 0."),
        ({"seed": -1}, "proposals.seed must not be negative, got -1."),
        ({"max_width": 0}, "proposals.max_width must be at least 1, got 0."),
        ({"max_regions": 0}, "proposals.max_regions must be at least 1, got 0."),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigError) as caught:
        SelectiveSearchConfig(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_image(image):
    with pytest.raises(ShapeError) as caught:
        selective_search(image, image_id="x")
    assert str(caught.value) == (
        f"selective_search('x'): image must be uint8 (H, W, 3) with at least one pixel, "
        f"got {image.dtype} {image.shape}. Repeat a grey image three times, drop alpha."
    )


def test_importing_the_package_does_not_import_numba():
    code = "import sys, rcnn_svm.proposals; sys.exit('numba' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
