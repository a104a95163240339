"""What is fixed about a network, whatever its weights: how it is built, its layers by name, what is read.

`ARCHITECTURES` holds ours; `Architecture.of` describes one of yours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
import torchvision
from torch import nn

from rcnn_svm.errors import ConfigError
from rcnn_svm.networks.efficientnet_lite import LITE, EfficientNetLite, SameConv2d, same_padding, stage_ends
from rcnn_svm.networks.small_cnn import SmallCNN
from rcnn_svm.networks.tracing import TracedLayers

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Stages",
    "Step",
    "centres",
    "main_path",
    "two_scales",
]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Stages = OrderedDict[str, nn.Module]


@dataclass(frozen=True)
class Architecture:
    """What is fixed about a network, whatever its weights.

    Attributes:
        name: of the network, under which a detector that is made with it is saved.
        build: makes the module with a number of outputs.
        split: names its layers: (map layers, region layers).
        crop_size: side of the crops that it takes, in pixels.
        padding: context around a warped region, in pixels of the crop.
        entry_grid: side of the last map layer's output on such a crop: what a region is pooled onto on
            shared convolutions before its region layers run, so that these see what they were trained on.
        batch_size: crops at a time that were fastest on CPUs.
        taps: what is read from it where nothing else is said.
        trunk_from: the map layer from which on the network is tuned where nothing else is said.
        mean: of the pixels that it was trained on, as a share of 255, by channel.
        std: their deviation, likewise.
        traced: the layers where the network's graph tells them; `taps`, `trunk_from` and `entry_grid` may
            then be empty, and are what the graph says.
    """

    name: str
    build: Callable[[int], nn.Module]
    split: Callable[[Any], tuple[Stages, Stages]]
    crop_size: int
    padding: int
    entry_grid: int
    batch_size: int
    taps: str
    trunk_from: str
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    traced: TracedLayers | None = None

    @classmethod
    def of_graph(
        cls,
        name: str,
        build: Callable[[int], nn.Module],
        *,
        with_logits: bool = True,
        crop_size: int = 224,
        padding: int = 16,
        taps: str = "",
        trunk_from: str = "",
        mean: tuple[float, ...] = _IMAGENET_MEAN,
        std: tuple[float, ...] = _IMAGENET_STD,
    ) -> Self:
        """Describe any module that torch.fx can follow; its layers are found in its graph.

        A layer is named by the module that ends with it (`layer3`, `blocks.4.0`), the last map of a stride
        also `s8`, `s16`, `s32`, and what the logits are computed from `penultimate`.

        Args:
            name: not one of `ARCHITECTURES`.
            build: makes the module with a number of outputs, which one without logits may ignore.
            with_logits: whether what it returns is one number a class.
            crop_size: side of the images that it was trained on, in pixels.
            padding: context around a warped region, in pixels of the crop.
            taps: what is read where nothing else is said; empty for the last maps of stride 16 and 32.
            trunk_from: the map from which on it is tuned; empty for what follows stride 16.
            mean: of the pixels that it was trained on, as a share of 255, by channel.
            std: their deviation, likewise.

        Raises:
            ConfigError: a name that is taken; torch.fx cannot follow the module, or it has no map. The last
                two are found out when its layers are first asked for.

        Example:
            >>> tiny = lambda n: nn.Sequential(
            ...     OrderedDict(
            ...         a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.Conv2d(8, 16, 3, 2, 1),
            ...         pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, n),
            ...     )
            ... )
            >>> Architecture.of_graph("tiny", tiny, crop_size=64).traced.plan.regions
            ('pool', 'penultimate', 'logits')
        """
        _require_own_name("of_graph", name)
        traced = TracedLayers(build, crop_size, with_logits=with_logits)
        return cls(
            name,
            build,
            traced.split,
            crop_size,
            padding,
            entry_grid=0,
            batch_size=4,
            taps=taps,
            trunk_from=trunk_from,
            mean=mean,
            std=std,
            traced=traced,
        )

    @classmethod
    def of(
        cls,
        name: str,
        build: Callable[[], nn.Module],
        maps: Sequence[str],
        *,
        logits: str = "",
        crop_size: int = 224,
        padding: int = 16,
        taps: str = "",
        trunk_from: str = "",
        mean: tuple[float, ...] = _IMAGENET_MEAN,
        std: tuple[float, ...] = _IMAGENET_STD,
    ) -> Self:
        """Describe a network of your own whose layers run one after the other.

        Args:
            name: not one of `ARCHITECTURES`.
            build: makes the module.
            maps: the submodules that run over the image, in order; dots in a name become underscores.
            logits: the fully connected layer that reads the average of the last map; empty where there is
                none. Only `learn=network` needs it.
            crop_size: side of the images that it was trained on, in pixels.
            padding: context around a warped region, in pixels of the crop.
            taps: what is read where nothing else is said; empty for the last two maps, parts and whole.
            trunk_from: the map from which on it is tuned; empty for the last.
            mean: of the pixels that it was trained on, as a share of 255, by channel.
            std: their deviation, likewise.

        Raises:
            ConfigError: a name that is taken, no such layer, or layers that are no chain.

        Example:
            >>> tiny = lambda: nn.Sequential(
            ...     OrderedDict(a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.Conv2d(8, 16, 3, 2, 1))
            ... )
            >>> Architecture.of("tiny", tiny, ("a", "b"), crop_size=64).taps
            'a@3x3,b@1x1,b@1x1*1.8,b@1x1*image'
        """
        _require_own_name("of", name)
        if not maps:
            raise ConfigError(f"Architecture.of({name!r}): needs at least one map layer, got none.")

        def made(n_outputs: int) -> nn.Module:
            net = build()
            if logits and net.get_submodule(logits).out_features != n_outputs:
                layer = nn.Linear(int(net.get_submodule(logits).in_features), n_outputs)  # type: ignore[arg-type]
                parent, _, child = logits.rpartition(".")
                setattr(net.get_submodule(parent), child, layer)
            return net

        def split(net: nn.Module) -> tuple[Stages, Stages]:
            chain: Stages = OrderedDict((path.replace(".", "_"), net.get_submodule(path)) for path in maps)
            penultimate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            regions: Stages = OrderedDict(penultimate=penultimate)
            if logits:
                regions["logits"] = net.get_submodule(logits)
            return chain, regions

        try:
            with torch.device("meta"):
                chain, regions = split(build())
                maps_out = torch.zeros(1, 3, crop_size, crop_size)
                for layer in chain.values():
                    maps_out = layer(maps_out)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"Architecture.of({name!r}): the layers {', '.join(maps)} must exist and run one after the "
                f"other over a {crop_size} x {crop_size} image, got {str(error).splitlines()[0]}."
            ) from error
        side = crop_size
        for step in main_path(chain, regions):
            side = step.size_after(side)
        if tuple(maps_out.shape[2:]) != (side, side):
            raise ConfigError(
                f"Architecture.of({name!r}): must be a chain of convolutions and poolings, whose last map "
                f"would be {side} x {side}, got {tuple(maps_out.shape[2:])}. Construct Architecture with a "
                f"`split` of yours instead."
            )
        names = list(chain)
        natural = (
            two_scales(names[-2], names[-1]) if len(names) > 1 else f"{names[-1]}@3x3,{names[-1]}@1x1*1.8"
        )
        return cls(
            name,
            made,
            split,
            crop_size,
            padding,
            side,
            4,
            taps or natural,
            trunk_from or names[-1],
            mean,
            std,
        )


ARCHITECTURES: dict[str, Architecture] = {}
"""Our networks, by name."""


def _require_own_name(what: str, name: str) -> None:
    """Refuse a name by which a saved detector would find another network."""
    if name in ARCHITECTURES:
        raise ConfigError(f"Architecture.{what}: name must not be one of ours, got {name!r}.")
    if ":" in name:
        raise ConfigError(
            f"Architecture.{what}: name must have no colon, which names of libraries' networks have, got "
            f"{name!r}."
        )


class Step(NamedTuple):
    """A convolution or pooling of the main path; `padding` is None for TensorFlow's 'same'."""

    layer: str
    kernel: int
    stride: int
    padding: int | None

    def size_after(self, size: int) -> int:
        """Return how many cells an axis of `size` cells has after it."""
        if self.padding is None:
            return -(-size // self.stride)
        return (size + 2 * self.padding - self.kernel) // self.stride + 1


def main_path(maps: Stages, regions: Stages) -> tuple[Step, ...]:
    """Return what moves and thins out the cells on the way through the layers."""
    steps = []
    for name, stage in [*maps.items(), *regions.items()]:
        for path, module in stage.named_modules():
            if "downsample" in path or not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                continue
            kernel, stride, padding = (
                v if isinstance(v, int) else int(v[0])  # square throughout
                for v in (module.kernel_size, module.stride, module.padding)
            )
            steps.append(Step(name, kernel, stride, None if isinstance(module, SameConv2d) else padding))
    return tuple(steps)


@lru_cache(maxsize=4096)
def centres(steps: tuple[Step, ...], size: int) -> dict[str, tuple[int, float]]:
    """Return stride and the centre of the first cell of each layer along an axis of `size` pixels."""
    found: dict[str, tuple[int, float]] = {}
    stride, origin = 1, 0.5
    for step in steps:
        padding = step.padding
        if padding is None:
            padding, _ = same_padding(size, step.kernel, step.stride)
        size = step.size_after(size)
        origin += ((step.kernel - 1) / 2 - padding) * stride
        stride *= step.stride
        found[step.layer] = (stride, origin)
    return found


def _split_alexnet(net: Any) -> tuple[Stages, Stages]:
    f, c = net.features, net.classifier
    ends = {"conv1": (0, 2), "pool1": (2, 3), "conv2": (3, 5), "pool2": (5, 6)}
    ends |= {"conv3": (6, 8), "conv4": (8, 10), "conv5": (10, 12)}
    return OrderedDict((name, f[a:b]) for name, (a, b) in ends.items()), OrderedDict(
        pool5=nn.Sequential(f[12], net.avgpool),
        fc6=nn.Sequential(nn.Flatten(), *c[0:3]),
        fc7=c[3:6],
        logits=c[6],
    )


def _split_vgg16(net: Any) -> tuple[Stages, Stages]:
    f, c = net.features, net.classifier
    maps: Stages = OrderedDict()
    at = 0
    for block, n_convolutions in enumerate((2, 2, 3, 3, 3), start=1):
        for i in range(1, n_convolutions + 1):
            maps[f"conv{block}_{i}"] = f[at : at + 2]  # with its ReLU
            at += 2
        maps[f"pool{block}"] = f[at : at + 1]
        at += 1
    del maps["pool5"]  # a region layer
    return maps, OrderedDict(
        pool5=nn.Sequential(f[-1], net.avgpool),
        fc6=nn.Sequential(nn.Flatten(), *c[0:2]),
        fc7=c[2:5],
        logits=c[5:7],
    )


def _averaged(net: Any, logits: nn.Module, *before_flatten: nn.Module) -> Stages:
    penultimate = nn.Sequential(net.avgpool, *before_flatten, nn.Flatten())
    return OrderedDict(penultimate=penultimate, logits=logits)


def _split_mobilenet(net: Any) -> tuple[Stages, Stages]:
    net.avgpool = nn.AdaptiveAvgPool2d(1)  # a function in torchvision; it has no weights
    names = ["stem", *(f"block{i}" for i in range(1, len(net.features)))]
    return OrderedDict(zip(names, net.features, strict=True)), _averaged(net, net.classifier)


def _split_resnet(net: Any) -> tuple[Stages, Stages]:
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    layers = {f"layer{i}": getattr(net, f"layer{i}") for i in range(1, 5)}
    return OrderedDict(stem=stem, **layers), _averaged(net, net.fc)


def _split_efficientnet(net: Any) -> tuple[Stages, Stages]:
    names = ["stem", *(f"stage{i}" for i in range(1, len(net.features)))]
    return OrderedDict(zip(names, net.features, strict=True)), _averaged(net, net.classifier)


def _split_convnext(net: Any) -> tuple[Stages, Stages]:
    maps = OrderedDict((f"stage{i + 1}", net.features[2 * i : 2 * i + 2]) for i in range(4))
    norm, _, logits = net.classifier
    return maps, _averaged(net, logits, norm)


def _split_lite(net: Any) -> tuple[Stages, Stages]:
    maps: Stages = OrderedDict(stem=nn.Sequential(net._conv_stem, net._bn0, net._stem_act))
    maps.update((f"block{i}", block) for i, block in enumerate(net._blocks, start=1))
    maps["head"] = nn.Sequential(net._conv_head, net._bn1, net._head_act)
    penultimate = nn.Sequential(net._avg_pooling, net._flatten)
    return maps, OrderedDict(penultimate=penultimate, logits=nn.Sequential(net._dropout, net._fc))


def _split_small(net: Any) -> tuple[Stages, Stages]:
    stages = list(net.stages().items())
    return OrderedDict(stages[:5]), OrderedDict(stages[5:])


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    return lambda n_outputs: torchvision.models.get_model(name, weights=None, num_classes=n_outputs)


def two_scales(middle: str, last: str) -> str:
    """Return taps of the last layers of stride 16 and 32: parts, the whole, its surroundings, the image."""
    if middle == last:
        return f"{last}@3x3,{last}@1x1*1.8,{last}@1x1*image"
    return f"{middle}@3x3,{last}@1x1,{last}@1x1*1.8,{last}@1x1*image"


def fine_scales(middle: str, last: str) -> str:
    """Return taps of a middle and a last layer for a closer look: cells that reach over a region's border."""
    return f"{middle}@7x7*1.6,{last}@1x1*1.8"


def _lite(name: str) -> Architecture:
    """Describe a network of the Lite family, which was trained on pixels of (x - 127) / 128."""
    ends, crop_size = stage_ends(name), LITE[name].crop_size
    return Architecture(
        name,
        lambda n_outputs: EfficientNetLite(name, n_outputs),
        _split_lite,
        crop_size,
        padding=16,
        entry_grid=-(-crop_size // 32),
        batch_size=4,
        taps=two_scales(f"block{ends[4]}", f"block{ends[6]}"),
        trunk_from=f"block{ends[3] + 1}",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


_HALF = (0.5, 0.5, 0.5)
_TABLE = (
    Architecture("alexnet", _torchvision("alexnet"), _split_alexnet, 227, 16, 13, 32, "fc7", "conv5"),
    Architecture("vgg16", _torchvision("vgg16"), _split_vgg16, 224, 16, 14, 8, "fc7", "conv5_1"),
    Architecture(
        "mobilenet_v2",
        _torchvision("mobilenet_v2"),
        _split_mobilenet,
        224,
        16,
        7,
        4,
        two_scales("block13", "block17"),
        "block11",
    ),
    *(
        Architecture(
            name,
            _torchvision(name),
            _split_resnet,
            224,
            16,
            7,
            batch,
            two_scales("layer3", "layer4"),
            "layer4",
        )
        for name, batch in (("resnet18", 8), ("resnet50", 4))
    ),
    Architecture(
        "efficientnet_b0",
        _torchvision("efficientnet_b0"),
        _split_efficientnet,
        224,
        16,
        7,
        4,
        two_scales("stage5", "stage7"),
        "stage5",
    ),
    Architecture(
        "convnext_tiny",
        _torchvision("convnext_tiny"),
        _split_convnext,
        224,
        16,
        7,
        4,
        two_scales("stage3", "stage4"),
        "stage4",
    ),
    *map(_lite, LITE),
    *(
        Architecture(name, build, _split_small, 40, 3, 10, 64, "fc7", "conv3", _HALF, _HALF)
        for name, build in (("small_cnn", SmallCNN), ("small_cnn_average", lambda n: SmallCNN(n, "average")))
    ),
)
ARCHITECTURES.update({architecture.name: architecture for architecture in _TABLE})
