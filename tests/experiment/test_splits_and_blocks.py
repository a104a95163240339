from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rcnn_svm.boxes import MIRRORED_DELTAS, encode_deltas
from rcnn_svm.datasets.digits import digits_splits
from rcnn_svm.detector import Model
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig, HeadsConfig
from rcnn_svm.experiment.data import absent_classes, load_data, too_small
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.regions import JoinedBlocks, SplitRegions, StoredBlocks
from rcnn_svm.experiment.selection import score_images, scored_once
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import FeatureStore
from rcnn_svm.heads.assign import FINETUNE_RULE, describe_regions
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.scorers import LinearScorer
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.structures import Dataset, GroundTruth, RegionSet, Sample


class Sides:
    """A featurizer that tells a region's width and height."""

    key = {"sides": 1}  # noqa: RUF012
    n_features = 2

    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        return (boxes[:, 2:] - boxes[:, :2]).astype(np.float32)


def test_ground_truth_comes_first_in_training_only(tmp_path: Path) -> None:
    dataset = digits_splits(3, 1, 1).train
    grid = np.array([[0, 0, 20, 10], [5, 5, 15, 45]], np.float32)
    proposals = {
        s.image_id: RegionSet(s.image_id, s.size, grid, np.arange(2, dtype=np.float32)) for s in dataset
    }
    training = SplitRegions.of(dataset, proposals, with_truth=True)
    testing = SplitRegions.of(dataset, proposals, with_truth=False)
    store = FeatureStore(tmp_path, Sides(), precision="float32")
    for i, sample in enumerate(dataset):
        n = len(sample.truth)
        assert training.n_gt[i] == n
        assert testing.n_gt[i] == 0
        np.testing.assert_array_equal(training.boxes[i][:n], sample.truth.boxes)
        np.testing.assert_array_equal(testing.boxes[i], grid)
        blocks = StoredBlocks(store, training)
        np.testing.assert_array_equal(blocks.features(i)[n:], [[20, 10], [10, 40]])
        truth = blocks.truth(i)
        assert truth.is_gt.sum() == n
        np.testing.assert_array_equal(truth.label[:n], sample.truth.labels)
        scaled = blocks.scaled(FeatureScaler("l2")).features(i)
        np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, rtol=1e-6)


def test_coverage_is_of_proposals_and_not_of_ground_truth_rows() -> None:
    dataset = digits_splits(2, 1, 1).train
    proposals = {}
    for s, share in zip(dataset, (0.6, 0.3), strict=True):
        part = s.truth.boxes.copy()
        part[:, 2] = part[:, 0] + share * (part[:, 2] - part[:, 0])
        proposals[s.image_id] = RegionSet(s.image_id, s.size, part, np.arange(len(part), dtype=np.float32))
    coverage = SplitRegions.of(dataset, proposals, with_truth=True).coverage()
    n = [len(s.truth) for s in dataset]
    np.testing.assert_allclose(coverage.overlap, np.repeat([[0.6], [0.3]], n, axis=0), atol=0.01)
    np.testing.assert_array_equal(coverage.labels, np.concatenate([s.truth.labels for s in dataset]))
    assert coverage.n_boxes == np.mean(n)
    nothing = {s.image_id: RegionSet(s.image_id, s.size, np.zeros((0, 4)), np.zeros(0)) for s in dataset}
    assert not SplitRegions.of(dataset, nothing, with_truth=True).coverage().overlap.any()


def test_thinning_leaves_objects_and_positives_and_draws_background() -> None:
    dataset = digits_splits(3, 1, 1).train
    rng = np.random.default_rng(0)
    proposals = {}
    for s in dataset:
        near = s.truth.boxes + rng.uniform(-1, 1, s.truth.boxes.shape).astype(np.float32)
        far = rng.uniform(0, 50, (40, 2)).astype(np.float32)
        boxes = np.concatenate([near, np.concatenate([far, far + 3], axis=1)])
        proposals[s.image_id] = RegionSet(s.image_id, s.size, boxes, np.arange(len(boxes), dtype=np.float32))
    regions = SplitRegions.of(dataset, proposals, with_truth=True)
    few = regions.thinned(FINETUNE_RULE, 7, seed=0)
    assert few.n_gt == regions.n_gt
    for i, sample in enumerate(dataset):
        n, n_classes = len(sample.truth), len(dataset.classes)
        np.testing.assert_array_equal(few.boxes[i][:n], sample.truth.boxes)
        before, after = (
            FINETUNE_RULE.multiclass(describe_regions(r.boxes[i], sample.truth, n_classes, n))
            for r in (regions, few)
        )
        assert ((after >= 0) & (after < n_classes)).sum() == ((before >= 0) & (before < n_classes)).sum()
        assert (after == n_classes).sum() == 7
        assert set(map(tuple, few.boxes[i])) <= set(map(tuple, regions.boxes[i]))
    again, other = (regions.thinned(FINETUNE_RULE, 7, seed=seed) for seed in (0, 1))
    assert all(map(np.array_equal, few.boxes, again.boxes))
    assert not all(map(np.array_equal, few.boxes, other.boxes))
    best = regions.limited(3)
    assert regions.limited(None) is regions
    for i, n in enumerate(regions.n_gt):
        np.testing.assert_array_equal(best.boxes[i], regions.boxes[i][: n + 3])
    everything = regions.thinned(FINETUNE_RULE, 10_000, seed=0)
    assert all(len(a) == len(b) for a, b in zip(everything.boxes, regions.boxes, strict=True))


def test_mirror_images_are_read_as_well_as_images(tmp_path: Path) -> None:
    dataset = digits_splits(2, 1, 1).train
    grid = np.array([[0, 0, 20, 10], [5, 5, 15, 45]], np.float32)
    proposals = {
        s.image_id: RegionSet(s.image_id, s.size, grid, np.arange(2, dtype=np.float32)) for s in dataset
    }
    regions = SplitRegions.of(dataset, proposals, with_truth=True)
    mirrored = regions.mirrored()
    assert mirrored.n_gt == (0, 0)
    for sample, other, boxes in zip(dataset, mirrored.dataset, mirrored.boxes, strict=True):
        np.testing.assert_array_equal(other.read(), sample.read()[:, ::-1])
        width = sample.size[1]
        np.testing.assert_array_equal(boxes, [[width - 20, 0, width, 10], [width - 15, 5, width - 5, 45]])
        assert other.digest() != sample.digest()

    training = SplitRegions.of(dataset, proposals, with_truth=True)
    mirrored = training.mirrored(with_truth=True)
    assert mirrored.n_gt == training.n_gt
    store = FeatureStore(tmp_path, Sides(), precision="float32")
    joined = JoinedBlocks([StoredBlocks(store, training), StoredBlocks(store, mirrored)])
    assert (len(joined), joined.classes, joined.n_features) == (4, dataset.classes, 2)
    for i in range(2):
        np.testing.assert_array_equal(joined.features(i), joined.features(i + 2))
        one, other = joined.truth(i), joined.truth(i + 2)
        np.testing.assert_array_equal(one.label, other.label)
        np.testing.assert_array_equal(one.is_gt, other.is_gt)
        np.testing.assert_allclose(one.overlap, other.overlap, atol=1e-6)
        # Targets are mirrored with the boxes.
        hit = one.label >= 0
        shifts = (encode_deltas(t.boxes[hit], t.target[hit]) for t in (one, other))
        np.testing.assert_allclose(next(shifts), next(shifts) * MIRRORED_DELTAS, atol=1e-5)

    rng = np.random.default_rng(0)
    boxes = BoxRegressor.from_arrays(
        {"coef": rng.normal(size=(3, 4, 5)).astype(np.float32), "intercept": np.zeros((3, 4), np.float32)}
    )
    scorer = LinearScorer(rng.normal(size=(3, 5)).astype(np.float32), np.zeros(3, np.float32))
    model = Model(scorer, None, boxes)
    rows, others = rng.normal(size=(2, 4, 5)).astype(np.float32)
    scores, deltas = model.read(rows, others)
    np.testing.assert_allclose(scores, model.scores((rows + others) / 2), rtol=1e-4, atol=1e-5)
    own, seen = model.deltas(rows), model.deltas(others)
    np.testing.assert_allclose(deltas[..., 0], (own[..., 0] - seen[..., 0]) / 2, atol=1e-6)
    np.testing.assert_allclose(deltas[..., 1:], (own[..., 1:] + seen[..., 1:]) / 2, atol=1e-6)
    np.testing.assert_array_equal(model.read(rows, None)[0], model.scores(rows))
    limit = float(np.median(scores.max(axis=1)))
    same, few = model.read(rows, others, limit)
    kept = (scores >= limit).any(axis=1)
    assert 0 < kept.sum() < len(kept)
    np.testing.assert_array_equal(same, scores)
    np.testing.assert_allclose(few[kept], deltas[kept], atol=1e-6)
    assert not few[~kept].any()


def test_absent_classes_are_left_out_where_wanted(
    digits_in_voc: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (digits_in_voc / "VOC2007" / "classes.txt").write_text("zebra\n" + "\n".join("0123456789") + "\n")
    splits = load_data(DataConfig(path=str(digits_in_voc)), seed=0)
    assert absent_classes(splits) == ["zebra"]
    kept = load_data(DataConfig(path=str(digits_in_voc), skip_absent_classes=True), seed=0)
    assert kept.train.classes == tuple("0123456789")
    assert "left out: zebra" in capsys.readouterr().err
    for before, after in zip(splits.train, kept.train, strict=True):
        np.testing.assert_array_equal(before.truth.labels, after.truth.labels + 1)
        np.testing.assert_array_equal(before.truth.boxes, after.truth.boxes)


def test_digits_that_a_few_scenes_do_not_show_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    splits = load_data(DataConfig(path="digits", max_images=1), seed=0)
    assert 0 < len(splits.train.classes) < 10
    assert absent_classes(splits) == []
    assert {part.classes for part in (splits.val, splits.trainval, splits.test)} == {splits.train.classes}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The draw of 1 from 400 images for train has no object of ")


@pytest.fixture
def digits_in_voc(tmp_path: Path) -> Path:
    from rcnn_svm.datasets.write import write_dataset

    splits = digits_splits(14, 2, 2)
    return write_dataset((splits.train, splits.val, splits.test), tmp_path / "voc", "voc")


def test_the_meter_forgets_earlier_peaks() -> None:
    with Meter() as first:
        block = np.ones(30_000_000)
        del block
    with Meter() as second:
        pass
    assert first.seconds > second.seconds >= 0
    assert first.peak_rss_mb > second.peak_rss_mb + 100


def test_a_megabyte_is_a_million_bytes() -> None:
    n = 400_000_000
    with Meter() as without:
        pass
    with Meter() as with_it:
        block = np.ones(n, np.uint8)
        del block
    assert with_it.peak_rss_mb - without.peak_rss_mb == pytest.approx(n / 1e6, abs=8)


def test_a_part_of_a_split_shares_its_boxes() -> None:
    whole = digits_splits(3, 2, 1).trainval
    box = np.array([[0, 0, 20, 10]], np.float32)
    proposals = {s.image_id: RegionSet(s.image_id, s.size, box, np.zeros(1, np.float32)) for s in whole}
    regions = SplitRegions.of(whole, proposals, with_truth=True)
    val = replace(whole, samples=whole.samples[3:])
    part = regions.part(val)
    assert part.dataset is val
    assert part.n_gt == regions.n_gt[3:]
    assert all(a is b for a, b in zip(part.boxes, regions.boxes[3:], strict=True))


def test_scores_kept_on_disk_are_those_of_the_model(tmp_path: Path) -> None:
    dataset = digits_splits(2, 1, 1).train
    grid = np.array([[0, 0, 20, 10], [5, 5, 15, 45]], np.float32)
    proposals = {
        s.image_id: RegionSet(s.image_id, s.size, grid[: i + 1], np.zeros(i + 1, np.float32))
        for i, s in enumerate(dataset)
    }
    store = FeatureStore(tmp_path, Sides(), precision="float32")
    blocks = StoredBlocks(store, SplitRegions.of(dataset, proposals, with_truth=True))
    k = len(dataset.classes)
    scorer = LinearScorer(np.arange(2 * k, dtype=np.float32).reshape(k, 2), np.zeros(k, np.float32))
    model = Model(scorer, None)
    coef, intercept = np.ones((k, 4, 2), np.float32), np.zeros((k, 4), np.float32)
    regressor = BoxRegressor.from_arrays({"coef": coef, "intercept": intercept})
    with scored_once(blocks, model) as scored:
        for _ in range(2):  # as often as one likes
            for expected, found in zip(score_images(blocks, model), scored, strict=True):
                np.testing.assert_array_equal(found.boxes, expected.boxes)
                np.testing.assert_array_equal(found.scores, expected.scores)
                assert found.deltas is None
        with_boxes = replace(scored, boxes_by=replace(model, regressor=regressor))
        assert [image.deltas.shape for image in with_boxes] == [(1, k, 4), (2, k, 4)]
    assert scored.file.closed
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".npy"}


def test_objects_that_no_region_reaches_are_told():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 60, 60], [0, 0, 15, 19], [0, 0, 5, 90]], np.float32)
    truth = GroundTruth(boxes, np.zeros(4, np.int64))
    dataset = Dataset("dots", "train", ("dot",), (Sample("a", (99, 99), truth),))
    assert too_small(dataset, 20) == (
        "dots: 2 of 4 training objects are smaller than proposals.min_size = 20 and out of reach of any "
        "region. Try --set proposals.min_size=4."
    )
    assert too_small(dataset, 5) is None
    assert too_small(replace(dataset, samples=()), 20) is None


def test_folds_are_held_out_where_val_tells_too_little(rng: np.random.Generator) -> None:
    """Val has to hold 50 objects, other images than train, and to be asked for no rare event."""
    from rcnn_svm.experiment.choosing import decidable, held_out_parts

    box = np.array([[0, 0, 10, 10]], np.float32)

    def regions(split: str, first: int, n: int) -> SplitRegions:
        truth = GroundTruth(np.tile(box, (10, 1)), np.zeros(10, np.int64))
        samples = tuple(Sample(str(i), (20, 20), truth) for i in range(first, first + n))
        dataset = Dataset("boxes", split, ("a",), samples)
        proposals = {s.image_id: RegionSet(s.image_id, s.size, box, np.zeros(1, np.float32)) for s in samples}
        return SplitRegions.of(dataset, proposals, with_truth=True)

    trainval, train = regions("trainval", 0, 12), regions("train", 0, 7)
    val, small = regions("val", 7, 5), regions("val", 7, 4)

    def held(train: SplitRegions, val: SplitRegions, **settings: object) -> list[int]:
        parts = ExperimentConfig(**settings).build()
        return [len(out) for _, out in held_out_parts(parts, trainval, train, val)]

    assert held(train, val) == [5]
    assert held(train, small) == [4, 4, 4]
    assert held(trainval, regions("val", 0, 12)) == [4, 4, 4]
    assert held(train, val, false_alarms=0.1) == held(train, val, precision=0.9) == [4, 4, 4]
    assert held(train, val, false_alarms=0.1, folds=1) == [5]
    assert held(train, val, folds=6) == [2] * 6
    assert held(train, val, folds=0) == []

    parts, told = ExperimentConfig().build(), ExperimentConfig(detect=PostprocessConfig(box_step=0.7)).build()
    assert decidable(parts, [(train, val)]) is parts
    unlearned = ExperimentConfig(learn="nothing", heads=HeadsConfig(names=("linear-svm",))).build()
    assert decidable(unlearned, [(train, small)]) is unlearned
    unasked = ExperimentConfig(folds=0).build()
    assert decidable(unasked, []) is unasked
    assert decidable(parts, [(train, small), (train, regions("val", 20, 1))]) is parts
    for own in (parts, told):
        detect = own.postprocess
        assert isinstance(detect, PostprocessConfig)
        for few in (decidable(own, [(train, small)]), decidable(own, [])):
            assert few.postprocess == replace(detect, refined=0)
            assert (tuple(few.tried.box_steps), few.tried.unmoved) == ((detect.box_step,), False)
