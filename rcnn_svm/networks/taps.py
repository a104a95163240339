"""Names for what is read out of a network: `fc7`, `block13@3x3`, `block17@1x1*1.8`.

A tap names a layer by its output *before* the softmax. For a convolutional layer, `@HxW` is the grid of
cells that each region is pooled onto, `*F` widens the region about its centre before pooling, and `*image`
reads the whole image.
This module imports nothing but the standard library and `errors`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from rcnn_svm.errors import ConfigError

__all__ = ["TapSpec", "format_taps", "parse_taps"]

_PATTERN = re.compile(
    r"(?P<layer>[A-Za-z_]\w*(\.\w+)*)(@(?P<h>\d+)x(?P<w>\d+))?(\*(?P<widen>\d+(\.\d+)?|image))?"
)


@dataclass(frozen=True)
class TapSpec:
    """One tap.

    Attributes:
        layer: name of a layer of the backbone.
        grid: (rows, columns) of cells; None is a layer's natural grid: the one that its fully connected
            layers expect for the last pooling, 3x3 for any other convolutional layer.
        widen: factor by which regions are widened about their centres; > 0. Infinite, written
            `*image`, is the whole image, the same for all its regions.
    """

    layer: str
    grid: tuple[int, int] | None = None
    widen: float = 1.0

    def __post_init__(self) -> None:
        if self.grid is not None and min(self.grid) < 1:
            raise ConfigError(f"Tap {self}: a grid must have at least one cell, got {self.grid}.")
        if not self.widen > 0:
            raise ConfigError(f"Tap {self}: regions must be widened by a positive factor, got {self.widen}.")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one tap from text.

        Raises:
            ConfigError: the text is no tap.

        Example:
            >>> TapSpec.parse("block17@1x1*1.8")
            TapSpec(layer='block17', grid=(1, 1), widen=1.8)
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ConfigError(
                f"Tap {text!r} must read LAYER, LAYER@ROWSxCOLUMNS or LAYER@ROWSxCOLUMNS*FACTOR, "
                f"for example fc7, block13@3x3 or block17@1x1*1.8."
            )
        grid = (int(match["h"]), int(match["w"])) if match["h"] else None
        widen = math.inf if match["widen"] == "image" else float(match["widen"] or 1)
        return cls(match["layer"], grid, widen)

    def __str__(self) -> str:
        grid = f"@{self.grid[0]}x{self.grid[1]}" if self.grid else ""
        widen = "*image" if math.isinf(self.widen) else f"*{self.widen:g}" if self.widen != 1 else ""
        return self.layer + grid + widen


def parse_taps(text: str) -> tuple[TapSpec, ...]:
    """Read comma-separated taps, whose features are concatenated in this order.

    Raises:
        ConfigError: a part is no tap, or one is named twice.
    """
    taps = tuple(TapSpec.parse(part) for part in text.split(","))
    for i, tap in enumerate(taps):
        if tap in taps[:i]:
            raise ConfigError(f"Taps {text!r}: {tap} is named twice. Leave one out.")
    return taps


def format_taps(taps: tuple[TapSpec, ...]) -> str:
    """Write taps as `parse_taps` reads them."""
    return ",".join(map(str, taps))
