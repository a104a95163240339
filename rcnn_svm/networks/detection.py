"""Networks that were trained to detect: torchvision's Faster R-CNNs, for their regions and their features.

Such a network has a pyramid of maps (FPN), a region proposal network (RPN) that finds regions on it, RoIAlign
that pools them from the map of their size, and fully connected layers. It is read as torchvision runs it, up
to what its class scores are computed from: these and its box regression are of other classes.
"""

from __future__ import annotations

import copy
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes

from rcnn_svm.boxes import Boxes
from rcnn_svm.errors import ConfigError
from rcnn_svm.files import bytes_digest
from rcnn_svm.networks import trained_to_detect
from rcnn_svm.networks.architectures import Architecture
from rcnn_svm.networks.backbone import (
    Backbone,
    digest_of,
    is_file_name,
    load_backbone,
    named_as,
    run_stages,
    save_network,
    saved_classes,
    seeded,
)
from rcnn_svm.networks.fusing import fuse_for_inference
from rcnn_svm.networks.libraries import unknown_network
from rcnn_svm.networks.taps import TapSpec
from rcnn_svm.networks.weights import find_weights, load_weights, read_weights
from rcnn_svm.structures import Image, require_image
from rcnn_svm.threads import limit_torch

__all__ = ["DetectionNetwork", "Network", "Pyramid", "load_detection_network", "load_network"]

_SIDE = 64
"""Of an image that shapes are found on: two cells of the coarsest map that is read."""
_EPS = 1e-5
"""That torchvision's normalisations are made with."""
_OLD_NAMES = re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+|rpn\.head\.conv)\.(weight|bias)")
"""Names of parameters in torchvision's older files, which have been put one or two modules deeper since."""
_HANDED = threading.local()
"""What the RPN of a thread saw last: its regions are mostly read right after it has found them."""


class Pyramid(NamedTuple):
    """What a network sees of an image.

    Attributes:
        maps: by level, (1, C, h, w) each.
        images: the image as it was resized and padded, with its size before it was padded.
        size: (height, width) of the image itself.
    """

    maps: dict[str, Tensor]
    images: ImageList
    size: tuple[int, int]


class DetectionNetwork:
    """A Faster R-CNN whose regions and layers are read.

    Args:
        name: `torchvision:fasterrcnn_...`.
        net: the module, without what gives class scores; its parameters keep torchvision's names.

    Attributes:
        shapes: of what each layer gives for a region, in order: (C, rows, columns) of `roi`, which RoIAlign
            pools, (D,) of the fully connected layers after it, with their ReLU.
        default_taps: the last layer before the class scores.
        fine_taps: what is read of a box that is to be refined: cells that reach over its border, its context.
        device: where its regions are found.
    """

    def __init__(self, name: str, net: Any) -> None:
        self.name, self.net, self.device = name, net.eval().requires_grad_(False), "cpu"
        self._head = _head_of(net.roi_heads.box_head)
        region, size = torch.tensor([[0.0, 0.0, _SIDE, _SIDE]]), (_SIDE, _SIDE)
        with torch.inference_mode():
            # RoIAlign keeps the strides that it guesses from the first image, which must not be an odd one.
            x = net.roi_heads.box_roi_pool(net.backbone(torch.zeros(1, 3, *size)), [region], [size])
            self.shapes: dict[str, tuple[int, ...]] = {"roi": tuple(x.shape[1:])}
            for layer, step in self._head.items():
                x = step(x)
                self.shapes[layer] = tuple(x.shape[1:])
        self.default_taps = next(reversed(self.shapes))
        self.fine_taps = f"roi*1.6,{self.default_taps}*1.8"
        self._ready: dict[str, Self] = {}

    @cached_property
    def digest(self) -> str:
        """Hash over all parameters and buffers that are read, see `Backbone.digest`."""
        return digest_of(self.name, self.net)

    def save(self, path: Path) -> None:
        """Write the weights as safetensors that `load_network` can read."""
        save_network(self.name, self.net, path)

    def on(self, device: str) -> Self:
        """Return the same network, whose regions are found on `device`."""
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.device = device
        return moved

    def for_inference(self, device: str = "cpu") -> Self:
        """Return a copy that is quicker: batch normalisation folded, layers fused; the same one each time.

        Args:
            device: where it will run.
        """
        if device not in self._ready:
            prepared = copy.copy(self)
            prepared.net = fuse_for_inference(self.net, device)
            prepared._head = nn.ModuleDict(
                {name: fuse_for_inference(step, device) for name, step in self._head.items()}
            )
            prepared.net.roi_heads.box_head = None  # it is in the line before
            prepared.device, prepared._ready = device, {}
            prepared.__dict__["digest"] = self.digest  # folding changes parameters, not the identity
            prepared._ready[device] = prepared
            self._ready[device] = prepared
        return self._ready[device]

    def resolve(self, tap: TapSpec) -> TapSpec:
        """Check a tap against this network and fill in its natural grid.

        Raises:
            ConfigError: no such layer, or a grid for a layer without rows and columns.
        """
        if tap.layer not in self.shapes:
            raise ConfigError(
                f"{self.name}: has no layer {tap.layer!r}. Its layers are {', '.join(self.shapes)}."
            )
        if tap.layer == "roi":
            _, rows, columns = self.shapes["roi"]
            return TapSpec("roi", tap.grid or (rows, columns), tap.widen)
        if tap.grid is not None:
            raise ConfigError(f"{self.name}: {tap.layer} is a vector, it takes no grid, got {tap}.")
        return tap

    def n_features(self, tap: TapSpec) -> int:
        """Return the length of a tap's feature vector."""
        rows, columns = self.resolve(tap).grid or (1, 1)
        return int(self.shapes[tap.layer][0]) * rows * columns

    @torch.inference_mode()
    def look(self, image: Image) -> Pyramid:
        """Run the convolutions over an image, unless this thread's `propose` has just done so.

        The image is normalised, resized and padded as the network was trained to see it.

        Args:
            image: uint8 (H, W, 3) RGB.

        Raises:
            ShapeError: it is not.
        """
        require_image(self.name, image)
        handed = _HANDED.__dict__.pop("seen", None)  # once: maps of an image take a hundred megabytes
        if handed is not None and handed[0] == self._identity(image):
            return Pyramid(*handed[1])
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(self.device).permute(2, 0, 1)
        images, _ = self.net.transform([pixels.float() / 255])
        maps = self.net.backbone(images.tensors.contiguous(memory_format=torch.channels_last))
        # RoIAlign wants them channel by channel, and would reorder them each time.
        by_channel = {level: value.contiguous() for level, value in maps.items()}
        return Pyramid(by_channel, images, (image.shape[0], image.shape[1]))

    def _identity(self, image: Image) -> tuple[Any, ...]:
        return self.digest, self.device, image.shape, bytes_digest(np.ascontiguousarray(image).data)

    @torch.inference_mode()
    def propose(self, image: Image) -> Boxes:
        """Return (R, 4) the regions of the RPN inside the image, best first, no two alike.

        They are those of torchvision's `model.rpn`, as many as it is set to give, brought back to the image.

        Args:
            image: uint8 (H, W, 3) RGB.

        Raises:
            ShapeError: the image is no such array.
        """
        ready = self.for_inference(self.device)
        seen = ready.look(image)
        (found,), _ = ready.net.rpn(seen.images, seen.maps)
        _HANDED.seen = ready._identity(image), seen
        boxes = resize_boxes(found, seen.images.image_sizes[0], seen.size).cpu().numpy()
        height, width = seen.size
        boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        _, first = np.unique(boxes, axis=0, return_index=True)
        return np.asarray(boxes[np.sort(first)], np.float32)

    @torch.inference_mode()
    def read(self, seen: Pyramid, regions: NDArray[np.float32], layers: Collection[str]) -> dict[str, Tensor]:
        """Return what layers give for regions, by name: (R, C, rows, columns) of `roi`, (R, D) of the others.

        Args:
            seen: of an image.
            regions: (R, 4) in pixels of the image, which they may leave.
            layers: names.
        """
        boxes = torch.from_numpy(np.ascontiguousarray(regions, np.float32)).to(self.device)
        resized = seen.images.image_sizes
        boxes = resize_boxes(boxes, seen.size, resized[0])
        x = self.net.roi_heads.box_roi_pool(seen.maps, [boxes], resized)
        found = {"roi": x} if "roi" in layers else {}
        return found | run_stages(dict(self._head.items()), x, layers)


Network: TypeAlias = Backbone | DetectionNetwork
"""What features are read from."""


def _head_of(box_head: Any) -> nn.ModuleDict:
    """Return the fully connected layers after RoIAlign, in order; convolutions before belong to the first."""
    if isinstance(box_head, TwoMLPHead):
        layers = OrderedDict[str, nn.Module](
            fc6=nn.Sequential(nn.Flatten(), box_head.fc6, nn.ReLU()),
            fc7=nn.Sequential(box_head.fc7, nn.ReLU()),
        )
    else:  # four convolutions and one layer
        layers = OrderedDict[str, nn.Module](fc6=box_head)
    return nn.ModuleDict(layers)


def _build(name: str) -> Any:
    """Make the module of a network with random weights, without what gives class scores."""
    model = name.partition(":")[2]
    names = [f"torchvision:{one}" for one in torchvision.models.list_models(torchvision.models.detection)]
    known = [one for one in names if trained_to_detect(one)]
    if name not in known:
        raise unknown_network("torchvision", model, [one.partition(":")[2] for one in known])
    net = torchvision.models.get_model(model, weights=None, weights_backbone=None)
    net.roi_heads.box_predictor = None
    return net


def load_detection_network(name: str, weights: str | Path = "default", *, seed: int = 0) -> DetectionNetwork:
    """Make a network that was trained to detect and fill in its weights, on the CPU.

    Args:
        name: `torchvision:fasterrcnn_mobilenet_v3_large_fpn` or another of torchvision's Faster R-CNNs.
        weights: as `load_backbone` takes them; what gives class scores is left out, of however many classes.
        seed: of random weights.

    Raises:
        ConfigError: no such network, or no such weights for it.
        WeightsError: the weights are missing, damaged or of another network.
    """
    limit_torch()  # before it works for the first time
    with seeded(seed):
        net = _build(name)
    if weights == "random":
        return DetectionNetwork(name, net)
    path = Path(weights) if is_file_name(weights) else find_weights(name, str(weights))
    saved_classes(path, name, 0)  # a file of ours says of which network it is
    state = named_as(net, read_weights(path))
    state = {
        _renamed(key): value for key, value in state.items() if not key.startswith("roi_heads.box_predictor.")
    }
    if "_resnet50_fpn_coco" in path.name:
        state = _of_no_eps(state)
    load_weights(net, state, str(path))
    return DetectionNetwork(name, net)


def _renamed(key: str) -> str:
    """Return the name that a parameter of torchvision's older files has today."""
    found = _OLD_NAMES.fullmatch(key)
    if found is None:
        return key
    return f"{found[1]}.0.{'0.' if found[1].startswith('rpn.') else ''}{found[2]}"


def _of_no_eps(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network whose normalisations add nothing to variances, for those that do.

    torchvision runs its first Faster R-CNN so, whose file does not tell (`overwrite_eps`).
    """
    scaled = dict(state)
    for key, value in state.items():
        norm, _, kind = key.rpartition(".")
        if kind == "running_var":
            factor = ((value.double() + _EPS) / value.double()).sqrt()
            scaled[f"{norm}.weight"] = (state[f"{norm}.weight"].double() * factor).float()
    return scaled


def load_network(name: str | Architecture, weights: str | Path = "default", *, seed: int = 0) -> Network:
    """Make a network and fill in its weights: one that classifies, see `load_backbone`, or that detects.

    Raises:
        ConfigError: an unknown network, or no such weights for it.
        DependencyError: timm, or a package of weights, is not installed.
        WeightsError: the weights are missing, damaged or of another network.
    """
    if isinstance(name, str) and trained_to_detect(name):
        return load_detection_network(name, weights, seed=seed)
    return load_backbone(name, weights, seed=seed)
