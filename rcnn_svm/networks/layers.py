"""What can be read out of a network: every layer with its shape, weights, memory and work.

Computed from the real module on torch's meta device: no weights are loaded and nothing is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rcnn_svm.networks.backbone import random_backbone

__all__ = ["LayerRow", "layer_table"]


@dataclass(frozen=True)
class LayerRow:
    """One layer of a backbone, for one crop of its natural size.

    Attributes:
        name: of the tap.
        shape: of its output: (channels, rows, columns) or (features,).
        n_weights: parameters of this layer alone.
        matrix: (inputs, outputs) of its fully connected weights; None where it has none.
        weights_mb: memory of its weights in float32, in 10^6 bytes.
        output_kb: memory of its output for one region in float32, in 10^3 bytes.
        gflop: work of this layer alone for one crop; a multiplication and an addition count as two.
    """

    name: str
    shape: tuple[int, ...]
    n_weights: int
    matrix: tuple[int, int] | None
    weights_mb: float
    output_kb: float
    gflop: float


def layer_table(name: str) -> list[LayerRow]:
    """Describe every layer of a backbone in order.

    Args:
        name: one of `BACKBONES`, `timm:NAME` or `torchvision:NAME`.

    Raises:
        ConfigError: an unknown backbone.

    Example:
        >>> [row.matrix for row in layer_table("vgg16") if row.name == "fc6"]
        [(25088, 4096)]
    """
    with torch.device("meta"):
        backbone = random_backbone(name).eval()
        x = torch.empty(1, 3, backbone.crop_size, backbone.crop_size)
    rows = []
    for layer, stage in [*backbone.maps.items(), *backbone.regions.items()]:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            x = stage(x)
        n_weights = sum(p.numel() for p in stage.parameters())
        linear = [m for m in stage.modules() if isinstance(m, nn.Linear)]
        vector = x.ndim == 2
        rows.append(
            LayerRow(
                name=layer,
                shape=tuple(x.shape[1:]),
                n_weights=n_weights,
                matrix=(linear[-1].in_features, linear[-1].out_features) if linear and vector else None,
                weights_mb=n_weights * 4 / 1e6,
                output_kb=x.numel() * 4 / 1e3,
                gflop=counter.get_total_flops() / 1e9,
            )
        )
    return rows
