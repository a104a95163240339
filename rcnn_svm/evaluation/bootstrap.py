"""How sure a comparison is: the paired bootstrap over the images of a split.

Matching is done once per detector (`rcnn_svm.evaluation.voc.match`); a resample only changes how often
each image counts, and every detector sees the same resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.classification import Classification
from rcnn_svm.evaluation.voc import HIT, IGNORED, RECALL_GRID, EvalResult, Rule

__all__ = [
    "BootstrapResult",
    "Difference",
    "Interval",
    "Paired",
    "centred_interval",
    "mean_of_present",
    "paired_accuracy",
    "paired_bootstrap",
    "resampled_ap",
    "resampled_images",
    "resampled_recall",
]

# Hits are taken so many at a time, which bounds the memory by about 10 MB per 1000 resamples.
_BLOCK = 256


@dataclass(frozen=True)
class Interval:
    """A measure and its 95 % interval, as fractions; nan where it is not defined."""

    value: float
    low: float
    high: float

    def in_percent(self) -> dict[str, float | None]:
        """Return value, low and high as plain data in percent, None for what is not defined."""
        return {
            name: None if np.isnan(value) else 100 * value
            for name, value in (("value", self.value), ("low", self.low), ("high", self.high))
        }


@dataclass(frozen=True)
class Difference:
    """How much more of a measure detector `first` has than detector `second`, on the same resamples.

    Attributes:
        first: name.
        second: name.
        mean: mAP, or another measure, of `first` minus `second`, with its interval.
        per_class: the same for each class's AP; empty of other measures.
        flip_share: share of the resamples in which the sign of the difference is not the one measured
            on the split itself; 0.5 counts for a resample without difference.
    """

    first: str
    second: str
    mean: Interval
    per_class: Mapping[str, Interval]
    flip_share: float

    @property
    def supported(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.mean.low > 0 or self.mean.high < 0


@dataclass(frozen=True, eq=False)
class Paired:
    """Intervals of one measure of all detectors, and of all differences between two of them.

    Attributes:
        mean: the measure by detector.
        differences: one for each pair of detectors, in the order given.
    """

    mean: Mapping[str, Interval]
    differences: tuple[Difference, ...]

    def difference(self, first: str, second: str) -> Difference:
        """Return the difference of two detectors, whichever was given first.

        Raises:
            ConfigError: there is no such pair.
        """
        return _found(self.differences, self.mean, first, second)


@dataclass(frozen=True, eq=False)
class BootstrapResult:
    """Intervals of all detectors and of all differences between two of them.

    Attributes:
        rule: of average precision.
        n_resamples: B, how many.
        seed: of the resamples.
        mean: mAP by detector.
        per_class: AP by detector and class.
        differences: one for each pair of detectors, in the order given.
        samples: (B,) mAP of each resample by detector, as computed.
    """

    rule: Rule
    n_resamples: int
    seed: int
    mean: Mapping[str, Interval]
    per_class: Mapping[str, Mapping[str, Interval]]
    differences: tuple[Difference, ...]
    samples: Mapping[str, NDArray[np.float64]]

    def difference(self, first: str, second: str) -> Difference:
        """Return the difference of two detectors, whichever was given first.

        Raises:
            ConfigError: there is no such pair.
        """
        return _found(self.differences, self.mean, first, second)

    def to_json(self) -> dict[str, Any]:
        """Return the intervals, in percent, with null where a class has no object."""
        return {
            "rule": self.rule,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "level": 0.95,
            "mAP": {name: of.in_percent() for name, of in self.mean.items()},
            "ap": {
                name: {label: of.in_percent() for label, of in classes.items()}
                for name, classes in self.per_class.items()
            },
            "differences": [
                {
                    "first": each.first,
                    "second": each.second,
                    "mAP": each.mean.in_percent(),
                    "ap": {label: of.in_percent() for label, of in each.per_class.items()},
                    "flip_share": each.flip_share,
                }
                for each in self.differences
            ],
        }


def paired_bootstrap(
    results: Mapping[str, EvalResult],
    *,
    n_resamples: int = 1000,
    seed: int = 0,
    rule: Rule | None = None,
) -> BootstrapResult:
    """Resample the images with replacement and measure every detector on each resample.

    A class without objects in a resample is left out of that resample's mean, as it would be on a
    split like it. A resample holds some images several times, and repeated images raise interpolated
    precision: resampled AP lies too high on average, by 1 to 2 points of mAP with 40 objects a class. Each
    interval is therefore that of the 2.5 and 97.5 percentiles moved so that the mean of the resamples falls
    on the value measured: it states the spread, not the shift. Signs are counted after the same move.

    Args:
        results: one evaluation by detector, all on the same split.
        n_resamples: B >= 1.
        seed: the same seed gives the same resamples for any set of detectors on the split.
        rule: by default that of the first result.

    Raises:
        ConfigError: nothing to compare, `n_resamples` below 1, a split without images, or evaluations
            of different splits or classes.
    """
    _check_resamples("paired_bootstrap", results, n_resamples)
    reference_name, reference = next(iter(results.items()))
    n_objects = reference.matches.n_objects
    if len(n_objects) == 0:
        raise ConfigError("paired_bootstrap: the split must have at least one image, got none.")
    for name, result in results.items():
        if result.classes != reference.classes or not np.array_equal(result.matches.n_objects, n_objects):
            raise ConfigError(
                f"paired_bootstrap: all results must be of one split, but {name!r} and {reference_name!r} "
                "differ in classes or objects. Evaluate both on the same images."
            )
    rule = reference.rule if rule is None else rule
    drawn = resampled_images(len(n_objects), n_resamples, seed)
    samples = {name: resampled_ap(result, drawn, rule) for name, result in results.items()}
    means = {name: mean_of_present(ap) for name, ap in samples.items()}  # (B,)
    measured = {name: result.map(rule) for name, result in results.items()}
    differences = []
    for first, second in itertools.combinations(results, 2):
        per_class = {
            label: centred_interval(
                float(results[first].ap(rule)[k] - results[second].ap(rule)[k]),
                samples[first][k] - samples[second][k],
            )
            for k, label in enumerate(reference.classes)
        }
        differences.append(_difference(first, second, measured, means, per_class))
    return BootstrapResult(
        rule,
        n_resamples,
        seed,
        {
            name: centred_interval(result.map(rule), means[name], floor=0.0)
            for name, result in results.items()
        },
        {
            name: {
                label: centred_interval(float(result.ap(rule)[k]), samples[name][k], floor=0.0)
                for k, label in enumerate(result.classes)
            }
            for name, result in results.items()
        },
        tuple(differences),
        means,
    )


def resampled_images(n_images: int, n_resamples: int, seed: int) -> NDArray[np.int64]:
    """Return (B, n_images): how often each image counts in each resample, the same for the same arguments."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_images, np.full(n_images, 1 / n_images), size=n_resamples)


def centred_interval(
    value: float,
    samples: NDArray[np.float64],
    *,
    floor: float = -1.0,
    ceiling: float = 1.0,
    move: bool = True,
) -> Interval:
    """Return the 95 % interval of a measure that lies in [floor, ceiling].

    Args:
        value: measured on the split itself.
        samples: (B,) measured on the resamples, nan where it is not defined.
        floor: of the measure.
        ceiling: of the measure.
        move: the samples so that their mean is `value`, see `paired_bootstrap`.
    """
    centred = _centred(value, samples, move=move)
    if not len(centred):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.clip(np.percentile(centred, [2.5, 97.5]), floor, ceiling)
    return Interval(value, float(low), float(high))


def paired_accuracy(
    results: Mapping[str, Classification], *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Paired]:
    """Resample the images with replacement and measure every classifier on each resample.

    The resamples are those of `paired_bootstrap` with the same seed. A class without images in a resample is
    left out of its balanced accuracy. Repeated images do not raise a share of images, so that intervals are
    the percentiles as they are, moved nowhere: where all that two classifiers differ by is one or two images,
    many resamples hold none of them, and the interval reaches zero.

    Args:
        results: one classification by detector, all of the same images.
        n_resamples: B >= 1.
        seed: of the resamples.

    Returns:
        Intervals of `accuracy` and of `balanced accuracy`.

    Raises:
        ConfigError: nothing to compare, `n_resamples` below 1, no image, or results of different images.
    """
    _check_resamples("paired_accuracy", results, n_resamples)
    reference = next(iter(results.values())).actual
    if not len(reference) or not all(np.array_equal(one.actual, reference) for one in results.values()):
        raise ConfigError("paired_accuracy: all results must be of the same images, one at least.")
    drawn = resampled_images(len(reference), n_resamples, seed)
    samples: dict[str, dict[str, NDArray[np.float64]]] = {"accuracy": {}, "balanced accuracy": {}}
    for name, result in results.items():
        accuracy, recall = resampled_recall(result, drawn)
        samples["accuracy"][name], samples["balanced accuracy"][name] = accuracy, mean_of_present(recall)
    measured = {
        "accuracy": {name: result.accuracy for name, result in results.items()},
        "balanced accuracy": {name: result.balanced_accuracy for name, result in results.items()},
    }
    return {
        measure: Paired(
            {
                name: centred_interval(measured[measure][name], own, floor=0.0, move=False)
                for name, own in by_name.items()
            },
            tuple(
                _difference(first, second, measured[measure], by_name, {}, move=False)
                for first, second in itertools.combinations(results, 2)
            ),
        )
        for measure, by_name in samples.items()
    }


def resampled_recall(
    result: Classification, drawn: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (B,) accuracy and (K, B) recall on every resample, nan where it has no image of the class.

    Args:
        result: of N images.
        drawn: (B, N), as `resampled_images` returns it.
    """
    own = np.eye(len(result.classes))[:, result.actual]  # (K, N)
    found, there = (own * result.correct) @ drawn.T, own @ drawn.T
    recall = np.divide(found, there, out=np.full(found.shape, np.nan), where=there > 0)
    return found.sum(axis=0) / len(result.actual), recall


def _found(differences: Sequence[Difference], names: Iterable[str], first: str, second: str) -> Difference:
    """Return the difference of two detectors, whichever was given first."""
    for each in differences:
        if (each.first, each.second) == (first, second):
            return each
        if (each.second, each.first) == (first, second):
            turned = {name: _turned(of) for name, of in each.per_class.items()}
            return Difference(first, second, _turned(each.mean), turned, each.flip_share)
    raise ConfigError(
        f"BootstrapResult: there must be results for both heads, got {first!r} and {second!r}; "
        f"compared were {', '.join(names)}."
    )


def _check_resamples(where: str, results: Mapping[str, Any], n_resamples: int) -> None:
    if not results:
        raise ConfigError(f"{where}: results must hold at least one detector, got none.")
    if n_resamples < 1:
        raise ConfigError(f"{where}: n_resamples must be at least 1, got {n_resamples}.")


def _difference(
    first: str,
    second: str,
    measured: Mapping[str, float],
    samples: Mapping[str, NDArray[np.float64]],
    per_class: Mapping[str, Interval],
    *,
    move: bool = True,
) -> Difference:
    """Return the difference of two detectors from a measure on the split and on its resamples."""
    gap, gaps = measured[first] - measured[second], samples[first] - samples[second]
    signs = np.sign(_centred(gap, gaps, move=move)) * np.sign(gap)
    flip_share = float(np.mean((1 - signs) / 2)) if len(signs) else float("nan")
    return Difference(first, second, centred_interval(gap, gaps, move=move), per_class, flip_share)


def resampled_ap(result: EvalResult, drawn: NDArray[np.int64], rule: Rule) -> NDArray[np.float64]:
    """Return (K, B) average precision on every resample, nan where it has no object of the class.

    Args:
        result: of a split.
        drawn: (B, n_images), as `resampled_images` returns it.
        rule: of average precision.
    """
    positives = result.matches.n_objects.T @ drawn.T  # (K, B)
    # float32 multiplies fast and holds these counts exactly: all stay far below 2 ** 24.
    weights = np.ascontiguousarray(drawn.T, np.float32)
    ap = np.full(positives.shape, np.nan)
    matches = result.matches
    for k in range(len(result.classes)):
        rows = matches.of_class(k)
        counted = matches.outcome[rows] != IGNORED
        hits = matches.outcome[rows][counted] == HIT
        present = positives[k] > 0
        value = _weighted_ap(hits, matches.image[rows][counted], weights, np.maximum(positives[k], 1), rule)
        ap[k, present] = value[present]
    return ap


def _weighted_ap(
    hits: NDArray[np.bool_],
    image: NDArray[np.int64],
    drawn: NDArray[np.float32],
    positives: NDArray[np.int64],
    rule: Rule,
) -> NDArray[np.float64]:
    """Compute AP of one class when image i counts `drawn[i, b]` times, for all b at once.

    Precision is best right after a hit, so only hits are followed: between two of them, false detections
    matter by their number alone, which is one matrix product of counts per image with the weights.

    Args:
        hits: (M,) by falling score.
        image: (M,) index of each detection's image.
        drawn: (n_images, B).
        positives: (B,) at least 1.
        rule: of average precision.

    Returns:
        (B,) fractions.
    """
    n_images, n_resamples = drawn.shape
    at = np.flatnonzero(hits)
    n_hits = len(at)
    found = np.cumsum(drawn[image[at]], axis=0, dtype=np.float64)  # (n_hits, B) weighted hits so far
    precision = np.empty((n_hits, n_resamples))
    false = np.flatnonzero(~hits)
    before = np.searchsorted(at, false)  # the first hit after each false detection
    so_far = np.zeros(n_resamples)
    for start in range(0, n_hits, _BLOCK):
        stop = min(start + _BLOCK, n_hits)
        low, high = np.searchsorted(before, [start, stop])
        cell = (before[low:high] - start) * n_images + image[false[low:high]]
        counts = np.bincount(cell, minlength=(stop - start) * n_images)
        added = counts.reshape(stop - start, n_images).astype(np.float32) @ drawn
        n_false = so_far + np.cumsum(added, axis=0, dtype=np.float64)
        so_far = n_false[-1]
        block = found[start:stop]
        np.divide(block, np.maximum(block + n_false, 1), out=precision[start:stop])
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    if rule == "voc10":
        area: NDArray[np.float64] = (envelope * drawn[image[at]]).sum(axis=0) / positives
        return area
    padded = np.concatenate([envelope, np.zeros((1, n_resamples))])
    total = np.zeros(n_resamples)
    for step, level in enumerate(RECALL_GRID):
        exact = rule == "voc07-exact"
        reached = 10 * found >= step * positives if exact else found / positives >= level
        first = n_hits - reached.sum(axis=0)  # recall rises, so the hits that reach the level come last
        total += padded[first, np.arange(n_resamples)]
    return total / len(RECALL_GRID)


def mean_of_present(ap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (B,) the mean over the classes (K, B) that are not nan; nan where all are."""
    present = ~np.isnan(ap)
    count = present.sum(axis=0)
    total = np.where(present, ap, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _centred(value: float, samples: NDArray[np.float64], *, move: bool) -> NDArray[np.float64]:
    """Return the samples that are defined, moved so that their mean is `value`; none where it is nan."""
    present = samples[~np.isnan(samples)]
    if np.isnan(value) or not len(present):
        return np.zeros(0)
    shift = value - present.mean() if move else 0.0
    # Equal detectors must stay exactly level.
    return present if abs(shift) < 1e-12 else present + shift


def _turned(interval: Interval) -> Interval:
    return Interval(-interval.value, -interval.high, -interval.low)
