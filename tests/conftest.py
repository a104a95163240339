"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of labelled photographs; tests that need it skip where it is not named."""
    value = os.environ.get("RCNN_SVM_DATA")
    if not value:
        pytest.skip("RCNN_SVM_DATA is not set: tests on real photographs are skipped")
    return Path(value).resolve()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20071)
