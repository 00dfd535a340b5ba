"""Reads and writes the contract that travels with an artifact, without importing any framework.

An ONNX file carries it in its metadata; other artifacts have a json file of the same stem beside them.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from fcos_deploy.core.atomic import write_text
from fcos_deploy.core.contract import ModelContract
from fcos_deploy.core.errors import BackendLoadError, ConfigError
from fcos_deploy.core.protobuf_wire import length_delimited_fields
from fcos_deploy.core.serialize import from_json, to_json

__all__ = [
    "METADATA_KEY",
    "contract_to_text",
    "find_contract",
    "onnx_metadata",
    "read_contract",
    "sidecar_path",
    "write_sidecar",
]

METADATA_KEY = "fcos_deploy.contract"
_METADATA_PROPS = 14  # field number in onnx.ModelProto


def contract_to_text(contract: ModelContract) -> str:
    """One line of JSON."""
    return json.dumps(to_json(contract), separators=(",", ":"), sort_keys=True)


def sidecar_path(path: Path) -> Path:
    """The json file that belongs to an engine or IR: ``model.int8.xml`` -> ``model.int8.json``."""
    return path.with_suffix(".json")


def write_sidecar(path: Path, contract: ModelContract, record: dict[str, str] | None = None) -> Path:
    """Write the contract, and how the artifact was made, beside it."""
    content = {"contract": to_json(contract), "record": record or {}}
    write_text(sidecar_path(path), json.dumps(content, indent=1, sort_keys=True) + "\n")
    return sidecar_path(path)


def read_contract(path: Path) -> ModelContract:
    """The contract of an ONNX file, engine or IR.

    Raises:
        BackendLoadError: when the file is missing or damaged, or has no contract.
    """
    try:
        return from_json(ModelContract, json.loads(_contract_text(path)), where="contract")
    except ConfigError as error:
        raise BackendLoadError(f"Cannot read the contract of '{path}': {error.message}", hint=error.hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BackendLoadError(f"Cannot read the contract of '{path}': {error}.") from error


def find_contract(path: Path) -> ModelContract | None:
    """As ``read_contract``, but None for an artifact of elsewhere that carries none.

    Raises:
        BackendLoadError: when the file is missing or damaged.
    """
    if not path.is_file():
        raise BackendLoadError(f"'{path}' is not there.")
    carries = METADATA_KEY in onnx_metadata(path) if path.suffix == ".onnx" else sidecar_path(path).is_file()
    return read_contract(path) if carries else None


def _contract_text(path: Path) -> str:
    if not path.is_file():
        raise BackendLoadError(f"'{path}' is not there.")
    if path.suffix == ".onnx":
        metadata = onnx_metadata(path)
        if METADATA_KEY not in metadata:
            raise BackendLoadError(
                f"'{path}' carries no fcos-deploy contract.", hint="export it with 'fcos-deploy export'"
            )
        return metadata[METADATA_KEY]
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BackendLoadError(f"'{path}' has no '{sidecar.name}' beside it.", hint="copy both files together")
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "contract" not in content:
        raise BackendLoadError(f"'{sidecar}' holds no fcos-deploy contract.", hint="copy the one of this artifact")
    return json.dumps(content["contract"])


def onnx_metadata(path: Path) -> dict[str, str]:
    """The metadata properties of an ONNX file, read from the wire format without the onnx package.

    Raises:
        BackendLoadError: when the file is not a complete ONNX model.
    """
    try:
        if path.stat().st_size == 0:
            raise BackendLoadError(f"'{path}' is empty.")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _metadata_of(data)
    except OSError as error:
        raise BackendLoadError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except (IndexError, KeyError, ValueError) as error:
        raise BackendLoadError(f"'{path}' is not a complete ONNX file.", hint="export it again") from error


def _metadata_of(data: mmap.mmap) -> dict[str, str]:
    properties: dict[str, str] = {}
    for number, start, end in length_delimited_fields(data, start=0, end=len(data)):
        if number == _METADATA_PROPS:
            pairs = length_delimited_fields(data, start=start, end=end)
            entry = {n: data[a:b].decode() for n, a, b in pairs if n in (1, 2)}
            properties[entry[1]] = entry.get(2, "")
    return properties
