"""ONNX graphs: opened once and passed on in place of a path; written whole, with the contract that travels in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fcos_deploy.core.contract import METADATA_KEY, ModelContract, contract_to_text, read_contract
from fcos_deploy.core.errors import BackendLoadError, ExportError
from fcos_deploy.core.files import atomic_file, sha256_file
from fcos_deploy.core.libraries import lazy_import

__all__ = ["NAMES_KEY", "OnnxGraph", "opset_of", "save_onnx", "with_contract"]

onnx = lazy_import("onnx", extra="export")

# JSON list by class channel, as the graph counts, for people and for tools that don't know the contract.
NAMES_KEY = "fcos_deploy.class_names"


class OnnxGraph:
    """One ONNX file. Every property is computed when it is first asked for, and only then.

    Raises:
        BackendLoadError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BackendLoadError(f"'{path}' is not there.")
        self.path = path

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, in hexadecimal."""
        return sha256_file(self.path)

    @cached_property
    def contract(self) -> ModelContract:
        """The contract that the file carries.

        Raises:
            BackendLoadError: it carries none, or is damaged.
        """
        return read_contract(self.path)

    @cached_property
    def model(self) -> Any:  # an onnx.ModelProto; the onnx package has no types
        """The checked model. Everyone shares it, so nobody changes it.

        Raises:
            BackendLoadError: the file is not a complete ONNX model.
            MissingDependencyError: onnx is not installed.
        """
        load, check = onnx.load, onnx.checker.check_model  # outside of the try: onnx may be missing
        try:
            model = load(str(self.path))
            check(model)
        except Exception as error:  # protobuf's and the checker's own exceptions have no common base
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise BackendLoadError(
                f"'{self.path}' is not a complete ONNX model: {reason}.", hint="export it again"
            ) from error
        return model


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
    properties |= {METADATA_KEY: contract_to_text(contract), NAMES_KEY: json.dumps(list(contract.channel_names))}
    properties |= {f"fcos_deploy.{key}": value for key, value in (record or {}).items()}
    onnx.helper.set_model_props(copy, dict(sorted(properties.items())))
    return copy


def opset_of(model: Any) -> int:
    """Version of the standard operator set."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))
