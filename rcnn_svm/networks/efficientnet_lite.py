"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6, made for CPUs.

The modules are plain chains, so that folding, fusing and splitting find every layer, and their parameters
have the names of the published PyTorch files. The networks were trained in TensorFlow, whose 'same' padding
depends on the size of the map: `SameConv2d` pads as it did, so that every number is what the weights expect.

References:
    Tan and Le, EfficientNet, arXiv 1905.11946; tensorflow/tpu, models/official/efficientnet/lite.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "LITE",
    "EfficientNetLite",
    "InvertedBottleneck",
    "SameConv2d",
    "same_padding",
    "same_pads",
    "stage_ends",
]


class _Scale(NamedTuple):
    """What tells the networks of the family apart: factors, pixels of a crop's side, share dropped."""

    width: float
    depth: float
    crop_size: int
    dropout: float


LITE = {
    "efficientnet_lite0": _Scale(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": _Scale(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": _Scale(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": _Scale(1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": _Scale(1.4, 1.8, 300, 0.3),
}
"""The family by name."""

# (blocks, kernel, stride, expansion, output channels) of each stage before scaling.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280  # not scaled in the Lite variants
_EPS = 1e-3


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros before and after an axis of `size` cells under TensorFlow's 'same' padding.

    The result has ceil(size / stride) cells. Where the number of zeros is odd the greater half comes last, so
    that for stride 2 an even axis is sampled half a stride later than an odd one.

    Example:
        >>> same_padding(260, 3, 2), same_padding(65, 3, 2)
        ((0, 1), (1, 1))
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_pads(x: Tensor, kernel: int, stride: int) -> tuple[int, int, int, int]:
    """Return the zeros left, right, above and below of a (B, C, H, W) map, see `same_padding`."""
    return same_padding(x.shape[3], kernel, stride) + same_padding(x.shape[2], kernel, stride)


class SameConv2d(nn.Conv2d):
    """A square convolution without bias that pads like TensorFlow's 'same'.

    Args:
        n_in: channels that it reads.
        n_out: channels that it makes.
        kernel: side.
        stride: of both axes.
        groups: as in torch.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(n_in, n_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the (B, n_out, ceil(H / stride), ceil(W / stride)) map."""
        left, right, above, below = same_pads(x, self.kernel_size[0], self.stride[0])
        if left == right and above == below:
            return functional.conv2d(
                x, self.weight, self.bias, self.stride, (above, left), self.dilation, self.groups
            )
        padded = functional.pad(x, (left, right, above, below))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class InvertedBottleneck(nn.Sequential):
    """Widening by 1 x 1, a convolution channel by channel, narrowing by 1 x 1; a shortcut where shapes agree.

    Args:
        n_in: channels that it reads.
        n_out: channels that it makes.
        kernel: of the middle convolution.
        stride: of the middle convolution.
        expansion: factor of widening; 1 leaves it out.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> None:
        hidden = n_in * expansion
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if expansion != 1:
            parts["_expand_conv"] = SameConv2d(n_in, hidden, 1)
            parts["_bn0"] = nn.BatchNorm2d(hidden, eps=_EPS)
            parts["_expand_act"] = nn.ReLU6()
        parts["_depthwise_conv"] = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        parts["_bn1"] = nn.BatchNorm2d(hidden, eps=_EPS)
        parts["_depthwise_act"] = nn.ReLU6()
        parts["_project_conv"] = SameConv2d(hidden, n_out, 1)
        parts["_bn2"] = nn.BatchNorm2d(n_out, eps=_EPS)
        super().__init__(parts)
        self.stride, self.kernel, self.n_hidden = stride, kernel, hidden
        self._shortcut = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """Return the (B, n_out, ceil(H / stride), ceil(W / stride)) map."""
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return y + x if self._shortcut else y


class EfficientNetLite(nn.Sequential):
    """One network of the family.

    Args:
        name: a key of `LITE`.
        n_outputs: length of the logits.
    """

    def __init__(self, name: str, n_outputs: int) -> None:
        blocks: list[nn.Module] = []
        n_in = _STEM
        for n_blocks, (_, kernel, stride, expansion, channels) in zip(_n_blocks(name), _STAGES, strict=True):
            n_out = _rounded(channels * LITE[name].width)
            for i in range(n_blocks):
                blocks.append(InvertedBottleneck(n_in, n_out, kernel, 1 if i else stride, expansion))
                n_in = n_out
        super().__init__(
            OrderedDict(
                _conv_stem=SameConv2d(3, _STEM, 3, 2),
                _bn0=nn.BatchNorm2d(_STEM, eps=_EPS),
                _stem_act=nn.ReLU6(),
                _blocks=nn.Sequential(*blocks),
                _conv_head=SameConv2d(n_in, _HEAD, 1),
                _bn1=nn.BatchNorm2d(_HEAD, eps=_EPS),
                _head_act=nn.ReLU6(),
                _avg_pooling=nn.AdaptiveAvgPool2d(1),
                _flatten=nn.Flatten(),
                _dropout=nn.Dropout(LITE[name].dropout),
                _fc=nn.Linear(_HEAD, n_outputs),
            )
        )


def _n_blocks(name: str) -> list[int]:
    """Return the number of blocks of each stage; the first and the last are never made deeper."""
    deeper = [math.ceil(n * LITE[name].depth) for n, *_ in _STAGES]
    return [_STAGES[0][0], *deeper[1:-1], _STAGES[-1][0]]


def stage_ends(name: str) -> tuple[int, ...]:
    """Return how many blocks there are up to the end of each of the seven stages."""
    return tuple(itertools.accumulate(_n_blocks(name)))


def _rounded(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of 8, never down by more than a tenth."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
