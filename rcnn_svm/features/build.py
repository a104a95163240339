"""From a configuration to a featurizer: which network, which taps, warped or shared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from rcnn_svm.config import Count, Interval, Positive, Values, check
from rcnn_svm.errors import ConfigError
from rcnn_svm.features.store import Featurizer, Precision
from rcnn_svm.networks import trained_to_detect

if TYPE_CHECKING:
    from rcnn_svm.features.featurizers import DetectionFeatures, SharedFeatures, WarpedFeatures
    from rcnn_svm.networks.detection import Network

    ImageFeaturizer: TypeAlias = SharedFeatures | WarpedFeatures | DetectionFeatures

__all__ = ["FeatureConfig", "build_featurizer", "taps_of"]


@dataclass(frozen=True)
class FeatureConfig:
    """What is read out of which network.

    Attributes:
        backbone: name of the network: one of `rcnn_svm.networks.backbone.BACKBONES`, `timm:NAME[.TAG]` or
            `torchvision:NAME`, which may be one that was trained to detect.
        weights: `default`, `offline`, `random`, a member of torchvision's enum, or a file.
        path: `shared` runs the convolutions once per image, `warped` the whole network on every
            region, as R-CNN does.
        taps: layers by name, separated by commas, such as `fc7` or `block13@3x3,block17@1x1*1.8`; empty for
            the network's own (`Architecture.taps`).
        longer_sides: shared path: sizes that the image's longer side is brought to; with several, a region is
            read where its side comes nearest to 224 pixels. A network that was trained to detect resizes
            images by itself. None is `resolution`, or a `pyramid` of it where an experiment learns fc6 on
            shared maps, chooses nothing on val, and half of its objects are smaller than a third of the
            image's longer side.
        resolution: see there, in pixels; it plays no part where `longer_sides` are named.
        pyramid: multiples of it, see there.
        crop_size: warped path: side of a crop in pixels; None is the network's own.
        padding: warped path: context in pixels of the crop; None is the network's own.
        crop_mode: warped path: `warp` stretches a region, `square` takes the square around it.
        precision: of the features on disk.
        mirror: test-time augmentation: read the mirror image too; scores and box deltas of the two are
            averaged.
    """

    backbone: str = "efficientnet_lite2"
    weights: str = "default"
    path: Literal["shared", "warped"] = "shared"
    taps: str = ""
    longer_sides: Annotated[tuple[Count, ...], Values(least=1)] | None = None
    resolution: Count = 480
    pyramid: Annotated[tuple[Positive, ...], Values(least=1)] = (2 / 3, 4 / 3)
    crop_size: Count | None = None
    padding: Annotated[int, Interval(0)] | None = None
    crop_mode: Literal["warp", "square"] = "warp"
    precision: Precision = "float16"
    mirror: bool = False

    def __post_init__(self) -> None:
        check(self, where="features")
        if self.path == "shared" and self.backbone.startswith("small_cnn"):
            raise ConfigError(
                "features.path: small_cnn reads small crops and needs the warped path. "
                "Set features.path=warped."
            )
        if self.path == "warped" and trained_to_detect(self.backbone):
            raise ConfigError(
                f"features.path: {self.backbone} reads regions on maps of the whole image, got 'warped'. Set "
                f"features.path=shared (--path shared)."
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of the image's longer side, for objects that are not small where none are said."""
        return (self.resolution,) if self.longer_sides is None else self.longer_sides

    @property
    def small_objects_sides(self) -> tuple[int, ...]:
        """Those for small objects, which play no part where `longer_sides` are named."""
        return tuple(round(share * self.resolution) for share in self.pyramid)


def build_featurizer(
    config: FeatureConfig, backbone: Network | None = None, *, seed: int = 0, device: str = "cpu"
) -> ImageFeaturizer:
    """Make the featurizer of a configuration.

    Args:
        config: what to build.
        backbone: the network where it is loaded already; None loads it.
        seed: of random weights.
        device: where torch runs.

    Raises:
        ConfigError: an unknown network or layer.
        WeightsError: the weights are missing, damaged or of another network.
    """
    from rcnn_svm.features.featurizers import DetectionFeatures, SharedFeatures, WarpedFeatures
    from rcnn_svm.networks.detection import DetectionNetwork, load_network

    if backbone is None:
        backbone = load_network(config.backbone, config.weights, seed=seed)
    taps = config.taps or backbone.default_taps
    if isinstance(backbone, DetectionNetwork):
        return DetectionFeatures(backbone, taps, device=device)
    if config.path == "shared":
        return SharedFeatures(backbone, taps, longer_sides=config.sides, device=device)
    return WarpedFeatures(
        backbone,
        taps,
        crop_size=config.crop_size,
        padding=config.padding,
        mode=config.crop_mode,
        device=device,
    )


def taps_of(featurizer: Featurizer) -> str:
    """Return the taps of a featurizer as they were resolved; empty where it has none."""
    from rcnn_svm.networks.taps import format_taps

    taps = getattr(featurizer, "taps", None)
    return "" if taps is None else format_taps(taps)
