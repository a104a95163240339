from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcnn_svm.config import (
    Count,
    Interval,
    Positive,
    Share,
    Values,
    check,
    choices,
    from_dict,
    to_dict,
    with_overrides,
)
from rcnn_svm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Inner:
    size: int = 3
    mode: Literal["fast", "quality"] = "fast"
    limit: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    costs: tuple[float, ...] = (0.1, 1.0)
    name: str = "x"


@dataclass(frozen=True)
class Checked:
    mode: Literal["fast", "quality"] = "fast"
    modes: Annotated[tuple[Literal["a", "b"], ...], Values(least=1, distinct=True)] = ("a",)
    share: Share = 0.5
    width: Count | None = None
    costs: Annotated[tuple[Positive, ...], Values(least=1)] = (1.0,)
    path: str = ""
    inner: Inner = field(default_factory=Inner)
    flag: bool = False
    free: float = -math.inf

    def __post_init__(self) -> None:
        check(self, where="stage")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "qualty"}, "mode must be one of 'fast', 'quality', got 'qualty'. Did you mean 'quality'?"),
        ({"modes": ("a", "c")}, "modes must be one of 'a', 'b', got 'c'."),
        ({"modes": ()}, "modes must hold at least one value, got none."),
        ({"modes": ("a", "b", "a")}, "modes must hold no value twice, got a, b, a."),
        ({"modes": "a"}, "modes must be a list of one of 'a', 'b', got 'a'."),
        ({"share": 1.5}, "share must lie in [0, 1], got 1.5."),
        ({"share": math.nan}, "share must be float, got nan."),
        ({"share": True}, "share must be float, got True."),
        ({"width": 0}, "width must be at least 1, got 0."),
        ({"width": 2.0}, "width must be int or none, got 2.0."),
        ({"costs": (1.0, 0.0)}, "costs must be positive, got 0.0."),
        ({"costs": (math.inf,)}, "costs must be a finite number, got inf."),
        ({"costs": 1.0}, "costs must be a list of float, got 1.0."),
        ({"path": 3}, "path must be str, got 3."),
        ({"flag": 1}, "flag must be bool, got 1."),
        ({"free": math.nan}, "free must be float, got nan."),
        ({"inner": 3}, "inner must be a table of keys, got 3."),
        ({"inner": Outer()}, "inner must be a table of keys, got Outer(...)."),
    ],
)
def test_what_a_field_cannot_hold_is_refused_on_construction(values: dict[str, Any], message: str) -> None:
    for make in (lambda: Checked(**values), lambda: replace(Checked(), **values)):
        with pytest.raises(ConfigError) as caught:
            make()
        assert str(caught.value) == f"stage.{message}"
    with pytest.raises(ConfigError) as caught:
        from_dict(Checked, values, where="c.toml")
    assert str(caught.value) == f"c.toml: {message}"


def test_python_may_give_what_means_the_same() -> None:
    config = Checked(
        modes=["b"],  # type: ignore[arg-type]
        share=1,
        width=np.int64(7),  # type: ignore[arg-type]
        costs=[2, np.float32(0.5)],  # type: ignore[arg-type]
        path=Path("a") / "b",  # type: ignore[arg-type]
    )
    assert config == Checked(modes=("b",), share=1.0, width=7, costs=(2.0, 0.5), path=str(Path("a", "b")))
    assert [type(value) for value in (config.share, config.width, *config.costs)] == [
        float,
        int,
        float,
        float,
    ]
    assert from_dict(Checked, to_dict(config)) == config


@given(
    st.floats(-10, 10),
    st.floats(-10, 10),
    st.sampled_from(["both", "left", "right", "neither"]),
    st.floats(-20, 20),
)
def test_an_interval_holds_what_lies_in_it(low: float, high: float, closed: Any, value: float) -> None:
    interval = Interval(low, high, closed)
    inside = low < value < high
    inside |= (
        low <= high and value == low and closed in ("both", "left") and (value < high or closed == "both")
    )
    inside |= (
        low <= high and value == high and closed in ("both", "right") and (value > low or closed == "both")
    )
    assert (interval.broken_by(value) is None) == inside


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(0, 1), "lie in [0, 1]"),
        (Interval(0, 0.5, "neither"), "lie in (0, 0.5)"),
        (Interval(0, 1, "left"), "lie in [0, 1)"),
        (Interval(0, 1, "right"), "lie in (0, 1]"),
        (Interval(2), "be at least 2"),
        (Interval(2, closed="neither"), "be more than 2"),
        (Interval(0), "not be negative"),
        (Interval(0, closed="neither"), "be positive"),
        (Interval(high=3), "be at most 3"),
        (Interval(high=3, closed="neither"), "be less than 3"),
    ],
)
def test_an_interval_says_what_it_wants(interval: Interval, words: str) -> None:
    assert interval.broken_by(-100.0 if interval.low > -100 else 100.0) == words
    assert interval.broken_by(math.inf) == "be a finite number"


def test_choices_are_the_names_of_a_field() -> None:
    assert choices(Checked, "mode") == ("fast", "quality")
    assert choices(Checked, "modes") == ("a", "b")


def test_round_trip() -> None:
    config = Outer(Inner(4, "quality", 0.5), (1.0,), "y")
    assert from_dict(Outer, to_dict(config)) == config


def test_file_then_assignments(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('name = "file"\n[inner]\nsize = 7\n')
    config = with_overrides(Outer(), file, ["inner.limit=0.25", "inner.mode=quality", "costs=[2, 3]"])
    assert config == Outer(Inner(7, "quality", 0.25), (2.0, 3.0), "file")


@pytest.mark.parametrize(("text", "value"), [(".25", 0.25), ("+.5", 0.5), (" .125 ", 0.125)])
def test_a_fraction_needs_no_zero_before_its_point(text: str, value: float) -> None:
    assert with_overrides(Outer(), None, [f"inner.limit={text}"]).inner.limit == value


def test_none_can_be_set() -> None:
    assert with_overrides(Outer(Inner(limit=1.0)), None, ["inner.limit=none"]).inner.limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.siez=3", r"--set: inner: unknown key 'siez'\. Did you mean 'size'\?"),
        ("zzz=3", r"--set: unknown key 'zzz'\. Known keys: inner, costs, name\."),
        ("inner.size=big", r"--set: inner\.size must be int, got 'big'\."),
        ("inner.size=true", r"--set: inner\.size must be int, got True\."),
        ("inner.mode=qualty", r"must be one of 'fast', 'quality', got 'qualty'\. Did you mean 'quality'\?"),
        ("inner=3", r"--set: inner must be a table of keys, got 3\."),
        ("inner", r"--set: must read key=value, got 'inner'\."),
        ("name.a=3", r"--set: 'name' in 'name\.a' is a value, not a table\."),
    ],
)
def test_a_bad_assignment_is_explained(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_overrides(Outer(), None, [assignment])


def test_a_broken_file_is_a_data_error(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("name = ")
    with pytest.raises(DataError, match=r"c\.toml: must be TOML"):
        with_overrides(Outer(), file)
    with pytest.raises(DataError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        with_overrides(Outer(), tmp_path / "none.toml")
