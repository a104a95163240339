"""Where the rows come from: parts with labels and weights, in memory or read from a store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.engine import THREADS, Engine

__all__ = ["Floats", "MatrixSource", "Part", "RowSource"]

Floats = NDArray[Any]
"""float32 or float64: the precision of the solver."""


class Part(NamedTuple):
    """One part of a source, on its own, which can be sent to an engine.

    Attributes:
        labels, sample_weight: as of the source.
        read: returns its (R, D) features.
    """

    labels: NDArray[np.int8]
    sample_weight: NDArray[np.floating]
    read: Callable[[], Floats]


class RowSource(Protocol):
    """All labelled rows, in parts (an image, a slab of a matrix) that fit into memory.

    Attributes:
        n_features: D.
        n_classes: K.
        matrix: (n, D) where all parts are consecutive slabs of one array in memory, else None.
        engine: passes over the parts.
    """

    n_features: int
    n_classes: int
    matrix: Floats | None

    @property
    def engine(self) -> Engine:
        """What passes over the parts."""

    def __len__(self) -> int:
        """Return the number of parts."""

    def first_row(self, part: int) -> int:
        """Return the number of rows in all parts before `part`; `len(self)` gives the total."""

    def labels(self, part: int) -> NDArray[np.int8]:
        """Return (R, K) int8 labels +1, -1 or 0 = ignored."""

    def sample_weight(self, part: int) -> NDArray[np.floating]:
        """Return (R,) weights > 0: what a row costs in every class, in units of the class's own cost."""

    def features(self, part: int, rows: NDArray[np.int64] | None = None) -> Floats:
        """Return (R, D) features of the part, or of some of its rows."""

    def part(self, part: int) -> Part:
        """Return a part on its own."""


class MatrixSource:
    """Rows of one matrix in memory: nothing is copied.

    Args:
        matrix: (n, D) float32 or float64, C-ordered.
        labels: (n, K) int8.
        sample_weight: (n,) > 0, see `RowSource.sample_weight`; None is 1 for all.
    """

    _STEP = 2048
    engine: ClassVar[Engine] = THREADS

    def __init__(
        self, matrix: Floats, labels: NDArray[np.int8], sample_weight: NDArray[np.floating] | None = None
    ) -> None:
        self.matrix: Floats | None = matrix
        self._rows = matrix
        self._labels = labels
        given = np.ones(len(matrix)) if sample_weight is None else sample_weight
        self._sample_weight = np.ascontiguousarray(given, matrix.dtype)
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

    def sample_weight(self, part: int) -> NDArray[np.floating]:
        """Return (R,) weights of the part."""
        return self._sample_weight[part * self._STEP : (part + 1) * self._STEP]

    def features(self, part: int, rows: NDArray[np.int64] | None = None) -> Floats:
        """Return (R, D) features of the part, or of some of its rows."""
        slab = self._rows[part * self._STEP : (part + 1) * self._STEP]
        return slab if rows is None else slab[rows]

    def part(self, part: int) -> Part:
        """Return a part on its own."""
        return Part(self.labels(part), self.sample_weight(part), partial(self.features, part))
