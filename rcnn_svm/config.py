"""Configuration as nested dataclasses, from TOML and `key=value`, with near matches for typos.

A stage keeps its dataclass beside its code, and its types say what a field may hold: this module fills such
dataclasses from plain data, turns them back, and checks them on construction, in Python as on the command
line. It imports nothing but the standard library and `errors`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from rcnn_svm.errors import ConfigError, DataError

__all__ = [
    "Count",
    "Interval",
    "NotNegative",
    "Positive",
    "Seed",
    "Share",
    "Values",
    "assign",
    "check",
    "choices",
    "from_dict",
    "read_toml",
    "to_dict",
    "with_overrides",
]

T = TypeVar("T")


def to_dict(config: Any, *, finite: bool = False) -> Any:
    """Return nested dataclasses as plain dictionaries, lists, strings and numbers.

    Args:
        config: a dataclass.
        finite: leave out infinite numbers, which JSON cannot hold; they are defaults everywhere,
            so that `from_dict` puts them back.
    """
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return _without_infinities(values) if finite else values


def _without_infinities(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    kept = {k: v for k, v in values.items() if not (isinstance(v, float) and math.isinf(v))}
    return {key: _without_infinities(value) for key, value in kept.items()}


@dataclass(frozen=True)
class Interval:
    """The numbers that a field may hold, none of them infinite: `Annotated[float, Interval(0, 1)]`.

    Attributes:
        low: the lower end; -inf for none.
        high: the upper end; inf for none.
        closed: which ends belong to it.
    """

    low: float = -math.inf
    high: float = math.inf
    closed: Literal["both", "left", "right", "neither"] = "both"

    def broken_by(self, value: float) -> str | None:
        """Return what a number must do that this one does not, or None."""
        if not math.isfinite(value):
            return "be a finite number"
        reaches = value > self.low or (value == self.low and self.closed in ("both", "left"))
        stays = value < self.high or (value == self.high and self.closed in ("both", "right"))
        return None if reaches and stays else str(self)

    def __str__(self) -> str:
        left, right = self.closed in ("both", "left"), self.closed in ("both", "right")
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"lie in {'[' if left else '('}{self.low:g}, {self.high:g}{']' if right else ')'}"
        if math.isfinite(self.high):
            return f"be at most {self.high:g}" if right else f"be less than {self.high:g}"
        if self.low == 0:
            return "not be negative" if left else "be positive"
        return f"be at least {self.low:g}" if left else f"be more than {self.low:g}"


@dataclass(frozen=True)
class Values:
    """What a tuple of values must be beside its type: `Annotated[tuple[float, ...], Values(least=1)]`.

    Attributes:
        least: so many at least.
        distinct: no two alike.
    """

    least: int = 0
    distinct: bool = False

    def broken_by(self, values: Sequence[Any]) -> str | None:
        """Return what values must do that these do not, or None."""
        if len(values) < self.least:
            return f"hold at least {'one value' if self.least == 1 else f'{self.least} values'}"
        return "hold no value twice" if self.distinct and len(set(values)) < len(values) else None


Count: TypeAlias = Annotated[int, Interval(1)]
"""A whole number from 1 on."""
NotNegative: TypeAlias = Annotated[float, Interval(0)]
"""A number from 0 on."""
Positive: TypeAlias = Annotated[float, Interval(0, closed="neither")]
"""A number above 0."""
Seed: TypeAlias = Annotated[int, Interval(0)]
"""A whole number from 0 on."""
Share: TypeAlias = Annotated[float, Interval(0, 1)]
"""A number from 0 to 1."""


def check(config: Any, *, where: str = "") -> None:
    """Check every field of a frozen dataclass by its type; to be called in `__post_init__`.

    Types say all there is to say: names by `Literal`, ranges by `Annotated` with `Interval` and `Values`.
    Lists become tuples and whole numbers floats where the type says so. NaN is no number.

    Args:
        config: the dataclass.
        where: its key in the whole configuration, for messages.

    Raises:
        ConfigError: a value that its field cannot hold.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        converted = _convert(hint, value, f"{where}.{name}" if where else name)
        if converted is not value:
            object.__setattr__(config, name, converted)


def choices(kind: type, name: str) -> tuple[str, ...]:
    """Return the names that a field of a dataclass, or each item of a tuple, is chosen from."""
    hint = _hints(kind)[name]
    while typing.get_origin(hint) is not Literal:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint)


def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def from_dict(kind: type[T], values: Mapping[str, Any], *, where: str = "configuration") -> T:
    """Build the dataclass `kind` from plain data; absent keys keep their defaults.

    Raises:
        ConfigError: an unknown key (with its nearest match) or a value that its field cannot hold.
    """
    return _build(kind, values, f"{where}: ")


def _build(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build `kind`; `where` is what stands before the name of a key: a source, then keys with dots."""
    hints = _hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(hints)}."
            place = where.removesuffix(": ").removesuffix(".")
            raise ConfigError(f"{place}: unknown key {key!r}. {hint}")
        arguments[key] = _convert(hints[key], value, f"{where}{key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` wants it, or refuse it."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = _convert(parameters[0], value, where)
        for rule in parameters[1:]:
            if (wanted := rule.broken_by(converted)) is not None:
                raise ConfigError(f"{where} must {wanted}, got {_shown(converted)}.")
        return converted
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if isinstance(value, Mapping):
            return _build(typing.cast(type, hint), value, f"{where}.")
        given = f"{type(value).__name__}(...)" if dataclasses.is_dataclass(value) else repr(value)
        raise ConfigError(f"{where} must be a table of keys, got {given}.")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        for parameter in parameters:
            if parameter is not type(None) and _fits(parameter, value):
                return _convert(parameter, value, where)
    elif origin is Literal:
        if _fits(hint, value):
            return value
        near = difflib.get_close_matches(str(value), [str(p) for p in parameters], n=1)
        hint_text = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be {_words(hint)}, got {value!r}.{hint_text}")
    elif origin is tuple and _fits(hint, value):
        return tuple(_convert(parameters[0], item, where) for item in value)
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif _fits(hint, value):
        return hint(value) if hint in (int, float) else value
    raise ConfigError(f"{where} must be {_words(hint)}, got {value!r}.")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has the type, whatever it holds; decides between the members of a union."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _fits(typing.get_args(hint)[0], value)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, (Mapping, typing.cast(type, hint)))
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if origin is Literal:
        return any(type(name) is type(value) and name == value for name in typing.get_args(hint))
    if hint is float or hint is int:
        if isinstance(value, bool) or not isinstance(value, Real if hint is float else Integral):
            return False
        # No float is as large as a whole number of hundreds of digits.
        return abs(int(value)) < 1 << 1023 if isinstance(value, Integral) else not math.isnan(value)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def _words(hint: Any) -> str:
    """Name a type for people."""
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _words(parameters[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, parameters))}"
    if origin is tuple:
        return f"a list of {_words(parameters[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parameters))
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _shown(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else repr(value)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        DataError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise DataError(f"{path}: must be TOML, got lists too deep to read.") from error
    except ValueError as error:  # syntax, no UTF-8, or a number of thousands of digits
        raise DataError(f"{path}: must be TOML ({error}).") from error


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set one `a.b.c=value` in nested `values`; the value is read as TOML, `.5` as well, else as a string.

    Raises:
        ConfigError: there is no `=`, or `a.b` is no table.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set: must read key=value, got {assignment!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also a number of thousands of digits, lists thousands deep
        value = None if text.strip() in ("none", "null") else text.strip()
        if re.fullmatch(r"[+-]?\.[0-9]{1,20}", text.strip()):
            value = float(text)
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set: {table!r} in {key.strip()!r} is a value, not a table.")
    values[last] = value


def with_overrides(config: T, file: Path | None = None, assignments: Sequence[str] = ()) -> T:
    """Return `config` with the keys of a TOML file, then of `a.b=c` assignments, put over it.

    Raises:
        ConfigError: an unknown key or a bad value; the message names it and its nearest match.
        DataError: the file cannot be read.
    """
    values: dict[str, Any] = to_dict(config)
    where = "--set"
    if file is not None:
        where = str(file)
        _merge(values, read_toml(file))
    for assignment in assignments:
        assign(values, assignment)
    return from_dict(type(config), values, where=where)


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
