from __future__ import annotations

import torch

from rcnn_svm.networks.radial import RadialBasis


def placed(n_centres: int) -> tuple[RadialBasis, torch.Tensor]:
    torch.manual_seed(0)
    layer, rows = RadialBasis(8, n_centres, 4), torch.randn(4 * n_centres, 8)
    layer.place(rows)
    return layer, rows


def test_logits_are_the_logarithm_of_a_sum_of_gaussians() -> None:
    layer, rows = placed(3)
    x = torch.randn(5, 8)
    gamma = layer.log_gamma.exp() / rows.square().sum(1).mean()
    gaussians = torch.exp(-gamma * torch.cdist(x, rows).square())
    assert torch.allclose(layer(x), gaussians.view(5, 3, 4).sum(1).log(), atol=1e-5)
    assert torch.equal(layer(rows).argmax(1), torch.arange(12) % 4)  # each row is nearest to itself


def test_one_centre_a_class_is_a_linear_layer() -> None:
    layer, _ = placed(1)
    x, y = torch.randn(2, 5, 8)

    def gaps(rows: torch.Tensor) -> torch.Tensor:
        return layer(rows) - layer(rows)[:, :1]

    assert torch.allclose(gaps((x + y) / 2), (gaps(x) + gaps(y)) / 2, atol=1e-5)


def test_far_from_all_centres_there_is_still_a_gradient() -> None:
    layer, rows = placed(3)
    loss = torch.nn.functional.cross_entropy(layer(1000 * rows), (torch.arange(12) + 1) % 4)
    loss.backward()
    assert layer.centres.grad is not None
    assert layer.centres.grad.abs().max() > 0.1
