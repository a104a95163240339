"""Write `tide.json`: what the package tidecv finds on made-up splits.

    pip install tidecv==1.0.1 && python tests/golden/tide.py tests/golden/tide.json [N_SPLITS]

tidecv is no dependency of the tests: what it found once is kept. No two scores are equal, and every class has
an object: on both edges its answer is not ours, see `rcnn_svm.evaluation.tide`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

N_CLASSES = 3


def made_up(seed: int) -> list[dict[str, Any]]:
    """Return images: objects (box, label, crowd) and detections (box, label, score), errors of every type."""
    rng = np.random.default_rng(seed)
    n_images = int(rng.integers(3, 9))
    scores = iter((rng.permutation(1000) / 1000).tolist())
    images = []
    for i in range(n_images):
        n = int(rng.integers(0, 5)) if i else N_CLASSES
        low = rng.integers(0, 120, (n, 2))
        boxes = np.concatenate([low, low + rng.integers(10, 60, (n, 2))], axis=1)
        labels = rng.integers(0, N_CLASSES, n) if i else np.arange(N_CLASSES)
        crowd = (rng.random(n) < 0.15) & (i > 0)
        m = int(rng.integers(0, 16))
        low = rng.integers(0, 120, (m, 2))
        guesses = np.concatenate([low, low + rng.integers(10, 60, (m, 2))], axis=1)
        names = rng.integers(0, N_CLASSES, m)
        if n:
            near, pick = rng.random(m) < 0.8, rng.integers(0, n, m)
            shake = rng.integers(-1, 2, (m, 4)) * rng.integers(0, 16, (m, 1))
            guesses = np.where(near[:, None], boxes[pick] + shake, guesses)
            names = np.where(near & (rng.random(m) < 0.7), labels[pick], names)
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        images.append(
            {
                "objects": [[*b, k, c] for b, k, c in zip(boxes.tolist(), labels.tolist(), crowd.tolist())],  # noqa: B905
                "detections": [[*b, k, next(scores)] for b, k in zip(guesses.tolist(), names.tolist())],  # noqa: B905
            }
        )
    return images


def measured(images: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mAP, dAP by type and the number of mistakes by type, those of ignored detections left out."""
    from tidecv import TIDE
    from tidecv.data import Data

    truth, found = Data("truth"), Data("found")
    for i, image in enumerate(images):
        truth.add_image(i, str(i))
        for x1, y1, x2, y2, label, crowd in image["objects"]:
            add = truth.add_ignore_region if crowd else truth.add_ground_truth
            add(i, label, [x1, y1, x2 - x1, y2 - y1])
        for x1, y1, x2, y2, label, score in image["detections"]:
            found.add_detection(i, label, score, [x1, y1, x2 - x1, y2 - y1])
    tide = TIDE()
    run = tide.evaluate(truth, found, mode=TIDE.BOX)
    errors = run.fix_main_errors() | run.fix_special_errors()
    counts = {
        kind.short_name: sum(not hasattr(e, "pred") or e.pred["used"] is not None for e in of_kind)
        for kind, of_kind in run.error_dict.items()
    }
    costs = {kind.short_name: cost for kind, cost in errors.items()}
    return {"images": images, "mAP": run.ap, "dAP": costs, "counts": counts}


if __name__ == "__main__":
    n_splits = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    cases = [measured(made_up(seed)) for seed in range(n_splits)]
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    source = "tidecv 1.0.1, by tests/golden/tide.py"
    Path(sys.argv[1]).write_text(f'{{"source": "{source}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")
