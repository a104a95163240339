"""Why a region scores as it does: its score as a sum, without approximation.

A linear head weighs features, and features are read from cells of a grid over the region: what the features
of a cell add to the score is that cell's share. Scaled rows, learned layers and the softmax depend on the
region as a whole, but at a given region each is an affine function of what it reads: a row of length 1 is the
row times a number, a ReLU passes a unit or does not, and the log-odds of a softmax set a class against the
mean of its rivals. The shares are those of this function. They add up to this score; they do not say what the
score would be if a cell changed.

A kernel machine is a sum over its support vectors, which are training regions: one term for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.boxes import Boxes, as_boxes, flip_horizontally
from rcnn_svm.detector import Detector, Model
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.features.build import build_featurizer
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.scorers import KernelScorer, LinearScorer, SoftmaxScorer
from rcnn_svm.networks.taps import TapSpec, format_taps
from rcnn_svm.structures import Image

if TYPE_CHECKING:
    from rcnn_svm.features.build import ImageFeaturizer
    from rcnn_svm.networks.backbone import Backbone

__all__ = ["BIAS", "DOUBT", "LAYERS", "Cells", "Evidence", "explain"]

BIAS, LAYERS, DOUBT = "bias", "biases of layers", "doubt among rivals"
"""Names of the constants of `Evidence`."""

_Vector: TypeAlias = NDArray[np.float64]
_Back: TypeAlias = Callable[[_Vector], tuple[_Vector, float]]
"""From weights of a step's output to those of its input, and the constant that the step adds to their sum."""
_ROWS_AT_ONCE = 256
"""Rows of a matrix that are in double precision at a time: VGG16's fc6 takes 0.8 GB as a whole."""


@dataclass(frozen=True, eq=False)
class Cells:
    """What each cell of one tap adds to a score.

    Attributes:
        tap: its name, such as `block13@3x3`; "features" where a featurizer of yours has none.
        box: (4,) the part of the image that the cells divide evenly, in half-open pixels; it may leave the
            image. What a cell of a network sees reaches beyond its place.
        shares: (rows, columns) float64; a single one where the tap has no cells.
    """

    tap: str
    box: NDArray[np.float32]
    shares: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The score of one region for one class, as a sum.

    Attributes:
        box: (4,) the region.
        label: the class.
        score: what the detector gives the region, float32 before any soft-NMS or refinement.
        cells: of a linear or softmax head, one entry a tap; none of a kernel machine.
        constants: what no cell and no support vector adds, by name: `BIAS` of the head, `LAYERS` for what
            biases of fully connected layers add, and for a softmax `DOUBT`, less the entropy (in nats) of
            `rivals`: doubt which of the others it is speaks for none of them.
        rivals: of a softmax, (K + 1,) float64, background last: what each other class weighs in the mean that
            the class is set against, its probability among the others; 0 for the class itself. Else None.
        support: of a kernel machine, (S,) float64, what each support vector adds; zero for those that do not
            support the class. Else None.
    """

    box: NDArray[np.float32]
    label: int
    score: float
    cells: tuple[Cells, ...]
    constants: Mapping[str, float]
    rivals: NDArray[np.float64] | None
    support: NDArray[np.float64] | None

    @property
    def total(self) -> float:
        """The sum of all terms: the score, to the rounding of float32."""
        found = sum(float(each.shares.sum()) for each in self.cells) + sum(self.constants.values())
        return found if self.support is None else found + float(self.support.sum())


def explain(detector: Detector, image: Image, boxes: ArrayLike, labels: ArrayLike) -> list[Evidence]:
    """Return the scores of regions of one image, each for one class, as sums.

    Where the detector reads the mirror image as well, terms are the means of both, cells in the places of the
    image itself.

    Args:
        detector: with a linear, softmax or kernel head.
        image: uint8 (H, W, 3) RGB.
        boxes: (N, 4) regions as they were scored: those that `Detector.trace` returns, or any others.
        labels: (N,) classes in 0 .. K-1.

    Raises:
        ConfigError: the head is none of ours, or a label is out of range.
        ShapeError: not as many labels as boxes.
    """
    boxes, classes = as_boxes(boxes, where="explain"), np.asarray(labels, np.int64)
    if classes.shape != (len(boxes),):
        raise ShapeError(f"explain: labels must have shape ({len(boxes)},), got {classes.shape}.")
    if not ((classes >= 0) & (classes < len(detector.classes))).all():
        raise ConfigError(
            f"explain: labels must lie in 0 .. {len(detector.classes) - 1}, got {classes.min()} .. "
            f"{classes.max()}."
        )
    scorer = detector.model.scorer
    if not isinstance(scorer, LinearScorer | SoftmaxScorer | KernelScorer):
        raise ConfigError(
            f"explain: a head must be linear, a softmax or a kernel machine of rcnn_svm's to be shown as a "
            f"sum, got {scorer.kind!r}. Train another head."
        )
    reader = _Reader(detector)
    views = [reader.read(view) for view in detector.views(image)]
    places = [boxes, flip_horizontally(boxes, image.shape[1])]
    rows = [view(own) for view, own in zip(views, places, strict=False)]
    hidden = [each.row if detector.layers is None else detector.layers(each.row) for each in rows]
    scores, _ = detector.model.read(hidden[0], hidden[1] if len(hidden) > 1 else None)
    seen = reader.seen(boxes, (image.shape[0], image.shape[1]))
    evidence = []
    for i, (box, label) in enumerate(zip(boxes, classes.tolist(), strict=True)):
        found = [
            _kernel_terms(detector.model, scorer, own[i], label)
            if isinstance(scorer, KernelScorer)
            else reader.shares(scorer, each, i, label)
            for each, own in zip(rows, hidden, strict=True)
        ]
        mean = found[0] if len(found) == 1 else _mean(*found)
        cells = tuple(
            Cells(name, part[i], shares) for (name, part), shares in zip(seen, mean.shares, strict=False)
        )
        evidence.append(
            Evidence(box, label, float(scores[i, label]), cells, mean.constants, mean.rivals, mean.support)
        )
    return evidence


@dataclass(frozen=True, eq=False)
class _Terms:
    """The terms of a score as one view of the image has them; `shares` are by tap."""

    shares: Sequence[NDArray[np.float64]]
    constants: Mapping[str, float]
    rivals: NDArray[np.float64] | None = None
    support: NDArray[np.float64] | None = None


def _mean(own: _Terms, mirrored: _Terms) -> _Terms:
    """Return the mean of both views, the cells of the mirror image brought to where they lie in the image."""

    def half(a: NDArray[np.float64] | None, b: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        return None if a is None or b is None else (a + b) / 2

    return _Terms(
        [(a + b[:, ::-1]) / 2 for a, b in zip(own.shares, mirrored.shares, strict=True)],
        {name: (value + mirrored.constants[name]) / 2 for name, value in own.constants.items()},
        half(own.rivals, mirrored.rivals),
        half(own.support, mirrored.support),
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """What was read of N regions: (N, D) rows, and by tap what its fully connected layers read of them."""

    row: NDArray[np.float32]
    pooled: Mapping[TapSpec, NDArray[np.float32]]


class _Reader:
    """Reads rows of a detector's features, and pulls weights of the head back to the cells.

    Args:
        detector: what they are of.
    """

    def __init__(self, detector: Detector) -> None:
        from rcnn_svm.features.featurizers import DetectionFeatures, SharedFeatures, WarpedFeatures
        from rcnn_svm.networks.backbone import Backbone

        self._detector = detector
        own = detector.featurizer
        self._ours: ImageFeaturizer | None = own if isinstance(own, DetectionFeatures) else None
        self._pooled: ImageFeaturizer | None = None
        self._dense: dict[TapSpec, list[_Dense]] = {}
        self._below: dict[TapSpec, TapSpec] = {}
        if not isinstance(own, SharedFeatures | WarpedFeatures) or not isinstance(
            detector.backbone, Backbone
        ):
            return
        self._ours = own
        for tap in own.taps:
            dense = _fully_connected(detector.backbone, tap)
            if dense is not None:
                pooling = next(iter(detector.backbone.regions))
                self._dense[tap] = dense
                self._below[tap] = detector.backbone.resolve(TapSpec(pooling, None, tap.widen))
        if self._below:
            taps = tuple(dict.fromkeys(self._below.values()))
            config = replace(detector.features, taps=format_taps(taps))
            self._pooled = build_featurizer(config, detector.backbone, device=own.device)

    def read(self, image: Image) -> Callable[[Boxes], _Rows]:
        """Return what reads regions of one image."""
        read, pooled = self._detector.featurizer.of_image(image), self._pooled
        if pooled is None:
            return lambda boxes: _Rows(read(boxes), {})
        read_pooled, columns = pooled.of_image(image), pooled.columns

        def rows(boxes: Boxes) -> _Rows:
            below = read_pooled(boxes)
            return _Rows(read(boxes), {tap: below[:, columns[each]] for tap, each in self._below.items()})

        return rows

    def seen(self, boxes: Boxes, size: tuple[int, int]) -> list[tuple[str, Boxes]]:
        """Return the name of each tap and the (N, 4) parts of the image that its cells divide."""
        if self._ours is None:
            return [("features", boxes)]
        return [(str(tap), self._ours.seen(tap, boxes, size)) for tap in self._ours.taps]

    def shares(self, scorer: LinearScorer | SoftmaxScorer, rows: _Rows, i: int, label: int) -> _Terms:
        """Return the score of row `i` as a sum over the cells of its taps."""
        row, layers, scaler = rows.row[i], self._detector.layers, self._detector.model.scaler
        steps: list[_Back] = []
        x: _Vector = row.astype(np.float64)
        if layers is not None:
            x = _scaled(x, layers.scaler, steps)
            for weight, bias in zip(layers.weights, layers.biases, strict=True):
                x = _Dense(weight, bias, relu=True).run(x, steps)
        if scaler is not None:
            x = _scaled(x, scaler, steps)
        weights, constants, rivals = _weights(scorer, x, label)
        weights, of_layers = _pulled_back(weights, steps)
        shares = []
        whole = {None: slice(None)} if self._ours is None else self._ours.columns
        for tap, columns in whole.items():
            if tap in self._dense:
                assert tap is not None
                below: list[_Back] = []
                pooled = rows.pooled[tap][i].astype(np.float64)
                x = pooled
                for dense in self._dense[tap]:
                    x = dense.run(x, below)
                own, constant = _pulled_back(weights[columns], below)
                of_layers += constant
                products, grid = own * pooled, self._below[tap].grid
            else:
                products, grid = weights[columns] * row[columns], None if tap is None else tap.grid
            shares.append(products.reshape(-1, *(grid or (1, 1))).sum(axis=0))
        if layers is not None or self._dense:
            constants = constants | {LAYERS: of_layers}
        return _Terms(shares, constants, rivals)


def _weights(
    scorer: LinearScorer | SoftmaxScorer, x: _Vector, label: int
) -> tuple[_Vector, dict[str, float], NDArray[np.float64] | None]:
    """Return the weights of a scaled row in the score of a class, constants, and the weights of rivals.

    The log-odds of a softmax are z_k - log sum exp z_j over the others j. With q_j, the softmax over these
    alone, the logarithm is the mean of z_j under q plus the entropy of q.
    """
    coef, intercept = scorer.coef.astype(np.float64), scorer.intercept.astype(np.float64)
    if isinstance(scorer, LinearScorer):
        return coef[label], {BIAS: float(intercept[label])}, None
    logits = coef @ x + intercept
    logits[label] = -np.inf
    logits -= logits.max()
    rivals = np.exp(logits)
    total = rivals.sum()
    rivals /= total
    others = rivals > 0
    entropy = float(np.log(total) - rivals[others] @ logits[others])
    bias = float(intercept[label] - rivals @ intercept)
    return coef[label] - rivals @ coef, {BIAS: bias, DOUBT: -entropy}, rivals


def _scaled(x: _Vector, scaler: FeatureScaler, steps: list[_Back]) -> _Vector:
    """Return a scaled row: at this row the scaling is a factor for each feature."""
    y: _Vector = scaler(x[None].astype(np.float32))[0].astype(np.float64)
    factors = np.divide(y, x, out=np.zeros_like(x), where=x != 0)
    steps.append(lambda weights: (weights * factors, 0.0))
    return y


@dataclass(frozen=True, eq=False)
class _Dense:
    """A fully connected layer: (outputs, inputs) weights, (outputs,) biases, and whether a ReLU follows."""

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    relu: bool

    def run(self, x: _Vector, steps: list[_Back]) -> _Vector:
        """Return the output for one row: at this row the ReLU is a choice of units."""
        slabs = [slice(i, i + _ROWS_AT_ONCE) for i in range(0, len(self.bias), _ROWS_AT_ONCE)]
        y = np.concatenate([self.weight[s].astype(np.float64) @ x for s in slabs]) + self.bias
        passed = y > 0 if self.relu else np.ones(len(y), bool)

        def back(weights: _Vector) -> tuple[_Vector, float]:
            own = np.where(passed, weights, 0)
            to_x = np.zeros(len(x))
            for s in slabs:
                to_x += own[s] @ self.weight[s].astype(np.float64)
            return to_x, float(own @ self.bias)

        steps.append(back)
        out: _Vector = np.where(passed, y, 0)
        return out


def _pulled_back(weights: _Vector, steps: Sequence[_Back]) -> tuple[_Vector, float]:
    """Return weights of what the first of several steps reads, and the constant that they leave."""
    total = 0.0
    for back in reversed(steps):
        weights, constant = back(weights)
        total += constant
    return weights, total


def _fully_connected(backbone: Backbone, tap: TapSpec) -> list[_Dense] | None:
    """Return the layers from the last pooling of a network to a tap, or None where they are not all such.

    The pooling must keep cells, and nothing but fully connected layers with ReLUs may follow.
    """
    from torch import nn

    pooling, *names = backbone.regions
    if tap.layer not in names or not backbone.layers[pooling].is_map:
        return None
    dense: list[_Dense] = []
    for name in names[: names.index(tap.layer) + 1]:
        for module in backbone.regions[name].modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach().cpu().numpy()
                bias = np.zeros(len(weight), np.float32)
                if module.bias is not None:
                    bias = module.bias.detach().cpu().numpy()
                dense.append(_Dense(weight, bias, relu=False))
            elif isinstance(module, nn.ReLU) and dense:
                dense[-1] = replace(dense[-1], relu=True)
            elif not isinstance(module, nn.Sequential | nn.Flatten | nn.Dropout | nn.Identity):
                return None
    return dense


def _kernel_terms(model: Model, scorer: KernelScorer, hidden: NDArray[np.float32], label: int) -> _Terms:
    row = hidden[None] if model.scaler is None else model.scaler(hidden[None])
    terms = scorer.terms(row, label)[0]
    return _Terms((), {BIAS: float(scorer.intercept[label])}, support=terms)
