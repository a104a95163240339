"""Your own network: any torch module whose layers are named."""

from collections import OrderedDict

import torch
from own_data import splits
from torch import nn

from rcnn_svm import Architecture, ExperimentConfig, load_backbone, load_detector, train_detector


def build() -> nn.Module:
    """Three strided convolutions; yours may come with trained weights, in a file."""
    sizes = {"conv1": (3, 16), "conv2": (16, 32), "conv3": (32, 64)}
    layers = {name: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for name, (a, b) in sizes.items()}
    return nn.Sequential(OrderedDict(layers))


mine = Architecture.of("mine", build, maps=("conv1", "conv2", "conv3"), crop_size=64)
torch.save(build().state_dict(), "mine.pt")
network = load_backbone(mine, "mine.pt")
result = train_detector(splits, ExperimentConfig(folds=0).build(backbone=network))
result.detector.save("mine-detector")
print(result, load_detector("mine-detector", parts={"mine": mine}))
