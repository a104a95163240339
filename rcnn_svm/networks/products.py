"""Matrix products of float32 on the CPU, by whichever library does them best.

torch hands matrix products to MKL, which leaves half of the speed of some processors unused (an AMD EPYC
with AVX-512: 95 GFLOP/s a core, against 205 by oneDNN, which torch brings as well and uses for
convolutions). Where torch was built with oneDNN it is asked directly; elsewhere torch's own product serves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FusedLinear", "has_onednn", "linear", "linear_relu"]


def has_onednn(operator: str) -> bool:
    """Whether torch was built with oneDNN and offers this operator of it."""
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, operator)  # type: ignore[no-untyped-call]


_FAST = has_onednn("_linear_pointwise") and has_onednn("_reorder_linear_weight")
_TYPICAL_ROWS = 512
"""Rows of a product that a matrix is packed for; others take it as well."""


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """X @ weight.T + bias, with `relu` applied where asked for; no gradients."""
    y: Tensor
    if _FAST and x.device.type == "cpu" and x.numel() and weight.numel():
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
        return y
    y = functional.linear(x, weight, bias)
    return y.relu_() if activation == "relu" else y


class _Linear(torch.autograd.Function):
    """The product with its gradients, each of which is such a product again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_x = _product(gradient, weight.T.contiguous(), None) if ctx.needs_input_grad[0] else None
        to_weight = _product(gradient.T.contiguous(), x.T.contiguous(), None)
        return to_x, to_weight, gradient.sum(dim=0)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return (B, outputs): a layer with a bias applied to float32 (B, inputs), with gradients."""
    y: Tensor = _Linear.apply(x, layer.weight, layer.bias)
    return y


@torch.inference_mode()
def linear_relu(
    x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return (R, outputs) max(0, x @ weight.T + bias) of float32 arrays; `weight` is (outputs, inputs)."""
    rows, matrix, shift = (torch.from_numpy(np.require(a, np.float32, ["C", "W"])) for a in (x, weight, bias))
    return np.asarray(_product(rows, matrix, shift, "relu").numpy())


class FusedLinear(nn.Module):
    """A fully connected layer and its ReLU, for evaluation on CPUs.

    The matrix is kept in the blocks that oneDNN's product reads. Otherwise every call brings it into them
    anew: for AlexNet's fc6, 150 MB, that takes a fifth of the product with a batch of 32 crops.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, *, relu: bool) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self._activation = "relu" if relu else "none"
        self._n_outputs = weight.shape[0]
        # No buffer: the blocks are oneDNN's own and cannot be moved or cast.
        self._weight: Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS) if _FAST else weight
        )

    def __getstate__(self) -> dict[str, Any]:
        # Blocks cannot be copied or pickled; the matrix can.
        return {**self.__dict__, "_weight": self._weight.to_dense() if _FAST else self._weight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if _FAST:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, _TYPICAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs) of (B, inputs)."""
        if not len(x):  # oneDNN takes no empty product
            return x.new_empty(0, self._n_outputs)
        return _product(x, self._weight, self.bias, self._activation)
