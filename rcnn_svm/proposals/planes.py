"""From RGB pixels to colour planes, smoothed planes and histogram codes.

All arithmetic is on integers, or on float32 values that are integers: a result never depends
on the order in which a compiler adds. Needs numba.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.proposals.compiled import kernel

__all__ = [
    "CODE_BITS",
    "COLOUR_BINS",
    "ORIENTATIONS",
    "SMOOTH_UNIT",
    "TEXTURE_BINS",
    "TEXTURE_RANGE",
    "colour_planes",
    "lab_tables",
    "plane_codes",
    "smooth",
    "smoothing_taps",
]

SMOOTH_UNIT = 32
"""Smoothed planes hold grey levels times 32, rounded."""

COLOUR_BINS = 25
TEXTURE_BINS = 10
ORIENTATIONS = 8
TEXTURE_RANGE = 0.4 * 255
"""Largest derivative with a bin of its own: a unit step seen by a Gaussian derivative of sigma 1."""

CODE_BITS = 5
_TAP_UNIT = 2048

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
_FROM_TAPS = np.float32(SMOOTH_UNIT / _TAP_UNIT)
_FROM_TAPS_AGAIN = np.float32(1 / _TAP_UNIT)


@functools.cache
def lab_tables() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (256,) linear light of an sRGB level and (2049,) the CIE cube-root function, as integers."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    t = np.arange(_LINEAR_UNIT + 1) / _LINEAR_UNIT
    root = np.where(t > 216 / 24389, np.cbrt(t), t * (24389 / 27) / 116 + 16 / 116)
    return np.rint(linear * _LINEAR_UNIT).astype(np.int32), np.rint(root * _CUBE_UNIT).astype(np.int32)


def smoothing_taps(sigma: float) -> NDArray[np.float32]:
    """Return the odd-length Gaussian kernel, integers that sum to 2048, cut at 4 sigma."""
    radius = int(np.ceil(4 * sigma))
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (x / sigma) ** 2) if sigma > 0 else np.ones(1)
    taps = np.rint(weights / weights.sum() * _TAP_UNIT)
    taps[radius] += _TAP_UNIT - taps.sum()
    used = int(np.flatnonzero(taps)[0])
    return np.asarray(taps[used : len(taps) - used], np.float32)


@kernel("(u1[:,:,::1], i8, i4[::1], i4[::1], u1[:,:,::1])")
def colour_planes(image: Any, space: int, linear: Any, root: Any, out: Any) -> None:
    """Fill `out` (3, H, W) with the planes of a colour space: 0 HSV, 1 Lab, 2 normalised r, g, intensity.

    Each plane covers 0 .. 255. Hue is 0 for grey and runs round once; Lab is L * 2.55 and
    a, b + 128 under D65.
    """
    height, width, _ = image.shape
    for y in range(height):
        if space == 0:
            for x in range(width):
                r = np.float32(image[y, x, 0])
                g = np.float32(image[y, x, 1])
                b = np.float32(image[y, x, 2])
                high = max(r, max(g, b))
                spread = high - min(r, min(g, b))
                part = _ONE / max(spread, _ONE)
                hue = (g - b) * part
                hue = hue + _SIX if hue < _F0 else hue
                hue = _TWO + (b - r) * part if (g == high and r != high) else hue
                hue = _FOUR + (r - g) * part if (b == high and r != high and g != high) else hue
                out[0, y, x] = np.uint8(np.int32(hue * _HUE + _HALF))
                out[1, y, x] = np.uint8(np.int32(spread * _255 / max(high, _ONE) + _HALF))
                out[2, y, x] = np.uint8(np.int32(high))
        elif space == 1:
            for x in range(width):
                r0 = linear[image[y, x, 0]]
                g0 = linear[image[y, x, 1]]
                b0 = linear[image[y, x, 2]]
                # sRGB primaries over the D65 white point, rows that sum to 4096
                fx = root[(1777 * r0 + 1541 * g0 + 778 * b0 + 2048) >> 12]
                fy = root[(871 * r0 + 2929 * g0 + 296 * b0 + 2048) >> 12]
                fz = root[(73 * r0 + 448 * g0 + 3575 * b0 + 2048) >> 12]
                # 2.55 * (116 f - 16), 500 (fx - fy), 200 (fy - fz), with f in units of 1/4096
                out[0, y, x] = np.uint8(min(max((29580 * fy - 16711680 + 204800) // 409600, 0), 255))
                out[1, y, x] = np.uint8(min(max((500 * (fx - fy) + 526336) >> 12, 0), 255))
                out[2, y, x] = np.uint8(min(max((200 * (fy - fz) + 526336) >> 12, 0), 255))
        else:
            for x in range(width):
                r = np.float32(image[y, x, 0])
                g = np.float32(image[y, x, 1])
                b = np.float32(image[y, x, 2])
                total = max(r + g + b, _ONE)
                out[0, y, x] = np.uint8(np.int32(r * _255 / total + _HALF))
                out[1, y, x] = np.uint8(np.int32(g * _255 / total + _HALF))
                light = 77 * np.int32(image[y, x, 0]) + 150 * np.int32(image[y, x, 1])
                out[2, y, x] = np.uint8((light + 29 * np.int32(image[y, x, 2]) + 128) >> 8)


@kernel("(u1[:,::1], f4[::1], f4[:,::1])")
def smooth(plane: Any, taps: Any, out: Any) -> None:
    """Blur `plane` (H, W) into `out` (H, W) float32, integers in units of 1/32; borders repeat."""
    height, width = plane.shape
    radius = len(taps) // 2
    ring = np.empty((2 * radius + 1, width), np.float32)  # horizontally blurred rows
    padded = np.empty(width + 2 * radius, np.float32)
    row = np.empty(width, np.float32)
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
            for x in range(width):
                target[x] = np.float32(np.int32(target[x] * _FROM_TAPS + _HALF))
            done += 1
        for x in range(width):
            row[x] = _F0
        for t in range(len(taps)):
            source = ring[min(max(y + t - radius, 0), height - 1) % len(taps)]
            for x in range(width):
                row[x] += taps[t] * source[x]
        for x in range(width):
            out[y, x] = np.float32(np.int32(row[x] * _FROM_TAPS_AGAIN + _HALF))


# Scharr's stencil sums to 32 per grey level of slope; the smoothed plane adds its own unit.
_TO_BIN = np.float32(TEXTURE_BINS / (TEXTURE_RANGE * 32 * SMOOTH_UNIT))
_TO_BIN_DIAGONAL = np.float32(TEXTURE_BINS / (TEXTURE_RANGE * 32 * SMOOTH_UNIT * np.sqrt(2)))
_THREE = np.float32(3)
_TEN = np.float32(10)
_LAST_BIN = np.int32(TEXTURE_BINS - 1)


@kernel("(u1[:,::1], f4[:,::1], u4[:,::1])")
def plane_codes(plane: Any, smoothed: Any, out: Any) -> None:
    """Pack a pixel's five histogram bins of one plane into 25 bits.

    From the low end, 5 bits each: the signed bins of the derivatives at 0, 45, 90 and 135
    degrees (0 .. 9 for a response >= 0, 10 .. 19 for a negative one), then the colour bin.
    Scharr's stencil (side weights 3, 10, 3: variance .375) on planes smoothed with sigma .8
    makes a Gaussian derivative of sigma 1.0.
    """
    height, width = plane.shape
    for y in range(height):
        above = smoothed[max(y - 1, 0)]
        here = smoothed[y]
        below = smoothed[min(y + 1, height - 1)]
        for x in range(width):
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            diagonal_1 = below[right] - above[left]
            diagonal_2 = above[right] - below[left]
            gx = _THREE * (diagonal_1 + diagonal_2) + _TEN * (here[right] - here[left])
            gy = _THREE * (diagonal_1 - diagonal_2) + _TEN * (below[x] - above[x])
            rising, falling = gx + gy, gy - gx
            b0 = min(np.int32(abs(gx) * _TO_BIN), _LAST_BIN)
            b1 = min(np.int32(abs(rising) * _TO_BIN_DIAGONAL), _LAST_BIN)
            b2 = min(np.int32(abs(gy) * _TO_BIN), _LAST_BIN)
            b3 = min(np.int32(abs(falling) * _TO_BIN_DIAGONAL), _LAST_BIN)
            b0 += np.int32(10) if gx < _F0 else np.int32(0)
            b1 += np.int32(10) if rising < _F0 else np.int32(0)
            b2 += np.int32(10) if gy < _F0 else np.int32(0)
            b3 += np.int32(10) if falling < _F0 else np.int32(0)
            colour = (np.int32(plane[y, x]) * np.int32(25)) >> 8
            out[y, x] = np.uint32(b0 | (b1 << 5) | (b2 << 10) | (b3 << 15) | (colour << 20))
