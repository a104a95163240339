"""Per-class SVMs with a Gaussian kernel, exact on mined regions or approximate on all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Self

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.assign import SVM_RULE, LabelRule, RegionTruth
from rcnn_svm.heads.base import ALL, HeadBase, RegionBlocks, Rows, read_features, require_positive
from rcnn_svm.heads.kernel_solver import rbf_kernel, solve_pairs, squared_distances
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource
from rcnn_svm.heads.scorers import RBFScorer
from rcnn_svm.progress import track

__all__ = ["NystroemSVMHead", "RBFSVMHead", "gather_rows", "hardest_regions"]

_MAX_STEPS = 10_000_000

Keys = NDArray[np.int64]
"""int64 (n, 2): image and row of each of n regions, in that order."""


def hardest_regions(source: BlocksSource, score: Callable[..., NDArray[np.float32]], max_rows: int) -> Keys:
    """Choose what a kernel SVM can afford: all positives, and the negatives that score highest.

    Every class gets the same number of negatives of its own, as many as fit; classes share rows.

    Args:
        source: labelled regions.
        score: (R, D) features to (R, K) scores.
        max_rows: bound of the union.

    Raises:
        ConfigError: the positives alone exceed `max_rows`.
    """
    n_classes = source.n_classes
    positives: list[Keys] = []
    best: list[tuple[NDArray[np.float32], Keys]] = [
        (np.zeros(0, np.float32), np.zeros((0, 2), np.int64)) for _ in range(n_classes)
    ]
    for i in track(range(len(source)), "hard negatives"):
        labels = source.labels(i)
        rows = np.flatnonzero((labels > 0).any(axis=1))
        positives.append(np.stack([np.full(len(rows), i), rows], axis=1))
        scores = score(source.features(i))
        for k in range(n_classes):
            rows = np.flatnonzero(labels[:, k] < 0)
            if len(best[k][0]) >= max_rows:
                rows = rows[scores[rows, k] > best[k][0].min()]
            if len(rows) == 0:
                continue
            values = np.concatenate([best[k][0], scores[rows, k]])
            keys = np.concatenate([best[k][1], np.stack([np.full(len(rows), i), rows], axis=1)])
            if len(values) > max_rows:
                order = np.argsort(-values, kind="stable")[:max_rows]
                values, keys = values[order], keys[order]
            best[k] = values, keys
    chosen = np.concatenate(positives)
    if len(chosen) > max_rows:
        raise ConfigError(
            f"RBF SVM: max_rows must hold the {len(chosen)} positive regions, got {max_rows}. Raise it "
            f"(a kernel takes 4 * max_rows**2 bytes), or use NystroemSVMHead."
        )
    ranked = [keys[np.argsort(-values, kind="stable")] for values, keys in best]

    def union(quota: int) -> Keys:
        return np.unique(np.concatenate([chosen, *(keys[:quota] for keys in ranked)]), axis=0)

    low, high = 0, max_rows  # the largest quota whose union fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(union(middle)) <= max_rows else (low, middle - 1)
    return union(low)


class _KernelHead(HeadBase):
    """What the exact and the approximate head share: the regions that a linear SVM finds hardest."""

    C: float
    gamma: float | Literal["scale"]
    positive_weight: float
    rule: LabelRule
    miner: LinearSVMHead | None

    def _hard_rows(
        self, source: BlocksSource, blocks: RegionBlocks, max_rows: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
        """Return features (n, D) and labels (n, K) of the hardest regions."""
        miner = self.miner
        if miner is None:
            miner = LinearSVMHead(C=0.1, loss="squared_hinge", rule=self.rule, tol=1e-2).fit(blocks)
        keys = hardest_regions(source, miner.decision_function, max_rows)
        return gather_rows(source, keys)

    def _gamma(self, features: NDArray[np.float32], gamma: float | Literal["scale"]) -> float:
        if gamma != "scale":
            return float(gamma)
        variance = float(features.var(dtype=np.float64))
        return 1 / (features.shape[1] * variance) if variance > 0 else 1.0

    def _check_kernel(self, gammas: Sequence[float | Literal["scale"]], Cs: Sequence[float]) -> None:
        where = type(self).__name__
        for C in Cs:
            require_positive(where, {"C": C})
        for gamma in gammas:
            if gamma != "scale":
                require_positive(where, {"gamma": gamma})
        require_positive(where, {"positive_weight": self.positive_weight})


def gather_rows(source: BlocksSource, keys: Keys) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Return (n, D) features and (n, K) labels of chosen regions, reading each image once."""
    features = np.empty((len(keys), source.n_features), np.float32)
    labels = np.empty((len(keys), source.n_classes), np.int8)
    for i in np.unique(keys[:, 0]).tolist():
        own = np.flatnonzero(keys[:, 0] == i)
        features[own] = source.features(i, keys[own, 1])
        labels[own] = source.labels(i)[keys[own, 1]]
    return features, labels


class RBFSVMHead(_KernelHead):
    """One SVM per class with the kernel `exp(-gamma |x - v|^2)`, exact on mined regions.

    A linear SVM over all regions finds the hardest ones; the kernel over these is computed once
    for all classes and every value of C.

    Attributes:
        gamma_: the kernel's gamma.
        n_support_: (K,) support vectors of each class.
        n_rows_: regions trained on.

    Args:
        C: cost of a negative.
        gamma: of the kernel; `scale` is 1 / (D * variance of the mined features).
        positive_weight: a positive costs this times C.
        rule: which regions are positives and negatives.
        max_rows: bound of the mined regions; the kernel takes 4 * max_rows**2 bytes.
        miner: a fitted linear head that tells hard regions; None fits one.
        solver: `smo`, ours on the shared kernel, or `libsvm`, scikit-learn's SVC class by class.
        tol: largest violation of the optimality conditions, in units of the margin.
        n_jobs: threads that share the classes.

    References:
        Uijlings et al., IJCV 2013, section 5.2 (kernel SVMs on regions, hard negatives mined).
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        gamma: float | Literal["scale"] = "scale",
        positive_weight: float = 2.0,
        rule: LabelRule = SVM_RULE,
        max_rows: int = 12_000,
        miner: LinearSVMHead | None = None,
        solver: Literal["smo", "libsvm"] = "smo",
        tol: float = 1e-3,
        n_jobs: int = 1,
    ) -> None:
        self.C = C
        self.gamma = gamma
        self.positive_weight = positive_weight
        self.rule = rule
        self.max_rows = max_rows
        self.miner = miner
        self.solver = solver
        self.tol = tol
        self.n_jobs = n_jobs

    def fit(self, blocks: RegionBlocks) -> Self:
        """Mine, then train every class.

        Raises:
            ConfigError: a parameter out of range, or more positives than `max_rows`.
            DataError: no image, a class without a positive or a negative, or features that are not
                finite (named with their image).
        """
        self.fit_grid(blocks, [self.C], [self.gamma])
        return self

    def fit_grid(
        self, blocks: RegionBlocks, Cs: Sequence[float], gammas: Sequence[float | Literal["scale"]]
    ) -> list[tuple[float, float, RBFScorer]]:
        """Train at every C and gamma: mined once, distances once, one kernel per gamma.

        Along rising C each solution starts from the one before. The head is left at the last.

        Returns:
            (C, gamma, scorer), all values of C for the first gamma, then for the next.

        Raises:
            ConfigError: as `fit`.
            DataError: as `fit`.
        """
        self._check_kernel(gammas, Cs)
        require_positive("RBFSVMHead", {"tol": self.tol, "max_rows": self.max_rows})
        if self.solver not in ("smo", "libsvm"):
            raise ConfigError(f"RBFSVMHead: solver must be one of smo, libsvm, got {self.solver!r}.")
        self._start(blocks)
        features, labels = self._hard_rows(BlocksSource(blocks, self.rule), blocks, self.max_rows)
        self.n_rows_ = len(features)
        distances = squared_distances(features) if self.solver == "smo" else None
        grid = []
        for g, gamma in enumerate(gammas):
            self.gamma_ = self._gamma(features, gamma)
            kernel = None
            if distances is not None:
                # The last gamma may use up the distances.
                is_last = g + 1 == len(gammas)
                kernel = rbf_kernel(distances, self.gamma_, out=distances if is_last else None)
            alpha = np.zeros(labels.T.shape)  # (K, n)
            previous = None
            for C in Cs:
                if previous is not None:
                    alpha *= C / previous
                intercept = self._train(kernel, features, labels, alpha, C)
                self._take(features, labels, alpha, intercept)
                grid.append((C, self.gamma_, self._scorer))
                previous = C
        return grid

    def _train(
        self,
        kernel: NDArray[np.float32] | None,
        features: NDArray[np.float32],
        labels: NDArray[np.int8],
        alpha: NDArray[np.float64],
        C: float,
    ) -> NDArray[np.float64]:
        """Train every class at C, changing alpha (K, n) in place; return (K,) intercepts."""

        def train(k: int) -> tuple[NDArray[np.float64], float, float]:
            rows = np.flatnonzero(labels[:, k])
            y = labels[rows, k]
            bounds = np.where(y > 0, C * self.positive_weight, C)
            own = np.minimum(alpha[k, rows], bounds)
            if kernel is not None:
                bias, violation, _ = solve_pairs(kernel, rows, y, bounds, own, self.tol, _MAX_STEPS)
                return own, bias, violation
            from sklearn.svm import SVC

            model = SVC(
                C=C, gamma=self.gamma_, class_weight={1: self.positive_weight, -1: 1.0}, tol=self.tol
            ).fit(features[rows], y)
            own[:] = 0
            own[model.support_] = np.abs(model.dual_coef_[0])
            return own, float(model.intercept_[0]), 0.0

        intercept = np.zeros(len(alpha))
        solved = Parallel(n_jobs=self.n_jobs, prefer="threads")(delayed(train)(k) for k in range(len(alpha)))
        for k, (own, bias, violation) in enumerate(solved):
            alpha[k, labels[:, k] != 0] = own
            intercept[k] = bias
            if violation > self.tol:
                warnings.warn(
                    f"RBFSVMHead: class {self.classes_[k]!r} stopped at a violation of {violation:.1e}, "
                    f"above tol={self.tol}. Lower C.",
                    stacklevel=4,
                )
        return intercept

    def _take(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int8],
        alpha: NDArray[np.float64],
        intercept: NDArray[np.float64],
    ) -> None:
        dual = (alpha * labels.T).astype(np.float32)
        support = np.flatnonzero((dual != 0).any(axis=0))
        self.n_support_ = (dual != 0).sum(axis=1)
        self._scorer: RBFScorer = RBFScorer(
            features[support], dual[:, support], intercept.astype(np.float32), self.gamma_
        )

    gamma_: float
    n_support_: NDArray[np.int64]
    n_rows_: int


class NystroemSVMHead(_KernelHead):
    """An approximate Gaussian SVM per class, trained on all regions: for sets no exact one can hold.

    Regions are mapped to `k(x, Z) k(Z, Z)^(-1/2)` for landmarks Z, drawn from the hardest regions,
    and a linear SVM is mined to the fixed point in that space. What comes out is scored as an exact
    machine whose support vectors are the landmarks.

    Attributes:
        gamma_: the kernel's gamma.
        linear_: the fitted `LinearSVMHead` in the space of the landmarks.

    Args:
        C: cost of a negative.
        gamma: of the kernel; `scale` is 1 / (D * variance of the candidate features).
        positive_weight: a positive costs this times C.
        rule: which regions are positives and negatives.
        n_landmarks: size of Z, at most.
        miner: a fitted linear head that tells hard regions; None fits one.
        tol: relative duality gap of the linear SVM.
        random_state: seed of the landmarks and the solver.

    References:
        Williams and Seeger, Using the Nystroem method to speed up kernel machines, NIPS 2000.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        gamma: float | Literal["scale"] = "scale",
        positive_weight: float = 2.0,
        rule: LabelRule = SVM_RULE,
        n_landmarks: int = 1000,
        miner: LinearSVMHead | None = None,
        tol: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.gamma = gamma
        self.positive_weight = positive_weight
        self.rule = rule
        self.n_landmarks = n_landmarks
        self.miner = miner
        self.tol = tol
        self.random_state = random_state

    def fit(self, blocks: RegionBlocks) -> Self:
        """Choose landmarks, then train every class on all regions.

        Raises:
            ConfigError: a parameter out of range.
            DataError: no image, a class without a positive or a negative, or features that are not
                finite (named with their image).
        """
        self._check_kernel([self.gamma], [self.C])
        require_positive("NystroemSVMHead", {"n_landmarks": self.n_landmarks})
        self._start(blocks)
        source = BlocksSource(blocks, self.rule)
        n_positives = sum(int((source.labels(i) > 0).any(axis=1).sum()) for i in range(len(source)))
        candidates, _ = self._hard_rows(source, blocks, n_positives + 10 * self.n_landmarks)
        rng = np.random.default_rng(self.random_state)
        drawn = rng.permutation(len(candidates))[: self.n_landmarks]
        landmarks = candidates[np.sort(drawn)]
        self.gamma_ = self._gamma(candidates, self.gamma)
        kernel = rbf_kernel(squared_distances(landmarks), self.gamma_).astype(np.float64)
        values, vectors = np.linalg.eigh(kernel)
        keep = values > values[-1] * 1e-6  # below it float32 kernels hold noise only
        whiten = vectors[:, keep] / np.sqrt(values[keep])  # (Z, d)
        mapped = RBFScorer(landmarks, whiten.T, np.zeros(int(keep.sum()), np.float32), self.gamma_)
        self.linear_ = LinearSVMHead(
            C=self.C,
            loss="hinge",
            positive_weight=self.positive_weight,
            bias_scale=1.0,
            rule=self.rule,
            tol=self.tol,
            random_state=self.random_state,
        ).fit(_Mapped(blocks, mapped))
        dual = self.linear_.coef_ @ whiten.T.astype(np.float32)
        self._scorer = RBFScorer(landmarks, dual, self.linear_.intercept_, self.gamma_)
        return self

    gamma_: float
    linear_: LinearSVMHead


class _Mapped:
    """Region blocks seen through a map of their features."""

    def __init__(self, blocks: RegionBlocks, scorer: RBFScorer) -> None:
        self._blocks = blocks
        self._scorer = scorer
        self.classes = blocks.classes
        self.n_features = len(scorer.intercept)

    def __len__(self) -> int:
        return len(self._blocks)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[np.float32]:
        return self._scorer.decision_function(read_features(self._blocks, i, rows))

    def truth(self, i: int) -> RegionTruth:
        return self._blocks.truth(i)
