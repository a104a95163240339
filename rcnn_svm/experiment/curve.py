"""Learning curves: what each head makes of 1, 2, 3, 5, 10, 30 images of a class, and what more would bring.

Images are drawn from `train`, several times for each size; all heads see the same draws, the same regions and
the same features of the network as it is. A head's settings are chosen on val, once for each size, on the
first draw, the same number for all heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcnn_svm.cache import CacheLimit
from rcnn_svm.datasets import Splits
from rcnn_svm.detector import Model
from rcnn_svm.evaluation.bootstrap import Interval, centred_interval
from rcnn_svm.evaluation.classification import Classification, classify
from rcnn_svm.evaluation.effects import Measured, holm_corrected, measure, measure_accuracy, p_value
from rcnn_svm.evaluation.forecast import Forecast, forecast
from rcnn_svm.evaluation.voc import EvalResult, evaluate_voc
from rcnn_svm.experiment.choosing import Scalers, without_boxes
from rcnn_svm.experiment.data import require_measurable
from rcnn_svm.experiment.kept import Kept
from rcnn_svm.experiment.learning import Frozen
from rcnn_svm.experiment.parts import Parts, Run
from rcnn_svm.experiment.recipe import prepare
from rcnn_svm.experiment.selection import choose_head, detected, score_images
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.postprocess import PAPER
from rcnn_svm.progress import Stages, track
from rcnn_svm.structures import Dataset, Detections

__all__ = ["SIZES", "Curve", "Difference", "draw_images", "learning_curve"]

SIZES = (1, 2, 3, 5, 10, 30)
"""Images of each class."""
_TEST_REGIONS = 300
_PLAIN = without_boxes(PAPER)


@dataclass(frozen=True)
class Difference:
    """The mAP of one head less that of another at one size, on the same draws and resamples.

    Attributes:
        first: name.
        second: name.
        size: images of each class; None for all.
        change: a fraction, with its 95 % interval.
        p_holm: two-sided, corrected by Holm's method for all pairs and sizes of the curve.
    """

    first: str
    second: str
    size: int | None
    change: Interval
    p_holm: float

    @property
    def decided(self) -> bool:
        """Whether it stands after the correction."""
        return self.p_holm < 0.05


@dataclass(frozen=True, eq=False)
class Curve:
    """What heads reached with growing numbers of images.

    Attributes:
        sizes: images of each class; None for all of `train`.
        n_images: mean number of images of a draw, by size.
        n_objects: mean number of objects in them.
        n_draws: how many draws.
        heads: names, in the order of `points`.
        points: by head, then by size.
        accuracy: of whole images of one class each, by `accuracy` and `balanced accuracy`, then by head, then
            by size; else empty.
        settings: that were chosen, by head and size.
        forecasts: by head; empty with fewer than four sizes.
    """

    sizes: tuple[int | None, ...]
    n_images: tuple[float, ...]
    n_objects: tuple[float, ...]
    n_draws: int
    heads: tuple[str, ...]
    points: Mapping[str, Sequence[Measured]]
    accuracy: Mapping[str, Mapping[str, Sequence[Measured]]]
    settings: Mapping[str, Sequence[Mapping[str, object]]]
    forecasts: Mapping[str, Forecast]

    def differences(self) -> list[Difference]:
        """Return how the heads differ at every size: pair by pair, all of them one family."""
        pairs = [
            (a, b, at) for a, b in itertools.combinations(self.heads, 2) for at in range(len(self.sizes))
        ]
        found, p_values = [], []
        for first, second, at in pairs:
            a, b = self.points[first][at], self.points[second][at]
            value, samples = float(a.value[0] - b.value[0]), a.samples[0] - b.samples[0]
            found.append(centred_interval(value, samples))
            p_values.append(p_value(value, samples))
        return [
            Difference(first, second, self.sizes[at], change, p)
            for (first, second, at), change, p in zip(pairs, found, holm_corrected(p_values), strict=True)
        ]


def learning_curve(
    parts: Parts,
    splits: Splits,
    run: Run,
    heads: Sequence[HeadRecipe],
    *,
    sizes: Sequence[int] = SIZES,
    n_draws: int = 10,
) -> Curve:
    """Train heads on draws of growing size and measure each on the 300 best regions of a test image.

    Args:
        parts: of the experiment, for its proposals, features and AP.
        splits: of one data set.
        run: how.
        heads: what is trained; their grids are tried on val.
        sizes: images of each class, rising; where they take all of `train` they are left out, it comes last.
        n_draws: at least 1.

    Raises:
        DataError: as `run_experiment`, and a test split without an object.
    """
    require_measurable(splits.test)
    frozen = replace(parts, learner=Frozen(), heads=tuple(heads), choose=True)
    room = CacheLimit(run.cache, run.cache_limit)
    stages = Stages(("proposals", "network", "features", "curve"))
    ready = prepare(frozen, splits, run, stages, room)
    learned = ready.learn(ready.train)
    val, test = (part.limited(_TEST_REGIONS) for part in (ready.val, ready.test))
    for part in (ready.train, val, test):
        learned.fill(part)
    val_rows, test_rows = learned.blocks(val), learned.blocks(test)
    # One scaling for all sizes: of these, R-CNN's mean length alone looks at the images.
    scalers = Scalers(learned.blocks(ready.train))
    reached = [k for k in sizes if k < max(_counts(splits.train))]
    chosen: dict[str, list[Mapping[str, object]]] = {recipe.name: [] for recipe in heads}
    results: dict[tuple[str, ...], list[EvalResult]] = {}
    taken_for: dict[tuple[str, ...], list[Classification]] = {}
    n_images, n_objects = [], []
    kept = Kept(run.cache, splits, frozen)

    def one_size(
        recipe: HeadRecipe, size: int | None, draws: Sequence[Dataset]
    ) -> tuple[Mapping[str, Any], list[list[Detections]]]:
        """Choose a setting on the first draw, train on each, and return what each finds in test."""
        scaler, at, found = scalers.get(recipe.scaling), None, []
        settings = recipe.settings()
        for d, draw in enumerate(track(draws, f"{recipe.name}, {size or 'all'} images of a class")):
            what = {"curve": repr(recipe), "size": size, "draw": d, "test_regions": _TEST_REGIONS}
            known = kept.read(what)
            if known is None:
                rows = learned.blocks(ready.train.part(draw))
                if at is None:
                    choice, _ = choose_head(
                        recipe, rows, val_rows, scaler, _PLAIN, parts.rule, n_jobs=run.n_jobs
                    )
                    at = settings.index(choice.settings)
                (fitted,) = recipe.fit(rows.scaled(scaler), [settings[at]], n_jobs=run.n_jobs)
                scored = score_images(test_rows, Model(fitted.scorer, scaler))
                known = {"at": at}, {"plain": detected(test_rows, scored, _PLAIN)}
                kept.write(what, *known)
            at = known[0]["at"]
            found.append(known[1]["plain"])
        assert at is not None  # there is a draw at least
        return settings[at], found

    with stages(
        "curve", f"{len(heads)} heads, {n_draws} draws of each of {len(reached)} sizes, and all images"
    ):
        for size in (*reached, None):
            draws = (
                [splits.train]
                if size is None
                else [
                    draw_images(splits.train, size, np.random.default_rng([parts.seed, size, d]))
                    for d in range(n_draws)
                ]
            )
            n_images.append(float(np.mean([len(draw) for draw in draws])))
            n_objects.append(float(np.mean([sum(len(s.truth) for s in draw) for draw in draws])))
            for recipe in heads:
                settings, found = one_size(recipe, size, draws)
                chosen[recipe.name].append(recipe.shown(settings))
                times, key = n_draws if size is None else 1, (recipe.name, str(size))
                own = [evaluate_voc(each, test.truths, test_rows.classes, rule=parts.rule) for each in found]
                results[key] = own * times
                if splits.whole:
                    named = [classify(each, test.truths, test_rows.classes) for each in found]
                    taken_for[key] = [each for each in named if each is not None] * times
    room.hold(finished=True)
    measured = measure(results, n_resamples=parts.n_bootstrap, seed=parts.seed, rule=parts.rule)
    every = (*reached, None)
    points = {recipe.name: [measured[recipe.name, str(size)] for size in every] for recipe in heads}
    accuracy: dict[str, dict[str, list[Measured]]] = {}
    if taken_for and all(taken_for.values()):
        by_measure = measure_accuracy(taken_for, n_resamples=parts.n_bootstrap, seed=parts.seed)
        accuracy = {
            name: {recipe.name: [found[recipe.name, str(size)] for size in every] for recipe in heads}
            for name, found in by_measure.items()
        }
    ahead = [n_images[-1] * factor for factor in (2.0, 4.0)]
    forecasts = {
        name: forecast(
            n_images, [own.value[0] for own in row], np.stack([own.samples[0] for own in row]), ahead
        )
        for name, row in points.items()
        if len(every) >= 4
    }
    names = tuple(recipe.name for recipe in heads)
    return Curve(
        every, tuple(n_images), tuple(n_objects), n_draws, names, points, accuracy, chosen, forecasts
    )


def draw_images(dataset: Dataset, n: int, rng: np.random.Generator) -> Dataset:
    """Draw images until every class is in `n` of them, or in all that there are with it.

    Images count for every class that is in them, and all their labels are used. Classes come rarest first, so
    that what their images hold besides is counted.

    Args:
        dataset: a training split.
        n: images of each class.
        rng: of the draw.
    """
    present = _present(dataset)
    taken = np.zeros(len(dataset), bool)
    for k in np.argsort(present.sum(axis=0), kind="stable"):
        missing = n - int((present[:, k] & taken).sum())
        others = np.flatnonzero(present[:, k] & ~taken)
        taken[rng.permutation(others)[: max(0, missing)]] = True
    samples = tuple(sample for sample, own in zip(dataset, taken, strict=True) if own)
    return replace(dataset, samples=samples)


def _present(dataset: Dataset) -> NDArray[np.bool_]:
    """Return (N, K) whether an object of a class that could be a positive is in an image."""
    present = np.zeros((len(dataset), len(dataset.classes)), bool)
    for i, sample in enumerate(dataset):
        truth = sample.truth
        present[i, truth.labels[~(truth.difficult | truth.crowd)]] = True
    return present


def _counts(dataset: Dataset) -> list[int]:
    return [int(n) for n in _present(dataset).sum(axis=0)]
