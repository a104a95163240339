from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features.featurizers import SharedFeatures, WarpedFeatures
from rcnn_svm.networks import fusing
from rcnn_svm.networks.architectures import ARCHITECTURES, Architecture
from rcnn_svm.networks.backbone import (
    BACKBONES,
    Backbone,
    load_backbone,
    random_backbone,
    with_new_outputs,
)
from rcnn_svm.networks.efficientnet_lite import LITE, EfficientNetLite, SameConv2d, same_padding
from rcnn_svm.networks.small_cnn import SmallCNN
from rcnn_svm.networks.taps import TapSpec


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
    return Backbone(ARCHITECTURES[name], net).eval()


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
        # Up to 31 random blocks, unlike trained ones, magnify it.
        atol = 1e-3 if name in LITE else 1e-4
        np.testing.assert_allclose(fused[layer] / scale, value / scale, atol=atol, err_msg=layer)
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


@pytest.mark.parametrize(
    "parts",
    [
        {"pooling": "strided"},
        {"activation": "relu"},
        {"activation": "none"},
        {"normalisation": "local"},
        {"normalisation": "batch"},
        {"width": 64},
        {"width": None},
    ],
    ids=str,
)
def test_every_part_of_small_cnn_can_be_exchanged(parts):
    net, x = SmallCNN(4, dropout=0, **parts), torch.randn(2, 3, 40, 40)
    assert net(x).shape == (2, 4)
    assert list(net.stages()) == list(SmallCNN(4).stages())
    fc7 = x
    for stage in list(net.children())[:-1]:
        fc7 = stage(fc7)
    assert fc7.shape == (2, parts.get("width", 256) or 96)
    for name, layer in {"batch": torch.nn.BatchNorm2d, "local": torch.nn.LocalResponseNorm}.items():
        n_layers = sum(isinstance(module, layer) for module in net.modules())
        assert n_layers == (3 if parts.get("normalisation") == name else 0)


def test_small_cnn_without_activation_and_maximum_is_linear():
    net = SmallCNN(4, "average", 0.0, activation="none")
    x, y = torch.randn(2, 1, 3, 40, 40)
    assert torch.allclose(net((x + y) / 2), (net(x) + net(y)) / 2, atol=1e-5)


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


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(16, 16, 5, 2, 2, groups=16),
        nn.Conv2d(12, 24, 3, padding=2, dilation=2, groups=4, bias=False),
        SameConv2d(8, 16, 3, 2),
    ],
    ids=["pointwise", "depthwise", "grouped", "same"],
)
def test_weights_in_blocks_change_no_bit(conv, monkeypatch):
    net = nn.Sequential(conv, nn.ReLU())
    packed = fusing.fuse_for_inference(net)
    first, *others = (
        torch.randn(n, conv.in_channels, *size).contiguous(memory_format=torch.channels_last)
        for n, size in ((1, (9, 7)), (1, (30, 41)), (3, (14, 14)))
    )
    with torch.inference_mode():
        packed(first)  # the blocks are made for this size
        copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
        monkeypatch.setattr(fusing, "_PACKS", False)
        plain = fusing.fuse_for_inference(net)
        for x in (first, *others):
            monkeypatch.setattr(fusing, "_PACKS", False)
            expected = plain(x)
            monkeypatch.setattr(fusing, "_PACKS", True)
            for each in (packed, *copies):
                assert torch.equal(each(x), expected)
        torch.testing.assert_close(expected, net(x))
        assert packed(first[:0]).shape == net(first[:0]).shape


def test_average_pooling_differs():
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first, second = (random_backbone(n, 4, seed=1).eval() for n in ("small_cnn", "small_cnn_average"))
    assert not torch.allclose(first(x)["logits"], second(x)["logits"])
    with pytest.raises(ConfigError, match="pooling must be 'max', 'average' or 'strided', got 'mean'"):
        SmallCNN(4, "mean")


def test_geometry_of_cells():
    """Strides are known; origins tell where the first cell's receptive field is centred."""
    with torch.device("meta"):
        layers = {name: random_backbone(name).layers for name in ("alexnet", "vgg16", "resnet18")}
    assert (layers["alexnet"]["conv5"].stride, layers["alexnet"]["conv5"].origin) == (16, (15.5, 15.5))
    assert (layers["vgg16"]["conv5_3"].stride, layers["vgg16"]["conv5_3"].origin) == (16, (8.0, 8.0))
    assert (layers["resnet18"]["layer4"].stride, layers["resnet18"]["layer4"].origin) == (32, (0.5, 0.5))


def test_errors():
    with pytest.raises(ConfigError) as caught:
        load_backbone("alexnet2")
    assert str(caught.value) == (
        f"Backbone: name must be one of {', '.join(BACKBONES)}, or timm:NAME or torchvision:NAME, "
        f"got 'alexnet2'."
    )
    backbone = random_backbone("small_cnn", 4)
    with pytest.raises(ConfigError) as caught:
        backbone.resolve(TapSpec("fc8"))
    assert str(caught.value) == (
        "small_cnn: has no layer 'fc8'. Its layers are "
        "conv1, pool1, conv2, pool2, conv3, pool3, fc6, fc7, logits."
    )
    with pytest.raises(ConfigError, match="fc7 is a vector, it takes no grid, got fc7@2x2"):
        backbone.resolve(TapSpec("fc7", (2, 2)))


@pytest.mark.parametrize("size", [(96, 128), (97, 131), (34, 34), (70, 99)])
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_strips_give_the_same_maps(monkeypatch, name, size):
    backbone = random_backbone(name, seed=0).eval()
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


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (13, 17), (5, 1)])
def test_same_padding_is_tensorflows(kernel, stride, size):
    """An output cell sees the input around it, zeros outside, the odd zero after the last cell."""
    conv = SameConv2d(1, 1, kernel, stride)
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    got = conv(x)[0, 0].detach().numpy()
    weight, image = conv.weight[0, 0].detach().numpy(), x[0, 0].numpy()
    shape = [-(-n // stride) for n in size]
    expected = np.zeros(shape, np.float32)
    before = [max((n - 1) * stride + kernel - old, 0) // 2 for n, old in zip(shape, size, strict=True)]
    for i, j, a, b in np.ndindex(*shape, kernel, kernel):
        y, x_ = i * stride - before[0] + a, j * stride - before[1] + b
        if 0 <= y < size[0] and 0 <= x_ < size[1]:
            expected[i, j] += weight[a, b] * image[y, x_]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert same_padding(size[0], kernel, stride)[0] == before[0]


def centre_of_influence(
    backbone: Backbone, layer: str, size: tuple[int, int]
) -> tuple[float, float, int, int]:
    """Return where, in half-open pixels, the gradient of an inner cell is centred, and which cell it was."""
    x = torch.zeros(1, 3, *size, requires_grad=True)
    value = backbone.run_maps(x, (layer,))[layer]
    row, column = value.shape[2] // 2, value.shape[3] // 2
    value[0, :, row, column].sum().backward()
    weight = x.grad.abs().sum(dim=(0, 1)).numpy()
    y, x_ = np.mgrid[: size[0], : size[1]] + 0.5
    return float((weight * x_).sum() / weight.sum()), float((weight * y).sum() / weight.sum()), row, column


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientnet_lite0", (704, 704)),
        ("efficientnet_lite0", (705, 832)),
        ("efficientnet_lite2", (877, 734)),
        ("mobilenet_v2", (705, 832)),
    ],
)
def test_a_cell_is_centred_where_its_influence_is(name, size):
    """All weights alike and no activation: a gradient then counts the paths from a pixel to a cell."""
    backbone = random_backbone(name, 2).eval()
    for path, part in list(backbone.net.named_modules()):
        parent, _, child = path.rpartition(".")
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.constant_(part.weight, 1 / part.weight[0].numel())
        elif isinstance(part, torch.nn.ReLU6 | torch.nn.ReLU | torch.nn.BatchNorm2d):
            setattr(backbone.net.get_submodule(parent), child, torch.nn.Identity())
        elif isinstance(part, torch.nn.MaxPool2d):  # a maximum has no one gradient at equals
            mean = torch.nn.AvgPool2d(part.kernel_size, part.stride)
            setattr(backbone.net.get_submodule(parent), child, mean)
    backbone = Backbone(ARCHITECTURES[name], backbone.net)
    layers = backbone.layers_on(size)
    wanted = [tap.split("@")[0] for tap in backbone.default_taps.split(",")][:2]
    for layer in wanted:
        info = layers[layer]
        x, y, row, column = centre_of_influence(backbone, layer, size)
        # The whole field of the cell has to lie inside the image for its centre to be the mean.
        got = np.array([x, y])
        expected = np.array(info.origin) + np.array([column, row]) * info.stride
        np.testing.assert_allclose((got - expected) / info.stride, 0, atol=0.05, err_msg=layer)


def test_the_lite_family_has_the_published_sizes():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in EfficientNetLite(name, 1000).parameters()) for name in LITE}
    millions = [round(n / 1e6, 1) for n in counts.values()]
    assert millions == [
        4.7,
        5.4,
        6.1,
        8.2,
        13.0,
    ]  # tensorflow/tpu, efficientnet/lite: 4.7M 5.4M 6.1M 8.2M 13.0M


def test_the_installed_weights_know_a_palace():
    from sklearn.datasets import load_sample_image

    logits = WarpedFeatures(load_backbone("efficientnet_lite2"), "logits", padding=0)
    values = logits(load_sample_image("china.jpg"), [[0, 0, 640, 427]])
    assert values[0].argsort()[::-1][:2].tolist() == [698, 483]  # palace, castle


@pytest.mark.parametrize("name", [n for n in BACKBONES if not n.startswith("small")])
def test_every_network_has_default_taps_and_a_place_to_train_from(name):
    with torch.device("meta"):
        backbone = random_backbone(name)
    for tap in backbone.default_taps.split(","):
        backbone.resolve(TapSpec.parse(tap))
    assert backbone.trunk_from in list(backbone.maps)[1:]


def test_lite_pools_what_lies_there():
    """A picture and the same picture moved by one cell give the same features of the region moved along."""
    backbone = random_backbone("efficientnet_lite0", seed=1).eval()
    with torch.no_grad():
        for part in backbone.net.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.fill_(2.0)
    features = SharedFeatures(backbone, "block3@2x2", longer_sides=(256,))
    patch = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image, moved = (np.full((192, 256, 3), 127, np.uint8) for _ in range(2))
    image[64:128, 64:128], moved[64:128, 96:160] = patch, patch
    first = features(image, np.array([[64, 64, 128, 128]], np.float32))
    second = features(moved, np.array([[96, 64, 160, 128]], np.float32))
    np.testing.assert_allclose(second, first, atol=1e-3 * float(np.abs(first).max()))


def _own(maps=("conv1", "conv2"), **settings):
    def build():
        layers = OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()),
            conv2=nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()),
            dilated=nn.Conv2d(16, 16, 3, dilation=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(16, 10),
        )
        return nn.Sequential(layers)

    return Architecture.of("own", build, maps, crop_size=64, **settings)


def test_a_network_of_ones_own_is_read_tuned_and_saved(tmp_path):
    own = _own(logits="fc")
    backbone = random_backbone(own, 4).eval()
    assert (backbone.n_outputs, backbone.entry_grid, own.trunk_from) == (4, 16, "conv2")
    x = torch.randn(2, 3, 64, 64)
    expected = backbone.net.fc(backbone.net.conv2(backbone.net.conv1(x)).mean(dim=(2, 3)))
    torch.testing.assert_close(backbone(x)["logits"], expected)
    backbone.save(tmp_path / "own.safetensors")
    again = load_backbone(own, tmp_path / "own.safetensors")
    assert again.digest == backbone.digest
    with pytest.raises(ConfigError, match=r"^own: has no published weights\."):
        load_backbone(own)


@pytest.mark.parametrize(
    ("maps", "settings", "words"),
    [
        (("conv1", "conv9"), {}, r"must exist and run one after the other over a 64 x 64 image"),
        (("conv2", "conv1"), {}, r"must exist and run one after the other over a 64 x 64 image, got "),
        (("conv1", "conv2", "dilated"), {}, r"must be a chain of convolutions and poolings, whose last map"),
        ((), {}, r"needs at least one map layer, got none"),
    ],
)
def test_layers_that_are_no_chain_are_refused(maps, settings, words):
    with pytest.raises(ConfigError, match=words):
        _own(maps, **settings)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(ConfigError, match=r"name must not be one of ours, got 'vgg16'"):
        Architecture.of("vgg16", nn.Identity, ("a",))
