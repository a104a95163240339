"""Exported detectors find what torch finds, without torch; what cannot be exported is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from rcnn_svm.cli import main
from rcnn_svm.detector import Detector, Model, Refinement
from rcnn_svm.errors import ConfigError, DataError, DependencyError
from rcnn_svm.evaluation.calibration import ClassCurves, IsotonicScaling, PlattScaling
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.kernels import RBF, HistogramIntersection, Polynomial
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.heads.scorers import EstimatorScorer, KernelScorer, LinearScorer, SoftmaxScorer
from rcnn_svm.networks.architectures import Architecture
from rcnn_svm.networks.backbone import random_backbone
from rcnn_svm.networks.efficientnet_lite import SameConv2d
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.proposals import GridConfig
from rcnn_svm.runtime import REQUIREMENTS, Precision, load
from rcnn_svm.structures import GroundTruth, Sample

pytest.importorskip("onnx", reason="exporting needs onnx: pip install '.[onnx]'")
pytest.importorskip("onnxruntime", reason="the runtime needs onnxruntime: pip install '.[runtime]'")

from rcnn_svm.runtime.export import export_detector

ROOT = Path(__file__).parents[2]
K = 3
SHARED = FeatureConfig("tiny", "random", longer_sides=(128,), taps="b@2x3,c@1x1*1.8")
WARPED = FeatureConfig("small_cnn", "random", path="warped", taps="conv2@2x3,fc7")
PLAIN = PostprocessConfig(second_look=0)


def tiny() -> nn.Module:
    """Return a network that pads as TensorFlow does: where its cells lie depends on the size of the image."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for name, n_in, n_out, kernel in (("a", 3, 8, 3), ("b", 8, 12, 5), ("c", 12, 16, 3)):
        conv = SameConv2d(n_in, n_out, kernel, stride=2)
        layers[name] = nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU6())
    return nn.Sequential(layers)


TINY = Architecture.of("tiny", tiny, ("a", "b", "c"), crop_size=64)


def made(
    features: FeatureConfig = SHARED,
    scorer: Callable[[np.random.Generator, int], object] | None = None,
    *,
    scaling: str = "l2",
    layers: bool = False,
    boxes: bool = True,
    detect: PostprocessConfig = PLAIN,
    architecture: Architecture = TINY,
) -> Detector:
    """Return a detector that nothing has trained: its numbers are random, of the size of trained ones."""
    rng = np.random.default_rng(7)
    backbone = random_backbone(architecture if features.backbone == "tiny" else features.backbone).eval()
    featurizer = build_featurizer(features, backbone)
    n = featurizer.n_features

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float32)

    fc = None
    if layers:
        weights = normal(24, n), normal(20, 24) / 5
        biases = normal(24) / 5, normal(20)
        fc = FcLayers(
            weights, biases, normal(20, K + 1), normal(K + 1), normal(20, 4 * K), normal(4 * K), "l2", n // 2
        )
        n = 20
    regressor = BoxRegressor.from_arrays({"coef": normal(K, 4, n) / 5, "intercept": normal(K, 4) / 5})
    scaler = FeatureScaler.from_dict({"scaling": scaling, "factor": 0.5})
    own = LinearScorer(normal(K, n), normal(K)) if scorer is None else scorer(rng, n)
    sigmoids = PlattScaling(np.array([1.0, 2.0, 0.5]), np.zeros(K), np.array([True, False, True]))
    steps = IsotonicScaling(
        np.array([-1.0, 0.1, 0.0, 0.0]),
        np.array([0.25, 0.7, 0.0, 0.0]),
        np.array([0, 2, 3, 4]),
        np.array([True, False, False]),
    )
    return Detector(
        head="made-up",
        classes=("one", "two", "three"),
        proposer=GridConfig(60),
        n_proposals=50,
        features=features,
        backbone=backbone,
        featurizer=featurizer,
        layers=fc,
        model=Model(own, scaler, regressor if boxes else None, scaler if boxes else None),  # type: ignore[arg-type]
        postprocess=detect,
        thresholds=None,
        info={"made": "up"},
        calibration=ClassCurves(sigmoids, steps, 5),
    )


def refined(detector: Detector) -> Detector:
    """Return the detector with a second stage for its boxes, as random as the first."""
    rng = np.random.default_rng(3)
    assert detector.backbone is not None
    features = replace(detector.features, taps="b@3x3*1.6,c@1x1*image")
    featurizer = build_featurizer(features, detector.backbone)
    shapes = (12, featurizer.n_features), (12,), (K, 5, 12), (K, 5)
    refiner = BoxRefiner(*(rng.normal(0, 0.2, shape) for shape in shapes))
    return replace(detector, model=replace(detector.model, refinement=Refinement(featurizer, refiner)))


def softmax(rng: np.random.Generator, n: int) -> SoftmaxScorer:
    return SoftmaxScorer(*(rng.normal(0, 8, shape).astype(np.float32) for shape in ((K + 1, n), (K + 1,))))


def machine(kernel: object) -> Callable[[np.random.Generator, int], KernelScorer]:
    def scorer(rng: np.random.Generator, n: int) -> KernelScorer:
        support, coef = np.abs(rng.normal(0, 1, (30, n))), rng.normal(0, 1, (K, 30))
        support /= np.linalg.norm(support, axis=1, keepdims=True)
        return KernelScorer(support, coef, np.zeros(K), kernel)  # type: ignore[arg-type]

    return scorer


def image(height: int, width: int) -> np.ndarray:
    """Return smooth colours with some noise: an image whose sides are odd, or not a multiple of anything."""
    rng = np.random.default_rng(height)
    y, x = np.ogrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + y / 5), np.cos(y / 11 + 0 * x), np.sin(x / 17 - y / 7)], axis=2)
    return np.uint8(np.clip(120 + 90 * waves + rng.normal(0, 12, waves.shape), 0, 255))


def check_same(detector: Detector, folder: Path) -> None:
    """Check that the export of a detector finds what it finds, in images of several sizes."""
    exported = load(folder, threads=1)
    assert exported.classes == detector.classes
    for size in ((97, 143), (201, 120), (64, 64)):
        ours, theirs = detector(image(*size)), exported(image(*size))
        assert len(ours) == len(theirs) > 0
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-4)  # type: ignore[arg-type]


TWICE = PostprocessConfig(second_look=10, min_score=-2.0)
KINDS = {
    "fc layers, a softmax, a second look and mirror images, at two sizes": lambda: made(
        replace(SHARED, taps="b@2x3,c@1x1*1.8,c@1x1*image", longer_sides=(96, 128), mirror=True),
        softmax,
        scaling="none",
        layers=True,
        detect=TWICE,
    ),
    "region layers on shared maps, linear scores alone": lambda: made(
        replace(SHARED, taps="penultimate,c@2x2*image", longer_sides=(100,)),
        scaling="mean-norm-20",
        boxes=False,
    ),
    "refined boxes": lambda: refined(made(detect=replace(TWICE, refined=20))),
    "refined boxes that are drawn to proposals": lambda: refined(
        made(detect=replace(TWICE, refined=20, snap=0.4))
    ),
    "warped regions, a Gaussian kernel": lambda: made(WARPED, machine(RBF(1.5))),
    "warped squares, a polynomial kernel": lambda: made(
        replace(WARPED, crop_mode="square", padding=0, taps="pool3@2x2"),
        machine(Polynomial(3, 0.5, 1.0)),
        scaling="sqrt-l2",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_detector_finds_what_torch_finds(kind: str, tmp_path: Path) -> None:
    detector = KINDS[kind]()
    done = export_detector(detector, tmp_path / "export")
    check_same(detector, done.folder)
    assert done.difference < 1e-4


@pytest.mark.parametrize(
    ("name", "path"), [("timm:lcnet_035", "shared"), ("timm:test_vit", "shared"), ("timm:test_vit", "warped")]
)
def test_networks_of_libraries_are_exported_too(name: str, path: str, tmp_path: Path) -> None:
    features = replace(SHARED, backbone=name, weights="random", taps="")
    if path == "warped":
        features = replace(WARPED, backbone=name, weights="random", taps="penultimate")
    detector = made(features)
    if name == "timm:test_vit" and path == "shared":
        with pytest.raises(ConfigError, match=r"no graph can be made of the network .*bicubic"):
            export_detector(detector, tmp_path / "export")
        return
    done = export_detector(detector, tmp_path / "export")
    assert done.difference < 1e-4
    look, graph = detector.looks(image(97, 143))[0], load(done.folder, threads=1)
    boxes = detector.proposer.propose(image(97, 143)).boxes[:20]
    ours, theirs = (
        one.model.read(*read(boxes))[0]
        for one, read in ((detector, look), (graph, graph.looks(image(97, 143))[0]))
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * float(np.abs(ours).max()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a detector, the export in it."""
    folder = tmp_path_factory.mktemp("exported")
    detector = made(WARPED)
    detector.save(folder)
    export_detector(detector, folder / "onnx")
    return folder


def test_it_runs_where_neither_torch_nor_scikit_learn_can_be_imported(exported: Path, tmp_path: Path) -> None:
    Pillow.fromarray(image(70, 90)).save(tmp_path / "photo.png")
    words = ["detect", exported, tmp_path / "photo.png", "--out", tmp_path / "found", "--runtime", "onnx"]
    missing = ("torch", "torchvision", "sklearn", "scipy", "safetensors", "matplotlib", "jinja2", "onnx")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); from rcnn_svm.cli import main; "
        f"sys.exit(main({[*map(str, words), '--all', '--no-pictures']}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (found,) = json.loads((tmp_path / "found" / "detections.json").read_text())["images"]
    expected = made(WARPED)(image(70, 90))
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-4)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=1e-2)


def test_what_is_needed_without_torch_is_what_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["runtime"]}
    assert {one.replace("-headless", "") for one in REQUIREMENTS} <= asked


@pytest.mark.parametrize(
    ("features", "precision", "calibrated", "tolerance"),
    [(WARPED, "fp16", False, 0.01), (WARPED, "int8", False, 0.1), (SHARED, "int8", True, 0.2)],
)
def test_rounded_weights_take_less_and_say_nearly_the_same(
    features: FeatureConfig, precision: Precision, calibrated: bool, tolerance: float, tmp_path: Path
) -> None:
    detector = made(features, layers=True)
    photos = [Sample("photo", (80, 100), GroundTruth.empty(), render=lambda: image(80, 100))]
    boxes = detector.proposer.propose(image(97, 143)).boxes[:40]

    def said(by: Detector) -> np.ndarray:
        return by.model.read(*by.looks(image(97, 143))[0](boxes))[0]

    whole = export_detector(detector, tmp_path / "fp32")
    rounded = export_detector(
        detector, tmp_path / "rounded", precision=precision, calibrate=photos if calibrated else []
    )
    difference = np.abs(said(load(rounded.folder)) - said(detector)).mean() / np.abs(said(detector)).mean()
    assert 1e-6 < difference < tolerance
    if features is WARPED:  # whose weights are most of the file
        assert rounded.n_bytes < 0.95 * whole.n_bytes


@pytest.mark.parametrize("calibrated", [False, True])
def test_8_bits_leave_what_refines_boxes_and_what_has_no_learned_layer(
    calibrated: bool, tmp_path: Path
) -> None:
    import onnx

    photos = [Sample("photo", (80, 100), GroundTruth.empty(), render=lambda: image(80, 100))]
    detector = refined(made(SHARED, layers=True, detect=replace(TWICE, refined=20)))
    rounded = export_detector(
        detector, tmp_path / "rounded", precision="int8", calibrate=photos if calibrated else []
    )
    kinds = {
        path.stem: {node.op_type for node in onnx.load(path).graph.node}
        for path in rounded.folder.glob("*.onnx")
    }
    in_8_bits = {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear"}
    assert kinds["detector"] & in_8_bits
    assert not kinds["refine"] & in_8_bits
    if not calibrated:  # products of learned layers alone are rounded, and here there are none
        plain = export_detector(made(SHARED), tmp_path / "plain", precision="int8").folder / "detector.onnx"
        assert not {node.op_type for node in onnx.load(plain).graph.node} & in_8_bits


def shouting(image_id, size, boxes, scores, deltas):  # type: ignore[no-untyped-def]
    """Stand for post-processing that is not ours."""
    raise AssertionError


def cannot(kind: str) -> Detector:
    detector = made(WARPED)
    if kind == "shouting":
        return replace(detector, postprocess=shouting)
    if kind == "histogram-intersection":
        rows = machine(HistogramIntersection())(np.random.default_rng(0), detector.featurizer.n_features)
        return replace(detector, model=replace(detector.model, scorer=rows))
    if kind == "forest":
        estimator = EstimatorScorer("forest", object(), K)
        return replace(detector, model=replace(detector.model, scorer=estimator))
    return replace(detector, featurizer=HandMade())


class HandMade:
    """Stands for features that are not ours."""

    key: ClassVar[dict[str, str]] = {}
    n_features = 2


@pytest.mark.parametrize("kind", ["shouting", "histogram-intersection", "forest", "HandMade"])
def test_what_no_graph_can_hold_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"export: .*{kind}"):
        export_detector(cannot(kind), tmp_path / "export")
    assert not (tmp_path / "export").exists()


class SumOfRows(nn.Module):
    """Does something that tracing fixes to the size of the traced image."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x * float(x.shape[2]) / 100


class Bessel(nn.Module):
    """Does something that ONNX does not know."""

    def forward(self, x):  # type: ignore[no-untyped-def]
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (SumOfRows, r"must say what torch says within 0\.0001"),
        (Bessel, "no graph can be made of the network"),
    ],
)
def test_a_network_that_no_graph_can_say_the_same_as_is_refused(
    layer: type[nn.Module], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(OrderedDict(a=nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), layer())))

    architecture = Architecture.of("own", build, ("a",))
    detector = made(replace(SHARED, taps="a@2x2"), scaling="none", architecture=architecture)
    with pytest.raises((ConfigError, DataError), match=words):
        export_detector(detector, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert capfd.readouterr().out == ""


def damaged(exported: Path, folder: Path, how: str) -> Path:
    """Return a copy of an export that is damaged, or nothing at all."""
    if how == "nothing":
        return folder
    shutil.copytree(exported / "onnx", folder, dirs_exist_ok=True)
    manifest, graph = folder / "runtime.json", folder / "detector.onnx"
    values = json.loads(manifest.read_text())
    if how == "graph":
        graph.write_bytes(graph.read_bytes()[:-20])
    elif how == "no graph":
        graph.write_bytes(b"nothing of the kind")
        values["files"]["detector"]["sha256"] = hashlib.sha256(graph.read_bytes()).hexdigest()
    elif how == "classes":
        values["classes"].append("four")
    elif how == "format":
        values["format"] = 99
    elif how == "path":
        values["warped"] = None
    else:
        del values["detect"]
    manifest.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nothing", "holds no exported detector .there is no runtime.json"),
        ("graph", "detector.onnx: must have the SHA-256"),
        ("no graph", "detector.onnx: must be an ONNX graph"),
        ("classes", "runtime.json: holds what is no exported detector .its 4 classes are 3 of detector"),
        ("path", "holds what is no exported detector .its graph reads crops"),
        ("format", "must be an exported detector of format 1, got 99"),
        ("settings", "runtime.json: holds what is no exported detector .'detect'"),
    ],
)
def test_what_is_no_whole_export_is_refused(exported: Path, tmp_path: Path, how: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(damaged(exported, tmp_path, how), threads=1)


def test_a_missing_package_is_named(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match="pip install onnxruntime"):
        load(exported)
    with pytest.raises(DependencyError, match=r"onnxruntime cannot be imported .*pip install onnx "):
        export_detector(made(WARPED), tmp_path / "export")


def test_the_command_exports_into_the_detectors_folder_and_names_wrong_words(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("onnx"))
    photo = tmp_path / "photo.png"
    Pillow.fromarray(image(70, 90)).save(photo)
    out = ["--out", str(tmp_path / "found")]
    assert main(["detect", str(folder), str(photo), *out, "--runtime", "onnx"]) == 3
    assert "Make one with `rcnn-svm export DETECTOR`" in capsys.readouterr().err
    assert main(["export", str(folder), "--calibrate", str(tmp_path)]) == 2
    assert "--calibrate is for --precision int8" in capsys.readouterr().err
    assert main(["export", str(folder), "--precision", "fp16"]) == 0
    assert (folder / "onnx" / "requirements.txt").read_text().splitlines() == list(REQUIREMENTS)
    for other in (["--explain"], ["--cluster", "local:1"]):
        assert main(["detect", str(folder), str(photo), *out, "--runtime", "onnx", *other]) == 2
    assert main(["detect", str(folder), str(photo), *out, "--runtime", "onnx", "--all"]) == 0
    capsys.readouterr()
    replace(made(WARPED), info={"made": "again"}).save(folder)
    assert main(["detect", str(folder), str(photo), *out, "--runtime", "onnx", "--all"]) == 3
    assert "that was trained again since" in capsys.readouterr().err
    assert (tmp_path / "found" / "photo.png").exists()
    assert main(["export", str(tmp_path / "found")]) == 3
