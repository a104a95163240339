"""Configuration as nested dataclasses, from TOML and `key=value`, with near matches for typos.

A stage keeps its dataclass beside its code; this module only fills such dataclasses from plain
data and turns them back. It imports nothing but the standard library and `errors`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rcnn_svm.errors import ConfigError, DataError

__all__ = ["assign", "from_dict", "read_toml", "to_dict", "with_overrides"]

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


def from_dict(kind: type[T], values: Mapping[str, Any], *, where: str = "configuration") -> T:
    """Build the dataclass `kind` from plain data; absent keys keep their defaults.

    Raises:
        ConfigError: an unknown key (with its nearest match) or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise ConfigError(f"{where}: unknown key {key!r}. {hint}")
        arguments[key] = _convert(hints[key], value, f"{where}: {key}")
    return kind(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table of keys, got {value!r}.")
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        for parameter in parameters:
            if parameter is not type(None) and _fits(parameter, value):
                return _convert(parameter, value, where)
    elif origin is typing.Literal:
        if value in parameters:
            return value
        near = difflib.get_close_matches(str(value), [str(p) for p in parameters], n=1)
        hint_text = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{where} must be one of {', '.join(map(repr, parameters))}, got {value!r}.{hint_text}"
        )
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(parameters[0], item, where) for item in value)
    elif _fits(hint, value):
        return float(value) if hint is float else value
    name = getattr(hint, "__name__", str(hint)) if not parameters else str(hint)
    raise ConfigError(f"{where} must be {name}, got {value!r}.")


def _fits(hint: Any, value: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return isinstance(value, (list, tuple))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        DataError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: must be TOML ({error}).") from error


def assign(values: dict[str, Any], assignment: str) -> None:
    """Set one `a.b.c=value` in nested `values`; the value is read as TOML, else as a string.

    Raises:
        ConfigError: there is no `=`, or `a.b` is no table.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set: must read key=value, got {assignment!r}.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = None if text.strip() in ("none", "null") else text.strip()
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
