"""What every head is given and what it offers: region blocks, the head protocol, parameters.

Training input arrives image by image, so that no head ever needs the whole matrix. numpy only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.engine import THREADS, Engine
from rcnn_svm.errors import ConfigError, DataError, NotFittedError, ShapeError
from rcnn_svm.heads.assign import RegionTruth

__all__ = [
    "ALL",
    "ArrayBlocks",
    "DrawnBlocks",
    "Fitted",
    "HeadBase",
    "RegionBlocks",
    "Rows",
    "Scorer",
    "SharedBlocks",
    "Trainable",
    "check_features",
    "engine_of",
    "read_features",
    "reading",
    "require_positive",
]


Rows: TypeAlias = NDArray[np.generic] | slice
"""Which rows of a block: indices, a mask or a slice."""
ALL = slice(None)


class RegionBlocks(Protocol):
    """The regions of a training split, one block per image.

    Attributes:
        classes: K class names.
        n_features: D, the length of a row.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        ...

    @property
    def n_features(self) -> int:
        """The length of a feature vector."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def features(self, i: int, rows: Rows = ALL) -> NDArray[np.floating]:
        """Return (R, D) float32 or float16 of image `i`, or of some rows of it; may be a memory map."""
        ...

    def truth(self, i: int) -> RegionTruth:
        """Return the description of the same R_i regions."""
        ...


@runtime_checkable
class SharedBlocks(RegionBlocks, Protocol):
    """Region blocks that can be read by an engine, image by image."""

    @property
    def engine(self) -> Engine:
        """What reads them."""
        ...

    def only(self, i: int) -> RegionBlocks:
        """Return the block of image `i` alone, which can be sent."""
        ...


class Scorer(Protocol):
    """What a trained head is at detection time: arrays and numpy."""

    @property
    def kind(self) -> str:
        """Its name for `scorers.scorer_from_arrays`."""
        ...

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) scores of (R, D) features, larger = surer."""
        ...

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that `from_arrays` of the same class rebuilds the scorer from."""
        ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """A head trained with one setting.

    Attributes:
        settings: what distinguishes it from others of its grid.
        scorer: the trained head.
        details: figures worth reporting, such as support vectors or passes over the features.
        support: (S, 2) int64, image and row of the region that each support vector of `scorer` is; None
            where it has none.
    """

    settings: Mapping[str, Any]
    scorer: Scorer
    details: Mapping[str, Any]
    support: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class ArrayBlocks:
    """Region blocks held in memory.

    Attributes:
        blocks: per image (R_i, D) features.
        truths: per image the description of its regions.
        classes: K class names.
    """

    blocks: tuple[NDArray[np.floating], ...]
    truths: tuple[RegionTruth, ...]
    classes: tuple[str, ...]

    @classmethod
    def from_arrays(
        cls,
        features: Sequence[NDArray[np.floating]],
        truths: Sequence[RegionTruth],
        classes: Sequence[str],
    ) -> Self:
        """Check that the parts fit together and join them.

        Raises:
            ShapeError: no image, or features and regions differ in number.
        """
        if len(features) == 0 or len(features) != len(truths):
            raise ShapeError(
                f"ArrayBlocks: needs as many feature blocks as truths, at least one, got "
                f"{len(features)} and {len(truths)}."
            )
        for i, (block, truth) in enumerate(zip(features, truths, strict=True)):
            if block.ndim != 2 or len(block) != len(truth) or block.shape[1] != features[0].shape[1]:
                raise ShapeError(
                    f"ArrayBlocks: image {i} must have features of shape ({len(truth)}, "
                    f"{features[0].shape[-1]}), got {block.shape}."
                )
        return cls(tuple(features), tuple(truths), tuple(classes))

    @property
    def n_features(self) -> int:
        """D, the length of a feature vector."""
        return int(self.blocks[0].shape[1])

    def __len__(self) -> int:
        return len(self.blocks)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[np.floating]:
        """Return (R, D) features of image `i`, or of some rows of it."""
        return self.blocks[i][rows]

    def truth(self, i: int) -> RegionTruth:
        """Return the description of the regions of image `i`."""
        return self.truths[i]


class DrawnBlocks:
    """Region blocks of which a random draw of each image's background is left: no hard negatives.

    Args:
        blocks: all regions.
        n_background: regions of an image that overlap no object by half, at most; other regions all stay.
        seed: of the draw, which is an image's own.
    """

    def __init__(self, blocks: RegionBlocks, n_background: int, *, seed: int = 0) -> None:
        self._blocks, self._rows = blocks, []
        for i in range(len(blocks)):
            best = blocks.truth(i).best_iou
            others = np.flatnonzero((best < 0.5) & ~blocks.truth(i).is_gt)
            drawn = np.random.default_rng([seed, i]).permutation(others)[:n_background]
            near = np.flatnonzero((best >= 0.5) | blocks.truth(i).is_gt)
            self._rows.append(np.sort(np.concatenate([near, drawn])))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self._blocks.classes

    @property
    def n_features(self) -> int:
        """The length of a feature vector."""
        return self._blocks.n_features

    def __len__(self) -> int:
        return len(self._blocks)

    def features(self, i: int, rows: Rows = ALL) -> NDArray[np.floating]:
        """Return (R, D) features of the drawn regions of image `i`, or of some of them."""
        return self._blocks.features(i, self._rows[i][rows])

    def truth(self, i: int) -> RegionTruth:
        """Return the description of the drawn regions of image `i`."""
        return self._blocks.truth(i).rows(self._rows[i])

    def among_all(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n, 2) images and rows of drawn regions as images and rows among all regions."""
        rows = [self._rows[i][row] for i, row in keys.tolist()]
        return np.stack([keys[:, 0], np.array(rows, np.int64)], axis=1)


def read_features(
    blocks: RegionBlocks, i: int, rows: Rows = ALL, *, image: int | None = None
) -> NDArray[np.float32]:
    """Return float32 C-ordered features of (some rows of) image `i`, none of them NaN or infinite.

    Args:
        blocks: of regions.
        i: of the block.
        rows: of the block.
        image: what messages call it; None for `i`.

    Raises:
        DataError: a feature is not finite; the message names the image and the row.
        ShapeError: the block has another width than announced.
    """
    block = np.ascontiguousarray(blocks.features(i, rows), dtype=np.float32)
    image = i if image is None else image
    if block.ndim != 2 or block.shape[1] != blocks.n_features:
        raise ShapeError(
            f"features of image {image}: must have shape (R, {blocks.n_features}), got {block.shape}."
        )
    # A finite sum proves that all are finite, in one pass without a mask; only an infinite one may lie.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = bool(np.isfinite(block.sum()))
    if not finite and len(bad := np.flatnonzero(~np.isfinite(block).all(axis=1))):
        where = np.arange(len(blocks.features(i)))[rows][bad[0]]
        raise DataError(
            f"features of image {image}: must be finite, got NaN or infinity in {len(bad)} rows "
            f"(first: row {where}). Compute the features of this image again."
        )
    return block


def engine_of(blocks: RegionBlocks) -> Engine:
    """Return what maps work over blocks: their own engine, or threads of this process."""
    return blocks.engine if isinstance(blocks, SharedBlocks) else THREADS


def reading(blocks: RegionBlocks, i: int, rows: Rows = ALL) -> Callable[[], NDArray[np.float32]]:
    """Return what `read_features` of image `i`, as something that `engine_of` the blocks can be sent."""
    own, at = (blocks.only(i), 0) if isinstance(blocks, SharedBlocks) else (blocks, i)
    return partial(read_features, own, at, rows, image=i)


def check_features(where: str, features: NDArray[np.floating], n_features: int) -> None:
    """Check the width of (R, D) features before they are scored.

    Raises:
        ShapeError: not a matrix of `n_features` columns.
    """
    if features.ndim != 2 or features.shape[1] != n_features:
        raise ShapeError(f"{where}: features must have shape (R, {n_features}), got {features.shape}.")


class Trainable:
    """Parameters in the manner of scikit-learn, without needing it.

    A subclass takes its parameters as keywords, stores each under its own name, checks them in
    `fit`, and leaves what it learned in attributes that end in an underscore.
    """

    classes_: tuple[str, ...]
    n_features_in_: int

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return [name for name in inspect.signature(cls).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's parameters by name."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name and return the head.

        Raises:
            ConfigError: a name that is none of its parameters.
        """
        known = self._parameter_names()
        for name, value in params.items():
            if name not in known:
                raise ConfigError(
                    f"{type(self).__name__}: must be one of {', '.join(known)}, got parameter {name!r}."
                )
            setattr(self, name, value)
        return self

    def clone(self) -> Self:
        """Return a head with the same parameters that has not been fitted."""
        return type(self)(**self.get_params())

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({inside})"

    def _start(self, blocks: RegionBlocks) -> None:
        if len(blocks) == 0:
            raise DataError(f"{type(self).__name__}: needs at least one image to train on, got none.")
        self.classes_ = tuple(blocks.classes)
        self.n_features_in_ = int(blocks.n_features)


class HeadBase(Trainable):
    """What every head shares: `fit` leaves a scorer behind, which scores for it.

    Attributes:
        reads_rows: whether it is trained on the features of all regions.
    """

    reads_rows: ClassVar[bool] = True

    def fit(self, blocks: RegionBlocks) -> Self:
        """Train on all images of `blocks`."""
        raise NotImplementedError

    @property
    def about(self) -> dict[str, Any]:
        """What kind of head it is, as plain data: `family` (svm, softmax or other), and `kernel` or None."""
        return {"family": "other", "kernel": None}

    @property
    def details_(self) -> dict[str, Any]:
        """Figures of the last fit that are worth reporting."""
        return {}

    def fit_grid(self, blocks: RegionBlocks, settings: Sequence[Mapping[str, Any]]) -> Iterator[Fitted]:
        """Train with each of several settings, in order; the head is left at the last.

        Heads whose problems help each other, as along rising C, do better than one fit after the other.

        Args:
            blocks: the training regions.
            settings: values of parameters by name; of a grid, the last parameter changes fastest and rises.
        """
        for setting in settings:
            self.set_params(**setting).fit(blocks)
            yield Fitted(setting, self.scorer_, self.details_, self.support_)

    @property
    def support_(self) -> NDArray[np.int64] | None:
        """(S, 2) int64, image and row of the region that each support vector is; None where there is none."""
        return None

    @property
    def scorer_(self) -> Scorer:
        """The numpy-only scorer that detection needs.

        Raises:
            NotFittedError: `fit` was not called.
        """
        scorer: Scorer | None = getattr(self, "_scorer", None)
        if scorer is None:
            raise NotFittedError(f"{type(self).__name__}: must be fitted before use. Call fit(blocks) first.")
        return scorer

    def decision_function(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, K) scores, larger = surer.

        Raises:
            NotFittedError: `fit` was not called.
            ShapeError: features of another width than in training.
        """
        scorer = self.scorer_
        check_features(type(self).__name__, features, self.n_features_in_)
        return scorer.decision_function(features)


def require_positive(where: str, parameters: Mapping[str, object]) -> None:
    """Check that numbers are finite and > 0.

    Raises:
        ConfigError: names the first that is not.
    """
    for name, value in parameters.items():
        if isinstance(value, bool) or not (isinstance(value, Real) and 0 < float(value) < float("inf")):
            raise ConfigError(f"{where}: {name} must be a finite number > 0, got {value!r}.")
