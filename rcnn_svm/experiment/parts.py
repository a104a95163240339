"""What an experiment is made of: parts that do the work, and what is tried and measured.

`ExperimentConfig.build` makes `Parts` from a configuration; any of them can be yours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rcnn_svm.engine import THREADS, Engine
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.thresholds import Aim
from rcnn_svm.evaluation.voc import Rule
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.features.store import Featurizer
from rcnn_svm.heads.recipe import HeadRecipe
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.postprocess import Postprocess, PostprocessConfig
from rcnn_svm.proposals import Proposer
from rcnn_svm.structures import Detections, GroundTruth
from rcnn_svm.training.config import RefineConfig

if TYPE_CHECKING:
    from rcnn_svm.experiment.learning import Learner
    from rcnn_svm.networks.detection import Network
    from rcnn_svm.training.parallel import Ranks

__all__ = ["BoxRecipe", "Evaluator", "Parts", "PostprocessGrid", "Run"]

Evaluator: TypeAlias = Callable[
    [Sequence[Detections], Sequence[GroundTruth], Sequence[str]], Mapping[str, float]
]
"""Detections and objects of each test image, and the class names -> numbers for the report, by name."""


@dataclass(frozen=True)
class Run:
    """How an experiment is run, which changes nothing about its result.

    Attributes:
        cache: folder of proposals, features and fine-tuned networks, kept between runs.
        n_jobs: threads where work is independent.
        device: where torch runs, such as `cpu` or `cuda`. Another device rounds otherwise.
        cache_limit: bytes that the cache may take; room is made before the first stage, between stages and at
            the end, and what this run uses stays until then. None keeps everything.
        engine: what maps work over images: threads of this process, or a cluster that sees the cache.
        ranks: the processes that train layers and networks together, see `training.parallel.lead`; None for
            this one alone. Sums are rounded otherwise.
    """

    cache: Path
    n_jobs: int = 1
    device: str = "cpu"
    cache_limit: int | None = None
    engine: Engine = THREADS
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", Path(self.cache))


@dataclass(frozen=True)
class BoxRecipe:
    """Box regression by ridge, and what is tried for it.

    Attributes:
        strengths: penalties, from small to large; the middle one where nothing is tried.
        scaling: of the rows that it reads.
        min_iou: a region is learned from when its IoU with its object is above this.
    """

    strengths: Sequence[float] = (0.3, 3.0, 30.0)
    scaling: str = "l2"
    min_iou: float = 0.6

    def settled(self) -> dict[str, Any]:
        """Return what is taken where nothing is tried."""
        return {"strength": self.strengths[len(self.strengths) // 2]}


@dataclass(frozen=True)
class PostprocessGrid:
    """What is tried between scores and detections.

    Attributes:
        max_ious: NMS thresholds.
        soft_nms_sigmas: decays of soft-NMS, which is tried beside plain NMS; empty for plain NMS only.
        vote_ious: box voting thresholds; 0 stands for no voting.
        box_steps: how much of the way box regression moves a box.
        snaps: how much of the way a refined box is drawn to the region proposals around it.
        unrefined: whether boxes as they are before refinement are weighed against refined ones.
        unmoved: whether boxes as proposed are weighed against regressed ones.
    """

    max_ious: Sequence[float] = (0.3, 0.4)
    soft_nms_sigmas: Sequence[float] = (0.2,)
    vote_ious: Sequence[float] = (0.0, 0.5)
    box_steps: Sequence[float] = (0.5, 1.0)
    snaps: Sequence[float] = (0.0, 0.3)
    unrefined: bool = True
    unmoved: bool = True

    def of(
        self, base: PostprocessConfig, *, with_boxes: bool
    ) -> Iterator[tuple[dict[str, float], PostprocessConfig]]:
        """Yield every setting with the post-processing that it makes of `base`."""
        moves: list[dict[str, float]] = [{"vote_iou": 0.0}]
        if with_boxes:
            grid = itertools.product(self.vote_ious, self.box_steps)
            moves = [{"vote_iou": vote, "box_step": step} for vote, step in grid]
        plain = [{"max_iou": value} for value in self.max_ious]
        soft = [{"soft_nms_sigma": value} for value in self.soft_nms_sigmas]
        for suppression, move in itertools.product([*plain, *soft], moves):
            detect = replace(
                base,
                max_iou=suppression.get("max_iou", base.max_iou),
                soft_nms_sigma=suppression.get("soft_nms_sigma"),
                vote_iou=move["vote_iou"] or None,
                box_step=move.get("box_step", base.box_step),
                regression=base.regression if with_boxes else "off",
            )
            yield {**suppression, **move}, detect


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of an experiment.

    Attributes:
        proposer: where objects may be.
        features: what is read out of the network, and how.
        learner: what is trained before the heads.
        heads: what is compared; names differ.
        boxes: box regression, where the learner brings none; None leaves boxes as they are, as those of whole
            images are.
        postprocess: from scores to detections.
        tried: what is tried of it, where it is a `PostprocessConfig`.
        refine: how a refiner of boxes is trained, where `postprocess` asks for one.
        backbone: the network; None loads the one that `features` names.
        featurizer: regions of an image -> rows, instead of a network's; None makes one of the network.
        evaluators: further measures of detections on test, for the report.
        test_regions: look at no more than so many proposals at test, and where settings are chosen; None for
            all.
        choose: try the grids on val; otherwise the middle of each is taken.
        folds: where nothing is chosen, how images are held out, see `ExperimentConfig`.
        aim: what thresholds are chosen for, on images held out.
        rule: of AP.
        n_bootstrap: resamples of the intervals.
        seed: of everything random.
        described: all of this as plain data, for `config.json`.
    """

    proposer: Proposer
    features: FeatureConfig
    learner: Learner
    heads: tuple[HeadRecipe, ...]
    boxes: BoxRecipe | None
    postprocess: Postprocess
    tried: PostprocessGrid
    refine: RefineConfig
    backbone: Network | None
    featurizer: Featurizer | None
    evaluators: tuple[Evaluator, ...]
    test_regions: int | None
    choose: bool
    folds: int | None
    aim: Aim
    rule: Rule
    n_bootstrap: int
    seed: int
    described: Mapping[str, Any]

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"heads: must be at least one, each with a name of its own, got {', '.join(names) or 'none'}."
            )
        if self.backbone is not None and self.featurizer is not None:
            raise ConfigError("Parts: must have a backbone or a featurizer of yours, got both.")
        if self.refines and (
            self.features.path != "shared" or self.featurizer is not None or self.boxes is None
        ):
            raise ConfigError(
                f"detect.refined needs shared maps of a network and box regression, got {self.postprocess!r} "
                f"without. Set features.path=shared, or detect.refined=0."
            )
        if self.reads_detection and self.features.sides != FeatureConfig().sides:
            raise ConfigError(
                f"features.longer_sides: a network that was trained to detect resizes images by itself, got "
                f"{self.features.sides}. Leave it, and features.resolution, as they are by default."
            )
        self.learner.check(self)

    @property
    def reads_detection(self) -> bool:
        """Whether features are read from a network that was trained to detect."""
        name = self.features.backbone if self.backbone is None else self.backbone.name
        return self.featurizer is None and trained_to_detect(name)

    @property
    def refines(self) -> bool:
        """Whether boxes are refined, see `PostprocessConfig.refined`."""
        return isinstance(self.postprocess, PostprocessConfig) and bool(self.postprocess.refined)

    @property
    def looks_once(self) -> bool:
        """Whether rows of images that are not trained on are read once, so that they need not be kept."""
        return len(self.heads) == 1 and not self.choose

    @property
    def reads_all_rows(self) -> bool:
        """Whether some head, or box regression, is trained on or chosen by the rows of every region."""
        return self.choose or any(head.head.reads_rows for head in self.heads) or not self.learner.has_boxes
