"""Small synthetic region blocks that every head can be trained on in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rcnn_svm.contracts import example_blocks
from rcnn_svm.heads.base import ArrayBlocks

MakeBlocks = Callable[..., ArrayBlocks]


@pytest.fixture(scope="session")
def make_blocks() -> MakeBlocks:
    return example_blocks


@pytest.fixture(scope="session")
def blocks() -> ArrayBlocks:
    return example_blocks()
