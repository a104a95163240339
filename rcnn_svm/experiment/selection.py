"""Settings chosen on the validation split: cost, kernel width, ridge strength, NMS, voting."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig, middle
from rcnn_svm.experiment.regions import StoredBlocks
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.store import to_float32
from rcnn_svm.files import scratch_file
from rcnn_svm.heads.assign import LabelRule
from rcnn_svm.heads.base import Scorer
from rcnn_svm.heads.bbox_regressor import BoxRegressor
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import FixedPointMining, PaperMining
from rcnn_svm.heads.rbf_svm import RBFSVMHead
from rcnn_svm.heads.softmax import SoftmaxHead
from rcnn_svm.postprocess import PostprocessConfig, postprocess
from rcnn_svm.progress import track

__all__ = [
    "Candidate",
    "Choice",
    "ScoredImage",
    "ScoredSplit",
    "choose_head",
    "choose_postprocess",
    "choose_regressor",
    "mean_ap",
    "score_images",
    "scored_once",
    "settled",
    "train_candidates",
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


def mean_ap(
    blocks: StoredBlocks, scored: Iterable[ScoredImage], detect: PostprocessConfig, config: ExperimentConfig
) -> float:
    """Return the mAP, in percent, of scored regions after `postprocess`."""
    dataset = blocks.regions.dataset
    detections = [
        postprocess(sample.image_id, sample.size, image.boxes, image.scores, image.deltas, detect)
        for sample, image in zip(dataset, scored, strict=True)
    ]
    result = evaluate_voc(detections, blocks.regions.truths, dataset.classes, rule=config.rule)
    return 100 * result.map(config.rule)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One head trained with one setting.

    Attributes:
        settings: what distinguishes it.
        scorer: the trained head.
        details: figures worth reporting, such as support vectors or the duality gap.
    """

    settings: dict[str, float]
    scorer: Scorer
    details: dict[str, Any]


def settings_of(name: str, config: HeadsConfig) -> list[dict[str, float]]:
    """Return every setting that the configuration names for a head, each once; C rises."""
    if name == "linear-svm":
        return [{"C": cost} for cost in sorted(set(config.linear_costs))]
    if name == "softmax-refit":
        return [{"C": cost} for cost in sorted(set(config.softmax_costs))]
    grid = itertools.product(dict.fromkeys(config.rbf_gammas), sorted(set(config.rbf_costs)))
    return [{"C": cost, "gamma": gamma} for gamma, cost in grid]


def settled(name: str, config: HeadsConfig) -> dict[str, float]:
    """Return the setting of a head, or of `ridge`, that is taken unseen: the middle of each grid."""
    if name == "ridge":
        return {"strength": middle(config.ridge_strengths)}
    if name == "rbf-svm":
        return {"C": middle(config.rbf_costs), "gamma": middle(config.rbf_gammas)}
    return {"C": middle(config.linear_costs if name == "linear-svm" else config.softmax_costs)}


def train_candidates(
    name: str,
    settings: Sequence[dict[str, float]],
    config: HeadsConfig,
    blocks: StoredBlocks,
    *,
    seed: int,
    n_jobs: int,
) -> Iterator[Candidate]:
    """Train one head with each of `settings`, in order.

    Args:
        name: `linear-svm`, `rbf-svm` or `softmax-refit`.
        settings: as `settings_of` returns them, or the one that was chosen.
        config: what is the same for all.
        blocks: scaled features of a training split.
        seed: of everything random.
        n_jobs: classes in parallel, where the solver trains them one by one.
    """
    costs = [setting["C"] for setting in settings]
    if name == "linear-svm":
        yield from _linear(settings, costs, config, blocks, seed, n_jobs)
    elif name == "softmax-refit":
        rule = LabelRule(config.softmax_positive_iou, min(0.5, config.softmax_positive_iou))
        head = SoftmaxHead(rule=rule)
        for setting, scorer in zip(settings, head.fit_path(blocks, costs), strict=True):
            yield Candidate(setting, scorer, {})
    else:
        rbf = RBFSVMHead(positive_weight=config.positive_weight, n_jobs=n_jobs)
        grid = rbf.fit_grid(blocks, sorted(set(costs)), list(dict.fromkeys(s["gamma"] for s in settings)))
        for setting, (_, _, machine) in zip(settings, grid, strict=True):
            details = {"n_support_vectors": len(machine.support), "mined_regions": rbf.n_rows_}
            yield Candidate(setting, machine, details)


def _linear(
    settings: Sequence[dict[str, float]],
    costs: Sequence[float],
    config: HeadsConfig,
    blocks: StoredBlocks,
    seed: int,
    n_jobs: int,
) -> Iterator[Candidate]:
    head = LinearSVMHead(
        loss=config.loss,
        positive_weight=config.positive_weight,
        mining=PaperMining() if config.mining == "paper" else FixedPointMining(),
        solver=config.solver,
        n_jobs=n_jobs,
        random_state=seed,
    )
    if config.mining == "fixed-point" and len(settings) > 1:  # a path is coarser: good enough to rank
        for setting, scorer in zip(settings, head.fit_path(blocks, costs), strict=True):
            yield Candidate(setting, scorer, {"mining_passes": head.mining_.passes})
    else:
        for setting in settings:
            head.set_params(C=setting["C"]).fit(blocks)
            yield Candidate(setting, head.scorer_, {"mining_passes": head.mining_.passes})


def choose_head(
    name: str,
    config: ExperimentConfig,
    train: StoredBlocks,
    val: StoredBlocks,
    scaler: FeatureScaler,
    *,
    n_jobs: int,
) -> tuple[Choice, Model]:
    """Train on `train` with every setting, measure each on `val` by plain NMS, keep the best.

    Equals go to the smaller cost, which comes first.

    Args:
        name: `linear-svm`, `rbf-svm` or `softmax-refit`.
        config: the grids.
        train: unscaled features of the training split.
        val: unscaled features of the validation split.
        scaler: fitted on `train`.
        n_jobs: classes in parallel.
    """
    detect = replace(config.detect, regression="off", vote_iou=None)
    tried: list[tuple[dict[str, Any], float]] = []
    best: Model | None = None
    settings = settings_of(name, config.heads)
    fits = train_candidates(
        name, settings, config.heads, train.scaled(scaler), seed=config.seed, n_jobs=n_jobs
    )
    for candidate in track(fits, f"{name} settings", total=len(settings), unit="fit"):
        model = Model(candidate.scorer, scaler)
        value = mean_ap(val, score_images(val, model), detect, config)
        if best is None or value > max(earlier for _, earlier in tried):
            best = model
        tried.append((candidate.settings, value))
    assert best is not None  # the configuration refuses empty grids
    return _winner(tried), best


def choose_regressor(
    config: ExperimentConfig,
    train: StoredBlocks,
    val: StoredBlocks,
    scaler: FeatureScaler,
    learned: BoxRegressor | None,
    model: Model,
    scored: ScoredSplit,
) -> tuple[Choice, Model]:
    """Choose the box regression by the mAP that it gives a head on `val`.

    Candidates are ridge regressions of every strength, and the regression that was learned
    together with the representation where there is one.

    Args:
        config: the strengths.
        train: unscaled features of the training split.
        val: unscaled features of the validation split.
        scaler: fitted on `train`; the ridge regressions read scaled rows.
        learned: reads unscaled rows, or None.
        model: the head.
        scored: its scores on `val`.

    Returns:
        The choice, whose settings are `{"strength": s}` or `{"learned": True}`, and the head with it.
    """
    detect = replace(config.detect, vote_iou=None)
    strengths = config.heads.ridge_strengths
    models = [
        replace(model, regressor=regressor, regressor_scaler=scaler)
        for regressor in BoxRegressor().fit_path(train.scaled(scaler), strengths)
    ]
    settings: list[dict[str, Any]] = [{"strength": strength} for strength in strengths]
    if learned is not None:
        models.append(replace(model, regressor=learned, regressor_scaler=None))
        settings.append({"learned": True})
    tried = [
        (setting, mean_ap(val, replace(scored, boxes_by=candidate), detect, config))
        for setting, candidate in zip(settings, models, strict=True)
    ]
    choice = _winner(tried)
    return choice, models[settings.index(choice.settings)]


def choose_postprocess(
    config: ExperimentConfig, val: StoredBlocks, scored: ScoredSplit
) -> tuple[Choice, PostprocessConfig]:
    """Choose NMS and its threshold, or soft-NMS; and, where boxes are regressed, box voting."""
    with_boxes = scored.boxes_by is not None
    votes = config.heads.vote_ious if with_boxes else (0.0,)
    tried, configs = [], []
    plain = [{"max_iou": value} for value in config.heads.max_ious]
    soft = [{"soft_nms_sigma": value} for value in config.heads.soft_nms_sigmas]
    for suppression, vote in itertools.product([*plain, *soft], votes):
        detect = replace(
            config.detect,
            max_iou=suppression.get("max_iou", config.detect.max_iou),
            soft_nms_sigma=suppression.get("soft_nms_sigma"),
            vote_iou=vote or None,
            regression=config.detect.regression if with_boxes else "off",
        )
        configs.append(detect)
        tried.append(({**suppression, "vote_iou": vote}, mean_ap(val, scored, detect, config)))
    choice = _winner(tried)
    return choice, configs[[setting for setting, _ in tried].index(choice.settings)]


def _winner(tried: Sequence[tuple[dict[str, Any], float]]) -> Choice:
    """Return the best of what was tried, the first of equals."""
    best = int(np.argmax([value for _, value in tried]))
    return Choice(*tried[best], tuple(tried))
