from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rcnn_svm.networks import products


@pytest.fixture(params=[True, False])
def _fast(request, monkeypatch):
    """With oneDNN, where there is one, and with torch's own product."""
    if request.param and not products.has_onednn("_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(products, "_FAST", request.param)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("n_rows", [0, 1, 37])
def test_value_and_gradients(n_rows):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 10)
    x = torch.randn(n_rows, 24, generator=generator, requires_grad=True)
    weight = torch.randn(n_rows, 10, generator=generator)

    def gradients(y):
        return torch.autograd.grad((y * weight).sum(), (x, layer.weight, layer.bias))

    ours, torchs = products.linear(x, layer), functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(ours, torchs)
    for a, b in zip(gradients(ours), gradients(torchs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize("relu", [True, False])
def test_layers_and_arrays(rng, relu):
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((9, 6), (5, 6), (5,)))
    layer = nn.Linear(6, 5)
    layer.weight.data, layer.bias.data = torch.from_numpy(w), torch.from_numpy(b)
    expected = x @ w.T + b
    fused = products.FusedLinear(layer, relu=relu)
    assert fused(torch.zeros(0, 6)).shape == (0, 5)
    got = copy.deepcopy(fused)(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, fused(torch.from_numpy(x)).numpy())
    np.testing.assert_allclose(got, np.maximum(expected, 0) if relu else expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(products.linear_relu(x, w, b), np.maximum(expected, 0), rtol=1e-4, atol=1e-5)
    x.setflags(write=False)
    strided = np.asfortranarray(x)
    np.testing.assert_allclose(products.linear_relu(strided, w, b), products.linear_relu(x, w, b), rtol=1e-6)
