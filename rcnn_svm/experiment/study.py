"""Why SVMs and not the softmax? One factor at a time, on the same regions and the same features.

A study is an experiment whose heads are the cells of a factorial design: every combination of the levels of
some factors, each with the same number of costs to choose from on val. What a factor does is the mean, over
all pairs of cells that differ in it alone, of what they differ by; images are resampled for its interval,
all cells alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.datasets import Splits
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import Interval, paired_bootstrap
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import Experiment, run_experiment
from rcnn_svm.heads.assign import LabelRule
from rcnn_svm.heads.base import HeadBase
from rcnn_svm.heads.kernel_svm import KernelSVMHead
from rcnn_svm.heads.kernels import RBF, HistogramIntersection
from rcnn_svm.heads.linear_svm import LinearSVMHead
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.heads.softmax import SoftmaxHead

__all__ = ["FACTORS", "Cell", "Effect", "Factor", "Study", "design", "run_study"]

_COSTS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""What every cell chooses from on val: the same budget for all."""
_RANDOM_NEGATIVES = 64
"""Background regions of an image where they are drawn at random: about what a softmax sees in fine-tuning."""
_DETECTABLE = 2.8
"""Standard errors of a difference that is found in four of five studies, at 95 %."""


@dataclass(frozen=True)
class Factor:
    """One thing that differs between heads.

    Attributes:
        name: of the factor.
        question: what it is about.
        levels: the name of each level and its value; the first one is taken where the factor is not studied.
    """

    name: str
    question: str
    levels: Mapping[str, Any]


FACTORS: Mapping[str, Factor] = {
    factor.name: factor
    for factor in (
        Factor(
            "label",
            "Which regions are positives and which are negatives?",
            {
                "objects against IoU < 0.3": LabelRule(None, 0.3),
                "IoU >= 0.5 against the rest": LabelRule(0.5, 0.5),
                "IoU >= 0.7 against IoU < 0.3": LabelRule(0.7, 0.3),
            },
        ),
        Factor(
            "negatives",
            "Hard negatives, or random ones?",
            {"all, mined": None, "random": _RANDOM_NEGATIVES},
        ),
        Factor(
            "loss",
            "Hinge, squared hinge, or softmax?",
            {"hinge": "hinge", "squared hinge": "squared_hinge", "softmax": "softmax"},
        ),
        Factor(
            "kernel",
            "Is a kernel worth it?",
            {"linear": None, "RBF": RBF(1.0), "intersection": HistogramIntersection()},
        ),
        Factor("rows", "How are feature rows scaled?", {"length 1": "l2", "root, length 1": "sqrt-l2"}),
    )
}
"""The factors of a design, by name. Box regression is one more, which every cell has both levels of."""

BOXES = Factor("boxes", "What does box regression add?", {"as proposed": False, "regressed": True})


@dataclass(frozen=True, eq=False)
class Cell:
    """One combination of levels.

    Attributes:
        levels: name of the level by factor, all factors of the design.
        recipe: the head that it is; None where there is no such head.
        left_out: why there is none; empty where there is one.
    """

    levels: Mapping[str, str]
    recipe: HeadRecipe | None
    left_out: str = ""


def design(names: Sequence[str], *, seed: int = 0) -> list[Cell]:
    """Return every combination of the levels of some factors; other factors stay at their first level.

    Args:
        names: of `FACTORS`.
        seed: of random negatives and solvers.

    Raises:
        ConfigError: no factor, an unknown one, or one twice.
    """
    if not names or len(set(names)) < len(names) or not set(names) <= FACTORS.keys():
        raise ConfigError(
            f"--factors must be some of {', '.join(FACTORS)}, each once, got {', '.join(names) or 'none'}."
        )
    cells = []
    for combination in itertools.product(*(FACTORS[name].levels for name in names)):
        levels = dict(zip(names, combination, strict=True))
        values = {
            name: factor.levels[levels.get(name, next(iter(factor.levels)))]
            for name, factor in FACTORS.items()
        }
        head, why = _head(values, seed)
        recipe = None
        if head is not None:
            recipe = HeadRecipe(
                " / ".join(combination),
                head,
                {"C": _COSTS},
                values["rows"],
                random_negatives=values["negatives"],
                seed=seed,
            )
        cells.append(Cell(levels, recipe, why))
    return cells


def _head(values: Mapping[str, Any], seed: int) -> tuple[HeadBase | None, str]:
    """Return the head of a combination, or why there is none."""
    rule, loss, kernel = values["label"], values["loss"], values["kernel"]
    if kernel is not None:
        if loss != "hinge":
            return None, "kernel machines are trained with the hinge loss alone"
        return KernelSVMHead(kernel=kernel, rule=rule), ""
    if loss == "softmax":
        return SoftmaxHead(rule=rule, random_state=seed), ""
    return LinearSVMHead(rule=rule, loss=loss, random_state=seed), ""


@dataclass(frozen=True)
class Effect:
    """What a change of one level does.

    Attributes:
        factor: its name; of an interaction both names.
        first: the level that is compared,
        second: with this one.
        change: of mAP, `first` less `second`, a fraction: the mean over all pairs of cells that differ in
            this alone, with its 95 % interval.
        n_pairs: how many pairs there are.
        p: two-sided, from the resamples.
        p_holm: the same, corrected for all effects of the study by Holm's method.
        detectable: the smallest change that such a study finds in four of five cases, a fraction.
    """

    factor: str
    first: str
    second: str
    change: Interval
    n_pairs: int
    p: float
    p_holm: float
    detectable: float

    @property
    def decided(self) -> bool:
        """Whether it stands after the correction."""
        return self.p_holm < 0.05


@dataclass(frozen=True, eq=False)
class Study:
    """A finished study.

    Attributes:
        cells: of the design, those that were left out too.
        experiment: whose heads are the cells.
        values: mAP of each cell, a fraction with its interval, by cell name and whether boxes are regressed.
        effects: of every pair of levels of a factor, boxes last.
        interactions: how the effect of one factor's levels changes between those of another.
    """

    cells: Sequence[Cell]
    experiment: Experiment
    values: Mapping[tuple[str, bool], Interval]
    effects: Sequence[Effect]
    interactions: Sequence[Effect]

    def __repr__(self) -> str:
        return f"Study({len(self.values)} results, {len(self.effects)} effects)"


def run_study(parts: Parts, splits: Splits, run: Run, names: Sequence[str]) -> Study:
    """Run every cell of a design on the same regions and features.

    Args:
        parts: of the experiment; its heads are replaced, and settings are chosen on val.
        splits: of one data set.
        run: how.
        names: of the factors.

    Raises:
        ConfigError: as `design`.
        DataError: as `run_experiment`.
    """
    cells = design(names, seed=parts.seed)
    recipes = tuple(cell.recipe for cell in cells if cell.recipe is not None)
    experiment = run_experiment(replace(parts, heads=recipes, choose=True), splits, run)
    return analyse(cells, experiment)


def analyse(cells: Sequence[Cell], experiment: Experiment) -> Study:
    """Measure the cells of an experiment, and the effects of their factors.

    Args:
        cells: of the design; their recipes are heads of the experiment.
        experiment: finished.
    """
    parts = experiment.parts
    results = {name: result.evaluation for name, result in experiment.heads.items()}
    found = paired_bootstrap(results, n_resamples=parts.n_bootstrap, seed=parts.seed, rule=parts.rule)
    table: dict[tuple[str, ...], str] = {}
    factors = [*next(iter(cells)).levels, BOXES.name]
    for cell in cells:
        if cell.recipe is not None:
            for level, suffix in zip(BOXES.levels, ("", "+bbox"), strict=True):
                if cell.recipe.name + suffix in results:  # whole images have no boxes to regress
                    table[*cell.levels.values(), level] = cell.recipe.name + suffix
    measured = {name: results[name].map(parts.rule) for name in results}
    samples = {name: found.samples[name] - found.samples[name].mean() + measured[name] for name in results}
    effects = [
        _effect(factors, table, measured, samples, (at, *pair))
        for at in range(len(factors))
        for pair in itertools.combinations(_levels(table, at), 2)
    ]
    twofold = [
        _effect(factors, table, measured, samples, (a, *first), (b, *second))
        for a, b in itertools.combinations(range(len(factors)), 2)
        for first in itertools.combinations(_levels(table, a), 2)
        for second in itertools.combinations(_levels(table, b), 2)
    ]
    corrected = _holm([one for one in (*effects, *twofold) if one is not None])
    n = sum(one is not None for one in effects)
    values = {(name.removesuffix("+bbox"), name.endswith("+bbox")): found.mean[name] for name in results}
    return Study(cells, experiment, values, corrected[:n], corrected[n:])


def _levels(table: Mapping[tuple[str, ...], str], at: int) -> list[str]:
    return list(dict.fromkeys(levels[at] for levels in table))


def _effect(
    factors: Sequence[str],
    table: Mapping[tuple[str, ...], str],
    measured: Mapping[str, float],
    samples: Mapping[str, NDArray[np.float64]],
    *contrasts: tuple[int, str, str],
) -> Effect | None:
    """Return the mean of a contrast, or how it differs between two levels of another; None without pairs."""
    changes, resampled = [], []
    for levels in table:
        if any(levels[at] != first for at, first, _ in contrasts):
            continue
        signed = []
        for swapped in itertools.product((False, True), repeat=len(contrasts)):
            other = list(levels)
            for (at, first, second), turn in zip(contrasts, swapped, strict=True):
                other[at] = second if turn else first
            signed.append((tuple(other), -1 if sum(swapped) % 2 else 1))
        if all(key in table for key, _ in signed):
            changes.append(sum(sign * measured[table[key]] for key, sign in signed))
            resampled.append(np.sum([sign * samples[table[key]] for key, sign in signed], axis=0))
    if not changes:
        return None
    value, spread = float(np.mean(changes)), np.mean(resampled, axis=0)
    low, high = np.percentile(spread, [2.5, 97.5])
    least = 1 / len(spread)
    p = min(1.0, max(least, 2 * min(float((spread <= 0).mean()), float((spread >= 0).mean()))))
    return Effect(
        " x ".join(factors[at] for at, *_ in contrasts),
        " and ".join(first for _, first, _ in contrasts),
        " and ".join(second for *_, second in contrasts),
        Interval(value, float(low), float(high)),
        len(changes),
        p,
        p,
        _DETECTABLE * float(spread.std()),
    )


def _holm(effects: Sequence[Effect]) -> list[Effect]:
    """Correct p values for their number: the smallest by all, the next by one fewer, never falling."""
    order = sorted(range(len(effects)), key=lambda i: effects[i].p)
    corrected, worst = list(effects), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, effects[i].p * (len(effects) - rank)))
        corrected[i] = replace(effects[i], p_holm=worst)
    return corrected
