"""A network of our own, small enough to be trained from scratch on two cores in about a minute."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, get_args

from torch import Tensor, nn

from rcnn_svm.errors import ConfigError

__all__ = ["Pooling", "SmallCNN"]

Pooling = Literal["max", "average"]


class SmallCNN(nn.Module):
    """Three convolutions with pooling and then PReLU, fc6, fc7 and the logits of a softmax.

    PReLU comes after the pooling, where it has a quarter of the work to do. As long as its slopes are not
    negative, the maximum is the same in either order.

    Args:
        n_outputs: logits, the background included.
        pooling: `max` or `average`.
        dropout: share of inputs of fc6 and of fc7 that is dropped while training.

    Input is (B, 3, S, S) with S = 40; 32 to 48 work as well, since the last map is brought to 5 x 5 cells.
    """

    def __init__(self, n_outputs: int = 11, pooling: Pooling = "max", dropout: float = 0.5) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"SmallCNN: pooling must be 'max' or 'average', got {pooling!r}.")

        def pool(channels: int) -> tuple[nn.Module, nn.Module]:
            return nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2), nn.PReLU(channels)

        self.conv1 = nn.Conv2d(3, 16, 5, padding=2)
        self.pool1 = nn.Sequential(*pool(16))
        self.conv2 = nn.Conv2d(16, 48, 3, padding=1)
        self.pool2 = nn.Sequential(*pool(48))
        self.conv3 = nn.Conv2d(48, 96, 3, padding=1)
        self.pool3 = nn.Sequential(*pool(96), nn.AdaptiveAvgPool2d(5))
        self.fc6 = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(96 * 25, 256), nn.ReLU())
        self.fc7 = nn.Sequential(nn.Dropout(dropout), nn.Linear(256, 256), nn.ReLU())
        self.logits = nn.Linear(256, n_outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
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
