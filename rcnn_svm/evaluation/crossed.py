"""How sure a mean over several trained networks and the images they were all tested on is.

Networks (readers, where the method comes from) are crossed with images (cases): each network sees every
image, and both are samples of more. A bootstrap over images takes the networks as given, a t interval over
networks the images. Here both vary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rcnn_svm.errors import ShapeError
from rcnn_svm.evaluation.bootstrap import Interval

__all__ = ["CrossedMean", "crossed_mean"]


@dataclass(frozen=True)
class CrossedMean:
    """A mean with what other networks and other images would have made of it.

    Attributes:
        mean: with its 95 % interval.
        p: two-sided, of a mean of zero.
        detectable: the smallest distance from zero that is found in four of five cases, at 95 % after a
            correction for as many tests as there are.
    """

    mean: Interval
    p: float
    detectable: float


def crossed_mean(values: ArrayLike, *, n_tests: int = 1) -> CrossedMean:
    """Return the mean of a two-way layout whose rows and columns are both random.

    The variance of the mean is that of a two-way analysis of variance without replication,
    `(MS_rows + max(MS_columns - MS_rest, 0)) / (S N)`, on Hillis's degrees of freedom; this is the test of
    Dorfman, Berbaum and Metz, and of Obuchowski and Rockette, for two treatments. Where rows happen to differ
    by less than chance makes them, MS_rest stands for MS_rows: few rows that agree prove little.

    Args:
        values: (S, N), at least 2 x 2: such as by how much one treatment is better than another, for
            network s on image n.
        n_tests: of the family that this one belongs to, for `detectable` alone.

    Raises:
        ShapeError: fewer rows or columns.

    References:
        Hillis, A comparison of denominator degrees of freedom methods for multiple observer ROC analysis,
        Statistics in Medicine 26, 2007.
    """
    from scipy.stats import t

    table = np.asarray(values, np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ShapeError(f"crossed_mean: values must be (S, N), 2 or more of each, got shape {table.shape}.")
    n_rows, n_columns = table.shape
    value = float(table.mean())
    rows, columns = table.mean(axis=1) - value, table.mean(axis=0) - value
    rest = table - value - rows[:, None] - columns
    of_rows = n_columns * float(rows @ rows) / (n_rows - 1)
    of_columns = n_rows * float(columns @ columns) / (n_columns - 1)
    of_rest = float((rest * rest).sum()) / ((n_rows - 1) * (n_columns - 1))
    of_rows = max(of_rows, of_rest)
    both = of_rows + max(of_columns - of_rest, 0.0)
    error = math.sqrt(both / table.size)
    if error < 1e-12:  # rounding: nothing varies
        return CrossedMean(Interval(value, value, value), float(abs(value) < 1e-12), 0.0)
    freedom = (n_rows - 1) * (both / of_rows) ** 2 if of_rows > 1e-9 * both else math.inf
    half = float(t.ppf(0.975, freedom)) * error
    return CrossedMean(
        Interval(value, value - half, value + half),
        2 * float(t.sf(abs(value) / error, freedom)),
        float(t.ppf(1 - 0.025 / n_tests, freedom) + t.ppf(0.8, freedom)) * error,
    )
