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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rcnn_svm.errors import ConfigError, WeightsError
from rcnn_svm.files import atomic_path, bytes_digest
from rcnn_svm.networks.architectures import (
    ARCHITECTURES,
    Architecture,
    Stages,
    centres,
    fine_scales,
    main_path,
    two_scales,
)
from rcnn_svm.networks.fusing import fuse_for_inference, fuse_graph
from rcnn_svm.networks.geometry import LayerInfo
from rcnn_svm.networks.libraries import architecture_named, is_named
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.networks.tracing import on_meta
from rcnn_svm.networks.weights import find_weights, load_weights, read_weights
from rcnn_svm.opencv import cv2
from rcnn_svm.progress import say
from rcnn_svm.structures import Image, require_image
from rcnn_svm.threads import limit_torch

__all__ = [
    "BACKBONES",
    "Backbone",
    "digest_of",
    "is_file_name",
    "load_backbone",
    "named_as",
    "random_backbone",
    "run_stages",
    "save_network",
    "saved_classes",
    "seeded",
    "with_new_outputs",
]

_ABOUT = "rcnn_svm"
"""Key of what a file of weights says about its network."""
BACKBONES = tuple(ARCHITECTURES)
"""Names of our own networks; `load_backbone` takes those of libraries as well."""


_FINE_STRIDE = 16
"""Pixels between cells of the map that borders of boxes are read from, at most."""


class Backbone(nn.Module):
    """A network whose layers are read by name.

    Args:
        architecture: one of `ARCHITECTURES`, or yours.
        net: its module; its parameters keep torchvision's names.
        classes: names of its outputs, where they are those of a detector (background last).

    Attributes:
        maps, regions: the layers by name, in order; views of `net`, so that both always agree.
        crop_size, padding: side of the crops and their context, in pixels.
        default_taps, trunk_from: what is read, and from where on is tuned, where nothing else is said.
        entry: the last map layer; `entry_grid` is its side on a crop.
    """

    def __init__(
        self, architecture: Architecture, net: nn.Module, classes: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.name = architecture.name
        self.net = net
        self.classes = classes
        self.maps, self.regions = architecture.split(net)
        traced = architecture.traced
        if traced is None:
            self._path = main_path(self.maps, self.regions)
            self._channels = _channels(self.maps, self.regions)
        self._n_outputs = None if traced is None else traced.n_outputs(net)
        self.entry = next(reversed(self.maps))
        self.entry_grid = architecture.entry_grid if traced is None else traced.entry_grid
        self.crop_size, self.padding = architecture.crop_size, architecture.padding
        self.batch_size = architecture.batch_size
        self.default_taps = architecture.taps or (two_scales(*traced.scales) if traced else "")
        self.trunk_from = architecture.trunk_from or (traced.trunk_from if traced else "")
        self.mean_std = architecture.mean, architecture.std
        mean, std = map(np.array, self.mean_std)
        table = (np.arange(256)[:, None] / 255 - mean) / std
        self._table = table.astype(np.float32).reshape(256, 1, 3)
        self.mean_pixel = np.rint(mean * 255).astype(np.uint8)

    @cached_property
    def layers(self) -> dict[str, LayerInfo]:
        """Geometry of every layer on a crop of the network's own size, by name and in order."""
        return self.layers_on((self.crop_size, self.crop_size))

    @property
    def fine_taps(self) -> str:
        """What is read of a box that is to be refined: cells that reach over its border, and its context."""
        if self.architecture.traced is not None:
            return fine_scales(*self.architecture.traced.scales)
        middle = [name for name in self.maps if self.layers[name].stride <= _FINE_STRIDE]
        return fine_scales(middle[-1] if middle else self.entry, self.entry)

    def layers_on(self, size: tuple[int, int]) -> dict[str, LayerInfo]:
        """Return the geometry of every layer on an image of `size` (height, width).

        Origins depend on it where a network pads as TensorFlow does, see `SameConv2d`.
        """
        if self.architecture.traced is not None:
            found = self.architecture.traced.on(size)
            if self._n_outputs is not None:
                found["logits"] = replace(found["logits"], channels=self._n_outputs)
            return found
        rows, columns = centres(self._path, size[0]), centres(self._path, size[1])
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
        """Hash over all parameters and buffers; equal digests mean equal networks, whatever the file."""
        return digest_of(self.name, self.net)

    def normalise(self, image: Image) -> NDArray[np.float32]:
        """Return float32 (H, W, 3): the image as this network was trained to see it; its mean becomes 0.

        Raises:
            ShapeError: `image` is not uint8 (H, W, 3).
        """
        require_image(self.name, image)
        return np.asarray(cv2.LUT(image, self._table), np.float32)

    def forward(self, crops: Tensor, layers: Collection[str] = ("logits",)) -> dict[str, Tensor]:
        """Run the network on (B, 3, S, S) normalised crops as far as the deepest of `layers`."""
        if not any(name in self.regions for name in layers):
            return self.run_maps(crops, layers)
        maps = run_stages(self.maps, crops, {*layers, self.entry})
        regions = self.run_regions(maps[self.entry], layers)
        return {**self._in_rows(maps, crops), **regions}

    def run_maps(self, images: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
        """Run the map layers over (B, 3, H, W) as far as needed; return the named (B, C, h, w) maps."""
        return self._in_rows(run_stages(self.maps, images, layers), images)

    def _in_rows(self, maps: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """Return (B, C, h, w) maps, of which some are (B, N, C) tokens."""
        return {name: self._cells(name, v, images) if v.ndim == 3 else v for name, v in maps.items()}

    def _cells(self, name: str, tokens: Tensor, images: Tensor) -> Tensor:
        info = self.layers[name]
        rows, columns = (-(-n // info.stride) for n in images.shape[2:])
        cells = tokens[:, info.n_prefix or 0 :].transpose(1, 2)
        return cells.reshape(*cells.shape[:2], rows, columns)

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
        return outputs | run_stages(OrderedDict((n, self.regions[n]) for n in others), pooled, layers)

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
        layer = self.aliases.get(tap.layer, tap.layer)
        info = self.layers.get(layer)
        if info is None:
            strides = [name for name, own in self.aliases.items() if own in self.maps and name[1:].isdigit()]
            raise ConfigError(
                f"{self.name}: has no layer {tap.layer!r}. Its layers are "
                f"{', '.join([*strides, *self.layers])}."
            )
        if info.is_map:
            return TapSpec(layer, tap.grid or self.natural_grid(layer), tap.widen)
        if tap.grid is not None:
            raise ConfigError(f"{self.name}: {tap.layer} is a vector, it takes no grid, got {tap}.")
        return TapSpec(layer, None, tap.widen)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of layers, such as `s16`, or those of modules that end with a layer."""
        return {} if self.architecture.traced is None else self.architecture.traced.plan.aliases

    def check_shared(self, layer: str) -> None:
        """See that a layer can be read of regions of a map of the whole image.

        Raises:
            ConfigError: it is not known where its cells lie, or a region layer reads tokens.
        """
        read = self.entry if layer in self.regions else layer
        info = self.layers[read]
        problem = info.problem
        if layer in self.regions and info.n_prefix is not None:
            problem = "it reads tokens of the whole image"
        if problem:
            raise ConfigError(
                f"{self.name}: {layer} cannot be read on shared maps: {problem}. Read another layer, or set "
                f"features.path=warped (--path warped)."
            )

    def n_features(self, tap: TapSpec) -> int:
        """Return the length of a tap's feature vector."""
        tap = self.resolve(tap)
        rows, columns = tap.grid or (1, 1)
        return self.layers[tap.layer].channels * rows * columns

    def for_inference(self, device: str = "cpu") -> Self:
        """Return a copy that is quicker and cannot be trained: batch normalisation folded, layers fused.

        Args:
            device: where it will run.
        """
        prepare = fuse_for_inference if self.architecture.traced is None else fuse_graph
        prepared = copy.copy(self)  # fused modules no longer tell strides and numbers of channels
        prepared._modules = {}
        prepared.net = prepare(self.net, device)
        prepared.maps, prepared.regions = self.architecture.split(prepared.net)
        prepared.__dict__["digest"] = self.digest  # folding changes parameters, not the identity
        return prepared

    def save(self, path: Path) -> None:
        """Write the weights as safetensors that `load_backbone` and torchvision can read."""
        save_network(self.name, self.net, path, self.classes)


def digest_of(name: str, net: nn.Module) -> str:
    """Return a hash over the name of a network and all its parameters and buffers."""
    parts = [name.encode()]
    for key, value in sorted(net.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            array = value.detach().cpu().contiguous().numpy()
            parts += [key.encode(), str(array.shape).encode(), array.tobytes()]
    return bytes_digest(*parts)


def save_network(name: str, net: nn.Module, path: Path, classes: tuple[str, ...] | None = None) -> None:
    """Write the weights of a network as safetensors, with its name and the classes of its outputs."""
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    # One entry only: safetensors writes several in an order that differs from run to run.
    about = json.dumps({"backbone": name, "classes": classes})
    with atomic_path(path, apart=True) as temporary:
        save_file(state, temporary, metadata={_ABOUT: about})


def run_stages(stages: Mapping[str, nn.Module], x: Tensor, layers: Collection[str]) -> dict[str, Tensor]:
    """Return what some layers give for an input, by name, in order; nothing runs after the last of them."""
    wanted = [name for name in stages if name in layers]
    outputs: dict[str, Tensor] = {}
    for name, stage in stages.items():
        if len(outputs) == len(wanted):
            break
        x = stage(x)
        if name in layers:
            outputs[name] = x
    return outputs


def _channels(maps: Stages, regions: Stages) -> dict[str, int]:
    """Return the number of channels of every layer."""
    found, channels = {}, 3
    for name, stage in [*maps.items(), *regions.items()]:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                channels = module.weight.shape[0]
        found[name] = channels
    return found


def _architecture(name: str | Architecture) -> Architecture:
    return name if isinstance(name, Architecture) else architecture_named(name)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let everything random of torch's come from a seed, and leave its generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_backbone(
    name: str | Architecture,
    weights: str | Path = "default",
    *,
    n_outputs: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Make a backbone and fill in its weights; it comes in evaluation mode, on the CPU.

    Args:
        name: one of `BACKBONES`, `timm:NAME[.TAG]`, `torchvision:NAME`, or an architecture of yours.
        weights: `default` (found or downloaded), `offline` (from the offline package), `random`,
            a member of torchvision's weights enum, or a file: safetensors or a torch state dict. A network
            fine-tuned by this package comes with its own outputs and classes.
        n_outputs: replace the last layer by a new random one with this many outputs, see
            `with_new_outputs`. None keeps the one that there is.
        seed: of everything random.

    Raises:
        ConfigError: an unknown backbone, one whose layers cannot be found, or no such weights for it.
        DependencyError: timm, or the package of weights, is not installed.
        WeightsError: the weights are missing, damaged or of another network.
    """
    architecture = _architecture(name)
    limit_torch()  # before it works for the first time
    if weights == "random":
        return random_backbone(architecture, n_outputs, seed=seed).eval()
    known = is_file_name(weights)
    path = Path(weights) if known else find_weights(_downloadable(architecture), str(weights))
    if architecture.traced is not None:
        backbone = _load_traced(architecture, path)
    else:
        state = named_as(on_meta(lambda: architecture.build(2)), read_weights(path))
        with torch.device("meta"):
            n_saved = _n_outputs(architecture, state, path)
            net = architecture.build(n_saved)
        load_weights(net, state, str(path))
        backbone = Backbone(architecture, net, saved_classes(path, architecture.name, n_saved)).eval()
    if n_outputs is None:
        return backbone
    return with_new_outputs(backbone, tuple(map(str, range(n_outputs))), seed=seed)


def random_backbone(name: str | Architecture, n_outputs: int | None = None, *, seed: int = 0) -> Backbone:
    """Make a backbone with random weights, in training mode.

    Args:
        name: one of `BACKBONES`.
        n_outputs: length of the logits; None takes ImageNet's 1000.
        seed: of the weights.
    """
    architecture = _architecture(name)
    with seeded(seed):
        return Backbone(architecture, architecture.build(1000 if n_outputs is None else n_outputs))


def is_file_name(weights: str | Path) -> bool:
    """Whether weights are a file rather than a name such as `default`."""
    return isinstance(weights, Path) or "/" in weights or "." in weights or Path(weights).is_file()


def _downloadable(architecture: Architecture) -> str:
    name = architecture.name
    if name.startswith("small_cnn") or not is_named(name) or architecture_named(name) is not architecture:
        raise ConfigError(
            f"{name}: has no published weights. Train it from weights='random', or name a file of weights."
        )
    return name


def named_as(net: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drop a prefix of all names that the network has not, such as `module.` of DataParallel."""
    wanted = net.state_dict().keys()
    while state and wanted.isdisjoint(state) and all("." in name for name in state):
        if len({name.partition(".")[0] for name in state}) > 1:
            break
        state = {name.partition(".")[2]: value for name, value in state.items()}
    return state


_OF_TRAINING = ("aux1.", "aux2.", "AuxLogits.")
"""Branches of torchvision's GoogLeNet and Inception that only their training has."""


def _load_traced(architecture: Architecture, path: Path) -> Backbone:
    """Load a network whose layers are found by tracing; without a last layer where the file has none."""
    state = named_as(on_meta(lambda: architecture.build(2)), read_weights(path))
    if architecture.name.startswith("torchvision:"):
        state = {name: value for name, value in state.items() if not name.startswith(_OF_TRAINING)}
    assert architecture.traced is not None
    classifier = architecture.traced.classifier
    found = [name for name in classifier if name in state]
    n_saved = len(state[found[0]]) if found else 0
    if classifier and not found and is_named(architecture.name):
        say(f"{path}: has no last layer; {architecture.name} is read up to `penultimate`.")
        architecture = architecture_named(architecture.name, with_logits=False)
    with seeded(0):  # not on the meta device: some buffers are in no file
        net = architecture.build(n_saved)
    load_weights(net, state, str(path))
    return Backbone(architecture, net, saved_classes(path, architecture.name, n_saved)).eval()


def _n_outputs(architecture: Architecture, state: Mapping[str, Tensor], path: Path) -> int:
    """Read how many outputs the saved network has: the rows of its last matrix of weights."""
    with torch.device("meta"):
        net = architecture.build(2)
    if not any(isinstance(module, nn.Linear) for module in net.modules()):
        return 0  # it has none
    name, _ = _last_linear(net)
    if f"{name}.weight" not in state:
        others = [key for key in net.state_dict() if not key.startswith(f"{name}.")]
        if all(key in state or key.endswith("num_batches_tracked") for key in others):
            raise WeightsError(
                f"{path}: lacks the last layer, {name!r}, and has all others. Save the whole network."
            )
        raise WeightsError(f"{path}: lacks {f'{name}.weight'!r}. These are the weights of another network.")
    last = state[f"{name}.weight"]
    if last.ndim != 2 or not len(last):
        raise WeightsError(
            f"{path}: {f'{name}.weight'!r} must be a matrix, got shape {tuple(last.shape)}. "
            f"These are the weights of another network."
        )
    return len(last)


def saved_classes(path: Path, name: str, n_outputs: int) -> tuple[str, ...] | None:
    """Return the names of the outputs that a file of `save_network` tells; None where it tells none.

    Raises:
        WeightsError: it is of another network, or has other outputs.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        text = (stream.metadata() or {}).get(_ABOUT, "{}")
    try:
        about = json.loads(text)
        told, classes = about.get("backbone", name), about.get("classes") or ()
        valid = all(isinstance(one, str) for one in classes) and len(classes) in (0, n_outputs)
    except (ValueError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise WeightsError(
            f"{path}: must say of which network and of which {n_outputs} classes it is, got {text[:80]!r}. "
            f"The file is damaged: fetch or train it again."
        )
    if told != name:
        raise WeightsError(f"{path}: holds the weights of {told}, not of {name}.")
    return tuple(classes) or None


def with_new_outputs(backbone: Backbone, classes: tuple[str, ...], *, seed: int = 0) -> Backbone:
    """Return a copy whose last layer is a new random one: Gaussian of deviation 0.01, no bias, as in R-CNN.

    Args:
        backbone: the network to copy.
        classes: names of the new outputs.
        seed: of the new weights.
    """
    if not classes:
        raise ConfigError(f"{backbone.name}: needs at least 1 output, got none.")
    if backbone.architecture.traced is not None:
        return _with_new_classifier(backbone, classes, seed)
    net = copy.deepcopy(backbone.net)
    name, old = _last_linear(net)
    with seeded(seed):
        new = nn.Linear(old.in_features, len(classes))
        nn.init.normal_(new.weight, std=0.01)
    nn.init.zeros_(new.bias)
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, new)
    return Backbone(backbone.architecture, net, classes).eval()


def _with_new_classifier(backbone: Backbone, classes: tuple[str, ...], seed: int) -> Backbone:
    """Do the same for a traced network, which may end in a convolution, or a library's have had no logits."""
    architecture = architecture_named(backbone.name) if is_named(backbone.name) else backbone.architecture
    if architecture.traced is None or not architecture.traced.classifier:
        raise ConfigError(f"{backbone.name}: must end in a layer of logits to be given a new one, got none.")
    with seeded(seed):
        net = architecture.build(len(classes))
        own, old = net.state_dict(), backbone.net.state_dict()
        for name in architecture.traced.classifier:
            if own[name].ndim > 1:
                nn.init.normal_(own[name], std=0.01)
            else:
                nn.init.zeros_(own[name])
            old[name] = own[name]
    net.load_state_dict(old)
    return Backbone(architecture, net, classes).eval()


def _last_linear(net: nn.Module) -> tuple[str, nn.Linear]:
    found = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ConfigError(
            f"{type(net).__name__}: must have a fully connected layer before the softmax, got none. Set "
            f"learn=fc, which needs none."
        )
    return found[-1]
