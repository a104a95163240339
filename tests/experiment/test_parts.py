"""Parts of one's own through a whole experiment, a saved detector and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rcnn_svm import (
    EstimatorHead,
    ExperimentConfig,
    GridConfig,
    HeadRecipe,
    Run,
    load_detector,
    load_splits,
    run_experiment,
    train_detector,
)
from rcnn_svm.boxes import draw_to_regions
from rcnn_svm.config import with_overrides
from rcnn_svm.contracts import check_featurizer
from rcnn_svm.datasets.loading import Splits
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.experiment.config import PRESETS, DataConfig
from rcnn_svm.experiment.learning import FcOnFrozen, Frozen, Network, rows_around_objects, settled
from rcnn_svm.experiment.parts import PostprocessGrid
from rcnn_svm.experiment.regions import SplitRegions
from rcnn_svm.features.build import FeatureConfig, build_featurizer
from rcnn_svm.features.featurizers import SharedFeatures
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.postprocess import MARGINS_OVERLAP_POWER, OVERLAP_POWER, PostprocessConfig
from rcnn_svm.report.experiment import write_experiment
from rcnn_svm.structures import Dataset, GroundTruth, RegionSet, Sample
from rcnn_svm.training.config import FEW_IMAGES, FcConfig, RefineConfig

SETTINGS = [
    "features.backbone=small_cnn",
    "features.weights=random",
    "features.path=warped",
    "proposals.max_regions=40",
    "proposals.min_size=10",
    "learn=nothing",
    "folds=0",
    "n_bootstrap=10",
]


@pytest.fixture(scope="module")
def config() -> ExperimentConfig:
    return with_overrides(ExperimentConfig(), None, SETTINGS)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory):
    from rcnn_svm.cli import main

    folder = tmp_path_factory.mktemp("digits") / "yolo"
    sizes = ["--train", "10", "--val", "4", "--test", "4"]
    assert main(["data", "digits", "--out", str(folder), "--format", "yolo", *sizes]) == 0
    return load_splits(folder)


class Colours:
    """A featurizer of one's own: means and deviations of a region's colours."""

    name = "colours"
    key, n_features = {"colours": 1}, 6

    def of_image(self, image):
        return lambda boxes: self(image, boxes)

    def __call__(self, image, boxes):
        rows = [np.zeros((0, 6), np.float32)]
        for x1, y1, x2, y2 in boxes.astype(int):
            pixels = image[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].reshape(-1, 3) / 255
            rows.append(np.concatenate([pixels.mean(axis=0), pixels.std(axis=0)])[None].astype(np.float32))
        return np.concatenate(rows)


class Centroids:
    def fit(self, X, y):
        self.means = np.stack([X[y == k].mean(axis=0) for k in np.unique(y)])

    def decision_function(self, X):
        return -np.linalg.norm(X[:, None] - self.means, axis=2)


def same(first, second, sample) -> None:
    image = sample.read()
    a, b = first.detect(image), second.detect(image)
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-4)


def test_a_grid_is_a_proposer_like_any_other(config, splits, tmp_path: Path) -> None:
    result = train_detector(splits, config.build(heads=["linear-svm"], proposer=GridConfig(60)))
    result.detector.save(tmp_path)
    again = load_detector(tmp_path)
    assert again.proposer == GridConfig(60)
    same(again, result.detector, splits.test.samples[0])


def test_no_more_proposals_are_looked_at_than_were(config, splits, tmp_path: Path) -> None:
    parts = replace(config, test_regions=7).build(heads=["linear-svm"], proposer=GridConfig(60))
    result = train_detector(splits, parts)
    result.detector.save(tmp_path)
    assert load_detector(tmp_path).n_proposals == 7


def test_a_featurizer_of_ones_own(config, splits, tmp_path: Path) -> None:
    check_featurizer(Colours())
    result = train_detector(splits, config.build(heads=["linear-svm"], featurizer=Colours()))
    result.detector.save(tmp_path)
    assert not list(tmp_path.glob("backbone.*"))
    with pytest.raises(DataError, match=r"with the network or featurizer 'colours', which is not one of"):
        load_detector(tmp_path)
    same(load_detector(tmp_path, parts={"colours": Colours()}), result.detector, splits.test.samples[0])


@pytest.mark.parametrize("learn", ["trunk", "network"])
def test_what_trains_a_network_wants_one(config, learn: str) -> None:
    with pytest.raises(ConfigError, match=f"^learn={learn} trains a network, which a featurizer of your own"):
        replace(config, learn=learn).build(featurizer=Colours())


def test_an_estimator_without_arrays_is_brought_back_as_it_is(config, splits, tmp_path: Path) -> None:
    head = HeadRecipe("centroids", EstimatorHead(name="centroids", estimator=Centroids()))
    result = train_detector(splits, config.build(heads=[head]))
    result.detector.save(tmp_path)
    mine = result.detector.model.scorer.estimator  # type: ignore[attr-defined]
    same(load_detector(tmp_path, parts={"centroids": mine}), result.detector, splits.test.samples[0])


def test_the_report_says_what_was_not_ours(config, splits, tmp_path: Path) -> None:
    def counted(detections, truths, classes):
        return {"boxes": float(sum(map(len, detections)))}

    head = HeadRecipe("centroids", EstimatorHead(name="centroids", estimator=Centroids()))
    parts = config.build(heads=["linear-svm", head], proposer=GridConfig(30), evaluators=[counted])
    experiment = run_experiment(parts, splits, Run(tmp_path / "cache"))
    write_experiment(tmp_path / "report", experiment, command="python mine.py")
    values = json.loads((tmp_path / "report" / "config.json").read_text())
    assert values["own"] == {
        "heads": ["linear-svm", "centroids"],
        "proposer": "GridConfig",
        "evaluators": ["counted"],
    }
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert set(metrics["heads"]) == {"linear-svm", "linear-svm+bbox", "centroids", "centroids+bbox"}
    assert metrics["heads"]["centroids"]["measures"]["boxes"] > 0
    table = (tmp_path / "report" / "README.md").read_text().splitlines()
    assert any("boxes" in [cell.strip() for cell in line.split("|")] for line in table)


def test_representations_are_short(config, splits) -> None:
    result = train_detector(splits, config.build(heads=["linear-svm"]))
    for thing in (result, result.detector, result.evaluation, result.coco, splits.test, result.detections[0]):
        assert len(repr(thing)) < 200, thing


def test_detections_under_the_names_of_torchvision(config, splits) -> None:
    found = train_detector(splits, config.build(heads=["linear-svm"])).detections[0]
    assert {name: len(column) for name, column in found.to_dict().items()} == dict.fromkeys(
        ("boxes", "labels", "scores"), len(found)
    )


@pytest.mark.parametrize(
    ("taps", "n_own"),
    [
        ("block13@2x2,block13@1x1,block13@1x1*1.8,block13@3x3", 5),
        ("block13@1x1*image,block13@2x2", 0),
        ("block13@2x2", None),
    ],
)
def test_what_is_read_around_a_region_keeps_its_length(config, splits, taps: str, n_own: int | None) -> None:
    features = FeatureConfig("mobilenet_v2", "random", "shared", taps, longer_sides=(64,))
    few = replace(config, features=features, learn="fc", fc=FcConfig((8,), n_steps=2, other_sides=()))
    few = replace(few, detect=replace(few.detect, refined=0))
    detector = train_detector(splits, few.build(heads=["softmax-finetuned"])).detector
    assert isinstance(detector.featurizer, SharedFeatures)
    assert detector.layers is not None
    n_channels = detector.featurizer.backbone.n_features(TapSpec("block13", (1, 1)))
    n_scaled = None if n_own is None else n_own * n_channels
    assert (detector.layers.scaling, detector.layers.n_scaled) == ("l2", n_scaled)


@pytest.mark.parametrize(
    ("head", "asked", "power"),
    [
        ("softmax-finetuned", None, OVERLAP_POWER),
        ("linear-svm", None, MARGINS_OVERLAP_POWER),
        ("linear-svm", 2.5, 2.5),
    ],
)
def test_an_estimated_iou_counts_less_beside_margins(
    config, splits, head: str, asked: float | None, power: float
) -> None:
    features = FeatureConfig("mobilenet_v2", "random", "shared", "block13", longer_sides=(64,))
    refine = RefineConfig("block10@2x2*1.2", 8, n_steps=2)
    detect = replace(config.detect, refined=5, overlap_power=asked)
    own = replace(config, features=features, learn="fc", folds=0, detect=detect, refine=refine)
    own = replace(own, fc=FcConfig((8,), n_steps=2, other_sides=()))
    taken = train_detector(splits, own.build(heads=[head])).detector.postprocess
    assert isinstance(taken, PostprocessConfig)
    assert (taken.refined, taken.overlap_power) == (5, power)


@pytest.mark.parametrize("snaps", [(0.0,), (0.4,), (0.0, 0.4)])
def test_held_out_images_decide_how_far_refined_boxes_are_drawn(config, splits, snaps) -> None:
    features = FeatureConfig("mobilenet_v2", "random", "shared", "block13", longer_sides=(64,))
    refine = RefineConfig("block10@2x2*1.2", 8, n_steps=2)
    own = replace(config, features=features, learn="fc", folds=1, refine=refine)
    own = replace(own, fc=FcConfig((8,), n_steps=2, other_sides=()), detect=replace(config.detect, refined=5))
    tried = PostprocessGrid(box_steps=(0.5,), snaps=snaps, unrefined=False, unmoved=False)
    result = train_detector(splits, own.build(heads=["softmax-finetuned"], tried=tried))
    detect = result.detector.postprocess
    assert isinstance(detect, PostprocessConfig)
    assert detect.snap in snaps
    assert detect.snap == result.details["settings"]["snap"]
    image = splits.test.samples[0].read()
    proposals = result.detector.proposer.propose(image).boxes
    unsnapped = replace(result.detector, postprocess=replace(detect, snap=0.0)).detect(image)
    drawn = draw_to_regions(unsnapped.boxes, proposals, detect.snap)
    np.testing.assert_array_equal(result.detector.detect(image).boxes, drawn)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("learn", ["nothing", "fc", "network"])
def test_another_device_finds_the_same(config, splits, tmp_path: Path, learn: str) -> None:
    parts = replace(config, learn=learn).build(heads=["linear-svm"])
    result = train_detector(splits, parts, run=Run(tmp_path / "cache", device="cuda"))
    result.detector.save(tmp_path / "detector")
    there, here = (load_detector(tmp_path / "detector", device=device) for device in ("cuda", "cpu"))
    image = splits.test.samples[0].read()
    first, second = there.detect(image), here.detect(image)
    assert abs(first.scores[0] - second.scores[0]) < 0.05


def images(n: int, n_classes: int = 2, side: float = 0.5) -> Dataset:
    """Return images of 300 x 400 pixels with one object each, whose side is a share of the longer one."""
    box = np.array([[0, 0, 400 * side, 400 * side]], np.float32)
    truth = GroundTruth(box, np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(1, bool))
    classes = tuple(f"class {k}" for k in range(n_classes))
    return Dataset("made", "trainval", classes, tuple(Sample(str(i), (300, 400), truth) for i in range(n)))


def fc_of(config: ExperimentConfig, trainval: Dataset) -> FcConfig:
    learner = settled(config.build(heads=["softmax-finetuned"]), trainval).learner
    assert isinstance(learner, FcOnFrozen)
    return learner.fc


def test_few_images_are_learned_from_in_another_way(capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig()
    few, many = (fc_of(config, images(n)) for n in (FEW_IMAGES - 1, FEW_IMAGES))
    said = "99 images are few: they are learned from with longer sides of 384 and 640"
    assert capsys.readouterr().err.count(said) == 1
    assert (few.other_sides, many.other_sides) == ((384, 640), ())
    assert (few.scaling, many.scaling) == ("region-l2", "region-l2")
    assert (few.groups, many.groups) == (4, 1)
    for n_images, n_classes, negative_iou in ((2, 2, 0.3), (3, 2, 0.5), (FEW_IMAGES, FEW_IMAGES, 0.5)):
        assert fc_of(config, images(n_images, n_classes)).rule.negative_iou == negative_iou
    for told in ({"negative_iou": 0.4}, {"positive_iou": 0.2, "negative_iou": 0.1}, {"negative_low": 0.3}):
        fc = FcConfig(**told)
        assert fc_of(ExperimentConfig(fc=fc), images(1)).rule == fc.rule
    assert fc_of(ExperimentConfig(fc=FcConfig((3,))), images(1)).groups == 3
    large = ExperimentConfig(features=FeatureConfig(longer_sides=(600, 300)))
    assert fc_of(large, images(1)).other_sides == (480, 800)
    assert fc_of(ExperimentConfig(fc=FcConfig(other_sides=(320,))), images(1)).other_sides == (320,)
    quick = fc_of(PRESETS["quick"].apply(ExperimentConfig()), images(1))
    assert (quick.other_sides, quick.scaling, quick.groups) == ((), "region-l2", 1)
    assert quick.rule.negative_iou == 0.5


@pytest.mark.parametrize(
    ("config", "side", "sides"),
    [
        (ExperimentConfig(), 0.3, (320, 640)),
        (ExperimentConfig(), 1 / 3 + 0.001, (480,)),
        (ExperimentConfig(choose=True), 0.3, (480,)),
        (ExperimentConfig(learn="nothing"), 0.3, (480,)),
        (ExperimentConfig(learn="trunk"), 0.3, (480,)),
        (ExperimentConfig(data=DataConfig(whole_images=True)), 0.3, (480,)),
        (ExperimentConfig(features=FeatureConfig(resolution=300)), 0.3, (200, 400)),
        (ExperimentConfig(features=FeatureConfig(resolution=300)), 0.4, (300,)),
        (ExperimentConfig(features=FeatureConfig(longer_sides=(200,))), 0.3, (200,)),
        (PRESETS["quick"].apply(ExperimentConfig()), 0.3, (320, 640)),
        (PRESETS["best"].apply(ExperimentConfig()), 0.3, (640, 960)),
        (PRESETS["best"].apply(ExperimentConfig()), 0.4, (640,)),
        (ExperimentConfig(features=FeatureConfig(path="warped")), 0.3, None),
    ],
)
def test_images_with_small_objects_are_read_at_two_sizes(
    config: ExperimentConfig, side: float, sides: tuple[int, ...] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = settled(config.build(heads=["linear-svm"]), images(FEW_IMAGES, side=side))
    assert parts.features.longer_sides == sides
    decided = sides is not None and len(sides) == 2
    assert ("Half of the objects are smaller than 30%" in capsys.readouterr().err) is decided


def test_objects_that_are_not_learned_from_decide_no_size() -> None:
    small = images(FEW_IMAGES, side=0.3)
    truth = small.samples[0].truth
    for unlearned in (replace(truth, difficult=np.ones(1, bool)), replace(truth, crowd=np.ones(1, bool))):
        alone = replace(small, samples=tuple(replace(s, truth=unlearned) for s in small))
        assert settled(ExperimentConfig().build(), alone).features.longer_sides == (480,)


@pytest.mark.parametrize("side", [0.2, 0.6])
def test_a_saved_detector_reads_images_as_it_was_trained(splits, tmp_path: Path, side: float) -> None:
    def sized(dataset: Dataset) -> Dataset:
        samples = []
        for s in dataset:
            low = np.minimum(s.truth.boxes[:, :2], (1 - side) * max(s.size) - 1)
            boxes = np.concatenate([low, low + np.float32(side * max(s.size))], axis=1).astype(np.float32)
            samples.append(replace(s, truth=replace(s.truth, boxes=boxes)))
        return replace(dataset, samples=tuple(samples))

    own = Splits(*(sized(getattr(splits, name)) for name in ("train", "val", "trainval", "test")))
    settings = ["features.backbone=mobilenet_v2", "features.weights=random", "features.taps=block17@1x1"]
    settings += ["fc.n_steps=2", "fc.hidden=[4]", "folds=0", "proposals.max_regions=10", "detect.refined=0"]
    parts = with_overrides(ExperimentConfig(), None, settings).build(heads=["softmax-finetuned"])
    detector = train_detector(own, parts).detector
    detector.save(tmp_path / "detector")
    restored = load_detector(tmp_path / "detector")
    sides = (320, 640) if side < 1 / 3 else (480,)
    assert detector.features.longer_sides == restored.features.longer_sides == sides
    assert isinstance(restored.featurizer, SharedFeatures)
    assert restored.featurizer.longer_sides == sides
    same(detector, restored, own.test.samples[0])


def test_boxes_are_refined_on_the_sizes_that_regions_are_read_at(splits, tmp_path: Path) -> None:
    """One pass is for both, whatever sizes a configuration that is not settled would stand for."""
    features = FeatureConfig("mobilenet_v2", "random", "shared", "block13")
    parts = ExperimentConfig(features=features, refine=RefineConfig("block10@2x2*1.2")).build()
    assert parts.features.longer_sides is None
    featurizer = build_featurizer(replace(features, longer_sides=(96, 128)))
    network = Network(featurizer.backbone, featurizer, None, 0.0, 0.0)
    proposals = {
        s.image_id: RegionSet(s.image_id, s.size, s.truth.boxes, np.zeros(len(s.truth), np.float32))
        for s in splits.train
    }
    regions = SplitRegions.of(splits.train, proposals, with_truth=True)
    around = rows_around_objects(parts, network, regions, Run(tmp_path))
    read_by = around.store.featurizer
    assert isinstance(read_by, SharedFeatures)
    assert read_by.longer_sides == (96, 128)


def test_what_is_not_learned_on_shared_maps_says_nothing_of_few_images(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for unable in (
        ExperimentConfig(features=FeatureConfig(path="warped")),
        ExperimentConfig(data=DataConfig(whole_images=True)),
    ):
        assert not fc_of(unable, images(1)).other_sides
    assert (
        settled(ExperimentConfig(learn="nothing").build(heads=["linear-svm"]), images(1)).learner == Frozen()
    )
    assert capsys.readouterr().err == ""
