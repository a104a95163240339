"""Put the figures of `results/` into README.md, between its two marks.

python benchmarks/summary.py           # rewrite README.md
python benchmarks/summary.py --check   # exit 1 where README.md does not say what results/ hold
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
    "fruit": "fruit, `mobilenet_v2` with ImageNet weights",
    "voc2007-mini": "1000 images of VOC2007 test, split anew; not comparable with published VOC2007 figures",
}


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
    targets = [line for path in sorted((results / "benchmarks").glob("*.json")) for line in bench(path)]
    if targets:
        parts += ["", "Speed, ratios measured in one run with the peer:", ""]
        parts += ["| target | value | ours | peer | how |", "|---|--:|--:|--:|---|", *targets]
    return "\n".join([*parts, "", END])


def experiment(name: str, words: str, metrics: dict[str, Any]) -> list[str]:
    """Return the table of one experiment."""
    stages = ", ".join(f"{key} {value:.0f}" for key, value in metrics["stages_s"].items())
    lines = [
        f"**[{name}](results/{name}/README.md)**: {words}; {metrics['n_train_images']} images to train and "
        f"choose on, {metrics['n_test_images']} to test. Seconds: {stages}.",
        "",
        "| head | without box regression | with it and voting | training s |",
        "|---|--:|--:|--:|",
    ]
    heads = metrics["heads"]
    for head in heads:
        if not head.endswith("+bbox"):
            cells = [span(heads[head]), span(heads[f"{head}+bbox"])]
            lines.append(f"| {head} | {cells[0]} | {cells[1]} | {heads[head]['train_s']:.1f} |")
    return lines


def span(head: dict[str, Any]) -> str:
    """Return a mean AP with its interval."""
    low, high = head["mAP_interval"]
    return f"{head['mAP']:.1f} [{low:.1f}, {high:.1f}]"


def bench(path: Path) -> list[str]:
    """Return one row for each target of a benchmark."""
    rows = []
    for target, found in json.loads(path.read_text())["targets"].items():
        peer = "" if found["peer"] is None else f"{found['peer']:.4g}"
        value = f"{found['value']:.3g} {found['unit']}"
        rows.append(f"| {target} | {value} | {found['ours']:.4g} | {peer} | {found['how']} |")
    return rows


def main() -> int:
    """Rewrite or check README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1] if END in rest else rest
    new = before + block(ROOT / "results") + after
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md does not say what results/ hold. Run `python benchmarks/summary.py`.")
            return 1
        return 0
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
