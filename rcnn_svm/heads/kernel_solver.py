"""Kernel SVMs that share one kernel matrix: sequential minimal optimisation in memory.

The kernel of all rows is computed once, in float32, for every class (libsvm computes its rows again for
each of them), and each class then solves libsvm's own problem: hinge loss, unpenalised bias,

    min_a  1/2 a'Qa - sum a,   0 <= a_i <= C_i,   sum y_i a_i = 0,   Q_ij = y_i y_j K_ij,

two variables at a time, the second chosen by the largest decrease to second order.

References:
    Fan, Chen, Lin, Working set selection using second order information for training support
    vector machines, JMLR 6 (2005).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rcnn_svm import compiled

__all__ = ["intersect", "solve_pairs"]


@compiled.kernel()
def solve_pairs(
    kernel: NDArray[np.float32],
    rows: NDArray[np.int64],
    y: NDArray[np.int8],
    bounds: NDArray[np.float64],
    alpha: NDArray[np.float64],
    tol: float,
    max_steps: int,
) -> tuple[float, float, int]:
    """Solve one class over `rows` of a shared kernel matrix, changing `alpha` in place.

    Args:
        kernel: (N, N) float32, symmetric.
        rows: (n,) indices of the class's rows.
        y: (n,) +1 or -1, both present.
        bounds: (n,) float64 upper bounds C_i.
        alpha: (n,) float64, feasible; zeros, or a solution for other bounds.
        tol: largest violation of the optimality conditions, in units of the margin (libsvm's
            `eps`).
        max_steps: pairs to optimise before giving up.

    Returns:
        The bias, the violation reached, and the number of steps.
    """
    n = len(rows)
    gradient = np.full(n, -1.0)  # of the objective, y_i (Q a)_i - 1
    for j in range(n):
        if alpha[j] > 0:
            for i in range(n):
                gradient[i] += y[i] * y[j] * alpha[j] * kernel[rows[j], rows[i]]
    steps = 0
    violation = np.inf
    while True:
        # The pair: i violates most upwards; j promises the largest decrease together with i.
        i, top = -1, -np.inf
        for t in range(n):
            may_rise = alpha[t] < bounds[t] if y[t] > 0 else alpha[t] > 0
            if may_rise and -y[t] * gradient[t] > top:
                top, i = -y[t] * gradient[t], t
        j, bottom, best = -1, np.inf, np.inf
        if i >= 0:
            row_i = kernel[rows[i]]
            k_ii = row_i[rows[i]]
            for t in range(n):
                if alpha[t] > 0 if y[t] > 0 else alpha[t] < bounds[t]:
                    value = -y[t] * gradient[t]
                    bottom = min(bottom, value)
                    difference = top - value
                    if difference > 0:
                        curvature = max(k_ii + kernel[rows[t], rows[t]] - 2 * row_i[rows[t]], 1e-12)
                        decrease = -difference * difference / curvature
                        if decrease < best:
                            best, j = decrease, t
        violation = top - bottom
        if i < 0 or j < 0 or violation < tol or steps >= max_steps:
            break
        steps += 1
        row_j = kernel[rows[j]]
        curvature = max(k_ii + row_j[rows[j]] - 2 * row_i[rows[j]], 1e-12)
        # Move along y_i a_i + y_j a_j = constant, as far as the box allows.
        move = (top + y[j] * gradient[j]) / curvature
        room_i = bounds[i] - alpha[i] if y[i] > 0 else alpha[i]
        room_j = alpha[j] if y[j] > 0 else bounds[j] - alpha[j]
        move = min(move, room_i, room_j)
        # Land on the bound exactly: rounding must not leave a variable a hair inside it.
        alpha[i] = (bounds[i] if y[i] > 0 else 0.0) if move == room_i else alpha[i] + y[i] * move
        alpha[j] = (0.0 if y[j] > 0 else bounds[j]) if move == room_j else alpha[j] - y[j] * move
        for t in range(n):
            gradient[t] += y[t] * move * (row_i[rows[t]] - row_j[rows[t]])
    # The bias: the mean over free variables, else the middle of the interval they leave.
    total, free = 0.0, 0
    for t in range(n):
        if 0 < alpha[t] < bounds[t]:
            total += -y[t] * gradient[t]
            free += 1
    bias = total / free if free > 0 else (top + bottom) / 2
    return bias, violation, steps


@compiled.kernel(fastmath={"reassoc", "nsz"})
def intersect(rows: NDArray[np.float32], support: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Put the sums of `min(rows[r, d], support[s, d])` of (R, D) and (S, D) into `out`, (R, S).

    R must be a multiple of 4: four rows meet a vector while it is at hand, which takes less than half the
    time, and all rows in the same way, so that a value does not depend on where its row stands.
    """
    for r in range(0, len(rows), 4):
        for s in range(len(support)):
            first = second = third = fourth = np.float32(0)
            for d in range(rows.shape[1]):
                value = support[s, d]
                first += min(rows[r, d], value)
                second += min(rows[r + 1, d], value)
                third += min(rows[r + 2, d], value)
                fourth += min(rows[r + 3, d], value)
            out[r, s], out[r + 1, s], out[r + 2, s], out[r + 3, s] = first, second, third, fourth
