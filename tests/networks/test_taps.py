from __future__ import annotations

import pytest

from rcnn_svm.errors import ConfigError
from rcnn_svm.networks.taps import TapSpec, format_taps, parse_taps


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("fc7", TapSpec("fc7")),
        ("block13@3x3", TapSpec("block13", (3, 3))),
        (" block17@1x2*1.8 ", TapSpec("block17", (1, 2), 1.8)),
        ("conv5*2", TapSpec("conv5", None, 2.0)),
        ("block17@1x1*image", TapSpec("block17", (1, 1), float("inf"))),
    ],
)
def test_parse_and_write_back(text, tap):
    assert TapSpec.parse(text) == tap
    assert str(tap) == text.strip()


def test_several():
    text = "block13@3x3,block17@1x1*1.8,logits"
    assert format_taps(parse_taps(text)) == text


@pytest.mark.parametrize("text", ["", "fc7@", "fc7@3", "a@3x3x3", "block*", "3x3", "a b"])
def test_what_is_no_tap(text):
    with pytest.raises(ConfigError) as caught:
        TapSpec.parse(text)
    assert str(caught.value) == (
        f"Tap {text!r} must read LAYER, LAYER@ROWSxCOLUMNS or LAYER@ROWSxCOLUMNS*FACTOR, "
        f"for example fc7, block13@3x3 or block17@1x1*1.8."
    )


def test_values_out_of_range():
    with pytest.raises(ConfigError, match="a grid must have at least one cell"):
        TapSpec.parse("conv5@0x3")
    with pytest.raises(ConfigError, match="widened by a positive factor"):
        TapSpec.parse("conv5*0")
    with pytest.raises(ConfigError, match=r"fc7 is named twice. Leave one out."):
        parse_taps("fc7,fc6,fc7")
