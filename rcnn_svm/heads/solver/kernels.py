"""The loops of the solver: products, ascent inside a block, losses and gaps, one class alone. Needs numba.

`cost` (K, 2) is that of a negative and of a positive of each class, in which `sample_weight` counts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.compiled import kernel
from rcnn_svm.heads.solver.rows import Floats

__all__ = ["ascend", "inspect", "products", "solve_alone", "survey"]


@kernel(fastmath={"reassoc", "contract", "nsz"})
def products(matrix: Floats, index: NDArray[np.int64], others: Floats, out: Floats) -> None:
    """Fill `out` (n, m) with the products of `others` (n, D) with the rows `index` (m,) of `matrix`.

    Few vectors against few rows that lie apart: BLAS wants the rows gathered and then runs at a third of
    its speed, for want of anything to reuse. Four by four sums stay in registers here.
    """
    n, m, n_features = len(others), len(index), others.shape[1]
    zero = out.dtype.type(0)
    for c in range(0, m - m % 4, 4):
        x0, x1 = matrix[index[c]], matrix[index[c + 1]]
        x2, x3 = matrix[index[c + 2]], matrix[index[c + 3]]
        for k in range(0, n - n % 4, 4):
            w0, w1, w2, w3 = others[k], others[k + 1], others[k + 2], others[k + 3]
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = zero
            for d in range(n_features):
                s00 += w0[d] * x0[d]
                s01 += w0[d] * x1[d]
                s02 += w0[d] * x2[d]
                s03 += w0[d] * x3[d]
                s10 += w1[d] * x0[d]
                s11 += w1[d] * x1[d]
                s12 += w1[d] * x2[d]
                s13 += w1[d] * x3[d]
                s20 += w2[d] * x0[d]
                s21 += w2[d] * x1[d]
                s22 += w2[d] * x2[d]
                s23 += w2[d] * x3[d]
                s30 += w3[d] * x0[d]
                s31 += w3[d] * x1[d]
                s32 += w3[d] * x2[d]
                s33 += w3[d] * x3[d]
            out[k, c], out[k, c + 1], out[k, c + 2], out[k, c + 3] = s00, s01, s02, s03
            out[k + 1, c], out[k + 1, c + 1], out[k + 1, c + 2], out[k + 1, c + 3] = s10, s11, s12, s13
            out[k + 2, c], out[k + 2, c + 1], out[k + 2, c + 2], out[k + 2, c + 3] = s20, s21, s22, s23
            out[k + 3, c], out[k + 3, c + 1], out[k + 3, c + 2], out[k + 3, c + 3] = s30, s31, s32, s33
    for c in range(m):  # what is left of both
        x0 = matrix[index[c]]
        for k in range(0 if c >= m - m % 4 else n - n % 4, n):
            w0 = others[k]
            total = zero
            for d in range(n_features):
                total += w0[d] * x0[d]
            out[k, c] = total


@kernel()
def _loss(short: float, cost: float, squared: bool) -> float:
    return cost * short * short if squared else cost * short


@kernel()
def ascend(
    margins: Floats,
    gram: Floats,
    labels: NDArray[np.int8],
    sample_weight: Floats,
    alpha: Floats,
    order: NDArray[np.int64],
    cost: Floats,
    squared: bool,
    matrix: Floats,
    index: NDArray[np.int64],
    weights: Floats,
    balance: NDArray[np.float64],
    nearest: Floats,
    loss: NDArray[np.float64],
) -> bool:
    """Ascend the dual of every class once over one block, the rows `index` (m,) of a matrix (., D).

    Margins (K, m) come in at the current weights and leave at the new ones, as do the weights
    (K, D) and the balance (K,). `nearest` (m,) receives the smallest y * margin of a row as it came
    in; `loss` (K,) grows by the primal loss as it came in. Returns whether any variable changed.
    """
    n_classes, m = margins.shape
    changed = False
    nearest[:] = np.inf
    for k in range(n_classes):
        for i in range(m):
            y = labels[k, i]
            if y != 0:
                nearest[i] = min(nearest[i], y * margins[k, i])
                short = 1.0 - y * margins[k, i]
                if short > 0:
                    loss[k] += _loss(short, cost[k, 1 if y > 0 else 0] * sample_weight[i], squared)
        for i in order:
            y = labels[k, i]
            if y == 0:
                continue
            c = cost[k, 1 if y > 0 else 0] * sample_weight[i]
            old = alpha[k, i]
            zero = 0 * old
            slope = y * margins[k, i] - 1
            if squared:
                ridge = 1 / (2 * c)
                new = max(old - (slope + ridge * old) / (gram[i, i] + ridge), zero)
            elif gram[i, i] > 0:
                new = min(max(old - slope / gram[i, i], zero), c)
            else:
                new = c
            step = y * (new - old)
            if step != 0:
                alpha[k, i] = new
                balance[k] += step
                changed = True
                for j in range(m):
                    margins[k, j] += step * gram[i, j]
                # At once, not by a matrix product per block: one variable in twenty to thirty moves.
                row = matrix[index[i]]
                for d in range(weights.shape[1]):
                    weights[k, d] += step * row[d]
    return changed


@kernel()
def inspect(
    margins: Floats,
    labels: NDArray[np.int8],
    sample_weight: Floats,
    cost: Floats,
    squared: bool,
    loss: NDArray[np.float64],
    violates: NDArray[np.bool_],
) -> None:
    """Add the loss of (R, K) margins to `loss` (K,) and mark rows inside the margin of a class."""
    for i in range(len(margins)):
        violates[i] = False
        for k in range(margins.shape[1]):
            y = labels[i, k]
            if y != 0:
                short = 1.0 - y * margins[i, k]
                if short > 0:
                    violates[i] = True
                    loss[k] += _loss(short, cost[k, 1 if y > 0 else 0] * sample_weight[i], squared)


@kernel()
def survey(
    margins: Floats,
    labels: NDArray[np.int8],
    sample_weight: Floats,
    alpha: Floats,
    cost: Floats,
    squared: bool,
    gap: NDArray[np.float64],
    nearest: Floats,
    hot: NDArray[np.bool_],
) -> None:
    """Add what (n, K) margins and variables contribute to the duality gap to `gap` (K,), row by row.

    `nearest` (n,) receives the smallest y * margin of each row; `hot` (n,) whether some variable of it is
    above zero or should be.
    """
    n_classes = labels.shape[1]
    for i in range(len(labels)):
        nearest[i] = np.inf
        hot[i] = False
        for k in range(n_classes):
            y = labels[i, k]
            if y == 0:
                continue
            a, margin = float(alpha[i, k]), float(y * margins[i, k])
            nearest[i] = min(nearest[i], margin)
            if a == 0 and margin >= 1:
                continue
            hot[i] = True
            c = float(cost[k, 1 if y > 0 else 0] * sample_weight[i])
            short = max(1 - margin, 0.0)
            gap[k] += c * (short * short if squared else short) + a * margin - a
            if squared:
                gap[k] += a * a / (4 * c)


@kernel()
def solve_alone(
    margins: Floats,
    gram: Floats,
    bias_gram: float,
    labels: NDArray[np.int8],
    alpha: Floats,
    bounds: Floats,
    squared: bool,
    tol: float,
    max_steps: int,
) -> None:
    """Solve one class over n rows with their Gram matrix (n, n), which leaves the bias out.

    Each step takes the variable, or the pair of them that leaves the bias alone, that promises the
    largest ascent. A pair feels nothing of `bias_gram`, the square of the constant feature, which
    otherwise ties all rows together. Changes `margins` and `alpha` (n,) in place, until no margin
    condition is violated by more than `tol`. `bounds` (n,) are the costs of the rows.
    """
    n = len(labels)
    ceiling, ridge, diagonal, errors = bounds.copy(), np.zeros(n), np.empty_like(margins), np.empty(n)
    for t in range(n):
        diagonal[t] = gram[t, t]
        if squared:
            ceiling[t], ridge[t] = np.inf, 1 / (2 * bounds[t])
    for _ in range(max_steps):
        for t in range(n):  # how far each margin is from where its variable would come to rest
            errors[t] = labels[t] - margins[t]
            if squared:
                errors[t] -= labels[t] * alpha[t] / (2 * bounds[t])
        first, sign, size = _worst(errors, labels, alpha, ceiling)
        if size <= tol:
            break
        single = diagonal[first] + bias_gram + ridge[first]
        alone = size * size / single if single > 0 else 0.0
        second = _partner(
            first, sign, size, alone, errors, gram[first], diagonal, labels, alpha, ceiling, ridge
        )
        move = _room(labels[first] == sign, alpha[first], ceiling[first])
        if second >= 0:
            curvature = diagonal[first] + diagonal[second] - 2 * gram[first, second]
            curvature = curvature + ridge[first] + ridge[second]
            move = min(move, (size - sign * errors[second]) / max(curvature, 1e-12))
            move = min(move, _room(labels[second] != sign, alpha[second], ceiling[second]))
            alpha[second] = min(max(alpha[second] - labels[second] * sign * move, 0.0), ceiling[second])
            for t in range(n):
                margins[t] += sign * move * (gram[first, t] - gram[second, t])
        else:
            move = min(move, size / single if single > 0 else np.inf)
            for t in range(n):
                margins[t] += sign * move * (gram[first, t] + bias_gram)
        alpha[first] = min(max(alpha[first] + labels[first] * sign * move, 0.0), ceiling[first])


@kernel()
def _worst(
    errors: NDArray[np.float64], labels: NDArray[np.int8], alpha: Floats, ceiling: Floats
) -> tuple[int, int, float]:
    """Return the variable that violates its condition most, the way its margin wants to go, and how far."""
    up, down, top, bottom = -1, -1, 0.0, 0.0
    for t in range(len(labels)):
        error = errors[t]
        if error > top and (alpha[t] < ceiling[t] if labels[t] > 0 else alpha[t] > 0):
            up, top = t, error
        if error < bottom and (alpha[t] > 0 if labels[t] > 0 else alpha[t] < ceiling[t]):
            down, bottom = t, error
    return (up, 1, top) if top >= -bottom else (down, -1, -bottom)


@kernel()
def _partner(
    first: int,
    sign: int,
    size: float,
    alone: float,
    errors: NDArray[np.float64],
    products: Floats,
    diagonal: Floats,
    labels: NDArray[np.int8],
    alpha: Floats,
    ceiling: Floats,
    ridge: NDArray[np.float64],
) -> int:
    """Return who promises more ascent than `alone` by moving against `first`; -1 if nobody does."""
    second = -1
    for t in range(len(labels)):
        gain = size - sign * errors[t]
        if t != first and gain > 0 and (alpha[t] < ceiling[t] if labels[t] != sign else alpha[t] > 0):
            curvature = diagonal[first] + diagonal[t] - 2 * products[t] + ridge[first] + ridge[t]
            ascent = gain * gain / max(curvature, 1e-12)
            if ascent > alone:
                alone, second = ascent, t
    return second


@kernel()
def _room(grows: bool, alpha: float, ceiling: float) -> float:
    """How far a variable may move, up to its bound or down to 0."""
    return ceiling - alpha if grows else alpha
