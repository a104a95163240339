"""A trained detector as an ONNX graph: network, RoIAlign, learned layers, scores and box regression in one.

`export_detector` writes a folder that `rcnn_svm.runtime.load` reads without torch. Proposals, resizing and
what comes after the scores stay outside: they are numpy's, numba's and OpenCV's already.

A graph of shared convolutions takes `image` (H, W, 3) uint8 RGB, resized; `size` (2,) int64, height and width
before; `boxes` (R, 4) float32, half-open pixels of the image before. That of warped regions takes `crops`
(R, S, S, 3) float32, 0 .. 255 RGB. Both give `scores` (R, K) and, with box regression, `deltas` (R, K, 4).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.onnx.operators import shape_as_tensor

from rcnn_svm.boxes import Boxes, clip
from rcnn_svm.detector import Detector, Model
from rcnn_svm.errors import ConfigError, DataError, DependencyError
from rcnn_svm.features.fc_layers import FcLayers
from rcnn_svm.features.featurizers import DetectionFeatures, SharedFeatures, WarpedFeatures
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.features.sizes import resize
from rcnn_svm.features.warp import warp_crops
from rcnn_svm.files import atomic_path, file_digest, remove_marker, write_json
from rcnn_svm.heads.kernels import RBF, Polynomial, kernel_name
from rcnn_svm.heads.refiner import BoxRefiner
from rcnn_svm.heads.scorers import KernelScorer, LinearScorer, SoftmaxScorer
from rcnn_svm.networks.backbone import Backbone
from rcnn_svm.networks.efficientnet_lite import SameConv2d
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.opencv import cv2
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.proposals import RpnProposals, regions_of
from rcnn_svm.runtime import MANIFEST, REQUIREMENTS, Precision, load
from rcnn_svm.runtime.networks import FORMAT, MAP
from rcnn_svm.structures import Image, Sample

__all__ = ["Exported", "export_detector"]

_OPSET = 17
_TRIED, _N_TRIED = ((331, 400), (333, 220)), 20
"""Sizes of made-up images, and how many regions of each, that a graph is tried on."""
_TOLERANCE = 1e-4
"""Of the largest score, or delta: the difference from torch that rounding explains."""
_FEW_WEIGHTS = 1024
"""So many are not worth halving: biases, and tables that places are computed from."""
_N_CROPS = 64
"""Of an image, to calibrate on."""
_OUTSIDE = -9.0
"""Where a sample lies that counts as zero: further than a cell from every cell."""


class _Heads(nn.Module):
    """(R, D) rows of the network -> (R, K) scores, and (R, K, 4) deltas where boxes are regressed."""

    def __init__(self, layers: FcLayers | None, model: Model) -> None:
        super().__init__()
        self._layers, self._model = layers, model
        self._scorer = _SCORERS[type(model.scorer)](model.scorer)
        self._fc = nn.ModuleList()
        if layers is not None:
            self._fc.extend(map(_linear, layers.weights, layers.biases))
        self._boxes = None
        if model.regressor is not None:
            coef = model.regressor.coef_
            self._boxes = _linear(coef.reshape(-1, coef.shape[2]), model.regressor.intercept_.reshape(-1))

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        if self._layers is not None:
            rows = _scaled(rows, self._layers.scaler)
            for layer in self._fc:
                rows = layer(rows).relu()
        scores = self._scorer(_scaled(rows, self._model.scaler))
        if self._boxes is None:
            return (scores,)
        deltas = self._boxes(_scaled(rows, self._model.regressor_scaler))
        return scores, deltas.reshape(-1, scores.shape[1], 4)


class _Refiner(nn.Module):
    """(M, D) rows -> (M, K, 5): what `BoxRefiner` says for every class."""

    def __init__(self, refiner: BoxRefiner) -> None:
        super().__init__()
        self._hidden = _linear(refiner.hidden_weight, refiner.hidden_bias)
        self._n = len(refiner.weight)
        self._moves = _linear(refiner.weight.reshape(-1, refiner.weight.shape[2]), refiner.bias.reshape(-1))

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        moves: Tensor = self._moves(self._hidden(rows).relu())
        return (moves.reshape(-1, self._n, 5),)


def _linear(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = (nn.Parameter(torch.tensor(a), requires_grad=False) for a in (weight, bias))
    return layer


def _scaled(rows: Tensor, scaler: FeatureScaler | None) -> Tensor:
    """Return what `FeatureScaler` does to rows."""
    if scaler is None or scaler.scaling == "none":
        return rows
    if scaler.scaling == "mean-norm-20":
        assert scaler.factor_ is not None
        return rows * scaler.factor_
    if (n := scaler.n_columns) is not None:
        return torch.cat([_scaled(rows[:, :n], FeatureScaler(scaler.scaling)), rows[:, n:]], dim=1)
    if scaler.scaling == "sqrt-l2":
        rows = rows.sign() * rows.abs().sqrt()
    norms = rows.square().sum(dim=1, keepdim=True).sqrt()
    return rows / torch.where(norms == 0, torch.ones_like(norms), norms)


class _Softmax(nn.Module):
    """The log-odds of `SoftmaxScorer.decision_function`, in double precision as there."""

    def __init__(self, scorer: SoftmaxScorer) -> None:
        super().__init__()
        self._layer = _linear(scorer.coef, scorer.intercept)

    def forward(self, rows: Tensor) -> Tensor:
        logits = self._layer(rows).double()
        n = logits.shape[1]
        shifted = logits - logits.amax(dim=1, keepdim=True)
        is_best = torch.arange(n) == shifted.argmax(dim=1, keepdim=True)
        exponentials = shifted.exp()
        others = exponentials.sum(dim=1, keepdim=True) - exponentials
        rest = torch.where(is_best, torch.full_like(shifted, -1e300), shifted)
        second = rest.amax(dim=1, keepdim=True)
        of_best = -second - (rest - second).exp().sum(dim=1, keepdim=True).log()
        odds = torch.where(is_best, of_best, shifted - torch.where(is_best, 1.0, others).log())
        return odds[:, :-1].float()


class _Gaussians(nn.Module):
    """What `KernelScorer` does with a Gaussian kernel: distances from the common centre, as there."""

    centre: Tensor

    def __init__(self, scorer: KernelScorer, kernel: RBF) -> None:
        super().__init__()
        assert not isinstance(kernel.gamma, str)  # it is settled by training
        centre = scorer.support.mean(axis=0)  # as `RBF.against` has it
        centred = scorer.support - centre
        self.register_buffer("centre", torch.tensor(centre))
        self._products = _linear(2 * centred, -np.einsum("sd,sd->s", centred, centred))
        self._gamma, self._sum = kernel.gamma, _linear(scorer.dual_coef, scorer.intercept)

    def forward(self, rows: Tensor) -> Tensor:
        x = rows - self.centre
        distances: Tensor = self._products(x) - x.square().sum(dim=1, keepdim=True)
        scores: Tensor = self._sum((distances.clamp(max=0) * self._gamma).exp())
        return scores


class _Powers(nn.Module):
    """What `KernelScorer` does with a polynomial kernel."""

    def __init__(self, scorer: KernelScorer, kernel: Polynomial) -> None:
        super().__init__()
        assert not isinstance(kernel.gamma, str)
        offset = np.full(len(scorer.support), kernel.coef0, np.float32)
        self._products = _linear(np.float32(kernel.gamma) * scorer.support, offset)
        self._degree, self._sum = kernel.degree, _linear(scorer.dual_coef, scorer.intercept)

    def forward(self, rows: Tensor) -> Tensor:
        scores: Tensor = self._sum(self._products(rows) ** self._degree)
        return scores


def _kernel_machine(scorer: KernelScorer) -> nn.Module:
    kernel = scorer.kernel
    return (
        _Gaussians(scorer, kernel) if isinstance(kernel, RBF) else _Powers(scorer, cast(Polynomial, kernel))
    )


_SCORERS: Mapping[type, Callable[[Any], nn.Module]] = {
    LinearScorer: lambda scorer: _linear(scorer.coef, scorer.intercept),
    SoftmaxScorer: _Softmax,
    KernelScorer: _kernel_machine,
}


class _SameConv(torch.autograd.Function):
    """A convolution that pads as TensorFlow does, which ONNX knows for images of any size."""

    @staticmethod
    def forward(ctx: Any, conv: SameConv2d, x: Tensor, weight: Tensor) -> Tensor:
        return SameConv2d.forward(conv, x)

    @staticmethod
    def symbolic(g: Any, conv: SameConv2d, x: Any, weight: Any) -> Any:
        side = list(conv.kernel_size)
        settings = {"auto_pad_s": "SAME_UPPER", "group_i": conv.groups, "kernel_shape_i": side}
        return g.op("Conv", x, weight, strides_i=list(conv.stride), **settings)


def _traceable(backbone: Backbone) -> Backbone:
    """Return a copy whose convolutions pad images of any size when they are traced."""
    net = copy.deepcopy(backbone.net).cpu().eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, SameConv2d):
            forward = MethodType(lambda conv, x: _SameConv.apply(conv, x, conv.weight), module)
            setattr(module, "forward", forward)  # noqa: B010 - no assignment for mypy
    return Backbone(backbone.architecture, net, backbone.classes)


def _normalised(pixels: Tensor, backbone: Backbone) -> Tensor:
    """Return (B, 3, H, W) of (B, H, W, 3) pixels, 0 .. 255, as the network was trained to see them."""
    mean, std = map(torch.tensor, backbone.mean_std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def _on_grid(value: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Return (R, D): a layer's output averaged onto a grid, of whatever number of cells."""
    if value.ndim == 4 and grid is not None and tuple(value.shape[2:]) != grid:
        for n in grid:  # what was averaged goes to the end: rows first, then columns
            averages = nn.functional.adaptive_avg_pool1d(torch.eye(int(value.shape[2]))[None], n)[0]
            value = torch.tensordot(value, averages, dims=([2], [0]))
    return value.flatten(1)


class _Warped(nn.Module):
    """(R, S, S, 3) crops -> scores and deltas."""

    def __init__(self, features: WarpedFeatures, backbone: Backbone, heads: nn.Module) -> None:
        super().__init__()
        self._backbone, self._heads, self._taps = backbone, heads, features.taps

    def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
        layers = {tap.layer for tap in self._taps}
        outputs = self._backbone(_normalised(crops, self._backbone), layers)
        rows = torch.cat([_on_grid(outputs[tap.layer], tap.grid) for tap in self._taps], dim=1)
        return tuple(self._heads(rows))


class _Maps(nn.Module):
    """(H, W, 3) image -> (1, C, h, w) maps."""

    def __init__(self, backbone: Backbone, names: Sequence[str]) -> None:
        super().__init__()
        self._backbone, self.names = backbone, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self._backbone.run_maps(_normalised(image[None], self._backbone), self.names)
        return tuple(maps[name] for name in self.names)


class _Places(nn.Module):
    """Where regions lie on a map, as `LayerInfo.cells` has it for images of every size.

    Args:
        backbone: the network.
        layer: a map layer.
        longest: side of the largest image, in pixels.
    """

    origins: Tensor

    def __init__(self, backbone: Backbone, layer: str, longest: int) -> None:
        super().__init__()
        self._stride = backbone.layers[layer].stride
        # The centre of the first cell may depend on how an axis is padded, and so on its length.
        known = [backbone.layers_on((n, n))[layer].origin for n in range(1, longest + 1)]
        self.register_buffer("origins", torch.tensor([known[0], *known], dtype=torch.float64))

    def forward(self, regions: Tensor, resized: Tensor) -> Tensor:
        """Return (R, 4) float32 cells of (R, 4) float64 pixels; `resized` is (2,) height and width."""
        x, y = self.origins[resized[1], 0], self.origins[resized[0], 1]
        return ((regions - torch.stack([x, y, x, y])) / self._stride + 0.5).float()


def _seen_part(boxes: Tensor, factor: float, size: Tensor) -> Tensor:
    """Return what `features.featurizers.seen_part` does."""
    if math.isinf(factor):
        zero = torch.zeros(1)
        return torch.cat([zero, zero, size[1:].float(), size[:1].float()])[None]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * (factor / 2)
    return torch.cat([centre - half, centre + half], dim=1)


def _axis_weights(low: Tensor, high: Tensor, cells: int, most: int, length: Tensor) -> Tensor:
    """Return (R, cells, length) float32: weights of the rows, or columns, of a map in each cell of a region.

    The mean of as many bilinear samples as a cell is long, see `features.roi_pool.roi_align`; in double
    precision up to where the samples lie, so that their number is the same as there.

    Args:
        low: (R,) float64 where regions begin, in cells of the map.
        high: (R,) where they end.
        cells: of a region.
        most: samples that a cell has at most.
        length: of the map.
    """
    side = ((high - low) / cells)[:, None]  # (R, 1)
    n = side.ceil().clamp(min=1)
    sample = torch.arange(most, dtype=torch.float64) + 0.5
    start = (low[:, None] - 0.5) + torch.arange(cells, dtype=torch.float64) * side  # (R, cells)
    at = start[:, :, None] + (sample * side / n)[:, None]  # (R, cells, most)
    counts = (sample < n)[:, None] & (at >= -1) & (at <= length)
    clipped = torch.minimum(at.clamp(min=0), length - 1)
    at = torch.where(counts, clipped, torch.full_like(at, _OUTSIDE)).float()
    places = torch.arange(length)  # type: ignore[call-overload]  # tracing keeps a tensor, no number
    distance = (at[..., None] - places).abs()  # (R, cells, most, length)
    weights: Tensor = (1 - distance).relu().sum(dim=2) / n[..., None].float()
    return weights


class _MapTap(nn.Module):
    """RoIAlign onto the grid of a tap, as the product of two matrices that it is."""

    def __init__(self, tap: TapSpec, backbone: Backbone, longest: int) -> None:
        super().__init__()
        assert tap.grid is not None  # `resolve` filled it in
        self._tap, self._grid = tap, tap.grid
        self._places = _Places(backbone, tap.layer, longest)
        widest = longest * (1 if math.isinf(tap.widen) else tap.widen)
        cells = widest / backbone.layers[tap.layer].stride
        self._most = tuple(math.ceil(cells / n) + 1 for n in self._grid)  # one to spare for rounding

    def forward(self, values: Tensor, resized: Tensor, size: Tensor, boxes: Tensor) -> Tensor:
        """Return (R, C * rows * columns)."""
        regions = _seen_part(boxes, self._tap.widen, size).double() * _factors(resized, size)
        x1, y1, x2, y2 = self._places(regions, resized).double().unbind(1)
        height, width = shape_as_tensor(values)[2], shape_as_tensor(values)[3]
        rows = _axis_weights(y1, y2, self._grid[0], self._most[0], height)
        columns = _axis_weights(x1, x2, self._grid[1], self._most[1], width)
        joint = rows[:, :, None, :, None] * columns[:, None, :, None, :]
        pooled: Tensor = joint.flatten(3).flatten(1, 2) @ values[0].flatten(1).T  # (R, cells, C)
        pooled = pooled.transpose(1, 2).flatten(1)
        return pooled.expand(boxes.shape[0], -1) if math.isinf(self._tap.widen) else pooled


def _factors(resized: Tensor, size: Tensor) -> Tensor:
    """Return (4,) float64: what brings x1 y1 x2 y2 from the image into the resized one."""
    y, x = (resized.double() / size.double()).unbind(0)
    return torch.stack([x, y, x, y])


class _LayerTaps(nn.Module):
    """Taps of region layers, which see as many cells of a region as a crop has."""

    def __init__(self, taps: Sequence[TapSpec], backbone: Backbone, longest: int) -> None:
        super().__init__()
        self._taps, self._backbone = taps, backbone
        self._places = _Places(backbone, backbone.entry, longest)
        info, side = backbone.layers[backbone.entry], backbone.crop_size
        self._first = (info.origin[0] - info.stride / 2) / side
        self._last = self._first + backbone.entry_grid * info.stride / side

    def forward(self, values: Tensor, resized: Tensor, size: Tensor, boxes: Tensor) -> Tensor:
        """Return (R, D) of all its taps, which widen regions alike."""
        parts = _seen_part(boxes, self._taps[0].widen, size).expand(boxes.shape[0], -1).double()
        regions = parts * _factors(resized, size)
        low, side = regions[:, :2], regions[:, 2:] - regions[:, :2]
        regions = torch.cat([low + self._first * side, low + self._last * side], dim=1)
        cells, grid = self._places(regions, resized), self._backbone.entry_grid
        grids = torchvision.ops.roi_align(values, [cells], grid, sampling_ratio=1, aligned=True)
        pooled = self._backbone.pool_regions(grids)
        outputs = self._backbone.run_pooled(pooled, {tap.layer for tap in self._taps})
        return torch.cat([_on_grid(outputs[tap.layer], tap.grid) for tap in self._taps], dim=1)


class _Regions(nn.Module):
    """Maps of an image and (R, 4) boxes -> scores and deltas."""

    def __init__(self, features: SharedFeatures, backbone: Backbone, heads: nn.Module) -> None:
        super().__init__()
        longest = max(features.longer_sides)
        self._heads, self._taps = heads, features.taps
        self._readers = nn.ModuleList()
        self._layers: list[str] = []  # of each reader
        self._columns: list[tuple[TapSpec, ...]] = []
        for tap in self._taps:
            if tap.layer in backbone.maps:
                self._readers.append(_MapTap(tap, backbone, longest))
                self._columns.append((tap,))
                self._layers.append(tap.layer)
        of_regions = [tap for tap in self._taps if tap.layer in backbone.regions]
        for widen in dict.fromkeys(tap.widen for tap in of_regions):
            alike = tuple(tap for tap in of_regions if tap.widen == widen)
            self._readers.append(_LayerTaps(alike, backbone, longest))
            self._columns.append(alike)
            self._layers.append(backbone.entry)
        self.maps = tuple(dict.fromkeys(self._layers))
        self._widths = {tap: backbone.n_features(tap) for tap in self._taps}

    def forward(self, resized: Tensor, size: Tensor, boxes: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.maps, maps, strict=True))
        columns: dict[TapSpec, Tensor] = {}
        for read, taps, layer in zip(self._readers, self._columns, self._layers, strict=True):
            values = read(named[layer], resized, size, boxes)
            columns |= zip(taps, values.split([self._widths[tap] for tap in taps], dim=1), strict=True)
        return tuple(self._heads(torch.cat([columns[tap] for tap in self._taps], dim=1)))


class _Whole(nn.Module):
    """Image, its size before it was resized, boxes -> scores and deltas; behind them maps that are kept."""

    def __init__(self, regions: _Regions, backbone: Backbone, kept: Sequence[str]) -> None:
        super().__init__()
        self._regions, self._kept = regions, kept
        self._maps = _Maps(backbone, tuple(dict.fromkeys([*regions.maps, *kept])))

    def forward(self, image: Tensor, size: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        maps = dict(zip(self._maps.names, self._maps(image), strict=True))
        read = [maps[name] for name in self._regions.maps]
        found = self._regions(shape_as_tensor(image)[:2], size, boxes, *read)
        return (*found, *(maps[name] for name in self._kept))


class Exported(NamedTuple):
    """What an export came to.

    Attributes:
        folder: that holds it.
        n_bytes: of its graphs.
        difference: from torch on made-up images, at most, before weights were rounded: a share of the largest
            score, or delta.
    """

    folder: Path
    n_bytes: int
    difference: float


def export_detector(
    detector: Detector, folder: Path, *, precision: Precision = "fp32", calibrate: Sequence[Sample] = ()
) -> Exported:
    """Write a detector as ONNX graphs and settings, in place of an export that lies there.

    Args:
        detector: with its network on the CPU.
        folder: made if it is not there; `rcnn_svm.runtime.load` reads it.
        precision: of the weights: `fp16` halves the files and computes in float32; `int8` computes in 8 bits,
            convolutions too where there are images to calibrate on, else the fully connected layers alone.
        calibrate: images that show which range each map takes, for `int8`; a few dozen.

    Raises:
        ConfigError: a part of the detector is not ours, or no graph can be made of it.
        DependencyError: onnx or onnxruntime is missing.
        DataError: the graph does not say what torch says, or the folder cannot be written to.
    """
    for package in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DependencyError(
                f"export: {package} cannot be imported ({error}). Install it with "
                f"`pip install onnx onnxruntime`."
            ) from error
    features, folder = _exportable(detector), Path(folder)
    curves, warped = detector.calibration, None
    if isinstance(features, WarpedFeatures):
        warped = {"crop_size": features.crop_size, **_cut(features)}
    settings = {
        "format": FORMAT,
        "precision": precision,
        "warped": warped,
        "calibration": curves and {name: _plain(array) for name, array in curves.to_arrays().items()},
        **detector.settings(),
    }
    with tempfile.TemporaryDirectory() as work:
        graphs = _write_graphs(detector, features, Path(work))
        write_json(Path(work) / MANIFEST, {"files": _named(graphs), **settings})
        difference = _difference(detector, load(work, threads=1))
        for path in graphs:
            shown = calibrate if path.stem == "detector" else ()  # the others read maps, and convolve nothing
            _round(path, precision, (_feeds(detector, sample) for sample in shown) if shown else None)
        remove_marker(folder / MANIFEST)  # where it lies, the rest is whole
        for path in graphs:
            with atomic_path(folder / path.name, apart=True) as temporary:
                shutil.copyfile(path, temporary)
        files = _named(graphs)
        n_bytes = sum(path.stat().st_size for path in graphs)
    for stale in {"again", "refine"} - set(files):
        (folder / f"{stale}.onnx").unlink(missing_ok=True)
    with atomic_path(folder / "requirements.txt") as temporary:
        temporary.write_text("".join(f"{one}\n" for one in REQUIREMENTS), encoding="utf-8")
    write_json(folder / MANIFEST, {"files": files, **settings})
    return Exported(folder, n_bytes, difference)


def _named(graphs: Sequence[Path]) -> dict[str, Any]:
    return {path.stem: {"name": path.name, "sha256": file_digest(path)} for path in graphs}


def _plain(array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "values": array.tolist()}


def _exportable(detector: Detector) -> SharedFeatures | WarpedFeatures:
    """Return the features of a detector that can be exported.

    Raises:
        ConfigError: it cannot, with the reason.
    """
    settings, model, features = detector.settings(), detector.model, detector.featurizer
    if isinstance(features, DetectionFeatures) or isinstance(detector.proposer, RpnProposals):
        raise ConfigError(
            f"export: no graph is made of networks that were trained to detect, got one for "
            f"{'features' if isinstance(features, DetectionFeatures) else 'regions'}. Use the detector "
            f"with torch, or train it with a network that classifies."
        )
    foreign = [settings[part]["kind"] for part in ("proposals", "detect") if "settings" not in settings[part]]
    if type(model.scorer) not in _SCORERS:
        foreign.append(model.scorer.kind)
    if not isinstance(features, SharedFeatures | WarpedFeatures):
        foreign.append(type(features).__name__)
    if foreign or not isinstance(features, SharedFeatures | WarpedFeatures):
        raise ConfigError(
            f"export: every part of the detector must be rcnn_svm's, got {', '.join(foreign)}, whose code no "
            f"graph can hold. Use the detector from Python."
        )
    if isinstance(model.scorer, KernelScorer) and type(model.scorer.kernel) not in (RBF, Polynomial):
        raise ConfigError(
            f"export: a graph has the kernels {RBF.name} and {Polynomial.name}, got "
            f"{kernel_name(model.scorer.kernel)}. Train with one of these, or use the detector with torch."
        )
    return features


def _cut(features: WarpedFeatures) -> dict[str, Any]:
    """Return how crops are cut, but for their size; outside the image is the network's mean."""
    fill = [255 * value for value in features.backbone.mean_std[0]]
    return {"padding": features.padding, "mode": features.mode, "fill": fill}


def _write_graphs(detector: Detector, features: SharedFeatures | WarpedFeatures, folder: Path) -> list[Path]:
    """Write `detector.onnx`, and what reads its maps once more where something does; return their paths."""
    assert isinstance(detector.backbone, Backbone)  # `_exportable` saw to it
    backbone, heads = _traceable(detector.backbone), _Heads(detector.layers, detector.model)
    found = ["scores", *(["deltas"] if detector.model.regressor is not None else [])]
    paths = [folder / "detector.onnx"]
    if isinstance(features, WarpedFeatures):
        crops = torch.zeros(2, features.crop_size, features.crop_size, 3)
        _trace(_Warped(features, backbone, heads), {"crops": crops}, found, paths[0])
        return paths
    regions, refinement = _Regions(features, backbone, heads), detector.model.refinement
    later: dict[str, tuple[_Regions, list[str]]] = {}  # what reads the maps once more, and what it says
    if isinstance(detector.postprocess, PostprocessConfig) and detector.postprocess.second_look:
        later["again"] = regions, found
    if refinement is not None:
        assert isinstance(refinement.featurizer, SharedFeatures)
        fine = _Regions(refinement.featurizer, backbone, _Refiner(refinement.refiner))
        later["refine"] = fine, ["moves"]
    kept = tuple(dict.fromkeys(name for reader, _ in later.values() for name in reader.maps))
    side = min(160, *features.longer_sides)
    image = torch.zeros(side - side // 4, side, 3, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 30.0, 30.0], [5.0, 5.0, 40.0, 20.0]])
    rest = {"size": torch.tensor([48, 64]), "boxes": boxes}
    whole = _Whole(regions, backbone, kept).eval()
    _trace(whole, {"image": image, **rest}, [*found, *(MAP + name for name in kept)], paths[0])
    with torch.no_grad():
        maps = dict(zip(kept, whole(image, *rest.values())[len(found) :], strict=True))
    for kind, (reader, said) in later.items():
        paths.append(folder / f"{kind}.onnx")
        read = {MAP + name: maps[name] for name in reader.maps}
        _trace(reader, {"resized": torch.tensor(image.shape[:2]), **rest, **read}, said, paths[-1])
    return paths


_AXES = {
    "image": {0: "height", 1: "width"},
    "boxes": {0: "regions"},
    "crops": {0: "regions"},
    "scores": {0: "regions"},
    "deltas": {0: "regions"},
    "moves": {0: "regions"},
}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch from printing the whole graph where it knows no operator: its own switch for it is stuck."""
    name = "_jit_onnx_log"
    printing = getattr(torch._C, name, None)
    setattr(torch._C, name, lambda *_: None)
    try:
        yield
    finally:
        setattr(torch._C, name, printing)


def _trace(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Write a module as a graph that takes images and regions of every size and number."""
    names = [*inputs, *outputs]
    axes = {name: {2: f"rows of {name}", 3: f"columns of {name}"} for name in names if name.startswith(MAP)}
    axes |= {name: known for name, known in _AXES.items() if name in names}
    with warnings.catch_warnings(), torch.no_grad(), _silent():
        # That it traces, which is what is wanted: an exporter of torch's that does not needs a further
        # package. What tracing would get wrong, `_difference` finds.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=_OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=axes,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ConfigError(
                f"export: no graph can be made of the network ({str(error).splitlines()[0]}). Use the "
                f"detector with torch, or train it with another network."
            ) from error


def _difference(detector: Detector, exported: Detector) -> float:
    """Return how far the graphs are from torch at most, as a share of the largest number of its kind.

    The images have other sizes than the one that was traced.

    Raises:
        DataError: further than rounding explains.
    """
    rng = np.random.default_rng(0)
    furthest = 0.0
    for height, width in _TRIED:
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        image = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
        corners = rng.uniform(0, 1, (_N_TRIED, 2, 2)) * (width, height)
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
        boxes = clip(np.concatenate([boxes, [[0, 0, width, height]]]), (height, width))
        for theirs, ours in zip(_said(detector, image, boxes), _said(exported, image, boxes), strict=True):
            difference = float(np.abs(theirs - ours).max() / max(1.0, np.abs(theirs).max()))
            furthest = max(furthest, difference) if difference == difference else np.inf
    if not furthest <= _TOLERANCE:
        raise DataError(
            f"export: the graph must say what torch says within {_TOLERANCE:g} of the largest, got a "
            f"difference of {furthest:.3g}. The network does what cannot be traced: use the detector with "
            f"torch, or train it with another network."
        )
    return furthest


def _said(detector: Detector, image: Image, boxes: Boxes) -> list[NDArray[np.float32]]:
    """Return all that a detector computes of regions before it chooses: read twice, and refined."""
    look, fine = detector.looks(image)
    said: list[NDArray[np.float32]] = []
    for _ in range(2):
        scores, deltas = detector.model.read(*look(boxes))
        said += [scores] if deltas is None else [scores, deltas]
    if fine is not None and detector.model.refinement is not None:
        labels = np.arange(len(boxes)) % len(detector.classes)
        said += detector.model.refinement.refiner(fine(boxes), labels)
    return said


_Feeds: TypeAlias = dict[str, NDArray[Any]]
"""Inputs of a graph by name."""


def _feeds(detector: Detector, sample: Sample) -> _Feeds:
    """Return the inputs of the first graph for an image, its proposals among them."""
    image, features = sample.read(), detector.featurizer
    boxes = regions_of(detector.proposer, image, sample.image_id).boxes[: detector.n_proposals]
    if isinstance(features, WarpedFeatures):
        pixels = image.astype(np.float32)
        return {"crops": warp_crops(pixels, boxes[:_N_CROPS], features.crop_size, **_cut(features))}
    assert isinstance(features, SharedFeatures)
    resized, _ = resize(image, features.longer_sides[0] / max(image.shape[:2]))
    return {"image": resized, "size": np.array(image.shape[:2]), "boxes": boxes}


def _round(path: Path, precision: Precision, feeds: Iterator[_Feeds] | None) -> None:
    """Round the weights of a graph, in place."""
    import onnx

    if precision == "fp16":
        model = onnx.load(path)
        _halve(model.graph)
        onnx.save(model, path)
    elif precision == "int8":
        _quantise(path, feeds)


def _halve(graph: Any) -> None:
    """Keep large weights in half precision, each with a node that brings it back when it is loaded."""
    from onnx import TensorProto, helper, numpy_helper

    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or math.prod(weight.dims) < _FEW_WEIGHTS:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue  # as it is
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        graph.node.insert(0, helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))


class _Reader:
    """Inputs one by one, as the calibration asks for them."""

    def __init__(self, feeds: Iterator[_Feeds]) -> None:
        self._left = feeds

    def get_next(self) -> _Feeds | None:
        return next(self._left, None)


_EXACT = {"_scorer", "_boxes", "_hidden", "_moves"}
"""Modules whose products keep their precision."""


def _quantise(path: Path, feeds: Iterator[_Feeds] | None) -> None:
    """Bring the learned layers of a graph to 8 bits, and its convolutions where `feeds` show their ranges.

    What gives scores and deltas stays as it is: it is small, and its rounding would be theirs. So does what
    refines boxes, whose rows are standardised by its weights: they differ by too much for one scale.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(path, prepared, skip_optimization=True, skip_symbolic_shape=True)
    nodes = onnx.load(prepared).graph.node
    layers = [
        node.name for node in nodes if node.op_type == "Gemm" and not _EXACT & set(node.name.split("/"))
    ]
    convolutions = [node.name for node in nodes if node.op_type == "Conv" and feeds is not None]
    if not layers and not convolutions:
        return  # of no names both would take all
    if feeds is not None:
        quantization.quantize_static(
            prepared,
            path,
            _Reader(feeds),
            op_types_to_quantize=["Conv", "Gemm"],
            nodes_to_quantize=[*layers, *convolutions],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    else:  # which takes products alone, and makes them of these layers under names of its own
        quantization.quantize_dynamic(
            prepared,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[f"{name}_MatMul" for name in layers],
            weight_type=quantization.QuantType.QInt8,
        )
