"""From an image and its regions to feature rows: by warping each region, or on shared convolutions.

`WarpedFeatures` is R-CNN: every region becomes a crop and the whole network runs on each crop.
`SharedFeatures` runs the convolutions once over the image and pools each region from their maps; region
layers such as fc6 and fc7 follow on all regions at once. Both offer the same taps and the same call.
`DetectionFeatures` reads a network that was trained to detect, which pools and goes on by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rcnn_svm.boxes import Boxes, as_boxes, widen
from rcnn_svm.errors import ConfigError
from rcnn_svm.features.roi_pool import roi_align, roi_max_pool
from rcnn_svm.features.sizes import resize, rows_of_scales
from rcnn_svm.features.store import Featurizer, RowReader
from rcnn_svm.features.warp import WarpMode, warp_crops, warp_geometry
from rcnn_svm.networks.backbone import Backbone
from rcnn_svm.networks.detection import DetectionNetwork, Pyramid
from rcnn_svm.networks.geometry import LayerInfo
from rcnn_svm.networks.taps import TapSpec, format_taps, parse_taps
from rcnn_svm.structures import Image, require_image

__all__ = ["DetectionFeatures", "SharedFeatures", "WarpedFeatures", "seen_part"]

_VERSION = 4
"""To be raised whenever the same settings give other numbers, so that stored features are not mixed up."""
_SAMPLING = 0
"""Samples per cell and axis of RoIAlign: as many as the cell is long, so that nothing is skipped."""
_POOLED_AT_ONCE, _MULTIPLIED_AT_ONCE = 16, 512
"""Regions at a time through a last pooling that is not fused, whose input should stay in the
cache, and through the matrix products after it, which want many rows."""
_CROPS_A_THREAD = 4
"""Crops of a batch that every thread of the CPU gets, at least."""


_N = TypeVar("_N", Backbone, DetectionNetwork)


class _Features(ABC, Generic[_N]):
    """What all ways of computing features share: taps, their columns, device, identity."""

    def __init__(
        self,
        backbone: _N,
        taps: str | Sequence[TapSpec],
        device: str,
    ) -> None:
        parsed = parse_taps(taps) if isinstance(taps, str) else tuple(taps)
        if not parsed:
            raise ConfigError(f"{type(self).__name__}: needs at least one tap, for example fc7.")
        self.taps = tuple(backbone.resolve(tap) for tap in parsed)
        self.device = device
        self.backbone: _N = backbone.for_inference(device)
        ends = np.cumsum([0, *(backbone.n_features(tap) for tap in self.taps)]).tolist()
        self.columns = dict(zip(self.taps, map(slice, ends[:-1], ends[1:]), strict=True))
        self.n_features: int = ends[-1]

    @abstractmethod
    def of_image(self, image: Image) -> RowReader:
        """Return a function from (R, 4) boxes of one image to their (R, D) float32 features.

        It may be called several times: what the regions of an image share is computed once.

        Args:
            image: uint8 (H, W, 3) RGB.
        """

    def __call__(self, image: Image, boxes: Boxes) -> NDArray[np.float32]:
        """Return (R, D) float32: the taps of every region side by side, in the order given.

        Args:
            image: uint8 (H, W, 3) RGB.
            boxes: (R, 4) half-open pixels.
        """
        return self.of_image(image)(boxes)

    def compute(self, image: Image, boxes: Boxes) -> dict[str, NDArray[np.float32]]:
        """Return the taps of every region apart, by name, from one pass: name -> (R, D_tap) float32."""
        features = self(image, boxes)
        return {str(tap): features[:, columns] for tap, columns in self.columns.items()}

    @abstractmethod
    def seen(self, tap: TapSpec, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Return the part of an image that a tap reads each region from, which may leave the image.

        Args:
            tap: one of `taps`; its cells divide the part evenly.
            boxes: (R, 4).
            size: (height, width) of the image.

        Returns:
            (R, 4) pixels.
        """

    def _key(self, path: str, **settings: Any) -> dict[str, Any]:
        return {
            "path": path,
            "version": _VERSION,
            "backbone": self.backbone.name,
            "weights": self.backbone.digest,
            "taps": format_taps(self.taps),
            **settings,
        }

    def _upload(self, array: NDArray[np.float32]) -> Tensor:
        """(B, H, W, 3) array to a channels-last (B, 3, H, W) tensor, without a copy on the CPU."""
        return torch.from_numpy(array).permute(0, 3, 1, 2).to(self.device)

    def _store(self, out: NDArray[np.float32], rows: Any, tap: TapSpec, value: Tensor) -> None:
        """Bring one layer's output onto the tap's grid and put it into its columns."""
        if value.ndim == 4 and tap.grid is not None and tuple(value.shape[2:]) != tap.grid:
            value = functional.adaptive_avg_pool2d(value, tap.grid)
        out[rows, self.columns[tap]] = value.flatten(1).float().cpu().numpy()


class WarpedFeatures(_Features[Backbone]):
    """Features of regions warped to the network's input, one crop each, as in R-CNN.

    Args:
        backbone: the network.
        taps: which layers to read, `"fc7"` or `"pool5,fc7"`. A convolutional layer is averaged onto its grid.
        crop_size: side of the crops in pixels; None takes the backbone's own.
        padding: context around a region, in pixels of the crop; None takes the backbone's own.
        mode: `warp` stretches a region to a square, `square` takes the tightest square around it.
        batch_size: crops at a time; None takes what was fastest for this backbone on one thread of a CPU, at
            least 4 a thread (256 elsewhere).
        device: where torch runs. Off the CPU the crops are cut on the device from one uploaded image.

    Raises:
        ConfigError: an unknown layer, or a tap that widens regions (give more `padding` instead).
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: str | Sequence[TapSpec] = "fc7",
        *,
        crop_size: int | None = None,
        padding: int | None = None,
        mode: WarpMode = "warp",
        batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(backbone, taps, device)
        for tap in self.taps:
            if tap.widen != 1:
                raise ConfigError(f"WarpedFeatures: {tap} widens regions, which warping does by its padding.")
        self.crop_size = crop_size or backbone.crop_size
        self.padding = backbone.padding if padding is None else padding
        self.mode: WarpMode = mode
        self._on_cpu = torch.device(device).type == "cpu"
        self._batch_size = batch_size
        warp_geometry(np.zeros((0, 4)), (1, 1), self.crop_size, padding=self.padding, mode=mode)

    @property
    def batch_size(self) -> int:
        """Crops at a time, with as many threads as torch has now."""
        if self._batch_size is not None:
            return self._batch_size
        if not self._on_cpu:
            return 256
        return max(self.backbone.batch_size, _CROPS_A_THREAD * torch.get_num_threads())

    def seen(self, tap: TapSpec, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Return the windows, (R, 4), that the crops are cut from: the regions with their context."""
        found = warp_geometry(boxes, size, self.crop_size, padding=self.padding, mode=self.mode)
        return found.expanded.astype(np.float32)

    @property
    def key(self) -> dict[str, Any]:
        """Identity of these features; the batch size and the device do not belong to it."""
        return self._key("warped", crop_size=self.crop_size, padding=self.padding, mode=self.mode)

    def of_image(self, image: Image) -> RowReader:
        """Return a function from (R, 4) boxes of one image to their (R, D) float32 features."""
        normalised = self.backbone.normalise(image)
        layers = {tap.layer for tap in self.taps}

        @torch.inference_mode()
        def read(boxes: Boxes) -> NDArray[np.float32]:
            boxes = as_boxes(boxes, where="WarpedFeatures")
            out = np.empty((len(boxes), self.n_features), np.float32)
            for rows, crops in self._batches(normalised, boxes):
                outputs = self.backbone(crops, layers)
                for tap in self.taps:
                    self._store(out, rows, tap, outputs[tap.layer])
            return out

        return read

    def _batches(self, image: NDArray[np.float32], boxes: Boxes) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows and their (B, 3, S, S) crops."""
        size, settings, n = self.crop_size, {"padding": self.padding, "mode": self.mode}, self.batch_size
        if not self._on_cpu:
            source = self._upload(image[None])
            expanded = warp_geometry(boxes, image.shape[:2], size, **settings).expanded  # type: ignore[arg-type]
            windows = torch.from_numpy(expanded).float().to(self.device)
        else:  # one buffer for all batches: fresh memory costs as much as the warping
            buffer = np.empty((min(n, len(boxes)), size, size, 3), np.float32)
        for start in range(0, len(boxes), n):
            rows = slice(start, min(start + n, len(boxes)))
            if self._on_cpu:
                crops = buffer[: rows.stop - start]
                yield rows, self._upload(warp_crops(image, boxes[rows], size, out=crops, **settings))  # type: ignore[arg-type]
            else:
                yield rows, crops_on_device(source, windows[rows], size)


def crops_on_device(image: Tensor, windows: Tensor, crop_size: int) -> Tensor:
    """Cut (B, 3, S, S) crops where the image lies: one bilinear sample per pixel, zero outside.

    Equals `warp_crops` but for the outermost half pixel of a window, which is interpolated with the image
    around it instead of being repeated, and for the rounding of the fill's width to whole pixels.

    Args:
        image: (1, 3, H, W), normalised.
        windows: (B, 4) expanded regions, see `WarpGeometry`.
        crop_size: S.
    """
    crops: Tensor = torchvision.ops.roi_align(
        image, [windows], crop_size, spatial_scale=1.0, sampling_ratio=1, aligned=True
    )
    return crops


class SharedFeatures(_Features[Backbone]):
    """Features of regions pooled from convolutions that ran once over the whole image.

    Convolutional taps are pooled by RoIAlign onto their grid. Region layers (the last pooling, fc6, fc7,
    penultimate, logits) see each region on as many cells as a crop would have had, so that they find what
    they were trained on.

    Args:
        backbone: the network.
        taps: which layers to read, for example `"block13@3x3,block17@1x1,block17@1x1*1.8"` or `"fc7"`.
        longer_sides: the image is resized so that its longer side has this many pixels. With several, each
            region is read at the scale where its side (root of its area) is nearest to 224 pixels.
        device: where torch runs.

    Raises:
        ConfigError: an unknown layer, or a side below 32 pixels.

    References:
        He et al., SPP-net, arXiv 1406.4729.
    """

    def __init__(
        self,
        backbone: Backbone,
        taps: str | Sequence[TapSpec],
        *,
        longer_sides: Sequence[int] = (480,),
        device: str = "cpu",
    ) -> None:
        super().__init__(backbone, taps, device)
        self.longer_sides = tuple(longer_sides)
        if not self.longer_sides or min(self.longer_sides) < 32:
            raise ConfigError(
                f"SharedFeatures: longer_sides must be one or more sizes of at least 32 pixels, "
                f"got {self.longer_sides}."
            )
        for tap in self.taps:
            backbone.check_shared(tap.layer)
        self._map_taps = [tap for tap in self.taps if tap.layer in self.backbone.maps]
        self._region_taps = [tap for tap in self.taps if tap.layer in self.backbone.regions]
        self._layers = {tap.layer for tap in self._map_taps}
        if self._region_taps:
            self._layers.add(self.backbone.entry)

    def seen(self, tap: TapSpec, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Return the regions, (R, 4), widened as the tap widens them."""
        return np.broadcast_to(seen_part(boxes, tap.widen, size), boxes.shape)

    @property
    def key(self) -> dict[str, Any]:
        """Identity of these features; the device does not belong to it."""
        return self._key("shared", longer_sides=list(self.longer_sides))

    def of_image(self, image: Image) -> RowReader:
        """Return a function from (R, 4) boxes of one image to their (R, D) float32 features.

        The convolutions run when it is first called, at each scale that the boxes need.
        """
        return self.of_image_with(image)[0]

    def reads_with(self, other: Featurizer) -> bool:
        """Whether other features are of the same network, sizes of images and device, see `of_image_with`."""
        return isinstance(other, SharedFeatures) and (
            (other.backbone.digest, other.longer_sides, other.device)
            == (self.backbone.digest, self.longer_sides, self.device)
        )

    def of_image_with(self, image: Image, *others: SharedFeatures) -> list[RowReader]:
        """Return what `of_image` does for these and for other features, whose convolutions run once for all.

        Args:
            image: uint8 (H, W, 3) RGB.
            others: such as `reads_with` takes.

        Raises:
            ConfigError: they are of another network, size or device.
        """
        if not all(map(self.reads_with, others)):
            raise ConfigError("SharedFeatures: features that are read together must be of one network.")
        require_image("SharedFeatures", image)
        scales = [side / max(image.shape[:2]) for side in self.longer_sides]
        seen: dict[int, _Scale] = {}
        layers = set().union(*(features._layers for features in (self, *others)))

        @torch.inference_mode()
        def read(features: SharedFeatures, boxes: Boxes) -> NDArray[np.float32]:
            boxes = as_boxes(boxes, where="SharedFeatures")
            out = np.empty((len(boxes), features.n_features), np.float32)
            for i, rows in rows_of_scales(boxes, scales):
                if i not in seen:
                    seen[i] = self._at_scale(image, scales[i], layers)
                features._pool(out, rows, seen[i], boxes[rows], image.shape[:2])
            return out

        return [partial(read, features) for features in (self, *others)]

    def _at_scale(self, image: Image, scale: float, wanted: set[str]) -> _Scale:
        resized, factor = resize(image, scale)
        layers = self.backbone.layers_on((resized.shape[0], resized.shape[1]))
        maps = self.backbone.run_maps(self._upload(self.backbone.normalise(resized)[None]), wanted)
        return {name: _Map(value, layers[name]) for name, value in maps.items()}, factor

    def _pool(
        self,
        out: NDArray[np.float32],
        rows: NDArray[np.int64],
        seen: _Scale,
        boxes: Boxes,
        size: tuple[int, ...],
    ) -> None:
        sources, factor = seen
        for tap in self._map_taps:
            assert tap.grid is not None  # `resolve` filled it in
            regions = seen_part(boxes, tap.widen, size) * factor
            out[rows, self.columns[tap]] = sources[tap.layer].pool(regions, tap.grid, _SAMPLING).cpu().numpy()
        for factor_of_regions in dict.fromkeys(tap.widen for tap in self._region_taps):
            taps = [tap for tap in self._region_taps if tap.widen == factor_of_regions]
            parts = seen_part(boxes, factor_of_regions, size)
            regions = np.broadcast_to(parts, boxes.shape) * factor
            self._region_layers(out, rows, sources[self.backbone.entry], regions, taps)

    def _region_layers(
        self,
        out: NDArray[np.float32],
        rows: NDArray[np.int64],
        source: _Map,
        regions: NDArray[np.floating],
        taps: Sequence[TapSpec],
    ) -> None:
        grid = self.backbone.entry_grid
        layers = {tap.layer for tap in taps}
        # Sample where the cells of a crop lie: their centres are origin + i * stride of crop_size pixels,
        # which a regular grid over the region has only where origin = stride / 2.
        info = self.backbone.layers[self.backbone.entry]
        first = (info.origin[0] - info.stride / 2) / self.backbone.crop_size
        last = first + grid * info.stride / self.backbone.crop_size
        low, side = regions[:, :2], regions[:, 2:] - regions[:, :2]
        regions = np.concatenate([low + first * side, low + last * side], axis=1)
        for start in range(0, len(regions), _MULTIPLIED_AT_ONCE):
            block = regions[start : start + _MULTIPLIED_AT_ONCE]
            outputs = self.backbone.run_pooled(self._pooled(source, block), layers)
            for tap in taps:
                self._store(out, rows[start : start + len(block)], tap, outputs[tap.layer])

    def _pooled(self, source: _Map, regions: NDArray[np.floating]) -> Tensor:
        """Return (R, C, n, n): what the first region layer makes of each region."""
        grid, pooling = self.backbone.entry_grid, self.backbone.max_pooling()
        if pooling is not None and source.on_cpu:
            return source.max_pool(regions, grid, *pooling)
        return torch.cat(
            [
                self.backbone.pool_regions(source.grids(regions[i : i + _POOLED_AT_ONCE], grid))
                for i in range(0, len(regions), _POOLED_AT_ONCE)
            ]
        )


class DetectionFeatures(_Features[DetectionNetwork]):
    """Features of regions as a network that was trained to detect reads them itself.

    Its convolutions run once per image, at the size that it was trained on; RoIAlign takes each region from
    the map of its size, and its fully connected layers follow, up to the last before its class scores.

    Args:
        network: that is read.
        taps: which layers, `"fc7"` or `"roi@3x3,fc6*1.8"`.
        device: where torch runs.

    Raises:
        ConfigError: an unknown layer.

    References:
        Lin et al., Feature Pyramid Networks, arXiv 1612.03144; Ren et al., Faster R-CNN, arXiv 1506.01497.
    """

    def __init__(
        self, network: DetectionNetwork, taps: str | Sequence[TapSpec], *, device: str = "cpu"
    ) -> None:
        super().__init__(network, taps, device)

    def seen(self, tap: TapSpec, boxes: Boxes, size: tuple[int, int]) -> Boxes:
        """Return the regions, (R, 4), widened as the tap widens them."""
        return np.broadcast_to(seen_part(boxes, tap.widen, size), boxes.shape)

    @property
    def key(self) -> dict[str, Any]:
        """Identity of these features; the device does not belong to it."""
        return self._key("detection")

    def of_image(self, image: Image) -> RowReader:
        """Return a function from (R, 4) boxes of one image to their (R, D) float32 features."""
        return self.of_image_with(image)[0]

    def reads_with(self, other: Featurizer) -> bool:
        """Whether other features are of the same network and device, see `of_image_with`."""
        return isinstance(other, DetectionFeatures) and (
            (other.backbone.digest, other.device) == (self.backbone.digest, self.device)
        )

    def of_image_with(self, image: Image, *others: DetectionFeatures) -> list[RowReader]:
        """Return what `of_image` does for these and for other features, whose convolutions run once for all.

        Args:
            image: uint8 (H, W, 3) RGB.
            others: such as `reads_with` takes.

        Raises:
            ConfigError: they are of another network or device.
        """
        if not all(map(self.reads_with, others)):
            raise ConfigError("DetectionFeatures: features that are read together must be of one network.")
        seen: list[Pyramid] = []

        def read(features: DetectionFeatures, boxes: Boxes) -> NDArray[np.float32]:
            boxes = as_boxes(boxes, where="DetectionFeatures")
            out = np.empty((len(boxes), features.n_features), np.float32)
            if len(boxes):
                if not seen:
                    seen.append(self.backbone.look(image))
                features._fill(out, seen[0], boxes)
            return out

        return [partial(read, features) for features in (self, *others)]

    def _fill(self, out: NDArray[np.float32], seen: Pyramid, boxes: Boxes) -> None:
        for factor in dict.fromkeys(tap.widen for tap in self.taps):
            taps = [tap for tap in self.taps if tap.widen == factor]
            layers = {tap.layer for tap in taps}
            parts = seen_part(boxes, factor, seen.size)
            for start in range(0, len(parts), _MULTIPLIED_AT_ONCE):
                block = parts[start : start + _MULTIPLIED_AT_ONCE]
                outputs = self.backbone.read(seen, block, layers)
                # The image as a whole is one part for all regions.
                rows = slice(start, start + len(block)) if len(parts) == len(boxes) else slice(None)
                for tap in taps:
                    self._store(out, rows, tap, outputs[tap.layer])


def seen_part(boxes: Boxes, factor: float, size: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the part of the image that each region is seen with: (R, 4), or (1, 4) the same for all."""
    if math.isinf(factor):
        return np.array([[0, 0, size[1], size[0]]], np.float32)
    return widen(boxes, factor)


class _Map:
    """One layer's output for one image, ready to be pooled."""

    def __init__(self, value: Tensor, info: LayerInfo) -> None:
        self._info = info
        self._value = value
        self._array = (
            np.ascontiguousarray(value[0].permute(1, 2, 0).numpy()) if value.device.type == "cpu" else None
        )

    def pool(self, regions: NDArray[np.floating], grid: tuple[int, int], sampling: int) -> Tensor:
        """Return (R, C * rows * columns) of regions in pixels of the resized image."""
        cells = self._info.cells(regions)
        if self._array is not None:
            return torch.from_numpy(roi_align(self._array, cells, grid, sampling=sampling))
        return self._on_device(cells, grid, sampling).flatten(1)

    @property
    def on_cpu(self) -> bool:
        """Whether the map lies where numpy reads it."""
        return self._array is not None

    def max_pool(self, regions: NDArray[np.floating], side: int, kernel: int, stride: int) -> Tensor:
        """Return (R, C, n, n): `grids` after max pooling; the map must be on the CPU."""
        assert self._array is not None
        cells = self._info.cells(regions)
        return torch.from_numpy(roi_max_pool(self._array, cells, side, kernel, stride))

    def grids(self, regions: NDArray[np.floating], side: int) -> Tensor:
        """Return (R, C, side, side), channels-last: one sample a cell, a plain resize of the region."""
        cells = self._info.cells(regions)
        if self._array is None:
            return self._on_device(cells, (side, side), 1)
        rows = roi_align(self._array, cells, (side, side), sampling=1, cells_first=True)
        return torch.from_numpy(rows).view(len(rows), side, side, -1).permute(0, 3, 1, 2)

    def _on_device(self, cells: NDArray[np.float32], grid: tuple[int, int], sampling: int) -> Tensor:
        rois = torch.from_numpy(cells).to(self._value.device)
        pooled: Tensor = torchvision.ops.roi_align(
            self._value, [rois], grid, sampling_ratio=sampling or -1, aligned=True
        )
        return pooled


_Scale: TypeAlias = tuple[dict[str, _Map], NDArray[np.float64]]
"""The maps of an image at one size, and the factors that bring (R, 4) boxes to it."""
