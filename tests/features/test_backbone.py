from __future__ import annotations

import numpy as np
import pytest
import torch

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features import backbone as module
from rcnn_svm.features import fusing
from rcnn_svm.features.backbone import (
    BACKBONES,
    Backbone,
    load_backbone,
    random_backbone,
    with_new_outputs,
)
from rcnn_svm.features.taps import TapSpec


def quick_backbone(name: str) -> Backbone:
    """A network whose outputs neither vanish nor explode, without the seconds that its own start takes."""
    with torch.device("meta"):
        net = random_backbone(name, 10).net
    net = net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
            elif "running_mean" in key or key.endswith("bias"):
                value.copy_(torch.linspace(-0.1, 0.1, value.numel()))
            elif value.ndim == 1:
                value.copy_(torch.linspace(0.7, 1.3, value.numel()))
    return Backbone(name, net).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_every_layer_of_every_backbone(name):
    backbone = quick_backbone(name)
    side = backbone.crop_size // 2  # the last pooling adapts; a quarter of the work
    crops = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = backbone(crops, tuple(backbone.layers))
        fused = backbone.for_inference()(crops, tuple(backbone.layers))
        whole = backbone.net(crops)
    assert list(outputs) == list(backbone.layers)
    for layer, value in outputs.items():
        info = backbone.layers[layer]
        assert value.shape[1] == info.channels
        assert (value.ndim == 4) == info.is_map
        # Folding and fusing change rounding only.
        scale = float(value.abs().max())
        assert scale > 0
        np.testing.assert_allclose(fused[layer] / scale, value / scale, atol=1e-4, err_msg=layer)
    torch.testing.assert_close(outputs["logits"], whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("name", BACKBONES)
def test_regions_are_pooled_onto_as_many_cells_as_a_crop_has(name):
    with torch.device("meta"):
        backbone = random_backbone(name).eval()
        crops = torch.zeros(1, 3, backbone.crop_size, backbone.crop_size)
    entry = backbone(crops, (backbone.entry,))[backbone.entry]
    assert entry.shape[2:] == (backbone.entry_grid, backbone.entry_grid)


@pytest.mark.parametrize(("name", "n"), [("alexnet", 9216), ("vgg16", 25088), ("mobilenet_v2", 1280)])
def test_sizes_known_from_the_papers(name, n):
    with torch.device("meta"):
        backbone = random_backbone(name)
    layer = "penultimate" if name == "mobilenet_v2" else "pool5"
    assert backbone.n_features(TapSpec(layer)) == n
    assert backbone.n_outputs == 1000


def test_fc7_is_the_relu_of_the_second_matrix():
    backbone = quick_backbone("alexnet")
    crops = torch.randn(1, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    classifier = backbone.net.classifier
    with torch.inference_mode():
        got = backbone(crops, ("pool5", "fc6", "fc7"))
        pool5 = backbone.net.avgpool(backbone.net.features(crops)).flatten(1)
        fc6 = (pool5 @ classifier[1].weight.T + classifier[1].bias).clamp(min=0)
        fc7 = (fc6 @ classifier[4].weight.T + classifier[4].bias).clamp(min=0)
    torch.testing.assert_close(got["pool5"].flatten(1), pool5)
    torch.testing.assert_close(got["fc6"], fc6, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["fc7"], fc7, rtol=1e-4, atol=1e-4)


def test_only_what_is_needed_runs():
    backbone = quick_backbone("small_cnn")
    backbone.regions["fc6"].register_forward_hook(lambda *_: pytest.fail("fc6 is not needed"))
    assert list(backbone(torch.zeros(1, 3, 40, 40), ("conv2",))) == ["conv2"]
    assert list(backbone(torch.zeros(1, 3, 40, 40), ("conv3", "pool3"))) == ["conv3", "pool3"]


def test_normalisation_is_torchvisions(rng):
    from torchvision.models import MobileNet_V2_Weights

    image = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
    got = load_backbone("mobilenet_v2", "random").normalise(image)
    transform = MobileNet_V2_Weights.IMAGENET1K_V1.transforms(resize_size=224)
    expected = transform(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ShapeError) as caught:
        load_backbone("small_cnn", "random").normalise(image[:, :, 0])
    assert str(caught.value) == "small_cnn: an image must be uint8 (H, W, 3) RGB, got uint8 (224, 224)."


def test_seeds_and_digests():
    first, again, other = (random_backbone("small_cnn", 4, seed=s) for s in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert first.for_inference().digest == first.digest
    assert random_backbone("small_cnn_average", 4, seed=1).digest != first.digest
    state = torch.random.get_rng_state()
    random_backbone("small_cnn", 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_new_outputs():
    backbone = load_backbone("mobilenet_v2", "random", seed=1)
    tuned = with_new_outputs(backbone, ("cat", "dog", "background"), seed=2)
    assert tuned.n_outputs == 3
    assert backbone.n_outputs == 1000
    assert tuned.classes == ("cat", "dog", "background")
    weight = tuned.regions["logits"][-1].weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert load_backbone("small_cnn", "random", n_outputs=7).n_outputs == 7
    with pytest.raises(ConfigError, match="needs at least 1 output"):
        with_new_outputs(backbone, ())


def test_save_and_load_keep_classes(tmp_path):
    tuned = with_new_outputs(random_backbone("small_cnn", 4), ("a", "b", "background"))
    tuned.save(tmp_path / "net.safetensors")
    loaded = load_backbone("small_cnn", tmp_path / "net.safetensors")
    assert loaded.classes == tuned.classes
    assert loaded.digest == tuned.digest


def test_small_cnn_takes_32_to_48_pixels():
    net = random_backbone("small_cnn", 4).eval().net
    for side in (32, 40, 48):
        assert net(torch.zeros(1, 3, side, side)).shape == (1, 4)


def test_small_cnn_computes_prelu_of_maps_and_then_their_maximum():
    backbone = random_backbone("small_cnn", 4).eval()
    with torch.inference_mode():
        got = backbone(torch.randn(2, 3, 40, 40), ("conv2", "pool2"))
        expected = torch.max_pool2d(backbone.maps["pool2"][1](got["conv2"]), 2)
    assert torch.equal(got["pool2"], expected)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (2, 3), (1, 4)])
def test_pooling_by_pairs_is_max_pooling(size):
    pool = torch.nn.MaxPool2d(2)
    x = torch.randn(2, 5, *size).contiguous(memory_format=torch.channels_last)
    fused = fusing.fuse_for_inference(torch.nn.Sequential(pool))
    assert type(fused[0]) is not torch.nn.MaxPool2d
    if size[0] == 1:
        with pytest.raises(RuntimeError):
            pool(x)
        return
    assert torch.equal(fused(x), pool(x))
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    other = torch.nn.MaxPool2d(3, 2)
    assert type(fusing.fuse_for_inference(torch.nn.Sequential(other))[0]) is torch.nn.MaxPool2d


def test_average_pooling_differs():
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first, second = (random_backbone(n, 4, seed=1).eval() for n in ("small_cnn", "small_cnn_average"))
    assert not torch.allclose(first(x)["logits"], second(x)["logits"])
    with pytest.raises(ConfigError, match="pooling must be 'max' or 'average', got 'mean'"):
        module.SmallCNN(4, "mean")


def test_geometry_of_cells():
    """Strides are known; origins tell where the first cell's receptive field is centred."""
    with torch.device("meta"):
        layers = {name: random_backbone(name).layers for name in ("alexnet", "vgg16", "resnet18")}
    assert (layers["alexnet"]["conv5"].stride, layers["alexnet"]["conv5"].origin) == (16, 15.5)
    assert (layers["vgg16"]["conv5_3"].stride, layers["vgg16"]["conv5_3"].origin) == (16, 8.0)
    assert (layers["resnet18"]["layer4"].stride, layers["resnet18"]["layer4"].origin) == (32, 0.5)


def test_errors():
    with pytest.raises(ConfigError) as caught:
        load_backbone("alexnet2")
    assert str(caught.value) == (f"Backbone: name must be one of {', '.join(BACKBONES)}, got 'alexnet2'.")
    backbone = random_backbone("small_cnn", 4)
    with pytest.raises(ConfigError) as caught:
        backbone.resolve(TapSpec("fc8"))
    assert str(caught.value) == (
        "small_cnn: has no layer 'fc8'. Its layers are "
        "conv1, pool1, conv2, pool2, conv3, pool3, fc6, fc7, logits."
    )
    with pytest.raises(ConfigError, match="fc7 is a vector, it takes no grid, got fc7@2x2"):
        backbone.resolve(TapSpec("fc7", (2, 2)))


@pytest.mark.parametrize("size", [(96, 128), (97, 131), (34, 34)])
def test_strips_give_the_same_maps(monkeypatch, size):
    backbone = random_backbone("mobilenet_v2", seed=0).eval()
    images = torch.randn(1, *size, 3).permute(0, 3, 1, 2)
    names = tuple(backbone.maps)
    with torch.inference_mode():
        expected = backbone.run_maps(images, names)
        fused = backbone.for_inference()
        for bytes_of_a_strip in (1, 50_000):
            monkeypatch.setattr(fusing, "_LARGE_BYTES", 0)
            monkeypatch.setattr(fusing, "_STRIP_BYTES", bytes_of_a_strip)
            for name, got in fused.run_maps(images, names).items():
                torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-4)
                assert got.is_contiguous(memory_format=torch.channels_last)
