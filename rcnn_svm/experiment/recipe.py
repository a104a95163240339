"""The experiment, top to bottom: data, proposals, features, learning, heads, detections, figures.

`run_experiment` chooses every setting by training on `train` and measuring on `val`, trains again
on `trainval`, and looks at `test` once. All heads see the same regions and the same features.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rcnn_svm.cache import CacheLimit, size_limit
from rcnn_svm.datasets import Splits, draw_folds
from rcnn_svm.detector import Detector, Look, Model, look_at
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.coco import CocoResult, evaluate_coco
from rcnn_svm.evaluation.thresholds import Thresholds, choose_thresholds
from rcnn_svm.evaluation.voc import EvalResult, Rule, evaluate_voc
from rcnn_svm.experiment.config import ExperimentConfig, HeadName
from rcnn_svm.experiment.data import absent_classes
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.experiment.representation import (
    Network,
    Representation,
    learn_layers,
    learning_views,
    prepare_network,
)
from rcnn_svm.experiment.selection import (
    Choice,
    choose_head,
    choose_postprocess,
    choose_regressor,
    detected,
    scored_once,
    settled,
    train_candidates,
)
from rcnn_svm.features.backbone import load_backbone
from rcnn_svm.features.build import build_featurizer
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import FeatureStore, to_float32
from rcnn_svm.features.taps import format_taps
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.progress import Stages, note, track
from rcnn_svm.proposals import ProposalRecall, SelectiveSearchConfig, cached_proposals
from rcnn_svm.structures import Dataset, Detections, RegionSet

__all__ = [
    "Experiment",
    "HeadResult",
    "SplitEstimate",
    "estimate_experiment",
    "propose",
    "run_experiment",
    "stages_of",
    "train_detector",
]

FINETUNED: HeadName = "softmax-finetuned"


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What one head reached on the test split.

    Attributes:
        detector: trained on trainval, ready to be saved; `detector.head` is its name, with
            `+bbox` where box regression is on.
        detections: one record per test image.
        evaluation: VOC AP of them.
        coco: COCO's measures of them, which also say how closely boxes fit.
        train_s: wall clock of the final training on trainval.
        score_s_per_image: scoring, regression and NMS of an image's regions, mean over test; with
            `detect.second_look` the features of the regions that are looked at again as well.
        peak_rss_mb: largest memory of the process during the final training.
        details: chosen settings, validation mAP, what was tried, support vectors and the like.
        preferred: whether this variant of its head, without or with box regression, did better on the images
            that were held out; with it where none were.
    """

    detector: Detector
    detections: list[Detections]
    evaluation: EvalResult
    coco: CocoResult
    train_s: float
    score_s_per_image: float
    peak_rss_mb: float
    details: dict[str, Any]
    preferred: bool


@dataclass(frozen=True, eq=False)
class Experiment:
    """A finished experiment.

    Attributes:
        config: as it was run.
        splits: the images.
        heads: results by name, in the order of the configuration.
        stages_s: wall clock of proposals, features, choose, train (fine-tuning of the network included) and
            detect; 0 for one that the configuration leaves out.
        coverage: how well the proposals of trainval cover its objects, all regions of an image counted.
    """

    config: ExperimentConfig
    splits: Splits
    heads: dict[str, HeadResult]
    stages_s: dict[str, float]
    coverage: ProposalRecall


def propose(dataset: Dataset, config: ExperimentConfig, cache: Path, *, n_jobs: int) -> dict[str, RegionSet]:
    """Return the region proposals of every image by its id, from the cache where they lie there."""
    regions = cached_proposals(dataset.samples, config.proposals, cache / "proposals", n_jobs=n_jobs)
    return {region_set.image_id: region_set for region_set in regions}


def stages_of(config: ExperimentConfig) -> tuple[str, ...]:
    """Return the names of the stages that `run_experiment` goes through, in order."""
    features = () if config.learn == "trunk" else ("features",)  # read while the network is tuned
    choose = ("choose",) if config.choose or config.folds != 0 else ()
    return ("proposals", "network", *features, *choose, "train", "detect")


def run_experiment(
    config: ExperimentConfig,
    splits: Splits,
    cache: Path,
    *,
    n_jobs: int,
    cache_limit: int | None = None,
    finished: Callable[[HeadResult], None] | None = None,
    stages: Stages | None = None,
) -> Experiment:
    """Run an experiment on `splits`.

    Args:
        config: what to do.
        splits: train, val, trainval and test of one data set.
        cache: folder of proposals, features and fine-tuned networks, kept between runs.
        n_jobs: threads where work is independent.
        cache_limit: bytes that the cache may take; room is made before the first stage, between stages and at
            the end, and what this run uses stays until then. None keeps everything.
        finished: called with each result as soon as it is there, so that it can be kept.
        stages: of a run that this is a part of, those of `stages_of` among them; None for a run of its own.

    Raises:
        ConfigError: a head that the configuration gives nothing to work on.
        DataError: a class without an object to train on, a split without images, a broken image.
    """
    _require_objects(splits)
    if config.learn == "nothing" and FINETUNED in config.heads.names:
        raise ConfigError(
            f"heads.names: {FINETUNED} needs something that is fine-tuned. Set learn=fc or learn=network, "
            f"or leave the head out."
        )
    room = CacheLimit(cache, cache_limit)
    stages = stages or Stages(stages_of(config))
    n_images = len(splits.trainval) + len(splits.test)
    with stages("proposals", f"boxes in which an object may be, in {n_images} images"):
        proposals = propose(splits.trainval, config, cache, n_jobs=n_jobs)
        test_proposals = propose(splits.test, config, cache, n_jobs=n_jobs)
    room.hold()
    trainval = SplitRegions.of(splits.trainval, proposals, with_truth=True)
    train, val = trainval.part(splits.train), trainval.part(splits.val).limited(config.test_regions)
    test = SplitRegions.of(splits.test, test_proposals, with_truth=False).limited(config.test_regions)

    tuned = f"fine-tuned on {len(train)} images of {train.dataset.split}"
    how = tuned if config.learn == "network" else "with its weights"
    with stages("network", f"{config.features.backbone}, {how}"):
        network = prepare_network(config, train, proposals, cache)
    del proposals, test_proposals  # the splits keep the boxes, once: 16 bytes a region
    base = FeatureStore(cache / "features", network.featurizer, precision=config.features.precision)
    if config.learn != "trunk":  # which reads few regions before the network is tuned
        with stages("features", "what the network makes of each region"):
            if config.learn != "fc" or config.reads_all_rows:
                base.fill(trainval.dataset.samples, trainval.boxes, "features of trainval")
            base.fill(test.dataset.samples, test.boxes, "features of test")

    room.hold()
    chosen = None
    if config.choose:
        with stages("choose", f"settings, by training on {len(train)} images and measuring on {len(val)}"):
            chosen = _choose(config, network, base, train, val, cache, n_jobs)
    elif parts := held_out_parts(config, trainval, train, val):
        n_held = sum(len(held) for _, held in parts)
        times = "a first training" if len(parts) == 1 else f"{len(parts)} trainings"
        with stages("choose", f"thresholds, and how far boxes move, on {n_held} images left out of {times}"):
            chosen = _hold_out(config, network, base, parts, cache, n_jobs)
    room.hold()
    with stages(
        "train", f"{', '.join(config.heads.names)} on {len(trainval)} images of {trainval.dataset.split}"
    ):
        final = learn_layers(config, network, base, trainval, cache)
        chosen = chosen or _settled(config, final)
        if set(chosen) != {FINETUNED} or _needs_ridge(chosen):
            final.fill(trainval)
        trained = _train(config, final, trainval, chosen, n_jobs)
    room.hold()

    with stages("detect", f"{len(test)} images of {test.dataset.split}, looked at once"):
        views = views_of(config, test)
        for view in views:
            final.fill(view)
        results: dict[str, HeadResult] = {}
        for head in trained:
            for result in _results(head, config, final, [final.blocks(view) for view in views]):
                results[result.detector.head] = result
                if finished is not None:
                    finished(result)
    seconds = {
        name: stages.seconds.get(name, 0.0) for name in ("proposals", "features", "choose", "train", "detect")
    }
    seconds["train"] += network.finetune_s
    room.hold(finished=True)
    return Experiment(config, splits, results, seconds, trainval.coverage())


def train_detector(
    splits: Splits,
    head: HeadName = FINETUNED,
    *,
    config: ExperimentConfig | None = None,
    cache: Path | None = None,
    n_jobs: int = 1,
) -> HeadResult:
    """Train one head on `splits` and measure it on the test split, with box regression where it does no harm.

    Args:
        splits: as `load_splits` returns them.
        head: one of `experiment.config.HEADS`.
        config: the defaults where None.
        cache: folder of proposals and features, held within `rcnn_svm.cache.size_limit`; a temporary one
            where None.
        n_jobs: threads where work is independent.

    Raises:
        ConfigError: an unknown head.
        DataError: as `run_experiment`.
    """
    config = config or ExperimentConfig()
    config = replace(config, heads=replace(config.heads, names=(head,)))
    with contextlib.ExitStack() as stack:
        limit = None
        if cache is None:
            cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            limit = size_limit(cache)
        experiment = run_experiment(config, splits, cache, n_jobs=n_jobs, cache_limit=limit)
    return next(result for result in experiment.heads.values() if result.preferred)


@dataclass(frozen=True)
class SplitEstimate:
    """What the proposals and features of a split will cost, where nothing of them is cached.

    Attributes:
        split: its name.
        n_images: of the split.
        n_probes: images of it that were measured.
        proposals_s: seconds on one core.
        features_s: seconds of wall clock.
        n_bytes: of features on disk.
        peak_bytes: of features in memory at once.
    """

    split: str
    n_images: int
    n_probes: int
    proposals_s: float
    features_s: float
    n_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.split}, from {self.n_probes} of {self.n_images} images: proposals "
            f"{self.proposals_s:.0f} s on one core, features {self.features_s:.0f} s and "
            f"{self.n_bytes / 1e6:.0f} MB on disk, at most {self.peak_bytes / 1e6:.0f} MB of "
            f"them in memory; what is cached costs nothing"
        )


def estimate_experiment(config: ExperimentConfig, splits: Splits, cache: Path) -> list[SplitEstimate]:
    """Say what the proposals and features of an experiment will cost, measured on a few of its images.

    Raises:
        ConfigError: the features come from a network that is yet to be fine-tuned.
    """
    if config.learn == "network":
        raise ConfigError("--dry-run: a network that is yet to be fine-tuned cannot be timed. Set learn=fc.")
    backbone = load_backbone(config.features.backbone, config.features.weights, seed=config.seed)
    featurizer = build_featurizer(config.features, backbone)
    store = FeatureStore(cache / "features", featurizer, precision=config.features.precision)
    estimates = []
    for dataset, with_truth in ((splits.trainval, True), (splits.test, False)):
        probes = Dataset(
            dataset.name, dataset.split, dataset.classes, dataset.samples[:: max(1, len(dataset) // 8)][:8]
        )
        with Meter() as meter:
            proposals = propose(probes, config, cache, n_jobs=1)
        regions = SplitRegions.of(probes, proposals, with_truth=with_truth)
        views = [StoredBlocks(store, regions if with_truth else regions.limited(config.test_regions))]
        if with_truth and config.learn == "fc":
            views = learning_views(config, backbone, store, regions)
        found = [view.store.estimate(view.regions.dataset.samples, view.regions.boxes) for view in views]
        share = len(dataset) / len(probes)
        estimates.append(
            SplitEstimate(
                dataset.split,
                len(dataset),
                len(probes),
                meter.seconds * share,
                sum(estimate.seconds for estimate in found) * share,
                round(sum(estimate.n_bytes for estimate in found) * share),
                max(estimate.peak_bytes for estimate in found),
            )
        )
    return estimates


def _require_objects(splits: Splits) -> None:
    for dataset in (splits.train, splits.val, splits.test):
        if len(dataset) == 0:
            raise DataError(f"{dataset.name}: the split {dataset.split!r} has no image.")
    absent = absent_classes(splits)
    if absent:
        raise DataError(
            f"{splits.train.name}: every class needs an object in the split {splits.train.split!r}, got "
            f"none of {', '.join(absent[:5])}{' and others' if len(absent) > 5 else ''}. Name the classes "
            f"to learn with --classes, or leave out those without objects with --skip-absent-classes."
        )


@dataclass(frozen=True, eq=False)
class _Variant:
    """One head without or with box regression: what held-out images decided.

    Attributes:
        choice: of post-processing.
        detect: as chosen.
        thresholds: None where no image was held out.
        value: mean of mAP and COCO AP on the held-out images, in percent; None where there were none.
    """

    choice: Choice
    detect: PostprocessConfig
    thresholds: Thresholds | None = None
    value: float | None = None

    def measured(self, found: Sequence[Detections], dataset: Dataset, rule: Rule) -> _Variant:
        """Return the same with thresholds, and with the value of these detections of held-out images."""
        truths = [sample.truth for sample in dataset]
        evaluation = evaluate_voc(found, truths, dataset.classes, rule=rule)
        coco = evaluate_coco(found, truths, dataset.classes).summary()["AP"]
        value = 50 * (evaluation.map(rule) + coco)
        return replace(self, thresholds=choose_thresholds(evaluation.matches), value=value)


@dataclass(frozen=True, eq=False)
class _Chosen:
    """What was decided for one head before the final training.

    Attributes:
        head: its own setting.
        plain: without box regression.
        boxes: the box regression, the same for all heads.
        with_boxes: with it.
    """

    head: Choice
    plain: _Variant
    boxes: Choice
    with_boxes: _Variant

    @property
    def regress(self) -> bool:
        """Whether box regression did no harm on the held-out images."""
        plain, boxed = self.plain.value, self.with_boxes.value
        return plain is None or boxed is None or not boxed < plain


def _choose(
    config: ExperimentConfig,
    network: Network,
    base: FeatureStore,
    train: SplitRegions,
    val: SplitRegions,
    cache: Path,
    n_jobs: int,
) -> dict[str, _Chosen]:
    learned = learn_layers(config, network, base, train, cache)
    learned.fill(train)
    learned.fill(val)
    train_rows, val_rows = learned.blocks(train), learned.blocks(val)
    scaler = FeatureScaler(config.heads.scaling).fit(train_rows)
    chosen: dict[str, _Chosen] = {}
    boxes: Choice | None = None
    box_model: Model | None = None
    for name in config.heads.names:
        if name == FINETUNED:
            assert learned.softmax is not None  # run_experiment refused it otherwise
            model = Model(learned.softmax, None)
            head = Choice({}, None, ())
        else:
            head, model = choose_head(name, config, train_rows, val_rows, scaler, n_jobs=n_jobs)
        with scored_once(val_rows, model) as scored:
            plain = _Variant(*choose_postprocess(config, val_rows, scored))
            plain = plain.measured(detected(val_rows, scored, plain.detect), val.dataset, config.rule)
            if boxes is None or box_model is None:
                # The first head decides for all: heads shall differ in their scores alone.
                boxes, box_model = choose_regressor(
                    config, train_rows, val_rows, scaler, learned.regressor, model, scored
                )
            moved = replace(scored, boxes_by=box_model)
            with_boxes = _Variant(*choose_postprocess(config, val_rows, moved))
            with_boxes = with_boxes.measured(
                detected(val_rows, moved, with_boxes.detect), val.dataset, config.rule
            )
        chosen[name] = _Chosen(head, plain, boxes, with_boxes)
        note(
            f"{name}: {plain.choice.val_map:.1f} mAP on {val.dataset.split}, "
            f"{with_boxes.choice.val_map:.1f} with box regression "
            f"({_words({**head.settings, **with_boxes.choice.settings})})"
        )
    return chosen


def _settled(config: ExperimentConfig, learned: Representation) -> dict[str, _Chosen]:
    """Settle everything unseen."""
    boxes = {"learned": True} if learned.regressor is not None else settled("ridge", config.heads)
    plain = replace(config.detect, regression="off", vote_iou=None)

    def unseen(settings: dict[str, Any]) -> Choice:
        return Choice(settings, None, ())

    return {
        name: _Chosen(
            unseen({} if name == FINETUNED else settled(name, config.heads)),
            _Variant(unseen({}), plain),
            unseen(boxes),
            _Variant(unseen({}), config.detect),
        )
        for name in config.heads.names
    }


_FEW_OBJECTS = 50
"""Objects of val below which folds of trainval are held out instead."""


def held_out_parts(
    config: ExperimentConfig, trainval: SplitRegions, train: SplitRegions, val: SplitRegions
) -> list[tuple[SplitRegions, SplitRegions]]:
    """Return what is trained on, and what is then measured on, before the final training on trainval.

    Args:
        config: `folds` and seed.
        trainval: all training images.
        train: some of them.
        val: the others.
    """
    folds = config.folds
    if folds is None:
        counted = [~(truth.difficult | truth.crowd) for truth in val.truths]
        folds = 1 if sum(int(own.sum()) for own in counted) >= _FEW_OBJECTS else 3
    if folds == 0:
        return []
    if folds == 1:
        return [(train, val)]
    parts = []
    for held in draw_folds(trainval.dataset, folds, np.random.default_rng(config.seed)):
        out = {sample.image_id for sample in held}
        rest = tuple(sample for sample in trainval.dataset if sample.image_id not in out)
        if rest:
            own = replace(trainval.dataset, samples=rest)
            parts.append((trainval.part(own), trainval.part(held).limited(config.test_regions)))
    return parts


def _hold_out(
    config: ExperimentConfig,
    network: Network,
    base: FeatureStore,
    parts: Sequence[tuple[SplitRegions, SplitRegions]],
    cache: Path,
    n_jobs: int,
) -> dict[str, _Chosen]:
    """Train without some images and look at them: how far boxes move, whether at all, and thresholds."""
    plain = replace(config.detect, regression="off", vote_iou=None)
    steps = [replace(config.detect, box_step=step) for step in config.heads.box_steps]
    found: dict[str, list[list[Detections]]] = {}
    for training, held in parts:
        learned = learn_layers(config, network, base, training, cache)
        settled_now = _settled(config, learned)
        if set(settled_now) != {FINETUNED} or _needs_ridge(settled_now):
            learned.fill(training)
        for view in views_of(config, held):
            learned.fill(view)
        blocks = [learned.blocks(view) for view in views_of(config, held)]
        for head in _train(config, learned, training, settled_now, n_jobs):
            runs = _detect_all(head, blocks, [plain, *steps])
            mine = found.setdefault(head.name, [[] for _ in runs])
            for so_far, run in zip(mine, runs, strict=True):
                so_far += run.detections
    images = replace(
        parts[0][1].dataset, samples=tuple(sample for _, held in parts for sample in held.dataset)
    )
    chosen = {}
    for name, own in settled_now.items():
        first, *others = found[name]
        without = own.plain.measured(first, images, config.rule)
        boxed = [
            _Variant(Choice({"box_step": detect.box_step}, None, ()), detect).measured(
                detections, images, config.rule
            )
            for detect, detections in zip(steps, others, strict=True)
        ]
        best = max(boxed, key=lambda one: -np.inf if one.value is None or np.isnan(one.value) else one.value)
        chosen[name] = replace(own, plain=without, with_boxes=best)
        moved = ", ".join(f"{one.value:.1f} at {one.detect.box_step:.0%}" for one in boxed)
        note(f"{name}: {without.value:.1f} as boxes are, moved {moved} (mean of mAP and COCO AP)")
    return chosen


def views_of(config: ExperimentConfig, regions: SplitRegions) -> list[SplitRegions]:
    """Return a split as it is looked at when objects are detected: itself and, as configured, mirrored."""
    return [regions, regions.mirrored()] if config.features.mirror else [regions]


def _needs_ridge(chosen: Mapping[str, _Chosen]) -> bool:
    return "learned" not in next(iter(chosen.values())).boxes.settings


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in settings.items())


@dataclass(frozen=True, eq=False)
class _Trained:
    """A head trained on trainval."""

    name: str
    model: Model
    chosen: _Chosen
    train_s: float
    peak_rss_mb: float
    details: dict[str, Any]


def _train(
    config: ExperimentConfig,
    learned: Representation,
    trainval: SplitRegions,
    chosen: Mapping[str, _Chosen],
    n_jobs: int,
) -> list[_Trained]:
    rows = learned.blocks(trainval)
    scaler = FeatureScaler(config.heads.scaling)
    regressor, regressor_scaler = learned.regressor, None
    if set(chosen) != {FINETUNED} or _needs_ridge(chosen):
        scaler = scaler.fit(rows)
    if _needs_ridge(chosen):
        strength = next(iter(chosen.values())).boxes.settings["strength"]
        regressor, regressor_scaler = BoxRegressor(strength=strength).fit(rows.scaled(scaler)), scaler
    trained = []
    for name, choice in chosen.items():
        if name == FINETUNED:
            assert learned.softmax is not None
            model = Model(learned.softmax, None, regressor, regressor_scaler)
            trained.append(_Trained(name, model, choice, learned.learn_s, learned.peak_rss_mb, {}))
            continue
        with Meter() as meter:
            (candidate,) = train_candidates(
                name,
                [choice.head.settings],
                config.heads,
                rows.scaled(scaler),
                seed=config.seed,
                n_jobs=n_jobs,
            )
        model = Model(candidate.scorer, scaler, regressor, regressor_scaler)
        trained.append(_Trained(name, model, choice, meter.seconds, meter.peak_rss_mb, candidate.details))
    return trained


def _results(
    trained: _Trained, config: ExperimentConfig, learned: Representation, views: Sequence[StoredBlocks]
) -> list[HeadResult]:
    """Detect in the test split, and its mirror images if given, without and with box regression."""
    test = views[0]
    variants = (trained.chosen.plain, trained.chosen.with_boxes)
    runs = _detect_all(trained, views, [variant.detect for variant in variants])
    results = []
    for suffix, variant, run in zip(("", "+bbox"), variants, runs, strict=True):
        choice, detect = variant.choice, variant.detect
        model = trained.model
        if not suffix:
            model = replace(model, regressor=None, regressor_scaler=None)
        details = {
            "val_map": choice.val_map,
            "held_out": variant.value,
            "settings": trained.chosen.head.settings | choice.settings,
            "tried": [{"settings": s, "val_map": v} for s, v in trained.chosen.head.tried],
            **trained.details,
        }
        if suffix:
            details["box_regression"] = trained.chosen.boxes.settings
        detector = Detector(
            head=trained.name + suffix,
            classes=test.classes,
            proposals=_proposals_at_test(config),
            features=replace(config.features, taps=format_taps(learned.network.featurizer.taps)),
            backbone=learned.network.backbone,
            featurizer=learned.network.featurizer,
            layers=learned.layers,
            model=model,
            detect_config=detect,
            thresholds=variant.thresholds,
            info={"data": test.regions.dataset.name, "seed": config.seed, "details": details},
        )
        evaluation = evaluate_voc(run.detections, test.regions.truths, test.classes, rule=config.rule)
        if variant.thresholds is not None:
            details["thresholds"] = variant.thresholds.to_json()
            details["at_threshold"] = variant.thresholds.measure(evaluation.matches)
        results.append(
            HeadResult(
                detector,
                run.detections,
                evaluation,
                evaluate_coco(run.detections, test.regions.truths, test.classes),
                trained.train_s,
                run.seconds / len(test),
                trained.peak_rss_mb,
                details,
                preferred=bool(suffix) == trained.chosen.regress,
            )
        )
    return results


def _proposals_at_test(config: ExperimentConfig) -> SelectiveSearchConfig:
    """Return how the detector finds regions: its best so many are the first so many of a longer list."""
    limits = [n for n in (config.proposals.max_regions, config.test_regions) if n is not None]
    return replace(config.proposals, max_regions=min(limits, default=None))


@dataclass(eq=False)
class _Run:
    """Detections of a split and the wall clock of scoring and post-processing them."""

    detections: list[Detections]
    seconds: float = 0.0


def _detect_all(
    trained: _Trained, views: Sequence[StoredBlocks], configs: Sequence[PostprocessConfig]
) -> list[_Run]:
    """Detect in every image once for each configuration; regions are read once for all."""
    images, model, runs = views[0], trained.model, [_Run([]) for _ in configs]
    dataset = images.regions.dataset
    for i, sample in enumerate(track(dataset, f"{trained.name} on {dataset.split}", total=len(images))):
        n_gt = images.regions.n_gt[i]
        boxes, rows = images.regions.boxes[i][n_gt:], to_float32(images.features(i, slice(n_gt, None)))
        mirrored = to_float32(views[1].features(i)) if len(views) > 1 else None
        look = _look(views, i)
        started = time.perf_counter()
        scores, deltas = model.read(rows, mirrored)
        scored = time.perf_counter() - started
        for run, detect in zip(runs, configs, strict=True):
            started = time.perf_counter()
            found = model.detect(sample.image_id, sample.size, boxes, scores, deltas, detect, look)
            run.seconds += scored + time.perf_counter() - started
            run.detections.append(found)
    return runs


def _look(views: Sequence[StoredBlocks], i: int) -> Look:
    """Return what reads more regions of image `i`; the image is opened when they are asked for."""

    @functools.cache
    def opened() -> Look:
        return look_at([view.reader(i) for view in views], views[0].regions.dataset.samples[i].size[1])

    return lambda boxes: opened()(boxes)
