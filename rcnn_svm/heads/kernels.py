"""Kernels of support vector machines: Gaussian, polynomial, histogram intersection, or any function.

A kernel is called with (R, D) and (S, D) rows and returns their (R, S) float32 matrix. One that does more may
say so: `against(support)` prepares the support vectors once for all rows to come, `fitted(rows)` settles what
depends on the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.config import Count, NotNegative, Positive, check
from rcnn_svm.errors import ConfigError, ShapeError

__all__ = [
    "KERNELS",
    "RBF",
    "Gamma",
    "HistogramIntersection",
    "Kernel",
    "Polynomial",
    "fitted",
    "gram",
    "kernel_name",
    "prepared",
    "rbf_kernel",
    "settings",
    "shown",
    "squared_distances",
]

Kernel: TypeAlias = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]]
"""(R, D) and (S, D) rows -> (R, S) float32; positive semidefinite where R and S are the same."""

Gamma: TypeAlias = Positive | Literal["scale"]
"""A number above 0, or `scale` for 1 / (D * variance of the rows), as in scikit-learn."""

_SLAB = 1024


@dataclass(frozen=True)
class RBF:
    """The Gaussian kernel `exp(-gamma |x - v|^2)`.

    Attributes:
        gamma: for rows of length 1 about 1.
    """

    name: ClassVar[str] = "rbf"
    gamma: Gamma = "scale"

    def __post_init__(self) -> None:
        check(self, where="RBF")

    def fitted(self, rows: NDArray[np.float32]) -> RBF:
        """Return the kernel with `scale` settled on (n, D) rows."""
        return RBF(_settled(self.gamma, rows))

    def against(self, support: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """Return a function from (R, D) rows to the (R, S) kernel of them and the support vectors."""
        gamma = np.float32(_number(self.gamma))
        # Distances are taken from the common centre: |x|^2 + |v|^2 - 2 x.v cancels far less there.
        centre = support.mean(axis=0) if len(support) else np.zeros(support.shape[1], np.float32)
        centred = support - centre
        vectors, norms = centred.T, np.einsum("sd,sd->s", centred, centred)

        def kernel(rows: NDArray[np.float32]) -> NDArray[np.float32]:
            x = rows - centre
            values = x @ vectors
            values *= 2
            values -= np.einsum("rd,rd->r", x, x)[:, None]
            values -= norms
            np.minimum(values, 0, out=values)
            values *= gamma
            return np.asarray(np.exp(values, out=values), np.float32)

        return kernel

    def __call__(self, rows: NDArray[np.float32], support: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (R, S) kernel of (R, D) rows and (S, D) support vectors."""
        return self.against(support)(rows)


@dataclass(frozen=True)
class Polynomial:
    """The polynomial kernel `(gamma x.v + coef0)^degree`.

    Attributes:
        degree: of the polynomial.
        gamma: factor of the inner product.
        coef0: what is added to it; 0 leaves the terms of the highest degree alone.
    """

    name: ClassVar[str] = "polynomial"
    degree: Count = 2
    gamma: Gamma = 1.0
    coef0: NotNegative = 1.0

    def __post_init__(self) -> None:
        check(self, where="Polynomial")

    def fitted(self, rows: NDArray[np.float32]) -> Polynomial:
        """Return the kernel with `scale` settled on (n, D) rows."""
        return dataclasses.replace(self, gamma=_settled(self.gamma, rows))

    def __call__(self, rows: NDArray[np.float32], support: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (R, S) kernel of (R, D) rows and (S, D) support vectors."""
        values = rows @ support.T
        values *= np.float32(_number(self.gamma))
        values += np.float32(self.coef0)
        return np.asarray(np.power(values, self.degree, out=values), np.float32)


@dataclass(frozen=True)
class HistogramIntersection:
    """The histogram intersection kernel, the sum of `min(x_d, v_d)`, for features that are not negative.

    References:
        Maji, Berg, Malik, Classification using intersection kernel support vector machines is efficient,
        CVPR 2008.
    """

    name: ClassVar[str] = "histogram-intersection"

    def __call__(self, rows: NDArray[np.float32], support: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (R, S) kernel of (R, D) rows and (S, D) support vectors.

        Raises:
            ConfigError: a value is negative, where this is no kernel.
        """
        if min(rows.min(initial=0), support.min(initial=0)) < 0:
            raise ConfigError(
                "HistogramIntersection: features must not be negative, got some that are. Read them after a "
                "ReLU, or choose another kernel."
            )
        from rcnn_svm.heads.kernel_solver import intersect  # which loads numba

        missing = -len(rows) % 4  # rows that make whole blocks of four
        padded = np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)]) if missing else rows
        values = np.empty((len(padded), len(support)), np.float32)
        intersect(np.ascontiguousarray(padded), np.ascontiguousarray(support), values)
        return values[: len(rows)]


KERNELS: Mapping[str, type[RBF] | type[Polynomial] | type[HistogramIntersection]] = {
    kernel.name: kernel for kernel in (RBF, Polynomial, HistogramIntersection)
}
"""Our kernels, by the names that files know them by."""


def settings(kernel: Kernel) -> dict[str, Any]:
    """Return the settings of one of our kernels by name; none of a kernel that is not ours."""
    ours = KERNELS.get(kernel_name(kernel))
    if ours is None or not isinstance(kernel, ours):
        return {}
    return {field.name: getattr(kernel, field.name) for field in dataclasses.fields(ours)}


def shown(kernel: Kernel) -> dict[str, Any]:
    """Return a kernel for tables: its settings, or its name where it has none."""
    return settings(kernel) or {"kernel": kernel_name(kernel)}


def fitted(kernel: Kernel, rows: NDArray[np.float32]) -> Kernel:
    """Return a kernel with what it leaves to the data settled on (n, D) rows."""
    settle: Callable[[NDArray[np.float32]], Kernel] | None = getattr(kernel, "fitted", None)
    return kernel if settle is None else settle(rows)


def kernel_name(kernel: Kernel) -> str:
    """Return what a file calls a kernel: its `name`, else that of the function or class."""
    return str(getattr(kernel, "name", None) or getattr(kernel, "__name__", type(kernel).__name__))


def prepared(
    kernel: Kernel, support: NDArray[np.float32]
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return a function from (R, D) rows to their (R, S) kernel with these support vectors.

    Raises:
        ShapeError: by that function, where the kernel returns another shape.
    """
    if isinstance(kernel, RBF):
        return kernel.against(support)

    def values(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        found = np.asarray(kernel(rows, support), np.float32)
        if found.shape != (len(rows), len(support)):
            raise ShapeError(
                f"kernel {kernel_name(kernel)}: must return shape {(len(rows), len(support))}, got "
                f"{found.shape}."
            )
        return found

    return values


def gram(kernel: Kernel, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (n, n) float32 kernel of (n, D) rows with themselves, exactly symmetric.

    Raises:
        ShapeError: the kernel returns another shape.
        ConfigError: it returns NaN or infinity, or a diagonal below zero.
    """
    if isinstance(kernel, RBF):
        distances = squared_distances(rows)
        return rbf_kernel(distances, _number(kernel.gamma), out=distances)
    against, values = prepared(kernel, rows), np.empty((len(rows), len(rows)), np.float32)
    for start in range(0, len(rows), _SLAB):
        values[start : start + _SLAB] = against(rows[start : start + _SLAB])
    if not np.isfinite(values).all() or (values.diagonal() < 0).any():
        raise ConfigError(
            f"kernel {kernel_name(kernel)}: must be finite and positive semidefinite, got "
            f"{'a value below zero on the diagonal' if np.isfinite(values).all() else 'NaN or infinity'}."
        )
    for start in range(0, len(rows), _SLAB):
        slab = values[start : start + _SLAB, start:]
        mirrored = (slab + values[start:, start : start + _SLAB].T) / 2
        values[start : start + _SLAB, start:] = mirrored
        values[start:, start : start + _SLAB] = mirrored.T
    return values


def squared_distances(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (n, n) float32 squared distances of (n, D) rows, exactly symmetric, zero diagonal."""
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    norms = np.einsum("nd,nd->n", centred, centred)
    n = len(rows)
    distances = np.empty((n, n), np.float32)
    for start in range(0, n, _SLAB):
        stop = min(start + _SLAB, n)
        # The lower triangle suffices: half the product, and the mirror makes it symmetric.
        slab = distances[start:stop, :stop]
        np.matmul(centred[start:stop], centred[:stop].T, out=slab)
        slab *= -2
        slab += norms[start:stop, None]
        slab += norms[:stop]
        np.maximum(slab, 0, out=slab)
        square = slab[:, start:]
        square += square.T.copy()
        square *= 0.5
        distances[:start, start:stop] = slab[:, :start].T
    np.fill_diagonal(distances, 0)
    return distances


def rbf_kernel(
    distances: NDArray[np.float32], gamma: float, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return `exp(-gamma * distances)`; with `out=distances` in place."""
    kernel = np.multiply(distances, np.float32(-gamma), out=out)
    return np.exp(kernel, out=kernel)


def _settled(gamma: float | Literal["scale"], rows: NDArray[np.float32]) -> float:
    if gamma != "scale":
        return gamma
    variance = float(rows.var(dtype=np.float64))
    return 1 / (rows.shape[1] * variance) if variance > 0 else 1.0


def _number(gamma: float | Literal["scale"]) -> float:
    if gamma == "scale":
        raise ConfigError(
            "kernel: gamma 'scale' depends on the rows that a machine is trained on. Fit it first."
        )
    return gamma
