"""Exported detectors beside torch: the same detections, speed, size, imports; writes runtime.json.

    python benchmarks/runtime.py DATA [--work DIR [--part PART]]

Detectors are trained by the plain command on fruit and voc2007-mini below DATA, exported, and run on test
images of theirs in torch and in ONNX Runtime, one thread each, in turn. Two environments are made with pip,
one with what an export names instead of torch, one with OpenVINO. What lies in DIR is not made again, figures
neither, so that parts can be measured by several commands at once. Twenty minutes or so on one core, half of
them training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement

from rcnn_svm.boxes import iou
from rcnn_svm.datasets import load_splits
from rcnn_svm.detector import Detector, load_detector
from rcnn_svm.evaluation.voc import evaluate_voc
from rcnn_svm.features.sizes import resize
from rcnn_svm.files import write_json
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.progress import say, track
from rcnn_svm.proposals import Proposer, regions_of
from rcnn_svm.report.provenance import provenance
from rcnn_svm.runtime import REQUIREMENTS, Precision, load
from rcnn_svm.runtime.export import export_detector
from rcnn_svm.runtime.networks import Graph
from rcnn_svm.structures import Detections, Sample

ROOT = Path(__file__).parents[1]
SETS = ("fruit", "voc2007-mini")
N_IMAGES = 100
N_TWICE = 12
"""Images that are read twice and mirrored: all that a detector can do at once."""
N_CALIBRATED = 24
SCORES, OVERLAP, PIXELS = 1e-4, 0.99, 0.1
"""How far a score may be from torch's, and how well boxes must agree, to be of the same detection. Where
rounding decides whether a box votes, what it votes on moves by a pixel or so: those within `PIXELS` are
counted too."""
SIZES = """
import json, sys
from importlib import metadata
sizes = {}
for one in metadata.distributions():
    files = [one.locate_file(path) for path in one.files or []]
    sizes[one.name.lower()] = sum(path.stat().st_size for path in files if path.is_file())
json.dump(sizes, sys.stdout)
"""
OURS = "from rcnn_svm.runtime import load; import onnxruntime"
IMPORTS = "import time; t = time.process_time(); {}; print(time.process_time() - t)"
OPENVINO = """
import json, sys
import numpy as np
import openvino
core = openvino.Core()
exact = {"INFERENCE_PRECISION_HINT": "f32"}
graph = core.compile_model(core.read_model(sys.argv[1]), "CPU", exact)
with np.load(sys.argv[2]) as feeds:
    furthest = 0.0
    for i in range(len([name for name in feeds if name.startswith("boxes.")])):
        found = graph({name: feeds[f"{name}.{i}"] for name in ("image", "size", "boxes")})
        (scores,) = (value for key, value in found.items() if "scores" in key.get_names())
        furthest = max(furthest, float(np.abs(scores - feeds[f"scores.{i}"]).max()))
print(json.dumps({"version": openvino.__version__, "furthest": furthest}))
"""


def train(name: str, data: Path, work: Path) -> Detector:
    """Return a detector, trained by the plain command where it does not lie in `work` yet."""
    folder = work / name
    if not (folder / "detector.json").exists():
        say(f"training {name}")
        command = [sys.executable, "-m", "rcnn_svm", "train", str(data / name), "--out", str(folder)]
        command += ["--cache", str(work / "cache"), "--jobs", "1"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return load_detector(folder)


def agreement(ours: Detections, theirs: Detections) -> tuple[bool, int]:
    """Return whether all detections are the same, and how many of them have the same box up to rounding."""
    same, n_exact = len(ours) == len(theirs), 0
    for box, score, label in zip(theirs.boxes, theirs.scores, theirs.labels, strict=True):
        near = ours.boxes[(ours.labels == label) & (np.abs(ours.scores - score) <= SCORES)]
        same = same and bool((iou(box[None], near) >= OVERLAP).any())
        n_exact += bool((np.abs(near - box).max(axis=1) <= PIXELS).any())
    return same, n_exact


def row(name: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    rounded = {key: float(f"{value:.6g}") for key, value in figures.items()}
    return {"name": name, "unit": unit, "n": len(values), **rounded}


class Known:
    """A proposer that proposes for an image once, however many detectors ask."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._known: dict[bytes, Any] = {}

    def propose(self, image: np.ndarray) -> Any:
        """Return the regions of an image that was seen before at once."""
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in self._known:
            self._known[digest] = self._proposer.propose(image)
        return self._known[digest]


def timed(detect: Callable[..., Detections], image: np.ndarray, seconds: list[float]) -> Detections:
    started = time.process_time()
    found = detect(image)
    seconds.append(time.process_time() - started)
    return found


def compared(name: str, detector: Detector, samples: Sequence[Sample], folder: Path) -> dict[str, Any]:
    """Run both on images in turn; return how much is the same, and the CPU seconds of each."""
    export_detector(detector, folder)
    exported = load(folder, threads=1)
    if name != "fruit":  # where seconds count, each proposes for itself
        known = Known(detector.proposer)
        detector, exported = (replace(one, proposer=known) for one in (detector, exported))
    seconds: tuple[list[float], list[float]] = ([], [])
    n_same, n_exact, n_found, furthest = 0, 0, 0, 0.0
    for sample in track(samples, name):
        image = sample.read()
        theirs, ours = timed(detector, image, seconds[0]), timed(exported, image, seconds[1])
        agrees, exact = agreement(ours, theirs)
        n_same, n_exact, n_found = n_same + agrees, n_exact + exact, n_found + len(theirs)
        if len(ours) == len(theirs) and len(ours):
            furthest = max(furthest, float(np.abs(np.sort(ours.scores) - np.sort(theirs.scores)).max()))
    say(f"{name}: {n_same} of {len(samples)} the same, {n_exact} of {n_found} boxes, scores {furthest:.2g}")
    figures = {"same": n_same, "n": len(samples), "exact": n_exact, "found": n_found}
    return {**figures, "furthest": furthest, "seconds": seconds}


ROUNDED: dict[str, tuple[Precision, int]] = {
    "fp32": ("fp32", 0),
    "fp16": ("fp16", 0),
    "int8": ("int8", 0),
    "int8-calibrated": ("int8", N_CALIBRATED),
}
"""Precisions, each with the number of images that it is calibrated on."""


def rounded(name: str, data: Path, work: Path) -> list[dict[str, Any]]:
    """Return mAP on test of fruit, size, and CPU seconds an image, of a precision."""
    splits, detector, (precision, n) = load_splits(data / "fruit"), train("fruit", data, work), ROUNDED[name]
    images = list(splits.trainval)[::10][:n]
    done = export_detector(detector, work / f"fruit-{name}", precision=precision, calibrate=images)
    known, seconds = Known(detector.proposer), list[float]()
    exported = replace(load(done.folder, threads=1), proposer=known)
    found = []
    for sample in track(splits.test, name):
        image = sample.read()
        known.propose(image)
        found.append(replace(timed(exported, image, seconds), image_id=sample.image_id))
    truths = [sample.truth for sample in splits.test]
    measured = 100 * evaluate_voc(found, truths, splits.test.classes).map()
    say(f"{name}: {measured:.2f} mAP, {done.n_bytes / 1e6:.1f} MB")
    return [
        {**row(f"{name}: mAP", "mAP", [measured]), "n": len(found)},
        row(f"{name}: file", "MB", [done.n_bytes / 1e6]),
        row(f"{name}: an image, regions known", "CPU s", seconds),
    ]


def environment(folder: Path, *what: str) -> Path | None:
    """Return the Python of an environment with packages, or None where pip cannot have them."""
    python = folder / "bin" / "python"
    if not (folder / "whole").exists():
        venv.create(folder, with_pip=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *what], check=False)
        if done.returncode:
            return None
        (folder / "whole").touch()
    return python


def asked(python: Path, code: str, *arguments: str) -> str:
    """Return what a program prints in an environment."""
    command, own = [str(python), "-c", code, *arguments], dict(os.environ)
    own.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=elsewhere, env=own)
    return done.stdout


def needed(name: str, sizes: dict[str, int]) -> set[str]:
    """Return the names of a distribution and of all that it requires, of those that are installed."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        one = waiting.pop().lower()
        if one in found or one not in sizes:
            continue
        found.add(one)
        for text in metadata.requires(one) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def target(
    value: float, unit: str, n: int, ours: float, peer: float | None, peer_name: str, how: str
) -> dict[str, Any]:
    return {
        "value": float(f"{value:.4g}"),
        "unit": unit,
        "n": n,
        "ours": float(f"{ours:.4g}"),
        "peer": None if peer is None else float(f"{peer:.4g}"),
        "peer_name": peer_name,
        "how": how,
    }


def whole_environment() -> dict[str, int]:
    """Return the bytes of all that a default installation of the package has, torch among it, by name."""
    sizes = json.loads(asked(Path(sys.executable), SIZES))
    return {name: sizes[name] for name in needed("rcnn-svm", sizes)}


def openvino_difference(detector: Detector, samples: Sequence[Sample], work: Path) -> dict[str, Any] | None:
    """Return the version of OpenVINO and how far its scores are from ONNX Runtime's; None without a wheel."""
    python = environment(work / "openvino", "openvino", "numpy")
    if python is None:
        return None
    path = export_detector(detector, work / "read").folder / "detector.onnx"
    graph, feeds = Graph(path, threads=1), {}
    for i, sample in enumerate(samples):
        image = sample.read()
        boxes = regions_of(detector.proposer, image, sample.image_id).boxes
        resized, _ = resize(image, detector.features.longer_sides[0] / max(image.shape[:2]))
        given = {"image": resized, "size": np.array(image.shape[:2]), "boxes": boxes}
        feeds |= {f"{key}.{i}": value for key, value in given.items()}
        feeds[f"scores.{i}"] = graph(**given)["scores"]
    np.savez(work / "feeds.npz", **feeds)
    found: dict[str, Any] = json.loads(asked(python, OPENVINO, str(path), str(work / "feeds.npz")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the data sets fruit and voc2007-mini")
    parser.add_argument("--work", type=Path, help="where detectors and environments are made, and kept")
    parser.add_argument("--part", choices=PARTS, help="measure this alone, to be kept in --work")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        found = {}
        for part in PARTS if options.part is None else [options.part]:
            kept = work / f"{part}.json"
            if not kept.exists():
                write_json(kept, PARTS[part](options.data, work))
            found[part] = json.loads(kept.read_text())
    if options.part is None:
        write_json(options.out / "runtime.json", summed(found))


def same_of(name: str, data: Path, work: Path) -> dict[str, Any]:
    detector = train(name.partition("-twice")[0], data, work)
    samples = list(load_splits(data / name.partition("-twice")[0]).test)[:N_IMAGES]
    if name.endswith("-twice"):
        detector, samples = looking_twice(detector), samples[:N_TWICE]
    return compared(name, detector, samples, work / f"{name}-onnx")


def installed(data: Path, work: Path) -> dict[str, Any]:
    """Return bytes of what is installed, and CPU seconds of imports."""
    export_detector(train("fruit", data, work), work / "imported")
    python = environment(work / "environment", *REQUIREMENTS)
    assert python is not None, "the environment without torch could not be made"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(ROOT)], check=True)
    sizes = json.loads(asked(python, SIZES))
    imports: dict[str, list[float]] = {"import onnxruntime": [], OURS: [], "loaded": []}
    codes = {"loaded": f"from rcnn_svm.runtime import load; load({str(work / 'imported')!r})"}
    for _ in range(7):
        for name, seconds in imports.items():
            seconds.append(float(asked(python, IMPORTS.format(codes.get(name, name)))))
    own = {name: size for name, size in sizes.items() if name not in ("pip", "setuptools", "wheel")}
    return {"own": own, "default": whole_environment(), "imports": imports}


def openvino(data: Path, work: Path) -> dict[str, Any] | None:
    samples = list(load_splits(data / "fruit").test)[:10]
    return openvino_difference(train("fruit", data, work), samples, work)


PARTS: dict[str, Callable[[Path, Path], Any]] = {
    **{name: partial(same_of, name) for name in (*SETS, "fruit-twice")},
    **{name: partial(rounded, name) for name in ROUNDED},
    "environment-figures": installed,
    "openvino-figures": openvino,
}


def summed(found: dict[str, Any]) -> dict[str, Any]:
    """Return the whole result."""
    results = {name: found[name] for name in (*SETS, "fruit-twice")}
    rows: list[dict[str, Any]] = []
    for name, one in results.items():
        rows.append(row(f"{name}: the same detections", "share of images", [one["same"] / one["n"]]))
        rows[-1]["n"] = one["n"]
        title = f"{name}: detections with a box within {PIXELS:g} pixels"
        rows.append({**row(title, "share of detections", [one["exact"] / one["found"]]), "n": one["found"]})
        rows.append(row(f"{name}: furthest score", "score", [one["furthest"]]))
    for runtime, seconds in zip(("torch", "ONNX Runtime"), results["fruit"]["seconds"], strict=True):
        rows.append(row(f"fruit: detect an image, {runtime}", "CPU s", seconds))
    rows += [measured for name in ROUNDED for measured in found[name]]
    own, torchs, imports = (found["environment-figures"][name] for name in ("own", "default", "imports"))
    for title, them in (("without torch", own), ("default", torchs)):
        rows += [
            row(f"installed, {title}: {name}", "MB", [size / 1e6])
            for name, size in sorted(them.items(), key=lambda item: -item[1])[:12]
        ]
    loads = imports.pop("loaded")
    rows += [row(code, "CPU s", seconds) for code, seconds in imports.items()]
    rows.append(row("the same, and a detector of fruit loaded", "CPU s", loads))
    if (other := found["openvino-figures"]) is not None:
        title = f"OpenVINO {other['version'].split('-')[0]}: furthest score from ONNX Runtime's"
        rows.append({**row(title, "score", [other["furthest"]]), "n": 10})
    n, n_same, exact, found = (
        sum(results[name][key] for name in SETS) for key in ("n", "same", "exact", "found")
    )
    again = results["fruit-twice"]
    torch_s, onnx_s = (statistics.median(seconds) for seconds in results["fruit"]["seconds"])
    theirs, ours = (statistics.median(seconds) for seconds in imports.values())
    total, whole = sum(own.values()) / 1e6, sum(torchs.values()) / 1e6
    return {
        "schema": 1,
        "benchmark": "runtime",
        "targets": {
            "onnx_same_detections": target(
                n_same / n,
                "fraction",
                n,
                n_same,
                n,
                "images",
                f"Images of test in which the exported detector finds what torch finds: as many, each with "
                f"its class, its score within {SCORES:g} and its box with an IoU of {OVERLAP:g}, of fruit "
                f"and voc2007-mini, default detectors. Of {found} boxes {found - exact} are further than "
                f"{PIXELS:g} pixels apart. With a second look and mirror images {again['same']} of "
                f"{again['n']}: where regions that rounding has moved are read again, scores differ by up to "
                f"{again['furthest']:.2g}.",
            ),
            "runtime_import_ratio": target(
                ours / theirs,
                "x",
                len(imports[OURS]),
                ours,
                theirs,
                "import onnxruntime, CPU s",
                f"`{OURS}` in the environment without torch; with a detector loaded it is "
                f"{statistics.median(loads):.2f} s.",
            ),
            "runtime_install_mb": target(
                total,
                "MB",
                1,
                total,
                whole,
                "a default installation, MB",
                "Files of all that an export names instead of torch, the package among it; "
                "numba, its LLVM and OpenCV are two thirds of it.",
            ),
            "detect_speedup_of_runtime_over_torch": target(
                torch_s / onnx_s,
                "x",
                results["fruit"]["n"],
                onnx_s,
                torch_s,
                "torch, CPU s an image",
                "The whole detector, proposals among it, on test images of fruit in turn, one thread each.",
            ),
        },
        "rows": rows,
        "provenance": provenance(seed=0),
    }


def looking_twice(detector: Detector) -> Detector:
    """Return a detector that reads mirror images too, and its surest regions again."""
    assert isinstance(detector.postprocess, PostprocessConfig)
    postprocess = replace(detector.postprocess, second_look=100, min_score=-6.0)
    return replace(detector, postprocess=postprocess, features=replace(detector.features, mirror=True))


if __name__ == "__main__":
    main()
