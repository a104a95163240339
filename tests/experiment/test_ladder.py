"""Recipes of rising cost within a time: what is begun, what is kept, and why it ends."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcnn_svm.evaluation.thresholds import UnreachedError
from rcnn_svm.experiment.ladder import Climb, Rung, climb

VALUES = st.none() | st.integers(0, 4).map(float)  # few, so that equals are met
RECIPES = st.lists(
    st.tuples(VALUES, st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=5
)  # held out, seconds of features and of the rest


class World:
    """A clock that trainings move on, and what they save."""

    def __init__(self, recipes: list[tuple[Any, float, float]], *, stages: int = 1) -> None:
        self.now, self.stages, self.least = 100.0, stages, 0.0
        self.recipes, self.begun, self.saved = recipes, list[int](), list[int]()

    def train(self, which: int, in_time: Any) -> Any:
        self.begun.append(which)
        value, features, rest = self.recipes[which]
        for _ in range(self.stages):
            in_time()
            self.now += (features + rest) / self.stages
        unreached = value if isinstance(value, UnreachedError) else None
        evaluation = SimpleNamespace(rule="voc07", map=lambda rule: 0.01 * which if which else np.nan)
        details = {"held_out": None if unreached else value}
        return SimpleNamespace(
            stages_s={"train": self.least, "detect": 0.0},
            heads={
                "other": SimpleNamespace(name="other"),
                "taken": SimpleNamespace(
                    name="taken", details=details, unreached=unreached, evaluation=evaluation
                ),
            },
        )

    def climb(self, seconds: float, growth: float = 2.0) -> Climb:
        rungs: list[Any] = [Rung(f"r{i}", i, growth) for i in range(len(self.recipes))]  # type: ignore[arg-type]
        return climb(
            rungs,
            seconds,
            foresee=lambda which: self.recipes[which][1],  # type: ignore[index]
            train=self.train,  # type: ignore[arg-type]
            taken=lambda result: result.name == "taken",  # type: ignore[attr-defined]
            save=lambda rung, experiment, result: self.saved.append(rungs.index(rung)),
            clock=lambda: self.now,
        )


@given(RECIPES, st.floats(0.01, 400))
def test_the_detector_that_is_left_is_that_of_the_best_value_that_was_reached(
    recipes: list[tuple[Any, float, float]], seconds: float
) -> None:
    world = World(recipes)
    found = world.climb(seconds)
    values = [step.held_out for step in found.steps]
    assert [int(step.recipe[1:]) for step in found.steps] == world.begun == list(range(len(values)))
    measured = [value for value in values if value is not None]
    last = world.saved[-1]
    assert found.recipe == f"r{last}"
    assert values[last] == max(measured) if measured else last == len(values) - 1
    if measured:
        assert last == values.index(max(measured))  # of equals the first
    assert [step.recipe for step in found.steps if step.kept] == [f"r{i}" for i in world.saved]
    assert world.saved[0] == 0
    assert all((step.test_map is None) == (not step.kept or step.recipe == "r0") for step in found.steps)
    ends = [step.ended_s for step in found.steps]
    assert ends == sorted(ends)


@given(RECIPES, st.floats(0.01, 400))
def test_a_recipe_is_begun_exactly_where_it_is_foreseen_to_end_in_time(
    recipes: list[tuple[Any, float, float]], seconds: float
) -> None:
    found = World(recipes).climb(seconds)
    begun_at = [0.0, *(step.ended_s for step in found.steps)]
    assert found.steps[0].foreseen_s is None
    for step, begun in zip(found.steps[1:], begun_at[1:], strict=False):
        assert step.foreseen_s is not None
        assert begun + step.foreseen_s <= seconds + 1e-9
    n = len(found.steps)
    if n == len(recipes):
        assert found.ended == "All recipes were tried."
    else:
        foreseen = recipes[n][1] + 2.0 * recipes[n - 1][2]
        assert begun_at[-1] + foreseen >= seconds - 1e-9
        told = re.match(rf"r{n} was not begun: it would take about (\d+\.\d) minutes", found.ended)
        assert told is not None
        assert abs(float(told[1]) - foreseen / 60) <= 0.05 + 1e-9  # rounded, and sums round as well


def test_a_recipe_that_takes_longer_than_foreseen_is_given_up_but_not_the_first() -> None:
    world = World([(1.0, 5.0, 5.0), (9.0, 1.0, 500.0), (9.0, 1.0, 1.0)], stages=10)
    found = world.climb(100)
    assert (found.recipe, world.saved, world.begun) == ("r0", [0], [0, 1])
    assert world.now - 100.0 == pytest.approx(10 + 2 * 50.1)  # to the end of the stage
    assert found.ended == "r1 was given up when the time was over: it takes longer than was foreseen."
    slow = World([(1.0, 5.0, 500.0)], stages=10)
    assert slow.climb(3).recipe == "r0"


def test_where_features_were_foreseen_to_take_too_long_the_stages_say_what_the_rest_took() -> None:
    world = World([(1.0, 60.0, -55.0), (9.0, 1.0, 1.0)])
    world.least = 4.0
    assert world.climb(100).steps[1].foreseen_s == 1.0 + 2 * 4.0


def test_a_first_recipe_that_does_not_fit_is_trained_all_the_same_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert World([(1.0, 120.0, 5.0), (2.0, 0.0, 0.0)]).climb(60).recipe == "r0"
    said = capsys.readouterr().err
    assert "r0: proposals and features alone will take about 2.0 minutes, more than the 1.0 minutes" in said


def test_thresholds_out_of_reach_leave_a_recipe_out_and_end_the_run_where_none_is_left() -> None:
    error = UnreachedError("no threshold")
    found = World([(error, 1.0, 1.0), (2.0, 1.0, 1.0)]).climb(100)
    assert [(s.recipe, s.kept, s.held_out) for s in found.steps] == [("r0", False, None), ("r1", True, 2.0)]
    with pytest.raises(UnreachedError, match="no threshold"):
        World([(error, 1.0, 1.0), (error, 1.0, 1.0)]).climb(100)
