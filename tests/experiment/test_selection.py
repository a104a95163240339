"""What is tried for each head, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig, quick_config
from rcnn_svm.experiment.selection import settings_of, settled, train_candidates
from tests.heads.conftest import _make_blocks

TWICE = HeadsConfig(
    linear_costs=(1.0, 0.1, 1.0),
    rbf_costs=(1.0, 0.1, 1.0),
    rbf_gammas=(0.1, 0.02, 0.1),
    softmax_costs=(0.1, 0.1),
)


@pytest.mark.parametrize("name", ["linear-svm", "rbf-svm", "softmax-refit"])
def test_a_value_that_is_named_twice_is_tried_once(name: str) -> None:
    settings = settings_of(name, TWICE)
    assert [setting for i, setting in enumerate(settings) if setting in settings[:i]] == []
    assert len(settings) == {"linear-svm": 2, "rbf-svm": 4, "softmax-refit": 1}[name]
    found = list(train_candidates(name, settings, TWICE, _make_blocks(), seed=0, n_jobs=1))
    assert [candidate.settings for candidate in found] == settings


@pytest.mark.parametrize("grid", [(3.0, 0.3, 30.0), (30.0, 3.0), (3.0,)])
def test_a_first_look_takes_what_is_taken_unseen(grid: tuple[float, ...]) -> None:
    """The middle by size, in whatever order the grid is written."""
    heads = HeadsConfig(linear_costs=grid, softmax_costs=grid, ridge_strengths=grid, rbf_costs=grid)
    quick = quick_config(replace(ExperimentConfig(), heads=heads)).heads
    for name in ("linear-svm", "softmax-refit", "ridge", "rbf-svm"):
        assert settled(name, quick) == settled(name, heads)
    assert quick.linear_costs == (sorted(grid)[len(grid) // 2],)
