"""The image as its only region: what is looked at where labels are of whole images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rcnn_svm.structures import Image, RegionSet

__all__ = ["WholeImage"]


@dataclass(frozen=True)
class WholeImage:
    """A `KeyedProposer` of one region, which covers the image."""

    def key(self) -> dict[str, Any]:
        """Return all that the box of an image depends on, as JSON-able values."""
        return {"proposer": "whole-image", "version": 1}

    def propose(self, image: Image) -> RegionSet:
        """Return the box `0 0 W H` of an image, uint8 (H, W, 3) RGB."""
        height, width = image.shape[:2]
        box = np.array([[0, 0, width, height]], np.float32)
        return RegionSet("", (height, width), box, np.zeros(1, np.float32))
