"""Per-class SVMs with a kernel, exact on mined regions or approximate on all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.heads.assign import SVM_RULE, LabelRule, RegionTruth
from rcnn_svm.heads.base import ALL, Fitted, HeadBase, RegionBlocks, Rows, read_features, require_positive
from rcnn_svm.heads.kernel_solver import solve_pairs
from rcnn_svm.heads.kernels import (
    RBF,
    Kernel,
    fitted,
    gram,
    kernel_name,
    rbf_kernel,
    squared_distances,
)
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.mining import BlocksSource
from rcnn_svm.heads.scorers import KernelScorer
from rcnn_svm.progress import track

__all__ = ["KernelSVMHead", "NystroemSVMHead", "gather_rows", "hardest_regions"]

_MAX_STEPS = 10_000_000
_GAUSSIAN = RBF()

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
            f"Kernel SVM: max_rows must hold the {len(chosen)} positive regions, got {max_rows}. Raise it "
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
    kernel: Kernel
    positive_weight: float
    rule: LabelRule
    miner: LinearSVMHead | None

    @property
    def about(self) -> dict[str, Any]:
        """An SVM with its kernel."""
        return {"family": "svm", "kernel": kernel_name(self.kernel)}

    def _hard_rows(
        self, source: BlocksSource, blocks: RegionBlocks, max_rows: int
    ) -> tuple[Keys, NDArray[np.float32], NDArray[np.int8]]:
        """Return the hardest regions, their features (n, D) and labels (n, K)."""
        miner = self.miner
        if miner is None:
            miner = LinearSVMHead(C=0.1, loss="squared_hinge", rule=self.rule, tol=1e-2).fit(blocks)
        keys = hardest_regions(source, miner.decision_function, max_rows)
        return keys, *gather_rows(source, keys)

    @property
    def support_(self) -> Keys:
        """(S, 2) int64, image and row of the training region that each support vector is."""
        return self._support

    _support: Keys

    def _check_kernel(self, kernels: Sequence[Kernel], Cs: Sequence[float]) -> None:
        where = type(self).__name__
        for C in Cs:
            require_positive(where, {"C": C})
        for kernel in kernels:
            if not callable(kernel):
                raise ConfigError(f"{where}: kernel must be a function of two matrices, got {kernel!r}.")
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


class KernelSVMHead(_KernelHead):
    """One SVM per class with a kernel, Gaussian unless told otherwise, exact on mined regions.

    A linear SVM over all regions finds the hardest ones; the kernel over these is computed once
    for all classes and every value of C.

    Attributes:
        kernel_: with nothing left to be settled.
        n_support_: (K,) support vectors of each class.
        n_rows_: regions trained on.

    Args:
        C: cost of a negative.
        kernel: one of `heads.kernels`, or a function from (R, D) and (S, D) rows to an (R, S) matrix.
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
        kernel: Kernel = _GAUSSIAN,
        positive_weight: float = 2.0,
        rule: LabelRule = SVM_RULE,
        max_rows: int = 12_000,
        miner: LinearSVMHead | None = None,
        solver: Literal["smo", "libsvm"] = "smo",
        tol: float = 1e-3,
        n_jobs: int = 1,
    ) -> None:
        self.C = C
        self.kernel = kernel
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
            ConfigError: a parameter out of range, a function that is no kernel, or more positives than
                `max_rows`.
            DataError: no image, a class without a positive or a negative, or features that are not
                finite (named with their image).
        """
        for _ in self.fit_grid(blocks, [{}]):
            pass
        return self

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train with values of C and kernel: mined once, distances once, each kernel matrix once in a row.

        Along rising C each solution starts from the one before. The head is left at the last.

        Raises:
            ConfigError: as `fit`; also a setting of another parameter.
            DataError: as `fit`.
        """
        own: dict[str, Any] = {"C": self.C, "kernel": self.kernel}
        grid = [own | dict(setting) for setting in settings]
        if others := sorted({name for setting in grid for name in setting} - {"C", "kernel"}):
            raise ConfigError(f"KernelSVMHead: a grid may name C and kernel, got {', '.join(others)}.")
        self._check_kernel([setting["kernel"] for setting in grid], [setting["C"] for setting in grid])
        require_positive("KernelSVMHead", {"tol": self.tol, "max_rows": self.max_rows})
        if self.solver not in ("smo", "libsvm"):
            raise ConfigError(f"KernelSVMHead: solver must be one of smo, libsvm, got {self.solver!r}.")
        self._start(blocks)
        keys, features, labels = self._hard_rows(BlocksSource(blocks, self.rule), blocks, self.max_rows)
        self.n_rows_ = len(features)
        matrices = _Matrices(features, [fitted(setting["kernel"], features) for setting in grid])
        alpha, before = np.zeros(labels.T.shape), grid[0]  # (K, n)
        for i, setting in enumerate(grid):
            C = setting["C"]
            self.set_params(**setting)
            self.kernel_ = matrices.kernels[i]
            rising = i > 0 and setting["kernel"] is before["kernel"] and before["C"] <= C
            alpha = alpha * (C / before["C"]) if rising else np.zeros(labels.T.shape)
            intercept = self._train(matrices, i, features, labels, alpha, C)
            self._take(keys, features, labels, alpha, intercept)
            before = setting
            yield Fitted(settings[i], self.scorer_, self.details_, self.support_)

    @property
    def details_(self) -> dict[str, Any]:
        """The union of support vectors, and the regions trained on."""
        return {"n_support_vectors": len(self._scorer.support), "mined_regions": self.n_rows_}

    def _train(
        self,
        matrices: _Matrices,
        i: int,
        features: NDArray[np.float32],
        labels: NDArray[np.int8],
        alpha: NDArray[np.float64],
        C: float,
    ) -> NDArray[np.float64]:
        """Train every class at C, changing alpha (K, n) in place; return (K,) intercepts."""
        theirs = self.solver == "libsvm" and isinstance(self.kernel_, RBF)  # which needs no matrix of ours
        kernel = None if theirs else matrices.get(i)

        def train(k: int) -> tuple[NDArray[np.float64], float, float]:
            rows = np.flatnonzero(labels[:, k])
            y = labels[rows, k]
            bounds = np.where(y > 0, C * self.positive_weight, C)
            own = np.minimum(alpha[k, rows], bounds)
            if self.solver == "smo":
                bias, violation, _ = solve_pairs(kernel, rows, y, bounds, own, self.tol, _MAX_STEPS)
                return own, bias, violation
            from sklearn.svm import SVC

            settings = {"C": C, "class_weight": {1: self.positive_weight, -1: 1.0}, "tol": self.tol}
            if kernel is None:
                model = SVC(gamma=self.kernel_.gamma, **settings).fit(features[rows], y)  # type: ignore[attr-defined]
            else:
                model = SVC(kernel="precomputed", **settings).fit(kernel[np.ix_(rows, rows)], y)
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
                    f"KernelSVMHead: class {self.classes_[k]!r} stopped at a violation of {violation:.1e}, "
                    f"above tol={self.tol}. Lower C.",
                    stacklevel=4,
                )
        return intercept

    def _take(
        self,
        keys: Keys,
        features: NDArray[np.float32],
        labels: NDArray[np.int8],
        alpha: NDArray[np.float64],
        intercept: NDArray[np.float64],
    ) -> None:
        dual = (alpha * labels.T).astype(np.float32)
        support = np.flatnonzero((dual != 0).any(axis=0))
        self.n_support_ = (dual != 0).sum(axis=1)
        self._support = keys[support]
        self._scorer: KernelScorer = KernelScorer(
            features[support], dual[:, support], intercept.astype(np.float32), self.kernel_
        )

    kernel_: Kernel
    n_support_: NDArray[np.int64]
    n_rows_: int


class _Matrices:
    """The kernel matrices of a grid, one at a time in memory, and the distances that Gaussian ones share.

    Args:
        rows: (n, D).
        kernels: of each entry of the grid, in the order in which they will be asked for.
    """

    def __init__(self, rows: NDArray[np.float32], kernels: Sequence[Kernel]) -> None:
        self.kernels = kernels
        self._rows = rows
        self._distances: NDArray[np.float32] | None = None
        self._held: tuple[Kernel, NDArray[np.float32]] | None = None

    def get(self, i: int) -> NDArray[np.float32]:
        """Return the (n, n) matrix of entry `i`."""
        kernel = self.kernels[i]
        if self._held is not None and (self._held[0] is kernel or self._held[0] == kernel):
            return self._held[1]
        self._held = None
        if isinstance(kernel, RBF):
            if self._distances is None:
                self._distances = squared_distances(self._rows)
            # The last Gaussian kernel may use the distances up.
            again = any(isinstance(k, RBF) and k != kernel for k in self.kernels[i:])
            assert kernel.gamma != "scale"  # settled
            matrix = rbf_kernel(self._distances, kernel.gamma, out=None if again else self._distances)
            if not again:
                self._distances = None
        else:
            matrix = gram(kernel, self._rows)
        self._held = kernel, matrix
        return matrix


class NystroemSVMHead(_KernelHead):
    """An approximate kernel SVM per class, trained on all regions: for sets no exact one can hold.

    Regions are mapped to `k(x, Z) k(Z, Z)^(-1/2)` for landmarks Z, drawn from the hardest regions,
    and a linear SVM is mined to the fixed point in that space. What comes out is scored as an exact
    machine whose support vectors are the landmarks.

    Attributes:
        kernel_: with nothing left to be settled.
        linear_: the fitted `LinearSVMHead` in the space of the landmarks.

    Args:
        C: cost of a negative.
        kernel: as of `KernelSVMHead`; what it leaves to the data is settled on the candidates.
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
        kernel: Kernel = _GAUSSIAN,
        positive_weight: float = 2.0,
        rule: LabelRule = SVM_RULE,
        n_landmarks: int = 1000,
        miner: LinearSVMHead | None = None,
        tol: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.C = C
        self.kernel = kernel
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
        self._check_kernel([self.kernel], [self.C])
        require_positive("NystroemSVMHead", {"n_landmarks": self.n_landmarks})
        self._start(blocks)
        source = BlocksSource(blocks, self.rule)
        n_positives = sum(int((source.labels(i) > 0).any(axis=1).sum()) for i in range(len(source)))
        keys, candidates, _ = self._hard_rows(source, blocks, n_positives + 10 * self.n_landmarks)
        rng = np.random.default_rng(self.random_state)
        drawn = np.sort(rng.permutation(len(candidates))[: self.n_landmarks])
        landmarks, self._support = candidates[drawn], keys[drawn]
        self.kernel_ = fitted(self.kernel, candidates)
        kernel = gram(self.kernel_, landmarks).astype(np.float64)
        values, vectors = np.linalg.eigh(kernel)
        keep = values > values[-1] * 1e-6  # below it float32 kernels hold noise only
        whiten = vectors[:, keep] / np.sqrt(values[keep])  # (Z, d)
        mapped = KernelScorer(landmarks, whiten.T, np.zeros(int(keep.sum()), np.float32), self.kernel_)
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
        self._scorer = KernelScorer(landmarks, dual, self.linear_.intercept_, self.kernel_)
        return self

    @property
    def details_(self) -> dict[str, Any]:
        """The landmarks, which stand for support vectors."""
        return {"n_support_vectors": len(self._scorer.support)}

    kernel_: Kernel
    _scorer: KernelScorer
    linear_: LinearSVMHead


class _Mapped:
    """Region blocks seen through a map of their features."""

    def __init__(self, blocks: RegionBlocks, scorer: KernelScorer) -> None:
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
