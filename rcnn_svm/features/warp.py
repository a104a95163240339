"""Cut regions out of an image and warp them to the network's input, with context: R-CNN's own geometry.

A region is grown so that, after warping, `padding` pixels of context surround it on every side; what lies
outside the image is filled. This module needs numpy and OpenCV only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rcnn_svm.boxes import as_boxes, round_half_away
from rcnn_svm.errors import ConfigError, ShapeError
from rcnn_svm.opencv import cv2

__all__ = ["WarpGeometry", "WarpMode", "warp_crops", "warp_geometry"]

WarpMode = Literal["warp", "square"]
Pixel = TypeVar("Pixel", np.uint8, np.float32)


@dataclass(frozen=True, eq=False)
class WarpGeometry:
    """Where each crop is read and where it lands; all arrays are int64 with one row per region.

    Attributes:
        expanded: (R, 4) the region with its context, half-open, may leave the image.
        source: (R, 4) `expanded` clipped to the image.
        offset: (R, 2) x, y of the resized source inside the crop.
        extent: (R, 2) width, height of the resized source inside the crop; 0 where nothing is visible.
    """

    expanded: NDArray[np.int64]
    source: NDArray[np.int64]
    offset: NDArray[np.int64]
    extent: NDArray[np.int64]


def warp_geometry(
    boxes: ArrayLike,
    image_size: tuple[int, int],
    crop_size: int,
    *,
    padding: int = 16,
    mode: WarpMode = "warp",
) -> WarpGeometry:
    """Compute the crop windows of R-CNN.

    Halves are rounded away from zero. The published code keeps inclusive pixels, so that the window is one
    pixel larger on the right and at the bottom than a symmetric one; this is reproduced. Without context
    (`padding=0`, mode `warp`) the region is read as it is.

    Args:
        boxes: (R, 4) half-open pixels.
        image_size: (height, width).
        crop_size: side of the crop, in pixels.
        padding: context after warping, in pixels on each side; 0 <= 2 * padding < crop_size.
        mode: `warp` stretches the region to a square; `square` takes the tightest square around it.

    Raises:
        ConfigError: an argument is out of range.

    References:
        Girshick et al., arXiv 1311.2524v5, appendix A; rbgirshick/rcnn, utils/rcnn_im_crop.m.
    """
    if mode not in get_args(WarpMode):
        raise ConfigError(f"warp_geometry: mode must be 'warp' or 'square', got {mode!r}.")
    if not 0 <= 2 * padding < crop_size:
        raise ConfigError(
            f"warp_geometry: padding must be at least 0 and below half the crop's {crop_size} pixels, "
            f"got {padding}."
        )
    array = as_boxes(boxes, where="warp_geometry").astype(np.float64)
    height, width = image_size
    low, high = array[:, :2], array[:, 2:]
    if padding == 0 and mode == "warp":
        first, last = round_half_away(low), round_half_away(high) - 1
    else:
        half = (high - low) / 2  # (R, 2)
        centre = low + half
        if mode == "square":
            half = np.repeat(half.max(axis=1, keepdims=True), 2, axis=1)
        half = half * (crop_size / (crop_size - 2 * padding))
        # Rounding happens in 1-based coordinates, where the published code does it.
        first = round_half_away(centre + 1 - half) - 1
        last = round_half_away(centre + 1 + half) - 1  # inclusive
    side = np.maximum(last - first + 1, 1)
    limit = np.array([width, height], np.int64)
    clipped_first, clipped_stop = np.maximum(first, 0), np.minimum(last + 1, limit)
    visible = np.maximum(clipped_stop - clipped_first, 0)
    scale = crop_size / side
    offset = round_half_away(np.maximum(-first, 0) * scale)
    extent = np.minimum(round_half_away(visible * scale), crop_size - offset)
    extent = np.where((visible > 0).all(axis=1, keepdims=True), np.maximum(extent, 0), 0)
    return WarpGeometry(
        expanded=np.concatenate([first, first + side], axis=1),
        source=np.concatenate([clipped_first, clipped_first + visible], axis=1),
        offset=offset,
        extent=extent,
    )


def warp_crops(
    image: NDArray[Pixel],
    boxes: ArrayLike,
    crop_size: int,
    *,
    padding: int = 16,
    mode: WarpMode = "warp",
    fill: ArrayLike = 0,
    out: NDArray[Pixel] | None = None,
) -> NDArray[Pixel]:
    """Cut and warp regions, bilinear and without anti-aliasing, as the published code does.

    To fill with the mean, normalise the image first (the mean becomes zero) and keep `fill=0`.

    Args:
        image: (H, W, 3) uint8 or float32.
        boxes: (R, 4) half-open pixels.
        crop_size: side S of the crops.
        padding: context in pixels of the crop, see `warp_geometry`.
        mode: `warp` or `square`.
        fill: value, or one per channel, of what lies outside the image.
        out: (R, S, S, 3) C-contiguous array of the image's dtype to write to.

    Returns:
        (R, S, S, 3) of the image's dtype.

    Raises:
        ShapeError: `image` or `out` has the wrong shape.
        ConfigError: an argument is out of range.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ShapeError(f"warp_crops: image must have shape (H, W, 3), got {image.shape}.")
    height, width = image.shape[:2]
    geometry = warp_geometry(boxes, (height, width), crop_size, padding=padding, mode=mode)
    shape = (len(geometry.source), crop_size, crop_size, 3)
    if out is None:
        out = np.empty(shape, image.dtype)
    elif out.shape != shape:
        raise ShapeError(f"warp_crops: out must have shape {shape}, got {out.shape}.")
    windows = zip(
        out,
        geometry.source.tolist(),
        geometry.offset.tolist(),
        geometry.extent.tolist(),
        strict=True,
    )
    for crop, (x1, y1, x2, y2), (left, top), (wide, high) in windows:
        if wide == crop_size and high == crop_size:
            cv2.resize(image[y1:y2, x1:x2], (wide, high), dst=crop, interpolation=cv2.INTER_LINEAR)
            continue
        crop[:] = fill
        if wide > 0 and high > 0:
            crop[top : top + high, left : left + wide] = cv2.resize(
                image[y1:y2, x1:x2], (wide, high), interpolation=cv2.INTER_LINEAR
            )
    return out
