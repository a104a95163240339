"""Scale feature rows before an SVM sees them; fitted on training regions only. Needs numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError, NotFittedError

__all__ = ["FeatureBlocks", "FeatureScaler", "Scaling"]

Scaling = Literal["none", "l2", "sqrt-l2", "mean-norm-20"]

_TARGET_NORM = 20.0
"""R-CNN's own range of C assumes features of this mean norm (rbgirshick/rcnn, rcnn_scale_features.m)."""
_N_IMAGES, _N_ROWS = 200, 200
"""How many random images and rows of each the mean norm is taken over (rcnn_feature_stats.m)."""
_SEED = 3


class FeatureBlocks(Protocol):
    """Features image by image."""

    def __len__(self) -> int:
        """Return the number of images."""

    def features(self, i: int) -> NDArray[Any]:
        """Return (R, D) float features of image i."""


class FeatureScaler:
    """One scaling of feature rows.

    Args:
        scaling: `none`; `l2`: rows of length 1; `sqrt-l2`: signed square root, then length 1;
            `mean-norm-20`: one factor for all, so that training rows have mean length 20, as in R-CNN.
        n_columns: scale only so many of the first columns of a row; the others stay as they are. None scales
            all.

    Raises:
        ConfigError: an unknown scaling.

    Example:
        >>> FeatureScaler("l2")(np.array([[3.0, 4.0]], np.float32))
        array([[0.6, 0.8]], dtype=float32)
    """

    n_columns: int | None = None

    def __init__(self, scaling: Scaling = "l2", n_columns: int | None = None) -> None:
        if scaling not in get_args(Scaling):
            raise ConfigError(
                f"FeatureScaler: scaling must be one of {', '.join(get_args(Scaling))}, got {scaling!r}."
            )
        self.scaling: Scaling = scaling
        if n_columns is not None:  # a scaler of whole rows travels with each call to a cluster: no byte more
            self.n_columns = n_columns
        self.factor_: float | None = None

    def fit(self, blocks: FeatureBlocks) -> Self:
        """Measure what `mean-norm-20` needs; the other scalings learn nothing.

        Raises:
            ConfigError: there is no region, or all features are zero.
        """
        if self.scaling != "mean-norm-20":
            return self
        rng = np.random.default_rng(_SEED)
        norms = []
        for i in np.sort(rng.permutation(len(blocks))[:_N_IMAGES]):
            rows = blocks.features(int(i))
            picked = np.sort(rng.permutation(len(rows))[:_N_ROWS])
            norms.append(np.linalg.norm(rows[picked].astype(np.float64), axis=1))
        mean = float(np.concatenate(norms).mean()) if any(map(len, norms)) else 0.0
        if mean <= 0:
            raise ConfigError("FeatureScaler: the training regions must have features other than zero.")
        self.factor_ = _TARGET_NORM / mean
        return self

    def __call__(
        self, features: NDArray[Any], *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return scaled rows, float32 (R, D); a row of zeros stays as it is.

        Args:
            features: (R, D).
            out: where to put them, which may be `features` itself; None for a new array.

        Raises:
            NotFittedError: `mean-norm-20` was not fitted.
        """
        rows = np.asarray(features, np.float32)
        if self.scaling == "none":
            return rows
        if self.n_columns is not None:
            whole = rows.copy() if out is None else out
            whole[:, self.n_columns :] = rows[:, self.n_columns :]
            self._scaled(rows[:, : self.n_columns], whole[:, : self.n_columns])
            return whole
        return self._scaled(rows, out)

    def _scaled(self, rows: NDArray[np.float32], out: NDArray[np.float32] | None) -> NDArray[np.float32]:
        if self.scaling == "mean-norm-20":
            if self.factor_ is None:
                raise NotFittedError("FeatureScaler: call fit before scaling to a mean norm of 20.")
            scaled: NDArray[np.float32] = np.multiply(rows, np.float32(self.factor_), out=out)
            return scaled
        if self.scaling == "sqrt-l2":
            rows = np.copysign(np.sqrt(np.abs(rows)), rows)
        norms = np.sqrt(np.einsum("rd,rd->r", rows, rows))[:, None]
        norms[norms == 0] = 1
        unit: NDArray[np.float32] = np.divide(rows, norms, out=out)
        return unit

    def to_dict(self) -> dict[str, Any]:
        """Return the scaling of whole rows and what it learned, as plain data."""
        return {"scaling": self.scaling, "factor": self.factor_}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore a scaler from `to_dict`.

        Raises:
            ConfigError: an unknown scaling, or a factor that is no positive number where one is needed.
        """
        scaler = cls(values["scaling"])
        factor = values["factor"]
        known = type(factor) in (int, float) and 0 < factor < float("inf")
        if not known and (factor is not None or scaler.scaling == "mean-norm-20"):
            raise ConfigError(f"FeatureScaler: factor must be a positive number, got {factor!r}.")
        scaler.factor_ = factor
        return scaler
