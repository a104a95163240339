"""What is decided before the final training: settings, thresholds, how far boxes move, and whether at all.

`choose` tries the grids by training on `train` and measuring on `val`. `hold_out` tries nothing of a head: it
trains without some images and looks at these. Either way `test` stays unseen.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes
from rcnn_svm.datasets import draw_folds
from rcnn_svm.detector import Look, Model, Refinement, look_at
from rcnn_svm.evaluation.calibration import ClassCurves
from rcnn_svm.evaluation.classification import labels_of
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.thresholds import Thresholds, UnreachedError, choose_thresholds
from rcnn_svm.evaluation.voc import HIT, IGNORED, EvalResult, evaluate_voc
from rcnn_svm.experiment.learning import Representation, rows_around_objects
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.experiment.selection import (
    Choice,
    choose_head,
    choose_postprocess,
    choose_regressor,
    detected,
    scored_once,
)
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import RowReader, fill_together, to_float32
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.postprocess import MARGINS_OVERLAP_POWER, OVERLAP_POWER, Postprocess, PostprocessConfig
from rcnn_svm.progress import note, say, track
from rcnn_svm.structures import Dataset, Detections
from rcnn_svm.threads import images_at_once
from rcnn_svm.training.refine import train_refiner

__all__ = [
    "Chosen",
    "HeldOut",
    "Scalers",
    "Trained",
    "Variant",
    "choose",
    "decidable",
    "detect_all",
    "held_out_parts",
    "hold_out",
    "settle",
    "train_heads",
    "views_of",
    "without_boxes",
]

_FEW_OBJECTS = 50
"""Objects of val below which folds of trainval are held out instead, and those of all held-out images below
which how boxes move is not decided on them."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What was found in images without having been trained on them.

    Attributes:
        n_folds: trainings, each of which left out others; 1 where val was held out.
        images: those that were looked at.
        detections: one record per image.
        evaluation: VOC AP of them.
    """

    n_folds: int
    images: Dataset
    detections: Sequence[Detections]
    evaluation: EvalResult


@dataclass(frozen=True, eq=False)
class Variant:
    """One head without or with box regression: what held-out images decided.

    Attributes:
        choice: of post-processing.
        detect: as chosen.
        with_boxes: whether boxes are regressed.
        held_out: what was found there; None where no image was held out.
        value: mean of mAP and COCO AP on the held-out images, in percent, of whole images mAP; None where
            there were none, or none of their objects counts.
        thresholds: None where there is no `held_out`, or no threshold does what is asked.
        calibration: None where there is no `held_out`, or too little was found there.
        unreached: why no threshold does what is asked; None where one does.
    """

    choice: Choice
    detect: Postprocess
    with_boxes: bool
    held_out: HeldOut | None = None
    value: float | None = None
    thresholds: Thresholds | None = None
    calibration: ClassCurves | None = None
    unreached: UnreachedError | None = None

    def measured(self, found: Sequence[Detections], images: Dataset, parts: Parts, n_folds: int) -> Variant:
        """Return the same with the value of these detections of held-out images."""
        truths, rule = [sample.truth for sample in images], parts.rule
        evaluation = evaluate_voc(found, truths, images.classes, rule=rule)
        value = 100 * evaluation.map(rule)
        if not images.whole:
            value = (value + 100 * evaluate_coco(found, truths, images.classes).summary()["AP"]) / 2
        held_out = HeldOut(n_folds, images, found, evaluation)
        return replace(self, held_out=held_out, value=None if np.isnan(value) else value)

    def decided(self, parts: Parts) -> Variant:
        """Return the same with thresholds and curves of probabilities from what was found there."""
        if self.held_out is None:
            return self
        matches, images = self.held_out.evaluation.matches, self.held_out.images
        counted = matches.outcome != IGNORED
        curves = ClassCurves.fit(
            matches.score[counted],
            matches.outcome[counted] == HIT,
            matches.label[counted],
            len(images.classes),
            n_images=len(images),
        )
        one = replace(self, calibration=curves)
        if _shows_the_surest(parts, images):
            return one
        try:
            return replace(one, thresholds=parts.aim(matches))
        except UnreachedError as error:  # raised by who takes this variant
            return replace(one, unreached=error)


def _shows_the_surest(parts: Parts, images: Dataset) -> bool:
    """Whether images have one class each, of which the surest is shown and no threshold is needed."""
    one_each = images.whole and labels_of([sample.truth for sample in images]) is not None
    return one_each and parts.aim is choose_thresholds


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was decided for one head before the final training.

    Attributes:
        recipe: the head.
        head: its own setting.
        plain: without box regression.
        boxes: the box regression, the same for all heads; None where there is none.
        with_boxes: with it; None where there is none.
        assumed: whether boxes are regressed where nothing was measured that could speak against it.
        weighed: whether what was measured decides it; else boxes are regressed.
    """

    recipe: HeadRecipe
    head: Choice
    plain: Variant
    boxes: Choice | None
    with_boxes: Variant | None
    assumed: bool = True
    weighed: bool = True

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Without box regression and, where there is one, with it."""
        return (self.plain,) if self.with_boxes is None else (self.plain, self.with_boxes)

    @property
    def regress(self) -> bool:
        """Whether boxes are regressed, which did no harm on the held-out images where it is weighed there."""
        if self.with_boxes is None:
            return False
        if not self.weighed:
            return True
        plain, boxed = self.plain.value, self.with_boxes.value
        if plain is None or boxed is None:
            return self.assumed
        return boxed >= plain

    @property
    def preferred(self) -> Variant:
        """The variant that is taken."""
        return self.with_boxes if self.with_boxes is not None and self.regress else self.plain

    def decided(self, parts: Parts) -> Chosen:
        """Return the same with thresholds and curves of both variants.

        Raises:
            UnreachedError: no threshold of the variant that is taken does what is asked.
        """
        boxed = self.with_boxes
        own = replace(
            self,
            plain=self.plain.decided(parts),
            with_boxes=None if boxed is None else boxed.decided(parts),
            assumed=False,
        )
        if own.preferred.unreached is not None:
            raise own.preferred.unreached
        return own


class Scalers:
    """The scalings of rows, each fitted once on the rows of a training split."""

    def __init__(self, rows: StoredBlocks) -> None:
        self._rows, self._fitted = rows, dict[str, FeatureScaler]()

    def get(self, scaling: str) -> FeatureScaler | None:
        """Return a fitted scaler, or None for rows as they are."""
        if scaling == "none":
            return None
        if scaling not in self._fitted:
            self._fitted[scaling] = FeatureScaler(scaling).fit(self._rows)  # type: ignore[arg-type]
        return self._fitted[scaling]


def without_boxes(detect: Postprocess) -> Postprocess:
    """Return the same with boxes as proposed; post-processing that is not ours decides for itself."""
    return (
        replace(detect, regression="off", vote_iou=None) if isinstance(detect, PostprocessConfig) else detect
    )


def _unrefined(detect: Postprocess) -> Postprocess:
    return replace(detect, refined=0) if isinstance(detect, PostprocessConfig) else detect


def _without_votes(detect: Postprocess) -> Postprocess:
    return replace(detect, vote_iou=None) if isinstance(detect, PostprocessConfig) else detect


def choose(
    parts: Parts, learned: Representation, train: SplitRegions, val: SplitRegions, run: Run
) -> list[Chosen]:
    """Train on `train` with every setting and measure on `val`.

    Args:
        parts: of the experiment.
        learned: the rows, learned from `train`.
        train: regions to train on.
        val: regions to measure on.
        run: of the experiment.
    """
    learned.fill(train)
    learned.fill(val)
    train_rows, val_rows, rule = learned.blocks(train), learned.blocks(val), parts.rule
    scalers, plain_detect = Scalers(train_rows), without_boxes(parts.postprocess)
    with_boxes: Variant | None = None
    chosen: list[Chosen] = []
    boxes: Choice | None = None
    box_model: Model | None = None
    for recipe in parts.heads:
        scaler = scalers.get(recipe.scaling)
        head, model = choose_head(recipe, train_rows, val_rows, scaler, plain_detect, rule, n_jobs=run.n_jobs)
        with scored_once(val_rows, model) as scored:
            how = choose_postprocess(plain_detect, parts.tried, val_rows, scored, rule)
            plain = Variant(*how, with_boxes=False)
            plain = plain.measured(detected(val_rows, scored, plain.detect), val.dataset, parts, 1)
            if parts.boxes is not None and (boxes is None or box_model is None):
                # The first head decides for all: heads shall differ in their scores alone.
                boxes, box_model = choose_regressor(
                    parts.boxes,
                    train_rows,
                    val_rows,
                    scalers.get(parts.boxes.scaling),
                    learned.regressor,
                    model,
                    scored,
                    _without_votes(parts.postprocess),
                    rule,
                )
            if parts.boxes is not None:
                moved = replace(scored, boxes_by=box_model)
                how = choose_postprocess(_unrefined(parts.postprocess), parts.tried, val_rows, moved, rule)
                with_boxes = Variant(*how, with_boxes=True)
                found = detected(val_rows, moved, with_boxes.detect)
                with_boxes = with_boxes.measured(found, val.dataset, parts, 1)
        chosen.append(Chosen(recipe, head, plain, boxes, with_boxes).decided(parts))
        reached = f"{plain.choice.val_map:.1f} mAP on {val.dataset.split}"
        settings = recipe.shown(head.settings)
        if with_boxes is not None:
            reached += f", {with_boxes.choice.val_map:.1f} with box regression"
            settings |= with_boxes.choice.settings
        note(f"{recipe.name}: {reached} ({_words(settings)})")
    return chosen


def _ranked(detect: Postprocess, recipe: HeadRecipe) -> Postprocess:
    """Return the same with how much an estimated IoU counts beside the scores of a head."""
    if not isinstance(detect, PostprocessConfig) or not detect.refined or detect.overlap_power is not None:
        return detect
    log_odds = recipe.head.about["family"] == "softmax"
    return replace(detect, overlap_power=OVERLAP_POWER if log_odds else MARGINS_OVERLAP_POWER)


def settle(parts: Parts, learned: Representation) -> list[Chosen]:
    """Settle everything unseen: the middle of each grid, post-processing as it stands."""

    def unseen(settings: dict[str, Any]) -> Choice:
        return Choice(settings, None, ())

    boxes = None
    if parts.boxes is not None:
        boxes = unseen({"learned": True} if learned.regressor is not None else parts.boxes.settled())
    settled = []
    for recipe in parts.heads:
        detect = _ranked(parts.postprocess, recipe)
        settled.append(
            Chosen(
                recipe,
                unseen(recipe.settled()),
                Variant(unseen({}), without_boxes(detect), with_boxes=False),
                boxes,
                None if boxes is None else Variant(unseen({}), detect, with_boxes=True),
                assumed=parts.folds == 0,  # else images were to be held out, and were too few
                weighed=parts.tried.unmoved,
            )
        )
    return settled


def held_out_parts(
    parts: Parts, trainval: SplitRegions, train: SplitRegions, val: SplitRegions
) -> list[tuple[SplitRegions, SplitRegions]]:
    """Return what is trained on, and what is then measured on, before the final training on trainval.

    Args:
        parts: how images are held out, and the seed.
        trainval: all training images.
        train: some of them.
        val: the others.
    """
    folds = parts.folds
    if folds is None and _shows_the_surest(parts, trainval.dataset):
        return []  # nothing is decided on them
    if folds is None and {s.image_id for s in train.dataset} & {s.image_id for s in val.dataset}:
        folds = 3  # too few images to set some aside
    if folds is None:
        enough = _n_counted(val) >= _FEW_OBJECTS
        # What is demanded of thresholds hangs on few events: all images are looked at for it.
        folds = 1 if enough and parts.aim is choose_thresholds else 3
    if folds == 0:
        return []
    if folds == 1:
        return [(train, val)]
    pairs = []
    for held in draw_folds(trainval.dataset, folds, np.random.default_rng(parts.seed)):
        out = {sample.image_id for sample in held}
        rest = tuple(sample for sample in trainval.dataset if sample.image_id not in out)
        if rest:
            own = replace(trainval.dataset, samples=rest)
            pairs.append((trainval.part(own), trainval.part(held).limited(parts.test_regions)))
    return pairs


def decidable(parts: Parts, pairs: Sequence[tuple[SplitRegions, SplitRegions]]) -> Parts:
    """Return the parts with less to try where too few objects are held out to tell how boxes should move.

    They are then moved as far as `PostprocessConfig.box_step` says, and not refined. That was measured of the
    box regression that is learned with the layers; of any other what is held out decides, however little.

    Args:
        parts: of the experiment.
        pairs: as `held_out_parts` returns them; none where each image is the only one of some class.
    """
    n_objects = sum(_n_counted(held) for _, held in pairs)
    detect = parts.postprocess
    if parts.folds == 0 or parts.choose or n_objects >= _FEW_OBJECTS:
        return parts
    if parts.boxes is None or not parts.learner.has_boxes or not isinstance(detect, PostprocessConfig):
        return parts
    step = f"{detect.box_step:.0%}"
    say(f"{n_objects} objects held out are too few to tell how boxes should move: {step} of the way.")
    tried = replace(parts.tried, box_steps=(detect.box_step,), unmoved=False)
    return replace(parts, postprocess=_unrefined(detect) if tried.unrefined else detect, tried=tried)


def _n_counted(regions: SplitRegions) -> int:
    """Return how many objects count, which are neither difficult nor crowds."""
    return sum(int((~(truth.difficult | truth.crowd)).sum()) for truth in regions.truths)


def hold_out(
    parts: Parts,
    learn: Callable[[SplitRegions], Representation],
    pairs: Sequence[tuple[SplitRegions, SplitRegions]],
    run: Run,
) -> list[Chosen]:
    """Train without some images and look at them: how far boxes move, whether at all, and thresholds.

    Args:
        parts: of the experiment.
        learn: the rows, from some of the images.
        pairs: as `held_out_parts` returns them.
        run: of the experiment.
    """
    found: dict[str, list[list[Detections]]] = {}
    for training, held in pairs:
        learned = learn(training)
        settled = settle(parts, learned)
        blocks = [learned.blocks(view) for view in views_of(parts, held)]
        for view in () if parts.looks_once else blocks:
            learned.fill(view.regions)
        boxed = {own.recipe.name: _moves(parts, own.recipe) for own in settled}
        for head in train_heads(parts, learned, training, settled, run):
            variants = [head.chosen.plain, *boxed[head.name]]
            runs = detect_all(head.name, head.model, blocks, variants, kept=not parts.looks_once)
            mine = found.setdefault(head.name, [[] for _ in runs])
            for so_far, one in zip(mine, runs, strict=True):
                so_far += one.detections
    images = replace(pairs[0][1].dataset, samples=tuple(s for _, held in pairs for s in held.dataset))
    chosen = []
    for own in settled:
        first, *others = found[own.recipe.name]
        without = own.plain.measured(first, images, parts, len(pairs))
        tried = zip(boxed[own.recipe.name], others, strict=True)
        moved = [variant.measured(one, images, parts, len(pairs)) for variant, one in tried]
        best = max(moved, key=lambda one: -np.inf if one.value is None else one.value, default=None)
        chosen.append(replace(own, plain=without, with_boxes=best).decided(parts))
        if not moved:
            note(f"{own.recipe.name}: {_percent(without.value)} mAP")
            continue
        values = ", ".join(
            f"{_percent(one.value)} at {one.choice.settings.get('box_step', 1):.0%}"
            f"{' and refined' if one.choice.settings.get('refined') else ''}"
            f"{' and snapped' if one.choice.settings.get('snap') else ''}"
            for one in moved
        )
        plain = _percent(without.value)
        note(f"{own.recipe.name}: {plain} as boxes are, moved {values} (mean of mAP and COCO AP)")
    return chosen


def _percent(value: float | None) -> str:
    return "nothing to measure" if value is None else f"{value:.1f}"


def _moves(parts: Parts, recipe: HeadRecipe) -> list[Variant]:
    """Return what is tried of how far boxes move; post-processing that is not ours decides for itself."""
    detect = _ranked(parts.postprocess, recipe)
    if parts.boxes is None:
        return []
    if not isinstance(detect, PostprocessConfig):
        return [Variant(Choice({}, None, ()), detect, with_boxes=True)]
    moves = [{"box_step": step} for step in parts.tried.box_steps]
    if not parts.refines:
        return [
            Variant(Choice(move, None, ()), replace(detect, **move), with_boxes=True)  # type: ignore[arg-type]
            for move in moves
        ]
    assert detect.refined  # `refines` says so
    ends: list[dict[str, float]] = [{"refined": detect.refined, "snap": snap} for snap in parts.tried.snaps]
    if parts.tried.unrefined:
        ends = [{"refined": 0}, *ends]
    tried = [{**move, **end} for move in moves for end in ends]
    return [Variant(Choice(own, None, ()), replace(detect, **own), with_boxes=True) for own in tried]  # type: ignore[arg-type]


def views_of(parts: Parts, regions: SplitRegions) -> list[SplitRegions]:
    """Return a split as it is looked at when objects are detected: itself and, as configured, mirrored."""
    return [regions, regions.mirrored()] if parts.features.mirror else [regions]


def _ridge(chosen: Sequence[Chosen]) -> float | None:
    """Return the strength of the ridge regression of boxes, None where there is none or another."""
    boxes = chosen[0].boxes
    strength: float | None = None if boxes is None else boxes.settings.get("strength")
    return strength


def _reads_rows(chosen: Sequence[Chosen]) -> bool:
    """Whether something is trained on the rows of all regions after the layers were."""
    return _ridge(chosen) is not None or any(own.recipe.head.reads_rows for own in chosen)


def _words(settings: Mapping[str, Any]) -> str:
    shown = {k: f"{v:g}" if isinstance(v, float) else v for k, v in settings.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


@dataclass(frozen=True, eq=False)
class Trained:
    """A head trained with its final setting.

    Attributes:
        chosen: what it was trained with.
        model: the head and the box regression.
        train_s: wall clock of training this head alone.
        peak_rss_mb: largest memory meanwhile.
        details: figures of the training.
    """

    chosen: Chosen
    model: Model
    train_s: float
    peak_rss_mb: float
    details: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The head's."""
        return self.chosen.recipe.name


def train_heads(
    parts: Parts, learned: Representation, trainval: SplitRegions, chosen: Sequence[Chosen], run: Run
) -> list[Trained]:
    """Train every head with its setting, and box regression, on the regions of a split."""
    if _reads_rows(chosen):
        learned.fill(trainval)
    rows = learned.blocks(trainval)
    scalers = Scalers(rows)
    regressor, regressor_scaler = learned.regressor, None
    strength = _ridge(chosen)
    if parts.boxes is not None and strength is not None:
        regressor_scaler = scalers.get(parts.boxes.scaling)
        ridge = BoxRegressor(min_iou=parts.boxes.min_iou, strength=strength)
        regressor = ridge.fit(rows.scaled(regressor_scaler))
    refinement = learned.refinement
    if refinement is None and any(map(_refines, chosen)):
        refinement = _refinement(parts, learned, trainval, run)
    trained = []
    for own in chosen:
        scaler = scalers.get(own.recipe.scaling)
        with Meter() as meter:
            (fitted,) = own.recipe.fit(rows.scaled(scaler), [own.head.settings], n_jobs=run.n_jobs)
        seconds, peak = meter.seconds, meter.peak_rss_mb
        if not own.recipe.head.reads_rows:  # it was trained when the layers were
            seconds, peak = learned.learn_s, learned.peak_rss_mb
        support = None if fitted.support is None else rows.told(fitted.support)
        model = Model(fitted.scorer, scaler, regressor, regressor_scaler, support, refinement)
        trained.append(Trained(own, model, seconds, peak, fitted.details))
    return trained


def _refines(chosen: Chosen) -> bool:
    detect = None if chosen.with_boxes is None else chosen.with_boxes.detect
    return isinstance(detect, PostprocessConfig) and bool(detect.refined)


def _refinement(parts: Parts, learned: Representation, regions: SplitRegions, run: Run) -> Refinement:
    """Train what refines boxes on the regions around the objects of a split."""
    around = rows_around_objects(parts, learned.network, regions, run)
    fill_together([around.wanted], f"rows around objects of {regions.dataset.split}")
    refiner = train_refiner(around, parts.refine, seed=parts.seed, device=run.device, ranks=run.ranks)
    return Refinement(around.store.featurizer, refiner)


@dataclass(eq=False)
class Found:
    """Detections of a split and the wall clock of scoring and post-processing them."""

    detections: list[Detections]
    seconds: float = 0.0


def detect_all(
    name: str, model: Model, views: Sequence[StoredBlocks], variants: Sequence[Variant], *, kept: bool = True
) -> list[Found]:
    """Detect in every image once for each variant of post-processing; regions are read once for all.

    Args:
        name: of the head, for the progress bar.
        model: the trained head.
        views: the rows of a split and, where they are read too, of its mirror images.
        variants: of post-processing.
        kept: whether rows are read from the store, which other heads read as well. Otherwise they are
            computed as the saved detector does it, with what else is read of an image, and not kept.
    """
    blocks, runs = views[0], [Found([]) for _ in variants]
    images = (tuple(view.only(i) for view in views) for i in range(len(blocks)))
    # Kept rows are read in the one thread of this process, so that it is told how long an image takes.
    work, n_threads = partial(_detect, model, tuple(variants), kept), 1 if kept else images_at_once()
    found = blocks.engine.in_order(work, images, n_threads)
    for one in track(found, f"{name} on {blocks.regions.dataset.split}", total=len(blocks)):
        for run, (detections, seconds) in zip(runs, one, strict=True):
            run.detections.append(detections)
            run.seconds += seconds
    return runs


def _detect(
    model: Model, variants: Sequence[Variant], kept: bool, views: Sequence[StoredBlocks]
) -> list[tuple[Detections, float]]:
    """Return what each variant finds in the views of one image, and the seconds that it takes."""
    regions = views[0].regions
    n_gt, sample = regions.n_gt[0], regions.dataset.samples[0]
    boxes, mirrored = regions.boxes[0][n_gt:], None
    look, fine = _looks(model, views)
    if kept:
        rows = to_float32(views[0].features(0, slice(n_gt, None)))
        if len(views) > 1:
            mirrored = to_float32(views[1].features(0))
    else:
        rows, mirrored = look(boxes)
    started = time.perf_counter()
    scores, deltas = model.read(rows, mirrored)
    scored = time.perf_counter() - started
    found = []
    for variant in variants:
        started = time.perf_counter()
        own = deltas if variant.with_boxes else None
        detected, _ = model.detect(
            sample.image_id, sample.size, boxes, scores, own, variant.detect, look, fine
        )
        found.append((detected, scored + time.perf_counter() - started))
    return found


def _looks(model: Model, views: Sequence[StoredBlocks]) -> tuple[Look, RowReader | None]:
    """Return what reads regions of views of one image, and boxes that are to be refined.

    The image is opened when they are asked for; its network runs once for both. Variants of post-processing
    that refine the same boxes read them once.
    """
    others = [] if model.refinement is None else [model.refinement.featurizer]

    @functools.cache
    def opened() -> tuple[Look, list[RowReader]]:
        read, *fine = views[0].readers(0, *others)
        readers = [read, *(view.readers(0)[0] for view in views[1:])]
        return look_at(readers, views[0].regions.dataset.samples[0].size[1]), fine

    rows: dict[bytes, NDArray[np.float32]] = {}

    def fine(boxes: Boxes) -> NDArray[np.float32]:
        key = boxes.tobytes()
        if key not in rows:
            rows[key] = opened()[1][0](boxes)
        return rows[key]

    return (lambda boxes: opened()[0](boxes)), fine if others else None
