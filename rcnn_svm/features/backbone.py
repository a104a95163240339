"""Networks with named layers: each one owns its weights, its preprocessing and its natural crop.

A backbone is a chain of two parts. Its *map layers* are convolutional and run over whole images or over
crops; its *region layers* follow, and see one region at a time: the last pooling, the fully connected
layers, the logits. Every layer's output can be read by name, always before the softmax.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from rcnn_svm.errors import ConfigError, ShapeError, WeightsError
from rcnn_svm.features.efficientnet_lite import LITE, EfficientNetLite, SameConv2d, same_padding, stage_ends
from rcnn_svm.features.fusing import fuse_for_inference
from rcnn_svm.features.low_rank import factorise_layers
from rcnn_svm.features.small_cnn import SmallCNN
from rcnn_svm.features.taps import TapSpec
from rcnn_svm.features.weights import find_weights, load_weights, read_weights
from rcnn_svm.files import atomic_path, bytes_digest
from rcnn_svm.opencv import cv2
from rcnn_svm.structures import Image

__all__ = [
    "BACKBONES",
    "Architecture",
    "Backbone",
    "LayerInfo",
    "load_backbone",
    "random_backbone",
    "with_new_outputs",
]

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Stages = OrderedDict[str, nn.Module]
_ABOUT = "rcnn_svm"
"""Key of what a file of weights says about its network."""


@dataclass(frozen=True)
class Architecture:
    """What is fixed about a network, whatever its weights.

    Attributes:
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
    """

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


@dataclass(frozen=True)
class LayerInfo:
    """Geometry of one layer.

    Attributes:
        channels: of its output.
        is_map: its output has rows and columns, on crops at least.
        stride: input pixels from one cell to the next.
        origin: (x, y) of the centre of the first cell's receptive field, in half-open pixels.
    """

    channels: int
    is_map: bool
    stride: int
    origin: tuple[float, float]

    def cells(self, regions: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return (R, 4) regions, given in pixels of the network's input, in cells of this layer's map.

        A cell stands for the centre of its receptive field, which is half a cell up and left of where a
        plain division by the stride would put it for networks that pad their strided convolutions.
        """
        cells = (regions - np.array(self.origin * 2)) / self.stride + 0.5
        return np.asarray(cells, np.float32)


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


def _two_scales(middle: str, last: str) -> str:
    """Return taps of the last layers of stride 16 and 32: parts, the whole, its surroundings, the image."""
    return f"{middle}@3x3,{last}@1x1,{last}@1x1*1.8,{last}@1x1*image"


def _lite(name: str) -> Architecture:
    """Describe a network of the Lite family, which was trained on pixels of (x - 127) / 128."""
    ends, crop_size = stage_ends(name), LITE[name].crop_size
    return Architecture(
        lambda n_outputs: EfficientNetLite(name, n_outputs),
        _split_lite,
        crop_size,
        padding=16,
        entry_grid=-(-crop_size // 32),
        batch_size=4,
        taps=_two_scales(f"block{ends[4]}", f"block{ends[6]}"),
        trunk_from=f"block{ends[3] + 1}",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


_HALF = (0.5, 0.5, 0.5)
_ARCHITECTURES: Mapping[str, Architecture] = {
    "alexnet": Architecture(_torchvision("alexnet"), _split_alexnet, 227, 16, 13, 32, "fc7", "conv5"),
    "vgg16": Architecture(_torchvision("vgg16"), _split_vgg16, 224, 16, 14, 8, "fc7", "conv5_1"),
    "mobilenet_v2": Architecture(
        _torchvision("mobilenet_v2"),
        _split_mobilenet,
        224,
        16,
        7,
        4,
        _two_scales("block13", "block17"),
        "block11",
    ),
    "resnet18": Architecture(
        _torchvision("resnet18"), _split_resnet, 224, 16, 7, 8, _two_scales("layer3", "layer4"), "layer4"
    ),
    "resnet50": Architecture(
        _torchvision("resnet50"), _split_resnet, 224, 16, 7, 4, _two_scales("layer3", "layer4"), "layer4"
    ),
    "efficientnet_b0": Architecture(
        _torchvision("efficientnet_b0"),
        _split_efficientnet,
        224,
        16,
        7,
        4,
        _two_scales("stage5", "stage7"),
        "stage5",
    ),
    "convnext_tiny": Architecture(
        _torchvision("convnext_tiny"),
        _split_convnext,
        224,
        16,
        7,
        4,
        _two_scales("stage3", "stage4"),
        "stage4",
    ),
    **{name: _lite(name) for name in LITE},
    "small_cnn": Architecture(SmallCNN, _split_small, 40, 3, 10, 64, "fc7", "conv3", _HALF, _HALF),
    "small_cnn_average": Architecture(
        lambda n: SmallCNN(n, "average"), _split_small, 40, 3, 10, 64, "fc7", "conv3", _HALF, _HALF
    ),
}
BACKBONES = tuple(_ARCHITECTURES)
"""Names that `load_backbone` accepts."""


class Backbone(nn.Module):
    """A network whose layers are read by name.

    Args:
        name: one of `BACKBONES`.
        net: its module; its parameters keep torchvision's names.
        classes: names of its outputs, where they are those of a detector (background last).

    Attributes:
        maps, regions: the layers by name, in order; views of `net`, so that both always agree.
        crop_size, padding: side of the crops and their context, in pixels.
        default_taps, trunk_from: what is read, and from where on is tuned, where nothing else is said.
        entry: the last map layer; `entry_grid` is its side on a crop.
    """

    def __init__(self, name: str, net: nn.Module, classes: tuple[str, ...] | None = None) -> None:
        super().__init__()
        architecture = _architecture(name)
        self.name = name
        self.net = net
        self.classes = classes
        self.maps, self.regions = architecture.split(net)
        self._path = _main_path(self.maps, self.regions)
        self._channels = _channels(self.maps, self.regions)
        self.entry = next(reversed(self.maps))
        self.entry_grid = architecture.entry_grid
        self.crop_size, self.padding = architecture.crop_size, architecture.padding
        self.batch_size = architecture.batch_size
        self.default_taps, self.trunk_from = architecture.taps, architecture.trunk_from
        self.mean_std = architecture.mean, architecture.std
        mean, std = map(np.array, self.mean_std)
        table = (np.arange(256)[:, None] / 255 - mean) / std
        self._table = table.astype(np.float32).reshape(256, 1, 3)
        self.mean_pixel = np.rint(mean * 255).astype(np.uint8)

    @cached_property
    def layers(self) -> dict[str, LayerInfo]:
        """Geometry of every layer on a crop of the network's own size, by name and in order."""
        return self.layers_on((self.crop_size, self.crop_size))

    def layers_on(self, size: tuple[int, int]) -> dict[str, LayerInfo]:
        """Return the geometry of every layer on an image of `size` (height, width).

        Origins depend on it where a network pads as TensorFlow does, see `SameConv2d`.
        """
        rows, columns = _centres(self._path, size[0]), _centres(self._path, size[1])
        layers, at = {}, (1, (0.5, 0.5))
        for name, channels in self._channels.items():
            if name in rows:
                at = rows[name][0], (columns[name][1], rows[name][1])
            is_map = name in self.maps or name.startswith("pool")
            layers[name] = LayerInfo(channels, is_map, *at)
        return layers

    @property
    def n_outputs(self) -> int:
        """Length of the logits."""
        return self.layers["logits"].channels

    def softmax_layer(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the (n_outputs, D) weights and (n_outputs,) biases of the layer before the softmax."""
        _, layer = _last_linear(self.net)
        return layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()

    @cached_property
    def digest(self) -> str:
        """Hash over all parameters and buffers: equal digests mean equal networks, whatever the file."""
        parts = [self.name.encode()]
        for key, value in sorted(self.net.state_dict().items()):
            if not key.endswith("num_batches_tracked"):
                array = value.detach().cpu().contiguous().numpy()
                parts += [key.encode(), str(array.shape).encode(), array.tobytes()]
        return bytes_digest(*parts)

    def normalise(self, image: Image) -> NDArray[np.float32]:
        """Return float32 (H, W, 3): the image as this network was trained to see it; its mean becomes 0.

        Raises:
            ShapeError: `image` is not uint8 (H, W, 3).
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ShapeError(
                f"{self.name}: an image must be uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}."
            )
        return np.asarray(cv2.LUT(image, self._table), np.float32)

    def forward(self, crops: Tensor, layers: Collection[str] = ("logits",)) -> dict[str, Tensor]:
        """Run the network on (B, 3, S, S) normalised crops as far as the deepest of `layers`."""
        if not any(name in self.regions for name in layers):
            return self.run_maps(crops, layers)
        maps = self.run_maps(crops, {*layers, self.entry})
        return {**maps, **self.run_regions(maps[self.entry], layers)}

    def run_maps(self, images: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """Run the map layers over (B, 3, H, W) as far as needed; return the named (B, C, h, w) maps."""
        return _run(self.maps, images, layers)

    def run_regions(self, entry: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """Run the region layers over (R, C, g, g) pooled regions of the map layer `entry`."""
        return self.run_pooled(self.pool_regions(entry), layers)

    def pool_regions(self, entry: Tensor) -> Tensor:
        """Run the first region layer alone: the last pooling, whose output is much smaller than its input."""
        first = next(iter(self.regions.values()))
        pooled: Tensor = first(entry)
        return pooled

    def max_pooling(self) -> tuple[int, int] | None:
        """Return kernel and stride where the first region layer is plain max pooling of a crop's map.

        Its adaptive average pooling, which torchvision puts behind it, does nothing on a crop of the
        network's own size.
        """
        first = list(next(iter(self.regions.values())).children())
        if len(first) != 2 or not isinstance(first[0], nn.MaxPool2d):
            return None
        kernel, stride = first[0].kernel_size, first[0].stride
        if (
            not isinstance(kernel, int)
            or not isinstance(stride, int)
            or first[0].padding
            or first[0].ceil_mode
        ):
            return None
        side = (self.entry_grid - kernel) // stride + 1
        name = next(iter(self.regions))
        return (kernel, stride) if self.natural_grid(name) == (side, side) else None

    def run_pooled(self, pooled: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """Run the other region layers over the output of the first."""
        first, *others = self.regions
        outputs = {first: pooled} if first in layers else {}
        return outputs | _run(OrderedDict((n, self.regions[n]) for n in others), pooled, layers)

    def natural_grid(self, layer: str) -> tuple[int, int]:
        """Return the grid of cells of a map layer whose tap names none."""
        if layer in self.regions:  # the last pooling: what the fully connected layers expect
            pooling = [m for m in self.regions[layer].modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
            side: Any = pooling[-1].output_size
            return (side, side) if isinstance(side, int) else (side[0], side[1])
        return 3, 3

    def resolve(self, tap: TapSpec) -> TapSpec:
        """Check a tap against this network and fill in its natural grid.

        Raises:
            ConfigError: no such layer, or a grid for a layer without rows and columns.
        """
        info = self.layers.get(tap.layer)
        if info is None:
            raise ConfigError(
                f"{self.name}: has no layer {tap.layer!r}. Its layers are {', '.join(self.layers)}."
            )
        if info.is_map:
            return TapSpec(tap.layer, tap.grid or self.natural_grid(tap.layer), tap.widen)
        if tap.grid is not None:
            raise ConfigError(f"{self.name}: {tap.layer} is a vector, it takes no grid, got {tap}.")
        return tap

    def n_features(self, tap: TapSpec) -> int:
        """Return the length of a tap's feature vector."""
        rows, columns = self.resolve(tap).grid or (1, 1)
        return self.layers[tap.layer].channels * rows * columns

    def for_inference(self, device: str = "cpu", *, low_rank: Mapping[str, int] | None = None) -> Self:
        """Return a copy that is quicker and cannot be trained: batch normalisation folded, layers fused.

        Args:
            device: where it will run.
            low_rank: ranks of fully connected layers to be approximated, by layer; None keeps them exact.

        Raises:
            ConfigError: `low_rank` names what is no fully connected layer, or a rank is out of range.
        """
        net = self.net
        if low_rank:
            net = copy.deepcopy(net)
            factorise_layers(type(self)(self.name, net).regions, net, low_rank)
        prepared = type(self)(self.name, fuse_for_inference(net, device), self.classes)
        # Fused modules no longer tell their strides.
        prepared._path, prepared._channels = self._path, self._channels
        prepared.__dict__["digest"] = self.digest  # folding changes parameters, not the identity
        return prepared

    def save(self, path: Path) -> None:
        """Write the weights as safetensors that `load_backbone` and torchvision can read."""
        from safetensors.torch import save_file

        state = {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}
        # One entry only: safetensors writes several in an order that differs from run to run.
        about = json.dumps({"backbone": self.name, "classes": self.classes})
        with atomic_path(path) as temporary:
            save_file(state, temporary, metadata={_ABOUT: about})


def _run(stages: Stages, x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
    wanted = [name for name in stages if name in layers]
    outputs: dict[str, Tensor] = {}
    for name, stage in stages.items():
        if len(outputs) == len(wanted):
            break
        x = stage(x)
        if name in layers:
            outputs[name] = x
    return outputs


class _Step(NamedTuple):
    """A convolution or pooling of the main path; `padding` is None for TensorFlow's 'same'."""

    layer: str
    kernel: int
    stride: int
    padding: int | None


def _main_path(maps: Stages, regions: Stages) -> tuple[_Step, ...]:
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
            steps.append(_Step(name, kernel, stride, None if isinstance(module, SameConv2d) else padding))
    return tuple(steps)


@lru_cache(maxsize=4096)
def _centres(steps: tuple[_Step, ...], size: int) -> dict[str, tuple[int, float]]:
    """Return stride and the centre of the first cell of each layer along an axis of `size` pixels."""
    found: dict[str, tuple[int, float]] = {}
    stride, origin = 1, 0.5
    for step in steps:
        padding = step.padding
        if padding is None:
            padding, _ = same_padding(size, step.kernel, step.stride)
            size = -(-size // step.stride)
        else:
            size = (size + 2 * padding - step.kernel) // step.stride + 1
        origin += ((step.kernel - 1) / 2 - padding) * stride
        stride *= step.stride
        found[step.layer] = (stride, origin)
    return found


def _channels(maps: Stages, regions: Stages) -> dict[str, int]:
    """Return the number of channels of every layer."""
    found, channels = {}, 3
    for name, stage in [*maps.items(), *regions.items()]:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                channels = module.weight.shape[0]
        found[name] = channels
    return found


def _architecture(name: str) -> Architecture:
    if name not in _ARCHITECTURES:
        raise ConfigError(f"Backbone: name must be one of {', '.join(BACKBONES)}, got {name!r}.")
    return _ARCHITECTURES[name]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_backbone(
    name: str,
    weights: str | Path = "default",
    *,
    n_outputs: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Make a backbone and fill in its weights; it comes in evaluation mode, on the CPU.

    Args:
        name: one of `BACKBONES`.
        weights: `default` (ImageNet, found or downloaded), `offline` (from the offline package), `random`,
            a member of torchvision's weights enum, or a file: safetensors or a torch state dict. A network
            fine-tuned by this package comes with its own outputs and classes.
        n_outputs: replace the last layer by a new random one with this many outputs, see
            `with_new_outputs`. None keeps the one that there is.
        seed: of everything random.

    Raises:
        ConfigError: an unknown backbone, or no such weights exist for it.
        WeightsError: the weights are missing, damaged or of another network.
    """
    architecture = _architecture(name)
    if weights == "random":
        return random_backbone(name, n_outputs, seed=seed).eval()
    path = Path(weights) if _is_file_name(weights) else find_weights(_downloadable(name), str(weights))
    state = read_weights(path)
    with torch.device("meta"):
        net = architecture.build(_n_outputs(architecture, state, path))
    load_weights(net, state, str(path))
    backbone = Backbone(name, net, _saved_classes(path, name)).eval()
    if n_outputs is None:
        return backbone
    return with_new_outputs(backbone, tuple(map(str, range(n_outputs))), seed=seed)


def random_backbone(name: str, n_outputs: int | None = None, *, seed: int = 0) -> Backbone:
    """Make a backbone with random weights, in training mode.

    Args:
        name: one of `BACKBONES`.
        n_outputs: length of the logits; None takes ImageNet's 1000.
        seed: of the weights.
    """
    architecture = _architecture(name)
    with _seeded(seed):
        return Backbone(name, architecture.build(1000 if n_outputs is None else n_outputs))


def _is_file_name(weights: str | Path) -> bool:
    return isinstance(weights, Path) or "/" in weights or "." in weights or Path(weights).is_file()


def _downloadable(name: str) -> str:
    if name.startswith("small_cnn"):
        raise ConfigError(
            f"{name}: has no published weights. Train it from weights='random', or name a file of weights."
        )
    return name


def _n_outputs(architecture: Architecture, state: Mapping[str, Tensor], path: Path) -> int:
    """Read how many outputs the saved network has: the rows of its last matrix of weights."""
    with torch.device("meta"):
        net = architecture.build(2)
    name, _ = _last_linear(net)
    if f"{name}.weight" not in state:
        raise WeightsError(f"{path}: lacks {f'{name}.weight'!r}. These are the weights of another network.")
    return len(state[f"{name}.weight"])


def _saved_classes(path: Path, name: str) -> tuple[str, ...] | None:
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        about = json.loads((stream.metadata() or {}).get(_ABOUT, "{}"))
    if about.get("backbone", name) != name:
        raise WeightsError(f"{path}: holds the weights of {about['backbone']}, not of {name}.")
    return tuple(about["classes"]) if about.get("classes") else None


def with_new_outputs(backbone: Backbone, classes: tuple[str, ...], *, seed: int = 0) -> Backbone:
    """Return a copy whose last layer is a new random one: Gaussian of deviation 0.01, no bias, as in R-CNN.

    Args:
        backbone: the network to copy.
        classes: names of the new outputs.
        seed: of the new weights.
    """
    if not classes:
        raise ConfigError(f"{backbone.name}: needs at least 1 output, got none.")
    net = copy.deepcopy(backbone.net)
    name, old = _last_linear(net)
    with _seeded(seed):
        new = nn.Linear(old.in_features, len(classes))
        nn.init.normal_(new.weight, std=0.01)
    nn.init.zeros_(new.bias)
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)
    return Backbone(backbone.name, net, classes).eval()


def _last_linear(net: nn.Module) -> tuple[str, nn.Linear]:
    return [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
