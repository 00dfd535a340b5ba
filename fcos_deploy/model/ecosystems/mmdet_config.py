"""Reads the configuration text in mmdetection checkpoints without evaluating it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["UNKNOWN", "find_dicts", "lookup", "parse_config"]

UNKNOWN = object()  # stands for an expression that is not a literal
_LONGEST_TEXT = 2_000_000


def parse_config(text: str) -> dict[str, Any]:
    """Top-level names and their values; literals, ``dict(...)`` and names assigned before, all else is ``UNKNOWN``.

    Text that is not Python gives an empty dict.
    """
    if len(text) > _LONGEST_TEXT:
        return {}
    try:
        module = ast.parse(text)
        return _assignments(module)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _assignments(module: ast.Module) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names[target.id] = _value(statement.value, names)
    return names


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:  # Any: a literal of any type
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, names) for item in node.elts]
    if isinstance(node, ast.Name):
        return names.get(node.id, UNKNOWN)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, names)
        return -value if isinstance(value, (int, float)) else UNKNOWN
    if isinstance(node, ast.Dict):
        pairs = ((k, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant))
        return {k.value: _value(v, names) for k, v in pairs}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {k.arg: _value(k.value, names) for k in node.keywords if k.arg is not None}
    return UNKNOWN


def lookup(config: Any, *path: str) -> Any:  # Any: configurations are untyped
    """The value under ``path``, or None where a part is missing or not known."""
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return None
        config = config[part]
    return None if config is UNKNOWN else config


def find_dicts(config: Any, type_name: str) -> Iterator[dict[str, Any]]:
    """All dicts with ``type=type_name`` at any depth of ``config``, in order."""
    if isinstance(config, dict):
        if config.get("type") == type_name:
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for item in config:
            yield from find_dicts(item, type_name)
