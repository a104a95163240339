"""What is tried for each head, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rcnn_svm.contracts import example_blocks
from rcnn_svm.experiment.config import ExperimentConfig, HeadsConfig, quick_config

TWICE = HeadsConfig(
    names=("linear-svm", "rbf-svm", "softmax-refit", "nystroem-svm"),
    linear_costs=(1.0, 0.1, 1.0),
    rbf_costs=(1.0, 0.1, 1.0),
    rbf_gammas=(0.1, 0.02, 0.1),
    softmax_costs=(0.1, 0.1),
    n_landmarks=50,
)


@pytest.mark.parametrize(
    ("name", "n"), [("linear-svm", 2), ("rbf-svm", 4), ("softmax-refit", 1), ("nystroem-svm", 4)]
)
def test_a_value_that_is_named_twice_is_tried_once(name: str, n: int) -> None:
    (recipe,) = [head for head in TWICE.build(seed=0) if head.name == name]
    settings = recipe.settings()
    assert [setting for i, setting in enumerate(settings) if setting in settings[:i]] == []
    assert len(settings) == n
    found = list(recipe.fit(example_blocks(), settings))
    assert [fitted.settings for fitted in found] == settings


@pytest.mark.parametrize("grid", [(3.0, 0.3, 30.0), (30.0, 3.0), (3.0,)])
def test_a_first_look_takes_what_is_taken_unseen(grid: tuple[float, ...]) -> None:
    """The middle by size, in whatever order the grid is written."""
    heads = HeadsConfig(linear_costs=grid, softmax_costs=grid, ridge_strengths=grid, rbf_costs=grid)
    config = replace(ExperimentConfig(), heads=heads)
    quick, whole = quick_config(config).build(), config.build()
    assert [head.settled() for head in quick.heads] == [head.settled() for head in whole.heads]
    assert quick.boxes.settled() == whole.boxes.settled()
    assert quick_config(config).heads.linear_costs == (sorted(grid)[len(grid) // 2],)
