"""Small synthetic region blocks that every head can be trained on in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rcnn_svm.heads.assign import describe_regions
from rcnn_svm.heads.base import ArrayBlocks
from rcnn_svm.structures import GroundTruth

MakeBlocks = Callable[..., ArrayBlocks]


def _make_blocks(
    n_images: int = 12, n_regions: int = 60, n_features: int = 24, n_classes: int = 3, seed: int = 0
) -> ArrayBlocks:
    """Images with 1 to 3 objects; a region's features say, with noise, what it overlaps."""
    rng = np.random.default_rng(seed)
    prototypes = rng.normal(size=(n_classes, n_features))
    features, truths = [], []
    for i in range(n_images):
        n_objects = int(rng.integers(1, 4))
        corner, side = rng.uniform(0, 200, (n_objects, 2)), rng.uniform(40, 120, (n_objects, 2))
        objects = np.concatenate([corner, corner + side], axis=1)
        labels = (np.arange(n_objects) + i) % n_classes
        corner, side = rng.uniform(0, 220, (n_regions, 2)), rng.uniform(30, 130, (n_regions, 2))
        proposals = np.concatenate([corner, corner + side], axis=1)
        near = n_regions // 3
        jitter = rng.normal(scale=6, size=(near, 4))
        proposals[:near] = objects[rng.integers(0, n_objects, near)] + jitter
        boxes = np.concatenate([objects, proposals]).astype(np.float32)
        truth = GroundTruth(objects.astype(np.float32), labels)
        regions = describe_regions(boxes, truth, n_classes, n_objects)
        signal = 0.9 * regions.overlap @ prototypes
        noise = 0.7 * rng.normal(size=(len(boxes), n_features))
        features.append(np.maximum(signal + noise, 0).astype(np.float32))
        truths.append(regions)
    return ArrayBlocks.from_arrays(features, truths, [f"class{k}" for k in range(n_classes)])


@pytest.fixture(scope="session")
def make_blocks() -> MakeBlocks:
    return _make_blocks


@pytest.fixture(scope="session")
def blocks() -> ArrayBlocks:
    return _make_blocks()
