"""Checks of parts that are not ours: what the rest of the package takes for granted of each.

Each check says in one sentence what a part does that it must not, or returns nothing. Our own parts are held
to them by the tests::

    from rcnn_svm.contracts import check_proposer

    check_proposer(Windows())
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from rcnn_svm.errors import NotFittedError, RcnnSvmError
from rcnn_svm.features.store import Featurizer
from rcnn_svm.heads.assign import describe_regions
from rcnn_svm.heads.base import ArrayBlocks, HeadBase, Scorer
from rcnn_svm.heads.kernels import Kernel, kernel_name, prepared
from rcnn_svm.postprocess import Postprocess
from rcnn_svm.proposals import KeyedProposer, Proposer, regions_of
from rcnn_svm.structures import Detections, GroundTruth, Image

__all__ = [
    "ContractError",
    "check_featurizer",
    "check_head",
    "check_kernel",
    "check_postprocess",
    "check_proposer",
    "check_scorer",
    "example_blocks",
    "example_image",
]


class ContractError(RcnnSvmError, AssertionError):
    """A part does not do what the rest of the package takes for granted."""


def _require(truth: bool, part: Any, sentence: str) -> None:
    if not truth:
        name = getattr(part, "__name__", type(part).__name__)
        raise ContractError(f"{name}: {sentence}")


def example_image(height: int = 96, width: int = 128, *, seed: int = 0) -> Image:
    """Return a uint8 (H, W, 3) image of smooth noise with a few plain rectangles, the same for a seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / rng.uniform(5, 30) + columns / rng.uniform(5, 30)) for _ in range(3)]
    image = (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8)
    for _ in range(4):
        x, y = int(rng.integers(max(1, width - 8))), int(rng.integers(max(1, height - 8)))
        image[y : y + height // 4 + 1, x : x + width // 4 + 1] = rng.integers(256, size=3)
    return image


def example_blocks(
    n_images: int = 12, n_regions: int = 60, n_features: int = 24, n_classes: int = 3, *, seed: int = 0
) -> ArrayBlocks:
    """Return small training regions whose features tell, with noise, which of 1 to 3 objects they overlap.

    Args:
        n_images: blocks.
        n_regions: proposals of each; the objects' own rows come first.
        n_features: D; features are not negative.
        n_classes: K; class k is called `class<k>`.
        seed: of everything.
    """
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


def check_proposer(proposer: Proposer) -> None:
    """Check that regions lie in the image, are the same each time and in several threads, whatever its size.

    Raises:
        ContractError: they are not; the sentence says how.
    """
    images = [example_image(), example_image(40, 31, seed=1), example_image(8, 8, seed=2)]
    before = images[0].copy()
    alone = [_tried(proposer, partial(regions_of, proposer, image, "example")) for image in images]
    _require(len(alone[0]) > 0, proposer, "must propose a region in an image of 96 x 128 pixels, got none.")
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda image: regions_of(proposer, image, "example"), images))
    _require(np.array_equal(images[0], before), proposer, "must leave the image alone, got it changed.")
    for one, other in zip(alone, again, strict=True):
        same = one.boxes.shape == other.boxes.shape and bool((one.boxes == other.boxes).all())
        _require(same, proposer, "must propose the same regions each time, in any thread, got others.")
    if isinstance(proposer, KeyedProposer):
        _require_key(proposer, proposer.key())


def check_featurizer(featurizer: Featurizer) -> None:
    """Check the shape of features, that each row depends on its own box alone, and the identity.

    Raises:
        ContractError: something is not so; the sentence says what.
    """
    image, n = example_image(), featurizer.n_features
    boxes = np.array([[0, 0, 128, 96], [10, 12, 60, 50], [70, 5, 120, 90], [3, 3, 9, 8]], np.float32)
    whole = _tried(featurizer, lambda: featurizer(image, boxes))
    _require(
        whole.shape == (4, n) and whole.dtype == np.float32,
        featurizer,
        f"must return float32 of shape (4, {n}) for 4 boxes, got {whole.dtype} of {whole.shape}.",
    )
    _require(bool(np.isfinite(whole).all()), featurizer, "must return finite features, got NaN or infinity.")
    none = featurizer(image, boxes[:0])
    _require(none.shape == (0, n), featurizer, f"must return shape (0, {n}) for no box, got {none.shape}.")
    read = featurizer.of_image(image)
    parts = np.concatenate([read(boxes[2:]), read(boxes[:2])])
    close = bool(np.allclose(parts, whole[[2, 3, 0, 1]], rtol=1e-3, atol=1e-3 * float(np.abs(whole).max())))
    _require(close, featurizer, "must give a box the same features beside any others, got different ones.")
    _require_key(featurizer, featurizer.key)


def check_head(head: HeadBase) -> None:
    """Check that a head keeps its parameters, trains, scores, and finds what can be found.

    Raises:
        ContractError: something is not so; the sentence says what.
    """
    blocks = example_blocks()
    copy = head.clone()
    _require(
        copy.get_params().keys() == head.get_params().keys(),
        head,
        "clone must keep all parameters, lost some.",
    )
    _require(
        head.about.keys() == {"family", "kernel"}, head, "must say family and kernel in about, says others."
    )
    try:
        copy.decision_function(blocks.features(0))
    except NotFittedError:
        pass
    else:
        raise ContractError(f"{type(head).__name__}: must raise NotFittedError before it is fitted, scored.")
    (fitted,) = _tried(head, lambda: list(copy.fit_grid(blocks, [{}])))
    _require(json.dumps(dict(fitted.details)) != "", head, "details must be plain data.")
    check_scorer(fitted.scorer, blocks.n_features, len(blocks.classes))
    for k, name in enumerate(blocks.classes):
        scores = np.concatenate([copy.decision_function(b)[:, k] for b in blocks.blocks])
        overlap = np.concatenate([t.overlap[:, k] for t in blocks.truths])
        found, rest = scores[overlap > 0.7].mean(), scores[overlap < 0.3].mean()
        _require(
            bool(found > rest),
            head,
            f"must score regions on {name} higher than background, got {found:.3g} and {rest:.3g}.",
        )


def check_scorer(scorer: Scorer, n_features: int, n_classes: int) -> None:
    """Check the shape of scores, that a row's score is its own, and that the arrays can be saved.

    Args:
        scorer: a trained head.
        n_features: D, the length of a row.
        n_classes: K, the columns of its scores.

    Raises:
        ContractError: something is not so; the sentence says what.
    """
    rows = np.abs(np.random.default_rng(0).normal(size=(7, n_features))).astype(np.float32)
    before = rows.copy()
    scores = _tried(scorer, lambda: scorer.decision_function(rows))
    _require(
        scores.shape == (7, n_classes) and scores.dtype == np.float32,
        scorer,
        f"must return float32 of shape (7, {n_classes}), got {scores.dtype} of {scores.shape}.",
    )
    _require(bool(np.isfinite(scores).all()), scorer, "must return finite scores, got NaN or infinity.")
    _require(np.array_equal(rows, before), scorer, "must leave the features alone, got them changed.")
    none = scorer.decision_function(rows[:0])
    _require(
        none.shape == (0, n_classes), scorer, f"must return (0, {n_classes}) for no row, got {none.shape}."
    )
    parts = np.concatenate([scorer.decision_function(rows[4:]), scorer.decision_function(rows[:4])])
    tolerance = 1e-3 * max(1.0, float(np.abs(scores).max()))
    close = bool(np.allclose(parts, scores[[4, 5, 6, 0, 1, 2, 3]], atol=tolerance))
    _require(close, scorer, "must give a row the same score beside any others, got different ones.")
    for name, array in scorer.to_arrays().items():
        plain = isinstance(array, np.ndarray) and array.dtype.kind in "biuf"
        _require(
            plain, scorer, f"to_arrays must hold arrays of numbers, got {type(array).__name__} for {name}."
        )


def check_kernel(kernel: Kernel) -> None:
    """Check that a function is a kernel: finite, symmetric, positive semidefinite on rows not negative.

    Raises:
        ContractError: it is not; the sentence says why.
    """
    rows = np.abs(np.random.default_rng(0).normal(size=(24, 9))).astype(np.float32)
    values = _tried(kernel, lambda: prepared(kernel, rows)(rows)).astype(np.float64)
    name = kernel_name(kernel)
    if not np.isfinite(values).all():
        raise ContractError(f"{name}: must be finite, got NaN or infinity.")
    scale = float(np.abs(values).max())
    if not np.allclose(values, values.T, atol=1e-4 * scale):
        raise ContractError(
            f"{name}: must be symmetric, got {np.abs(values - values.T).max():.3g} between twins."
        )
    least = float(np.linalg.eigvalsh((values + values.T) / 2).min())
    if least < -1e-4 * scale:
        raise ContractError(f"{name}: must be positive semidefinite, got an eigenvalue of {least:.3g}.")


def check_postprocess(postprocess: Postprocess) -> None:
    """Check that scored regions become detections of the image, whether or not boxes are regressed.

    Raises:
        ContractError: they do not; the sentence says how.
    """
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (30, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 60, (30, 2))], axis=1).astype(np.float32)
    scores = rng.normal(size=(30, 3)).astype(np.float32)
    deltas = rng.normal(scale=0.1, size=(30, 3, 4)).astype(np.float32)
    for own in (deltas, None):
        found = _tried(postprocess, partial(postprocess, "example", (120, 128), boxes, scores, own))
        _require(
            isinstance(found, Detections) and found.image_id == "example",
            postprocess,
            f"must return the Detections of the image that it was given, got {type(found).__name__}.",
        )
        inside = (found.labels >= 0) & (found.labels < 3)
        _require(bool(inside.all()), postprocess, "must return labels of the three classes, got others.")
    empty = postprocess("example", (120, 128), boxes[:0], scores[:0], deltas[:0])
    _require(len(empty) == 0, postprocess, f"must find nothing where there is no region, got {len(empty)}.")


def _tried(part: Any, call: Callable[[], Any]) -> Any:
    """Return what a part returns; what it raises becomes a sentence."""
    try:
        return call()
    except ContractError:
        raise
    except Exception as error:  # whatever a part that is not ours may raise
        name = getattr(part, "__name__", type(part).__name__)
        raise ContractError(f"{name}: must work on a small example, raised {error!r}.") from error


def _require_key(part: Any, key: Any) -> None:
    try:
        json.dumps(dict(key))
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"{type(part).__name__}: key must be plain data for JSON, got {error}."
        ) from error
