"""Scores as sums: what is shown adds up to what is computed, and each share is what it claims to be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rcnn_svm.boxes import flip_horizontally
from rcnn_svm.detector import Detector, Model, load_detector
from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.evidence import BIAS, DOUBT, LAYERS, explain
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.base import Scorer
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.kernels import RBF, Polynomial
from rcnn_svm.heads.scorers import EstimatorScorer, KernelScorer, LinearScorer, SoftmaxScorer
from rcnn_svm.networks.architectures import Architecture
from rcnn_svm.networks.backbone import Backbone, load_backbone
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.proposals import GridConfig
from rcnn_svm.structures import Detections, Image, TrainingRegions, mirror_image

CLASSES = ("cat", "dog", "ox")
BOXES = np.array([[5, 8, 45, 50], [20, 2, 70, 58], [0, 0, 72, 60]], np.float32)
TAPS = "conv3@3x3,fc7,pool3@2x2"


@pytest.fixture(scope="module")
def network() -> Backbone:
    return load_backbone("small_cnn", "random", n_outputs=4, seed=1)


@pytest.fixture(scope="module")
def image() -> Image:
    return np.random.default_rng(3).integers(0, 256, (60, 72, 3), dtype=np.uint8)


def make(
    network: Backbone,
    scorer: str | Scorer = "linear",
    *,
    scaling: str | None = "l2",
    layers: str | None = None,
    seed: int = 0,
    features: FeatureConfig | None = None,
    postprocess: PostprocessConfig | None = None,
) -> Detector:
    """Return a detector of random weights; `layers` is the scaling of rows before fc6 and fc7, if any."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), np.float32)

    features = features or FeatureConfig("small_cnn", "random", "warped", TAPS)
    featurizer = build_featurizer(features, network)
    n = featurizer.n_features
    fc = None
    if layers is not None:
        fc = FcLayers(
            (draw(24, n), draw(12, 24)),
            (draw(24), draw(12)),
            draw(12, 4),
            draw(4),
            draw(12, 12),
            draw(12),
            layers,
            n // 2 if layers == "l2" else None,
        )
        n = 12
    if scorer == "linear":
        scorer = LinearScorer(draw(3, n), draw(3))
    elif scorer == "softmax":
        scorer = SoftmaxScorer(4 * draw(4, n), draw(4))
    elif scorer == "rbf":
        dual = draw(3, 9) * (rng.random((3, 9)) < 0.7)
        scorer = KernelScorer(draw(9, n), dual, draw(3), RBF(0.7))
    assert not isinstance(scorer, str)
    scaler = None
    if scaling is not None:
        scaler = FeatureScaler(scaling)
        scaler.factor_ = 0.3 if scaling == "mean-norm-20" else None
    regressor = BoxRegressor.from_arrays(
        {"coef": 0.1 * draw(3, 4, n), "intercept": np.zeros((3, 4), np.float32)}
    )
    return Detector(
        head="made-up",
        classes=CLASSES,
        proposer=GridConfig(),
        n_proposals=25,
        features=features,
        backbone=network,
        featurizer=featurizer,
        layers=fc,
        model=Model(scorer, scaler, regressor, scaler),
        postprocess=postprocess or PostprocessConfig(),
        thresholds=None,
        info={},
    )


def mirrored(detector: Detector) -> Detector:
    return replace(detector, features=replace(detector.features, mirror=True))


@given(
    st.sampled_from(["linear", "softmax", "rbf"]),
    st.sampled_from([None, "none", "l2", "sqrt-l2", "mean-norm-20"]),
    st.sampled_from([None, "none", "l2", "sqrt-l2"]),
    st.booleans(),
    st.integers(0, 10_000),
)
@settings(max_examples=20, deadline=None)
def test_the_sum_is_the_score(
    network: Backbone,
    image: Image,
    scorer: str,
    scaling: str | None,
    layers: str | None,
    mirror: bool,
    seed: int,
) -> None:
    detector = make(network, scorer, scaling=scaling, layers=layers, seed=seed)
    detector = mirrored(detector) if mirror else detector
    scores, _ = detector.model.read(*detector.looks(image)[0](BOXES))
    labels = [seed % 3, (seed + 1) % 3, seed % 2]
    for i, evidence in enumerate(explain(detector, image, BOXES, labels)):
        assert evidence.score == pytest.approx(scores[i, labels[i]], abs=1e-6)
        size = 1 + sum(float(np.abs(c.shares).sum()) for c in evidence.cells)
        assert evidence.total == pytest.approx(evidence.score, abs=2e-6 * size)
        shapes = [c.shares.shape for c in evidence.cells]
        assert shapes == ([] if scorer == "rbf" else [(3, 3), (5, 5), (2, 2)])
        assert [c.tap for c in evidence.cells] == ([] if scorer == "rbf" else TAPS.split(","))
        if evidence.rivals is not None:
            assert evidence.rivals.sum() == pytest.approx(1)
            assert evidence.rivals[evidence.label] == 0
            assert -np.log(3) - 1e-9 <= evidence.constants[DOUBT] <= 0


def test_shares_are_those_of_the_gradient_which_knows_nothing_of_them(
    network: Backbone, image: Image
) -> None:
    """Without scaling a network of ReLUs is piecewise linear, and torch differentiates it by itself."""
    detector = make(network, "softmax", scaling=None, layers="none")
    reader = build_featurizer(replace(detector.features, taps="conv3@3x3,pool3,pool3@2x2"), network)
    inputs = torch.from_numpy(reader(image, BOXES).astype(np.float64)).requires_grad_()
    map_part, pooled, last = (inputs[:, reader.columns[tap]] for tap in reader.taps)
    regions = {name: stage.double() for name, stage in load_copy(network).regions.items()}
    fc7 = regions["fc7"](regions["fc6"](pooled.reshape(-1, 96, 5, 5)))
    x = torch.cat([map_part, fc7, last], dim=1)
    assert detector.layers is not None
    for weight, bias in zip(detector.layers.weights, detector.layers.biases, strict=True):
        x = (x @ torch.from_numpy(weight).double().T + torch.from_numpy(bias).double()).relu()
    scorer = detector.model.scorer
    assert isinstance(scorer, SoftmaxScorer)
    logits = x @ torch.from_numpy(scorer.coef).double().T + torch.from_numpy(scorer.intercept).double()
    for label in range(3):
        others = [j for j in range(4) if j != label]
        odds = logits[:, label] - torch.logsumexp(logits[:, others], dim=1)
        (gradient,) = torch.autograd.grad(odds.sum(), inputs, retain_graph=True)
        products = (gradient * inputs).detach().numpy()
        found = explain(detector, image, BOXES, np.full(len(BOXES), label))
        for row, evidence in zip(products, found, strict=True):
            for cells, tap in zip(evidence.cells, reader.taps, strict=True):
                assert tap.grid is not None
                expected = row[reader.columns[tap]].reshape(-1, *tap.grid).sum(axis=0)
                np.testing.assert_allclose(cells.shares, expected, atol=1e-5)


def load_copy(network: Backbone) -> Backbone:
    copy = load_backbone("small_cnn", "random", n_outputs=4, seed=1)
    assert copy.digest == network.digest
    return copy


def test_a_cell_of_a_plain_linear_head_is_its_features_times_their_weights(
    network: Backbone, image: Image
) -> None:
    detector = make(network, scaling=None)
    rows, scorer = detector.featurizer(image, BOXES), detector.model.scorer
    assert isinstance(scorer, LinearScorer)
    for i, evidence in enumerate(explain(detector, image, BOXES, [0, 1, 2])):
        products = (rows[i] * scorer.coef[i])[: 96 * 9].reshape(96, 3, 3).sum(axis=0)
        np.testing.assert_allclose(evidence.cells[0].shares, products, atol=1e-6)
        assert evidence.constants[BIAS] == pytest.approx(scorer.intercept[i])


def test_evidence_of_the_mirror_image_lies_mirrored(network: Backbone, image: Image) -> None:
    detector = mirrored(make(network))
    # A region in the middle, so that rounding its window is the same from both sides.
    boxes = np.array([[16, 10, 56, 50]], np.float32)
    (own,) = explain(detector, image, boxes, [1])
    (other,) = explain(detector, mirror_image(image), flip_horizontally(boxes, 72), [1])
    assert own.score == pytest.approx(other.score, abs=1e-6)
    for one, two in zip(own.cells, other.cells, strict=True):
        np.testing.assert_allclose(one.shares, two.shares[:, ::-1], atol=1e-6)
    assert not np.allclose(own.cells[0].shares, own.cells[0].shares[:, ::-1], atol=1e-4)


def test_shared_convolutions_tell_where_each_tap_looks(image: Image) -> None:
    sizes = {"conv1": (3, 8), "conv2": (8, 12)}

    def build() -> nn.Module:
        layers = {k: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for k, (a, b) in sizes.items()}
        return nn.Sequential(OrderedDict(layers))

    mine = Architecture.of("mine", build, maps=("conv1", "conv2"), crop_size=64)
    features = FeatureConfig("mine", "random", "shared", "conv1@3x2,conv2@1x1*1.5,conv2@2x2*image", (96,))
    detector = make(load_backbone(mine, "random"), features=features)
    (evidence,) = explain(detector, image, BOXES[:1], [2])
    shapes = [cells.shares.shape for cells in evidence.cells]
    assert shapes == [(3, 2), (1, 1), (2, 2)]
    np.testing.assert_allclose(evidence.cells[0].box, BOXES[0])
    np.testing.assert_allclose(evidence.cells[1].box, [-5, -2.5, 55, 60.5])
    np.testing.assert_allclose(evidence.cells[2].box, [0, 0, 72, 60])
    assert evidence.total == pytest.approx(evidence.score, abs=1e-5)
    assert LAYERS not in evidence.constants


class Sides:
    """Features of one's own: the four sides of a box."""

    n_features = 4
    key: ClassVar = {"of": "sides"}

    def __call__(self, image: Image, boxes: np.ndarray) -> np.ndarray:
        return np.asarray(boxes, np.float32)

    def of_image(self, image: Image):
        return lambda boxes: self(image, boxes)


def test_features_of_ones_own_have_no_cells(
    network: Backbone, image: Image, rng: np.random.Generator
) -> None:
    scorer = LinearScorer(rng.normal(size=(3, 4)), rng.normal(size=3))
    detector = replace(make(network), featurizer=Sides(), backbone=None, model=Model(scorer, None))
    (evidence,) = explain(detector, image, BOXES[:1], [0])
    (cells,) = evidence.cells
    assert (cells.tap, cells.shares.shape) == ("features", (1, 1))
    assert cells.shares[0, 0] == pytest.approx(float(BOXES[0] @ scorer.coef[0]), rel=1e-6)


@pytest.mark.parametrize("kernel", [RBF(0.7), Polynomial()])
def test_each_support_vector_adds_its_weight_times_its_kernel(
    network: Backbone, image: Image, rng: np.random.Generator, kernel: RBF | Polynomial
) -> None:
    n = make(network).featurizer.n_features
    support, dual = rng.normal(size=(6, n)).astype(np.float32) / 30, rng.normal(size=(3, 6))
    dual[1, [0, 4]] = 0
    detector = make(network, KernelScorer(support, dual, np.array([1.0, 2, 3]), kernel))
    (evidence,) = explain(detector, image, BOXES[:1], [1])
    assert detector.model.scaler is not None
    row = detector.model.scaler(detector.featurizer(image, BOXES[:1]))
    assert evidence.support is not None
    expected = np.asarray(kernel(row, support))[0] * dual[1]
    np.testing.assert_allclose(evidence.support, expected, atol=1e-5)
    assert not evidence.support[[0, 4]].any()
    assert dict(evidence.constants) == {BIAS: 2.0}
    assert evidence.total == pytest.approx(evidence.score, abs=1e-5)


def some_regions(n: int) -> TrainingRegions:
    ids = tuple(f"bild ä {i // 2}" for i in range(n))
    return TrainingRegions(ids, np.tile(BOXES[:1], (n, 1)), np.arange(n) % 4 - 1, np.linspace(0, 1, n))


def test_a_saved_detector_knows_its_training_regions_and_an_older_one_opens(
    network: Backbone, tmp_path: Path
) -> None:
    plain = make(network, "rbf")
    detector = replace(plain, model=replace(plain.model, support=some_regions(9)))
    detector.save(tmp_path / "new")
    plain.save(tmp_path / "old")
    known = load_detector(tmp_path / "new").model.support
    assert known is not None
    assert detector.model.support is not None
    assert known.image_ids == detector.model.support.image_ids
    for name in ("boxes", "labels", "overlaps"):
        np.testing.assert_array_equal(getattr(known, name), getattr(detector.model.support, name))
    assert repr(known) == "TrainingRegions(9 of 5 images)"
    assert load_detector(tmp_path / "old").model.support is None
    with pytest.raises(ShapeError, match=r"^Model: support must tell of 9 regions, got 8\.$"):
        replace(plain.model, support=some_regions(8))
    with pytest.raises(ShapeError, match="must tell of 0 regions, got 9"):
        replace(make(network).model, support=some_regions(9))


def test_damaged_training_regions_are_told(network: Backbone, tmp_path: Path) -> None:
    plain = make(network, "rbf")
    broken = some_regions(9)
    object.__setattr__(
        broken, "to_arrays", lambda: TrainingRegions.to_arrays(broken) | {"ids": np.zeros(3, np.uint8)}
    )
    replace(plain, model=replace(plain.model, support=broken)).save(tmp_path)
    with pytest.raises(DataError, match="holds what is no detector"):
        load_detector(tmp_path)


@pytest.mark.parametrize("second_look", [0, 10])
def test_a_trace_finds_what_detect_finds_and_whence(
    network: Backbone, image: Image, second_look: int
) -> None:
    config = PostprocessConfig(second_look=second_look, box_step=0.5)
    detector = make(network, postprocess=config)
    found, regions = detector.trace(image, "x")
    same = detector.detect(image, "x")
    np.testing.assert_array_equal(found.boxes, same.boxes)
    np.testing.assert_array_equal(found.scores, same.scores)
    evidence = explain(detector, image, regions, found.labels)
    np.testing.assert_allclose([each.score for each in evidence], found.scores, atol=1e-5)
    assert len(found) > 3


def test_what_cannot_be_explained_is_told(network: Backbone, image: Image) -> None:
    class Nearest:
        def decision_function(self, features: np.ndarray) -> np.ndarray:
            return np.zeros((len(features), 3))

    other = make(network, EstimatorScorer("nearest", Nearest(), 3))
    with pytest.raises(
        ConfigError, match=r"^explain: a head must be linear, .* got 'nearest'\. Train another"
    ):
        explain(other, image, BOXES[:1], [0])
    detector = make(network)
    with pytest.raises(ConfigError, match=r"^explain: labels must lie in 0 \.\. 2, got 3 \.\. 3\.$"):
        explain(detector, image, BOXES[:1], [3])
    with pytest.raises(ShapeError, match=r"^explain: labels must have shape \(3,\), got \(1,\)\.$"):
        explain(detector, image, BOXES, [0])
    assert explain(detector, image, BOXES[:0], []) == []

    def best(*given: object) -> Detections:
        raise AssertionError

    with pytest.raises(
        ConfigError, match=r"^Detector\.trace: post-processing must be ours .* got best\. Name"
    ):
        replace(detector, postprocess=best).trace(image)
