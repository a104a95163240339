"""Ascent of the dual over a working set: epochs over its blocks, surveys of it, classes solved alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.heads.solver import kernels
from rcnn_svm.heads.solver.rows import Floats
from rcnn_svm.heads.solver.weights import Weights, relative_gap
from rcnn_svm.heads.solver.working_set import Block, WorkingSet

__all__ = ["Ascent"]

# Keeps a relative gap finite where the dual is still 0.
_TINY = 1e-30


class Ascent:
    """Optimises a working set.

    One matrix product per block gives the margins of all classes; then each class ascends its dual
    exactly, variable by variable, inside the block, where the block's Gram matrix replaces any further
    look at the features but to add a change to the weights.

    Attributes:
        epochs: so far.
        trusting: whether the gap seen during an epoch may count.
        polish_every: epochs between surveys at which each class is solved alone.
    """

    def __init__(self, working: WorkingSet, weights: Weights, rng: np.random.Generator) -> None:
        self._working, self._weights, self._rng = working, weights, rng
        self._costs, self._tuning = working.costs, working.tuning
        self.epochs = 0
        self.trusting = self._tuning.trusts_epochs
        self.polish_every = self._tuning.polish_every
        self._lag: float | None = None  # see `_hold_bias`

    def optimise(self, goal: float) -> None:
        """Ascend over the working set until its relative gap, or the estimate of it, is at most `goal`.

        An epoch visits the hot rows alone. Every so often a survey of the whole working set gives its true
        gap and tells anew which rows are hot.
        """
        working, tuning = self._working, self._tuning
        working.join()
        bias_gram, lean = self._hold_bias()
        blocks = working.blocks(bias_gram)
        since = 0  # epochs since the last survey
        for _ in range(tuning.max_epochs):
            seen = self._epoch(blocks, bias_gram, lean)
            since += 1
            if self.trusting and seen <= tuning.trusted * goal:
                break
            overdue = since >= self.polish_every
            if not overdue and (self.trusting or seen > tuning.check_from * goal):
                continue
            # Rows that are not hot can only add to the gap: the hot ones are asked first where that is cheap,
            # but not for ever, since others may have become hot.
            hot = np.flatnonzero(working.rows.hot)
            share = len(hot) / working.size
            cheap = share < 0.5 and since * share < tuning.survey_every
            if cheap and self._survey(hot)[1] > tuning.final_goal * goal:
                continue
            margins, gap, working.rows.hot[:] = self._survey(np.arange(working.size))
            if gap <= goal:
                break
            if overdue:
                self._polish(margins, goal)
            since = 0
            blocks = working.blocks(bias_gram)

    def _epoch(self, blocks: list[Block], bias_gram: float, lean: float) -> float:
        """Visit every block once; return the relative gap as it was seen on the way."""
        working, weights, dtype = self._working, self._weights, self._weights.w.dtype
        matrix, costs = working.storage.matrix, self._costs
        self.epochs += 1
        loss = np.zeros(len(weights.w))
        order = self._rng.permutation(self._tuning.block_rows)
        held = lean * weights.bias
        for b in self._rng.permutation(len(blocks)):
            block = blocks[b]
            index = working.index[block.rows]
            margins = np.empty((len(weights.w), len(index)), dtype)
            kernels.products(matrix, index, weights.w, margins)
            weights.bias = bias_gram * weights.balance + held
            margins += weights.bias.astype(dtype)[:, None]
            weights.moved |= kernels.ascend(
                margins, block.gram, block.labels, block.sample_weight, block.alpha,
                order[order < len(index)], costs.table, costs.squared, matrix, index, weights.w,
                weights.balance, block.nearest, loss,
            )  # fmt: skip
        weights.bias = bias_gram * weights.balance + held
        for block in blocks:
            working.rows.alpha[block.rows] = block.alpha.T
            working.rows.nearest[block.rows] = block.nearest
        # Evicted rows with a part in the weights are missing from `loss`: then only the true gap counts.
        if working.kept:
            return np.inf
        return float(relative_gap(weights.primal_norm() + loss, working.linear() - weights.dual_norm()).max())

    def _survey(self, rows: NDArray[np.int64]) -> tuple[Floats, float, NDArray[np.bool_]]:
        """Return (n, K) margins of rows of the working set, the relative gap over them, and which are hot."""
        working, weights, own = self._working, self._weights, self._working.rows
        margins = weights.margins(working.storage.matrix, working.index[rows])
        # |w|^2 + bias * balance is the sum of alpha y margin over all rows: but for what the two biases
        # differ by, the gap is a sum over rows, here of these.
        gap = 0.5 * (weights.bias / weights.bias_scale - weights.bias_scale * weights.balance) ** 2
        nearest, hot = np.empty(len(rows), margins.dtype), np.empty(len(rows), bool)
        kernels.survey(
            margins, own.labels[rows], own.sample_weight[rows], own.alpha[rows], self._costs.table,
            self._costs.squared, gap, nearest, hot,
        )  # fmt: skip
        own.nearest[rows] = nearest
        dual = working.linear() - weights.dual_norm()
        return margins, float((np.maximum(gap, 0) / np.maximum(dual, _TINY)).max()), hot

    def _polish(self, margins: Floats, goal: float) -> None:
        """Solve each class on the rows near or inside its margin, with their whole Gram matrix.

        What slows the blocks down, an error that all rows share, costs no feature products here. Where the
        Gram matrices would cost more than epochs do, rows near the margin are left out, or nothing is done.
        """
        own, weights, tuning = self._working.rows, self._weights, self._tuning
        margins += (weights.dual_bias - weights.bias).astype(margins.dtype)
        signed = own.labels * margins
        bounds = self._costs.bounds(own.labels, own.sample_weight)
        for limit in (tuning.polish_margin, 1.0):
            near = (own.alpha != 0) | ((own.labels != 0) & (signed < limit))
            sizes = near.sum(axis=0).astype(np.float64)
            if (sizes**2).sum() <= tuning.polish_work * near.size and sizes.max() <= tuning.polish_rows:
                break
        else:
            return
        for k in range(len(weights.w)):
            rows = np.flatnonzero(near[:, k])
            if len(rows) == 0:
                continue
            x = self._working.features(rows)
            alpha = own.alpha[rows, k]
            before, labels = alpha.copy(), own.labels[rows, k]
            kernels.solve_alone(
                margins[rows, k], x @ x.T, float(weights.bias_scale) ** 2, labels, alpha,
                bounds[rows, k], self._costs.squared, tuning.polish_tol * goal,
                tuning.polish_steps * len(rows),
            )  # fmt: skip
            step = (alpha - before) * labels
            weights.w[k] += step @ x
            weights.balance[k] += step.sum(dtype=np.float64)
            weights.moved |= bool(step.any())
            own.alpha[rows, k] = alpha
            own.hot[rows] |= alpha > 0
        weights.bias = weights.dual_bias

    def _hold_bias(self) -> tuple[float, float]:
        """Return the curvature that steps feel through the bias, and how far the last bias is held.

        A constant feature that is large beside the others ties all rows together: a single step of
        one variable is undone by the next. Proximal steps cut the tie: for an epoch the bias minimises
        its own terms plus `(bias - last)^2 / (2 lag)`, which makes it
        `bias_gram * balance + lean * last`. What stays fixed is the same: bias_scale^2 * balance.
        """
        tuning = self._tuning
        if self._lag is None:
            x = self._working.features(np.arange(min(self._working.size, 512)))
            self._lag = tuning.lag * float(np.einsum("nd,nd->", x, x, dtype=np.float64)) / max(1, len(x))
        square = self._weights.bias_scale**2
        if square <= tuning.tied * self._lag or self._lag == 0:
            return square, 0.0
        bias_gram = self._lag * square / (self._lag + square)
        return bias_gram, bias_gram / self._lag
