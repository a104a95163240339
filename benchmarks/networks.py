"""Where cells lie, and how fast networks of libraries run; writes results/benchmarks/networks.json.

    python benchmarks/networks.py [--only geometry|speed] [--families A,B]

Geometry is proved against gradients: of a network whose weights are all alike, without activations, gates
and attention, the gradient of a cell by the image counts the paths from each pixel, and its centroid is
where the cell lies. The network that is differentiated is the library's own module, not our graph of it.
Speed is that of one thread in CPU seconds, our prepared network and the library's own module measured in
turn. Rows of a measure that is not run stay. Weights are random, since neither depends on them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from rcnn_svm.errors import ConfigError
from rcnn_svm.files import read_json, write_json
from rcnn_svm.networks.backbone import Backbone, load_backbone
from rcnn_svm.progress import say
from rcnn_svm.report.provenance import provenance

GEOMETRY = (
    "timm:resnet18",
    "timm:resnext50_32x4d",
    "timm:wide_resnet50_2",
    "timm:seresnet50",
    "timm:res2net50_26w_4s",
    "timm:resnetv2_50",
    "timm:densenet121",
    "torchvision:vgg11",
    "torchvision:alexnet",
    "torchvision:squeezenet1_1",
    "torchvision:googlenet",
    "torchvision:inception_v3",
    "torchvision:shufflenet_v2_x0_5",
    "timm:mobilenetv1_100",
    "timm:mobilenetv2_050",
    "timm:mobilenetv3_small_100",
    "timm:mobilenetv4_conv_small",
    "timm:mnasnet_050",
    "timm:efficientnet_b0",
    "timm:efficientnet_lite0",
    "timm:tf_efficientnet_b0",
    "timm:tf_efficientnetv2_b0",
    "timm:regnety_002",
    "timm:convnext_atto",
    "timm:convnextv2_atto",
    "timm:hgnetv2_b0",
    "timm:repvgg_a0",
    "timm:repvit_m0_9",
    "timm:mobileone_s0",
    "timm:fastvit_t8",
    "timm:ghostnet_100",
    "timm:efficientvit_b0",
    "timm:vovnet39a",
    "timm:cspdarknet53",
    "timm:gernet_s",
    "timm:lcnet_050",
    "timm:mixnet_s",
    "timm:starnet_s1",
    "timm:edgenext_xx_small",
    "timm:poolformer_s12",
    "timm:mambaout_femto",
    "timm:focalnet_tiny_srf",
    "timm:vit_tiny_patch16_224",
    "timm:vit_small_patch14_dinov2",
    "timm:swin_tiny_patch4_window7_224",
    "timm:resnet50d",
    "timm:resnest14d",
    "timm:dla34",
    "timm:hrnet_w18_small",
    "timm:maxvit_pico_rw_256",
)
SPEED = (
    "timm:resnet18",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_large_100",
    "timm:mobilenetv4_conv_small",
    "timm:efficientnet_b0",
    "timm:efficientnet_lite0",
    "timm:regnety_008",
    "timm:convnext_atto",
    "timm:hgnetv2_b0",
    "timm:repvgg_a0",
    "timm:ghostnet_100",
    "timm:vit_tiny_patch16_224",
)
ODD_AND_EVEN = (416, 449)
"""Height and width of the image for networks whose padding depends on them."""
TOLERANCE = 0.05
"""Cells that a centre may be off."""


PASSED_ON = set(
    "relu relu6 hardtanh silu gelu hardswish leaky_relu mish tanh batch_norm layer_norm group_norm rms_norm "  # noqa: SIM905
    "local_response_norm dropout clamp normalize".split()
)
"""What a network that counts paths leaves out."""


class CountingPaths(TorchFunctionMode):
    """Makes a network of equal weights count paths: no activation, normalisation, gate or attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "").rstrip("_"), kwargs or {}
        if name in {"sigmoid", "hardsigmoid"}:
            return torch.ones_like(args[0])
        if name in {"softmax", "scaled_dot_product_attention"}:
            return torch.zeros_like(args[0])
        if name in PASSED_ON:
            return args[0]
        if "max_pool2d" in name or name == "boolean_dispatch":
            return _mean_pool(*args, **kwargs)
        return func(*args, **kwargs)


def _mean_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    **_: Any,
) -> Tensor:
    return functional.avg_pool2d(input, kernel_size, stride, padding, ceil_mode)


def equalise(net: nn.Module) -> None:
    """Give every weight of a network the same value, so that a layer is a mean."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                parameter.fill_(1 / parameter[0].numel())
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def measured_centres(
    backbone: Backbone, layers: Sequence[str], size: tuple[int, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the centre of the inmost cell of maps by its gradient, and by the backbone, both (2,) as x, y.

    Args:
        backbone: of a library; its weights are overwritten.
        layers: map layers.
        size: height and width of the image.
    """
    traced = backbone.architecture.traced
    assert traced is not None
    net = backbone.net.eval()
    equalise(net)
    outputs: dict[str, Tensor] = {}
    handles = []
    for layer in layers:
        module = net.get_submodule(traced.plan.paths[layer][-1])
        handles.append(
            module.register_forward_hook(lambda _m, _x, y, layer=layer: outputs.update({layer: y}))
        )
    x = torch.zeros(1, 3, *size, requires_grad=True)
    with CountingPaths():
        net(x)
    for handle in handles:
        handle.remove()
    geometry, found = backbone.layers_on(size), {}
    for layer in layers:
        info, value = geometry[layer], outputs[layer]
        (x0, y0), (height, width) = info.origin, size
        column, row = round((width / 2 - x0) / info.stride), round((height / 2 - y0) / info.stride)
        if value.ndim == 3:
            columns = -(-width // info.stride)
            cell = value[0, (info.n_prefix or 0) + row * columns + column]
        else:
            cell = value[0, row, column] if layer in traced.plan.last else value[0, :, row, column]
        (gradient,) = torch.autograd.grad(cell.sum(), x, retain_graph=True)
        weight = gradient.abs().sum(dim=(0, 1)).double().numpy()
        at = np.arange(max(size)) + 0.5
        centre = [weight.sum(axis) @ at[: weight.shape[1 - axis]] / weight.sum() for axis in (0, 1)]
        stated = np.array(info.origin) + np.array([column, row]) * info.stride
        found[layer] = (np.array(centre), stated)
    return found


def size_for(backbone: Backbone) -> tuple[int, int]:
    """Return (height, width) of an image with a cell of the deepest map in its middle."""
    info = backbone.layers[backbone.entry]
    side = round(2 * (4 * info.stride + info.origin[0]))
    return side, side + 2 * info.stride


def prove(name: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Compare the geometry of a network's last maps of stride 8, 16 and 32 with gradients."""
    backbone = load_backbone(name, "random")
    if size is None:
        size = ODD_AND_EVEN if name.startswith("timm:tf_") else size_for(backbone)
    named = {
        alias: backbone.aliases[alias] for alias in ("s8", "s14", "s16", "s32") if alias in backbone.aliases
    }
    geometry = backbone.layers_on(size)
    refused = {alias: geometry[layer].problem for alias, layer in named.items() if geometry[layer].problem}
    offered = [layer for alias, layer in named.items() if alias not in refused]
    measured = measured_centres(backbone, offered, size) if offered else {}
    off = {
        alias: float(np.abs(np.subtract(*measured[layer])).max() / geometry[layer].stride)
        for alias, layer in named.items()
        if layer in measured
    }
    return {
        "name": name,
        "size": list(size),
        "proved": [alias for alias, cells in off.items() if cells <= TOLERANCE],
        "cells_off": {alias: round(cells, 4) for alias, cells in off.items()},
        "refused": refused,
    }


def in_turn(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Return CPU seconds of both, their least, and the median ratio of pairs measured in turn."""
    pairs = []
    for i in range(rounds + 1):
        seconds = []
        for work in (ours, theirs) if i % 2 else (theirs, ours):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        own, other = seconds if i % 2 else seconds[::-1]
        pairs.append((own, other))
    pairs = pairs[1:]  # the first warms up
    return min(a for a, _ in pairs), min(b for _, b in pairs), statistics.median(b / a for a, b in pairs)


def race(name: str, rounds: int) -> dict[str, Any]:
    """Time a prepared network up to its last map against the library's own on the same image."""
    backbone = load_backbone(name, "random")
    side = backbone.crop_size
    image = torch.randn(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    prepared, net = backbone.for_inference(), backbone.net.eval()

    @torch.inference_mode()
    def ours() -> object:
        return prepared(image, ("logits",))

    @torch.inference_mode()
    def theirs() -> object:
        return net(image)

    own, other, ratio = in_turn(ours, theirs, rounds)
    say(f"{name}: {own * 1e3:.1f} ms, the library's own {other * 1e3:.1f} ms, ratio {ratio:.2f}")
    return {
        "name": name,
        "pixels": side,
        "ms": own * 1e3,
        "library_ms": other * 1e3,
        "ratio": round(ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("geometry", "speed"))
    parser.add_argument("--families", help="networks, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/networks.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = options.families.split(",") if options.families else None
    about = provenance(seed=0)
    geometry: list[dict[str, Any]] = kept(options.out, "geometry") if options.only == "speed" else []
    for name in _names(chosen, GEOMETRY) if options.only != "speed" else ():
        try:
            row = prove(name)
        except ConfigError as error:
            row = {"name": name, "proved": [], "cells_off": {}, "refused": {"all": str(error)}}
        say(f"{name}: cells off {row['cells_off']}, refused {row['refused']}")
        geometry.append(row | {key: about[key] for key in ("commit", "command")})
    speed: list[dict[str, Any]] = kept(options.out, "speed") if options.only == "geometry" else []
    for name in _names(chosen, SPEED) if options.only != "geometry" else ():
        speed.append(race(name, options.rounds) | {key: about[key] for key in ("commit", "command")})
    proved = [row for row in geometry if row["proved"] and len(row["proved"]) == len(row["cells_off"])]
    targets = {
        "families_proved": {
            "value": len(proved),
            "unit": "families",
            "n": len(geometry),
            "ours": len(proved),
            "peer": None,
            "peer_name": "",
            "how": f"every map that is offered lies within {TOLERANCE} cells of the centroid of its gradient",
        },
    }
    if speed:
        slowest = min(speed, key=lambda row: row["ratio"])
        targets["slowest_ratio_to_timm"] = {
            "value": slowest["ratio"],
            "unit": "ratio",
            "n": options.rounds,
            "ours": slowest["ms"],
            "peer": slowest["library_ms"],
            "peer_name": slowest["name"],
            "how": "the library's own time over ours, median of pairs in turn, the slowest family",
        }
    result = {
        "schema": 1,
        "benchmark": "networks",
        "targets": targets,
        "rows": [{"measure": "geometry", **row} for row in geometry]
        + [{"measure": "speed", **row} for row in speed],
        "provenance": about,
    }
    write_json(options.out, result)
    say(f"Written to {options.out}.")


def kept(out: Path, measure: str) -> list[dict[str, Any]]:
    """Return the rows of a measure that is not run now, each with the run that it is of."""
    before = read_json(out)
    about = {key: before["provenance"][key] for key in ("commit", "command")}
    rows = [about | row for row in before["rows"] if row["measure"] == measure]
    return [{key: value for key, value in row.items() if key != "measure"} for row in rows]


def _names(chosen: Sequence[str] | None, all_names: Sequence[str]) -> Sequence[str]:
    return all_names if chosen is None else [name for name in all_names if name in chosen]


if __name__ == "__main__":
    main()
