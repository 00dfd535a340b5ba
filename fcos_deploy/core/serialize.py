"""Frozen dataclasses to JSON values and back, strictly: an unknown or missing key is an error."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from typing import Any, TypeVar

from fcos_deploy.core.errors import ConfigError

__all__ = ["from_json", "parse_json", "to_json"]

T = TypeVar("T")

_BEYOND_FLOAT = 10**308


def to_json(value: Any) -> Any:  # Any: a JSON value has no narrower type
    """Dataclasses become objects, tuples arrays, enum members their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def parse_json(text: str | bytes) -> Any:  # Any: a JSON value has no narrower type
    """``json.loads`` for text of any origin.

    Raises:
        ValueError: not JSON, or nested deeper than Python goes.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def from_json(kind: type[T], value: Any, *, where: str = "") -> T:
    """The inverse of ``to_json`` for a dataclass type.

    Raises:
        ConfigError: naming the place, what was expected and what came.
    """
    return typing.cast(T, _convert(kind, value, where or kind.__name__))


def _convert(kind: Any, value: Any, where: str) -> Any:  # Any: ``kind`` is any type form that typing can express
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {_convert(arguments[0], k, where): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value not in [member.value for member in kind]:
            raise _mismatch(where, f"one of {', '.join(m.value for m in kind)}", value)
        return kind(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _BEYOND_FLOAT:
        return float(value)
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise _mismatch(where, kind.__name__, value)


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise _mismatch(where, "an array", value)
    kinds = (kinds[0],) * len(value) if kinds[1:] == (...,) else kinds
    if len(kinds) != len(value):
        raise _mismatch(where, f"an array of {len(kinds)}", value)
    return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    return _convert(kind, value, where)


def _convert_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ConfigError(f"{where} has unknown keys {unknown}.", hint="was it written by a newer fcos-deploy?")
    required = {
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"{where} lacks {missing}.")
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _mismatch(where: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{where} must be {expected}, got {str(value)[:80]!r}.")
