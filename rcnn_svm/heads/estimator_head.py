"""Any classifier of the scikit-learn kind as a head: it is fitted on rows and labels, background included."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np

from rcnn_svm.errors import ConfigError, DataError
from rcnn_svm.heads.assign import FINETUNE_RULE, LabelRule
from rcnn_svm.heads.base import HeadBase, RegionBlocks, Scorer, read_features
from rcnn_svm.heads.scorers import EstimatorScorer, LinearScorer

__all__ = ["EstimatorHead"]


class EstimatorHead(HeadBase):
    """An estimator with `fit(X, y)` and `decision_function(X)`, fitted on positives and a draw of background.

    Labels are 0 .. K-1 for the classes and K for the background. The estimator's scores are (R, K + 1),
    background last, or (R, K), or (R,) of the background for one class, as scikit-learn has it.

    Attributes:
        estimator_: the fitted copy.
        n_rows_: regions trained on.

    Args:
        name: what a saved detector calls it.
        estimator: left alone; a deep copy is fitted.
        rule: positives, background and ignored regions.
        max_rows: regions that are held in memory: all positives, background as far as it fits.
        random_state: seed of the draw.
    """

    def __init__(
        self,
        *,
        name: str,
        estimator: Any,
        rule: LabelRule = FINETUNE_RULE,
        max_rows: int = 50_000,
        random_state: int = 0,
    ) -> None:
        self.name = name
        self.estimator = estimator
        self.rule = rule
        self.max_rows = max_rows
        self.random_state = random_state

    def fit(self, blocks: RegionBlocks) -> Self:
        """Draw, then fit a copy of the estimator.

        Raises:
            ConfigError: the estimator lacks a method, or the positives alone exceed `max_rows`.
            DataError: no image, or a class or the background without a region.
        """
        for method in ("fit", "decision_function"):
            if not callable(getattr(self.estimator, method, None)):
                raise ConfigError(
                    f"EstimatorHead {self.name!r}: the estimator needs a method {method}, got "
                    f"{type(self.estimator).__name__} without."
                )
        self._start(blocks)
        n_classes = len(self.classes_)
        labels = [self.rule.multiclass(blocks.truth(i)) for i in range(len(blocks))]
        joined = np.concatenate(labels)
        counts = np.bincount(joined[joined >= 0], minlength=n_classes + 1)
        if (counts == 0).any():
            names = ", ".join(np.array([*self.classes_, "background"])[counts == 0])
            raise DataError(f"EstimatorHead {self.name!r}: every class needs a region, got none for {names}.")
        room = self.max_rows - int(counts[:-1].sum())
        if room < 1:
            raise ConfigError(
                f"EstimatorHead {self.name!r}: max_rows must hold the {counts[:-1].sum()} positive regions, "
                f"and background, got {self.max_rows}."
            )
        share = room / counts[-1]
        rng = np.random.default_rng(self.random_state)
        rows, wanted = [], []
        for i, own in enumerate(labels):
            drawn = (own == n_classes) & (rng.random(len(own)) < share)
            taken = np.flatnonzero(drawn | ((own >= 0) & (own < n_classes)))
            rows.append(read_features(blocks, i, taken))
            wanted.append(own[taken])
        features, answers = np.concatenate(rows), np.concatenate(wanted)
        self.n_rows_ = len(features)
        self.estimator_ = copy.deepcopy(self.estimator)
        self.estimator_.fit(features, answers)
        self._scorer = self._plain() or EstimatorScorer(self.name, self.estimator_, n_classes)
        return self

    def _plain(self) -> Scorer | None:
        """Return a linear classifier as arrays, which any detector can read back."""
        coef, intercept = (
            np.asarray(getattr(self.estimator_, name, 0.0)) for name in ("coef_", "intercept_")
        )
        n = len(self.classes_) + 1
        if coef.shape != (n, self.n_features_in_) or intercept.shape != (n,):
            return None
        probe = np.eye(3, self.n_features_in_, dtype=np.float32)
        linear = LinearScorer(coef[:-1] - coef[-1], intercept[:-1] - intercept[-1])
        theirs = EstimatorScorer(self.name, self.estimator_, n - 1).decision_function(probe)
        # A model with coefficients need not be linear in its features: only one that scores so is taken.
        return linear if np.allclose(linear.decision_function(probe), theirs, atol=1e-4) else None

    @property
    def details_(self) -> dict[str, Any]:
        """The regions trained on."""
        return {"n_rows": self.n_rows_}

    estimator_: Any
    n_rows_: int
