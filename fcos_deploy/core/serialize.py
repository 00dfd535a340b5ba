"""Frozen dataclasses to JSON values, back, and to a JSON Schema; an unknown or missing key is an error with its place.

Why no library: for these 150 lines every device would install pydantic (10 MB with its compiled core), and msgspec
(0.22, 0.7 MB) takes unknown keys of a dataclass in silence; only its own Struct type refuses them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import sys
import types
import typing
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, TypeVar

from fcos_deploy.core.errors import ConfigError, brief

__all__ = ["from_json", "json_schema", "parse_json", "parse_toml", "to_json", "toml_value", "unique_keys"]

T = TypeVar("T")

_BEYOND_FLOAT = 10**308
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def to_json(value: Any) -> Any:  # Any: a JSON value has no narrower type
    """Dataclasses become objects, tuples arrays, enum members and paths their text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return str(value) if isinstance(value, PurePath) else value


def parse_json(text: str | bytes, *, keys: frozenset[str] | None = None) -> Any:  # Any: a JSON value
    """``json.loads`` for text of any origin. ``keys``: those that are kept of every object; the rest is let go at once.

    Raises:
        ValueError: not JSON, or nested deeper than Python goes.
    """
    try:
        if keys is None:
            return json.loads(text)
        return json.loads(text, object_pairs_hook=lambda pairs: {key: item for key, item in pairs if key in keys})
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON values
    """For ``json.loads`` as ``object_pairs_hook``: readers disagree on which of two values of one key counts.

    Raises:
        ValueError: a key occurs twice.
    """
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


_MAX_TOML = 256 << 10  # characters; 1,203 class names take 20,000
_MAX_DOTS = 64  # in one key; reading one takes time that grows with their square


def parse_toml(text: str) -> dict[str, Any]:  # Any: TOML values
    """What a TOML file of any origin holds.

    Raises:
        ValueError: not TOML, larger than 256 KiB, or nested deeper than people do.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    if len(text) > _MAX_TOML:
        raise ValueError(f"it is larger than {_MAX_TOML} characters")
    if any(part.count(".") > _MAX_DOTS for part in re.split(r"[=,\[\]{}\n#]", text)):
        raise ValueError(f"a key or text has more than {_MAX_DOTS} dots")
    try:
        content: dict[str, Any] = toml.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def toml_value(value: Any) -> str:  # Any: a JSON value that TOML has too: text, a number, a boolean or an array of them
    """``value`` as TOML writes it: as JSON does, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007F")


def from_json(kind: type[T], value: Any, *, where: str = "") -> T:
    """The inverse of ``to_json`` for a dataclass type.

    Raises:
        ConfigError: naming the place, what was expected and what came.
    """
    return typing.cast(T, _convert(kind, value, where or kind.__name__))


def _convert(kind: Any, value: Any, where: str) -> Any:  # Any: ``kind`` is any type form that typing can express
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        first = next(k for k in arguments if k is not type(None))  # of ``str | Path`` the text
        return _convert(first, value, where)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        key, item = arguments
        return {_convert(key, k, where): _convert(item, v, f"{where}.{k[:80]}") for k, v in value.items()}
    return _convert_scalar(kind, value, where)


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        if value not in [member.value for member in kind]:
            raise _mismatch(where, f"one of {', '.join(m.value for m in kind)}", value)
        return kind(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _BEYOND_FLOAT:
        return float(value)
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise _mismatch(where, kind.__name__, value)


_PLAIN = frozenset({str, int, float, bool})  # what JSON has already


def _convert_tuple(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list):
        raise _mismatch(where, "an array", value)
    kinds = (kinds[0],) * len(value) if kinds[1:] == (...,) else kinds
    if len(kinds) != len(value):
        raise _mismatch(where, f"an array of {len(kinds)}", value)
    if kinds == tuple(map(type, value)) and _PLAIN.issuperset(kinds):  # often thousands of numbers
        return tuple(value)
    return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _convert_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints, required = _field_types(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ConfigError(
            f"{where} has unknown keys {', '.join(map(brief, unknown[:8]))}.",
            hint="was it written by a newer fcos-deploy?",
        )
    missing = sorted(required - set(value))
    if missing:
        raise ConfigError(f"{where} lacks {missing}.")
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@functools.lru_cache(maxsize=256)
def _field_types(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """The type of each field, and the fields that are required: reading them takes longer than converting an object."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}, _required(kind)


def _required(kind: Any) -> set[str]:
    """Names of the fields without a default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing}


def _mismatch(where: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{where} must be {expected}, got {brief(value)}.")


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of what ``from_json`` takes, without the checks of ``__post_init__``."""
    definitions: dict[str, Any] = {}
    root = _schema(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one type form; dataclasses and enums are added to ``definitions`` and referred to."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(argument, definitions) for argument in arguments]}
    if origin is tuple:
        if arguments[1:] == (...,):
            return {"type": "array", "items": _schema(arguments[0], definitions)}
        items = [_schema(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if kind is Any:
        return {}
    if kind in _JSON_TYPES:
        return {"type": _JSON_TYPES[kind]}
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # so that a type that contains itself ends
        definitions[kind.__name__] = _definition(kind, definitions)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _definition(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    description = {"description": (kind.__doc__ or "").strip().partition("\n")[0]}
    if issubclass(kind, Enum):
        return {**description, "enum": [member.value for member in kind]}
    hints = typing.get_type_hints(kind)
    return {
        **description,
        "type": "object",
        "properties": {f.name: _schema(hints[f.name], definitions) for f in dataclasses.fields(kind)},
        "required": sorted(_required(kind)),
        "additionalProperties": False,
    }
