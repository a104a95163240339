"""From RGB pixels to colour planes, smoothed planes and histogram codes.

All arithmetic is on integers, or IEEE float32 in one fixed order (kernels are compiled without
fastmath): the same pixels give the same bits on every machine. Needs numba.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.compiled import kernel

__all__ = [
    "COLOUR_BINS",
    "ORIENTATIONS",
    "TEXTURE_BINS",
    "TEXTURE_RANGE",
    "colour_planes",
    "lab_tables",
    "plane_codes",
    "smooth",
    "smoothing_taps",
]

COLOUR_BINS = 25
TEXTURE_BINS = 10
ORIENTATIONS = 8
TEXTURE_RANGE = 0.4 * 255
"""Largest derivative with a bin of its own: a unit step seen by a Gaussian derivative of sigma 1."""

_LINEAR_UNIT = 2048  # linear light; 3 times it still indexes a table that fits the L1 cache
_CUBE_UNIT = 4096

_F0 = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_TWO = np.float32(2)
_FOUR = np.float32(4)
_SIX = np.float32(6)
_255 = np.float32(255)
_HUE = np.float32(255 / 6)
_LIGHTNESS = np.float32(2.55 * 116 / _CUBE_UNIT)
_DARK = np.float32(2.55 * 16 - 0.5)
_FROM_CUBE = np.float32(1 / _CUBE_UNIT)
_RED, _GREEN, _BLUE, _LUMA = np.float32(77), np.float32(150), np.float32(29), np.float32(1 / 256)


@functools.cache
def lab_tables() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (256,) linear light of an sRGB level and (2049,) the CIE cube-root function, as integers."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    t = np.arange(_LINEAR_UNIT + 1) / _LINEAR_UNIT
    root = np.where(t > 216 / 24389, np.cbrt(t), t * (24389 / 27) / 116 + 16 / 116)
    return np.rint(linear * _LINEAR_UNIT).astype(np.int32), np.rint(root * _CUBE_UNIT).astype(np.int32)


def smoothing_taps(sigma: float) -> NDArray[np.float32]:
    """Return the Gaussian kernel, of odd length, cut at 4 sigma."""
    radius = int(np.ceil(4 * sigma))
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (x / sigma) ** 2) if sigma > 0 else np.ones(1)
    return np.asarray(weights / weights.sum(), np.float32)


@kernel("(u1[:,:,::1], i8, i4[::1], i4[::1], u1[:,:,::1])")
def colour_planes(image: Any, space: int, linear: Any, root: Any, out: Any) -> None:
    """Fill `out` (3, H, W) with the planes of a colour space: 0 HSV, 1 Lab, 2 normalised r, g, intensity.

    Each plane covers 0 .. 255. Hue is 0 for grey and runs round once; Lab is L * 2.55 and
    a, b + 128 under D65; intensity is luma.
    """
    height, width, _ = image.shape
    channels = np.empty((3, width), np.float32)
    lights = np.empty((3, width), np.int32)
    for y in range(height):
        out_0, out_1, out_2 = out[0, y], out[1, y], out[2, y]
        reds, greens, blues = channels
        for x in range(width):  # apart from this loop and the tables, all below is vectorised
            reds[x] = np.float32(image[y, x, 0])
            greens[x] = np.float32(image[y, x, 1])
            blues[x] = np.float32(image[y, x, 2])
        if space == 0:
            for x in range(width):
                r, g, b = reds[x], greens[x], blues[x]
                high = max(r, max(g, b))
                spread = high - min(r, min(g, b))
                part = _ONE / max(spread, _ONE)
                hue = (g - b) * part
                hue = hue + _SIX if hue < _F0 else hue
                hue = _TWO + (b - r) * part if ((g == high) & (r != high)) else hue
                hue = _FOUR + (r - g) * part if ((b == high) & (r != high) & (g != high)) else hue
                out_0[x] = np.uint8(np.int32(hue * _HUE + _HALF))
                out_1[x] = np.uint8(np.int32(spread * _255 / max(high, _ONE) + _HALF))
                out_2[x] = np.uint8(np.int32(high))
        elif space == 1:
            fx, fy, fz = lights
            for x in range(width):
                fx[x] = linear[np.uint64(image[y, x, 0])]
                fy[x] = linear[np.uint64(image[y, x, 1])]
                fz[x] = linear[np.uint64(image[y, x, 2])]
            for x in range(width):
                r0, g0, b0 = fx[x], fy[x], fz[x]
                # sRGB primaries over the D65 white point: rows that sum to 4096
                fx[x] = root[np.uint64((1777 * r0 + 1541 * g0 + 778 * b0 + 2048) >> 12)]
                fy[x] = root[np.uint64((871 * r0 + 2929 * g0 + 296 * b0 + 2048) >> 12)]
                fz[x] = root[np.uint64((73 * r0 + 448 * g0 + 3575 * b0 + 2048) >> 12)]
            for x in range(width):
                a = np.float32(500 * (fx[x] - fy[x]) + 526336) * _FROM_CUBE
                b1 = np.float32(200 * (fy[x] - fz[x]) + 526336) * _FROM_CUBE
                out_0[x] = np.uint8(np.int32(np.float32(fy[x]) * _LIGHTNESS - _DARK))
                out_1[x] = np.uint8(np.int32(min(max(a, _F0), _255)))
                out_2[x] = np.uint8(np.int32(min(max(b1, _F0), _255)))
        else:
            for x in range(width):
                r, g, b = reds[x], greens[x], blues[x]
                total = max(r + g + b, _ONE)
                out_0[x] = np.uint8(np.int32(r * _255 / total + _HALF))
                out_1[x] = np.uint8(np.int32(g * _255 / total + _HALF))
                out_2[x] = np.uint8(np.int32((_RED * r + _GREEN * g + _BLUE * b) * _LUMA + _HALF))


@kernel("(u1[:,::1], f4[::1], f4[:,::1])")
def smooth(plane: Any, taps: Any, out: Any) -> None:
    """Blur `plane` (H, W) into `out` (H, W) float32, in grey levels; borders repeat."""
    height, width = plane.shape
    radius = len(taps) // 2
    ring = np.empty((2 * radius + 1, width), np.float32)  # horizontally blurred rows
    padded = np.empty(width + 2 * radius, np.float32)
    done = 0
    for y in range(height):
        last = min(y + radius, height - 1)
        while done <= last:
            for x in range(width):
                padded[radius + x] = np.float32(plane[done, x])
            for x in range(radius):
                padded[x] = padded[radius]
                padded[radius + width + x] = padded[radius + width - 1]
            target = ring[done % len(taps)]
            for x in range(width):
                target[x] = _F0
            for t in range(len(taps)):
                for x in range(width):
                    target[x] += taps[t] * padded[x + t]
            done += 1
        row = out[y]
        for x in range(width):
            row[x] = _F0
        for t in range(len(taps)):
            source = ring[min(max(y + t - radius, 0), height - 1) % len(taps)]
            for x in range(width):
                row[x] += taps[t] * source[x]


# Scharr's stencil sums to 32 per grey level of slope.
_TO_BIN = np.float32(TEXTURE_BINS / (TEXTURE_RANGE * 32))
_TO_BIN_DIAGONAL = np.float32(TEXTURE_BINS / (TEXTURE_RANGE * 32 * np.sqrt(2)))
_THREE = np.float32(3)
_TEN = np.float32(10)
_LAST_BIN = np.float32(TEXTURE_BINS - 0.5)


@kernel("(u1[:,::1], f4[:,::1], u4[:,::1])")
def plane_codes(plane: Any, smoothed: Any, out: Any) -> None:
    """Pack a pixel's five histogram bins of one plane into 25 bits.

    From the low end, 5 bits each: the signed bins of the derivatives at 0, 45, 90 and 135
    degrees (0 .. 9 for a response >= 0, 10 .. 19 for a negative one), then the colour bin.
    Scharr's stencil (side weights 3, 10, 3: variance .375) on planes smoothed with sigma .8
    makes a Gaussian derivative of sigma 1.0.
    """
    height, width = plane.shape
    across = np.empty(width + 2, np.float32)  # smoothed down the column, for the slope along x
    along = np.empty(width + 2, np.float32)  # difference down the column, for the slope along y
    for y in range(height):
        above, here, below = smoothed[max(y - 1, 0)], smoothed[y], smoothed[min(y + 1, height - 1)]
        for x in range(width):
            across[x + 1] = _THREE * (above[x] + below[x]) + _TEN * here[x]
            along[x + 1] = below[x] - above[x]
        across[0], across[width + 1] = across[1], across[width]
        along[0], along[width + 1] = along[1], along[width]
        values, row = plane[y], out[y]
        for x in range(width):
            gx = across[x + 2] - across[x]
            gy = _THREE * (along[x] + along[x + 2]) + _TEN * along[x + 1]
            rising, falling = gx + gy, gy - gx
            b0 = np.int32(min(abs(gx) * _TO_BIN, _LAST_BIN)) + (10 if gx < _F0 else 0)
            b1 = np.int32(min(abs(rising) * _TO_BIN_DIAGONAL, _LAST_BIN)) + (10 if rising < _F0 else 0)
            b2 = np.int32(min(abs(gy) * _TO_BIN, _LAST_BIN)) + (10 if gy < _F0 else 0)
            b3 = np.int32(min(abs(falling) * _TO_BIN_DIAGONAL, _LAST_BIN)) + (10 if falling < _F0 else 0)
            colour = (np.int32(values[x]) * COLOUR_BINS) >> 8
            row[x] = np.uint32(b0 | (b1 << 5) | (b2 << 10) | (b3 << 15) | (colour << 20))
