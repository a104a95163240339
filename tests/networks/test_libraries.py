"""Networks of timm and torchvision: layers against the libraries' own, where cells lie, weights."""

from __future__ import annotations

import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.networks import measured_centres, prove
from rcnn_svm.cli import main
from rcnn_svm.errors import ConfigError, WeightsError
from rcnn_svm.features.featurizers import SharedFeatures, WarpedFeatures
from rcnn_svm.files import file_digest
from rcnn_svm.networks.architectures import ARCHITECTURES, Architecture, centres, main_path
from rcnn_svm.networks.backbone import Backbone, load_backbone, random_backbone, with_new_outputs
from rcnn_svm.networks.fusing import absorb_batch_norm
from rcnn_svm.networks.geometry import LayerInfo, geometry_of, locate
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.networks.weights import find_weights, licence_of

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
BOXES = np.array([[5, 5, 80, 70], [40, 20, 119, 89]], np.float32)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return load_backbone("timm:test_efficientnet", "random")


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return load_backbone("timm:test_vit", "random")


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_layers_are_those_of_timm_and_folding_keeps_them(name):
    backbone = load_backbone(f"timm:{name}", "random")
    x = torch.randn(1, 3, 160, 128, generator=torch.Generator().manual_seed(0))
    net = backbone.net.eval()
    strides = [info["reduction"] for info in net.feature_info]
    theirs = dict(zip(strides, net.forward_intermediates(x, intermediates_only=True), strict=True))
    fused = backbone.for_inference()
    assert fused.digest == backbone.digest
    layers = (backbone.aliases["s8"], backbone.aliases["s16"], "penultimate", "logits")
    with torch.inference_mode():
        ours, quick = backbone(x, layers), fused(x, layers)
        expected = net(x)
        pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(ours["logits"], expected)
    torch.testing.assert_close(ours["penultimate"].flatten(1), pooled)
    for layer, stride in zip(layers, (8, 16), strict=False):
        torch.testing.assert_close(ours[layer], theirs[stride])
    for layer in layers:
        scale = float(ours[layer].abs().max())
        torch.testing.assert_close(quick[layer], ours[layer], rtol=0, atol=1e-4 * scale)


def test_a_layer_has_the_names_of_all_modules_that_end_with_it(small):
    layer = small.aliases["s16"]
    paths = small.architecture.traced.plan.paths[layer]
    assert len(paths) > 2
    assert {small.resolve(TapSpec(name)).layer for name in ("s16", *paths)} == {layer}
    assert small.resolve(TapSpec.parse(f"{paths[0]}@2x2")).grid == (2, 2)
    assert small.default_taps == "s16@3x3,s32@1x1,s32@1x1*1.8,s32@1x1*image"
    assert list(small.maps).index(small.trunk_from) == list(small.maps).index(layer) + 1
    with pytest.raises(
        ConfigError, match=r"has no layer 'layer9'\. Its layers are s2, s4, s8, s16, s32, conv_stem"
    ):
        small.resolve(TapSpec("layer9"))


def test_todays_recipe_carries_over():
    """The taps by stride are those that the network's own description names by hand."""
    ours, theirs = (
        load_backbone("mobilenet_v2", "random"),
        load_backbone("torchvision:mobilenet_v2", "random"),
    )
    assert list(theirs.net.state_dict()) == list(ours.net.state_dict())
    theirs.net.load_state_dict(ours.net.state_dict())
    rows = SharedFeatures(ours, ours.default_taps, longer_sides=(96,))(IMAGE, BOXES)
    others = SharedFeatures(theirs, theirs.default_taps, longer_sides=(96,))(IMAGE, BOXES)
    np.testing.assert_allclose(others, rows, atol=1e-5 * float(np.abs(rows).max()))


@pytest.mark.parametrize("size", [(130, 191)])
@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n in ("alexnet", "mobilenet_v2", "efficientnet_lite0")]
)
def test_coordinates_agree_with_the_arithmetic_of_chains(name, size):
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        maps, regions = architecture.split(architecture.build(2).eval())
    path = main_path(maps, regions)
    rows, columns = centres(path, size[0]), centres(path, size[1])
    info = LayerInfo(3, True, 1, (0.5, 0.5))
    for layer, found in locate(maps, size).items():
        info = geometry_of(found, info)
        if layer in rows:
            assert (info.stride, info.origin) == (rows[layer][0], (columns[layer][1], rows[layer][1]))
        assert not info.problem


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_efficientnet",
        "timm:test_vit",
        "timm:test_convnext",
        "torchvision:squeezenet1_1",
        "timm:lcnet_035",
    ],
)
def test_cells_lie_where_gradients_say(name):
    row = prove(name)
    assert len(row["proved"]) >= 1
    assert len(row["proved"]) == len(row["cells_off"]), row


def test_padding_of_tensorflow_depends_on_the_size():
    backbone = load_backbone("timm:tf_mobilenetv3_small_minimal_100", "random")
    layer = backbone.aliases["s16"]
    for size in ((160, 193), (175, 178)):
        measured, stated = measured_centres(backbone, [layer], size)[layer]
        np.testing.assert_allclose(measured / 16, stated / 16, atol=0.05)
    assert backbone.layers_on((160, 193))[layer].origin != backbone.layers_on((175, 178))[layer].origin


def _two_paths(n_outputs: int) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3, 2, 1), nn.AvgPool2d(2)
            self.widen = nn.Conv2d(3, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.widen(self.pool(x))

    return nn.Sequential(
        OrderedDict(
            block=Block(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(8, n_outputs)
        )
    )


def test_paths_that_are_centred_apart_are_refused_on_shared_maps_alone():
    mine = Architecture.of_graph("mine", _two_paths, crop_size=64)
    backbone = random_backbone(mine, 4).eval()
    with pytest.raises(ConfigError) as caught:
        SharedFeatures(backbone, "block@2x2")
    assert str(caught.value) == (
        "mine: block cannot be read on shared maps: the paths to a cell are centred 0.25 cells apart. "
        "Read another layer, or set features.path=warped (--path warped)."
    )
    assert WarpedFeatures(backbone, "block@2x2,penultimate,logits")(IMAGE, BOXES).shape == (2, 44)


def test_what_cannot_be_followed_is_refused_and_a_part_of_it_stays_one_step():
    class Depends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else x + 1

    parts = {
        "conv": nn.Conv2d(3, 8, 3, 2, 1),
        "part": Depends(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
    }
    with pytest.raises(
        ConfigError, match=r"its layers cannot be told apart, since torch\.fx cannot follow it"
    ):
        random_backbone(Architecture.of_graph("it", lambda n: Depends(), with_logits=False, crop_size=32))
    with pytest.raises(ConfigError, match="name must not be one of ours, got 'vgg16'"):
        Architecture.of_graph("vgg16", _two_paths)
    with pytest.raises(ConfigError, match=r"name must have no colon, .* got 'timm:mine'"):
        Architecture.of_graph("timm:mine", _two_paths)
    del parts["part"]
    whole = Architecture.of_graph(
        "w", lambda n: nn.Sequential(OrderedDict(parts)), with_logits=False, crop_size=32
    )
    assert list(random_backbone(whole).layers) == ["conv", "pool", "penultimate"]


def test_normalisations_are_absorbed_where_the_graph_has_them(small):
    backbone = random_backbone(small.architecture, 4, seed=1).eval()
    norms = [module for module in backbone.net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.constant_(norm.weight, 2.0)
    x, layer = torch.randn(1, 3, 96, 96), backbone.entry
    with torch.no_grad():
        before = backbone.run_maps(x, (layer,))[layer]
        absorb_batch_norm(nn.ModuleList(backbone.maps.values()))
        after = backbone.run_maps(x, (layer,))[layer]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert all((norm.weight == 1).all() for norm in norms)


def test_tokens_of_a_transformer_are_a_map_at_any_size(vit):
    layer = vit.aliases["s16"]
    assert (vit.layers[layer].stride, vit.layers[layer].origin, vit.layers[layer].n_prefix) == (
        16,
        (8.0, 8.0),
        1,
    )
    x = torch.randn(1, 3, 80, 144)
    with torch.inference_mode():
        got = vit.run_maps(x, (layer,))[layer]
        tokens = vit.net.forward_features(x)
    torch.testing.assert_close(got[0], tokens[0, 1:].T.reshape(-1, 5, 9))
    crops = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        outputs = vit(crops, ("penultimate", "logits"))
        pooled = vit.net.forward_head(vit.net.forward_features(crops), pre_logits=True)
    torch.testing.assert_close(outputs["penultimate"], pooled)
    assert SharedFeatures(vit, vit.default_taps, longer_sides=(96,))(IMAGE, BOXES).shape == (2, 11 * 64)
    with pytest.raises(
        ConfigError, match="penultimate cannot be read on shared maps: it reads tokens of the whole"
    ):
        SharedFeatures(vit, "penultimate")


@pytest.mark.parametrize("shape", ["plain", "state_dict", "module."])
def test_files_in_the_shapes_that_people_have(tmp_path, small, shape):
    state = with_new_outputs(small, ("a", "b", "c")).net.state_dict()
    if shape == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": state, "epoch": 3} if shape == "state_dict" else state, tmp_path / "net.pth")
    loaded = load_backbone("timm:test_efficientnet", tmp_path / "net.pth")
    assert loaded.n_outputs == 3
    assert loaded.layers["logits"].channels == 3
    torch.testing.assert_close(loaded.net.conv_stem.weight, small.net.conv_stem.weight)


def test_a_file_without_the_last_layer_is_read_up_to_it(tmp_path, small, capsys):
    state = {
        name: value for name, value in small.net.state_dict().items() if not name.startswith("classifier.")
    }
    save_file(state, tmp_path / "net.safetensors")
    loaded = load_backbone("timm:test_efficientnet", tmp_path / "net.safetensors")
    assert "has no last layer; timm:test_efficientnet is read up to `penultimate`" in capsys.readouterr().err
    assert list(loaded.layers)[-1] == "penultimate"
    whole = with_new_outputs(loaded, ("a", "b"))
    assert whole.n_outputs == 2
    rows = [WarpedFeatures(one, "penultimate")(IMAGE, BOXES) for one in (loaded, whole, small)]
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-5)
    np.testing.assert_allclose(rows[1], rows[2], atol=1e-5)
    del state["conv_stem.weight"]
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 of \d+ tensors, first 'conv_stem.weight'"):
        load_backbone("timm:test_efficientnet", tmp_path / "net.safetensors")


def test_weights_in_the_hubs_cache_are_found_and_their_hash_is_checked(tmp_path, monkeypatch, small):
    small.save(tmp_path / "w.safetensors")
    sha = file_digest(tmp_path / "w.safetensors")
    repo = tmp_path / "hub" / "models--timm--test_efficientnet.r160_in1k"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1" * 40)
    (repo / "snapshots" / ("1" * 40)).mkdir(parents=True)
    shutil.copy(tmp_path / "w.safetensors", repo / "blobs" / sha)
    (repo / "snapshots" / ("1" * 40) / "model.safetensors").symlink_to(repo / "blobs" / sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_backbone("timm:test_efficientnet").digest == small.digest
    (repo / "blobs" / sha).write_bytes(b"other")
    with pytest.raises(WeightsError, match="its SHA-256 must be"):
        load_backbone("timm:test_efficientnet")


def test_names_and_licences(capsys):
    assert licence_of("timm:test_efficientnet", "default") == "apache-2.0"
    assert licence_of("timm:test_efficientnet", "net.pth").startswith(
        "not known: they were read from the file net.pth"
    )
    for name, words in (
        ("timm:resnet19", r"timm has no network 'resnet19'\. Did you mean resnet1"),
        ("torchvision:resnet19", r"torchvision has no network 'resnet19'\. Did you mean resnet18"),
        ("timm:resnet18.nothing", r"timm:resnet18 must have one of the tags a1_in1k, .* got 'nothing'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_backbone(name, "random")
    with pytest.raises(
        ConfigError, match=r"Other weights of timm are tags of the network, as in timm:NAME\.TAG"
    ):
        find_weights("timm:test_efficientnet", "IMAGENET1K_V1")


def test_weights_that_may_not_be_sold_are_named(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)

    def refuse(*args: object, **kwargs: object) -> str:
        raise OSError("Cannot access gated repo")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(
        WeightsError, match=r"could not be fetched from huggingface.co/timm/.*Cannot access gated repo"
    ):
        find_weights("timm:resnet50.fb_swsl_ig1b_ft_in1k", "default")
    assert "under the licence cc-by-nc-4.0: not for commercial use" in capsys.readouterr().err


def test_the_command_line_takes_them(tmp_path, capsys):
    from PIL import Image

    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    assert main(["layers", "timm:test_efficientnet"]) == 0
    assert "penultimate" in capsys.readouterr().out
    words = ["extract", str(tmp_path / "image.png"), "--out", str(tmp_path / "rows.npy")]
    words += [
        "--backbone",
        "timm:test_efficientnet",
        "--weights",
        "random",
        "--taps",
        "s16@2x2",
        "--path",
        "shared",
    ]
    assert main(words) == 0
    channels = load_backbone("timm:test_efficientnet", "random").n_features(TapSpec.parse("s16@1x1"))
    assert np.load(tmp_path / "rows.npy").shape == (1, 4 * channels)


class _Context(nn.Module):
    """A sum in which the convolution is the smaller term, as in networks with global context."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.gate = nn.Conv2d(8, 8, 1)
        self.narrow = nn.Conv2d(8, 8, 3, 4, 1)
        self.logits = nn.Conv2d(8, n_outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = functional.relu(x + self.gate(x.mean((2, 3), keepdim=True)))
        x = x * torch.sigmoid(x.max(1, keepdim=True)[0])
        return self.logits(self.narrow(x).mean((2, 3), keepdim=True)).flatten(1)


def test_sums_of_unlike_sizes_maxima_and_logits_of_a_convolution():
    backbone = random_backbone(Architecture.of_graph("mine", _Context, crop_size=64), 5, seed=3).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        plain = backbone(x, ("logits",))["logits"]
        quick = backbone.for_inference()(x, ("logits",))["logits"]
    torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-5)
    with_classes = with_new_outputs(backbone, ("a", "b"), seed=1)
    assert with_classes.n_outputs == 2
    assert (with_classes.net.logits.bias == 0).all()
    torch.testing.assert_close(with_classes.net.gate.weight, backbone.net.gate.weight)
    with pytest.raises(ConfigError, match="must have a fully connected layer before the softmax"):
        backbone.softmax_layer()


def test_boxes_are_refined_on_the_maps_that_are_read(small):
    assert small.fine_taps == "s16@7x7*1.6,s32@1x1*1.8"
    features = SharedFeatures(small, small.fine_taps, longer_sides=(96,))
    channels = small.layers[small.aliases["s16"]].channels
    assert features.n_features == 49 * channels + small.layers[small.aliases["s32"]].channels


def test_a_file_of_torchvision_without_the_last_layer_is_read_up_to_it(tmp_path, capsys):
    net = torchvision.models.get_model("mnasnet0_5", weights=None)
    state = {name: value for name, value in net.state_dict().items() if not name.startswith("classifier.")}
    torch.save(state, tmp_path / "cut.pth")
    backbone = load_backbone("torchvision:mnasnet0_5", tmp_path / "cut.pth")
    assert "is read up to `penultimate`" in capsys.readouterr().err
    assert list(backbone.layers)[-1] == "penultimate"
    assert backbone.layers["penultimate"].channels == 1280
