"""The layers of an engine, read from what the builder logs, so that no GPU is needed to know what it computes in.

A DETAILED build logged VERBOSE prints one message that begins with ``Layers:`` and has a line per layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["EngineLayer", "convolutions", "parse_layer_list", "precision_counts"]

_NAME = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: ")
_SECTION = re.compile(
    r"\b(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName|StreamId|Metadata)|$)"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# What TensorRT calls a convolution: its own layers, and Myelin's.
_CONVOLUTION_KINDS = frozenset({"correlation", "CaskConvolution", "convolution", "CaskGemmConvolution"})


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer; types in TensorRT's words (Float, Half, Int8, UInt8, ...), ONNX nodes by their names."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_nodes: tuple[str, ...]


def parse_layer_list(text: str) -> list[EngineLayer]:
    """The layers of a ``Layers:`` message, in execution order; lines of another form are not layers."""
    return [layer for line in text.splitlines() if (layer := _layer(line.strip())) is not None]


def _layer(line: str) -> EngineLayer | None:
    head = _NAME.match(line)
    if head is None:
        return None
    types = {key: tuple(_DATATYPE.findall(body)) for key, body in _SECTION.findall(line)}
    return EngineLayer(
        name=head["name"],
        kind=head["kind"],
        inputs=types.get("Inputs", ()),
        constants=types.get("Constants", ()),
        outputs=types.get("Outputs", ()),
        onnx_nodes=tuple(_ONNX_LAYER.findall(line)),
    )


def convolutions(layers: Iterable[EngineLayer]) -> list[EngineLayer]:
    """The layers that compute a convolution."""
    return [layer for layer in layers if layer.kind in _CONVOLUTION_KINDS]


def precision_counts(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many convolutions take which type as their input."""
    counts: dict[str, int] = {}
    for layer in convolutions(layers):
        key = layer.inputs[0] if layer.inputs else "unknown"
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items()))
