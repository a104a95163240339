"""What each factor of a factorial design does: balanced contrasts of its cells, with intervals.

A design is a table of cells, each with a level of every factor and with its measures on every resample of
the test images. The effect of one level against another is the mean, over all pairs of cells that differ in
it alone, of what they differ by. Every number comes with the spread of the same contrast over the resamples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.bootstrap import (
    Interval,
    centred_interval,
    mean_of_present,
    resampled_ap,
    resampled_images,
    resampled_recall,
)
from rcnn_svm.evaluation.classification import Classification
from rcnn_svm.evaluation.voc import EvalResult, Rule

__all__ = [
    "Effect",
    "Measured",
    "Share",
    "Table",
    "effects_of",
    "holm",
    "holm_corrected",
    "interactions_of",
    "measure",
    "measure_accuracy",
    "p_value",
    "shares",
    "simple_effects",
]

_DETECTABLE = 2.8
"""Standard errors of a difference that is found in four of five studies, at 95 %."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What one cell reached.

    Attributes:
        value: (1 + K,) mAP, then AP by class, or accuracy, then recall by class; fractions, means over the
            seeds; nan for a class without objects.
        samples: (1 + K, B) the same on every resample. Those of AP are moved so that their mean is `value`,
            see `paired_bootstrap`; those of accuracy need not be.
    """

    value: NDArray[np.float64]
    samples: NDArray[np.float64]

    @property
    def interval(self) -> Interval:
        """The mean with its 95 % interval."""
        return centred_interval(float(self.value[0]), self.samples[0], floor=0.0, move=False)


@dataclass(frozen=True, eq=False)
class Table:
    """The cells of a full factorial, those that make no sense left out.

    Attributes:
        factors: names.
        cells: by the level of each factor, in that order.
    """

    factors: tuple[str, ...]
    cells: Mapping[tuple[str, ...], Measured]

    def levels(self, at: int) -> list[str]:
        """Return the levels of the factor at a place, in the order of the cells."""
        return list(dict.fromkeys(levels[at] for levels in self.cells))


@dataclass(frozen=True, eq=False)
class Effect:
    """What a change of one level does.

    Attributes:
        factor: its name; of an interaction both names.
        first: the level that is compared,
        second: with this one.
        change: of mAP or accuracy, `first` less `second`, a fraction: the mean over all pairs of cells that
            differ in this alone, with its 95 % interval. Of an interaction: how that change differs between
            two levels of another factor.
        per_class: the same for the AP, or the recall, of each class.
        n_pairs: how many pairs there are.
        p: two-sided, from the standard error over the resamples.
        p_holm: the same, corrected for its family by Holm's method.
        detectable: the smallest change that such a study finds in four of five cases, a fraction.
    """

    factor: str
    first: str
    second: str
    change: Interval
    per_class: tuple[Interval, ...]
    n_pairs: int
    p: float
    p_holm: float
    detectable: float

    @property
    def decided(self) -> bool:
        """Whether it stands after the correction."""
        return self.p_holm < 0.05


@dataclass(frozen=True)
class Share:
    """The part of a difference between two cells that one factor brings.

    Attributes:
        factor: its name.
        change: a fraction of mAP, with its 95 % interval.
    """

    factor: str
    change: Interval


def measure(
    results: Mapping[tuple[str, ...], Sequence[EvalResult]], *, n_resamples: int, seed: int, rule: Rule
) -> dict[tuple[str, ...], Measured]:
    """Measure cells on the same resamples of the images and of the seeds.

    Images are resampled as in `paired_bootstrap`. With several seeds these are drawn again as well, the same
    ones for all cells, and what a draw adds is stretched by sqrt(S / (S - 1)), without which the spread
    between few seeds comes out too small.

    Args:
        results: by the levels of a cell, one evaluation for each seed, all of one split.
        n_resamples: B.
        seed: of the resamples.
        rule: of AP.

    Raises:
        ConfigError: no cell, or cells with different numbers of seeds.
    """
    weights = _seed_weights(results, n_resamples, seed)
    some = next(iter(results.values()))[0]
    drawn = resampled_images(len(some.matches.n_objects), n_resamples, seed)
    found = {}
    for name, own in results.items():
        ap, value = np.zeros((len(some.classes), n_resamples)), np.zeros(len(some.classes))
        known: dict[int, NDArray[np.float64]] = {}
        for weight, result in zip(weights, own, strict=True):
            if id(result) not in known:  # a cell that no seed changes has one result for all
                known[id(result)] = resampled_ap(result, drawn, rule)
            ap += weight * known[id(result)]
            value += result.ap(rule) / len(own)
        with_mean = np.concatenate([mean_of_present(ap)[None], ap])
        measured = np.concatenate([mean_of_present(value[:, None]), value])
        centre = np.array([row[~np.isnan(row)].mean() if (~np.isnan(row)).any() else 0 for row in with_mean])
        found[name] = Measured(measured, with_mean + (measured - centre)[:, None])
    return found


def measure_accuracy(
    results: Mapping[tuple[str, ...], Sequence[Classification]], *, n_resamples: int, seed: int
) -> dict[str, dict[tuple[str, ...], Measured]]:
    """Measure accuracy and balanced accuracy of cells, on the resamples that `measure` has.

    Args:
        results: by the levels of a cell, one classification for each seed, all of the same images.
        n_resamples: B.
        seed: of the resamples.

    Returns:
        `accuracy` and `balanced accuracy`, each with the recall of the classes behind it.

    Raises:
        ConfigError: as `measure`.
    """
    weights = _seed_weights(results, n_resamples, seed)
    n_images = len(next(iter(results.values()))[0].actual)
    drawn = resampled_images(n_images, n_resamples, seed)
    found: dict[str, dict[tuple[str, ...], Measured]] = {"accuracy": {}, "balanced accuracy": {}}
    for name, own in results.items():
        resampled = [resampled_recall(each, drawn) for each in own]
        accuracy = sum(weight * each for weight, (each, _) in zip(weights, resampled, strict=True))
        recall = np.sum([w * each for w, (_, each) in zip(weights, resampled, strict=True)], axis=0)
        value = np.mean([each.recall for each in own], axis=0)
        for measured, mean, samples in (
            ("accuracy", np.mean([each.accuracy for each in own]), accuracy),
            ("balanced accuracy", mean_of_present(value[:, None])[0], mean_of_present(recall)),
        ):
            found[measured][name] = Measured(
                np.concatenate([[mean], value]), np.concatenate([np.asarray(samples)[None], recall])
            )
    return found


def _seed_weights(
    results: Mapping[tuple[str, ...], Sequence[object]], n_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return (S, B) how much the result of each seed counts in each resample; one in sum.

    Raises:
        ConfigError: no cell, or cells with different numbers of seeds.
    """
    n_seeds = {len(own) for own in results.values()}
    if len(n_seeds) != 1 or 0 in n_seeds:
        raise ConfigError(
            f"effects: every cell needs as many seeds as any other, at least one, got {sorted(n_seeds)}."
        )
    (S,) = n_seeds
    shares = np.random.default_rng([seed, 1]).multinomial(S, np.full(S, 1 / S), size=n_resamples).T / S
    weights: NDArray[np.float64] = 1 / S + (shares - 1 / S) * (math.sqrt(S / (S - 1)) if S > 1 else 0.0)
    return weights


def effects_of(table: Table) -> list[Effect]:
    """Return the effect of every pair of levels of every factor, uncorrected."""
    found = [
        _effect(table, (at, *pair))
        for at in range(len(table.factors))
        for pair in itertools.combinations(table.levels(at), 2)
    ]
    return [effect for effect in found if effect is not None]


def interactions_of(table: Table) -> list[Effect]:
    """Return how the effect of each pair of levels differs between those of another factor, uncorrected."""
    found = [
        _effect(table, (a, *first), (b, *second))
        for a, b in itertools.combinations(range(len(table.factors)), 2)
        for first in itertools.combinations(table.levels(a), 2)
        for second in itertools.combinations(table.levels(b), 2)
    ]
    return [effect for effect in found if effect is not None]


def simple_effects(
    table: Table, factor: str, first: str, second: str, at: Mapping[str, Sequence[str]]
) -> list[Effect]:
    """Return what a change of one factor does at each combination of levels of some others, uncorrected.

    A mean over levels that interact may describe none of them; this takes it apart.

    Args:
        table: the cells.
        factor: that changes,
        first: the level that is compared,
        second: with this one.
        at: the factors that are held, each with levels to hold it at; what is left is averaged over.
    """
    places, changed = [table.factors.index(name) for name in at], table.factors.index(factor)
    found = []
    for held in itertools.product(*at.values()):
        cells = {
            levels: measured
            for levels, measured in table.cells.items()
            if all(levels[place] == level for place, level in zip(places, held, strict=True))
        }
        effect = _effect(Table(table.factors, cells), (changed, first, second))
        if effect is not None:
            found.append(replace(effect, factor=f"{factor}, with {' and '.join(held)}"))
    return found


def _effect(table: Table, *contrasts: tuple[int, str, str]) -> Effect | None:
    """Return the mean of a contrast over all cells that have it; None where none has."""
    changes, resampled = [], []
    for levels in table.cells:
        if any(levels[at] != first for at, first, _ in contrasts):
            continue
        signed = []
        for swapped in itertools.product((False, True), repeat=len(contrasts)):
            other = list(levels)
            for (at, first, second), turn in zip(contrasts, swapped, strict=True):
                other[at] = second if turn else first
            signed.append((tuple(other), -1 if sum(swapped) % 2 else 1))
        if all(key in table.cells for key, _ in signed):
            changes.append(np.sum([sign * table.cells[key].value for key, sign in signed], axis=0))
            resampled.append(np.sum([sign * table.cells[key].samples for key, sign in signed], axis=0))
    if not changes:
        return None
    value, spread = np.mean(changes, axis=0), np.mean(resampled, axis=0)
    error = float(np.nanstd(spread[0]))
    p = p_value(float(value[0]), spread[0])
    return Effect(
        " x ".join(table.factors[at] for at, *_ in contrasts),
        " and ".join(first for _, first, _ in contrasts),
        " and ".join(second for *_, second in contrasts),
        centred_interval(float(value[0]), spread[0], move=False),
        tuple(centred_interval(*own, move=False) for own in zip(value[1:], spread[1:], strict=True)),
        len(changes),
        p,
        p,
        _DETECTABLE * error,
    )


def shares(table: Table, first: Sequence[str], second: Sequence[str]) -> list[Share]:
    """Divide the difference between two cells among the factors in which they differ.

    The levels of `second` are changed into those of `first` one factor at a time. What a factor brings
    depends on the order; its share is the mean over all orders (Shapley's value), so that the shares add up
    to the whole difference.

    Args:
        table: holds every cell on the way.
        first: the levels of one cell.
        second: of the other.

    Returns:
        A share for each factor that differs, and the whole difference last, its factor named "all".

    Raises:
        ConfigError: a cell on the way is missing.
    """
    places = [at for at, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]

    def cell(taken: frozenset[int]) -> Measured:
        levels = tuple(
            first[at] if at in taken or at not in places else second[at] for at in range(len(first))
        )
        if levels not in table.cells:
            raise ConfigError(f"shares: every cell on the way is needed, got none for {' / '.join(levels)}.")
        return table.cells[levels]

    found, n = [], len(places)
    for at in places:
        value, spread = 0.0, np.zeros(cell(frozenset()).samples.shape[1])
        others = [place for place in places if place != at]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for taken in map(frozenset, itertools.combinations(others, size)):
                with_it, without = cell(taken | {at}), cell(taken)
                value += weight * float(with_it.value[0] - without.value[0])
                spread += weight * (with_it.samples[0] - without.samples[0])
        found.append(Share(table.factors[at], centred_interval(value, spread)))
    a, b = cell(frozenset(places)), cell(frozenset())
    whole = centred_interval(float(a.value[0] - b.value[0]), a.samples[0] - b.samples[0])
    return [*found, Share("all", whole)]


def holm(effects: Sequence[Effect]) -> list[Effect]:
    """Correct the p values of a family of effects."""
    corrected = holm_corrected([effect.p for effect in effects])
    return [replace(effect, p_holm=p) for effect, p in zip(effects, corrected, strict=True)]


def holm_corrected(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number: the smallest by all, the next by one fewer, never falling.

    References:
        S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    corrected, worst = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = worst
    return corrected


def p_value(value: float, samples: NDArray[np.float64]) -> float:
    """Return the two-sided p value of a change, from the standard error of its resamples.

    Args:
        value: measured.
        samples: (B,); where they are all alike, 1 / B is all that they can tell.
    """
    if value == 0:
        return 1.0
    error = float(np.nanstd(samples))
    return math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else 1 / len(samples)
