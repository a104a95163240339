"""Networks that were trained to detect: regions and features against torchvision's, and detectors of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.detection.transform import resize_boxes

from rcnn_svm import load_detector
from rcnn_svm.cli import main
from rcnn_svm.cli.words import opening
from rcnn_svm.contracts import check_featurizer, check_proposer, example_image
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.errors import ConfigError, DataError, WeightsError
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.parts import Run
from rcnn_svm.experiment.recipe import propose, train_detector
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.featurizers import DetectionFeatures
from rcnn_svm.features.store import readers_of
from rcnn_svm.networks.backbone import load_backbone
from rcnn_svm.networks.detection import load_network
from rcnn_svm.networks.weights import licence_of
from rcnn_svm.proposals import RpnConfig, RpnProposals, proposals_of
from rcnn_svm.report.card import about
from rcnn_svm.runtime.export import export_detector
from rcnn_svm.structures import GroundTruth, Sample
from rcnn_svm.training.config import RefineConfig

SMALL = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
RESNET = "torchvision:fasterrcnn_resnet50_fpn"
BOXES = np.array(
    [[0, 0, 128, 96], [10, 12, 60, 50], [70, 5, 120, 90], [3, 3, 9, 8], [30, 1, 31, 96]], np.float32
)


def made(name: str, seed: int = 0):
    """Return torchvision's own model, whose normalisations do something and whose RPN tells regions apart."""
    torch.manual_seed(seed)
    small = {"min_size": 96, "max_size": 160} if "resnet" in name else {}
    model = torchvision.models.get_model(
        name.partition(":")[2], weights=None, weights_backbone=None, **small
    ).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)
    nn.init.normal_(model.rpn.head.cls_logits.weight, std=0.02)
    nn.init.normal_(model.rpn.head.bbox_pred.weight, std=0.02)
    return model


@pytest.fixture(scope="module")
def theirs():
    return made(SMALL)


@pytest.fixture(scope="module")
def file(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save({"model": theirs.state_dict(), "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def network(file):
    return load_network(SMALL, file)


def read(model, image, boxes, widen=1.0):
    """Return regions, pooled regions and what the fully connected layers give, by torchvision alone."""
    with torch.inference_mode():
        tensor = torchvision.transforms.functional.to_tensor(image)
        images, _ = model.transform([tensor])
        maps = model.backbone(images.tensors)
        (regions,), _ = model.rpn(images, maps)
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * widen
        wide = torch.from_numpy(np.concatenate([centre - half, centre + half], axis=1))
        resized = resize_boxes(wide, image.shape[:2], images.image_sizes[0])
        pooled = model.roi_heads.box_roi_pool(maps, [resized], images.image_sizes)
        return (
            resize_boxes(regions, images.image_sizes[0], image.shape[:2]).numpy(),
            pooled.numpy(),
            model.roi_heads.box_head(pooled).numpy(),
        )


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("size", [(96, 128), (333, 80)])
def test_features_are_those_of_torchvision(theirs, network, size):
    image = example_image(*size)
    features = DetectionFeatures(network, "roi,fc6,fc7,roi@1x1*1.8,fc7*image")
    rows, columns = features(image, BOXES), list(features.columns.values())
    _, pooled, fc7 = read(theirs, image, BOXES)
    close(rows[:, columns[0]], pooled.reshape(len(BOXES), -1))
    close(rows[:, columns[2]], fc7)
    with torch.inference_mode():
        fc6 = theirs.roi_heads.box_head.fc6(torch.from_numpy(pooled).flatten(1)).relu().numpy()
    close(rows[:, columns[1]], fc6)
    close(rows[:, columns[3]], read(theirs, image, BOXES, 1.8)[1].mean(axis=(2, 3)))
    whole = np.array([[0, 0, size[1], size[0]]], np.float32)
    close(rows[:, columns[4]], np.repeat(read(theirs, image, whole)[2], len(BOXES), axis=0))
    assert FeatureConfig(SMALL).taps == ""
    assert build_featurizer(FeatureConfig(SMALL), network).taps == features.taps[2:3]


@pytest.mark.parametrize("size", [(96, 128), (333, 80)])
def test_regions_are_those_of_the_rpn(theirs, network, size):
    image = example_image(*size)
    expected = read(theirs, image, BOXES)[0]
    found = network.propose(image)
    height, width = size
    assert (found >= 0).all()
    assert (found[:, 2:] <= (width, height)).all()
    near = np.abs(found[:, None] - expected).max(axis=2)
    assert (near.min(axis=1) < 1e-2).mean() > 0.97  # rounding may tip the balance of NMS
    assert (near.min(axis=0) < 1e-2).mean() > 0.97
    order = near.argmin(axis=1)[near.min(axis=1) < 1e-2]
    assert np.corrcoef(order, np.arange(len(order)))[0, 1] > 0.99  # in their order, but for equal scores


@pytest.mark.parametrize(
    ("name", "layers"), [(RESNET, ["roi", "fc6", "fc7"]), (f"{RESNET}_v2", ["roi", "fc6"])]
)
def test_other_networks_and_torchvisions_older_files(name, layers, tmp_path):
    """Names of parameters have changed since; the first Faster R-CNN adds nothing to variances."""
    model, image = made(name), example_image(64, 96)
    state = model.state_dict()
    path = tmp_path / "net.pth"
    if name == RESNET:
        path = tmp_path / "fasterrcnn_resnet50_fpn_coco.pth"
        state = {
            key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked")
        }
        state = {
            key if "fpn." not in key else ".".join(key.split(".")[:4] + key.split(".")[5:]): value
            for key, value in state.items()
        }
        assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.0.weight"} <= state.keys()
        for key, value in state.items():
            if key == "backbone.body.bn1.running_var":
                value.fill_(1e-5)  # as much as would be added: it matters
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = 0.0
    torch.save(state, path)
    ours = load_network(name, path)
    assert list(ours.shapes) == layers
    for transform in (ours.net.transform, ours.for_inference().net.transform):
        transform.min_size, transform.max_size = model.transform.min_size, model.transform.max_size
    close(DetectionFeatures(ours, ours.default_taps)(image, BOXES[1:4]), read(model, image, BOXES[1:4])[2])


def test_contracts(network):
    check_featurizer(DetectionFeatures(network, "roi@3x3,fc7*1.8"))
    check_proposer(RpnProposals(RpnConfig(max_regions=40), network))


def test_the_first_image_does_not_decide_how_others_are_read(file):
    strip, image = example_image(9, 900), example_image()
    one, other = load_network(SMALL, file), load_network(SMALL, file)
    DetectionFeatures(one, "fc7")(strip, np.array([[0, 0, 50, 9]], np.float32))
    rows = [DetectionFeatures(each, "fc7")(image, BOXES) for each in (one, other)]
    np.testing.assert_array_equal(*rows)


def test_the_convolutions_run_once_for_regions_and_features(network, monkeypatch):
    passes = []
    ready = network.for_inference()
    monkeypatch.setattr(
        ready.net.transform,
        "normalize",
        lambda x, own=ready.net.transform.normalize: passes.append(1) or own(x),
    )
    image, proposer, features = (
        example_image(),
        RpnProposals(RpnConfig(), network),
        DetectionFeatures(network, "fc7"),
    )
    boxes = proposer.propose(image).boxes
    rows = features(image, boxes[:5])
    assert len(passes) == 1
    image[:40] = 0  # the same array, another image
    others = features(image, boxes[:5])
    assert len(passes) == 2
    assert np.abs(rows - others).max() > 0
    proposer.propose(image)
    changed = image.copy()
    changed[0, 0] += 1
    features(changed, boxes[:5])
    assert len(passes) == 4
    other = DetectionFeatures(network, "roi@1x1")
    assert features.reads_with(other)
    one, two = readers_of([features, other], image)
    assert (one(boxes[:2]).shape, two(boxes[:2]).shape, len(passes)) == ((2, 1024), (2, 256), 5)


def test_regions_are_found_where_the_run_says(network, splits, tmp_path):
    proposer, image = RpnProposals(RpnConfig(max_regions=40), network), example_image()
    assert proposer.on("cpu").network is network
    there = proposer.on("cpu:0")
    assert there.key() == proposer.key()
    np.testing.assert_array_equal(there.propose(image).boxes, proposer.propose(image).boxes)
    with pytest.raises(NotImplementedError, match="meta"):  # which has no values: it did go there
        propose(splits.test, proposer, Run(tmp_path, device="meta"))


def test_regions_are_cut_and_kept_by_the_digest_of_the_weights(network, tmp_path):
    image = example_image()
    sample = Sample("a", image.shape[:2], GroundTruth.empty(), render=lambda: image)
    few, more = (RpnProposals(RpnConfig(max_regions=n), network) for n in (7, 20))
    found = [proposals_of(sample, each, tmp_path).boxes for each in (few, more)]
    np.testing.assert_array_equal(found[0], found[1][:7])
    np.testing.assert_array_equal(found[1], more.propose(image).boxes)
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    assert few.key()["weights"] == network.digest != load_network(SMALL, "random").digest


CONFIG = ExperimentConfig(
    proposer="rpn",
    rpn=RpnConfig(max_regions=60),
    features=FeatureConfig(SMALL, "random"),
    learn="nothing",
    heads=HeadsConfig(names=("linear-svm",)),
    folds=0,
    n_bootstrap=20,
)


@pytest.fixture(scope="module")
def splits():
    return digits_splits(8, 3, 2)


@pytest.mark.parametrize("own", [True, False])
def test_a_detector_of_it_is_saved_with_its_weights(own, file, splits, tmp_path):
    features = (
        FeatureConfig(SMALL, str(file))
        if own
        else FeatureConfig("mobilenet_v2", "random", taps="block13@1x1")
    )
    rpn = RpnConfig("" if own else SMALL, "default" if own else str(file), max_regions=40)
    config = replace(CONFIG, rpn=rpn, features=features, detect=replace(CONFIG.detect, refined=0))
    if own:  # boxes are refined on its maps as well
        refine = RefineConfig(n_steps=2, jitter=2, near=2)
        config = replace(
            config, learn="fc", fc=replace(CONFIG.fc, n_steps=2), detect=CONFIG.detect, refine=refine
        )
    parts = config.build()
    assert (parts.backbone is parts.proposer.network) == parts.refines == own
    detector = train_detector(splits, parts).detector
    if own:
        taps = detector.model.refinement.featurizer.taps
        assert [str(tap) for tap in taps] == ["roi@7x7*1.6", "fc7*1.8"]
    detector.save(tmp_path / "detector")
    kinds = sorted(path.name.partition(".")[0] for path in (tmp_path / "detector").glob("*.safetensors"))
    assert kinds == (["backbone", "head"] if own else ["backbone", "head", "proposer"])
    again = load_detector(tmp_path / "detector")
    image = splits.test.samples[0].read()
    for ours, theirs in zip(
        (again(image), *again.trace(image)[1:]), (detector(image), *detector.trace(image)[1:]), strict=True
    ):
        np.testing.assert_array_equal(getattr(ours, "boxes", ours), getattr(theirs, "boxes", theirs))
    assert again.proposer.network.digest == detector.proposer.network.digest
    assert (again.proposer.network is again.backbone) == own
    lines = dict(about(again, tmp_path / "detector"))
    assert f"RPN of {SMALL}, weights net.pth (licence: not known" in lines["Regions"]
    assert "40 at most" in lines["Regions"]
    what = "features" if own else "regions"
    with pytest.raises(
        ConfigError, match=f"no graph is made of networks that were trained to detect, got one for {what}"
    ):
        export_detector(again, tmp_path / "onnx")
    if not own:
        next((tmp_path / "detector").glob("proposer.*")).unlink()
        with pytest.raises(DataError, match="proposer"):
            load_detector(tmp_path / "detector")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"learn": "trunk"},
            "learn=trunk trains a network that classifies, got one that was trained to detect",
        ),
        ({"learn": "network"}, "learn=network trains a network that classifies, got one that was trained"),
        ({"fc": replace(CONFIG.fc, other_sides=(800,)), "learn": "fc"}, r"Set fc.other_sides=\[\]"),
        ({"features": FeatureConfig(SMALL, "random", longer_sides=(640,))}, r"by itself, got \(640,\)"),
        ({"features": FeatureConfig(SMALL, "random", resolution=320)}, r"by itself, got \(320,\)"),
        ({"features": FeatureConfig("vgg16", "random")}, "rpn.network must be .*, got 'vgg16'"),
        ({"rpn": RpnConfig(SMALL + "_v3")}, "torchvision has no network 'fasterrcnn_.*_v3'. Did you mean"),
        (
            {"features": FeatureConfig(SMALL, "random", taps="fc8")},
            "has no layer 'fc8'. Its layers are roi, fc6, fc7",
        ),
        ({"features": FeatureConfig(SMALL, "random", taps="fc7@2x2")}, "fc7 is a vector, it takes no grid"),
    ],
)
def test_what_does_not_fit_is_refused(change, words, splits):
    with pytest.raises(ConfigError, match=words):
        build_featurizer(replace(CONFIG, **change).build().features)


def test_what_does_not_fit_is_refused_where_it_is_named(theirs, tmp_path):
    with pytest.raises(ConfigError, match="reads regions on maps of the whole image, got 'warped'"):
        FeatureConfig(SMALL, path="warped")
    with pytest.raises(ConfigError, match=r"was trained to detect, .* Name a network that classifies"):
        load_backbone(SMALL, "random")
    with pytest.raises(
        ConfigError, match=r"must be default, .* or one of COCO_V1, DEFAULT, got 'IMAGENET1K_V1'"
    ):
        load_network(SMALL, "IMAGENET1K_V1")
    save_file({"other": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"lacks .* tensors"):
        load_network(SMALL, tmp_path / "other.safetensors")
    load_network(SMALL, "random").save(tmp_path / "own.safetensors")
    with pytest.raises(WeightsError, match=f"holds the weights of {SMALL}, not of"):
        load_network("torchvision:fasterrcnn_mobilenet_v3_large_fpn", tmp_path / "own.safetensors")
    assert "terms of ImageNet and COCO" in licence_of(SMALL, "default")


def test_weights_are_looked_for_in_torchs_cache(theirs, tmp_path, monkeypatch):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(
        theirs.state_dict(),
        tmp_path / "hub" / "checkpoints" / "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
    )
    with pytest.raises(
        WeightsError, match="its SHA-256 must begin with 907ea3f9"
    ):  # it is found, and not theirs
        load_network(SMALL)


def test_the_command_line(file, splits, tmp_path, capsys):
    data, out = str(tmp_path / "digits"), ["--out", str(tmp_path / "out")]
    sizes = ["--train", "6", "--val", "3", "--test", "2"]
    assert main(["data", "digits", "--out", data, "--format", "yolo", *sizes]) == 0
    cache = ["--cache", str(tmp_path / "cache")]
    named = ["--backbone", SMALL, "--weights", str(file)]
    train = ["train", data, *named, *out, *cache, "--skip-absent-classes"]
    settings = ["--set", "rpn.max_regions=30", "--set", "detect.refined=0", "--learn", "nothing"]
    capsys.readouterr()
    assert main([*train, "--proposer", "rpn", *settings, "--dry-run"]) == 0
    assert "test, from 2 of 2 images" in capsys.readouterr().out
    assert main([*train, "--learn", "network"]) == 2
    assert "learn=network trains a network that classifies" in capsys.readouterr().err
    rpn = ["propose", data, "--rpn", SMALL, "--weights", str(file), *cache]
    assert main([*rpn, "--max-regions", "12"]) == 0
    assert "2 images, 12 boxes each (12 to 12)" in capsys.readouterr().out
    assert main([*rpn, "--min-size", "12"]) == 2
    assert "--min-size is of a selective search, got --rpn as well" in capsys.readouterr().err
    assert main([*rpn, "--device", "cuda:99"]) == 2
    assert "--device must be a device of this machine" in capsys.readouterr().err
    assert main(["propose", data, "--device", "cuda", *cache]) == 2
    assert "--device is for the network of --rpn, got cuda without one" in capsys.readouterr().err
    images = sorted(str(path) for path in (tmp_path / "digits").rglob("*.png"))[:1]
    rows = tmp_path / "rows.npy"
    assert main(["extract", *images, *named, "--path", "shared", "--out", str(rows)]) == 0
    assert np.load(rows).shape == (1, 1024)
    said = " ".join(" ".join(opening(CONFIG, splits, tmp_path)).split())  # lines end where a path is long
    assert "Regions: of the RPN of the same network" in said
    assert "from its own maps" in said
