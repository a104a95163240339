"""Put the figures of `results/` into README.md, between its two marks, and results/benchmarks/README.md.

python benchmarks/summary.py           # rewrite both
python benchmarks/summary.py --check   # exit 1 where they do not say what results/ hold
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
DATA = {
    "demo": "digits in scenes, `small_cnn` trained from nothing",
    "fruit": "fruit, `efficientnet_lite2` with ImageNet weights",
    "voc2007-mini": "1000 images of VOC2007 test, split anew; not comparable with published VOC2007 figures",
}
HEADLINES = {
    "default_voc2007_mini_map": "`rcnn-svm train` on the 600 images of voc2007-mini: mAP on test",
    "default_voc2007_mini_cpu_s": "its CPU seconds, proposals, features, held-out images and test included",
    "default_speedup_over_old_default_voc2007_mini": "the same against the former default, CPU seconds",
    "default_fruit_map": "`rcnn-svm train` on the 240 images of fruit: mAP on test",
    "default_fruit_wall_s": "its wall clock on two cores, from nothing cached to a saved detector",
    "default_speedup_over_old_default_fruit": "the same against the former default, CPU seconds",
    "best_voc2007_mini_map": "`rcnn-svm train --preset best` on voc2007-mini: mAP on test",
    "cpu_seconds_under_load_ratio": "CPU seconds of a training beside other work on all cores, against alone",
    "shared_speedup_alexnet": "fc7 of 2000 regions on shared convolutions; the peer warps every region",
    "shared_minus_warped_map_voc2007_mini": "mAP of shared minus warped features, same boxes and head",
    "warped_fraction_of_network_alexnet": "warped crops, all included, against the bare network",
    "linear_svm_speedup_over_loop_60k": "20 linear SVMs, 60,000 x 4096; the peer is a LinearSVC each",
    "linear_svm_speedup_over_loop_real": "the same on 177,000 real regions, read from disk",
    "mining_all_regions_speedup": "1.1 million regions mined; the peer is R-CNN's schedule on LinearSVC",
    "rbf_training_speedup": "20 RBF SVMs; the peer is an SVC each",
    "rbf_scoring_speedup": "scoring with them; the peer is SVC.decision_function",
    "selective_search_fast_speedup": "selective search, fast mode; the peer is OpenCV's",
    "selective_search_quality_speedup": "selective search, quality mode; the peer is OpenCV's",
    "train_peak_rss_mb": "peak memory of a training on 20,000 images; the peer is 2,500 images",
}
"""The targets that README.md shows, in plain words."""


def block(results: Path) -> str:
    """Return the Markdown between the marks."""
    parts = [
        BEGIN,
        "",
        "## Results",
        "",
        "AP by the rule of VOC2007 (11 points), in percent, 95 % intervals.",
    ]
    for name, words in DATA.items():
        path = results / name / "metrics.json"
        if path.exists():
            parts += ["", *experiment(name, words, json.loads(path.read_text()))]
    found = targets(results)
    parts += [
        "",
        "**[Benchmarks](results/benchmarks/README.md)**, ratios measured in one run with the peer:",
        "",
        "| | value | ours | peer |",
        "|---|--:|--:|--:|",
        *(f"| {words} | {cells(found[name])} |" for name, words in HEADLINES.items() if name in found),
    ]
    return "\n".join([*parts, "", END])


def targets(results: Path) -> dict[str, dict[str, Any]]:
    """Return the targets of all benchmarks by name."""
    files = sorted((results / "benchmarks").glob("*.json"))
    return {name: found for path in files for name, found in json.loads(path.read_text())["targets"].items()}


def all_benchmarks(results: Path) -> str:
    """Return the page of all targets."""
    parts = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/summary.py` from the files beside it, which hold the raw figures, the "
        "commands, commits, versions and the machine. Ratios are measured in one run with the peer; above 1 "
        "ours is faster or smaller. Missed targets stay, with their true values.",
    ]
    for path in sorted((results / "benchmarks").glob("*.json")):
        content = json.loads(path.read_text())
        if not content["targets"]:
            continue
        parts += ["", f"## [{path.stem}]({path.name})"]
        runs: dict[tuple[str, str], list[str]] = {}
        for name, found in content["targets"].items():
            run = {**content["provenance"], **found}  # a target measured by a run of its own says so
            row = f"| {name} | {cells(found)} | {found['how']} |"
            runs.setdefault((run["command"], run["commit"]), []).append(row)
        for (command, commit), rows in runs.items():
            parts += ["", f"`{command}`, commit {commit[:8]}", ""]
            parts += ["| target | value | ours | peer | how |", "|---|--:|--:|--:|---|", *rows]
    return "\n".join([*parts, ""])


def experiment(name: str, words: str, metrics: dict[str, Any]) -> list[str]:
    """Return the table of one experiment."""
    stages = ", ".join(f"{key} {value:.0f}" for key, value in metrics["stages_s"].items())
    heads = metrics["heads"]
    # Files of older versions have no measures of COCO.
    coco = all("coco" in found for head, found in heads.items() if head.endswith("+bbox"))
    columns = [
        "without box regression",
        "with it and voting",
        *["its COCO AP, AP50, AP75"] * coco,
        "training s",
    ]
    lines = [
        f"**[{name}](results/{name}/README.md)**: {words}; {metrics['n_train_images']} images to train and "
        f"choose on, {metrics['n_test_images']} to test. Seconds: {stages}.",
        "",
        f"| head | {' | '.join(columns)} |",
        f"|---|{'--:|' * len(columns)}",
    ]
    for head, plain in heads.items():
        if not head.endswith("+bbox"):
            boxed = heads[f"{head}+bbox"]
            cells = [head, span(plain), span(boxed)]
            cells += [", ".join(f"{value:.1f}" for value in boxed["coco"].values())] if coco else []
            lines.append(f"| {' | '.join(cells)} | {plain['train_s']:.1f} |")
    return lines


def span(head: dict[str, Any]) -> str:
    """Return a mean AP with its interval."""
    low, high = head["mAP_interval"]
    return f"{head['mAP']:.1f} [{low:.1f}, {high:.1f}]"


def cells(found: dict[str, Any]) -> str:
    """Return value, ours and peer of a target as cells of a table."""
    peer = "" if found["peer"] is None else f"{found['peer']:.4g}"
    value = f"{found['value']:.4g}" if found["value"] >= 1000 else f"{found['value']:.3g}"
    return f"{value} {found['unit']} | {found['ours']:.4g} | {peer}"


def main() -> int:
    """Rewrite or check the two pages."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1] if END in rest else rest
    pages = {
        readme: before + block(ROOT / "results") + after,
        ROOT / "results" / "benchmarks" / "README.md": all_benchmarks(ROOT / "results"),
    }
    wrong = [path for path, page in pages.items() if not path.exists() or path.read_text() != page]
    if "--check" in sys.argv[1:]:
        for path in wrong:
            name = path.relative_to(ROOT)
            print(f"{name} does not say what results/ hold. Run `python benchmarks/summary.py`.")
        return 1 if wrong else 0
    for path in wrong:
        path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
