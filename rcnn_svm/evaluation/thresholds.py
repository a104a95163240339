"""From which score on a detection is believed: one threshold per class, chosen on images held out.

Three aims: the best F1, at most so many false alarms an image, at least such a precision. numpy only but for
the two demands, whose common scale scikit-learn fits: what is chosen is kept in the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.evaluation.bootstrap import Interval, resampled_images
from rcnn_svm.evaluation.calibration import PlattScaling
from rcnn_svm.evaluation.voc import FALSE, HIT, IGNORED, Matches
from rcnn_svm.structures import Detections

__all__ = [
    "PRIOR_OBJECTS",
    "Aim",
    "Thresholds",
    "UnreachedError",
    "choose_thresholds",
    "limit_false_alarms",
    "reach_precision",
]

PRIOR_OBJECTS = 10.0
"""All classes together weigh as much as so many objects in the choice for one: with few objects of a class
its own best threshold is chance."""

_N_RESAMPLES = 1000


class UnreachedError(ConfigError):
    """What is asked of the thresholds is reached by none on the images held out."""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """A threshold per class, and what it gave on the images that it was chosen on.

    Attributes:
        classes: K class names.
        scores: (K,) float32; a detection is believed when its score is >= that of its class.
        precision: (K,) share of the believed detections that were right; nan where none was believed.
        recall: (K,) share of the objects that were found; nan where there was none.
        n_objects: (K,) objects that it was chosen on.
        n_images: images that it was chosen on.
        false_alarms: (K,) false detections an image that were believed; None where they were not counted.
        promised: of all classes together `precision`, `recall` and `false_alarms` (an image, no fraction),
            with 95 % intervals over the images; empty where none were taken.
        aim: what was asked for, `false_alarms` or `precision`; empty for the best F1.
    """

    classes: tuple[str, ...]
    scores: NDArray[np.float32]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    n_objects: NDArray[np.int64]
    n_images: int
    false_alarms: NDArray[np.float64] | None = None
    promised: Mapping[str, Interval] = field(default_factory=dict)
    aim: Mapping[str, float] = field(default_factory=dict)

    def believed(self, found: Detections) -> Detections:
        """Return the detections that reach the threshold of their class."""
        return found[found.scores >= self.scores[found.labels]]

    def measure(self, matches: Matches) -> dict[str, float | None]:
        """Return what believing the detections of a split comes to: precision and recall in percent, counts.

        Args:
            matches: of all detections, believed or not.
        """
        sure = (matches.score >= self.scores[matches.label]) & (matches.outcome != IGNORED)
        n_right, n_believed = int((matches.outcome[sure] == HIT).sum()), int(sure.sum())
        n_images, n_objects = len(matches.n_objects), int(matches.n_objects.sum())
        return {
            "precision": 100 * n_right / n_believed if n_believed else None,
            "recall": 100 * n_right / n_objects if n_objects else None,
            "boxes_per_image": n_believed / n_images,
            "false_alarms_per_image": (n_believed - n_right) / n_images,
            "objects_per_image": n_objects / n_images,
        }

    def judged(self, matches: Matches) -> Thresholds:
        """Return the same thresholds with what they give on other images, in place of those they are from.

        Args:
            matches: of all detections in these, believed or not.
        """
        return _judged(matches, self.scores, self.aim)

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain data; shares in percent, null where there are none."""

        def percent(value: float) -> float | None:
            return None if np.isnan(value) else 100 * float(value)

        alarms = [None] * len(self.classes) if self.false_alarms is None else self.false_alarms.tolist()
        return {
            "aim": dict(self.aim),
            "n_images": self.n_images,
            "promised": {
                name: (_plain(of) if name == "false_alarms" else of.in_percent())
                for name, of in self.promised.items()
            },
            "classes": {
                name: {
                    "score": float(self.scores[k]),
                    "precision": percent(self.precision[k]),
                    "recall": percent(self.recall[k]),
                    "n_objects": int(self.n_objects[k]),
                    "false_alarms": alarms[k],
                }
                for k, name in enumerate(self.classes)
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], classes: Sequence[str], *, where: str) -> Self:
        """Read what `to_json` made.

        Args:
            values: the record.
            classes: the classes of the detector, which it must name.
            where: the file, for messages.

        Raises:
            DataError: a class or a figure is missing.
        """

        def share(value: float | None) -> float:
            return float("nan") if value is None else float(value) / 100

        try:
            rows = [values["classes"][name] for name in classes]
            alarms = [row.get("false_alarms") for row in rows]
            promised = {
                str(name): Interval(
                    *(float(of[key]) if name == "false_alarms" else share(of[key]) for key in _ENDS)
                )
                for name, of in values.get("promised", {}).items()
            }
            return cls(
                tuple(classes),
                np.array([row["score"] for row in rows], np.float32),
                np.array([share(row["precision"]) for row in rows]),
                np.array([share(row["recall"]) for row in rows]),
                np.array([row["n_objects"] for row in rows], np.int64),
                int(values["n_images"]),
                None if None in alarms else np.array(alarms, np.float64),
                promised,
                {str(name): float(value) for name, value in values.get("aim", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{where}: the thresholds are damaged ({error}). Train it again.") from error


_ENDS = ("value", "low", "high")

Aim: TypeAlias = Callable[[Matches], Thresholds]
"""What chooses thresholds by the detections in images held out, such as `choose_thresholds`."""


def _plain(of: Interval) -> dict[str, float]:
    return {name: float(getattr(of, name)) for name in _ENDS}


def choose_thresholds(matches: Matches, *, prior_objects: float = PRIOR_OBJECTS) -> Thresholds:
    """Choose the threshold of each class that gives the best F1.

    A class is judged by its own detections and, as `prior_objects` further objects, by those of all classes:
    with one class, or many objects of each, that changes nothing. A threshold lies halfway between the last
    score that is believed and the next one. Where nothing was ever right it lies above everything seen.

    Args:
        matches: of detections in images that the detector was not trained on.
        prior_objects: see there; 0 lets each class decide alone.
    """
    counted = matches.outcome != IGNORED
    score, label = matches.score[counted].astype(np.float64), matches.label[counted]
    hit = (matches.outcome[counted] == HIT).astype(np.float64)
    n_objects = matches.n_objects.sum(axis=0)
    order = np.argsort(-score, kind="stable")
    score, label, hit = score[order], label[order], hit[order]
    # Equal scores are believed together or not at all.
    last = np.flatnonzero(np.append(score[1:] < score[:-1], len(score) > 0))
    prior = prior_objects / max(int(n_objects.sum()), 1)
    chosen = np.zeros(len(matches.classes), np.float32)
    for k in range(len(chosen)):
        own = label == k
        right, believed = (np.cumsum(weight)[last] for weight in (hit * (own + prior), own + prior))
        total = n_objects[k] + prior_objects
        f1 = 2 * right / np.maximum(believed + total, 1e-12)
        if len(f1) and f1.max() > 0:
            best = int(f1.argmax())
            lower = score[last[best] + 1] if last[best] + 1 < len(score) else score[last[best]] - 1.0
            chosen[k] = (score[last[best]] + lower) / 2
        elif len(score):
            chosen[k] = score[0] + 1.0
    return _judged(matches, chosen, {})


def limit_false_alarms(matches: Matches, per_image: float) -> Thresholds:
    """Choose the thresholds that believe most with at most so many false detections an image, of all classes.

    All classes share one threshold of the probability that Platt's sigmoid gives them, which spends the false
    alarms where they buy most. It lies at the last false alarm that is allowed: with B of them in N images
    further images have B / N each, on average.

    Args:
        matches: of detections in images that the detector was not trained on.
        per_image: > 0, such as 0.05 for one false alarm in 20 images.

    Raises:
        UnreachedError: fewer than 1 / `per_image` images, where no false alarm at all can be told from that;
            or so many equal scores that no threshold keeps to it.
    """
    n_images = len(matches.n_objects)
    allowed = int(per_image * n_images + 1e-9)
    if allowed < 1:
        raise UnreachedError(
            f"false_alarms={per_image:g}: to allow so few an image, at least {int(np.ceil(1 / per_image))} "
            f"images must be held out, got {n_images}. Allow more, or label more images."
        )
    curves = _curves(matches)
    odds, false, ends = _swept(matches, curves)
    alarms = np.cumsum(false)[ends]
    kept = np.flatnonzero(alarms <= allowed)
    if len(odds) and not len(kept):
        raise UnreachedError(
            f"false_alarms={per_image:g}: no score reaches it, since the highest is that of {alarms[0]} "
            f"false detections in {n_images} images. Allow more, or label more images."
        )
    lowest = np.inf
    if len(odds):
        last = ends[kept[-1]]
        spent = np.flatnonzero(false[: last + 1])
        all_kept = last + 1 == len(odds)
        lowest = odds[last if all_kept or not len(spent) else spent[-1]]
    return _judged(matches, _at_odds(matches, curves, lowest), {"false_alarms": per_image})


def reach_precision(matches: Matches, share: float) -> Thresholds:
    """Choose the thresholds that believe most while such a share of what is believed is right.

    As with `limit_false_alarms` all classes share one threshold of the probability, and the share is that of
    all of them together. One false detection is counted beyond those seen, so that a few right ones alone
    promise little.

    Args:
        matches: of detections in images that the detector was not trained on.
        share: in (0, 1).

    Raises:
        UnreachedError: no score reaches it.
    """
    curves = _curves(matches)
    odds, false, ends = _swept(matches, curves)
    n_false = np.cumsum(false)[ends]
    precision = (ends + 1 - n_false) / (ends + 2)
    kept = np.flatnonzero(precision >= share)
    if not len(kept):
        n_images, best = len(matches.n_objects), precision.max(initial=0.0)
        raise UnreachedError(
            f"precision={share:g}: no score reaches it on the {n_images} images held out, where the most is "
            f"{best:.2f}. Ask for less, or label more images."
        )
    return _judged(matches, _at_odds(matches, curves, odds[ends[kept[-1]]]), {"precision": share})


def _curves(matches: Matches) -> PlattScaling | None:
    """Return the sigmoids of all classes; None where no score differs from another."""
    counted = matches.outcome != IGNORED
    if not counted.any() or np.ptp(matches.score[counted]) == 0:
        return None
    hits = matches.outcome[counted] == HIT
    return PlattScaling.fit(matches.score[counted], hits, matches.label[counted], len(matches.classes))


def _log_odds(matches: Matches, curves: PlattScaling | None) -> NDArray[np.float64]:
    """Return (D,) log-odds of all detections; -inf of a class whose scores say nothing, or the contrary."""
    odds = np.full(len(matches.score), -np.inf)
    if curves is not None:
        rises = curves.slope[matches.label] > 0
        own = curves.slope[matches.label] * matches.score + curves.intercept[matches.label]
        odds[rises] = own[rises]
    return odds


def _swept(
    matches: Matches, curves: PlattScaling | None
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Return falling log-odds, which of them are false, and where the last of equals lie."""
    odds = _log_odds(matches, curves)
    rows = np.flatnonzero((matches.outcome != IGNORED) & np.isfinite(odds))
    rows = rows[np.argsort(-odds[rows], kind="stable")]
    odds = odds[rows]
    return (
        odds,
        matches.outcome[rows] == FALSE,
        np.flatnonzero(np.append(odds[1:] < odds[:-1], len(odds) > 0)),
    )


def _at_odds(matches: Matches, curves: PlattScaling | None, lowest: float) -> NDArray[np.float32]:
    """Return (K,) thresholds that the detections of at least these log-odds reach, and no others.

    A class that was not found, or has none of these, gets its sigmoid's threshold or one above all it has.
    """
    odds = _log_odds(matches, curves)
    chosen = np.zeros(len(matches.classes), np.float32)
    for k in range(len(chosen)):
        rows = matches.of_class(k)
        score, sure = matches.score[rows], odds[rows] >= lowest
        above = float(score.max(initial=0.0)) + 1.0
        if curves is not None and curves.slope[k] > 0 and np.isfinite(lowest):
            above = float(lowest - curves.intercept[k]) / float(curves.slope[k])
        if sure.any():
            above = min(above, float(score[sure].min()))
        elif (~sure).any():
            above = max(above, float(np.nextafter(score.max(), np.float32(np.inf))))
        largest = float(np.finfo(np.float32).max)
        chosen[k] = min(max(above, -largest), largest)
        if sure.any() and (~sure).any():  # rounding must not let in what lies below
            chosen[k] = max(chosen[k], np.nextafter(score[~sure].max(), np.float32(np.inf)))
    return chosen


def _judged(matches: Matches, scores: NDArray[np.float32], aim: Mapping[str, float]) -> Thresholds:
    """Return thresholds with what they give on the images that they were chosen on."""
    n_images, n_classes = matches.n_objects.shape
    sure = matches.score >= scores[matches.label]
    counts = np.zeros((2, n_images, n_classes))
    for way, outcome in enumerate((HIT, FALSE)):
        rows = sure & (matches.outcome == outcome)
        np.add.at(counts[way], (matches.image[rows], matches.label[rows]), 1)
    right, wrong = counts.sum(axis=1)
    n_objects = matches.n_objects.sum(axis=0)
    return Thresholds(
        matches.classes,
        scores,
        _ratio(right, right + wrong),
        _ratio(right, n_objects),
        n_objects.astype(np.int64),
        n_images,
        wrong / n_images,
        _promised(counts[0].sum(axis=1), counts[1].sum(axis=1), matches.n_objects.sum(axis=1)),
        dict(aim),
    )


def _promised(
    right: NDArray[np.float64], wrong: NDArray[np.float64], objects: NDArray[np.int64]
) -> dict[str, Interval]:
    """Return what images give, with intervals: they are resampled with all they hold.

    Half a false alarm is added on average, a gamma variate of shape 0.5 (Jeffreys' prior of a rate), so that
    none seen is not taken for none ever.
    """
    n_images = len(right)
    drawn = resampled_images(n_images, _N_RESAMPLES, 0).astype(np.float64)
    further = np.random.default_rng(0).gamma(0.5, size=_N_RESAMPLES)
    n_right, n_wrong, n_objects = (drawn @ each for each in (right, wrong, objects))
    values = {
        "precision": (
            _ratio(right.sum(), right.sum() + wrong.sum()),
            n_right / (n_right + n_wrong + further),
        ),
        "recall": (_ratio(right.sum(), objects.sum()), _ratio(n_right, n_objects)),
        "false_alarms": (wrong.sum() / n_images, (n_wrong + further) / n_images),
    }
    return {name: _span(float(value), samples) for name, (value, samples) in values.items()}


def _span(value: float, samples: NDArray[np.float64]) -> Interval:
    defined = samples[np.isfinite(samples)]
    if np.isnan(value) or not len(defined):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, (0.025, 0.975))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _ratio(above: Any, below: Any) -> NDArray[np.float64]:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    ratio = np.full(above.shape, np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio
