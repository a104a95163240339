"""Per-class linear SVMs on region features: R-CNN's head."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.assign import SVM_RULE, LabelRule
from rcnn_svm.heads.base import Fitted, HeadBase, RegionBlocks, require_positive
from rcnn_svm.heads.mining import (
    BlocksSource,
    FixedPointMining,
    MiningLog,
    PaperMining,
    TrainOne,
    mine_as_in_the_paper,
)
from rcnn_svm.heads.scorers import LinearScorer
from rcnn_svm.heads.solver import BlockSolver, MatrixSource, Solution

__all__ = ["PATH_TOL", "LinearSVMHead"]

PATH_TOL = 1e-2
"""Relative duality gap of each C of a path: enough to rank them by average precision."""


class LinearSVMHead(HeadBase):
    """One linear SVM per class, negatives mined from all regions.

    Attributes:
        coef_: (K, D) float32.
        intercept_: (K,) float32.
        gap_: (K,) float64 certified relative duality gaps over *all* regions; NaN where the schedule
            or the solver proves nothing.
        objective_: (K,) float64 objectives over all regions; NaN as above.
        mining_: a `MiningLog`.

    Args:
        C: cost of a negative, one number or one per class. The paper's is 1e-3, for features of
            mean norm 20.
        loss: `hinge` as in the paper, or its square.
        positive_weight: a positive costs this times C.
        bias_scale: value of the constant feature that carries the bias.
        rule: which regions are positives and negatives.
        mining: `FixedPointMining()` or `PaperMining()`; None takes the first where the solver can
            prove it (`block`), else the second.
        solver: `block`, ours for all classes at once, or `liblinear`, scikit-learn's LinearSVC
            class by class.
        tol: of `block`, largest relative duality gap; of `liblinear`, its own tolerance.
        n_jobs: processes that share the classes of `PaperMining`; our own schedule trains them together.
        random_state: seed of the solver.

    References:
        Girshick et al., arXiv 1311.2524v5, sections 2.3 and appendix B; rbgirshick/rcnn, rcnn_train.m.
    """

    def __init__(
        self,
        *,
        C: float | Sequence[float] = 1e-3,
        loss: Literal["hinge", "squared_hinge"] = "hinge",
        positive_weight: float = 2.0,
        bias_scale: float = 10.0,
        rule: LabelRule = SVM_RULE,
        mining: FixedPointMining | PaperMining | None = None,
        solver: Literal["block", "liblinear"] = "block",
        tol: float = 1e-3,
        n_jobs: int = 1,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.loss = loss
        self.positive_weight = positive_weight
        self.bias_scale = bias_scale
        self.rule = rule
        self.mining = mining
        self.solver = solver
        self.tol = tol
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(self, blocks: RegionBlocks) -> Self:
        """Train every class.

        Raises:
            ConfigError: a parameter out of range, or a schedule that the solver cannot run.
            DataError: no image, a class without a positive or a negative, or features that are not
                finite (named with their image).
        """
        costs = self._check(blocks)
        source = BlocksSource(blocks, self.rule)
        if self.is_paper:
            self._fit_as_in_the_paper(source, costs)
        else:
            self._take(self._block_solver(source).solve(costs))
        return self

    @property
    def about(self) -> dict[str, Any]:
        """An SVM without a kernel, which is to say a linear one."""
        return {"family": "svm", "kernel": "linear"}

    @property
    def details_(self) -> dict[str, Any]:
        """Passes over the features."""
        return {"mining_passes": self.mining_.passes}

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train with each of several settings, in order; several costs alone go along a path.

        A path is coarser (`fit_path`): good enough to rank costs by average precision.
        """
        if len(settings) < 2 or any(set(s) != {"C"} for s in settings) or self.is_paper:
            yield from super().fit_grid(blocks, settings)
            return
        scorers = self.fit_path(blocks, [setting["C"] for setting in settings])
        for setting, scorer in zip(settings, scorers, strict=True):
            yield Fitted(setting, scorer, self.details_)

    @property
    def is_paper(self) -> bool:
        """Whether hard negatives are mined by R-CNN's schedule."""
        return isinstance(self._schedule(), PaperMining)

    def fit_path(
        self, blocks: RegionBlocks, Cs: Sequence[float], *, tol: float = PATH_TOL
    ) -> list[LinearScorer]:
        """Train at every C of a path, each from the one before; far cheaper than as many fits.

        The head itself is left at the last C of the sequence, which should rise.

        Args:
            blocks: the training regions.
            Cs: costs, the same for every class.
            tol: relative duality gap of each; coarser than that of `fit`, because a path is for
                choosing a C.

        Returns:
            One scorer per C, in order.

        Raises:
            ConfigError: as `fit`; also where the schedule or solver is not ours.
            DataError: as `fit`.
        """
        self._check(blocks)
        for C in Cs:
            require_positive("LinearSVMHead", {"C": C})
        require_positive("LinearSVMHead", {"tol": tol})
        if len(Cs) == 0 or self.is_paper:
            raise ConfigError(
                "LinearSVMHead: a path of C needs at least one value, solver='block' and FixedPointMining. "
                "Fit one head per C instead."
            )
        solver = self._block_solver(BlocksSource(blocks, self.rule))
        path = []
        for C in Cs:
            self._take(solver.solve(np.full(len(blocks.classes), C), tol=tol))
            path.append(LinearScorer(self.coef_, self.intercept_))
        return path

    def _schedule(self) -> FixedPointMining | PaperMining:
        if self.mining is not None:
            return self.mining
        return FixedPointMining() if self.solver == "block" else PaperMining()

    def _check(self, blocks: RegionBlocks) -> NDArray[np.float64]:
        """Check the parameters; return (K,) costs."""
        where = type(self).__name__
        require_positive(
            where, {"positive_weight": self.positive_weight, "bias_scale": self.bias_scale, "tol": self.tol}
        )
        for name, value, allowed in (
            ("loss", self.loss, ("hinge", "squared_hinge")),
            ("solver", self.solver, ("block", "liblinear")),
        ):
            if value not in allowed:
                raise ConfigError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}.")
        if self.solver == "liblinear" and isinstance(self._schedule(), FixedPointMining):
            raise ConfigError(
                f"{where}: FixedPointMining needs solver='block', got 'liblinear'. "
                f"Use PaperMining(), or the block solver."
            )
        self._start(blocks)
        costs = np.broadcast_to(np.asarray(self.C, np.float64), len(blocks.classes)).copy()
        for C in costs:
            require_positive(where, {"C": float(C)})
        return costs

    def _block_solver(self, source: BlocksSource) -> BlockSolver:
        schedule = self._schedule()
        assert isinstance(schedule, FixedPointMining)
        return BlockSolver(
            source,
            squared=self.loss == "squared_hinge",
            positive_weight=self.positive_weight,
            bias_scale=self.bias_scale,
            tol=self.tol,
            max_passes=schedule.max_passes,
            max_bytes=schedule.max_bytes,
            seed=self.random_state,
        )

    def _take(self, solution: Solution) -> None:
        if not solution.converged:
            worst = int(solution.gap.argmax())
            warnings.warn(
                f"LinearSVMHead: the relative duality gap of class {self.classes_[worst]!r} is "
                f"{solution.gap[worst]:.1e} after {solution.passes:.1f} passes. "
                f"Raise max_passes, or lower C.",
                stacklevel=3,
            )
        self._set(solution.coef, solution.intercept)
        self.gap_, self.objective_ = solution.gap, solution.primal
        n_cached = np.full(len(self.classes_), solution.n_working)
        self.mining_ = MiningLog(solution.passes, float(solution.epochs), n_cached)

    def _set(self, coef: NDArray[np.float32], intercept: NDArray[np.float32]) -> None:
        self.coef_, self.intercept_ = coef, intercept
        self._scorer = LinearScorer(coef, intercept)

    def _fit_as_in_the_paper(self, source: BlocksSource, costs: NDArray[np.float64]) -> None:
        schedule = self._schedule()
        assert isinstance(schedule, PaperMining)
        train = self._train_liblinear(costs) if self.solver == "liblinear" else self._train_block(costs)
        coef, intercept, self.mining_ = mine_as_in_the_paper(source, schedule, train, n_jobs=self.n_jobs)
        self._set(coef, intercept)
        self.gap_ = np.full(len(costs), np.nan)
        self.objective_ = np.full(len(costs), np.nan)

    def _train_block(self, costs: NDArray[np.float64]) -> TrainOne:
        def train(k: int, x: NDArray[np.float32], y: NDArray[np.int8]) -> tuple[NDArray[np.float32], float]:
            solver = BlockSolver(
                MatrixSource(x, y[:, None]),
                squared=self.loss == "squared_hinge",
                positive_weight=self.positive_weight,
                bias_scale=self.bias_scale,
                tol=self.tol,
                seed=self.random_state,
            )
            solution = solver.solve(costs[k : k + 1])
            return solution.coef[0], float(solution.intercept[0])

        return train

    def _train_liblinear(self, costs: NDArray[np.float64]) -> TrainOne:
        def train(k: int, x: NDArray[np.float32], y: NDArray[np.int8]) -> tuple[NDArray[np.float32], float]:
            from sklearn.svm import LinearSVC

            model = LinearSVC(
                C=costs[k],
                loss=self.loss,
                dual=True,
                tol=self.tol,
                intercept_scaling=self.bias_scale,
                class_weight={1: self.positive_weight, -1: 1.0},
                random_state=self.random_state,
                max_iter=100_000,
            ).fit(x, y)
            return model.coef_[0].astype(np.float32), float(model.intercept_[0])

        return train

    coef_: NDArray[np.float32]
    intercept_: NDArray[np.float32]
    gap_: NDArray[np.float64]
    objective_: NDArray[np.float64]
    mining_: MiningLog
