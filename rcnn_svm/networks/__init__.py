"""Networks with named layers, their weights, and what makes them quick on a CPU.

torch is loaded by whatever needs it, so that `taps` can be read without it.
"""

from __future__ import annotations

__all__ = ["trained_to_detect"]


def trained_to_detect(name: str) -> bool:
    """Whether a name is that of a network of `rcnn_svm.networks.detection`."""
    return name.startswith("torchvision:fasterrcnn_")
