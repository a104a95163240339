"""Regions of a region proposal network (RPN), as Faster R-CNN has one. This module needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from rcnn_svm.boxes import Boxes
from rcnn_svm.config import Count, check
from rcnn_svm.structures import Image, RegionSet

__all__ = ["RegionNetwork", "RpnConfig", "RpnProposals"]


@dataclass(frozen=True)
class RpnConfig:
    """Whose regions are taken, and how many.

    Attributes:
        network: that was trained to detect, such as `torchvision:fasterrcnn_mobilenet_v3_large_fpn`; empty
            takes the one that features are read from, with its weights.
        weights: of `network`, as `features.weights`.
        max_regions: keep so many of the best; None keeps all that the network gives (of torchvision's 1000 at
            most, 150 with `fasterrcnn_mobilenet_v3_large_320_fpn`).
    """

    network: str = ""
    weights: str = "default"
    max_regions: Count | None = None

    def __post_init__(self) -> None:
        check(self, where="rpn")


class RegionNetwork(Protocol):
    """A network that finds regions, such as `rcnn_svm.networks.detection.DetectionNetwork`."""

    name: str

    @property
    def digest(self) -> str:
        """Hash over its weights."""
        ...

    def propose(self, image: Image) -> Boxes:
        """Return (R, 4) boxes inside the image, best first, no two alike; called by several threads."""
        ...

    def on(self, device: str) -> Self:
        """Return the same network on another device of torch's."""
        ...

    def save(self, path: Path) -> None:
        """Write its weights."""
        ...


@dataclass(frozen=True, eq=False)
class RpnProposals:
    """A `KeyedProposer`: regions that a network was trained to find.

    Attributes:
        config: what was asked for.
        network: with its weights.
    """

    config: RpnConfig
    network: RegionNetwork
    name: ClassVar[str] = "rpn"

    @property
    def max_regions(self) -> int | None:
        """How many regions are returned at most; None for all."""
        return self.config.max_regions

    def whole(self) -> Self:
        """Return the same without the cut, whose regions begin with those of this one."""
        return replace(self, config=replace(self.config, max_regions=None))

    def on(self, device: str) -> Self:
        """Return the same on another device of torch's, which rounds otherwise."""
        return replace(self, network=self.network.on(device))

    def key(self) -> dict[str, Any]:
        """Return all that the boxes of an image depend on, as JSON-able values, but for the device."""
        return {
            "proposer": self.name,
            "version": 1,
            "network": self.network.name,
            "weights": self.network.digest,
            "max_regions": self.max_regions,
        }

    def propose(self, image: Image) -> RegionSet:
        """Return the regions of an image, uint8 (H, W, 3) RGB; there may be none."""
        boxes = self.network.propose(image)[: self.max_regions]
        height, width = image.shape[:2]
        return RegionSet("", (height, width), boxes, np.arange(len(boxes), dtype=np.float32))
