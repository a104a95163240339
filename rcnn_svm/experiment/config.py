"""Everything that an experiment can be told, with the defaults that a new user gets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from rcnn_svm import postprocess
from rcnn_svm.config import Count, Interval, Positive, Seed, Share, Values, check, to_dict
from rcnn_svm.errors import ConfigError
from rcnn_svm.evaluation.voc import Rule
from rcnn_svm.features.build import FeatureConfig
from rcnn_svm.heads.assign import LabelRule
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.postprocess import WHOLE_IMAGE, PostprocessConfig, Step
from rcnn_svm.proposals import RpnConfig, RpnProposals, SelectiveSearchConfig, WholeImage
from rcnn_svm.training.config import FcConfig, FinetuneConfig, RefineConfig, TrunkConfig

if TYPE_CHECKING:
    from rcnn_svm.evaluation.thresholds import Aim
    from rcnn_svm.experiment.learning import Learner
    from rcnn_svm.experiment.parts import Parts
    from rcnn_svm.heads.recipe import HeadRecipe

__all__ = [
    "COMPARED",
    "HEADS",
    "PRESETS",
    "DataConfig",
    "ExperimentConfig",
    "Grid",
    "HeadName",
    "HeadsConfig",
    "Preset",
    "best_config",
    "demo_config",
    "digits_images_config",
    "middle",
    "paper_config",
    "quick_config",
]

HeadName: TypeAlias = Literal["linear-svm", "rbf-svm", "softmax-refit", "softmax-finetuned", "nystroem-svm"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)
"""The heads that have a name; `+bbox` is appended where box regression is on."""
COMPARED: tuple[HeadName, ...] = HEADS[:4]
"""Those that are compared unless others are named."""

Grid: TypeAlias = Annotated[tuple[Positive, ...], Values(least=1)]
"""What is tried for a setting; one value means no choice."""


@dataclass(frozen=True)
class DataConfig:
    """Which labelled images.

    Attributes:
        path: a VOC, COCO or YOLO data set, whole images in a folder per class or in a CSV, `digits` for the
            embedded digits in scenes, or `digits-images` for the digits themselves.
        format: `auto` looks at the files.
        whole_images: every image is its only region, with the set of its classes: what data without boxes
            need. Proposals, NMS and box regression play no part, and softmaxes know no background.
        classes: the class list; empty takes the data's own.
        drop_bad_boxes: leave broken boxes out instead of stopping at the first.
        skip_bad: leave out images that are missing or damaged, or whose labels are.
        allow_outside: read what lies outside of the data set where its files or links lead there.
        skip_absent_classes: leave out classes without an object in `train`, instead of stopping.
        max_images: at most so many images a split; None for all.
    """

    path: str = "digits"
    format: Literal["auto", "voc", "coco", "yolo", "csv", "folders"] = "auto"
    whole_images: bool = False
    classes: tuple[str, ...] = ()
    drop_bad_boxes: bool = False
    skip_bad: bool = False
    allow_outside: bool = False
    skip_absent_classes: bool = False
    max_images: Count | None = None

    def __post_init__(self) -> None:
        check(self, where="data")


@dataclass(frozen=True)
class HeadsConfig:
    """Which heads are trained, and what is tried for each on the validation split.

    Attributes:
        names: of `HEADS`.
        scaling: of the features that SVMs, refitted softmax and box regression see: `l2` (each
            row to length 1), `sqrt-l2` (signed square root first), `mean-norm-20` (R-CNN: one
            factor for all), `none`. The network's own softmax reads unscaled features.
        loss: of the linear SVM.
        solver: `block` is ours, `liblinear` scikit-learn's LinearSVC.
        positive_weight: how much more a positive's loss counts.
        mining: `fixed-point` trains on what violates the margin until nothing new does, `paper`
            is R-CNN's one pass over the images.
        linear_costs: values of C for the linear SVM; one value means no choice.
        rbf_costs: values of C for the RBF SVM.
        rbf_gammas: values of the kernel's gamma, for features scaled as above: about the inverse of a row's
            squared length, which is 1 with `l2` and `sqrt-l2` and 400 with `mean-norm-20`.
        softmax_costs: values of C for the refitted softmax.
        softmax_positive_iou: a region is a positive of the softmax from this IoU on.
        ridge_strengths: penalties of the box regression.
        max_ious: NMS thresholds.
        soft_nms_sigmas: decays of soft-NMS, which is tried beside plain NMS; empty for plain NMS only.
        vote_ious: box voting thresholds; 0 stands for no voting.
        box_steps: how much of the way box regression moves a box; tried wherever images are held out.
        snaps: how much of the way a refined box is drawn to the region proposals around it; tried there, too.
        ridge_min_iou: box regression learns from regions whose IoU with their object is above this.
        rbf_max_rows: how many mined regions the RBF SVM trains on at most; their kernel takes four bytes for
            every pair.
        n_landmarks: regions that the approximate SVM maps all others to.
        svm_positive_iou: a region is a positive of an SVM from this IoU on; None takes the labelled boxes
            alone, as R-CNN does.
        svm_negative_iou: a region is a negative of an SVM when its IoU is less (R-CNN: 0.3).
    """

    names: Annotated[tuple[HeadName, ...], Values(least=1, distinct=True)] = COMPARED
    scaling: Literal["none", "l2", "sqrt-l2", "mean-norm-20"] = "l2"
    loss: Literal["hinge", "squared_hinge"] = "hinge"
    solver: Literal["block", "liblinear"] = "block"
    positive_weight: Positive = 2.0
    mining: Literal["fixed-point", "paper"] = "fixed-point"
    linear_costs: Grid = (0.03, 0.1, 0.3, 1.0, 3.0)
    rbf_costs: Grid = (1.0, 10.0)
    rbf_gammas: Grid = (1.0, 2.0)
    softmax_costs: Grid = (0.03, 0.1, 0.3, 1.0, 3.0)
    softmax_positive_iou: Annotated[float, Interval(0, 1, "right")] = 0.5
    ridge_strengths: Grid = (0.3, 3.0, 30.0)
    max_ious: Annotated[tuple[Share, ...], Values(least=1)] = (0.3, 0.4)
    soft_nms_sigmas: tuple[Positive, ...] = (0.2,)
    vote_ious: Annotated[tuple[Share, ...], Values(least=1)] = (0.0, 0.5)
    box_steps: Annotated[tuple[Step, ...], Values(least=1)] = (0.5, 1.0)
    snaps: Annotated[tuple[Share, ...], Values(least=1)] = (0.0, 0.3)
    ridge_min_iou: Annotated[float, Interval(0, 1, "left")] = 0.6
    rbf_max_rows: Count = 12_000
    n_landmarks: Count = 1000
    svm_positive_iou: Share | None = None
    svm_negative_iou: Share = 0.3

    def __post_init__(self) -> None:
        check(self, where="heads")
        _ = self.svm_rule  # one that contradicts itself is refused now

    @property
    def svm_rule(self) -> LabelRule:
        """Which regions are positives and negatives of an SVM."""
        return LabelRule(self.svm_positive_iou, self.svm_negative_iou)

    def build(self, *, seed: int) -> tuple[HeadRecipe, ...]:
        """Make the heads that are named.

        Args:
            seed: of their solvers.
        """
        return tuple(self._head(name, seed) for name in self.names)

    def _head(self, name: HeadName, seed: int) -> HeadRecipe:
        from rcnn_svm.heads.kernel_svm import KernelSVMHead, NystroemSVMHead
        from rcnn_svm.heads.kernels import RBF
        from rcnn_svm.heads.linear_svm import LinearSVMHead
        from rcnn_svm.heads.mining import FixedPointMining, PaperMining
        from rcnn_svm.heads.recipe import HeadRecipe
        from rcnn_svm.heads.softmax import NetworkSoftmaxHead, SoftmaxHead

        kernels: dict[str, list[Any]] = {
            "kernel": [RBF(gamma) for gamma in sorted(set(self.rbf_gammas))],
            "C": sorted(set(self.rbf_costs)),
        }
        weight, rule = self.positive_weight, self.svm_rule
        if name == "linear-svm":
            linear = LinearSVMHead(
                rule=rule,
                loss=self.loss,
                positive_weight=weight,
                mining=PaperMining() if self.mining == "paper" else FixedPointMining(),
                solver=self.solver,
                random_state=seed,
            )
            return HeadRecipe(name, linear, {"C": sorted(set(self.linear_costs))}, self.scaling)
        if name == "rbf-svm":
            rbf = KernelSVMHead(rule=rule, positive_weight=weight, max_rows=self.rbf_max_rows)
            return HeadRecipe(name, rbf, kernels, self.scaling)
        if name == "nystroem-svm":
            nystroem = NystroemSVMHead(
                rule=rule, positive_weight=weight, n_landmarks=self.n_landmarks, random_state=seed
            )
            return HeadRecipe(name, nystroem, kernels, self.scaling)
        if name == "softmax-refit":
            softmax_rule = LabelRule(self.softmax_positive_iou, min(0.5, self.softmax_positive_iou))
            softmax = SoftmaxHead(rule=softmax_rule, random_state=seed)
            return HeadRecipe(name, softmax, {"C": sorted(set(self.softmax_costs))}, self.scaling)
        return HeadRecipe(name, NetworkSoftmaxHead(), scaling="none")


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment, from images to a report.

    Attributes:
        data: the images.
        proposer: what finds regions: `selective-search`, or `rpn`, a network that was trained to.
        proposals: the selective search.
        rpn: the network.
        test_regions: look at no more than so many of them at test, and where settings are chosen; None for
            all. Training gains from more.
        features: the network and what is read out of it.
        learn: what is trained before the heads: `nothing` (ImageNet features as they are), `fc`
            (fc6 and fc7 of our own on frozen features), `trunk` (the same, then together with the
            last blocks of the network, on whole images), `network` (R-CNN's fine-tuning of the whole
            network on warped proposals).
        fc: training of `fc`, and of the first part of `trunk`.
        trunk: training of the second part of `trunk`.
        finetune: training of `network`.
        refine: training of what refines boxes, where `detect.refined` asks for it.
        heads: what is compared.
        choose: try the grids of `heads` on val. Without, everything is trained with the middle of each grid,
            the learned box regression where there is one, and `detect` as it stands.
        folds: where nothing is chosen, how thresholds, `heads.box_steps`, and whether boxes are regressed at
            all, are decided before the training on trainval: 1 by training on train and measuring on val,
            more by training without each of so many folds of trainval, 0 not at all. None takes val where
            it holds 50 objects, else 3 folds, as also for `false_alarms` and `precision`, of which few
            images tell little.
        false_alarms: at most so many false detections an image, of all classes together, are to reach their
            thresholds, on average; None asks for the best F1 instead.
        precision: at least this share of what reaches its threshold is to be right; None as above.
        detect: from scores to detections; `max_iou` or `soft_nms_sigma`, and `vote_iou`, are chosen on val,
            where no region is looked at twice.
        rule: AP of VOC2007 (11 points, with `voc07-exact` at their exact places) or of VOC2010 and later (all
            points), in percent.
        n_bootstrap: resamples of the intervals.
        seed: of everything random.
    """

    data: DataConfig = field(default_factory=DataConfig)
    proposer: Literal["selective-search", "rpn"] = "selective-search"
    proposals: SelectiveSearchConfig = field(
        default_factory=lambda: SelectiveSearchConfig(max_width=500, max_regions=1000)
    )
    rpn: RpnConfig = field(default_factory=RpnConfig)
    test_regions: Count | None = None
    features: FeatureConfig = field(default_factory=FeatureConfig)
    learn: Literal["nothing", "fc", "trunk", "network"] = "fc"
    fc: FcConfig = field(default_factory=FcConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    choose: bool = False
    folds: Annotated[int, Interval(0)] | None = None
    false_alarms: Positive | None = None
    precision: Annotated[float, Interval(0, 1, "neither")] | None = None
    detect: PostprocessConfig = field(
        default_factory=lambda: PostprocessConfig(soft_nms_sigma=0.2, box_step=0.5, refined=None)
    )
    rule: Rule = "voc07"
    n_bootstrap: Count = 1000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)
        asked = [name for name in ("false_alarms", "precision") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ConfigError("false_alarms and precision: must be one of the two, got both.")
        if asked and self.folds == 0 and not self.choose:
            raise ConfigError(
                f"{asked[0]}: needs images that are held out, got folds=0. Set folds=1, which holds out val."
            )

    @property
    def aim(self) -> Aim:
        """What thresholds are chosen for."""
        from rcnn_svm.evaluation.thresholds import choose_thresholds, limit_false_alarms, reach_precision

        if self.false_alarms is not None:
            return partial(limit_false_alarms, per_image=self.false_alarms)
        if self.precision is not None:
            return partial(reach_precision, share=self.precision)
        return choose_thresholds

    def build(self, **own: Any) -> Parts:
        """Make the parts that this configuration describes.

        Args:
            **own: parts of yours instead, by their names in `Parts`. `heads` may hold names of heads as well.

        Raises:
            ConfigError: parts that do not work together, or no part of such a name.
            WeightsError: the weights of a network that finds regions are missing or damaged.
        """
        from rcnn_svm.experiment.learning import FcOnFrozen, FineTuned, Frozen, TunedTrunk
        from rcnn_svm.experiment.parts import BoxRecipe, Parts, PostprocessGrid

        fc, finetune, whole = self.fc, self.finetune, self.data.whole_images
        if whole:
            if self.proposer == "rpn":
                raise ConfigError(
                    "proposer=rpn finds regions, of which whole images have none. Leave it out."
                )
            if self.learn == "trunk":
                raise ConfigError(
                    "learn=trunk draws many regions of an image, whole images have one. Set learn=fc or "
                    "learn=network."
                )
            fc = replace(fc, positive_share=1.0, box_weight=0.0)
            finetune = replace(finetune, positive_share=1.0)
        learners: dict[str, Learner] = {
            "nothing": Frozen(),
            "fc": FcOnFrozen(fc),
            "trunk": TunedTrunk(fc, self.trunk),
            "network": FineTuned(finetune),
        }
        heads = self.heads
        made: dict[str, Any] = {
            "proposer": self.proposals,
            "features": self.features,
            "learner": learners[self.learn],
            "heads": heads.build(seed=self.seed),
            "boxes": BoxRecipe(sorted(set(heads.ridge_strengths)), heads.scaling, heads.ridge_min_iou),
            "postprocess": self.detect,
            "tried": PostprocessGrid(
                heads.max_ious, heads.soft_nms_sigmas, heads.vote_ious, heads.box_steps, heads.snaps
            ),
            "refine": self.refine,
            "backbone": None,
            "featurizer": None,
            "evaluators": (),
            "test_regions": self.test_regions,
            "choose": self.choose,
            "folds": self.folds,
            "aim": self.aim,
            "rule": self.rule,
            "n_bootstrap": self.n_bootstrap,
            "seed": self.seed,
        }
        if self.proposer == "rpn" and "proposer" not in own:
            made |= self._rpn(shared="backbone" not in own and "featurizer" not in own)
        if whole:
            made |= {
                "proposer": WholeImage(),
                "boxes": None,
                "postprocess": WHOLE_IMAGE,
                "tried": PostprocessGrid((WHOLE_IMAGE.max_iou,), (), (0.0,), (1.0,)),
                "test_regions": None,
            }
        if unknown := sorted(set(own) - set(made)):
            near = difflib.get_close_matches(unknown[0], made, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Parts are {', '.join(made)}."
            raise ConfigError(f"ExperimentConfig.build: has no part {unknown[0]!r}. {hint}")
        if "heads" in own:
            own["heads"] = tuple(
                replace(heads, names=[head]).build(seed=self.seed)[0] if isinstance(head, str) else head  # type: ignore[arg-type]
                for head in own["heads"]
            )
        made |= own
        if made["postprocess"] is self.detect and self.detect.refined is None:
            shared = made["features"].path == "shared" and made["featurizer"] is None
            learnable = shared and made["boxes"] is not None and not self.choose
            made["postprocess"] = replace(self.detect, refined=postprocess.REFINED if learnable else 0)
        described = to_dict(self, finite=True)
        if own:
            described["own"] = {name: _named(part) for name, part in own.items()}
        return Parts(**made, described=described)

    def _rpn(self, *, shared: bool) -> dict[str, Any]:
        """Return what finds regions, and the network that features are read from where it is the same."""
        from rcnn_svm.networks.detection import load_detection_network

        config, features = self.rpn, self.features
        if not config.network:
            config = replace(config, network=features.backbone, weights=features.weights)
        if not trained_to_detect(config.network):
            raise ConfigError(
                f"rpn.network must be a network that was trained to detect, such as "
                f"torchvision:fasterrcnn_mobilenet_v3_large_fpn, got {config.network!r}."
            )
        network = load_detection_network(config.network, config.weights, seed=self.seed)
        made: dict[str, Any] = {"proposer": RpnProposals(config, network)}
        if shared and (config.network, config.weights) == (features.backbone, features.weights):
            made["backbone"] = network
        return made


def _named(part: Any) -> Any:
    """Return a part as plain data: what it is called."""
    if isinstance(part, tuple | list):
        return [_named(one) for one in part]
    if part is None or isinstance(part, bool | int | float | str):
        return part
    return str(getattr(part, "name", None) or getattr(part, "__name__", type(part).__name__))


def paper_config(base: ExperimentConfig) -> ExperimentConfig:
    """Return `base` with every constant of the paper: warped AlexNet, fc7, its SVMs, its detector.

    Fine-tuning follows the published schedule, which wants a GPU; `learn=nothing` leaves it out. Two things
    differ: box regression reads the rows of the SVMs, fc7, where R-CNN's reads pool5, and no threshold of
    scores rises with the number of images.

    References:
        Girshick et al., arXiv 1311.2524v5; rbgirshick/rcnn.
    """
    return replace(
        base,
        proposals=SelectiveSearchConfig(),
        features=FeatureConfig(
            backbone="alexnet", weights=base.features.weights, path="warped", taps="fc7", crop_mode="warp"
        ),
        learn="network",
        finetune=FinetuneConfig.paper(),
        heads=replace(
            base.heads,
            scaling="mean-norm-20",
            loss="hinge",
            positive_weight=2.0,
            mining="paper",
            linear_costs=(1e-3,),
            # No head of the paper: the defaults for rows of length 1, at mean length 20.
            rbf_gammas=(1 / 20**2, 2 / 20**2),
            ridge_strengths=(1000.0,),
            max_ious=(0.3,),
            soft_nms_sigmas=(),
            vote_ious=(0.0,),
            box_steps=(1.0,),
        ),
        detect=postprocess.PAPER,
    )


def middle(grid: Sequence[float]) -> float:
    """Return the value of a grid that is taken where none is tried: its middle by size, the larger of two."""
    return sorted(grid)[len(grid) // 2]


def quick_config(base: ExperimentConfig) -> ExperimentConfig:
    """Return `base` cut down for a first look: few images, regions and settings, short training."""
    return replace(
        base,
        data=replace(base.data, max_images=min(base.data.max_images or 40, 40)),
        proposals=replace(base.proposals, max_regions=min(base.proposals.max_regions or 300, 300)),
        rpn=replace(base.rpn, max_regions=min(base.rpn.max_regions or 300, 300)),
        # Its 40 images are learned from as hundreds are: what few change takes longer, or was not measured.
        fc=replace(
            base.fc,
            n_steps=min(base.fc.n_steps or 200, 200),
            other_sides=base.fc.other_sides or (),
            groups=base.fc.groups or 1,
            negative_iou=0.5 if base.fc.negative_iou is None else base.fc.negative_iou,
        ),
        detect=replace(base.detect, refined=base.detect.refined or 0),
        trunk=replace(base.trunk, n_steps=min(base.trunk.n_steps, 50)),
        finetune=replace(base.finetune, n_steps=min(base.finetune.n_steps, 100)),
        heads=replace(
            base.heads,
            linear_costs=(middle(base.heads.linear_costs),),
            rbf_costs=(middle(base.heads.rbf_costs),),
            rbf_gammas=(middle(base.heads.rbf_gammas),),
            softmax_costs=(middle(base.heads.softmax_costs),),
            ridge_strengths=(middle(base.heads.ridge_strengths),),
        ),
        n_bootstrap=min(base.n_bootstrap, 200),
    )


def best_config(base: ExperimentConfig) -> ExperimentConfig:
    """Return `base` with all that paid on folds, whatever it takes: larger images, mirrored, more sizes."""
    return replace(
        base,
        features=replace(base.features, resolution=640, pyramid=(1.0, 1.5), mirror=True),
        fc=replace(base.fc, n_steps=1300, mirror=True, other_sides=(800,)),
        # Log-odds below -6, a quarter of a percent, moved nothing on folds of voc2007-mini but seconds.
        detect=replace(base.detect, vote_iou=0.55, min_score=-6.0, second_look=100),
    )


@dataclass(frozen=True)
class Preset:
    """A named recipe.

    Attributes:
        words: what it is for, in a line.
        apply: puts it over a configuration.
    """

    words: str
    apply: Callable[[ExperimentConfig], ExperimentConfig]


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        "a first look: 40 images of each split, 300 regions an image, short training", quick_config
    ),
    "default": Preset("what `train` does with nothing else said: minutes without a GPU", lambda base: base),
    "best": Preset("larger images, mirrored too, and of one more size: several times as long", best_config),
}
"""The recipes that `--preset` names, the fastest first."""


def demo_config() -> ExperimentConfig:
    """Return the demonstration: digits in scenes, `small_cnn` trained from nothing, all heads."""
    return ExperimentConfig(
        choose=True,
        data=DataConfig(path="digits"),
        proposals=SelectiveSearchConfig(min_size=10, max_regions=400),
        features=FeatureConfig(backbone="small_cnn", weights="random", path="warped", taps="fc7"),
        learn="network",
        # Fewer settings than elsewhere: this is to be watched to its end.
        heads=HeadsConfig(
            linear_costs=(0.1, 0.3, 1.0),
            rbf_costs=(1.0,),
            softmax_costs=(0.1, 0.3, 1.0),
            ridge_strengths=(3.0,),
            box_steps=(1.0,),
        ),
        # A mirrored digit is no digit.
        finetune=replace(FinetuneConfig.from_scratch(), n_steps=1100, flip=False),
    )


def digits_images_config() -> ExperimentConfig:
    """Return the demonstration on the digits themselves, each an image of its own."""
    demo = demo_config()
    return replace(
        demo,
        data=DataConfig(path="digits-images", whole_images=True),
        finetune=replace(demo.finetune, n_steps=400),
    )
