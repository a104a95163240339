"""A small comparison of heads, made up but consistent, for everything that reports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rcnn_svm.evaluation.bootstrap import paired_bootstrap
from rcnn_svm.evaluation.coco import evaluate_coco
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.report.tables import head_metrics
from rcnn_svm.structures import Dataset, Detections, GroundTruth, Sample

Browse = Callable[[Path, str], dict[str, Any]]

# Around what a reader would do: what came of it stands at the end of the page.
DRIVEN = """
<script>
window.addEventListener("load", () => {
  const told = {};
  const ask = (what) => [...document.querySelectorAll(what)];
  const press = (element) => {
    element.focus();
    told.focus = document.activeElement === element;
    element.click();
  };
  const change = (element, value, kind) => { element.value = value; element.dispatchEvent(new Event(kind)); };
  SCRIPT
  told.errors = errors;
  told.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  const done = document.createElement("pre");
  done.id = "driven";
  done.textContent = JSON.stringify(told);
  document.body.append(done);
});
</script>
"""

HEADS = {
    "linear-svm": 0.5,
    "linear-svm+bbox": 0.9,
    "rbf-svm": 0.55,
    "rbf-svm+bbox": 0.92,
    "softmax-refit": 0.1,
    "my<head>": 0.5,
}


def about(name):
    """Say what a head of this name is, as an experiment does."""
    base, boxes = name.removesuffix("+bbox"), name.endswith("+bbox")
    family = "svm" if "svm" in base else "softmax" if "softmax" in base else "other"
    kernel = {"linear-svm": "linear", "rbf-svm": "rbf"}.get(base)
    return {"family": family, "kernel": kernel, "boxes": boxes, "base": base}


def build(heads=HEADS, classes=("cat & dog", "car", "ghost"), n_images=14, objects=True, image_id="im<{}>"):
    """Make truths with none of the last class, and detections of which `skill` are near an object."""
    rng = np.random.default_rng(4)
    samples = []
    for i in range(n_images):
        size = (60 + 10 * (i % 3), 90)
        n = int(rng.integers(0, 4)) if objects else 0
        low = rng.integers(0, 30, (n, 2))
        truth = GroundTruth(np.hstack([low, low + 25]), rng.integers(0, 2, n), difficult=rng.random(n) < 0.15)
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        samples.append(Sample(image_id.format(i), size, truth, render=lambda pixels=pixels: pixels))
    dataset = Dataset("made up", "test", classes, tuple(samples))
    detections = {}
    for name, skill in heads.items():
        detections[name] = []
        for sample in samples:
            m = int(rng.integers(0, 9))
            low = rng.integers(0, 30, (m, 2))
            boxes, labels = np.hstack([low, low + rng.integers(5, 30, (m, 2))]), rng.integers(0, 3, m)
            scores = rng.normal(size=m)
            if len(sample.truth):
                pick = rng.integers(0, len(sample.truth), m)
                near = rng.random(m) < skill
                boxes = np.where(near[:, None], sample.truth.boxes[pick] + rng.integers(-2, 3, (m, 4)), boxes)
                labels = np.where(near, sample.truth.labels[pick], labels)
                scores = scores + 2 * near
            detections[name].append(Detections(sample.image_id, boxes, scores, labels))
    truths = [sample.truth for sample in samples]
    evals = {name: evaluate_voc(found, truths, classes) for name, found in detections.items()}
    cocos = {name: evaluate_coco(found, truths, classes) for name, found in detections.items()}
    bootstrap = paired_bootstrap(evals, n_resamples=100)
    metrics = {
        "schema": 1,
        "experiment": "tiny <test>",
        "dataset": "made up",
        "train_split": "trainval",
        "test_split": "test",
        "rule": "voc07",
        "n_train_images": 40,
        "n_test_images": n_images,
        "heads": {
            name: head_metrics(
                evals[name],
                cocos[name],
                bootstrap.mean[name],
                about=about(name),
                train_s=2.5,
                score_s_per_image=0.004,
                peak_rss_mb=321.0,
                details={"n_support_vectors": 1234} if "rbf" in name else {"C": 0.1},
            )
            for name in heads
        },
        "stages_s": {"proposals": 1.0, "features": 250.0, "train": 3.0, "detect": 4.0},
        "provenance": {
            "command": "x <y>",
            "commit": "abc",
            "seed": 0,
            "machine": {"cpu": "c", "cores": 2, "ram_gb": 4, "gpu": None},
            "versions": {"a": "1"},
        },
    }
    return SimpleNamespace(
        metrics=metrics,
        evals=evals,
        cocos=cocos,
        detections=detections,
        dataset=dataset,
        bootstrap=bootstrap,
        truths=truths,
    )


@pytest.fixture(scope="session")
def about_head():
    return about


@pytest.fixture(scope="session")
def comparison():
    return build()


@pytest.fixture(scope="session")
def build_comparison():
    return build


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return what opens a page in a browser as wide as a phone, does there what a script says, and tells.

    The script has `ask`, `press` and `change`, and puts what it finds into `told`, where `errors` and whether
    the page is too wide stand as well.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    listen = "<script>const errors = []; for (const kind of ['error', 'securitypolicyviolation']) "
    listen += "window.addEventListener(kind, (e) => errors.push(e.message || e.blockedURI), true);</script>"

    def call(page: Path, script: str) -> dict[str, Any]:
        text = page.read_text(encoding="utf-8").replace("<title>", listen + "<title>", 1)
        driven = tmp_path / "driven.html"
        driven.write_text(
            text.replace("</body>", DRIVEN.replace("SCRIPT", script) + "</body>"), encoding="utf-8"
        )
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        words += ["--window-size=390,800", "--virtual-time-budget=3000", "--dump-dom", driven.as_uri()]
        done = subprocess.run([browser, *words], capture_output=True, text=True, timeout=120, check=True)
        (found,) = re.findall(r'<pre id="driven">(.*?)</pre>', done.stdout)
        told: dict[str, Any] = json.loads(
            found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        )
        return told

    return call
