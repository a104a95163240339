"""A network of our own, small enough to be trained from scratch on two cores in about a minute."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal, get_args

from torch import Tensor, nn

from rcnn_svm.errors import ConfigError

__all__ = ["Activation", "Normalisation", "Pooling", "SmallCNN"]

Pooling = Literal["max", "average", "strided"]
Activation = Literal["prelu", "relu", "none"]
Normalisation = Literal["none", "local", "batch"]


class SmallCNN(nn.Module):
    """Three convolutions with pooling and then PReLU, fc6, fc7 and the logits of a softmax.

    PReLU comes after the pooling, where it has a quarter of the work to do. As long as its slopes are not
    negative, the maximum is the same in either order.

    Args:
        n_outputs: logits, the background included.
        pooling: `max`, `average`, or `strided`: none, convolutions take steps of two.
        dropout: share of inputs of fc6 and of fc7 that is dropped while training.
        activation: after the pooling; fc6 and fc7 have ReLU, or none either where this is `none`.
        normalisation: `none`; `local`, over neighbouring channels after the activation, with the constants
            of AlexNet; `batch`, after the convolution.
        width: outputs of fc6 and of fc7; None: neither layer, the logits read the mean over the last map.

    Input is (B, 3, S, S) with S = 40; 32 to 48 work as well, since the last map is brought to 5 x 5 cells.
    """

    def __init__(
        self,
        n_outputs: int = 11,
        pooling: Pooling = "max",
        dropout: float = 0.5,
        *,
        activation: Activation = "prelu",
        normalisation: Normalisation = "none",
        width: int | None = 256,
    ) -> None:
        super().__init__()
        _require("pooling", pooling, Pooling)
        _require("activation", activation, Activation)
        _require("normalisation", normalisation, Normalisation)
        stride = 2 if pooling == "strided" else 1
        after_fc = nn.Identity if activation == "none" else nn.ReLU

        def pool(channels: int) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.BatchNorm2d(channels)] if normalisation == "batch" else []
            layers.append({"max": nn.MaxPool2d, "average": nn.AvgPool2d, "strided": nn.Identity}[pooling](2))
            layers.append(nn.PReLU(channels) if activation == "prelu" else after_fc())
            return [*layers, nn.LocalResponseNorm(5)] if normalisation == "local" else layers

        def fc(n_inputs: int, n_fc: int) -> list[nn.Module]:
            return [nn.Dropout(dropout), nn.Linear(n_inputs, n_fc), after_fc()]

        self.conv1 = nn.Conv2d(3, 16, 5, stride, padding=2)
        self.pool1 = nn.Sequential(*pool(16))
        self.conv2 = nn.Conv2d(16, 48, 3, stride, padding=1)
        self.pool2 = nn.Sequential(*pool(48))
        self.conv3 = nn.Conv2d(48, 96, 3, stride, padding=1)
        cells = 5 if width is not None else 1
        self.pool3 = nn.Sequential(*pool(96), nn.AdaptiveAvgPool2d(cells))
        if width is None:
            self.fc6, self.fc7 = nn.Sequential(nn.Flatten()), nn.Sequential()
        else:
            self.fc6 = nn.Sequential(nn.Flatten(), *fc(96 * cells**2, width))
            self.fc7 = nn.Sequential(*fc(width, width))
        self.logits = nn.Linear(width or 96, n_outputs)
        # Without an activation nothing is cut off, and the weights need no gain for it.
        gain: Literal["linear", "relu"] = "linear" if activation == "none" else "relu"
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity=gain)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.logits.weight, std=0.01)

    def stages(self) -> OrderedDict[str, nn.Module]:
        """Return the layers in order, by name."""
        return OrderedDict(self.named_children())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, n_outputs) logits."""
        for stage in self.children():
            x = stage(x)
        return x


def _require(name: str, value: str, kind: Any) -> None:
    if value not in get_args(kind):
        *others, last = map(repr, get_args(kind))
        raise ConfigError(f"SmallCNN: {name} must be {', '.join(others)} or {last}, got {value!r}.")
