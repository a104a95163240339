from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from rcnn_svm.config import Interval, from_dict, to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.experiment.config import (
    DataConfig,
    ExperimentConfig,
    HeadsConfig,
    demo_config,
    paper_config,
    quick_config,
)
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.features.scaling import FeatureScaler
from rcnn_svm.heads.kernels import rbf_kernel, squared_distances
from rcnn_svm.postprocess import PostprocessConfig
from rcnn_svm.proposals import GridConfig, RpnConfig, SelectiveSearchConfig
from rcnn_svm.training.config import FcConfig, FinetuneConfig, RefineConfig, TrunkConfig


class OneImage:
    """The regions of a single image."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 1

    def features(self, i: int) -> np.ndarray:
        return self.rows


def test_the_paper_preset_is_the_paper() -> None:
    """Values of arXiv 1311.2524v5 and rbgirshick/rcnn, written down here a second time."""
    config = paper_config(ExperimentConfig())
    assert (config.proposals.mode, config.proposals.min_size, config.proposals.sigma) == ("fast", 20, 0.8)
    assert config.proposals.max_width is None
    assert config.proposals.ranking == "paper"
    assert (config.features.backbone, config.features.taps, config.features.path) == (
        "alexnet",
        "fc7",
        "warped",
    )
    assert config.features.crop_mode == "warp"
    finetune = config.finetune
    assert (finetune.batch_size, finetune.positive_share, finetune.positive_iou) == (128, 0.25, 0.5)
    assert (finetune.learning_rate, finetune.momentum, finetune.weight_decay) == (1e-3, 0.9, 5e-4)
    assert (finetune.n_steps, finetune.head_rate, finetune.flip) == (70_000, 10.0, True)
    heads = config.heads
    assert (heads.loss, heads.linear_costs, heads.positive_weight) == ("hinge", (1e-3,), 2.0)
    assert (heads.scaling, heads.mining, heads.ridge_strengths) == ("mean-norm-20", "paper", (1000.0,))
    assert (config.detect.max_iou, config.detect.max_candidates) == (0.3, 100)
    assert config.detect.max_detections is None
    assert (config.detect.vote_iou, config.detect.regression) == (None, "before-nms")
    assert (heads.max_ious, heads.soft_nms_sigmas, heads.vote_ious) == ((0.3,), (), (0.0,))


@pytest.mark.parametrize(
    "config", [ExperimentConfig(), paper_config(ExperimentConfig())], ids=["own", "paper"]
)
def test_kernels_are_as_wide_as_the_scaled_rows_are_long(config: ExperimentConfig, rng) -> None:
    """A kernel too narrow by far sees no two rows alike, and gives every new one the same score."""
    rows = np.maximum(rng.normal(size=(300, 256)), 0).astype(np.float32) * 3  # as fc7 after its ReLU
    scaler = FeatureScaler(config.heads.scaling).fit(OneImage(rows))
    distances = squared_distances(scaler(rows))
    for gamma in config.heads.rbf_gammas:
        alike = np.median(rbf_kernel(distances, gamma)[np.triu_indices(len(rows), 1)])
        assert 0.01 < alike < 0.9


@pytest.mark.parametrize("config", [ExperimentConfig(), paper_config(ExperimentConfig()), demo_config()])
def test_a_saved_configuration_is_read_back(config: ExperimentConfig) -> None:
    assert from_dict(ExperimentConfig, to_dict(config, finite=True)) == config


def test_quick_is_never_slower() -> None:
    full = demo_config()
    quick = quick_config(full)
    assert quick.finetune.n_steps < full.finetune.n_steps
    assert quick.proposals.max_regions is not None
    assert full.proposals.max_regions is not None
    assert quick.proposals.max_regions <= full.proposals.max_regions
    assert quick.heads.linear_costs[0] in full.heads.linear_costs
    assert quick_config(quick) == quick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ("svm",)}, r"^heads\.names must be one of 'linear-svm', .* got 'svm'\."),
        ({"names": (object(),)}, r"^heads\.names must be one of 'linear-svm', .* got <object"),
        ({"names": ()}, r"^heads\.names must hold at least one value, got none\.$"),
        (
            {"names": ("rbf-svm", "rbf-svm")},
            r"^heads\.names must hold no value twice, got rbf-svm, rbf-svm\.$",
        ),
        ({"vote_ious": ()}, r"heads\.vote_ious must hold at least one value, got none\."),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadsConfig(**arguments)


CONFIGS = {
    "": ExperimentConfig,
    "data": DataConfig,
    "proposals": SelectiveSearchConfig,
    "rpn": RpnConfig,
    "features": FeatureConfig,
    "fc": FcConfig,
    "trunk": TrunkConfig,
    "finetune": FinetuneConfig,
    "refine": RefineConfig,
    "heads": HeadsConfig,
    "detect": PostprocessConfig,
}
FIELDS = [
    (where, kind, name, hint)
    for where, kind in CONFIGS.items()
    for name, hint in get_type_hints(kind, include_extras=True).items()
]
UNBOUNDED = {"detect.min_score"}


def parts(hint: Any) -> Iterator[Any]:
    """Every type within a type."""
    yield hint
    for inner in get_args(hint):
        if get_origin(hint) is not Literal and inner is not Ellipsis:
            yield from parts(inner)


def test_every_part_of_the_configuration_is_known_here() -> None:
    default = ExperimentConfig()
    nested = {name: type(value) for name, value in vars(default).items() if is_dataclass(value)}
    assert {**nested, "": ExperimentConfig} == CONFIGS


@pytest.mark.parametrize(("where", "kind", "name", "hint"), FIELDS, ids=lambda value: str(value)[:30])
def test_no_field_holds_what_means_nothing(where: str, kind: Any, name: str, hint: Any) -> None:
    """Another type, an unknown name, a number just outside its range: refused where they are written."""
    key = f"{where}.{name}" if where else name
    wrong: list[Any] = [object(), math.nan, "nonsense" if str not in list(parts(hint)) else 3]
    within = [part for part in parts(hint) if isinstance(part, Interval)]
    for interval in within:
        for end, step, own in ((interval.low, -1, "left"), (interval.high, 1, "right")):
            if math.isfinite(end):
                excluded = interval.closed not in ("both", own)
                whole = int in list(parts(hint))
                wrong.append(end if excluded else end + step if whole else math.nextafter(end, end + step))
    is_tuple = any(get_origin(part) is tuple for part in parts(hint))
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{re.escape(key)} must "):
            kind(**{name: (value,) if is_tuple else value})
    numbers = {int, float} & set(parts(hint))
    assert within or not numbers or key in UNBOUNDED, f"{key} takes any number: give it an Interval"


def test_boxes_are_moved_where_their_overlap_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^refine\.boxes_from must be at least refine\.overlap_from, 0\.3"):
        RefineConfig(boxes_from=0.2)


@pytest.mark.parametrize(
    ("changes", "own", "n"),
    [
        ({}, {}, 150),
        ({"learn": "nothing"}, {}, 150),
        ({"choose": True}, {}, 0),
        ({"features": FeatureConfig(path="warped", taps="pool")}, {}, 0),
        ({}, {"boxes": None}, 0),
        ({}, {"postprocess": PostprocessConfig(refined=7)}, 7),
        ({"detect": PostprocessConfig(refined=7)}, {}, 7),
        ({"detect": PostprocessConfig()}, {}, 0),
    ],
)
def test_boxes_are_refined_where_that_can_be_learned(changes: dict, own: dict, n: int) -> None:
    assert replace(ExperimentConfig(), **changes).build(**own).postprocess.refined == n


@pytest.mark.parametrize("own", [{"path": "warped", "taps": "penultimate"}, {}])
def test_refinement_needs_shared_maps_and_box_regression(own: dict) -> None:
    detect = PostprocessConfig(refined=10)
    config = ExperimentConfig(detect=detect, features=FeatureConfig(**own))
    with pytest.raises(
        ConfigError, match=r"^detect\.refined needs shared maps of a network and box regression"
    ):
        config.build(**({} if own else {"boxes": None}))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (FcConfig, {"positive_iou": 0.3}),
        (FinetuneConfig, {"negative_iou": 0.6}),
        (HeadsConfig, {"svm_positive_iou": 0.1}),
    ],
)
def test_label_rules_that_contradict_themselves_are_refused_at_once(kind: type, changes: dict) -> None:
    with pytest.raises(ConfigError, match="must have 0 <= negative_low <= negative_iou <= positive_iou <= 1"):
        kind(**changes)


def test_proposals_of_another_kind_are_refused_before_anything_is_computed() -> None:
    with pytest.raises(ConfigError, match=r"^proposals must be a table of keys, got GridConfig\(\.\.\.\)\.$"):
        ExperimentConfig(proposals=GridConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": "trunk", "fc": FcConfig(scaling="l2")}, r"^fc\.scaling must be none with learn=trunk"),
        (
            {"learn": "trunk", "fc": FcConfig(mirror=True)},
            r"^fc\.mirror and fc\.other_sides must be off with",
        ),
        (
            {"learn": "trunk", "fc": FcConfig(groups=2)},
            r"^fc\.groups must be 1 with learn=trunk, .* got 2\.$",
        ),
        ({"learn": "trunk", "fc": FcConfig(other_sides=(640,))}, r"^fc\.mirror and fc\.other_sides must be"),
        (
            {"features": FeatureConfig(path="warped"), "fc": FcConfig(other_sides=(640,))},
            r"^fc\.other_sides needs the shared path, got \(640,\) with features\.path=warped\.$",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentConfig(**changes).build()


def test_which_experiments_read_all_rows():
    assert ExperimentConfig().build().reads_all_rows
    network = replace(ExperimentConfig().heads, names=("softmax-finetuned",))
    assert ExperimentConfig(heads=network, choose=True).build().reads_all_rows  # to choose by
    assert not ExperimentConfig(heads=network).build().reads_all_rows
    assert ExperimentConfig(heads=network, fc=FcConfig(box_weight=0.0)).build().reads_all_rows
