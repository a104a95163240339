"""Why SVMs and not the softmax? One factor at a time, on the same regions and the same features.

`run_study` trains every cell of a `design` with the same number of settings to choose from on val, and looks
at test once for each. They are chosen with the first seed; further seeds train with what was chosen. What
cells share (regions, features, learned layers) is computed once; what a cell found is kept in the cache, so
that a study that was cut short goes on where it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rcnn_svm.cache import CacheLimit
from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.classification import Classification, classify
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.effects import (
    Effect,
    Measured,
    Share,
    Table,
    effects_of,
    holm,
    interactions_of,
    measure,
    measure_accuracy,
    simple_effects,
)
from rcnn_svm.evaluation.effects import shares as shares_of
from rcnn_svm.evaluation.voc import EvalResult, Rule, evaluate_voc
from rcnn_svm.experiment.choosing import Scalers, Variant, detect_all, without_boxes
from rcnn_svm.experiment.closer import CloserLook, look_closer
from rcnn_svm.experiment.data import require_measurable
from rcnn_svm.experiment.design import BOXES, SOFTMAX, SVM, THREE, Cell, Design, Layer
from rcnn_svm.experiment.kept import Kept
from rcnn_svm.experiment.learning import Representation
from rcnn_svm.experiment.measure import Meter
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import Prepared, prepare
from rcnn_svm.experiment.regions import SplitRegions, StoredBlocks
from rcnn_svm.experiment.selection import Choice, choose_head
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.postprocess import PAPER
from rcnn_svm.progress import Stages, note
from rcnn_svm.structures import Dataset, Detections

__all__ = ["Outcome", "Study", "analyse", "run_study"]

_PLAIN = without_boxes(PAPER)
_NOTHING = Choice({}, None, ())


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one cell reached with one seed.

    Attributes:
        settings: that won on val with the first seed.
        tried: all of them, each with its mAP on val with that seed, in percent.
        train_s: wall clock of the final training on trainval.
        peak_rss_mb: largest memory of the process meanwhile, in 10^6 bytes; None where an older version
            trained it, which did not look.
        detections: on test, one record per image, by whether boxes are regressed.
        evaluations: VOC AP of them.
        classification: which class each image was taken for; None but for whole images of one class each.
        coco: COCO's AP, AP50 and AP75 of them, fractions.
    """

    settings: Mapping[str, Any]
    tried: Sequence[Mapping[str, Any]]
    train_s: float
    peak_rss_mb: float | None
    detections: Mapping[bool, list[Detections]]
    evaluations: Mapping[bool, EvalResult]
    classification: Classification | None
    coco: Mapping[bool, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Study:
    """A finished study.

    Attributes:
        parts: that the cells vary.
        splits: the images.
        design: the cells, those that were left out too.
        seeds: each cell was trained with each.
        outcomes: by cell and seed.
        values: what each cell reached over the seeds, by cell and whether boxes are regressed.
        effects: of every pair of levels of a factor, boxes last; one family for Holm's method.
        interactions: how the effect of one factor's levels changes between those of another; another family.
        edges: of the cube between R-CNN's SVMs and its softmax: what each of the three changes does at each
            combination of the other two, a family of its own; empty where the study does not cross all three.
        accuracy: of whole images of one class each, what each cell reached by `accuracy` and by `balanced
            accuracy`; else empty.
        accuracy_effects: the effects on accuracy, another family.
        shares: without and with box regression, what the label rule, the negatives and the loss have of the
            difference between R-CNN's SVMs and its softmax; empty where the study does not cross all three.
        seconds: wall clock by stage.
        looks: a closer look at the linear SVM, the RBF SVM and the softmax, those that the study has.
        n_kept: cells that an earlier run had finished, all seeds together.
    """

    parts: Parts
    splits: Splits
    design: Design
    seeds: tuple[int, ...]
    outcomes: Mapping[tuple[tuple[str, ...], int], Outcome]
    values: Mapping[tuple[tuple[str, ...], bool], Measured]
    effects: Sequence[Effect]
    interactions: Sequence[Effect]
    edges: Sequence[Effect]
    accuracy: Mapping[str, Mapping[tuple[str, ...], Measured]]
    accuracy_effects: Sequence[Effect]
    shares: Mapping[bool, Sequence[Share]]
    seconds: Mapping[str, float]
    looks: Sequence[CloserLook] = ()
    n_kept: int = 0

    def __repr__(self) -> str:
        return (
            f"Study({len(self.design.trained)} cells, {len(self.seeds)} seeds, {len(self.effects)} effects)"
        )


def run_study(parts: Parts, splits: Splits, run: Run, design: Design, *, n_seeds: int = 1) -> Study:
    """Run every cell of a design on the same regions and features.

    Args:
        parts: of the experiment that the design was made for. Its heads and its post-processing are not used:
            every cell has NMS at 0.3 as in R-CNN, and ridge regression of boxes of one strength.
        splits: of one data set.
        run: how.
        design: the cells.
        n_seeds: train each cell with so many seeds, from that of `parts` on: of learned layers, random
            negatives and solvers. Its setting is chosen with the first.

    Raises:
        DataError: as `run_experiment`, and a test split without an object.
    """
    require_measurable(splits.test)
    seeds = tuple(range(parts.seed, parts.seed + n_seeds))
    stages = Stages([*(f"seed {seed}" for seed in seeds), "closer look"])
    room = CacheLimit(run.cache, run.cache_limit)
    outcomes: dict[tuple[tuple[str, ...], int], Outcome] = {}
    n_kept = 0
    for seed in seeds:
        seeded = replace(parts, seed=seed)
        kept = Kept(run.cache, splits, seeded)
        missing: list[Cell] = []
        first = {cell.key: own for cell in design.trained if (own := outcomes.get((cell.key, seeds[0])))}
        for cell in design.trained:
            known = kept.read(_what(cell, seed, first.get(cell.key)))
            if known is None:
                missing.append(cell)
            else:
                about, found = {"peak_rss_mb": None} | known[0], known[1]
                by_level = {BOXES.levels[level]: own for level, own in found.items()}
                outcomes[cell.key, seed] = _measured(
                    **about, found=by_level, test=splits.test, rule=parts.rule
                )
                n_kept += 1
        old = len(design.trained) - len(missing)
        words = f"{len(missing)} cells" + (f", {old} more are kept from before" if old else "")
        with stages(f"seed {seed}", words):
            for cell, outcome in _train(seeded, splits, run, design, missing, first, room):
                names = ("settings", "tried", "train_s", "peak_rss_mb")
                about = {name: getattr(outcome, name) for name in names}
                by_name = {
                    level: outcome.detections[boxed]
                    for level, boxed in BOXES.levels.items()
                    if boxed in outcome.detections
                }
                kept.write(_what(cell, seed, first.get(cell.key)), about, by_name)
                outcomes[cell.key, seed] = outcome
    with stages("closer look", "probabilities and mistakes of three heads"):
        looks = _look(parts, splits, run, design, outcomes, room)
    room.hold(finished=True)
    seconds = dict(stages.seconds)
    return replace(analyse(parts, splits, design, seeds, outcomes, seconds), looks=looks, n_kept=n_kept)


def _what(cell: Cell, seed: int, first: Outcome | None) -> dict[str, Any]:
    """Return what tells a cell from others in the cache: its regions and rows by name, its head in full.

    Args:
        cell: of the design.
        seed: that it is trained with.
        first: what it was with the first seed, where that is another one.
    """
    chosen = {} if first is None else {"settings": dict(first.settings)}
    return {"levels": dict(cell.levels), "head": repr(cell.head(seed)), **chosen}


def _chosen(recipe: HeadRecipe, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the setting that won, in full; what is kept of it is what is shown."""
    return recipe.settings()[max(range(len(tried)), key=lambda i: float(tried[i]["val_map"]))]


def _look(
    parts: Parts,
    splits: Splits,
    run: Run,
    design: Design,
    outcomes: Mapping[tuple[tuple[str, ...], int], Outcome],
    room: CacheLimit,
) -> list[CloserLook]:
    """Look closer at those of three heads that the design holds."""
    of_regions = ("label", "negatives") if splits.whole else ()  # an image is a positive or a negative
    cells = {
        name: design.cells[key]
        for name, levels in THREE.items()
        if (
            key := tuple(
                home if factor in of_regions else levels.get(factor, home)
                for factor, home in design.home.items()
            )
        )
        in design.cells
    }
    if not cells:
        return []
    seeded = design.parts_of(next(iter(cells.values())), parts)
    ready = prepare(seeded, splits, run, Stages(("proposals", "network", "features")), room)
    learned = Layer().rows(ready.learn(ready.train))
    for split in (ready.train, ready.val, ready.test):
        learned.fill(split)
    scalers = Scalers(learned.blocks(ready.train))
    looks = []
    for name, cell in cells.items():
        recipe = cell.head(parts.seed)
        looks.append(
            look_closer(
                name,
                recipe,
                _chosen(recipe, outcomes[cell.key, parts.seed].tried),
                ready,
                learned,
                scalers.get(recipe.scaling),
                _PLAIN,
            )
        )
    return looks


def _train(
    parts: Parts,
    splits: Splits,
    run: Run,
    design: Design,
    cells: Sequence[Cell],
    first: Mapping[tuple[str, ...], Outcome],
    room: CacheLimit,
) -> Iterator[tuple[Cell, Outcome]]:
    """Train cells, those of the same regions and rows one after the other.

    Args:
        parts: of the experiment, with the seed.
        splits: the images.
        run: how.
        design: of the study.
        cells: some of it.
        first: what they were with the first seed; empty where this is the first.
        room: of the cache.
    """
    for _, same_regions in itertools.groupby(cells, key=lambda cell: cell.levels["proposals"]):
        ready: dict[Any, _Rows] = {}
        for layer_name, group in itertools.groupby(same_regions, key=lambda cell: cell.levels["layer"]):
            own = list(group)
            layer: Layer = design.factors["layer"].levels[layer_name]
            if layer.learner not in ready:
                seeded = design.parts_of(own[0], parts)
                stages = Stages(("proposals", "network", "features"))
                ready = {layer.learner: _Rows(prepare(seeded, splits, run, stages, room), choose=not first)}
            bench = ready[layer.learner].of(layer)
            for cell in own:
                recipe, chosen = cell.head(parts.seed), first.get(cell.key)
                tried = _tried(bench, recipe) if chosen is None else chosen.tried
                yield cell, _outcome(bench, recipe, tried)
            room.hold()


class _Rows:
    """What cells of the same regions share: what was learned from trainval, and from train to choose on."""

    def __init__(self, ready: Prepared, *, choose: bool) -> None:
        self._ready = ready
        self._first = ready.learn(ready.train) if choose else None
        self._final = ready.learn(ready.trainval)
        self._bench: dict[Layer, _Bench] = {}

    def of(self, layer: Layer) -> _Bench:
        """Return what is ready to train heads on the rows of a layer."""
        if layer not in self._bench:
            first = None if self._first is None else layer.rows(self._first)
            self._bench = {layer: _Bench.of(self._ready, first, layer.rows(self._final))}
        return self._bench[layer]


@dataclass(frozen=True, eq=False)
class _Seen:
    """The rows that heads are trained on, those that they are measured on, and how the first are scaled."""

    training: StoredBlocks
    held: StoredBlocks
    scalers: Scalers

    @classmethod
    def of(cls, learned: Representation, training: SplitRegions, held: SplitRegions) -> _Seen:
        for split in (training, held):
            learned.fill(split)
        rows = learned.blocks(training)
        return cls(rows, learned.blocks(held), Scalers(rows))


@dataclass(frozen=True, eq=False)
class _Bench:
    """The rows of one layer, and what the heads on them share.

    Attributes:
        ready: the experiment.
        first: train and val; None where nothing is chosen.
        final: trainval and test.
        regressor: ridge regression of boxes on trainval.
    """

    ready: Prepared
    first: _Seen | None
    final: _Seen
    regressor: BoxRegressor | None

    @classmethod
    def of(cls, ready: Prepared, first: Representation | None, final: Representation) -> _Bench:
        """Compute the rows, and fit ridge regression of boxes on them."""
        chosen = None if first is None else _Seen.of(first, ready.train, ready.val)
        seen, parts, regressor = _Seen.of(final, ready.trainval, ready.test), ready.parts, None
        if parts.boxes is not None:
            ridge = BoxRegressor(min_iou=parts.boxes.min_iou, **parts.boxes.settled())
            regressor = ridge.fit(seen.training.scaled(seen.scalers.get(parts.boxes.scaling)))
        return cls(ready, chosen, seen, regressor)


def _tried(bench: _Bench, recipe: HeadRecipe) -> list[dict[str, Any]]:
    """Train on train with every setting, and measure each on val."""
    seen, rule, n_jobs = bench.first, bench.ready.parts.rule, bench.ready.run.n_jobs
    assert seen is not None  # settings are chosen with the first seed
    scaler = seen.scalers.get(recipe.scaling)
    choice, _ = choose_head(recipe, seen.training, seen.held, scaler, _PLAIN, rule, n_jobs=n_jobs)
    note(f"{recipe.name}: {choice.val_map:.1f} mAP on {seen.held.regions.dataset.split}")
    return [{"settings": recipe.shown(settings), "val_map": value} for settings, value in choice.tried]


def _outcome(bench: _Bench, recipe: HeadRecipe, tried: Sequence[Mapping[str, Any]]) -> Outcome:
    """Train on trainval with the setting that won, detect in test without and with box regression."""
    parts, settings, seen = bench.ready.parts, _chosen(recipe, tried), bench.final
    scaler = seen.scalers.get(recipe.scaling)
    with Meter() as meter:
        (fitted,) = recipe.fit(seen.training.scaled(scaler), [settings], n_jobs=bench.ready.run.n_jobs)
    model, variants = Model(fitted.scorer, scaler), [Variant(_NOTHING, _PLAIN, with_boxes=False)]
    if parts.boxes is not None:
        box_scaler = seen.scalers.get(parts.boxes.scaling)
        model = replace(model, regressor=bench.regressor, regressor_scaler=box_scaler)
        variants.append(Variant(_NOTHING, PAPER, with_boxes=True))
    runs = detect_all(recipe.name, model, [seen.held], variants)
    found = {variant.with_boxes: own.detections for variant, own in zip(variants, runs, strict=True)}
    return _measured(
        recipe.shown(settings),
        tried,
        meter.seconds,
        meter.peak_rss_mb,
        found,
        seen.held.regions.dataset,
        parts.rule,
    )


def _measured(
    settings: Mapping[str, Any],
    tried: Sequence[Mapping[str, Any]],
    train_s: float,
    peak_rss_mb: float | None,
    found: Mapping[bool, list[Detections]],
    test: Dataset,
    rule: Rule,
) -> Outcome:
    truths = [sample.truth for sample in test]
    evaluations = {boxed: evaluate_voc(own, truths, test.classes, rule=rule) for boxed, own in found.items()}
    coco = {boxed: evaluate_coco(own, truths, test.classes).summary() for boxed, own in found.items()}
    few = {boxed: {name: own[name] for name in ("AP", "AP50", "AP75")} for boxed, own in coco.items()}
    classification = classify(found[False], truths, test.classes) if test.whole else None
    return Outcome(settings, tried, train_s, peak_rss_mb, found, evaluations, classification, few)


def analyse(
    parts: Parts,
    splits: Splits,
    design: Design,
    seeds: Sequence[int],
    outcomes: Mapping[tuple[tuple[str, ...], int], Outcome],
    seconds: Mapping[str, float],
) -> Study:
    """Measure the cells of a study, and the effects of its factors.

    Args:
        parts: of the experiment.
        splits: the images.
        design: of the study.
        seeds: that the cells were trained with.
        outcomes: by the key of a cell and seed.
        seconds: wall clock by stage.
    """
    results = {
        (*cell.key, level): [outcomes[cell.key, seed].evaluations[boxed] for seed in seeds]
        for cell in design.trained
        for level, boxed in BOXES.levels.items()
        if boxed in outcomes[cell.key, seeds[0]].evaluations  # whole images have no boxes to regress
    }
    found = measure(results, n_resamples=parts.n_bootstrap, seed=parts.seed, rule=parts.rule)
    effects: list[Effect] = []
    twofold: list[Effect] = []
    edges: list[Effect] = []
    divided: dict[bool, Sequence[Share]] = {}
    for plane in design.planes:
        keys = plane.keys(design.home)
        cells = {
            (*own, level): found[*key, level]
            for own, key in keys.items()
            for level in BOXES.levels
            if (*key, level) in found
        }
        table = Table((*plane.levels, BOXES.name), cells)
        first = plane is design.planes[0]
        effects += [
            e for e in effects_of(table) if e.factor in plane.about or (first and e.factor == BOXES.name)
        ]
        twofold += [
            e for e in interactions_of(table) if any(name in plane.about for name in e.factor.split(" x "))
        ]
        if set(SVM) <= set(plane.levels):
            corners = {name: (SVM[name], SOFTMAX[name]) for name in SVM}
            for name, ends in corners.items():
                others = {other: own for other, own in corners.items() if other != name}
                edges += simple_effects(table, name, *ends, others)
            for level, boxed in BOXES.levels.items():
                both = [(*(end[name] for name in plane.levels), level) for end in (SVM, SOFTMAX)]
                divided[boxed] = shares_of(table, *both)
    effects.sort(key=lambda e: e.factor == BOXES.name)
    values = {
        (cell.key, boxed): found[*cell.key, level]
        for cell in design.trained
        for level, boxed in BOXES.levels.items()
        if (*cell.key, level) in found
    }
    accuracy, by_accuracy = _by_accuracy(parts, design, seeds, outcomes)
    return Study(
        parts,
        splits,
        design,
        tuple(seeds),
        outcomes,
        values,
        holm(effects),
        holm(twofold),
        holm(edges),
        accuracy,
        holm(by_accuracy),
        divided,
        seconds,
    )


def _by_accuracy(
    parts: Parts,
    design: Design,
    seeds: Sequence[int],
    outcomes: Mapping[tuple[tuple[str, ...], int], Outcome],
) -> tuple[dict[str, dict[tuple[str, ...], Measured]], list[Effect]]:
    """Return accuracy and balanced accuracy of the cells, and the effects on accuracy; nothing without."""
    results = {
        cell.key: [own for seed in seeds if (own := outcomes[cell.key, seed].classification) is not None]
        for cell in design.trained
    }
    if not all(results.values()):
        return {}, []
    found = measure_accuracy(results, n_resamples=parts.n_bootstrap, seed=parts.seed)
    effects: list[Effect] = []
    for plane in design.planes:
        keys = plane.keys(design.home)
        cells = {own: found["accuracy"][key] for own, key in keys.items() if key in found["accuracy"]}
        effects += [e for e in effects_of(Table(tuple(plane.levels), cells)) if e.factor in plane.about]
    return found, effects
