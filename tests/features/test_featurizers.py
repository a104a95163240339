from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features.featurizers import SharedFeatures, WarpedFeatures, crops_on_device
from rcnn_svm.features.warp import warp_crops, warp_geometry
from rcnn_svm.networks.backbone import load_backbone

BOXES = np.array([[10, 10, 80, 90], [0, 0, 160, 120], [100, 50, 140, 110], [5, 60, 30, 118]], np.float32)


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[:120, :160]
    channels = [128 + 100 * np.sin(x / 9 + i) * np.cos(y / (7 + i)) for i in range(3)]
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def small():
    return load_backbone("small_cnn", "random", seed=1)


@pytest.fixture(scope="module")
def mobile():
    """With random weights as they come, MobileNetV2's outputs would all but vanish."""
    backbone = load_backbone("mobilenet_v2", "random", seed=1)
    with torch.no_grad():
        for module in backbone.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.fill_(2.0)
    return backbone


def test_warped_equals_the_bare_network(image, small):
    features = WarpedFeatures(small, "conv3@10x10,fc7,logits", batch_size=3)
    got = features.compute(image, BOXES)
    crops = warp_crops(small.normalise(image), BOXES, 40, padding=3)
    with torch.inference_mode():
        expected = small(torch.from_numpy(crops).permute(0, 3, 1, 2), ("conv3", "fc7", "logits"))
    for tap, layer in (("conv3@10x10", "conv3"), ("fc7", "fc7"), ("logits", "logits")):
        np.testing.assert_allclose(got[tap], expected[layer].flatten(1), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_do_not_matter(image, small, batch_size):
    reference = WarpedFeatures(small, "fc7")(image, BOXES)
    got = WarpedFeatures(small, "fc7", batch_size=batch_size)(image, BOXES)
    np.testing.assert_allclose(got, reference, atol=1e-5)


def test_one_call_holds_the_taps_side_by_side(image, mobile):
    text = "block7@1x2,block17@1x1*1.8,penultimate"
    features = SharedFeatures(mobile, text, longer_sides=(128,))
    parts = features.compute(image, BOXES)
    assert list(parts) == text.split(",")
    assert [part.shape[1] for part in parts.values()] == [128, 320, 1280]
    whole = features(image, BOXES)
    assert whole.shape == (4, features.n_features)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole, np.concatenate(list(parts.values()), axis=1))
    alone = SharedFeatures(mobile, "penultimate", longer_sides=(128,))(image, BOXES)
    np.testing.assert_array_equal(alone, parts["penultimate"])


@pytest.mark.parametrize("path", [WarpedFeatures, SharedFeatures])
def test_no_regions(image, small, path):
    assert path(small, "fc7")(image, np.zeros((0, 4), np.float32)).shape == (0, 256)


@pytest.mark.parametrize("path", ["shared", "warped"])
def test_the_regions_of_an_image_may_be_read_in_parts(image, small, mobile, path):
    features = WarpedFeatures(small, "fc7")
    if path == "shared":
        features = SharedFeatures(mobile, "block13@2x2,block17@1x1*image", longer_sides=(100, 200))
    boxes = np.array([[5, 5, 40, 50], [20, 10, 90, 60], [0, 0, 100, 70]], np.float32)
    read = features.of_image(image)
    parts = np.concatenate([read(boxes[:1]), read(boxes[1:])])
    np.testing.assert_allclose(parts, features(image, boxes), rtol=1e-4, atol=1e-5)


def test_features_that_are_read_together_run_the_network_once(image, mobile, monkeypatch):
    first = SharedFeatures(mobile, "block13@2x2", longer_sides=(100,))
    second = SharedFeatures(mobile, "block17@1x1*1.6,block13@3x3", longer_sides=(100,))
    runs = []
    plain = type(first.backbone).run_maps
    monkeypatch.setattr(
        type(first.backbone), "run_maps", lambda self, *args: (runs.append(1), plain(self, *args))[1]
    )
    own, other = first.of_image_with(image, second)
    rows = own(BOXES), other(BOXES)
    assert len(runs) == 1
    np.testing.assert_array_equal(rows[0], first(image, BOXES))
    np.testing.assert_array_equal(rows[1], second(image, BOXES))
    larger = SharedFeatures(mobile, "block13@2x2", longer_sides=(120,))
    with pytest.raises(ConfigError, match="must be of one network"):
        first.of_image_with(image, larger)


def test_shared_equals_warped_where_a_region_is_the_image(small):
    """With nothing around the region, both paths show the network the same pixels."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    box = np.array([[0, 0, 40, 40]], np.float32)
    warped = WarpedFeatures(small, "conv2@10x10,pool3,fc7,logits", padding=0).compute(image, box)
    shared = SharedFeatures(small, "conv2@10x10,pool3,fc7,logits", longer_sides=(40,)).compute(image, box)
    for tap in ("pool3@5x5", "fc7", "logits"):
        np.testing.assert_allclose(shared[tap], warped[tap], atol=1e-4)
    # A 2 x 2 block of samples per cell is exactly the mean of the 2 x 2 cells below.
    np.testing.assert_allclose(shared["conv2@10x10"], warped["conv2@10x10"], atol=1e-4)


def test_shared_alexnet_sees_the_same_fc7():
    backbone = load_backbone("alexnet", "random", seed=0)
    image = np.random.default_rng(0).integers(0, 256, (227, 227, 3), dtype=np.uint8)
    box = np.array([[0, 0, 227, 227]], np.float32)
    warped = WarpedFeatures(backbone, "fc7", padding=0)(image, box)
    shared = SharedFeatures(backbone, "fc7", longer_sides=(227,))(image, box)
    np.testing.assert_allclose(shared, warped, atol=1e-4 * float(warped.max()))


@pytest.mark.parametrize("layer", ["stem", "block3", "block7", "block13"])
def test_a_cell_stands_for_the_centre_of_what_it_sees(mobile, layer):
    """Move one bright pixel: the cell that answers most is where the geometry says."""
    info = mobile.layers_on((129, 129))[layer]
    fused = mobile.for_inference()
    image = np.zeros((129, 129, 3), np.uint8)
    blank = fused.run_maps(torch.from_numpy(fused.normalise(image)[None]).permute(0, 3, 1, 2), {layer})[layer]
    cell = 3 if info.stride > 8 else 6
    at = int(info.origin[0] + cell * info.stride)
    image[at, at] = 255
    lit = fused.run_maps(torch.from_numpy(fused.normalise(image)[None]).permute(0, 3, 1, 2), {layer})[layer]
    change = (lit - blank).norm(dim=1)[0].numpy()
    centre = (change.sum(axis=0) * np.arange(change.shape[1])).sum() / change.sum()
    assert centre == pytest.approx(cell, abs=0.35)


def test_a_region_reads_what_lies_there(mobile):
    image = np.full((96, 192, 3), 20, np.uint8)
    image[:, 96:] = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    boxes = np.array([[24, 24, 56, 72], [32, 24, 64, 72], [124, 24, 156, 72]], np.float32)
    rows = SharedFeatures(mobile, "stem@1x1", longer_sides=(192,))(image, boxes)
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)  # both see plain grey
    assert np.abs(rows[0] - rows[2]).max() > 0.1


def test_each_region_is_read_at_its_best_scale(image, mobile):
    tap = "block7@2x2"
    large, little = (SharedFeatures(mobile, tap, longer_sides=(s,))(image, BOXES) for s in (320, 128))
    assert not np.allclose(large, little, atol=1e-2)
    # Sides of 75, 139, 49 and 38 pixels: twice as large all but the second are nearer to 224 pixels.
    both = SharedFeatures(mobile, tap, longer_sides=(240, 480))(image, BOXES)
    coarse, fine = (SharedFeatures(mobile, tap, longer_sides=(s,))(image, BOXES) for s in (240, 480))
    np.testing.assert_array_equal(both[[0, 2, 3]], fine[[0, 2, 3]])
    np.testing.assert_array_equal(both[1], coarse[1])


def test_crops_on_a_device_are_those_of_the_cpu(image, small):
    normal = small.normalise(image)
    windows = warp_geometry(BOXES, (120, 160), 40, padding=3).expanded
    got = crops_on_device(
        torch.from_numpy(normal).permute(2, 0, 1)[None], torch.from_numpy(windows).float(), 40
    )
    expected = warp_crops(normal, BOXES, 40, padding=3)
    inside = np.abs(got.permute(0, 2, 3, 1).numpy() - expected)[:, 5:-5, 5:-5]
    assert np.median(inside) < 1e-5
    assert inside.max() < 0.6  # rounded fill widths shift what lies beside them by part of a pixel


def test_keys_tell_settings_apart(small, mobile):
    features = [
        WarpedFeatures(small, "fc7"),
        WarpedFeatures(small, "fc6"),
        WarpedFeatures(small, "fc7", padding=0),
        WarpedFeatures(small, "fc7", mode="square"),
        WarpedFeatures(small, "fc7", crop_size=48),
        WarpedFeatures(load_backbone("small_cnn", "random", seed=2), "fc7"),
        SharedFeatures(small, "fc7"),
        SharedFeatures(small, "fc7", longer_sides=(320,)),
        SharedFeatures(mobile, "block7"),
        SharedFeatures(mobile, "block7*2"),
    ]
    keys = [json.dumps(f.key, sort_keys=True) for f in features]
    assert len(set(keys)) == len(keys)
    assert WarpedFeatures(small, "fc7", batch_size=1).key == features[0].key


def test_errors(image, small):
    with pytest.raises(ConfigError, match=r"conv3@3x3\*2 widens regions, which warping does by its padding"):
        WarpedFeatures(small, "conv3*2")
    with pytest.raises(ConfigError, match=r"longer_sides must be .* at least 32 pixels, got \(16,\)"):
        SharedFeatures(small, "fc7", longer_sides=(16,))
    with pytest.raises(ShapeError, match=r"boxes must have shape \(N, 4\), got \(2, 3\)"):
        WarpedFeatures(small, "fc7")(image, np.zeros((2, 3)))
    with pytest.raises(ShapeError, match="an image must be uint8"):
        SharedFeatures(small, "fc7")(image.astype(np.float32), BOXES)
    with pytest.raises(ConfigError, match="needs at least one tap"):
        WarpedFeatures(small, ())


@pytest.mark.parametrize("layer", ["block3@2x2", "penultimate"])
def test_the_image_tap_sees_the_whole_image_whatever_the_region(layer):
    from rcnn_svm.networks.backbone import load_backbone

    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, 70, 50], [3, 4, 30, 40], [20, 20, 33, 44]], np.float32)
    backbone = load_backbone("mobilenet_v2", "random")
    plain = SharedFeatures(backbone, layer, longer_sides=(70,))(image, boxes[:1])
    whole = SharedFeatures(backbone, f"{layer}*image", longer_sides=(70,))(image, boxes)
    np.testing.assert_allclose(whole, np.repeat(plain, 3, axis=0), rtol=1e-4, atol=1e-6)
