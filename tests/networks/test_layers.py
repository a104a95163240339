from __future__ import annotations

import pytest

from rcnn_svm.errors import ConfigError
from rcnn_svm.networks.backbone import BACKBONES
from rcnn_svm.networks.layers import layer_table


def test_vgg16():
    rows = {row.name: row for row in layer_table("vgg16")}
    assert rows["fc6"].matrix == (25088, 4096)
    assert rows["fc6"].n_weights == 25088 * 4096 + 4096
    assert rows["fc6"].weights_mb == pytest.approx(411.06, abs=0.01)
    assert rows["pool5"].shape == (512, 7, 7)
    assert rows["fc7"].shape == (4096,)
    assert rows["conv1_1"].gflop == pytest.approx(2 * 224 * 224 * 64 * 27 / 1e9)
    assert sum(row.n_weights for row in rows.values()) == 138_357_544  # torchvision's documented count


def test_alexnet_to_fc7_is_1_43_gflop():
    rows = layer_table("alexnet")
    assert sum(row.gflop for row in rows[:-1]) == pytest.approx(1.43, abs=0.01)
    assert sum(row.n_weights for row in rows) == 61_100_840


@pytest.mark.parametrize("name", [n for n in BACKBONES if n not in ("vgg16", "alexnet")])
def test_every_backbone(name):
    rows = layer_table(name)
    assert rows[-1].name == "logits"
    assert rows[-1].shape == (1000,)
    assert rows[-1].matrix is not None
    assert all(row.output_kb > 0 for row in rows)


def test_unknown():
    with pytest.raises(ConfigError, match="Backbone: name must be one of alexnet, "):
        layer_table("lenet")
