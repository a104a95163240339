"""Solve over all rows: a working set is optimised, passes over all rows correct and certify it."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from rcnn_svm.heads.solver import kernels
from rcnn_svm.heads.solver.ascent import Ascent
from rcnn_svm.heads.solver.rows import Floats, Part, RowSource
from rcnn_svm.heads.solver.tuning import FROM_STORE, IN_MEMORY, Tuning
from rcnn_svm.heads.solver.weights import Costs, Weights, relative_gap
from rcnn_svm.heads.solver.working_set import FromStore, InMemory, Take, WorkingSet

__all__ = ["BlockSolver", "Solution"]

_log = logging.getLogger(__name__)


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


class BlockSolver:
    """Train K SVMs over all rows of a source, to a certified duality gap.

    A working set of rows is optimised by block dual coordinate ascent; a pass over all rows at
    fixed weights then gives the exact objective and the rows that violate their optimality
    conditions, which join the working set. Rows outside it keep their dual variables (mostly
    zero), so the working set may be bounded and the result is still the optimum over all rows.
    Calling `solve` again with other costs starts from the last solution. BLAS runs on one thread in
    here, so that results do not depend on how many the machine has.

    Args:
        source: all rows.
        squared: squared hinge instead of hinge.
        positive_weight: the cost of a positive is this times C; one number or (K,).
        bias_scale: value of the constant feature, > 0.
        tol: largest relative duality gap of a class.
        max_passes: passes over all rows before giving up on `tol`.
        max_bytes: bound of the working set's copy of its rows and of their Gram matrices.
        seed: of the order of coordinates and of the first working set.
        dtype: of the features.
        tuning: None takes `IN_MEMORY` or `FROM_STORE`, as the rows lie.

    References:
        Hsieh et al., A dual coordinate descent method for large-scale linear SVM, ICML 2008;
        Felzenszwalb et al., PAMI 2010, section 4.4 (hard negatives to the fixed point).
    """

    def __init__(
        self,
        source: RowSource,
        *,
        squared: bool,
        positive_weight: float | NDArray[np.floating],
        bias_scale: float,
        tol: float = 1e-3,
        max_passes: int = 50,
        max_bytes: int = 1 << 30,
        seed: int = 0,
        dtype: Any = np.float32,
        tuning: Tuning | None = None,
    ) -> None:
        matrix = source.matrix
        self._tuning = tuning or (FROM_STORE if matrix is None else IN_MEMORY)
        self._source = source
        self._positive_weight = positive_weight
        self._tol = tol
        self._max_passes = max_passes
        self._rng = np.random.default_rng(seed)
        self._n_rows = source.first_row(len(source))
        self._rows_scanned = 0
        self._reach = 16  # parts that are looked at ahead, at most
        dtype, m, n_classes = np.dtype(dtype), self._tuning.block_rows, source.n_classes
        copied = source.n_features if matrix is None else 0
        max_rows = max(2 * m, max_bytes // ((m + copied) * dtype.itemsize + n_classes * (dtype.itemsize + 1)))
        storage = (
            FromStore(source, min(max_rows, self._n_rows), dtype)
            if matrix is None
            else InMemory(source, matrix)
        )
        self._costs = Costs(np.zeros((n_classes, 2), dtype), squared)
        self._weights = Weights(n_classes, source.n_features, bias_scale, dtype)
        self._working = WorkingSet(source, storage, self._costs, max_rows, self._tuning)
        self._ascent = Ascent(self._working, self._weights, self._rng)

    def solve(self, costs: NDArray[np.floating], *, tol: float | None = None) -> Solution:
        """Return the solution for (K,) costs C, starting from the one before, if any.

        Args:
            costs: (K,) > 0.
            tol: relative duality gap to reach this time; None takes the solver's own.
        """
        tol = self._tol if tol is None else tol
        with threadpool_limits(limits=1, user_api="blas"):
            self._set_costs(np.asarray(costs, np.float64))
            if self._working.size == 0 and not self._working.kept:
                self._seed()
            goal = self._first_goal(tol)
            for n_passes in range(1, self._max_passes + 1):
                self._ascent.optimise(goal)
                size = self._working.size
                primal, exact = self._scan(goal)
                worst = float(relative_gap(primal, self._dual()).max()) if exact else np.inf
                _log.info(
                    "%.2f passes: relative duality gap %.2e, %d rows in the working set, %d epochs",
                    self._passes(), worst, self._working.size, self._ascent.epochs,
                )  # fmt: skip
                if worst <= tol or n_passes == self._max_passes:
                    break
                if exact and worst > 10 * goal and self._working.size <= 1.01 * size:
                    self._ascent.trusting = False
                share, final = self._tuning.goal_share, self._tuning.final_goal
                goal = max(min(share * worst, goal / 2), final * tol) if share else final * tol
        return Solution(
            coef=self._weights.w.copy(),
            intercept=self._weights.bias.astype(self._weights.w.dtype),
            primal=primal,
            dual=self._dual(),
            passes=self._passes(),
            epochs=self._ascent.epochs,
            n_working=self._working.size,
            converged=worst <= tol,
        )

    def _passes(self) -> float:
        return (self._rows_scanned + self._working.storage.rows_read) / max(1, self._n_rows)

    def _dual(self) -> NDArray[np.float64]:
        """(K,) the dual objective: a lower bound of every primal one."""
        return self._working.linear() - self._weights.dual_norm()

    def _set_costs(self, costs: NDArray[np.float64]) -> None:
        """Change the costs, and scale the last solution, if any, to what is best under the new ones."""
        old = self._costs.table[:, 0].astype(np.float64)
        table = np.stack([costs, costs * self._positive_weight], axis=1)
        self._costs.table = table.astype(self._costs.table.dtype)
        if old.any():
            self._weights.scale(self._working.rescale(costs / old, self._weights.dual_norm()))

    def _first_goal(self, tol: float) -> float:
        """Return the gap to start with: a warm start has most of its working set already."""
        tuning = self._tuning
        if not self._ascent.epochs:
            return tuning.first_goal
        self._ascent.polish_every = tuning.polish_every if self._costs.squared else tuning.polish_every_warm
        return tol * (tuning.warm_goal if self._costs.squared else tuning.final_goal)

    def _seed(self) -> None:
        """Start from all positives and as many other rows, drawn from all parts alike."""
        labels = [self._source.labels(p) for p in range(len(self._source))]
        positives = [np.flatnonzero((part > 0).any(axis=1)) for part in labels]
        n_others = max(self._tuning.seed_rows, sum(map(len, positives)))
        share = min(1.0, n_others / max(1, self._n_rows))
        for p, (part, rows) in enumerate(zip(labels, positives, strict=True)):
            drawn = self._rng.random(len(part)) < share
            drawn &= (part != 0).any(axis=1)
            drawn[rows] = True
            self._admit(p, np.flatnonzero(drawn), part)

    def _admit(
        self, part: int, rows: NDArray[np.int64], labels: NDArray[np.int8], features: Take | None = None
    ) -> bool:
        """Admit rows to the working set in portions; return whether room had to be made where it was full."""
        working, made_room = self._working, False
        room = working.max_rows // 2
        for portion in np.split(rows, range(room, len(rows), room)) if len(rows) else ():
            if working.size + len(portion) > working.max_rows:
                self._ascent.optimise(self._tuning.first_goal)
                working.evict(working.max_rows - room)
                made_room = True
            working.admit(part, portion, labels, features)
        return made_room

    def _scan(self, goal: float) -> tuple[NDArray[np.float64], bool]:
        """Pass over all rows: sum up the primal objective, let violators join the working set.

        The source's engine looks at its parts, at weights that stand still. Where so many rows joined that
        the weights are to move first, what was looked at ahead is looked at anew: the less lies ahead, the
        more often that happens.

        Returns the (K,) objectives, and whether the weights stood still meanwhile, so that they hold.
        """
        working, weights, source = self._working, self._weights, self._source
        working.evict(working.max_rows)
        weights.moved = False
        loss, size, part = np.zeros(len(weights.w)), working.size, 0
        look = partial(_look, weights, self._costs)
        while part < len(source):
            until, stale = min(part + self._reach, len(source)), False
            ahead = ((source.part(p), *working.known(p)) for p in range(part, until))
            with contextlib.closing(source.engine.in_order(look, ahead, 1)) as seen:
                for one in seen:
                    loss += one.loss
                    stale = self._take(part, one)
                    part += 1
                    if working.size > size + max(size, self._tuning.growth_rows):
                        self._ascent.optimise(goal)
                        working.evict(working.max_rows)
                        size, stale = working.size, True
                    if stale:
                        break
            self._reach = max(1, self._reach // 2) if stale else 2 * self._reach
        return weights.primal_norm() + loss, not weights.moved

    def _take(self, part: int, seen: _Seen) -> bool:
        """Admit what was seen in a part; return whether weights or working set changed otherwise."""
        working, labels = self._working, self._source.labels(part)
        self._rows_scanned += len(labels)
        violates = seen.violates.copy()
        if part in working.kept:
            kept, unsettled = working.unsettled(part, seen.kept_margins, labels, self._tol)
            violates[kept] = unsettled
        working.meet(part, violates)
        return self._admit(part, np.flatnonzero(violates), labels, seen.features_of)


class _Seen:
    """What one look at a part at still weights tells.

    Where it is sent, it takes along the features of those rows alone that may join.

    Attributes:
        loss: (K,) sum over its rows.
        violates: (R,) which are inside the margin of a class.
        kept_margins: (m, K) of the kept rows.
    """

    def __init__(
        self,
        loss: NDArray[np.float64],
        violates: NDArray[np.bool_],
        kept_margins: Floats,
        features: Floats,
        may_join: NDArray[np.bool_],
    ) -> None:
        self.loss, self.violates, self.kept_margins = loss, violates, kept_margins
        self._features, self._may_join = features, may_join
        self._rows: NDArray[np.int64] | None = None  # whose features these are; None for all

    def features_of(self, rows: NDArray[np.int64]) -> Floats:
        """Return (m, D) features of some of the rows that may join."""
        chosen: Floats = self._features[rows if self._rows is None else np.searchsorted(self._rows, rows)]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        rows = np.flatnonzero(self._may_join)
        state = {**self.__dict__, "_rows": rows, "_features": self.features_of(rows), "_may_join": None}
        return state | {"violates": np.packbits(self.violates), "_n": len(self.violates)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        n = state.pop("_n")
        self.__dict__.update(state, violates=np.unpackbits(state["violates"], count=n).astype(bool))


def _look(weights: Weights, costs: Costs, asked: tuple[Part, NDArray[np.int64], NDArray[np.int64]]) -> _Seen:
    """Look at a part, of which some rows are in the working set and others kept out of it."""
    part, members, kept = asked
    features = part.read()
    margins = weights.margins(features, np.arange(len(features)))
    loss, violates = np.zeros(len(weights.w)), np.empty(len(features), bool)
    kernels.inspect(margins, part.labels, part.sample_weight, costs.table, costs.squared, loss, violates)
    may_join = violates.copy()
    may_join[kept] = True
    may_join[members] = False
    return _Seen(loss, violates, margins[kept], features, may_join)
