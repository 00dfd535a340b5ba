"""ONNX models in memory: written whole, and with the contract that travels in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text
from fcos_deploy.core.errors import ExportError
from fcos_deploy.core.files import atomic_file
from fcos_deploy.core.libraries import lazy_import

__all__ = [
    "LARGE",
    "opset_of",
    "save_onnx",
    "with_contract",
    "with_weights_aside",
]

onnx = lazy_import("onnx", extra="export")

NAMES_KEY = "fcos_deploy.class_names"  # JSON list, for people and for tools that don't know the contract
LARGE = 65536  # bytes; smaller tensors may be shapes or factors, which a rewriting looks at


def save_onnx(model: Any, path: Path) -> None:  # Any: onnx.ModelProto, whose package ships no types
    """Write a model under its final name once it is complete.

    Raises:
        ConfigError: the folder cannot be written.
        ExportError: the model exceeds protobuf's limit of 2 GiB.
    """
    try:
        content = model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise ExportError(f"The model is too large for one ONNX file: {error}.") from error
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def with_contract(model: Any, contract: ModelContract, *, record: Mapping[str, str] | None = None) -> Any:
    """A copy of the model that carries ``contract``, its class names and how it was made."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    properties = {p.key: p.value for p in model.metadata_props}
    properties |= {METADATA_KEY: contract_to_text(contract), NAMES_KEY: json.dumps(list(contract.class_names))}
    properties |= {f"fcos_deploy.{key}": value for key, value in (record or {}).items()}
    onnx.helper.set_model_props(copy, dict(sorted(properties.items())))
    return copy


def opset_of(model: Any) -> int:
    """Version of the standard operator set."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def with_weights_aside(model: Any, rewrite: Callable[[Any], Any]) -> Any:
    """What ``rewrite`` makes of ``model``, an ``onnx.ModelProto`` that is left as it is.

    ``rewrite`` gets the graph with an input in place of every initializer of more than ``LARGE`` bytes. Tools that
    copy a graph many times and never look at its weights then take a fraction of the time.
    """
    lean = onnx.ModelProto()
    lean.CopyFrom(model)
    graph = lean.graph
    large = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.raw_data) > LARGE}
    small = [tensor for tensor in model.graph.initializer if tensor.name not in large]
    del graph.initializer[:]
    graph.initializer.extend(small)
    for name, tensor in large.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    result = rewrite(lean)
    inputs = [value for value in result.graph.input if value.name not in large]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    result.graph.initializer.extend(large.values())
    return result
