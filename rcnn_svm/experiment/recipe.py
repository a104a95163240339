"""The experiment, top to bottom: data, proposals, features, learning, heads, detections, figures.

`run_experiment` chooses every setting by training on `train` and measuring on `val`, trains again
on `trainval`, and looks at `test` once. All heads see the same regions and the same features.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rcnn_svm.cache import CacheLimit, size_limit
from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Detector, Model
from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.calibration import ClassCurves
from rcnn_svm.evaluation.classification import Classification, classify
from rcnn_svm.evaluation.coco import CocoResult, evaluate_coco
from rcnn_svm.evaluation.thresholds import Thresholds, UnreachedError, choose_thresholds
from rcnn_svm.evaluation.voc import EvalResult, evaluate_voc
from rcnn_svm.experiment.choosing import (
    HeldOut,
    Trained,
    choose,
    decidable,
    detect_all,
    held_out_parts,
    hold_out,
    settle,
    train_heads,
    views_of,
)
from rcnn_svm.experiment.config import DataConfig, ExperimentConfig
from rcnn_svm.experiment.data import absent_classes
from rcnn_svm.experiment.learning import Network, Representation, rows_around_objects, settled
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.features.build import taps_of
from rcnn_svm.features.store import FeatureStore, fill_together
from rcnn_svm.postprocess import Postprocess, PostprocessConfig
from rcnn_svm.progress import Stages
from rcnn_svm.proposals import ProposalRecall, Proposer, RpnProposals, WholeImage, cached_proposals
from rcnn_svm.structures import Dataset, Detections, RegionSet

__all__ = [
    "Experiment",
    "HeadResult",
    "Prepared",
    "SplitEstimate",
    "detector_of",
    "estimate_experiment",
    "prepare",
    "propose",
    "run_experiment",
    "stages_of",
    "train_detector",
]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What one head reached on the test split.

    Attributes:
        detector: trained on trainval, ready to be saved; `detector.head` is its name, with
            `+bbox` where box regression is on.
        about: for reports: `family` and `kernel` of the head, see `HeadBase.about`; `boxes`, whether box
            regression is on; `base`, the name without and with it.
        detections: one record per test image.
        evaluation: VOC AP of them.
        coco: COCO's measures of them, which also say how closely boxes fit; None for whole images.
        classification: which class each image was taken for; None but for whole images of one class each.
        measures: what the experiment's own evaluators say, by name.
        train_s: wall clock of the final training on trainval.
        score_s_per_image: scoring, regression and NMS of an image's regions, mean over test; with
            `detect.second_look` or `detect.refined` the features of what is looked at again as well. In a
            thread of one's own, beside other images, where there is a single head.
        peak_rss_mb: largest memory of the process during the final training.
        details: chosen settings, validation mAP, what was tried, support vectors and the like.
        preferred: whether this variant of its head, without or with box regression, did better on the images
            that were held out; with it where none were to be.
        held_out: what it found in these; None where there were none.
        unreached: why no threshold does what was asked; None where one does.
    """

    detector: Detector
    about: dict[str, Any]
    detections: list[Detections]
    evaluation: EvalResult
    coco: CocoResult | None
    classification: Classification | None
    measures: dict[str, float]
    train_s: float
    score_s_per_image: float
    peak_rss_mb: float
    details: dict[str, Any]
    preferred: bool
    held_out: HeldOut | None = None
    unreached: UnreachedError | None = None

    def __repr__(self) -> str:
        further = [one for one in (self.coco, self.classification) if one is not None]
        return f"HeadResult({self.detector.head}: {', '.join(map(repr, (self.evaluation, *further)))})"


@dataclass(frozen=True, eq=False)
class Experiment:
    """A finished experiment.

    Attributes:
        parts: as it was run.
        splits: the images.
        heads: results by name, in the order of the configuration.
        stages_s: wall clock of proposals, features, choose, train (fine-tuning of the network included) and
            detect; 0 for one that the configuration leaves out.
        coverage: how well the proposals of trainval cover its objects, all regions of an image counted.
    """

    parts: Parts
    splits: Splits
    heads: dict[str, HeadResult]
    stages_s: dict[str, float]
    coverage: ProposalRecall

    def __repr__(self) -> str:
        return f"Experiment({self.splits.test!r}, heads {', '.join(self.heads)})"


def propose(dataset: Dataset, proposer: Proposer, run: Run) -> dict[str, RegionSet]:
    """Return the region proposals of every image by its id, from the cache where they lie there."""
    proposer = proposer.on(run.device) if isinstance(proposer, RpnProposals) else proposer
    regions = cached_proposals(
        dataset.samples, proposer, run.cache / "proposals", n_jobs=run.n_jobs, engine=run.engine
    )
    return {region_set.image_id: region_set for region_set in regions}


def stages_of(parts: Parts) -> tuple[str, ...]:
    """Return the names of the stages that `run_experiment` goes through, in order."""
    # Otherwise features are read where they are needed.
    features = ("features",) if _reads_first(parts) else ()
    choose = ("choose",) if parts.choose or parts.folds != 0 else ()
    return ("proposals", "network", *features, *choose, "train", "detect")


def _reads_first(parts: Parts) -> bool:
    return parts.learner.reads_first and (parts.reads_all_rows or not parts.looks_once)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An experiment before anything is trained on its regions.

    Attributes:
        parts: of the experiment.
        run: how it is run.
        trainval: the regions of all training images, objects first.
        train: of some of them.
        val: of the others, no more than are looked at at test.
        test: of the test images.
        network: that the features come from.
        base: those features, computed already where the learner reads them.
    """

    parts: Parts
    run: Run
    trainval: SplitRegions
    train: SplitRegions
    val: SplitRegions
    test: SplitRegions
    network: Network
    base: FeatureStore

    def learn(self, regions: SplitRegions) -> Representation:
        """Learn from a training split what comes between the network and the heads."""
        return self.parts.learner.learn(self.parts, self.network, self.base, regions, self.run)


def prepare(parts: Parts, splits: Splits, run: Run, stages: Stages, room: CacheLimit) -> Prepared:
    """Find the regions of all images, and the features that are read before anything is trained on them.

    Raises:
        ConfigError: parts that do not work together.
        DataError: as `run_experiment`.
    """
    _require_objects(splits)
    if splits.whole and (parts.boxes is not None or not isinstance(parts.proposer, WholeImage)):
        raise ConfigError(
            f"{splits.train.name}: labels whole images, whose only region is the image. Build the parts with "
            f"data.whole_images=true."
        )
    if not parts.learner.has_softmax:
        for recipe in parts.heads:
            if not recipe.head.reads_rows:
                raise ConfigError(
                    f"heads.names: {recipe.name} needs something that is fine-tuned. Set learn=fc or "
                    f"learn=network, or leave the head out."
                )
    parts = settled(parts, splits.trainval)
    n_images = len(splits.trainval) + len(splits.test)
    with stages("proposals", f"boxes in which an object may be, in {n_images} images"):
        proposals = propose(splits.trainval, parts.proposer, run)
        test_proposals = propose(splits.test, parts.proposer, run)
    room.hold()
    trainval = SplitRegions.of(splits.trainval, proposals, with_truth=True)
    train, val = trainval.part(splits.train), trainval.part(splits.val).limited(parts.test_regions)
    test = SplitRegions.of(splits.test, test_proposals, with_truth=False).limited(parts.test_regions)

    tuned = f"fine-tuned on {len(train)} images of {train.dataset.split}"
    how = tuned if parts.learner.tunes_network else "with its weights"
    with stages("network", f"{network_name(parts)}, {how}"):
        network = parts.learner.prepare(parts, train, proposals, run)
    base = FeatureStore(
        run.cache / "features", network.featurizer, precision=parts.features.precision, engine=run.engine
    )
    if _reads_first(parts):
        with stages("features", "what the network makes of each region"):
            if parts.reads_all_rows:
                wanted = [StoredBlocks(base, trainval)]
                if parts.refines and not parts.learner.tunes_network:
                    wanted.append(rows_around_objects(parts, network, trainval, run))
                fill_together([blocks.wanted for blocks in wanted], "features of trainval")
            if not parts.looks_once:
                base.fill(test.dataset.samples, test.boxes, "features of test")
    room.hold()
    return Prepared(parts, run, trainval, train, val, test, network, base)


def run_experiment(
    parts: Parts,
    splits: Splits,
    run: Run,
    *,
    finished: Callable[[HeadResult], None] | None = None,
    stages: Stages | None = None,
) -> Experiment:
    """Run an experiment on `splits`.

    Args:
        parts: what it is made of, see `ExperimentConfig.build`.
        splits: train, val, trainval and test of one data set.
        run: cache, threads and device.
        finished: called with each result as soon as it is there, so that it can be kept.
        stages: of a run that this is a part of, those of `stages_of` among them; None for a run of its own.

    Raises:
        ConfigError: parts that do not work together.
        DataError: a class without an object to train on, a split without images, a broken image.
    """
    room = CacheLimit(run.cache, run.cache_limit)
    stages = stages or Stages(stages_of(parts))
    ready = prepare(parts, splits, run, stages, room)
    parts, train, val, trainval, test = ready.parts, ready.train, ready.val, ready.trainval, ready.test
    chosen = None
    pairs = [] if parts.choose else held_out_parts(parts, trainval, train, val)
    parts = decidable(parts, pairs)
    ready = replace(ready, parts=parts)
    if parts.choose:
        with stages("choose", f"settings, by training on {len(train)} images and measuring on {len(val)}"):
            chosen = choose(parts, ready.learn(train), train, val, run)
    elif pairs:
        n_held = sum(len(held) for _, held in pairs)
        times = "a first training" if len(pairs) == 1 else f"{len(pairs)} trainings"
        with stages("choose", f"thresholds, and how far boxes move, on {n_held} images left out of {times}"):
            chosen = hold_out(parts, ready.learn, pairs, run)
    elif parts.aim is not choose_thresholds:
        raise UnreachedError(
            f"{splits.train.name}: no image can be held out to choose thresholds on, since each is the only "
            f"one of some class. Label more images, or leave out --false-alarms and --precision."
        )
    room.hold()
    names = ", ".join(recipe.name for recipe in parts.heads)
    names = names if len(parts.heads) < 6 else f"{len(parts.heads)} heads"
    with stages("train", f"{names} on {len(trainval)} images of {trainval.dataset.split}"):
        final = ready.learn(trainval)
        trained = train_heads(parts, final, trainval, chosen or settle(parts, final), run)
    room.hold()

    with stages("detect", f"{len(test)} images of {test.dataset.split}, looked at once"):
        views = views_of(parts, test)
        for view in () if parts.looks_once else views:
            final.fill(view)
        results: dict[str, HeadResult] = {}
        for head in trained:
            for result in _results(head, parts, final, [final.blocks(view) for view in views]):
                results[result.detector.head] = result
                if finished is not None:
                    finished(result)
    seconds = {
        name: stages.seconds.get(name, 0.0) for name in ("proposals", "features", "choose", "train", "detect")
    }
    seconds["train"] += ready.network.finetune_s
    room.hold(finished=True)
    return Experiment(parts, splits, results, seconds, trainval.coverage())


def network_name(parts: Parts) -> str:
    """Return what the features come from, for people."""
    if parts.featurizer is not None:
        return type(parts.featurizer).__name__
    return parts.features.backbone if parts.backbone is None else parts.backbone.name


def train_detector(
    splits: Splits,
    parts: Parts | None = None,
    *,
    run: Run | None = None,
) -> HeadResult:
    """Train one head on `splits` and measure it on test, with box regression where it does no harm.

    Of several heads the softmax is taken that layers were trained with, as `rcnn-svm train` does, else the
    first.

    Args:
        splits: as `load_splits` returns them.
        parts: as `ExperimentConfig.build` makes them; the default preset where None.
        run: its cache is held within `rcnn_svm.cache.size_limit` where it says no other limit; None computes
            everything anew and keeps nothing.

    Raises:
        ConfigError: parts that do not work together.
        DataError: as `run_experiment`.
    """
    parts = parts or ExperimentConfig(data=DataConfig(whole_images=splits.whole)).build()
    own = tuple(h for h in parts.heads if not h.head.reads_rows and parts.learner.has_softmax)
    parts = replace(parts, heads=(own or parts.heads)[:1])
    with contextlib.ExitStack() as stack:
        if run is None:
            run = Run(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        elif run.cache_limit is None:
            run = replace(run, cache_limit=size_limit(run.cache))
        experiment = run_experiment(parts, splits, run)
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
        n_bytes: of features on disk; 0 where they are read once and not kept.
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


def estimate_experiment(parts: Parts, splits: Splits, run: Run) -> list[SplitEstimate]:
    """Say what the proposals and features of an experiment will cost, measured on a few of its images.

    Raises:
        ConfigError: the features come from a network that is yet to be fine-tuned.
    """
    if parts.learner.tunes_network:
        raise ConfigError("--dry-run: a network that is yet to be fine-tuned cannot be timed. Set learn=fc.")
    parts = settled(parts, splits.trainval)
    estimates = []
    # What is compiled at the first image ever is not to be taken for the cost of each.
    cached_proposals(splits.trainval.samples[:1], parts.proposer, None)
    for dataset, with_truth in ((splits.trainval, True), (splits.test, False)):
        probes = replace(dataset, samples=dataset.samples[:: max(1, len(dataset) // 8)][:8])
        with Meter() as meter:
            proposals = propose(probes, parts.proposer, replace(run, n_jobs=1))
        regions = SplitRegions.of(probes, proposals, with_truth=with_truth)
        network = parts.learner.prepare(parts, regions, proposals, run)
        store = FeatureStore(run.cache / "features", network.featurizer, precision=parts.features.precision)
        views = [StoredBlocks(store, regions if with_truth else regions.limited(parts.test_regions))]
        if with_truth:
            views = parts.learner.views(parts, network, store, regions)
        found = [view.store.estimate(view.regions.dataset.samples, view.regions.boxes) for view in views]
        kept = with_truth or not parts.looks_once
        share = len(dataset) / len(probes)
        estimates.append(
            SplitEstimate(
                dataset.split,
                len(dataset),
                len(probes),
                meter.seconds * share,
                sum(estimate.seconds for estimate in found) * share,
                round(sum(estimate.n_bytes for estimate in found) * share) if kept else 0,
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


def _results(
    trained: Trained, parts: Parts, learned: Representation, views: Sequence[StoredBlocks]
) -> list[HeadResult]:
    """Detect in the test split, and its mirror images if given, without and with box regression."""
    test, chosen = views[0], trained.chosen
    truths, classes = test.regions.truths, test.classes
    variants, whole = chosen.variants, test.regions.dataset.whole
    own = chosen.recipe
    kind = own.head.clone().set_params(**chosen.head.settings).about
    results = []
    found = detect_all(trained.name, trained.model, views, variants, kept=not parts.looks_once)
    for variant, run in zip(variants, found, strict=True):
        model = trained.model
        if not variant.with_boxes:
            model = replace(model, regressor=None, regressor_scaler=None, refinement=None)
        elif not (isinstance(variant.detect, PostprocessConfig) and variant.detect.refined):
            model = replace(model, refinement=None)
        details: dict[str, Any] = {
            "val_map": variant.choice.val_map,
            "held_out": variant.value,
            "settings": own.shown(chosen.head.settings) | variant.choice.settings,
            "tried": [{"settings": own.shown(s), "val_map": v} for s, v in chosen.head.tried],
            **trained.details,
        }
        if variant.with_boxes and chosen.boxes is not None:
            details["box_regression"] = chosen.boxes.settings
        evaluation = evaluate_voc(run.detections, truths, classes, rule=parts.rule)
        if variant.thresholds is not None:
            details["thresholds"] = variant.thresholds.to_json()
            details["at_threshold"] = variant.thresholds.measure(evaluation.matches)
        if variant.calibration is not None:
            kinds = dict(zip(classes, variant.calibration.kinds, strict=True))
            details["calibration"] = {"n_images": variant.calibration.n_images, "classes": kinds}
        results.append(
            HeadResult(
                detector_of(
                    trained.name + ("+bbox" if variant.with_boxes else ""),
                    parts,
                    learned,
                    model,
                    variant.detect,
                    variant.thresholds,
                    classes,
                    info={"data": test.regions.dataset.name, "seed": parts.seed, "details": details},
                    calibration=variant.calibration,
                ),
                {**kind, "boxes": variant.with_boxes, "base": trained.name},
                run.detections,
                evaluation,
                None if whole else evaluate_coco(run.detections, truths, classes),
                classify(run.detections, truths, classes) if whole else None,
                measure(parts, run.detections, truths, classes),
                trained.train_s,
                run.seconds / len(test),
                trained.peak_rss_mb,
                details,
                preferred=variant.with_boxes == chosen.regress,
                held_out=variant.held_out,
                unreached=variant.unreached,
            )
        )
    return results


def detector_of(
    name: str,
    parts: Parts,
    learned: Representation,
    model: Model,
    postprocess: Postprocess,
    thresholds: Thresholds | None,
    classes: tuple[str, ...],
    *,
    info: Mapping[str, Any] | None = None,
    calibration: ClassCurves | None = None,
) -> Detector:
    """Return the detector that a trained head makes of the parts of an experiment.

    Args:
        name: of the head.
        parts: of the experiment.
        learned: the rows that the head reads.
        model: the head.
        postprocess: from scores to detections.
        thresholds: from which score on a detection is believed, or None.
        classes: K names.
        info: for people.
        calibration: makes scores into probabilities, or None.
    """
    # Taps as they were resolved: a saved detector reads what it was trained on.
    features = replace(parts.features, taps=taps_of(learned.network.featurizer))
    return Detector(
        head=name,
        classes=classes,
        proposer=parts.proposer,
        n_proposals=parts.test_regions,
        features=features,
        backbone=learned.network.backbone,
        featurizer=learned.network.featurizer,
        layers=learned.layers,
        model=model,
        postprocess=postprocess,
        thresholds=thresholds,
        info={} if info is None else info,
        calibration=calibration,
    )


def measure(
    parts: Parts, detections: Sequence[Detections], truths: Sequence[Any], classes: Sequence[str]
) -> dict[str, float]:
    """Return what all the evaluators say; of two that give one name the later one has the word."""
    measures: dict[str, float] = {}
    for evaluator in parts.evaluators:
        found: Mapping[str, float] = evaluator(detections, truths, classes)
        measures |= {str(name): float(value) for name, value in found.items()}
    return measures
