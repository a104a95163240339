"""Scores that are probabilities: how far they can be believed, and curves that make margins into them.

A calibrator maps the scores of a head on held-out images to probabilities. A softmax that scores by log-odds
needs none: its own probability is `PlattScaling(np.ones(K), np.zeros(K), ...)` of them. numpy only but
for fitting, since what is fitted is kept in the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.errors import ConfigError, DataError, ShapeError
from rcnn_svm.evaluation.bootstrap import Interval, centred_interval, resampled_images
from rcnn_svm.structures import require_finite

__all__ = [
    "EPSILON",
    "ISOTONIC_POSITIVES",
    "PLATT_POSITIVES",
    "STEPS_POSITIVES",
    "Calibrator",
    "ClassCurves",
    "IsotonicScaling",
    "PlattScaling",
    "Reliability",
    "TemperatureScaling",
    "equal_mass_edges",
    "equal_width_edges",
    "measure_reliability",
]

EPSILON = 1e-6
"""The log loss takes a probability for at least this much, and for at most 1 less it: -log of it is 13.8."""
PLATT_POSITIVES = 10
"""A class has a sigmoid of its own from so many positives, and as many negatives, on."""
ISOTONIC_POSITIVES = 100
"""A class has steps of its own from so many positives, and as many negatives, on."""
STEPS_POSITIVES = 500
"""The same of a detector: with 200 right detections sigmoids still had the lower log loss on test, with 900
steps (results/thresholds)."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """How well probabilities agree with what happened, with 95 % intervals over the images.

    Bins: bin b holds the probabilities in (edges[b], edges[b + 1]], the first one also those at its lower
    edge. What a bin without probabilities has is nan.

    Attributes:
        edges: (B + 1,) float64, rising from 0 to 1.
        count: (B,) int64, probabilities in each bin.
        probability: (B,) float64, their mean.
        share: (B,) float64, the share of them whose outcome is true.
        low: (B,) float64, lower end of the interval of `share`.
        high: (B,) float64, upper end.
        measures: `calibration_error`, expected calibration error: the mean over all probabilities of what
            mean and share of their bin differ by; `brier_score`, the mean squared difference of probability
            and outcome; `log_loss` in nats, see `EPSILON`. nan where there is no probability.
        samples: (R,) each measure on each resample.
        n_images: of the split.
        seed: of the resamples.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    probability: NDArray[np.float64]
    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    measures: Mapping[str, Interval]
    samples: Mapping[str, NDArray[np.float64]]
    n_images: int
    seed: int

    def less(self, other: Reliability) -> dict[str, Interval]:
        """Return each measure less that of other probabilities, on the same resamples of the same images.

        Raises:
            ConfigError: the two were measured on other images, or on other resamples.
        """
        own, others = ((r.n_images, r.seed, len(r.samples["log_loss"])) for r in (self, other))
        if own != others:
            raise ConfigError(
                f"Reliability.less: both must have the same number of images, seed and number of resamples, "
                f"got {own} and {others}."
            )
        return {
            name: centred_interval(
                value.value - other.measures[name].value,
                self.samples[name] - other.samples[name],
                floor=-np.inf,
                ceiling=np.inf,
            )
            for name, value in self.measures.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return measures and bins as fractions and nats, with null where nothing is defined."""

        def plain(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        columns = ("probability", "share", "low", "high")
        return {
            "n_images": self.n_images,
            "n_resamples": len(self.samples["log_loss"]),
            "seed": self.seed,
            "level": 0.95,
            "measures": {
                name: {"value": plain(of.value), "low": plain(of.low), "high": plain(of.high)}
                for name, of in self.measures.items()
            },
            "edges": self.edges.tolist(),
            "bins": [
                {"count": int(count)} | {name: plain(getattr(self, name)[b]) for name in columns}
                for b, count in enumerate(self.count)
            ],
        }


def equal_width_edges(n_bins: int) -> NDArray[np.float64]:
    """Return (n_bins + 1,) edges of bins of equal width.

    Raises:
        ConfigError: fewer than one bin.
    """
    if n_bins < 1:
        raise ConfigError(f"equal_width_edges: n_bins must be at least 1, got {n_bins}.")
    return np.linspace(0.0, 1.0, n_bins + 1)


def equal_mass_edges(probabilities: ArrayLike, n_bins: int) -> NDArray[np.float64]:
    """Return edges of bins that hold as many of (N,) probabilities each, 0 and 1 at the ends.

    Equal probabilities share a bin: where many are equal there are fewer bins than `n_bins`. Of regions,
    nearly all of which are background, these bins show more than those of equal width.

    Raises:
        ConfigError: fewer than one bin.
    """
    if n_bins < 1:
        raise ConfigError(f"equal_mass_edges: n_bins must be at least 1, got {n_bins}.")
    values = np.asarray(probabilities, np.float64)
    inner = np.quantile(values, np.arange(1, n_bins) / n_bins) if len(values) else np.zeros(0)
    return np.unique(np.concatenate([[0.0], inner, [1.0]]))


def measure_reliability(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    images: ArrayLike,
    edges: ArrayLike,
    *,
    n_images: int,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Reliability:
    """Compare probabilities with outcomes; images are resampled with all they hold, as in `paired_bootstrap`.

    Bins stay where they are in every resample. As there, intervals are moved so that the mean of the
    resamples falls on the value measured: a resample's expected calibration error lies above it.

    Args:
        probabilities: (N,) in [0, 1], of detections or of regions, those of all classes one after another.
        outcomes: (N,) bool, whether what had that probability was so.
        images: (N,) int, position of the image of each, in 0 .. `n_images` - 1.
        edges: of the bins, rising from 0 to 1.
        n_images: of the split, those without a probability included.
        n_resamples: R >= 1.
        seed: the same seed and number of images give the same resamples.

    Raises:
        ShapeError: shapes differ, a probability lies outside [0, 1] or an image outside the split.
        ConfigError: no image, `n_resamples` below 1, or edges that do not rise from 0 to 1.
    """
    p, y, image = _checked(probabilities, outcomes, images, n_images)
    borders = np.asarray(edges, np.float64)
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != 1 or not (np.diff(borders) > 0).all():
        raise ConfigError(
            f"measure_reliability: edges must rise from 0 to 1, got {np.array2string(borders, threshold=12)}."
        )
    if n_resamples < 1:
        raise ConfigError(f"measure_reliability: n_resamples must be at least 1, got {n_resamples}.")
    n_bins = len(borders) - 1
    cell = image * n_bins + np.searchsorted(borders[1:-1], p, side="left")

    def binned(weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        sums = np.bincount(cell, weights, minlength=n_images * n_bins)
        return sums.reshape(n_images, n_bins).astype(np.float64)

    kept = np.clip(p, EPSILON, 1 - EPSILON)
    losses = ((p - y) ** 2, -np.log(np.where(y, kept, 1 - kept)))
    per_image = np.concatenate(
        [
            binned(None),
            binned(p),
            binned(y.astype(np.float64)),
            *(np.bincount(image, loss, minlength=n_images)[:, None] for loss in losses),
        ],
        axis=1,
    )  # (n_images, 3 B + 2)
    drawn = resampled_images(n_images, n_resamples, seed).astype(np.float64)
    count, probability, share, values = _measures(per_image.sum(axis=0, keepdims=True), n_bins)
    _, _, shares, samples = _measures(drawn @ per_image, n_bins)
    spans = [centred_interval(float(share[0, b]), shares[:, b], floor=0.0) for b in range(n_bins)]
    return Reliability(
        borders,
        count[0].astype(np.int64),
        probability[0],
        share[0],
        np.array([span.low for span in spans]),
        np.array([span.high for span in spans]),
        {
            name: centred_interval(float(value[0]), samples[name], floor=0.0, ceiling=np.inf)
            for name, value in values.items()
        },
        samples,
        n_images,
        seed,
    )


def _checked(
    probabilities: ArrayLike, outcomes: ArrayLike, images: ArrayLike, n_images: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.bool_)
    image = np.asarray(images, np.int64)
    if p.ndim != 1 or not p.shape == y.shape == image.shape:
        raise ShapeError(
            f"measure_reliability: probabilities, outcomes and images must have one shape (N,), got "
            f"{p.shape}, {y.shape} and {image.shape}."
        )
    if n_images < 1:
        raise ConfigError(f"measure_reliability: n_images must be at least 1, got {n_images}.")
    bad = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if len(bad):
        raise ShapeError(
            f"measure_reliability: probabilities must lie in [0, 1], got {len(bad)} others (first: "
            f"{p[bad[0]]} in row {bad[0]}). Scores become probabilities by a calibrator."
        )
    if len(image) and (image.min() < 0 or image.max() >= n_images):
        raise ShapeError(
            f"measure_reliability: images must lie in 0 .. {n_images - 1}, got {image.min()} .. "
            f"{image.max()}."
        )
    return p, y, image


def _measures(
    sums: NDArray[np.float64], n_bins: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return count, mean and share of (R, 3 B + 2) sums, (R, B) each, and the measures, (R,) each."""
    count, total, right = np.split(sums[:, : 3 * n_bins], 3, axis=1)
    n = count.sum(axis=1)
    measures = {
        "calibration_error": _ratio(np.abs(total - right).sum(axis=1), n),
        "brier_score": _ratio(sums[:, -2], n),
        "log_loss": _ratio(sums[:, -1], n),
    }
    return count, _ratio(total, count), _ratio(right, count), measures


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio = np.full(above.shape, np.nan)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


class Calibrator(Protocol):
    """What makes margins into probabilities."""

    def __call__(self, margins: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the probability of each margin.

        Args:
            margins: of any shape.
            labels: the class of each margin, of a shape that broadcasts: `found.labels` with (M,) scores of
                detections, `np.arange(K)` with the (R, K) scores of regions.
        """
        ...

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        ...


@dataclass(frozen=True, eq=False)
class PlattScaling:
    """A sigmoid per class: 1 / (1 + exp(-(slope * margin + intercept))).

    Attributes:
        slope: (K,) float64.
        intercept: (K,) float64.
        own: (K,) bool, whether the class has its own; the others share that of all classes together.
    """

    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]
    own: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.slope.ndim != 1 or not self.slope.shape == self.intercept.shape == self.own.shape:
            raise ShapeError(
                f"PlattScaling: slope, intercept and own must have one shape (K,), got {self.slope.shape}, "
                f"{self.intercept.shape} and {self.own.shape}."
            )
        require_finite("PlattScaling", self.to_arrays())

    @classmethod
    def fit(cls, margins: ArrayLike, outcomes: ArrayLike, labels: ArrayLike, n_classes: int) -> Self:
        """Fit on images that the heads were not trained on.

        A class with fewer than `PLATT_POSITIVES` positives, or negatives, takes the sigmoid of all classes
        together. As Platt has it, targets are not 1 and 0 but (P + 1) / (P + 2) and 1 / (N + 2) with P
        positives and N negatives; scikit-learn's logistic regression, without penalty, meets each margin
        twice: as a positive weighed by its target, as a negative by what is missing to 1. The curve rises
        unless a head is worse than chance.

        Args:
            margins: (N,) finite; of all classes, one after another.
            outcomes: (N,) bool, whether it was of the class.
            labels: (N,) int in 0 .. K-1, the class of each margin.
            n_classes: K.

        Raises:
            ShapeError: shapes differ, a margin is not finite, or a label is no class.
            DataError: no margin, or all are equal.

        References:
            J. Platt, "Probabilistic outputs for support vector machines", 1999, section 2.2.
        """
        curves, own = _fit_curves(cls, _fit_sigmoid, margins, outcomes, labels, n_classes, PLATT_POSITIVES)
        slope, intercept = np.array(curves).T
        return cls(slope, intercept, own)

    def __call__(self, margins: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the probability of each margin, see `Calibrator`."""
        odds = self.slope[labels] * np.asarray(margins, np.float64) + self.intercept[labels]
        return np.asarray(np.exp(-np.logaddexp(0.0, -odds)))

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {"slope": self.slope, "intercept": self.intercept, "own": self.own}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a calibrator from `to_arrays`."""
        return cls(arrays["slope"], arrays["intercept"], arrays["own"])


@dataclass(frozen=True, eq=False)
class IsotonicScaling:
    """Per class the best curve that never falls, straight between its knots and level beyond them.

    Attributes:
        knots: (T,) float64, margins, those of each class rising; the classes one after another.
        probabilities: (T,) float64 in [0, 1], those of each class never falling.
        start: (K + 1,) int64, where the knots of each class begin, and T.
        own: (K,) bool, whether the class has its own; the others have that of all classes together.
    """

    knots: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    start: NDArray[np.int64]
    own: NDArray[np.bool_]

    def __post_init__(self) -> None:
        require_finite("IsotonicScaling", self.to_arrays())
        start, n = self.start, len(self.knots)
        if (
            self.probabilities.shape != (n,)
            or start.shape != (len(self.own) + 1,)
            or (start[0], start[-1]) != (0, n)
            or not (np.diff(start) > 0).all()
        ):
            raise ShapeError(
                f"IsotonicScaling: there must be a probability for each of {n} knots, and a start that rises "
                f"from 0 to {n} for each of {len(self.own)} classes, got {self.probabilities.shape} and "
                f"{start}."
            )

    @classmethod
    def fit(
        cls,
        margins: ArrayLike,
        outcomes: ArrayLike,
        labels: ArrayLike,
        n_classes: int,
        *,
        min_positives: int = ISOTONIC_POSITIVES,
    ) -> Self:
        """Fit on images that the heads were not trained on, with scikit-learn's `IsotonicRegression`.

        A class with fewer than `min_positives` positives, or negatives, takes the curve of all classes
        together. It may say 0 and 1.

        Args:
            margins: (N,) finite; of all classes, one after another.
            outcomes: (N,) bool, whether it was of the class.
            labels: (N,) int in 0 .. K-1, the class of each margin.
            n_classes: K.
            min_positives: see there.

        Raises:
            ShapeError: shapes differ, a margin is not finite, or a label is no class.
            DataError: no margin, or all are equal.

        References:
            B. Zadrozny, C. Elkan, "Transforming classifier scores into accurate multiclass probability
            estimates", KDD 2002.
        """
        curves, own = _fit_curves(cls, _fit_steps, margins, outcomes, labels, n_classes, min_positives)
        knots, probabilities = (np.concatenate(column) for column in zip(*curves, strict=True))
        return cls(knots, probabilities, np.cumsum([0, *(len(curve[0]) for curve in curves)]), own)

    def __call__(self, margins: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the probability of each margin, see `Calibrator`."""
        values, of_class = np.broadcast_arrays(np.asarray(margins, np.float64), labels)
        found = np.empty(values.shape)
        for k in np.unique(of_class):
            rows, curve = of_class == k, slice(self.start[k], self.start[k + 1])
            found[rows] = np.interp(values[rows], self.knots[curve], self.probabilities[curve])
        return found

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        names = ("knots", "probabilities", "start", "own")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a calibrator from `to_arrays`."""
        return cls(arrays["knots"], arrays["probabilities"], arrays["start"], arrays["own"])


@dataclass(frozen=True, eq=False)
class ClassCurves:
    """The curves of a detector: steps for classes of which enough was seen, sigmoids for the others.

    A probability is that of a detection being right: it reaches an object of its class, which no surer one
    has taken, with an IoU of 0.5. With a score it never falls.

    Attributes:
        sigmoids: of all classes, every slope above 0.
        steps: of all classes, where some class has its own; None where none has.
        n_images: that they were fitted on.
    """

    sigmoids: PlattScaling
    steps: IsotonicScaling | None
    n_images: int

    def __post_init__(self) -> None:
        slope, steps = self.sigmoids.slope, self.steps
        if not (slope > 0).all():
            raise ShapeError(
                f"ClassCurves: sigmoids must rise, got slopes {np.array2string(slope, threshold=12)}."
            )
        if steps is not None and (
            len(steps.own) != len(slope)
            or not ((steps.probabilities >= 0) & (steps.probabilities <= 1)).all()
        ):
            raise ShapeError(f"ClassCurves: must have steps of {len(slope)} classes in [0, 1], got others.")

    @classmethod
    def fit(
        cls,
        margins: ArrayLike,
        outcomes: ArrayLike,
        labels: ArrayLike,
        n_classes: int,
        *,
        n_images: int,
        steps_from: int = STEPS_POSITIVES,
    ) -> Self | None:
        """Fit on detections in images that the detector was not trained on.

        A class has steps of its own from `steps_from` right and as many false ones on, a sigmoid of its own
        from `PLATT_POSITIVES` on, if that rises, else the sigmoid of all classes together.

        Args:
            margins: (N,) finite scores; of all classes, one after another.
            outcomes: (N,) bool, whether the detection was right.
            labels: (N,) int in 0 .. K-1.
            n_classes: K.
            n_images: that the detections are of.
            steps_from: see there.

        Returns:
            None where fewer than `PLATT_POSITIVES` are right, or false, in all, or scores say nothing of it.

        Raises:
            ShapeError: as `PlattScaling.fit`.
        """
        m, y = np.asarray(margins, np.float64), np.asarray(outcomes, np.bool_)
        if min(int(y.sum()), int((~y).sum())) < PLATT_POSITIVES or np.ptp(m) == 0:
            return None
        sigmoids = PlattScaling.fit(m, y, labels, n_classes)
        falls = ~(sigmoids.slope > 0)
        if falls.any():
            slope, intercept = _fit_sigmoid(m, y)
            if not slope > 0:
                return None
            sigmoids = PlattScaling(
                np.where(falls, slope, sigmoids.slope),
                np.where(falls, intercept, sigmoids.intercept),
                sigmoids.own & ~falls,
            )
        steps = IsotonicScaling.fit(m, y, labels, n_classes, min_positives=steps_from)
        return cls(sigmoids, steps if steps.own.any() else None, n_images)

    def __call__(self, margins: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the probability of each margin, see `Calibrator`."""
        by_sigmoid = self.sigmoids(margins, labels)
        if self.steps is None:
            return by_sigmoid
        return np.where(self.steps.own[labels], self.steps(margins, labels), by_sigmoid)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each class has: `steps`, `sigmoid`, or `shared sigmoid`."""
        stepped = np.zeros(len(self.sigmoids.own), bool) if self.steps is None else self.steps.own
        return tuple(
            "steps" if step else "sigmoid" if own else "shared sigmoid"
            for step, own in zip(stepped, self.sigmoids.own, strict=True)
        )

    def joined(self, other: ClassCurves) -> ClassCurves:
        """Return the curves of these classes and, behind them, of others; each as it is."""
        first, second = self.sigmoids, other.sigmoids
        sigmoids = PlattScaling(
            np.concatenate([first.slope, second.slope]),
            np.concatenate([first.intercept, second.intercept]),
            np.concatenate([first.own, second.own]),
        )
        steps = None
        if self.steps is not None or other.steps is not None:
            low, high = self._some_steps(), other._some_steps()
            steps = IsotonicScaling(
                np.concatenate([low.knots, high.knots]),
                np.concatenate([low.probabilities, high.probabilities]),
                np.concatenate([low.start, low.start[-1] + high.start[1:]]),
                np.concatenate([low.own, high.own]),
            )
        return ClassCurves(sigmoids, steps, min(self.n_images, other.n_images))

    def _some_steps(self) -> IsotonicScaling:
        """Return the steps, or some that no class has for its own."""
        n = len(self.sigmoids.own)
        none = IsotonicScaling(np.zeros(n), np.zeros(n), np.arange(n + 1), np.zeros(n, bool))
        return none if self.steps is None else self.steps

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        parts: dict[str, PlattScaling | IsotonicScaling] = {"sigmoids": self.sigmoids}
        if self.steps is not None:
            parts["steps"] = self.steps
        arrays = {f"{part}.{name}": a for part, own in parts.items() for name, a in own.to_arrays().items()}
        return {"n_images": np.array([self.n_images]), **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild the curves from `to_arrays`."""

        def part(name: str) -> dict[str, NDArray[Any]]:
            return {k.partition(".")[2]: array for k, array in arrays.items() if k.startswith(f"{name}.")}

        steps = part("steps")
        return cls(
            PlattScaling.from_arrays(part("sigmoids")),
            IsotonicScaling.from_arrays(steps) if steps else None,
            int(arrays["n_images"][0]),
        )


@dataclass(frozen=True)
class TemperatureScaling:
    """A softmax whose logits are divided by one number; at 1 its probabilities are its own.

    Attributes:
        temperature: > 0; above 1 it makes the softmax less sure.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise ConfigError(f"TemperatureScaling: must be a finite number above 0, got {self.temperature}.")

    @classmethod
    def fit(cls, logits: ArrayLike, targets: ArrayLike) -> Self:
        """Choose the temperature of the lowest log loss on images that the softmax was not trained on.

        Args:
            logits: (R, K + 1) finite, the background's last.
            targets: (R,) int in 0 .. K, the class of each region; K is the background.

        Raises:
            ShapeError: shapes do not fit, a logit is not finite, or a target is no class.
            DataError: no region.

        References:
            C. Guo et al., "On calibration of modern neural networks", ICML 2017. It is looked for between
            0.01 and 100.
        """
        from scipy.optimize import minimize_scalar

        x, target = np.asarray(logits, np.float64), np.asarray(targets, np.int64)
        if x.ndim != 2 or target.shape != x.shape[:1] or not np.isfinite(x).all():
            raise ShapeError(
                f"TemperatureScaling: logits must be finite, of shape (R, K + 1), with (R,) targets, got "
                f"{x.shape} and {target.shape}."
            )
        if not len(x):
            raise DataError("TemperatureScaling: there must be regions to fit on, got none.")
        if target.min() < 0 or target.max() >= x.shape[1]:
            raise ShapeError(
                f"TemperatureScaling: targets must lie in 0 .. {x.shape[1] - 1}, got {target.min()} .. "
                f"{target.max()}."
            )
        above = x - x[np.arange(len(x)), target][:, None]  # log loss is the log of the sum of exp of these

        def loss(log_temperature: float) -> float:
            scaled = above * np.exp(-log_temperature)
            most = scaled.max(axis=1)
            return float((most + np.log(np.exp(scaled - most[:, None]).sum(axis=1))).mean())

        limit = np.log(100.0)
        best = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6})
        return cls(float(np.exp(best.x)))

    def __call__(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return (R, K) probabilities of (R, K + 1) logits, the background's column dropped."""
        scaled = np.asarray(logits, np.float64) / self.temperature
        odds = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return np.asarray((odds / odds.sum(axis=1, keepdims=True))[:, :-1])

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return {"temperature": np.array([self.temperature])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild a calibrator from `to_arrays`."""
        return cls(float(arrays["temperature"][0]))


def _fit_curves(
    kind: type,
    fit: Callable[[NDArray[np.float64], NDArray[np.bool_]], Any],
    margins: ArrayLike,
    outcomes: ArrayLike,
    labels: ArrayLike,
    n_classes: int,
    min_positives: int,
) -> tuple[list[Any], NDArray[np.bool_]]:
    """Return a curve per class, and (K,) whether it is the class's own."""
    m, y = np.asarray(margins, np.float64), np.asarray(outcomes, np.bool_)
    label = np.asarray(labels, np.int64)
    where = f"{kind.__name__}.fit"
    if m.ndim != 1 or not m.shape == y.shape == label.shape:
        raise ShapeError(
            f"{where}: margins, outcomes and labels must have one shape (N,), got {m.shape}, {y.shape} and "
            f"{label.shape}."
        )
    if not np.isfinite(m).all():
        raise ShapeError(f"{where}: margins must be finite, got {int((~np.isfinite(m)).sum())} that are not.")
    if len(label) and (label.min() < 0 or label.max() >= n_classes):
        raise ShapeError(
            f"{where}: labels must lie in 0 .. {n_classes - 1}, got {label.min()} .. {label.max()}."
        )
    if not len(m) or m.min() == m.max():
        raise DataError(
            f"{where}: there must be margins that differ, got {len(m)} without a difference. Calibrate on "
            "images in which the detector finds something."
        )
    own = np.zeros(n_classes, bool)
    for k in range(n_classes):
        rows = label == k
        fewest = min(int((y & rows).sum()), int((~y & rows).sum()))
        own[k] = fewest >= min_positives and np.ptp(m[rows]) > 0
    shared = None if own.all() else fit(m, y)
    return [fit(m[label == k], y[label == k]) if own[k] else shared for k in range(n_classes)], own


def _fit_sigmoid(margins: NDArray[np.float64], outcomes: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and intercept."""
    from sklearn.linear_model import LogisticRegression

    n_positives = int(outcomes.sum())
    n_negatives = len(outcomes) - n_positives
    target = np.where(outcomes, (n_positives + 1) / (n_positives + 2), 1 / (n_negatives + 2))
    centre, width = margins.mean(), margins.std()
    x = np.tile((margins - centre) / width, 2)[:, None]
    # Without penalty. Newton's steps, since with few positives the gradient is small from the start.
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10, max_iter=200)
    model.fit(x, np.repeat([True, False], len(margins)), np.concatenate([target, 1 - target]))
    slope = float(model.coef_[0, 0]) / width
    return slope, float(model.intercept_[0]) - slope * centre


def _fit_steps(
    margins: NDArray[np.float64], outcomes: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return knots and probabilities."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=True, out_of_bounds="clip")
    model.fit(margins, outcomes.astype(np.float64))
    return np.asarray(model.X_thresholds_, np.float64), np.asarray(model.y_thresholds_, np.float64)
