"""Committed results are those of today's defaults, or their page says that they are older."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rcnn_svm.cli import build_parser, training
from rcnn_svm.config import to_dict
from rcnn_svm.experiment.config import ExperimentConfig
from rcnn_svm.experiment.learning import FcOnFrozen, settled
from rcnn_svm.structures import Dataset, GroundTruth, Sample
from rcnn_svm.training.config import FEW_IMAGES

NO_OBJECT = Sample("", (1, 1), GroundTruth.empty())
RESULTS = Path(__file__).parents[1] / "results"
EXPERIMENTS = sorted(path.parent for path in RESULTS.glob("*/metrics.json"))
OLDER = "older defaults"
"""What the page of results says, in a sentence, where they are not to be measured again."""

BEFORE: Mapping[str, Any] = {
    "detect.min_score": -math.inf,
    "heads.ridge_min_iou": 0.6,
    "heads.rbf_max_rows": 12_000,
    "heads.n_landmarks": 1000,
}
"""Settings younger than some results (or infinite, which no file holds), with the value that does what was
done without them. One that is not listed changed nothing when it came."""


def decided(config: ExperimentConfig) -> dict[str, Any]:
    """Return what settings that are unset mean for results of 100 images or more, of large objects."""
    parts = settled(config.build(), Dataset("", "trainval", ("",), (NO_OBJECT,) * FEW_IMAGES))
    fc = parts.learner.fc if isinstance(parts.learner, FcOnFrozen) else config.fc
    return {
        "features.longer_sides": list(parts.features.sides),
        "fc.other_sides": list(fc.other_sides or ()),
        "fc.scaling": fc.scaling or "none",
        "fc.negative_iou": fc.rule.negative_iou,
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def today(command: str, monkeypatch: pytest.MonkeyPatch) -> ExperimentConfig:
    """Return what a recorded command would run with; `$RCNN_SVM_DATA` stays as it is written."""
    seen: list[ExperimentConfig] = []
    monkeypatch.setattr(training, "_run_and_report", lambda options, config: seen.append(config))
    options = build_parser().parse_args(shlex.split(command)[1:])
    options.run(options)
    (config,) = seen
    return config


def outdated(kept: Mapping[str, Any], config: ExperimentConfig) -> list[str]:
    """Return a line for each setting of results that is gone or is another today."""
    then, now = flat(kept), flat(to_dict(config))
    meant = decided(config)
    lines = [f"{key} is gone" for key in then if key not in now]
    for key, value in now.items():
        was = then.get(key, BEFORE.get(key, value))
        if was != (meant.get(key) if value is None and was is not None else value):
            lines.append(f"{key} was {was!r}, is {value!r}")
    return lines


@pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)
def test_results_are_of_todays_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = json.loads((folder / "metrics.json").read_text())["provenance"]["command"]
    config = today(command, monkeypatch)
    lines = outdated(json.loads((folder / "config.json").read_text()), config)
    says_so = OLDER in (folder / "README.md").read_text(encoding="utf-8")
    assert says_so or not lines, (
        f"results/{folder.name} are of other settings than `{command}` has today ({'; '.join(lines)}): "
        f"measure again, or say in its README.md that they are of {OLDER}."
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--set heads.linear_costs=[1]", "heads.linear_costs was [0.03, 0.1, 0.3, 1.0, 3.0], is [1.0]"),
        ("--set detect.min_score=-6", "detect.min_score was -inf, is -6.0"),
        ("--set heads.rbf_max_rows=5", "heads.rbf_max_rows was 12000, is 5"),
        ("--no-choice", "choose was True, is False"),
    ],
)
def test_another_default_is_named(options: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "rcnn-svm compare photos --out out"
    kept = to_dict(today(plain, monkeypatch), finite=True)
    del kept["heads"]["rbf_max_rows"]  # as in a file from before it
    assert outdated(kept, today(plain, monkeypatch)) == []
    assert outdated(kept, today(f"{plain} {options}", monkeypatch)) == [line]


def test_a_setting_that_is_gone_is_named_and_an_unknown_new_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = today("rcnn-svm demo", monkeypatch)
    kept = to_dict(config, finite=True)
    del kept["heads"]["scaling"]
    kept["heads"]["shape"] = "round"
    assert outdated(kept, config) == ["heads.shape is gone"]


def test_rows_that_were_read_otherwise_are_named_where_the_default_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = today("rcnn-svm compare photos --out out", monkeypatch)
    kept = to_dict(config, finite=True)
    kept["fc"] |= {"scaling": "none", "negative_iou": 0.5, "other_sides": []}
    assert outdated(kept, config) == ["fc.scaling was 'none', is None"]
    kept["fc"]["scaling"] = "region-l2"
    assert outdated(kept, config) == []
