"""Which rows are optimised, and the dual variables of all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.heads.solver import kernels
from rcnn_svm.heads.solver.rows import Floats, RowSource
from rcnn_svm.heads.solver.tuning import Tuning
from rcnn_svm.heads.solver.weights import Costs

__all__ = ["Block", "FromStore", "InMemory", "WorkingSet"]


Take = Callable[[NDArray[np.int64]], Floats]
"""(m,) rows of a part -> their (m, D) features."""


class InMemory:
    """Rows of a matrix in memory are pointed at, never copied."""

    rows_read = 0

    def __init__(self, source: RowSource, matrix: Floats) -> None:
        self.matrix = matrix
        self._first = np.array([source.first_row(part) for part in range(len(source))], np.int64)

    def put(self, start: int, part: int, rows: NDArray[np.int64], features: Take | None) -> None:
        """Do nothing: the rows are there."""

    def compact(self, rows: NDArray[np.int64], step: int) -> None:
        """Do nothing: the rows stay."""

    def index(self, part: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the matrix the rows of a working set lie."""
        index: NDArray[np.int64] = self._first[part] + row
        return index


class FromStore:
    """Rows of a store are copied to the front of a matrix, in the order of the working set."""

    def __init__(self, source: RowSource, max_rows: int, dtype: np.dtype) -> None:
        self.matrix: Floats = np.empty((max_rows, source.n_features), dtype)
        self.rows_read = 0  # of those whose features nobody had at hand
        self._source = source

    def put(self, start: int, part: int, rows: NDArray[np.int64], features: Take | None) -> None:
        """Copy some rows of a part to `start` and on; they are read where nobody has them at hand."""
        if features is None:
            self.rows_read += len(rows)
            self.matrix[start : start + len(rows)] = self._source.features(part, rows)
        else:
            self.matrix[start : start + len(rows)] = features(rows)

    def compact(self, rows: NDArray[np.int64], step: int) -> None:
        """Leave these rows only: in place, in steps, each moves to the front, none past one still to move."""
        for start in range(0, len(rows), step):
            moving = rows[start : start + step]
            self.matrix[start : start + len(moving)] = self.matrix[moving]

    def index(self, part: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in the matrix the rows of a working set lie."""
        return np.arange(len(part))


class Rows(NamedTuple):
    """What is known of n rows."""

    part: NDArray[np.int64]  # of the source
    row: NDArray[np.int64]  # of the part
    labels: NDArray[np.int8]  # (n, K)
    sample_weight: Floats
    alpha: Floats  # (n, K) dual variables
    nearest: Floats  # smallest y * margin over the classes when last seen
    hot: NDArray[np.bool_]  # a variable is above zero or in want of it, as far as the last survey knows

    def take(self, rows: NDArray[np.int64]) -> Rows:
        return Rows._make(values[rows] for values in self)


class Block(NamedTuple):
    """Hot rows that are visited together."""

    rows: NDArray[np.int64]  # (m,) of the working set
    gram: Floats  # (m, m) products of the rows with each other, the bias included
    labels: NDArray[np.int8]  # (K, m)
    sample_weight: Floats
    alpha: Floats  # (K, m)
    nearest: Floats


class WorkingSet:
    """The rows that are optimised, bounded in number, and the dual variables of those that had to go.

    Attributes:
        rows: the rows in it, each row of the source at most once.
        size: their number, with those that were admitted and join at the next `join`, `evict` or `linear`.
        index: (n,) where they lie in the storage's matrix.
        kept: (m,) rising rows and (m, K) variables by part, of rows evicted with a variable above zero.
        kept_linear: (K,) their terms of the dual, see `Costs.linear`.
    """

    def __init__(
        self, source: RowSource, storage: InMemory | FromStore, costs: Costs, max_rows: int, tuning: Tuning
    ) -> None:
        self._source, self.storage, self.costs, self.tuning = source, storage, costs, tuning
        self.max_rows = max_rows
        self.size = 0
        self.index = np.zeros(0, np.int64)
        none, self._dtype = np.zeros(0, np.int64), costs.table.dtype
        self.rows = self._rows(none, none, np.zeros((0, source.n_classes), np.int8), np.zeros(0))
        self.kept: dict[int, tuple[NDArray[np.int64], Floats]] = {}
        self.kept_linear = np.zeros(source.n_classes)
        self._arrived: list[Rows] = []
        self._groups: list[tuple[NDArray[np.int64], Floats]] = []  # of hot rows, with their Gram matrices

    def _rows(
        self, part: NDArray[np.int64], row: NDArray[np.int64], labels: NDArray[np.int8], weight: Floats
    ) -> Rows:
        n, dtype = len(row), self._dtype
        alpha, nearest = np.zeros(labels.shape, dtype), np.zeros(n, dtype)
        return Rows(part, row, labels, weight.astype(dtype), alpha, nearest, np.ones(n, bool))

    def admit(
        self, part: int, rows: NDArray[np.int64], labels: NDArray[np.int8], features: Take | None = None
    ) -> None:
        """Let rows of a part in, for which there is room, with the variables they had.

        Args:
            part: of the source.
            rows: (m,) rising rows of the part, none of them in yet.
            labels: (R, K) of the whole part.
            features: returns those of rows of the part, where they are at hand.
        """
        self.storage.put(self.size, part, rows, features)
        self.size += len(rows)
        weight = self._source.sample_weight(part)
        new = self._rows(np.full(len(rows), part), rows, labels[rows], weight[rows])
        if part in self.kept:
            kept, kept_alpha = self.kept.pop(part)
            back = np.isin(kept, rows)
            places = np.searchsorted(rows, kept[back])
            new.alpha[places] = kept_alpha[back]
            self.kept_linear -= self._linear_of(new.take(places))
            if not back.all():
                self.kept[part] = kept[~back], kept_alpha[~back]
        self._arrived.append(new)

    def join(self) -> None:
        """Enter the rows that arrived since the last time."""
        if self._arrived:
            self.rows = Rows._make(map(np.concatenate, zip(self.rows, *self._arrived, strict=True)))
            self.index = self.storage.index(self.rows.part, self.rows.row)
            self._arrived = []

    def evict(self, limit: int) -> None:
        """Drop idle rows if they are many, and then those of largest margin until `limit` are left."""
        self.join()
        nearest, positive = self.rows.nearest, (self.rows.alpha != 0).any(axis=1)
        keep = positive | (nearest <= self.tuning.evict_margin)
        if np.count_nonzero(keep) > limit:
            rows = np.flatnonzero(keep)
            keep[rows[np.argsort(nearest[rows], kind="stable")[limit:]]] = False
        if len(keep) <= limit and np.count_nonzero(~keep) <= self.tuning.idle_share * len(keep):
            return
        self._keep_variables(self.rows.take(np.flatnonzero(~keep & positive)))
        rows = np.flatnonzero(keep)
        self.storage.compact(rows, self.tuning.block_rows)
        self.rows = self.rows.take(rows)
        self.index = self.storage.index(self.rows.part, self.rows.row)
        self._groups, self.size = [], len(rows)

    def _keep_variables(self, lost: Rows) -> None:
        """Remember the variables of rows that go."""
        self.kept_linear += self._linear_of(lost)
        for part in np.unique(lost.part).tolist():
            rows, alpha = lost.row[lost.part == part], lost.alpha[lost.part == part]
            if part in self.kept:
                rows = np.concatenate([self.kept[part][0], rows])
                alpha = np.concatenate([self.kept[part][1], alpha])
            order = np.argsort(rows)
            self.kept[part] = rows[order], alpha[order]

    def blocks(self, bias_gram: float) -> list[Block]:
        """Return all hot rows in blocks. A block stays, with its Gram matrix, while half of it is hot."""
        own, matrix, m = self.rows, self.storage.matrix, self.tuning.block_rows
        groups = [(rows, gram) for rows, gram in self._groups if 2 * np.count_nonzero(own.hot[rows]) >= m]
        lonely = own.hot.copy()
        for rows, _ in groups:
            lonely[rows] = False
            own.hot[rows] = True
        rest = np.flatnonzero(lonely)
        for start in range(0, len(rest), m):
            rows = rest[start : start + m]
            gram = np.empty((len(rows), len(rows)), self._dtype)
            kernels.products(matrix, self.index[rows], self.features(rows), gram)
            gram += bias_gram
            groups.append((rows, gram))
        self._groups = groups
        blocks = []
        for rows, gram in groups:
            labels, alpha = np.ascontiguousarray(own.labels[rows].T), np.ascontiguousarray(own.alpha[rows].T)
            blocks.append(Block(rows, gram, labels, own.sample_weight[rows], alpha, own.nearest[rows]))
        return blocks

    def known(self, part: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows of a part that are in, and those that are kept."""
        kept, _ = self.kept.get(part, (np.zeros(0, np.int64), None))
        return self.rows.row[self.rows.part == part], kept

    def meet(self, part: int, violates: NDArray[np.bool_]) -> None:
        """Take out of the (R,) violators of a part those that are in already, and make them hot."""
        members = np.flatnonzero(self.rows.part == part)
        row = self.rows.row[members]
        self.rows.hot[members] = violates[row] | (self.rows.alpha[members] != 0).any(axis=1)
        violates[row] = False

    def unsettled(
        self, part: int, margins: Floats, labels: NDArray[np.int8], tol: float
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the kept rows of a part, and whether a variable of each could move the dual upwards.

        Args:
            part: of the source.
            margins: (m, K) of the kept rows.
            labels: (R, K) of the whole part.
            tol: violations of this much are none.
        """
        rows, alpha = self.kept[part]
        y = labels[rows]
        slope = y * margins - 1
        bounds = self.costs.bounds(y, self._source.sample_weight(part)[rows])
        if self.costs.squared:
            slope += alpha / (2 * bounds)
        free_down = alpha > 0
        free_up = np.ones_like(free_down) if self.costs.squared else alpha < bounds
        moves = np.where(slope > 0, free_down, free_up) & (np.abs(slope) > tol) & (y != 0)
        return rows, moves.any(axis=1)

    def linear(self) -> NDArray[np.float64]:
        """Return (K,) all terms of the dual but |w|^2, of all rows."""
        self.join()
        return self._linear_of(self.rows.take(np.flatnonzero(self.rows.hot))) + self.kept_linear

    def rescale(self, ratio: NDArray[np.float64], norm: NDArray[np.float64]) -> Floats:
        """Scale all variables, class by class, to the best multiple under costs that changed by `ratio`.

        Any multiple up to the ratio of the costs is feasible, and the dual of a multiple is a
        parabola: its top is a start at no cost.

        Args:
            ratio: (K,) of the costs, which are the new ones already.
            norm: (K,) 1/2 |w|^2 of the dual.

        Returns:
            (K,) the factors, for the weights.
        """
        alpha = self.rows.alpha
        total = alpha.sum(axis=0, dtype=np.float64)
        curved = total - self._linear_of(self.rows)  # sum of a^2 / (4 C), 0 for the hinge
        kept_total = np.zeros(len(ratio))
        for _, kept in self.kept.values():
            kept_total += kept.sum(axis=0, dtype=np.float64)
        kept_curved = (kept_total - self.kept_linear) / ratio
        steep = 2 * (curved + kept_curved + norm)
        best = np.divide(total + kept_total, steep, out=np.ones_like(steep), where=steep > 0)
        # One unit in the last place less: rounding must not leave a variable above its bound.
        scale: Floats = np.minimum(best, ratio * (1 - np.finfo(self._dtype).eps)).astype(self._dtype)
        alpha *= scale
        for _, kept in self.kept.values():
            kept *= scale
        self.kept_linear = scale * kept_total - scale.astype(np.float64) ** 2 * kept_curved
        if not self.costs.squared:
            np.minimum(alpha, self.costs.bounds(self.rows.labels, self.rows.sample_weight), out=alpha)
        return scale

    def features(self, rows: NDArray[np.int64]) -> Floats:
        """Return a copy of the (m, D) features of some rows of the working set."""
        features: Floats = self.storage.matrix[self.index[rows]]
        return features

    def _linear_of(self, rows: Rows) -> NDArray[np.float64]:
        return self.costs.linear(rows.alpha, rows.labels, rows.sample_weight)
