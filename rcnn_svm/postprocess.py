"""From scores of regions to detections: caps, box regression, clipping, NMS, box voting.

One function serves training-time validation, evaluation and `detect`, so that what was chosen
on the validation split is exactly what runs later, but for a second look, which needs features
(`detector.Model.detect`). Needs numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.boxes import Boxes, area, clip, decode_deltas, draw_to_regions, nms, soft_nms, vote_boxes
from rcnn_svm.config import Count, Interval, NotNegative, Positive, Share, check
from rcnn_svm.structures import Detections

__all__ = [
    "MARGINS_OVERLAP_POWER",
    "OVERLAP_POWER",
    "PAPER",
    "REFINED",
    "WHOLE_IMAGE",
    "Postprocess",
    "PostprocessConfig",
    "Step",
    "candidates_to_refine",
    "moved_regions",
    "postprocess",
    "postprocess_traced",
    "refined",
    "snapped",
]

REFINED = 150
"""How many boxes of an image are refined where nothing else is said."""

OVERLAP_POWER, MARGINS_OVERLAP_POWER = 3.0, 1.0
"""How many times the logarithm of an estimated IoU is added to log-odds, and to margins."""

_NEAR_COPY = 0.7
"""IoU above which a box that is to be refined is a copy of a surer one."""
_LEAST = -1e30
"""Below any score: a box that is of one class has minus infinity for the others."""

Step: TypeAlias = Annotated[float, Interval(0, 1, "right")]
"""A part of the way that box regression asks for, from nearly none to all of it."""


class Postprocess(Protocol):
    """Anything that makes detections of scored regions: a `PostprocessConfig`, or your own."""

    def __call__(
        self,
        image_id: str,
        size: tuple[int, int],
        boxes: Boxes,
        scores: NDArray[np.float32],
        deltas: NDArray[np.float32] | None,
    ) -> Detections:
        """Return the detections of one image, as `postprocess` does; several threads may call it."""
        ...


@dataclass(frozen=True)
class PostprocessConfig:
    """How regions become detections.

    Attributes:
        max_iou: NMS drops a box whose IoU with a better one of its class is > this.
        regression: apply box regression before NMS (R-CNN's order), after it, or not at all.
        box_step: how much of the way that box regression asks for a box is moved; 1 is all of it. Half of it
            loses less where a region lies well already or the regression is wrong.
        vote_iou: replace a kept box by the weighted mean of the class's boxes with IoU >= this;
            None for no voting.
        soft_nms_sigma: decay a box's probability, the sigmoid of its score, by exp(-IoU^2 / sigma) instead of
            dropping it; None for plain NMS. What it returns is on the scale of the scores all the same.
        max_candidates: per class, only so many of the best regions are looked at (R-CNN: 100).
        max_detections: per image over all classes, after NMS; None for all.
        min_score: regions that score lower are not looked at.
        second_look: so many of the surest regions are scored again where box regression has moved them, and
            compete with all others; 0 for none. Their features are computed for it, a few percent of an
            image's work with 100 of 1000 regions.
        refined: so many of the surest boxes, of all classes together, are moved once more by the detector's
            refiner, and ranked by how well it says that they lie, too; 0 for none. None stands for
            `REFINED` in an experiment that can learn it and chooses nothing on val, else for 0, see
            `ExperimentConfig.build`.
        overlap_power: their scores get the logarithm of the estimated IoU, so many times. None is 3, and 1
            where an experiment trains a head whose scores are margins: they tell hits from background within
            fewer units than log-odds do.
        snap: so much of the way detections are drawn to the region proposals that overlap them, see
            `draw_to_regions`, after all else; 0 lets them be.
    """

    max_iou: Share = 0.3
    regression: Literal["before-nms", "after-nms", "off"] = "before-nms"
    box_step: Step = 1.0
    vote_iou: Share | None = 0.5
    soft_nms_sigma: Positive | None = None
    max_candidates: Count = 400
    max_detections: Count | None = 300
    min_score: float = float("-inf")
    second_look: Annotated[int, Interval(0)] = 0
    refined: Annotated[int, Interval(0)] | None = 0
    overlap_power: NotNegative | None = None
    snap: Share = 0.0

    def __post_init__(self) -> None:
        check(self, where="detect")

    def __call__(
        self,
        image_id: str,
        size: tuple[int, int],
        boxes: Boxes,
        scores: NDArray[np.float32],
        deltas: NDArray[np.float32] | None,
    ) -> Detections:
        """Run `postprocess`."""
        return postprocess(image_id, size, boxes, scores, deltas, self)


PAPER = PostprocessConfig(vote_iou=None, max_candidates=100, max_detections=None)
"""R-CNN's own, 100 candidates a class, regression, NMS at 0.3, no cap over classes
[rcnn_test_bbox_regressor.m]."""


WHOLE_IMAGE = PostprocessConfig(regression="off", vote_iou=None, max_candidates=1, max_detections=None)
"""Of an image that is its only region: every class with its score, which nothing suppresses."""


def postprocess(
    image_id: str,
    size: tuple[int, int],
    boxes: Boxes,
    scores: NDArray[np.float32],
    deltas: NDArray[np.float32] | None,
    config: PostprocessConfig,
) -> Detections:
    """Turn the scored regions of one image into detections.

    Args:
        image_id: copied into the result.
        size: (height, width) of the image.
        boxes: (R, 4) region proposals.
        scores: (R, K) margins or log-odds, larger is surer. Votes and soft-NMS weigh a region by
            the sigmoid of its score, which for log-odds is the probability.
        deltas: (R, K, 4) box regression for every class, or None.
        config: see `PostprocessConfig`.

    Returns:
        At most `max_detections` detections, surest first. Their scores are on the scale of `scores`, whatever
        suppresses rivals.

    References:
        rbgirshick/rcnn, rcnn_test_bbox_regressor.m (caps, regression, clipping, then NMS).
    """
    return snapped(postprocess_traced(image_id, size, boxes, scores, deltas, config)[0], boxes, config)


def postprocess_traced(
    image_id: str,
    size: tuple[int, int],
    boxes: Boxes,
    scores: NDArray[np.float32],
    deltas: NDArray[np.float32] | None,
    config: PostprocessConfig,
) -> tuple[Detections, NDArray[np.int64]]:
    """Run `postprocess` but for `snapped`, and return the row of `boxes` that each score is of, (M,).

    Soft-NMS may have lowered that score since.
    """
    if scores.shape[1] == 0:
        return Detections.empty(image_id), np.zeros(0, np.int64)
    # All classes go on together: of thousands of candidates a few hundred are kept, the surest of them all.
    pools = []
    for column in scores.T:
        rows = np.flatnonzero(column >= config.min_score) if np.isfinite(config.min_score) else None
        pools.append(_best(column, rows, config.max_candidates))
    candidates = np.concatenate(pools)
    labels = np.repeat(np.arange(len(pools)), [len(pool) for pool in pools])
    moved = refined = boxes[candidates]
    if deltas is not None and config.regression != "off":
        refined = clip(decode_deltas(moved, config.box_step * deltas[candidates, labels]), size)
        if config.regression == "before-nms":
            moved = refined
    solid = area(refined) > 0
    candidates, labels, moved, refined = candidates[solid], labels[solid], moved[solid], refined[solid]
    own_scores = scores[candidates, labels]
    rivals: dict[str, Any] = {"labels": labels, "limit": config.max_detections}
    if config.soft_nms_sigma is None:
        kept = nms(moved, own_scores, config.max_iou, **rivals)
        kept_scores = own_scores[kept]
    else:
        likely = _sigmoid(own_scores)
        kept, decayed = soft_nms(moved, likely, config.soft_nms_sigma, **rivals)
        before = own_scores[kept]
        after = np.minimum(_log_odds(decayed), before)
        kept_scores = np.where(decayed == likely[kept], before, after).astype(np.float32)
    result = refined[kept]
    if config.vote_iou is not None:
        weights = _sigmoid(own_scores)
        for label in np.unique(labels[kept]):
            mine, voters = labels[kept] == label, slice(*np.searchsorted(labels, (label, label + 1)))
            result[mine] = vote_boxes(result[mine], refined[voters], weights[voters], config.vote_iou)
    order = np.argsort(-kept_scores, kind="stable")  # that of `Detections`
    return Detections(image_id, result, kept_scores, labels[kept]), candidates[kept[order]]


def snapped(found: Detections, proposals: Boxes, config: PostprocessConfig) -> Detections:
    """Return detections drawn to the (R, 4) region proposals of their image, as configured."""
    if not config.snap:
        return found
    return replace(found, boxes=draw_to_regions(found.boxes, proposals, config.snap))


def candidates_to_refine(
    image_id: str,
    size: tuple[int, int],
    boxes: Boxes,
    scores: NDArray[np.float32],
    deltas: NDArray[np.float32],
    config: PostprocessConfig,
) -> tuple[Detections, NDArray[np.int64]]:
    """Return the surest boxes, as `postprocess_traced` does, of which only near copies are suppressed."""
    near_copies = replace(
        config,
        max_iou=_NEAR_COPY,
        regression="before-nms",
        soft_nms_sigma=None,
        vote_iou=None,
        max_detections=config.refined,
    )
    return postprocess_traced(image_id, size, boxes, scores, deltas, near_copies)


def refined(
    found: Detections,
    deltas: NDArray[np.float32],
    overlaps: NDArray[np.float32],
    size: tuple[int, int],
    n_classes: int,
    config: PostprocessConfig,
) -> tuple[Detections, NDArray[np.int64]]:
    """Return detections of refined boxes: moved, ranked anew, and suppressed as configured; and their rows.

    Args:
        found: what `candidates_to_refine` returned, M boxes.
        deltas: (M, 4), of each box for its class. A box that they leave less than a pixel of stays.
        overlaps: (M,) estimated IoU of each box with its object, in (0, 1).
        size: (height, width) of the image.
        n_classes: K.
        config: of suppression; boxes are not regressed or voted again.
    """
    moved = clip(decode_deltas(found.boxes, deltas), size)
    gone = (moved[:, 2:] - moved[:, :2] < 1).any(axis=1)
    moved[gone] = found.boxes[gone]
    scores = np.full((len(found), n_classes), -np.inf, np.float32)
    power = OVERLAP_POWER if config.overlap_power is None else config.overlap_power
    ranked = found.scores + power * np.log(overlaps)
    scores[np.arange(len(found)), found.labels] = np.maximum(ranked, _LEAST)
    final = replace(config, regression="off", vote_iou=None, min_score=_LEAST)
    return postprocess_traced(found.image_id, size, moved, scores, None, final)


def moved_regions(
    boxes: Boxes,
    scores: NDArray[np.float32],
    deltas: NDArray[np.float32],
    size: tuple[int, int],
    config: PostprocessConfig,
) -> Boxes:
    """Return where box regression moves the surest regions, each for the class it scores best for.

    Args:
        boxes: (R, 4) region proposals.
        scores: (R, K).
        deltas: (R, K, 4).
        size: (height, width) of the image.
        config: how many, and the score that they need.

    Returns:
        (M, 4) boxes, clipped to the image, at least a pixel wide and high; M is at most `second_look`.

    References:
        Gidaris and Komodakis, arXiv 1505.01749, section 5 (iterative localization).
    """
    surest = scores.max(axis=1, initial=-np.inf)
    chosen = _best(surest, np.flatnonzero(surest >= config.min_score), config.second_look)
    labels = scores[chosen].argmax(axis=1)
    moved = clip(decode_deltas(boxes[chosen], config.box_step * deltas[chosen, labels]), size)
    solid = (moved[:, 2:] - moved[:, :2] >= 1).all(axis=1)
    return np.asarray(moved[solid], np.float32)


def _best(column: NDArray[np.float32], rows: NDArray[np.int64] | None, n: int) -> NDArray[np.int64]:
    """Return the indices of the `n` largest, best first, ties in input order."""
    pool = np.arange(len(column)) if rows is None else rows
    if len(pool) > n:
        # Everything above the n-th value, then as many of its equals as fit, in input order.
        limit = np.partition(column[pool], len(pool) - n)[len(pool) - n]
        above = pool[column[pool] > limit]
        pool = np.concatenate([above, pool[column[pool] == limit][: n - len(above)]])
    return pool[np.argsort(-column[pool], kind="stable")]


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores whose sigmoid these are; below -690 and above 36 they are no longer told apart."""
    likely = np.clip(probabilities, 1e-300, 1 - 2.0**-53)
    return np.asarray(np.log(likely) - np.log1p(-likely), np.float64)


def _sigmoid(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(scores.astype(np.float64), -60, 60)))
