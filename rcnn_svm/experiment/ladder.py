"""The best detector that a time gives: recipes of rising cost, judged on the same held-out images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rcnn_svm.datasets import Splits
from rcnn_svm.evaluation.thresholds import UnreachedError
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import Experiment, HeadResult, estimate_experiment
from rcnn_svm.progress import say

__all__ = ["LADDER", "Climb", "Rung", "Step", "climb", "seconds_of_features"]

LADDER: Mapping[str, float] = {"quick": 1.0, "default": 7.2, "best": 4.5}
"""The presets that are tried, the fastest first, and how many times as long as with the one before all takes
but proposals and features. Both are more than all of a training takes of CPU seconds, proposals and features
as well, on the five data sets in results/benchmarks/presets.json: `default` 2.0 to 6.0 times what `quick`
does, on more images, and `best` up to 4.2 times what `default` does."""


@dataclass(frozen=True, eq=False)
class Rung:
    """A recipe that is tried.

    Attributes:
        name: of the preset.
        parts: that it makes, of the same data, seed and held-out images as those of the others.
        growth: how many times as long as with the recipe before everything but proposals and features takes.
    """

    name: str
    parts: Parts
    growth: float


@dataclass(frozen=True)
class Step:
    """What became of a recipe.

    Attributes:
        recipe: its name.
        foreseen_s: seconds that it was thought to take; None of the first, whose training is yet unknown.
        ended_s: seconds from the start of the run to its end, when its detector lay on disk if it was kept.
        held_out: mean of mAP and COCO AP on the held-out images, of whole images mAP, in percent; None where
            nothing could be measured.
        kept: whether its detector took the place of the one before.
        test_map: mAP of the detector on test in percent, measured when it was kept; nothing is decided by it.
            None of one that was not kept, and where test holds no object.
    """

    recipe: str
    foreseen_s: float | None
    ended_s: float
    held_out: float | None
    kept: bool
    test_map: float | None


@dataclass(frozen=True, eq=False)
class Climb:
    """What a time gave.

    Attributes:
        seconds: that were there.
        steps: the recipes that were finished, in their order.
        ended: why no further one was, as a sentence.
        experiment: of the detector that was kept last.
    """

    seconds: float
    steps: tuple[Step, ...]
    ended: str
    experiment: Experiment

    @property
    def recipe(self) -> str:
        """The name of the recipe whose detector was kept."""
        return [step.recipe for step in self.steps if step.kept][-1]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data for `metrics.json`."""
        return {
            "asked": self.seconds / 60,
            "recipe": self.recipe,
            "ended": self.ended,
            "curve": [
                {
                    "recipe": step.recipe,
                    "minutes": step.ended_s / 60,
                    "foreseen_minutes": None if step.foreseen_s is None else step.foreseen_s / 60,
                    "held_out": step.held_out,
                    "kept": step.kept,
                    "test_mAP": step.test_map,
                }
                for step in self.steps
            ],
        }


class _OutOfTime(Exception):
    """The time is over in the midst of a recipe, and there is a detector."""


def climb(
    rungs: Sequence[Rung],
    seconds: float,
    *,
    foresee: Callable[[Parts], float],
    train: Callable[[Parts, Callable[[], None]], Experiment],
    taken: Callable[[HeadResult], bool],
    save: Callable[[Rung, Experiment, HeadResult], None],
    started: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Climb:
    """Train recipes of rising cost while time is left, and save each that is better than those before.

    The first is trained whatever it takes. A further one is begun only where it is foreseen to end in time;
    one that takes longer than that is given up between two of its stages once the time is over. One is better
    that has more on the held-out images; of equals the first is kept, and where nothing can be measured the
    dearer one, which did better on other data. Test decides nothing.

    Args:
        rungs: at least one, the fastest first.
        seconds: that there are, from `started` on.
        foresee: seconds that the proposals and features of a recipe will take.
        train: runs the experiment of a recipe, and calls its second argument between stages.
        taken: which of its results the detector is.
        save: puts that in the place of the one before.
        started: what the clock said at the start of the run; None for now.
        clock: returns seconds that never fall.

    Raises:
        UnreachedError: with no recipe a threshold does what is asked.
        ConfigError: as `foresee` and `train`.
        DataError: as `foresee` and `train`.
    """
    started = clock() if started is None else started
    steps: list[Step] = []
    kept: Experiment | None = None
    highest: float | None = None
    rest = 0.0  # seconds that the recipe before took but for proposals and features
    unreached: UnreachedError | None = None
    ended = "All recipes were tried."

    def in_time() -> None:
        if kept is not None and clock() - started > seconds:
            raise _OutOfTime

    for rung in rungs:
        features = foresee(rung.parts)
        foreseen, left = features + rung.growth * rest, seconds - (clock() - started)
        if steps and foreseen > left:
            ended = (
                f"{rung.name} was not begun: it would take about {_minutes(foreseen)}, and {_minutes(left)} "
                f"are left."
            )
            break
        if not steps and foreseen > left:
            say(
                f"{rung.name}: proposals and features alone will take about {_minutes(foreseen)}, more than "
                f"the {_minutes(seconds)} asked for; it is trained all the same, so that there is a detector."
            )
        say(f"Recipe:   {rung.name}" + (f", about {_minutes(foreseen)}" if steps else ""))
        begun = clock()
        result: HeadResult | None = None
        try:
            experiment = train(rung.parts, in_time)
            result = next(one for one in experiment.heads.values() if taken(one))
            if result.unreached is not None:
                raise result.unreached
        except _OutOfTime:
            ended = f"{rung.name} was given up when the time was over: it takes longer than was foreseen."
            break
        except UnreachedError as error:
            unreached, result = error, None
            say(f"{rung.name}: {error}")
        # No less than two stages that read few features: what was foreseen of features may be too much.
        least = 0.0 if result is None else experiment.stages_s["train"] + experiment.stages_s["detect"]
        rest = max(clock() - begun - features, least)
        value: float | None = None if result is None else result.details["held_out"]
        better = result is not None and (kept is None or _exceeds(value, highest))
        test_map: float | None = None
        if better and result is not None:
            save(rung, experiment, result)
            kept, highest = experiment, value
            test_map = 100 * result.evaluation.map(result.evaluation.rule)
        steps.append(
            Step(
                rung.name,
                foreseen if steps else None,
                clock() - started,
                value,
                better,
                None if test_map is None or math.isnan(test_map) else test_map,
            )
        )
        if result is not None:
            reached = "nothing to measure" if value is None else f"{value:.1f}"
            say(f"{rung.name}: {reached} on held-out images, {'kept' if better else 'not better, left'}")
    if kept is None:
        assert unreached is not None  # a recipe is kept, or says why it is not
        raise unreached
    return Climb(seconds, tuple(steps), ended, kept)


def seconds_of_features(parts: Parts, splits: Splits, run: Run) -> float:
    """Return how long the proposals and features of an experiment will take, measured on a few images.

    What is cached costs nothing.

    Raises:
        ConfigError: the features come from a network that is yet to be fine-tuned.
    """
    return sum(
        one.proposals_s / run.n_jobs + one.features_s for one in estimate_experiment(parts, splits, run)
    )


def _exceeds(value: float | None, highest: float | None) -> bool:
    if value is None or highest is None:
        return highest is None
    return value > highest


def _minutes(seconds: float) -> str:
    return f"{max(seconds, 0.0) / 60:.1f} minutes"
