"""Settings chosen on the validation split: cost, kernel width, ridge strength, NMS, voting."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.voc import Rule, evaluate_voc
from rcnn_svm.experiment.parts import BoxRecipe, PostprocessGrid
from rcnn_svm.experiment.regions import StoredBlocks
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import to_float32
from rcnn_svm.files import scratch_file
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.postprocess import Postprocess, PostprocessConfig
from rcnn_svm.progress import track
from rcnn_svm.structures import Detections

__all__ = [
    "Choice",
    "ScoredImage",
    "ScoredSplit",
    "choose_head",
    "choose_postprocess",
    "choose_regressor",
    "detected",
    "mean_ap",
    "score_images",
    "scored_once",
]


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """The regions of one image that can matter, scored.

    Attributes:
        boxes: (R, 4) proposals.
        scores: (R, K).
        deltas: (R, K, 4) or None.
    """

    boxes: Boxes
    scores: NDArray[np.float32]
    deltas: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Choice:
    """What won on the validation split.

    Attributes:
        settings: the winner.
        val_map: its mAP there, in percent; None where nothing was measured.
        tried: (settings, mAP) of everything that was tried.
    """

    settings: dict[str, Any]
    val_map: float | None
    tried: tuple[tuple[dict[str, Any], float], ...]


def score_images(blocks: StoredBlocks, model: Model) -> Iterator[ScoredImage]:
    """Score the proposals of each image of unscaled blocks; ground-truth rows are left out."""
    for i in range(len(blocks)):
        n_gt = blocks.regions.n_gt[i]
        scores = model.scores(to_float32(blocks.features(i, slice(n_gt, None))))
        yield ScoredImage(blocks.regions.boxes[i][n_gt:], scores)


@dataclass(frozen=True, eq=False)
class ScoredSplit:
    """The scored proposals of a split, to be gone through several times; iterate over it.

    Scores lie in a file and deltas are computed anew each time: 20 classes are 80 and 320 bytes a region,
    which no memory holds for a large split.

    Attributes:
        blocks: the unscaled rows.
        file: (R, K) float32 scores of all images in a row.
        boxes_by: the model whose deltas the images get; None for none.
    """

    blocks: StoredBlocks
    file: IO[bytes]
    boxes_by: Model | None = None

    def __iter__(self) -> Iterator[ScoredImage]:
        n_classes, at = len(self.blocks.classes), 0
        for i, n_gt in enumerate(self.blocks.regions.n_gt):
            boxes = self.blocks.regions.boxes[i][n_gt:]
            self.file.seek(at)
            stored = self.file.read(4 * n_classes * len(boxes))
            at += len(stored)
            scores = np.frombuffer(stored, np.float32).reshape(len(boxes), n_classes)
            deltas = None
            if self.boxes_by is not None:
                deltas = self.boxes_by.deltas(to_float32(self.blocks.features(i, slice(n_gt, None))))
            yield ScoredImage(boxes, scores, deltas)


@contextlib.contextmanager
def scored_once(blocks: StoredBlocks, model: Model) -> Iterator[ScoredSplit]:
    """Score a split and keep the scores on disk inside the block.

    Raises:
        DiskSpaceError: the disk is full.
    """
    with scratch_file(blocks.store.root) as file:
        for image in score_images(blocks, model):
            file.write(np.asarray(image.scores, np.float32).tobytes())
        yield ScoredSplit(blocks, file)


def detected(blocks: StoredBlocks, scored: Iterable[ScoredImage], detect: Postprocess) -> list[Detections]:
    """Return the detections of each image from its scored regions."""
    return [
        detect(sample.image_id, sample.size, image.boxes, image.scores, image.deltas)
        for sample, image in zip(blocks.regions.dataset, scored, strict=True)
    ]


def mean_ap(blocks: StoredBlocks, scored: Iterable[ScoredImage], detect: Postprocess, rule: Rule) -> float:
    """Return the mAP, in percent, of scored regions after post-processing."""
    detections = detected(blocks, scored, detect)
    result = evaluate_voc(detections, blocks.regions.truths, blocks.classes, rule=rule)
    return 100 * result.map(rule)


def choose_head(
    recipe: HeadRecipe,
    train: StoredBlocks,
    val: StoredBlocks,
    scaler: FeatureScaler | None,
    detect: Postprocess,
    rule: Rule,
    *,
    n_jobs: int,
) -> tuple[Choice, Model]:
    """Train on `train` with every setting, measure each on `val` without box regression, keep the best.

    Equals go to the setting that is tried first, the smaller cost.

    Args:
        recipe: the head and what is tried for it.
        train: unscaled features of the training split.
        val: unscaled features of the validation split.
        scaler: fitted on `train`; None for rows as they are.
        detect: from scores to detections, without box regression.
        rule: of AP.
        n_jobs: classes in parallel.
    """
    tried: list[tuple[dict[str, Any], float]] = []
    best: Model | None = None
    settings = recipe.settings()
    fits = recipe.fit(train.scaled(scaler), settings, n_jobs=n_jobs)
    for fitted in track(fits, f"{recipe.name} settings", total=len(settings), unit="fit"):
        model = Model(fitted.scorer, scaler)
        value = mean_ap(val, score_images(val, model), detect, rule) if len(settings) > 1 else 0.0
        if best is None or value > max(earlier for _, earlier in tried):
            best = model
        tried.append((dict(fitted.settings), value))
    assert best is not None  # a grid has a setting at least
    if len(settings) == 1:  # nothing was chosen
        return Choice(settings[0], None, ()), best
    return winner(tried), best


def choose_regressor(
    recipe: BoxRecipe,
    train: StoredBlocks,
    val: StoredBlocks,
    scaler: FeatureScaler | None,
    learned: BoxRegressor | None,
    model: Model,
    scored: ScoredSplit,
    detect: Postprocess,
    rule: Rule,
) -> tuple[Choice, Model]:
    """Choose the box regression by the mAP that it gives a head on `val`.

    Candidates are ridge regressions of every strength, and the regression that was learned
    together with the representation where there is one.

    Args:
        recipe: the strengths.
        train: unscaled features of the training split.
        val: unscaled features of the validation split.
        scaler: fitted on `train`; the ridge regressions read scaled rows.
        learned: reads unscaled rows, or None.
        model: the head.
        scored: its scores on `val`.
        detect: from scores to detections, without box voting.
        rule: of AP.

    Returns:
        The choice, whose settings are `{"strength": s}` or `{"learned": True}`, and the head with it.
    """
    ridge = BoxRegressor(min_iou=recipe.min_iou)
    models = [
        replace(model, regressor=regressor, regressor_scaler=scaler)
        for regressor in ridge.fit_path(train.scaled(scaler), recipe.strengths)
    ]
    settings: list[dict[str, Any]] = [{"strength": strength} for strength in recipe.strengths]
    if learned is not None:
        models.append(replace(model, regressor=learned, regressor_scaler=None))
        settings.append({"learned": True})
    tried = [
        (setting, mean_ap(val, replace(scored, boxes_by=candidate), detect, rule))
        for setting, candidate in zip(settings, models, strict=True)
    ]
    choice = winner(tried)
    return choice, models[settings.index(choice.settings)]


def choose_postprocess(
    base: Postprocess, grid: PostprocessGrid, val: StoredBlocks, scored: ScoredSplit, rule: Rule
) -> tuple[Choice, Postprocess]:
    """Choose NMS and its threshold, or soft-NMS; where boxes are regressed, how far, and box voting.

    Post-processing that is not ours is taken as it is.
    """
    if not isinstance(base, PostprocessConfig):
        return Choice({}, mean_ap(val, scored, base, rule), ()), base
    tried, configs = [], []
    for settings, detect in grid.of(base, with_boxes=scored.boxes_by is not None):
        configs.append(detect)
        tried.append((settings, mean_ap(val, scored, detect, rule)))
    choice = winner(tried)
    return choice, configs[[setting for setting, _ in tried].index(choice.settings)]


def winner(tried: Sequence[tuple[dict[str, Any], float]]) -> Choice:
    """Return the best of what was tried, the first of equals."""
    best = int(np.argmax([value for _, value in tried]))
    return Choice(*tried[best], tuple(tried))
