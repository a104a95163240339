"""What further images would bring: a power law through a learning curve, and how far it can be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import Interval

__all__ = ["Forecast", "PowerLaw", "forecast"]

_RATES = np.linspace(0.05, 2.0, 40)


@dataclass(frozen=True)
class PowerLaw:
    """`limit - gain * n ** -rate`: what a measure approaches as the number of images grows.

    Attributes:
        limit: in [0, 1].
        gain: at least 0.
        rate: in [0.05, 2].
    """

    limit: float
    gain: float
    rate: float

    def __call__(self, n: ArrayLike) -> NDArray[np.float64]:
        """Return the measure at so many images."""
        value: NDArray[np.float64] = self.limit - self.gain * np.asarray(n, np.float64) ** -self.rate
        return value

    @classmethod
    def fit(cls, n: ArrayLike, values: ArrayLike) -> PowerLaw:
        """Fit by least squares: the rate on a grid, the rest exactly.

        Raises:
            ConfigError: fewer than three points, or of different lengths.
        """
        x, y = np.asarray(n, np.float64), np.asarray(values, np.float64)
        if len(x) < 3 or len(x) != len(y):
            raise ConfigError(
                f"PowerLaw.fit: needs three points or more, as many n as values, got {len(x)} and {len(y)}."
            )
        best, least = cls(float(y.mean()), 0.0, 1.0), math.inf
        for rate in _RATES:
            p = x**-rate
            # Least squares of y on (1, -p) within limit in [0, 1] and gain >= 0; outside, at the border.
            spread = float(((p - p.mean()) ** 2).sum())
            gain = max(0.0, -float(((p - p.mean()) * (y - y.mean())).sum()) / spread)
            limit = float(y.mean() + gain * p.mean())
            if limit > 1:
                limit, gain = 1.0, max(0.0, float((p * (1 - y)).sum() / (p * p).sum()))
            error = float(((limit - gain * p - y) ** 2).sum())
            if error < least:
                best, least = cls(limit, gain, float(rate)), error
        return best


@dataclass(frozen=True)
class Forecast:
    """What a learning curve says of numbers of images that were not tried.

    Attributes:
        law: through all points.
        n: numbers of images.
        values: of the measure there, each with its 95 % interval over the resamples of the curve: how sure
            the law is, if the law is right.
        held_out: the largest point, predicted from the smaller ones: (n, predicted, measured), fractions.
    """

    law: PowerLaw
    n: tuple[float, ...]
    values: tuple[Interval, ...]
    held_out: tuple[float, Interval, float]


def forecast(n: Sequence[float], values: ArrayLike, samples: ArrayLike, ahead: Sequence[float]) -> Forecast:
    """Fit a power law and say what it gives ahead, and how well it would have done at the largest point.

    Args:
        n: numbers of images, rising; four points at least.
        values: (P,) measured.
        samples: (P, B) the same on every resample.
        ahead: numbers of images to say something about.

    Raises:
        ConfigError: fewer than four points.
    """
    if len(n) < 4:
        raise ConfigError(f"forecast: needs four points or more, got {len(n)}.")
    y, resampled = np.asarray(values, np.float64), np.asarray(samples, np.float64)
    few = resampled[:, :200]
    law = PowerLaw.fit(n, y)
    laws = [PowerLaw.fit(n, few[:, b]) for b in range(few.shape[1])]
    before = PowerLaw.fit(n[:-1], y[:-1])
    befores = [PowerLaw.fit(n[:-1], few[:-1, b]) for b in range(few.shape[1])]
    return Forecast(
        law,
        tuple(ahead),
        tuple(_at(law, laws, x) for x in ahead),
        (float(n[-1]), _at(before, befores, n[-1]), float(y[-1])),
    )


def _at(law: PowerLaw, laws: Sequence[PowerLaw], n: float) -> Interval:
    low, high = np.percentile([float(own(n)) for own in laws], [2.5, 97.5])
    return Interval(float(law(n)), float(low), float(high))
