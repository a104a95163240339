"""Block dual coordinate ascent: many binary SVMs over the same rows, trained together.

For each class k, over the rows with label y in {+1, -1} (0 is ignored) and cost C_i:

    P(w) = 1/2 |w|^2 + sum_i C_i loss(y_i w.x_i),   loss(z) = max(0, 1 - z) or its square,

whose dual has one variable per row and class. Rows come in small blocks. One matrix
product per block gives the margins of all classes; then each class ascends its dual exactly,
variable by variable, inside the block, where the block's Gram matrix replaces any further look at
the features but to add a change to the weights. The bias is one more feature of constant value
`bias_scale`. `docs/heads.md` derives all of it.

Weights and dual variables certify each other: the duality gap bounds the distance from the optimum.
BLAS runs on one thread in here, so that results do not depend on how many the machine has.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from rcnn_svm.compiled import kernel

__all__ = ["BlockSolver", "Floats", "MatrixSource", "RowSource", "Solution", "relative_gap"]

_log = logging.getLogger(__name__)

Floats = NDArray[Any]
"""float32 or float64: the precision of the solver."""

# Fixed blocks converge more slowly the larger they are (17 epochs at 128 rows where 32 take 9): the
# error that all rows share averages out only between blocks. Below 32 the matrix products suffer.
_BLOCK_ROWS = 32
# Rows that the first working set holds at least, beside all positives. More of them spare a store some of the
# violators of weights that are far from good; rows in memory come and go for nothing.
_SEED_ROWS, _SEED_ROWS_IN_MEMORY = 20_000, 2000
# A pass stops to optimise once the working set has grown by this many rows, or has doubled.
_GROWTH_ROWS = 8000
# A row leaves the working set when all its variables are 0 and its margins exceed this. Rows of a
# matrix come back at the next pass for nothing; rows of a store cost a read, so that R-CNN's own
# distance is kept there.
_EVICT_MARGIN_IN_MEMORY = 1.05
_EVICT_MARGIN = 1.2
# Idle rows stay until they are this share of the working set: whoever goes shifts the others, and the
# blocks' Gram matrices, about an epoch's work, are lost.
_IDLE_SHARE = 0.05
_MAX_EPOCHS = 200
# The bias takes proximal steps of lag this times the rows' mean |x|^2, where bias_scale^2 is more than
# so many times the lag. On rows of length 1 with bias_scale 10 a lag of 1 takes twice the epochs of 0.2,
# and no proximal steps 40 times as many.
_LAG = 0.2
_TIED = 2.0
# Relative gap to which the working set is optimised at first; then this share of the full gap where
# a pass costs little; at last, and always where rows come from a store, this share of the tolerance.
_FIRST_GOAL = 0.1
_GOAL_SHARE = 0.03
_FINAL_GOAL = 0.5
# A warm start has most of its working set already and aims at once at the final goal; for the squared
# hinge in memory, whose epochs overstate the gap the most, at this multiple of the tolerance.
_WARM_GOAL = 2.0
# The gap seen during an epoch belongs to weights in motion, mostly several times too large: from the
# second multiple of the goal on the true one is computed. Where rows lie in memory the next pass will
# tell, so that the first multiple is taken for the truth until a pass has shown it to be wrong.
_TRUSTED = 2.0
_CHECK_FROM = 6.0
# At a survey at least so many epochs after the last one, each class is solved alone on its rows of margin
# below this (or else below 1), if they are few: at most so many, and their Gram matrices no more work than
# some epochs.
# From a warm start the hinge's rows near the margin are known, and half as many epochs are enough before.
_POLISH_EVERY, _POLISH_EVERY_WARM = 6, 3
_POLISH_MARGIN = 1.02
_POLISH_ROWS = 4000
_POLISH_WORK = 40
_POLISH_TOL = 0.3
_POLISH_STEPS = 30
# The rows that are not hot are surveyed at the latest when the epochs since cost so many times as much.
_SURVEY_EVERY = 2
# Keeps a relative gap finite where the dual is still 0.
_TINY = 1e-30


@kernel(fastmath={"reassoc", "contract", "nsz"})
def _products(matrix: Floats, index: NDArray[np.int64], others: Floats, out: Floats) -> None:
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
def _ascend(
    margins: Floats,
    gram: Floats,
    labels: NDArray[np.int8],
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
                    c = cost[k, 1 if y > 0 else 0]
                    loss[k] += c * short * short if squared else c * short
        for i in order:
            y = labels[k, i]
            if y == 0:
                continue
            c = cost[k, 1 if y > 0 else 0]
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
def _inspect(
    margins: Floats,
    labels: NDArray[np.int8],
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
                    c = cost[k, 1 if y > 0 else 0]
                    loss[k] += c * short * short if squared else c * short


@kernel()
def _survey(
    margins: Floats,
    labels: NDArray[np.int8],
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
            c = float(cost[k, 1 if y > 0 else 0])
            short = max(1 - margin, 0.0)
            gap[k] += c * (short * short if squared else short) + a * margin - a
            if squared:
                gap[k] += a * a / (4 * c)


@kernel()
def _solve_alone(
    margins: Floats,
    gram: Floats,
    bias_gram: float,
    labels: NDArray[np.int8],
    alpha: Floats,
    cost: Floats,
    squared: bool,
    tol: float,
    max_steps: int,
) -> None:
    """Solve one class over n rows with their Gram matrix (n, n), which leaves the bias out.

    Each step takes the variable, or the pair of them that leaves the bias alone, that promises the
    largest ascent. A pair feels nothing of `bias_gram`, the square of the constant feature, which
    otherwise ties all rows together. Changes `margins` and `alpha` (n,) in place, until no margin
    condition is violated by more than `tol`.
    """
    n = len(labels)
    for _ in range(max_steps):
        up, down, top, bottom = -1, -1, 0.0 * tol, 0.0 * tol
        for t in range(n):
            y = labels[t]
            c = cost[1 if y > 0 else 0]
            error = y - margins[t]
            if squared:
                error -= y * alpha[t] / (2 * c)
            may_grow = squared or alpha[t] < c
            if (may_grow if y > 0 else alpha[t] > 0) and error > top:
                up, top = t, error
            if (alpha[t] > 0 if y > 0 else may_grow) and error < bottom:
                down, bottom = t, error
        if max(top, -bottom) <= tol:
            break
        first, sign, size = (up, 1, top) if top >= -bottom else (down, -1, -bottom)
        c_first = cost[1 if labels[first] > 0 else 0]
        ridge = 1 / (2 * c_first) if squared else 0.0
        single = gram[first, first] + bias_gram + ridge
        best, second = size * size / single if single > 0 else 0.0, -1
        for t in range(n):
            y = labels[t]
            c = cost[1 if y > 0 else 0]
            error = y - margins[t]
            if squared:
                error -= y * alpha[t] / (2 * c)
            # The partner moves the other way round.
            grows = y != sign
            if t != first and ((squared or alpha[t] < c) if grows else alpha[t] > 0):
                gain = size - sign * error
                if gain > 0:
                    curvature = gram[first, first] + gram[t, t] - 2 * gram[first, t] + ridge
                    if squared:
                        curvature += 1 / (2 * c)
                    ascent = gain * gain / max(curvature, 1e-12)
                    if ascent > best:
                        best, second = ascent, t
        if second >= 0:
            c_second = cost[1 if labels[second] > 0 else 0]
            error = labels[second] - margins[second]
            curvature = gram[first, first] + gram[second, second] - 2 * gram[first, second] + ridge
            if squared:
                error -= labels[second] * alpha[second] / (2 * c_second)
                curvature += 1 / (2 * c_second)
            move = (size - sign * error) / max(curvature, 1e-12)
            if labels[second] == sign:
                move = min(move, alpha[second])
            elif not squared:
                move = min(move, c_second - alpha[second])
        else:
            move = size / single if single > 0 else np.inf
        if labels[first] != sign:
            move = min(move, alpha[first])
        elif not squared:
            move = min(move, c_first - alpha[first])
        grown = alpha[first] + labels[first] * sign * move
        alpha[first] = max(grown, 0.0) if squared else min(max(grown, 0.0), c_first)
        if second >= 0:
            grown = alpha[second] - labels[second] * sign * move
            alpha[second] = max(grown, 0.0) if squared else min(max(grown, 0.0), c_second)
            for t in range(n):
                margins[t] += sign * move * (gram[first, t] - gram[second, t])
        else:
            for t in range(n):
                margins[t] += sign * move * (gram[first, t] + bias_gram)


class RowSource(Protocol):
    """All labelled rows, in parts (an image, a slab of a matrix) that fit into memory.

    Attributes:
        n_features: D.
        n_classes: K.
        matrix: (n, D) where all parts are consecutive slabs of one array in memory, else None.
    """

    @property
    def n_features(self) -> int:
        """D."""
        ...

    @property
    def n_classes(self) -> int:
        """K."""
        ...

    @property
    def matrix(self) -> Floats | None:
        """All rows as one array in memory, or None."""
        ...

    def __len__(self) -> int:
        """Return the number of parts."""
        ...

    def first_row(self, part: int) -> int:
        """Return the number of rows in all parts before `part`; `len(self)` gives the total."""
        ...

    def labels(self, part: int) -> NDArray[np.int8]:
        """Return (R, K) int8 labels +1, -1 or 0 = ignored."""
        ...

    def features(self, part: int, rows: NDArray[np.int64] | None = None) -> Floats:
        """Return (R, D) features of the part, or of some of its rows."""
        ...


class MatrixSource:
    """Rows of one matrix in memory: nothing is copied.

    Args:
        matrix: (n, D) float32 or float64, C-ordered.
        labels: (n, K) int8.
    """

    _STEP = 2048

    def __init__(self, matrix: Floats, labels: NDArray[np.int8]) -> None:
        self.matrix: Floats | None = matrix
        self._rows = matrix
        self._labels = labels
        self.n_features = int(matrix.shape[1])
        self.n_classes = int(labels.shape[1])

    def __len__(self) -> int:
        return -(-len(self._rows) // self._STEP)

    def first_row(self, part: int) -> int:
        """Return the index of the first row of `part`."""
        return min(part * self._STEP, len(self._rows))

    def labels(self, part: int) -> NDArray[np.int8]:
        """Return (R, K) labels of the part."""
        return self._labels[part * self._STEP : (part + 1) * self._STEP]

    def features(self, part: int, rows: NDArray[np.int64] | None = None) -> Floats:
        """Return (R, D) features of the part, or of some of its rows."""
        slab = self._rows[part * self._STEP : (part + 1) * self._STEP]
        return slab if rows is None else slab[rows]


@dataclass(frozen=True, eq=False)
class Solution:
    """The weights of K SVMs and the proof of how good they are.

    Attributes:
        coef: (K, D).
        intercept: (K,).
        primal: (K,) float64, objective of the weights over *all* rows, from a pass of its own.
        dual: (K,) float64, lower bound of every objective.
        passes: feature passes so far: rows read, over rows there are.
        epochs: sweeps over the working set so far.
        n_working: rows in the working set at the end.
        converged: whether every class reached the tolerance.
    """

    coef: Floats
    intercept: Floats
    primal: NDArray[np.float64]
    dual: NDArray[np.float64]
    passes: float
    epochs: int
    n_working: int
    converged: bool

    @property
    def gap(self) -> NDArray[np.float64]:
        """(K,) relative duality gaps: each objective is within this fraction of its optimum."""
        return relative_gap(self.primal, self.dual)


def relative_gap(primal: NDArray[np.float64], dual: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `(primal - dual) / primal`, 0 where both are 0."""
    scale = np.where(primal > 0, primal, 1)
    gap: NDArray[np.float64] = np.maximum(primal - dual, 0) / scale
    return gap


@dataclass(frozen=True, eq=False)
class _Block:
    """Hot rows that are visited together.

    Attributes:
        rows: (m,) of the working set.
        gram: (m, m) products of the rows with each other, the bias included.
        labels: (K, m).
        alpha: (K, m) dual variables.
        nearest: (m,) smallest y * margin of a row when last seen.
    """

    rows: NDArray[np.int64]
    gram: Floats
    labels: NDArray[np.int8]
    alpha: Floats
    nearest: Floats


class BlockSolver:
    """Train K SVMs over all rows of a source, to a certified duality gap.

    A working set of rows is optimised by block dual coordinate ascent; a pass over all rows at
    fixed weights then gives the exact objective and the rows that violate their optimality
    conditions, which join the working set. Rows outside it keep their dual variables (mostly
    zero), so the working set may be bounded and the result is still the optimum over all rows.
    Calling `solve` again with other costs starts from the last solution.

    Args:
        source: all rows.
        squared: squared hinge instead of hinge.
        positive_weight: the cost of a positive is this times C.
        bias_scale: value of the constant feature, > 0.
        tol: largest relative duality gap of a class.
        max_passes: passes over all rows before giving up on `tol`.
        max_bytes: bound of the working set's copy of its rows and of their Gram matrices.
        seed: of the order of coordinates and of the first working set.

    References:
        Hsieh et al., A dual coordinate descent method for large-scale linear SVM, ICML 2008;
        Felzenszwalb et al., PAMI 2010, section 4.4 (hard negatives to the fixed point).
    """

    def __init__(
        self,
        source: RowSource,
        *,
        squared: bool,
        positive_weight: float,
        bias_scale: float,
        tol: float = 1e-3,
        max_passes: int = 50,
        max_bytes: int = 1 << 30,
        seed: int = 0,
        dtype: Any = np.float32,
    ) -> None:
        self._source = source
        self._squared = squared
        self._positive_weight = positive_weight
        self._bias_scale = bias_scale
        self._tol = tol
        self._max_passes = max_passes
        self._rng = np.random.default_rng(seed)
        self._m = _BLOCK_ROWS
        n_classes, n_features = source.n_classes, source.n_features
        self._dtype = np.dtype(dtype)
        row_bytes = (self._m + (0 if source.matrix is not None else n_features)) * self._dtype.itemsize
        self._max_rows = max(2 * self._m, max_bytes // (row_bytes + n_classes * (self._dtype.itemsize + 1)))
        self._n_rows = source.first_row(len(source))
        self._weights = np.zeros((n_classes, n_features), dtype)
        # The dual's bias is bias_scale^2 times the balance, the sum of y alpha; the primal's is free.
        self._balance = np.zeros(n_classes)
        self._bias = np.zeros(n_classes)
        self._lag: float | None = None  # see `_hold_bias`
        self._cost = np.zeros((n_classes, 2), dtype)  # of a negative, of a positive
        # The working set, one entry per row; a source in memory is indexed instead of copied.
        capacity = min(self._max_rows, self._n_rows) if source.matrix is None else 0
        self._x = np.empty((capacity, n_features), dtype)
        self._part = np.zeros(0, np.int64)
        self._row = np.zeros(0, np.int64)
        self._labels = np.zeros((0, n_classes), np.int8)
        self._alpha = np.zeros((0, n_classes), dtype)
        self._nearest = np.zeros(0, dtype)  # smallest y * margin over the classes when last seen
        # Rows on their way into it, as (part, row, labels, alpha), and how many there will be.
        self._arrived: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8], Floats]] = []
        self._size = 0
        self._index = np.zeros(0, np.int64)  # of the working set's rows in the matrix that holds them
        # Hot rows have a variable above zero or in want of it, as far as the last survey knows.
        self._hot = np.zeros(0, bool)
        self._groups: list[tuple[NDArray[np.int64], Floats]] = []  # of hot rows, with their Gram matrices
        # Dual variables of rows that were evicted with some of them above zero, by part.
        self._kept: dict[int, tuple[NDArray[np.int64], Floats]] = {}
        self._kept_linear = np.zeros(n_classes)
        self._rows_read = 0
        self._epochs = 0
        self._polish_every = _POLISH_EVERY
        self._trusting = source.matrix is not None
        self._moved = False  # whether the weights changed since a pass began

    def solve(self, costs: NDArray[np.floating], *, tol: float | None = None) -> Solution:
        """Return the solution for (K,) costs C, starting from the one before, if any.

        Args:
            costs: (K,) > 0.
            tol: relative duality gap to reach this time; None takes the solver's own.
        """
        tol = self._tol if tol is None else tol
        with threadpool_limits(limits=1, user_api="blas"):
            self._set_costs(np.asarray(costs, np.float64))
            if self._size == 0 and not self._kept:
                self._seed_working_set()
            goal = _FIRST_GOAL
            if self._epochs:
                in_memory = self._source.matrix is not None
                goal = tol * (_WARM_GOAL if in_memory and self._squared else _FINAL_GOAL)
                self._polish_every = _POLISH_EVERY if self._squared else _POLISH_EVERY_WARM
            for n_passes in range(1, self._max_passes + 1):
                self._optimise(goal)
                size = self._size
                primal, exact = self._scan(goal)
                worst = float(relative_gap(primal, self._dual()).max()) if exact else np.inf
                _log.info(
                    "%.2f passes: relative duality gap %.2e, %d rows in the working set, %d epochs",
                    self._passes(), worst, self._size, self._epochs,
                )  # fmt: skip
                if worst <= tol or n_passes == self._max_passes:
                    break
                if exact and worst > 10 * goal and self._size <= 1.01 * size:
                    self._trusting = False
                goal = max(min(_GOAL_SHARE * worst, goal / 2), _FINAL_GOAL * tol)
                if self._source.matrix is None:
                    goal = _FINAL_GOAL * tol
        return Solution(
            coef=self._weights.copy(),
            intercept=self._bias.astype(self._dtype),
            primal=primal,
            dual=self._dual(),
            passes=self._passes(),
            epochs=self._epochs,
            n_working=self._size,
            converged=worst <= tol,
        )

    def _passes(self) -> float:
        return self._rows_read / max(1, self._n_rows)

    def _set_costs(self, costs: NDArray[np.float64]) -> None:
        """Scale the last solution, class by class, to the best multiple of it under the new costs.

        Any multiple up to the ratio of the costs is feasible, and the dual of a multiple is a
        parabola: its top is a start at no cost.
        """
        old = self._cost[:, 0].astype(np.float64)
        self._cost = np.stack([costs, costs * self._positive_weight], axis=1).astype(self._dtype)
        if not old.any():
            return
        ratio = costs / old
        total = self._alpha.sum(axis=0, dtype=np.float64)
        curved = total - self._linear(self._alpha, self._labels)  # sum of a^2 / (4 C), 0 for the hinge
        kept_total = np.zeros(len(costs))
        for _, alpha in self._kept.values():
            kept_total += alpha.sum(axis=0, dtype=np.float64)
        kept_curved = (kept_total - self._kept_linear) / ratio
        steep = 2 * (curved + kept_curved + self._half_norms(self._bias_scale * self._balance))
        best = np.divide(total + kept_total, steep, out=np.ones_like(steep), where=steep > 0)
        # One unit in the last place less: rounding must not leave a variable above its bound.
        scale = np.minimum(best, ratio * (1 - np.finfo(self._dtype).eps)).astype(self._dtype)
        self._weights *= scale[:, None]
        self._balance *= scale
        self._bias *= scale
        self._alpha *= scale
        for _, alpha in self._kept.values():
            alpha *= scale
        self._kept_linear = scale * kept_total - scale.astype(np.float64) ** 2 * kept_curved
        if not self._squared:
            np.minimum(self._alpha, self._bounds(self._labels), out=self._alpha)

    def _bounds(self, labels: NDArray[np.int8]) -> Floats:
        return np.where(labels > 0, self._cost[:, 1], self._cost[:, 0])

    def _seed_working_set(self) -> None:
        """Start from all positives and as many other rows, drawn from all parts alike."""
        labels = [self._source.labels(p) for p in range(len(self._source))]
        positives = [np.flatnonzero((part > 0).any(axis=1)) for part in labels]
        n_seeds = _SEED_ROWS if self._source.matrix is None else _SEED_ROWS_IN_MEMORY
        n_others = max(n_seeds, sum(map(len, positives)))
        share = min(1.0, n_others / max(1, self._n_rows))
        for p, (part, rows) in enumerate(zip(labels, positives, strict=True)):
            drawn = self._rng.random(len(part)) < share
            drawn &= (part != 0).any(axis=1)
            drawn[rows] = True
            self._admit(p, np.flatnonzero(drawn), part)

    def _admit(
        self, part: int, rows: NDArray[np.int64], labels: NDArray[np.int8], features: Floats | None = None
    ) -> None:
        """Add rows (rising, not yet in it) of a part to the working set, making room where it is full."""
        room = self._max_rows // 2
        for rows_now in np.split(rows, range(room, len(rows), room)) if len(rows) else ():
            if self._size + len(rows_now) > self._max_rows:
                self._optimise(0.1)
                self._evict(self._max_rows - room)
            start, self._size = self._size, self._size + len(rows_now)
            if self._source.matrix is None:
                if features is None:
                    self._rows_read += len(rows_now)
                    self._x[start : self._size] = self._source.features(part, rows_now)
                else:
                    self._x[start : self._size] = features[rows_now]
            alpha = np.zeros((len(rows_now), self._source.n_classes), self._dtype)
            if part in self._kept:
                kept, kept_alpha = self._kept.pop(part)
                back = np.isin(kept, rows_now)
                alpha[np.searchsorted(rows_now, kept[back])] = kept_alpha[back]
                self._kept_linear -= self._linear(kept_alpha[back], labels[kept[back]])
                if not back.all():
                    self._kept[part] = kept[~back], kept_alpha[~back]
            self._arrived.append((np.full(len(rows_now), part), rows_now, labels[rows_now], alpha))

    def _join(self) -> None:
        """Enter the rows that arrived since the last time into the working set."""
        if not self._arrived:
            return
        part, row, labels, alpha = map(np.concatenate, zip(*self._arrived, strict=True))
        self._arrived = []
        self._part = np.concatenate([self._part, part])
        self._row = np.concatenate([self._row, row])
        self._labels = np.concatenate([self._labels, labels])
        self._alpha = np.concatenate([self._alpha, alpha])
        self._nearest = np.concatenate([self._nearest, np.zeros(len(part), self._dtype)])
        self._hot = np.concatenate([self._hot, np.ones(len(part), bool)])

    def _evict(self, limit: int) -> None:
        """Drop idle rows if they are many, and then those of largest margin until `limit` are left."""
        self._join()
        limit_margin = _EVICT_MARGIN if self._source.matrix is None else _EVICT_MARGIN_IN_MEMORY
        keep = (self._alpha != 0).any(axis=1) | (self._nearest <= limit_margin)
        if np.count_nonzero(keep) > limit:
            rows = np.flatnonzero(keep)
            keep[rows[np.argsort(self._nearest[rows], kind="stable")[limit:]]] = False
        if len(keep) <= limit and np.count_nonzero(~keep) <= _IDLE_SHARE * len(keep):
            return
        lost = np.flatnonzero(~keep & (self._alpha != 0).any(axis=1))
        self._kept_linear += self._linear(self._alpha[lost], self._labels[lost])
        for part in np.unique(self._part[lost]):
            own = lost[self._part[lost] == part]
            own = own[np.argsort(self._row[own])]
            kept, alpha = self._row[own], self._alpha[own]
            if part in self._kept:
                kept = np.concatenate([self._kept[part][0], kept])
                alpha = np.concatenate([self._kept[part][1], alpha])
                order = np.argsort(kept)
                kept, alpha = kept[order], alpha[order]
            self._kept[int(part)] = kept, alpha
        rows = np.flatnonzero(keep)
        if self._source.matrix is None:
            # In place and in steps: every row moves towards the front, none past one still to move.
            for start in range(0, len(rows), self._m):
                moving = rows[start : start + self._m]
                self._x[start : start + len(moving)] = self._x[moving]
        self._part, self._row, self._nearest = self._part[rows], self._row[rows], self._nearest[rows]
        self._labels, self._alpha, self._hot = self._labels[rows], self._alpha[rows], self._hot[rows]
        self._groups, self._size = [], len(rows)

    def _optimise(self, goal: float) -> None:
        """Ascend over the working set until its relative gap, or the estimate of it, is at most `goal`.

        An epoch visits the hot rows alone. Every so often a survey of the whole working set gives its true
        gap and tells anew which rows are hot.
        """
        self._join()
        if self._source.matrix is None:
            self._index = np.arange(len(self._part))
        else:
            first = np.array([self._source.first_row(part) for part in range(len(self._source))])
            self._index = first[self._part] + self._row
        bias_gram, lean = self._hold_bias()
        matrix = self._x if self._source.matrix is None else self._source.matrix
        blocks = self._regroup(bias_gram)
        since = 0  # epochs since the last survey
        for _ in range(_MAX_EPOCHS):
            self._epochs += 1
            since += 1
            loss = np.zeros(len(self._weights))
            order = self._rng.permutation(self._m)
            held = lean * self._bias
            for b in self._rng.permutation(len(blocks)):
                block = blocks[b]
                index = self._index[block.rows]
                margins = np.empty((len(self._weights), len(index)), self._dtype)
                _products(matrix, index, self._weights, margins)
                self._bias = bias_gram * self._balance + held
                margins += self._bias.astype(self._dtype)[:, None]
                self._moved |= _ascend(
                    margins, block.gram, block.labels, block.alpha, order[order < len(index)], self._cost,
                    self._squared, matrix, index, self._weights, self._balance, block.nearest, loss,
                )  # fmt: skip
            self._bias = bias_gram * self._balance + held
            for block in blocks:
                self._alpha[block.rows] = block.alpha.T
                self._nearest[block.rows] = block.nearest
            # Evicted rows with a part in the weights are missing from `loss`: then only the true gap counts.
            seen = np.inf if self._kept else relative_gap(self._half_primal() + loss, self._dual()).max()
            if self._trusting and seen <= _TRUSTED * goal:
                break
            overdue = since >= self._polish_every
            if not overdue and (self._trusting or seen > _CHECK_FROM * goal):
                continue
            # Rows that are not hot can only add to the gap: the hot ones are asked first where that is cheap,
            # but not for ever, since others may have become hot.
            hot = np.flatnonzero(self._hot)
            share = len(hot) / len(self._part)
            if share < 0.5 and since * share < _SURVEY_EVERY and self._survey(hot)[1] > _FINAL_GOAL * goal:
                continue
            margins, gap, self._hot = self._survey(np.arange(len(self._part)))
            if gap <= goal:
                break
            if since >= self._polish_every:
                self._polish(margins, goal)
            since = 0
            blocks = self._regroup(bias_gram)

    def _regroup(self, bias_gram: float) -> list[_Block]:
        """Return all hot rows in blocks. A block stays, with its Gram matrix, while half of it is hot."""
        matrix = self._x if self._source.matrix is None else self._source.matrix
        groups = [(r, gram) for r, gram in self._groups if 2 * np.count_nonzero(self._hot[r]) >= self._m]
        lonely = self._hot.copy()
        for rows, _ in groups:
            lonely[rows] = False
            self._hot[rows] = True
        rest = np.flatnonzero(lonely)
        for start in range(0, len(rest), self._m):
            rows = rest[start : start + self._m]
            gram = np.empty((len(rows), len(rows)), self._dtype)
            _products(matrix, self._index[rows], matrix[self._index[rows]], gram)
            gram += bias_gram
            groups.append((rows, gram))
        self._groups = groups
        return [
            _Block(
                rows,
                gram,
                np.ascontiguousarray(self._labels[rows].T),
                np.ascontiguousarray(self._alpha[rows].T),
                self._nearest[rows],
            )
            for rows, gram in groups
        ]

    def _survey(self, rows: NDArray[np.int64]) -> tuple[Floats, float, NDArray[np.bool_]]:
        """Return (n, K) margins of rows of the working set, the relative gap over them, and which are hot."""
        matrix = self._x if self._source.matrix is None else self._source.matrix
        margins = self._margins(matrix, self._index[rows])
        # |w|^2 + bias * balance is the sum of alpha y margin over all rows: but for what the two biases
        # differ by, the gap is a sum over rows, here of these.
        gap = 0.5 * (self._bias / self._bias_scale - self._bias_scale * self._balance) ** 2
        nearest, hot = np.empty(len(rows), self._dtype), np.empty(len(rows), bool)
        _survey(margins, self._labels[rows], self._alpha[rows], self._cost, self._squared, gap, nearest, hot)
        self._nearest[rows] = nearest
        return margins, float((np.maximum(gap, 0) / np.maximum(self._dual(), _TINY)).max()), hot

    def _polish(self, margins: Floats, goal: float) -> None:
        """Solve each class on the rows near or inside its margin, with their whole Gram matrix.

        What slows the blocks down, an error that all rows share, costs no feature products here. Where the
        Gram matrices would cost more than epochs do, rows near the margin are left out, or nothing is done.
        """
        exact = self._bias_scale**2 * self._balance
        margins += (exact - self._bias).astype(self._dtype)
        signed = self._labels * margins
        for limit in (_POLISH_MARGIN, 1.0):
            near = (self._alpha != 0) | ((self._labels != 0) & (signed < limit))
            sizes = near.sum(axis=0).astype(np.float64)
            if (sizes**2).sum() <= _POLISH_WORK * near.size and sizes.max() <= _POLISH_ROWS:
                break
        else:
            return
        for k in range(len(self._weights)):
            rows = np.flatnonzero(near[:, k])
            if len(rows) == 0:
                continue
            x = self._rows(rows)
            alpha = np.ascontiguousarray(self._alpha[rows, k])
            before, labels = alpha.copy(), np.ascontiguousarray(self._labels[rows, k])
            _solve_alone(
                np.ascontiguousarray(margins[rows, k]), x @ x.T, float(self._bias_scale) ** 2, labels, alpha,
                self._cost[k], self._squared, _POLISH_TOL * goal, _POLISH_STEPS * len(rows),
            )  # fmt: skip
            step = (alpha - before) * labels
            self._weights[k] += step @ x
            self._balance[k] += step.sum(dtype=np.float64)
            self._alpha[rows, k] = alpha
            self._hot[rows] |= alpha > 0
        self._bias = self._bias_scale**2 * self._balance

    def _hold_bias(self) -> tuple[float, float]:
        """Return the curvature that steps feel through the bias, and how far the last bias is held.

        A constant feature that is large beside the others ties all rows together: a single step of
        one variable is undone by the next. Proximal steps cut the tie: for an epoch the bias minimises
        its own terms plus `(bias - last)^2 / (2 lag)`, which makes it
        `bias_gram * balance + lean * last`. What stays fixed is the same: bias_scale^2 * balance.
        """
        if self._lag is None:
            x = self._rows(np.arange(min(len(self._part), 512)))
            self._lag = _LAG * float(np.einsum("nd,nd->", x, x, dtype=np.float64)) / max(1, len(x))
        square = self._bias_scale**2
        if square <= _TIED * self._lag or self._lag == 0:
            return square, 0.0
        bias_gram = self._lag * square / (self._lag + square)
        return bias_gram, bias_gram / self._lag

    def _rows(self, rows: NDArray[np.int64]) -> Floats:
        """Return a copy of the (n, D) features of some rows of the working set."""
        if self._source.matrix is None:
            return self._x[rows]
        return self._source.matrix[self._index[rows]]

    def _margins(self, matrix: Floats, index: NDArray[np.int64]) -> Floats:
        """Return (m, K) the margins of some rows of a matrix."""
        out = np.empty((len(self._weights), len(index)), self._dtype)
        _products(matrix, index, self._weights, out)
        margins = np.ascontiguousarray(out.T)
        margins += self._bias.astype(self._dtype)
        return margins

    def _scan(self, goal: float) -> tuple[NDArray[np.float64], bool]:
        """Pass over all rows: sum up the primal objective, let violators join the working set.

        Returns the (K,) objectives, and whether the weights stood still meanwhile, so that they hold.
        """
        self._evict(self._max_rows)
        self._moved = False
        loss = np.zeros(len(self._weights))
        size = self._size
        for part in range(len(self._source)):
            labels, features = self._source.labels(part), self._source.features(part)
            self._rows_read += len(features)
            margins = self._margins(features, np.arange(len(features)))
            violates = np.empty(len(features), bool)
            _inspect(margins, labels, self._cost, self._squared, loss, violates)
            if part in self._kept:
                violates[self._kept[part][0]] = self._unsettled(part, margins, labels)
            members = np.flatnonzero(self._part == part)
            self._hot[members] = violates[self._row[members]] | (self._alpha[members] != 0).any(axis=1)
            violates[self._row[members]] = False
            self._admit(part, np.flatnonzero(violates), labels, features)
            if self._size > size + max(size, _GROWTH_ROWS):
                self._optimise(goal)
                self._evict(self._max_rows)
                size = self._size
        return self._half_primal() + loss, not self._moved

    def _unsettled(self, part: int, margins: Floats, labels: NDArray[np.int8]) -> NDArray[np.bool_]:
        """Mark the evicted rows of a part whose variables could still move the dual upwards."""
        rows, alpha = self._kept[part]
        y = labels[rows]
        slope = y * margins[rows] - 1
        bounds = self._bounds(y)
        if self._squared:
            slope += alpha / (2 * bounds)
        free_down = alpha > 0
        free_up = np.ones_like(free_down) if self._squared else alpha < bounds
        moves = np.where(slope > 0, free_down, free_up) & (np.abs(slope) > self._tol) & (y != 0)
        result: NDArray[np.bool_] = moves.any(axis=1)
        return result

    def _half_norms(self, bias: NDArray[np.float64]) -> NDArray[np.float64]:
        """(K,) 1/2 |w|^2 with (K,) weights of the constant feature."""
        w = np.einsum("kd,kd->k", self._weights, self._weights, dtype=np.float64)
        half: NDArray[np.float64] = 0.5 * (w + bias**2)
        return half

    def _half_primal(self) -> NDArray[np.float64]:
        return self._half_norms(self._bias / self._bias_scale)

    def _linear(self, alpha: Floats, labels: NDArray[np.int8]) -> NDArray[np.float64]:
        """(K,) all terms of the dual but |w|^2, of some rows."""
        terms = alpha.astype(np.float64)
        if self._squared:
            terms -= terms**2 / (4 * self._bounds(labels))
        total: NDArray[np.float64] = terms.sum(axis=0)
        return total

    def _dual(self) -> NDArray[np.float64]:
        """(K,) the dual objective: a lower bound of every primal one."""
        self._join()
        hot = np.flatnonzero(self._hot)  # all other variables are 0
        dual: NDArray[np.float64] = self._linear(self._alpha[hot], self._labels[hot]) + self._kept_linear
        return dual - self._half_norms(self._bias_scale * self._balance)
