from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rcnn_svm.config import from_dict, to_dict, with_overrides
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


def test_round_trip() -> None:
    config = Outer(Inner(4, "quality", 0.5), (1.0,), "y")
    assert from_dict(Outer, to_dict(config)) == config


def test_file_then_assignments(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('name = "file"\n[inner]\nsize = 7\n')
    config = with_overrides(Outer(), file, ["inner.limit=0.25", "inner.mode=quality", "costs=[2, 3]"])
    assert config == Outer(Inner(7, "quality", 0.25), (2.0, 3.0), "file")


def test_none_can_be_set() -> None:
    assert with_overrides(Outer(Inner(limit=1.0)), None, ["inner.limit=none"]).inner.limit is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.siez=3", r"--set: inner: unknown key 'siez'\. Did you mean 'size'\?"),
        ("zzz=3", r"--set: unknown key 'zzz'\. Known keys: inner, costs, name\."),
        ("inner.size=big", r"--set: inner: size must be int, got 'big'\."),
        ("inner.size=true", r"--set: inner: size must be int, got True\."),
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
