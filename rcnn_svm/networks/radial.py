"""An output layer of radial basis functions, to be trained with the network below it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["RadialBasis"]

_SHARPNESS = 4.0
"""Squared length of a usual row, in units of the first width: logits start a few units apart."""


class RadialBasis(nn.Module):
    """Gaussians of one width around learned centres, some for each class, in place of a linear layer.

    A logit is `log sum_j exp(b_jk - g |x - c_jk|^2)`, so that a softmax of it shares an input out among all
    Gaussians, however far they are. A linear layer on the Gaussians themselves has no gradient far from all
    centres, where dropout takes nearly every input. Centres, b and the logarithm of g are learned. With one
    centre a class this would be a linear layer, since `|x|^2` cancels out.

    Args:
        n_inputs: D.
        n_centres: J, of each class.
        n_outputs: K.

    References:
        Moody and Darken, Fast learning in networks of locally-tuned processing units, 1989 (normalised
        responses); LeCun et al., Gradient-based learning applied to document recognition, 1998 (the output
        layer of LeNet-5, with one fixed centre a class).
    """

    scale: Tensor

    def __init__(self, n_inputs: int, n_centres: int, n_outputs: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(n_centres, n_outputs, n_inputs))
        self.bias = nn.Parameter(torch.zeros(n_centres, n_outputs))
        self.log_gamma = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))
        self.register_buffer("scale", torch.tensor(1.0))

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Put the centres on rows, and measure inputs and centres by the length of these from now on.

        Args:
            rows: (J * K, D), in turn one of each class; not all zero.
        """
        self.scale.copy_(rows.square().sum(1).mean().sqrt())
        self.centres.copy_((rows / self.scale).view_as(self.centres))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, K) logits of (B, D) rows."""
        x, centres = x / self.scale, self.centres.flatten(0, 1)
        squared = x.square().sum(1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(1)
        squared = squared.clamp(min=0).view(len(x), *self.bias.shape)
        return torch.logsumexp(self.bias - self.log_gamma.exp() * squared, dim=1)
